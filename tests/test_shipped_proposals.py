"""The shipped weights and a seed give the proposals that they gave when they were first shipped.

Bit for bit on the processor that made the reference. Others may round a logit at the threshold differently: there
the Dice over a case is at least 0.999 (or two voxels differ), and the number of differing voxels is printed. With
PROGIDIFF_BIT_EQUAL=1 in the environment nothing may differ.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from support import shipped

BIT_EQUAL = os.environ.get("PROGIDIFF_BIT_EQUAL") == "1"


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(shipped.REFERENCE, allow_pickle=False) as archive:
        return dict(archive)


def read_masks(reference: dict[str, np.ndarray], name: str) -> np.ndarray:
    shape = tuple(reference[f"{name}/shape"])
    return np.unpackbits(reference[f"{name}/masks"], count=int(np.prod(shape))).reshape(shape).astype(bool)


def test_the_generated_images_are_those_of_the_reference(reference: dict[str, np.ndarray]):
    assert shipped.hash_inputs() == {name: str(reference[f"input/{name}"]) for name in ("ct", "t2", "tissue")}


@pytest.mark.parametrize("name", shipped.CASES)
def test_the_reference_draws_something_and_its_digest_fits(reference: dict[str, np.ndarray], name: str):
    masks = read_masks(reference, name)
    assert masks.any()
    assert shipped.hash_masks(masks) == str(reference[f"{name}/sha256"])


@pytest.mark.parametrize("name", shipped.CASES)
def test_the_shipped_weights_propose_what_they_did(reference: dict[str, np.ndarray], tmp_path: Path, name: str):
    made_in = str(reference["native_precision"])
    if name == "ct_native" and shipped.native_precision() != made_in:
        pytest.skip(
            f"The reference is in {made_in}; this processor computes in another precision. The other cases are fp32."
        )
    case, expected = shipped.compute(name, tmp_path), read_masks(reference, name)
    assert case.masks.shape == expected.shape
    differing = int((case.masks != expected).sum())
    print(f"{name}: {differing} of {int(expected.sum())} drawn voxels differ")
    if shipped.hash_masks(case.masks) != str(reference[f"{name}/sha256"]):
        assert not BIT_EQUAL, f"{differing} voxels differ, and PROGIDIFF_BIT_EQUAL=1 allows none."
        assert differing <= 2 or 2 * (case.masks & expected).sum() / (case.masks.sum() + expected.sum()) >= 0.999
    if BIT_EQUAL:
        assert case.sha256 == str(reference[f"{name}/raw_sha256"])
    for key, values in case.floats.items():
        kept = reference[f"{name}/{key}"]
        if BIT_EQUAL:
            np.testing.assert_array_equal(values, kept, err_msg=key)
        else:
            np.testing.assert_allclose(values, kept, rtol=0.01, atol=0.02, err_msg=key)
