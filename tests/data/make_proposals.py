#!/usr/bin/env python3
"""Made `proposals_ct_base_3.npz`, what the weights ct-base@3 propose, for `test_shipped_proposals.py`.

This was run once, when these weights came, with one thread; it is run again for other weights alone::

    python tests/data/make_proposals.py

Per case of `tests/shipped.py`: the packed masks and their shape, their SHA-256 and that of the probabilities
before the threshold, and the numbers that go with them; then the SHA-256 of the images, and in which precision
`ct_native` was computed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np


def main() -> None:
    """Compute all cases and write the file."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch

    from support import shipped

    if shipped.load_engine(True).card.full_name != "ct-base@3":
        raise SystemExit("Other weights are shipped; give their reference another name, here and in tests/support.")
    torch.set_num_threads(1)
    kept: dict[str, np.ndarray] = {"native_precision": np.array(shipped.native_precision())}
    for name in shipped.CASES:
        with tempfile.TemporaryDirectory() as folder:
            case = shipped.compute(name, Path(folder))
        kept[f"{name}/masks"] = np.packbits(case.masks)
        kept[f"{name}/shape"] = np.array(case.masks.shape)
        kept[f"{name}/sha256"] = np.array(shipped.hash_masks(case.masks))
        kept[f"{name}/raw_sha256"] = np.array(case.sha256)
        kept |= {f"{name}/{key}": values for key, values in case.floats.items()}
    kept |= {f"input/{name}": np.array(digest) for name, digest in shipped.hash_inputs().items()}
    np.savez_compressed(shipped.REFERENCE, **kept)


if __name__ == "__main__":
    main()
