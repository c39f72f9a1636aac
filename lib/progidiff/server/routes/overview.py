"""An image in small, for the two other planes and the surface of the review page.

A browser never gets a whole volume (see `review`). It gets one with fewer pixels, every so many slices, rows and
columns one, so that 512 x 512 x 300 voxels come as 128 x 128 x 300. Of a result it gets the consensus of one structure
on the same pixels, one bit each; what a person draws is put over it there.

Little-endian::

    uint16 Z, Y, X          pixels
    uint16 z, y, x          the step between them in voxels; the first one lies half a step in
    Z Y X times int16       pixels, see `scale` of the image; of a mask instead ceil(Z Y X / 8) bytes, lowest bit first
"""

from __future__ import annotations

import struct

import numpy as np
from fastapi import Request
from fastapi.responses import Response
from numpy.typing import NDArray

from progidiff.errors import RequestError
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.server.gate.endpoints import READ, Endpoints
from progidiff.server.parts import get_context
from progidiff.server.routes.image_id import ImageId
from progidiff.server.routes.review import find_scale, open_volume, send_bytes, to_pixels
from progidiff.server.routes.submissions import find_result

MOST_ACROSS, MOST_SLICES = 160, 400
"""Pixels of the overview: across a slice, and slices."""


def build_endpoints() -> Endpoints:
    """The overview and what a result draws on it."""
    endpoints = Endpoints()

    @endpoints.get(
        "/progidiff/review/{image}/overview", READ, tags=["Review"], summary="The image with fewer voxels, int16"
    )
    def get_overview(request: Request, image: ImageId) -> Response:
        volume = open_volume(get_context(), image)
        stack, _ = volume.to_stack()
        steps = find_steps(stack.shape)
        pixels = to_pixels(stack[sample(steps)], find_scale(volume))
        return send_bytes(request, _pack_header(pixels.shape, steps) + pixels.tobytes())

    @endpoints.get(
        "/progidiff/review/{image}/overview/mask",
        READ,
        tags=["Review"],
        summary="The consensus of a structure with fewer voxels, one bit each",
        takes="Query: proposals (a key), structure",
    )
    def get_mask(request: Request, image: ImageId, proposals: str = "", structure: str = "") -> Response:
        result = find_result(get_context(), image, proposals)
        mask = sample_consensus(result, structure)
        bits = np.packbits(mask, axis=None, bitorder="little")
        return send_bytes(request, _pack_header(mask.shape, find_steps(result.grid.shape)) + bits.tobytes())

    return endpoints


def find_steps(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The step between voxels that are shown, along (z, y, x).

    Example:
        >>> find_steps((300, 512, 512)), find_steps((900, 130, 90))
        ((1, 4, 4), (3, 1, 1))
    """
    across = -(-max(shape[1:]) // MOST_ACROSS)
    return -(-shape[0] // MOST_SLICES), across, across


def sample(steps: tuple[int, ...]) -> tuple[slice, ...]:
    """The voxels that are shown: every step, from half a step."""
    return tuple(slice(step // 2, None, step) for step in steps)


def sample_consensus(result: VolumeProposals, structure: str) -> NDArray[np.bool_]:
    """Where at least half of the proposals draw a structure, bool of shape (Z, Y, X) on the voxels that are shown.

    Raises:
        RequestError: if the result holds no such structure.
    """
    if structure not in result.structures:
        raise RequestError(f"These proposals hold no '{structure[:60]}'; they hold {', '.join(result.structures)}.")
    depth, rows, cols = sample(find_steps(result.grid.shape))
    planes = range(*depth.indices(result.grid.shape[0]))
    return np.stack([_find_consensus(result.slice_masks(structure, z)[:, rows, cols]) for z in planes])


def _find_consensus(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    drawn: NDArray[np.bool_] = masks.sum(axis=0) * 2 >= len(masks)
    return drawn


def _pack_header(shape: tuple[int, ...], steps: tuple[int, ...]) -> bytes:
    return struct.pack("<6H", *shape, *steps)
