"""On a real CUDA device; `make test-gpu` runs these. What `benchmarks/gpu.py` measures must hold here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from progidiff.images.reading import load_volume
from progidiff.prompts.parser import Query
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest
from progidiff.testing import add_tiny_close_up, build_tiny_model
from support.phantoms import write_phantom
from support.servers import load_script

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("gpu")


@pytest.fixture
def bench(benchmark: ModuleType, tmp_path: Path) -> Iterator[Any]:
    yield benchmark.Bench(torch.device("cuda", 0), benchmark.FULL, "full", tmp_path)
    torch.cuda.set_per_process_memory_fraction(1.0, 0)
    torch.cuda.empty_cache()


@pytest.fixture
def small(benchmark: ModuleType, tmp_path: Path) -> Any:
    """Toys, on the device."""
    return benchmark.Bench(torch.device("cuda", 0), benchmark.SMALL, "small", tmp_path)


def test_masks_in_half_precision_are_those_of_the_processor(benchmark: ModuleType, bench: Any):
    found = benchmark.run_answers(bench)
    for dtype in ("bf16", "fp16", "fp32"):
        if not isinstance(found[dtype], str):
            assert found[dtype]["dice"] >= benchmark.HOLDS_FROM, found[dtype]
            assert found[dtype]["mask_pixels"] > 1000


def test_less_and_less_memory_gives_the_same_masks_until_it_is_refused_and_then_all_is_well_again(
    benchmark: ModuleType, bench: Any
):
    found = benchmark.run_ladder(bench)
    rungs = [found[name] for name in found if name.endswith(" GB")]
    assert any(rung["tried"] for rung in rungs)
    for rung in rungs:
        assert "refused" in rung or rung["holds"], rung
    assert found["afterwards"]["holds"]


def test_memory_filled_by_others_makes_batches_smaller_and_the_answer_stays(benchmark: ModuleType, bench: Any):
    engine = bench.open_engine()
    request = bench.ask(engine, "liver", slices=tuple(range(50, 66)))
    wanted = engine.propose(request, bench.volume)
    engine._free_memory()
    free, _ = torch.cuda.mem_get_info(0)
    held = torch.empty(max(0, free - 300_000_000), dtype=torch.uint8, device="cuda")
    try:
        found = engine.propose(request, bench.volume)
    finally:
        del held
    assert benchmark.compare_masks(found, wanted)["holds"]


def test_the_processor_answers_what_does_not_fit_if_that_is_allowed(benchmark: ModuleType, bench: Any):
    request = bench.ask(None, "liver", slices=(60,))
    wanted = Engine(bench.model, device="cpu").propose(request, bench.volume)
    engine = bench.open_engine(cpu_fallback=True)
    with benchmark.limited_memory(bench, engine, 0.0):
        found = engine.propose(request, bench.volume)
    assert benchmark.compare_masks(found, wanted)["holds"]


def test_a_model_with_a_close_up_answers_on_the_device_as_on_the_processor(benchmark: ModuleType, tmp_path: Path):
    model = add_tiny_close_up(build_tiny_model(tmp_path / "model"))
    volume = load_volume(write_phantom(tmp_path / "phantom.nii.gz"), modality="CT")
    request = ProposalRequest(queries=[Query("liver", "liver")], num_proposals=3, num_inference_steps=2)
    wanted = Engine(model, device="cpu", dtype="fp32").propose(request, volume)
    found = Engine(model, device="cuda", dtype="fp32").propose(request, volume)
    assert benchmark.compare_masks(found, wanted)["dice"] > 0.98  # Random weights lie close to one half everywhere.


@pytest.mark.parametrize("training", ["train_evidence", "train_close_up", "train_lora"])
def test_trainings_run_on_the_device(benchmark: ModuleType, small: Any, training: str):
    found = benchmark.SECTIONS[training].run(small)
    assert found["slices_per_second"] > 0
    assert 0 < found["busy"] <= 1
    assert found["allocated_gb"] > 0


def test_stable_diffusion_and_the_stock_pipeline_run_at_toy_widths(benchmark: ModuleType, small: Any):
    for name in ("matmul", "stable_diffusion", "stock_controlnet"):
        found = benchmark.run_section(small, name, 60)
        assert "error" not in found, found


def test_the_same_request_gives_the_same_proposals_twice(bench: Any):
    engine = bench.open_engine()
    request = bench.ask(engine, "liver", slices=tuple(range(56, 60)))
    first = engine.propose(request, bench.volume)
    assert (first.probabilities == engine.propose(request, bench.volume).probabilities).all()
