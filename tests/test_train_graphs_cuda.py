"""CUDA graphs in real runs: the same losses as without, whatever is checkpointed or packed. Needs a CUDA device."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from guard_tools import OOM_TEXT  # noqa: E402
from test_train_finetune import tune  # noqa: E402
from train_tools import events, make_model, make_run, make_text, measurement, train  # noqa: E402

from vramplan.core.types import DataSpec, Levers, RunSpec, Schedule  # noqa: E402
from vramplan.core.units import MIB  # noqa: E402
from vramplan.train.fast import graphs as graphs_module  # noqa: E402
from vramplan.train.fast.graphs import SPARE_BYTES, CudaGraphs  # noqa: E402
from vramplan.train.trainer import QloraTrainer  # noqa: E402

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card"),
]
STEPS = 12
MADE = "micro-batches of 2 x 64 tokens run as one CUDA graph from now on"
DROPPED = "CUDA graphs are dropped, memory is short: shapes that come back may get one again"


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
    assert graphs_of(tmp_path / "with") == [MADE]
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


# ------------------------------------------------------------------------------------------- when memory is short
def once(patch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[[Any], bool]) -> None:
    """A method runs out of memory the first time that `when` says so."""
    stock, raised = getattr(owner, name), list[int]()

    def method(self: Any, *arguments: Any) -> Any:
        if not raised and when(self):
            raised.append(1)
            raise torch.OutOfMemoryError(OOM_TEXT)
        return stock(self, *arguments)

    patch.setattr(owner, name, method)


@pytest.mark.parametrize("where", ["an evaluation", "a micro-step after a replay"])
def test_they_are_dropped_and_come_back(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    run = run_of(tiny, {}, eval_strategy="steps", eval_steps=6)
    run = replace(run, data=DataSpec(path=str(tiny[1]), kind="text", eval_fraction=0.1))
    without = losses(tmp_path / "without", replace(run, schedule=replace(run.schedule, cuda_graphs=False)))
    if where == "an evaluation":
        held: Callable[[Any], bool] = lambda trainer: bool(trainer.graphs and trainer.graphs.made)  # noqa: E731
        once(monkeypatch, QloraTrainer, "_evaluate_piece", held)
    else:
        calls = itertools.count(1)  # two in the step of the first, and the fourth ends the step after it
        once(monkeypatch, graphs_module._Graph, "replay", lambda _: next(calls) == 4)
    tune(run, tmp_path / "with")
    assert graphs_of(tmp_path / "with") == [MADE, DROPPED, MADE]
    assert [event["action"] for event in events(tmp_path / "with", "oom")] == ["drop_graphs"]
    found = [event["loss"] for event in events(tmp_path / "with", "step")]
    assert found == pytest.approx(without, rel=5e-3)
    assert found[-1] < found[0] - 0.3


def test_what_was_cached_once_makes_room_for_a_graph_which_gives_it_back() -> None:
    device = torch.device("cuda", 0)

    def work() -> Any:  # 512 MiB
        return torch.ones(2**27, device=device).sum()

    try:
        for more, wanted in ((-64 * MIB, False), (64 * MIB, True)):
            torch.cuda.set_per_process_memory_fraction(1.0, device)
            gc.collect()
            torch.cuda.empty_cache()
            work()
            allowed = torch.cuda.memory_reserved(device) + SPARE_BYTES + more
            torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info(device)[1], device)
            recorder = CudaGraphs(device)
            assert recorder.room() == wanted
        before = torch.cuda.memory_reserved(device)
        play = recorder.record(work)
        assert float(play()) == float(play()) == 2.0**27
        assert 512 * MIB <= recorder.reserved_bytes < 576 * MIB
        del play
        recorder.drop()
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved(device) <= before + 32 * MIB
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
