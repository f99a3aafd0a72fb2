"""CUDA graphs in real runs: the same losses as without, whatever is checkpointed or packed. Needs a CUDA device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from train_tools import events, make_model, make_run, make_text, measurement, train  # noqa: E402

from vramplan.core.types import DataSpec, Levers, RunSpec, Schedule  # noqa: E402

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card"),
]
STEPS = 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("tiny")
    text = make_text(root / "rows.jsonl", 160)
    return make_model(root / "model", text, head_dim=64), text


def run_of(tiny: tuple[Path, Path], levers: dict[str, Any], **schedule: Any) -> RunSpec:
    settings = {"max_steps": STEPS, "learning_rate": 5e-3, "save_steps": 1000, "warmup_ratio": 0.0, **schedule}
    run = make_run(*tiny, accumulation=2, schedule=Schedule(**settings), seq_len=64, packing=True)
    return replace(run, levers=replace(run.levers, **levers), data=DataSpec(path=str(tiny[1]), kind="text"))


def losses(folder: Path, run: RunSpec) -> list[float]:
    code, said = train(run, folder)
    assert code == 0, said
    return [event["loss"] for event in events(folder, "step")]


def graphs_of(folder: Path) -> list[str]:
    return [event["message"] for event in events(folder, "phase") if event["name"] == "graphs"]


@pytest.mark.parametrize(
    "levers",
    [{"checkpointing": "none"}, {"checkpointing": "all"}, {"checkpointing": "all", "checkpoint_offload": True}],
    ids=["none", "all", "offload"],
)
def test_the_losses_are_those_without_graphs(tiny: tuple[Path, Path], tmp_path: Path, levers: dict[str, Any]) -> None:
    without = losses(tmp_path / "without", run_of(tiny, levers, cuda_graphs=False))
    with_graphs = losses(tmp_path / "with", run_of(tiny, levers))
    assert graphs_of(tmp_path / "without") == []
    assert graphs_of(tmp_path / "with") == ["micro-batches of 2 x 64 tokens run as one CUDA graph from now on"]
    assert with_graphs == pytest.approx(without, rel=5e-3)
    assert with_graphs[-1] < with_graphs[0] - 0.3


def test_the_measurement_is_that_of_ordinary_steps(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """A graph's inside is not seen by the allocator: its steps must not pass for small ones."""
    peaks = []
    for name, graphs in (("without", False), ("with", True)):
        losses(tmp_path / name, run_of(tiny, {}, cuda_graphs=graphs))
        peaks.append(next(p.peak_bytes for p in measurement(tmp_path / name).phases if p.name == "step"))
        told = [event["peak_bytes"] for event in events(tmp_path / name, "step")]
        assert len(told) == STEPS and min(told) == pytest.approx(max(told), rel=0.01)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


def test_a_family_without_fused_layers_has_no_graphs(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    run = run_of(tiny, {"kernels": "stock"})
    losses(tmp_path / "stock", run)
    assert graphs_of(tmp_path / "stock") == [] and run.levers != Levers()
