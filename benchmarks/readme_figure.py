"""Draw the README's picture: real proposals for real prompts, their consensus and their agreement.

    python benchmarks/readme_figure.py --image IMAGE --prompt liver --prompt "left kidney" --out
    docs/images/proposals.png

The picture is what the model in `--model-dir` (default: the built-in weights) gives for the seed; nothing is chosen but
the slice, which is a large one on which the proposals differ. The settings are printed, for the caption.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from progidiff.images.reading import load_volume
from progidiff.prompts.parser import parse_prompt
from progidiff.proposals.drawing import draw_proposals
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, required=True, help="CT or MR volume, any format that can be read")
    parser.add_argument("--prompt", action="append", required=True, help="repeat for several rows")
    parser.add_argument("--out", type=Path, default=Path("docs/images/proposals.png"))
    parser.add_argument("--modality", default="auto", help="CT, MR or auto")
    parser.add_argument("--num-proposals", type=int, default=4, help="K (default 4)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slice", type=int, action="append", help="axial index for each row instead of the chosen one")
    parser.add_argument("--model-dir", type=Path, help="model folder (default: the built-in weights)")
    parser.add_argument("--device", help="cpu or cuda (default: what there is)")
    options = parser.parse_args()

    volume = load_volume(options.image, options.modality)
    engine = Engine(model_dir=options.model_dir or ROOT / "apps" / "progidiff" / "model", device=options.device)
    queries = []
    for prompt in options.prompt:
        queries += [query for query in parse_prompt(prompt, known=engine.structures) if query not in queries]
    request = ProposalRequest(
        queries=queries, num_proposals=options.num_proposals, num_inference_steps=options.steps, seed=options.seed
    )
    proposals = engine.propose(request, volume)
    path = draw_proposals(volume, proposals, options.out, slices=options.slice)
    print(
        f"Wrote {path}: {volume.name}, {proposals.model_version}, K = "
        f"{proposals.num_proposals}, {proposals.num_inference_steps} steps, seed "
        f"{proposals.seed}, {proposals.seconds:.0f} s."
    )


if __name__ == "__main__":
    main()
