"""Where the time of a whole volume goes, and how much memory a large one takes; no server involved.

    python benchmarks/volume_cost.py --image sample_datastore/sample_ct_abdomen.nii.gz --out
    benchmarks/results/volume_cost.json python benchmarks/volume_cost.py --image
    sample_datastore/sample_ct_abdomen.nii.gz --large --out benchmarks/results/volume_cost_large.json

Times every call of the networks (text encoder, image encoder and query head, residuals, denoiser, decoder); the rest of
the wall time between the file on disk and the mask on disk is our own code. `--large` first resamples the image to 512
x 512 x 300 voxels and reports the peak resident memory of the process.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from progidiff.images.reading import load_volume
from progidiff.images.volume import Volume
from progidiff.images.writing import save_mask
from progidiff.prompts.parser import compute_label_ids, parse_prompt
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest

ROOT = Path(__file__).resolve().parents[1]


class NetworkClock:
    """Adds up the time inside the outermost network call; networks never call each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, name: str, label: str) -> None:
        """Replace the method `name` of `owner` by a timed one."""
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)


def measure(
    engine: Engine, clock: NetworkClock, path: Path, prompt: str, num_proposals: int, out: Path
) -> dict[str, Any]:
    """From file to file, once."""
    clock.seconds = {}
    started = time.perf_counter()
    volume = load_volume(path)
    queries = parse_prompt(prompt, engine.structures)
    result = engine.propose(ProposalRequest(queries=queries, num_proposals=num_proposals), volume)
    labels = result.label_map(volume.grid, "consensus", compute_label_ids(queries))
    save_mask(labels, volume.grid, out / "mask.nii.gz")
    total = time.perf_counter() - started
    networks = sum(clock.seconds.values())
    return {
        "prompt": prompt,
        "shape": list(volume.array.shape),
        "seconds": total,
        "networks": {k: round(v, 3) for k, v in clock.seconds.items()},
        "share_outside_networks": 1 - networks / total,
        "foreground_voxels": int((labels > 0).sum()),
    }


def enlarge(volume: Volume, shape: tuple[int, int, int]) -> Volume:
    """The same body on a finer grid, linear interpolation, int16."""
    small = torch.from_numpy(np.ascontiguousarray(volume.array, dtype=np.float32))[None, None]
    large = (
        torch.nn.functional.interpolate(small, size=shape, mode="trilinear", align_corners=False)[0, 0]
        .round()
        .to(torch.int16)
        .numpy()
    )
    scale = np.diag([*(old / new for old, new in zip(volume.array.shape, shape, strict=True)), 1.0])
    return Volume(large, volume.affine @ scale, volume.modality, volume.modality_source, volume.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--prompt", default="liver")
    parser.add_argument("--second-prompt", default="spleen")
    parser.add_argument("--num-proposals", type=int, default=4)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--model", type=Path, default=ROOT / "apps" / "progidiff" / "model")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    engine = Engine(options.model)
    pipeline = engine.load()
    clock = NetworkClock()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = options.image
        if options.large:
            large = enlarge(load_volume(path), (512, 512, 300))
            path = save_mask(large.array, large.grid, folder / "large.nii.gz")
            del large
        # Loading the text encoder and the first call of every network are not part of a volume's cost.
        first = ProposalRequest(queries=parse_prompt("liver", engine.structures), num_proposals=1, slices=(0, 1))
        engine.propose(first, load_volume(path))
        for owner, method, label in (
            (pipeline.backbone, "encode_text", "text encoder"),
            (pipeline, "encode_slices", "image encoder"),
            (pipeline, "predict_evidence", "query head"),
            (pipeline.branch, "compute_residuals", "residuals"),
            (pipeline, "_predict", "denoiser"),
            (pipeline.codec, "decode_latents", "decoder"),
        ):
            clock.wrap(owner, method, label)
        runs = [
            measure(engine, clock, path, p, options.num_proposals, folder)
            for p in (options.prompt, options.second_prompt)
        ]
    report = {
        "model": engine.model_version,
        "image": options.image.name,
        "num_proposals": options.num_proposals,
        "threads": torch.get_num_threads(),
        "first": runs[0],
        "second": runs[1],
        "peak_resident_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2,
    }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
