"""The codec's ceiling: encode-decode Dice of ground-truth masks at the working resolution, per structure.

    python benchmarks/codec_ceiling.py --studies ../shared/data/ct --cases img0024 img0033 img0039 --out
    benchmarks/results/codec_ceiling.json

Nothing that works on latents can draw a structure better than this. Voxels are pooled over all slices of the cases
named.
"""

import argparse
import json
import tempfile
from pathlib import Path

from progidiff.model.backbone import Backbone
from progidiff.model.folder import load_card
from progidiff.training.backbone_stages import compute_codec_ceiling
from progidiff.training.slice_cache import SliceCache, list_cases

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=Path, required=True, help="local datastore with labels/final and labels.json")
    parser.add_argument("--cases", nargs="*", help="only these cases (default: all)")
    parser.add_argument("--model", type=Path, default=ROOT / "apps" / "progidiff" / "model")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()

    card = load_card(options.model)
    cases = list_cases(options.studies, options.cases)
    with tempfile.TemporaryDirectory() as folder:
        cache = SliceCache(cases, card.structures, card.conditioning, Path(folder))
        ceiling = compute_codec_ceiling(Backbone(options.model / "backbone").vae, cache, per_structure=10**9)
    print(f"| structure | encode-decode Dice ({card.full_name}, {len(cases)} volumes) |\n|---|---|")
    for structure, dice in sorted(ceiling.items(), key=lambda item: item[1]):
        print(f"| {structure} | {dice:.3f} |")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps({"model": card.full_name, "cases": [c.name for c in cases], "dice": ceiling}, indent=1) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
