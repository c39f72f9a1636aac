"""Kept proposals as DICOM SEG: to download, and to put into the DICOMweb server that the image came from."""

from __future__ import annotations

from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict

from progidiff.dicomweb.segmentation import read_dataset
from progidiff.dicomweb.segmentation_writer import Segment, write_agreement, write_label, write_overlapping
from progidiff.errors import NotFoundError, RequestError
from progidiff.prompts.structures import number_structures
from progidiff.proposals.request import AGREEMENT, CONSENSUS, DISAGREEMENT
from progidiff.proposals.volume_proposals import VolumeProposals, check_shown
from progidiff.server.datastores.pacs import PacsDatastore
from progidiff.server.gate.endpoints import ANNOTATE, READ, Endpoints
from progidiff.server.parts import Context, get_context
from progidiff.server.routes.dicomweb import open_named

ALL = "all"
"""Every proposal of every structure, as segments that overlap."""

_TAKES = "Query: proposals (a key), show (consensus, best, 1..K, all, agreement)"


class StoredSegmentation(BaseModel):
    """What is in the DICOMweb server now.

    Attributes:
        image: Id of the image.
        proposals: Key of the result.
        show: What of it is stored.
        study, series, instance: UIDs of the segmentation.
        segments: What its segments are called.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str
    proposals: str
    show: str
    study: str
    series: str
    instance: str
    segments: list[str]


def build_endpoints() -> Endpoints:
    """Download and store."""
    endpoints = Endpoints()

    @endpoints.get(
        "/progidiff/proposals/{image}/dicom-seg",
        READ,
        tags=["DICOMweb"],
        summary="Kept proposals as DICOM SEG; show=agreement as a FRACTIONAL one",
        takes=_TAKES,
    )
    def download(image: str, proposals: str = "", show: str = CONSENSUS) -> Response:
        context = get_context()
        image_id, key, result = _find(context, image, proposals)
        return send_segmentation(write_proposals(context, image_id, result, show), f"{key[:12]}-{show}")

    @endpoints.post(
        "/progidiff/proposals/{image}/dicom-seg",
        ANNOTATE,
        tags=["DICOMweb"],
        summary="The same, put into the DICOMweb server; it labels nothing",
        takes=_TAKES,
    )
    def store(image: str, proposals: str = "", show: str = CONSENSUS) -> StoredSegmentation:
        context = get_context()
        datastore = context.app.datastore()
        if not isinstance(datastore, PacsDatastore):
            raise RequestError(
                "The images lie in a folder, not on a DICOMweb server, so there is nowhere to put a segmentation. "
                "Download it (GET the same address), or start the server with --studies http://.../dicom-web."
            )
        image_id, key, result = _find(context, image, proposals)
        content = write_proposals(context, image_id, result, show)
        datastore.send(content)
        written = read_dataset(content)
        return StoredSegmentation(
            image=image_id,
            proposals=key,
            show=show,
            study=str(written.StudyInstanceUID),
            series=str(written.SeriesInstanceUID),
            instance=str(written.SOPInstanceUID),
            segments=[str(segment.SegmentLabel) for segment in written.SegmentSequence],
        )

    return endpoints


def send_segmentation(content: bytes, name: str) -> Response:
    """A DICOM file as the answer.

    Args:
        content: Of it.
        name: Of the file, without suffix; letters, digits and '-'.
    """
    return Response(
        content,
        media_type="application/dicom",
        headers={"Content-Disposition": f'attachment; filename="{name}.dcm"', "Cache-Control": "no-store"},
    )


def write_proposals(context: Context, image: str, result: VolumeProposals, show: str) -> bytes:
    """Proposals as a DICOM SEG on the slices of their image. Its segments are AUTOMATIC: nobody has accepted them.

    Args:
        context: The parts of the app.
        image: Id of the image.
        result: Its proposals.
        show: "consensus", "best" or "1".."K", as one label map; "all", one segment per structure and proposal;
            "agreement", a FRACTIONAL SEG of the share of proposals that draw a voxel.

    Raises:
        RequestError: if `show` is none of these.
        ImageError, GeometryError: if nothing is drawn, or the image is no DICOM series.
        TooLargeError: if it would be too large.
    """
    if show == DISAGREEMENT:
        raise RequestError(
            "show=disagreement is no structure and has no word in DICOM. Ask for show=agreement: where it is neither 0 "
            "nor 1, proposals differ."
        )
    if show not in (ALL, AGREEMENT):
        show = str(check_shown(show, result.num_proposals))
    _, volume = open_named(context, image)
    sources = context.served.find_sources(image)
    ids, count, grid = number_structures(result.structures), result.num_proposals, volume.grid
    origin = f"seed {result.seed}, {result.model_version}"

    def describe(name: str, text: str, suffix: str = "") -> Segment:
        return Segment(name, ids[name], f"{text}, {origin}.", is_proposal=True, suffix=suffix)

    if show == AGREEMENT:
        text = f"Share of {count} proposals that draw a voxel, no calibrated probability"
        return write_agreement(
            sources,
            [
                (describe(name, text), context.served.arrange(volume, result.agreement(grid, name)))
                for name in result.structures
            ],
        )
    if show == ALL:
        return write_overlapping(
            sources,
            [
                (
                    describe(name, f"Proposal {number} of {count}", f" ({number}/{count})"),
                    context.served.arrange(volume, result.mask(grid, name, number)).astype(bool),
                )
                for name in result.structures
                for number in range(1, count + 1)
            ],
        )
    text = f"{show.capitalize()} of {count} proposals" if not show.isdigit() else f"Proposal {show} of {count}"
    labels = context.served.arrange(volume, result.label_map(grid, show, ids))
    return write_label(sources, labels, {ids[name]: describe(name, text) for name in result.structures})


def load_kept(context: Context, image: str, key: str = "") -> tuple[str, VolumeProposals]:
    """A kept result of an image and its key; the newest if `key` is "".

    Raises:
        NotFoundError: if it is not kept.
    """
    chosen = context.infer.describe_proposals(image, key or None).proposals
    result = context.infer.store.load(chosen)
    if result is None:
        raise NotFoundError(f"No proposals {chosen[:64]} of image '{image}' are kept any more. Run the prompt again.")
    return chosen, result


def _find(context: Context, image: str, key: str) -> tuple[str, str, VolumeProposals]:
    image_id, _ = open_named(context, image)
    chosen, result = load_kept(context, image_id, key)
    return image_id, chosen, result
