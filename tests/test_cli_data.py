"""The flags of training data and packing become the right run, and the wrong ones one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_cli
from test_cli import FIT, Cli, Rooms

from vramplan.core.fixes import command
from vramplan.core.types import DataSpec

cli, rooms, data = test_cli.cli, test_cli.rooms, test_cli.data  # fixtures

DATA_FLAGS: dict[str, dict[str, Any]] = {
    "--data-kind sharegpt": {"kind": "sharegpt"},
    "--text-column body": {"text_column": "body"},
    "--data-config en --data-revision v2": {"config": "en", "revision": "v2"},
    "--split train[:10%]": {"split": "train[:10%]"},
    "--eval-split validation": {"eval_split": "validation"},
    "--eval-data other/set": {"eval_path": "other/set"},
    "--eval-fraction 0.1": {"eval_fraction": 0.1},
    "--truncation drop --on-bad-row skip": {"truncation": "drop", "on_bad_row": "skip"},
    "--no-assistant-only-loss": {"assistant_only_loss": False},
    "--no-completion-only-loss": {"completion_only_loss": False},
    "--group-by-length": {"train_sampling_strategy": "group_by_length"},
    "--train-sampling-strategy sequential": {"train_sampling_strategy": "sequential"},
    "--show-samples 3": {"show_samples": 3},
}


@pytest.mark.parametrize("flags", ["", *DATA_FLAGS])
def test_every_data_flag_arrives(cli: Cli, rooms: Rooms, data: Path, flags: str) -> None:
    assert cli("train", "llama-2-7b", "--data", "d.jsonl", *flags.split()).code == 0
    assert rooms.prepared is not None
    run = rooms.prepared[1]
    assert run.data == DataSpec(path=str(data), **DATA_FLAGS.get(flags, {}))
    # The command that a diagnosis prints means this run again; what is only shown may differ.
    words = command(run).split()
    for flag in flags.split()[::2]:
        assert flag in words or flag in ("--group-by-length", "--show-samples")


def test_packing_arrives_and_is_settled_by_a_plan(cli: Cli, rooms: Rooms, data: Path) -> None:
    assert cli("estimate", "llama-2-7b", "--packing").code == 0
    assert rooms.run is not None and rooms.run.packing
    assert cli("train", "llama-2-7b", "--data", "d.jsonl", "--packing").code == 0
    assert rooms.prepared is not None and rooms.prepared[1].packing
    assert "--packing" in command(rooms.prepared[1])
    cli(*FIT, "--gpu", "rtx-4090", "-o", "plan.json")
    result = cli("train", "plan.json", "--data", "d.jsonl", "--packing")
    assert result.code == 2 and result.error == "error: --packing is settled by plan.json"


def test_all_cards_are_those_that_can_pack(cli: Cli, rooms: Rooms) -> None:
    result = cli("estimate", "llama-2-7b", "--packing", "--gpu", "all", "--json")
    assert result.code == 0
    names = {gpu["gpu"] for gpu in json.loads(result.out)["gpus"]}
    assert "rtx-4090" in names and "t4" not in names
    assert "packing needs compute capability 8.0: " in result.err and "t4" in result.err
    assert '"t4"' in cli("estimate", "llama-2-7b", "--gpu", "all", "--json").out


def test_a_held_out_file_is_looked_at_and_absolute(cli: Cli, rooms: Rooms, data: Path) -> None:
    (data.parent / "e.jsonl").write_text('{"text": "b"}\n')
    assert cli("train", "llama-2-7b", "--data", "d.jsonl", "--eval-data", "e.jsonl").code == 0
    assert rooms.prepared is not None and rooms.prepared[1].data is not None
    assert rooms.prepared[1].data.eval_path == str(data.parent / "e.jsonl")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--data-kind shargpt", "--data-kind has no kind of data 'shargpt' (did you mean sharegpt"),
        ("--eval-data none.jsonl", "--eval-data none.jsonl does not exist"),
        ("--eval-fraction 0.1 --eval-split test", "--eval-fraction excludes --eval-data and --eval-split"),
        ("--show-samples -1", "--show-samples must be a whole number from 0"),
        ("--truncation never", "--truncation cannot be 'never'"),
        ("--packing --attn eager", "--packing needs attention that keeps documents apart, which --attn eager does not"),
        ("--packing --padding", "--packing and --padding exclude each other"),
        ("--resume --data-only", "--data-only cannot change when a run is resumed"),
    ],
)
def test_bad_flags(cli: Cli, rooms: Rooms, data: Path, flags: str, text: str) -> None:
    if "--resume" in flags:
        (data.parent / "run.json").write_text("{}")
        result = cli("train", *flags.split(), "-o", ".")
    else:
        result = cli("train", "llama-2-7b", "--data", "d.jsonl", *flags.split())
    assert result.code == 2
    assert text in result.error and result.error.startswith("error: ")


@pytest.mark.parametrize(("code", "ended"), [(0, "finished"), (2, "error")])
def test_data_alone_needs_no_card_and_no_prediction(
    cli: Cli, rooms: Rooms, data: Path, monkeypatch: pytest.MonkeyPatch, code: int, ended: str
) -> None:
    rooms.verdict = "does_not_fit"
    asked: list[dict[str, Any]] = []

    def launch(run_dir: Path, **options: Any) -> Any:
        asked.append(options)
        options["on_event"]({"event": "data", "kind": "text", "rows": 1, "examples": 1})
        outcome = ModuleType("outcome")
        outcome.__dict__.update(exit_code=code, ended=ended, message="d.jsonl, line 1, is not JSON", hint="")
        return outcome

    monkeypatch.setattr(sys.modules["vramplan.launch"], "launch", launch)
    result = cli("train", "llama-2-7b", "--data", "d.jsonl", "--data-only", "-o", "look")
    assert result.code == code and asked[0]["data_only"] is True
    assert "data: 1 text rows: 1 to train on" in result.err
    assert rooms.run is None  # nothing was estimated
    assert ("error: d.jsonl, line 1, is not JSON" in result.err) == bool(code)
    payload = json.loads(cli("train", "llama-2-7b", "--data", "d.jsonl", "--data-only", "-o", "look", "--json").out)
    assert (payload["ended"], payload["exit_code"], payload["data"]["rows"]) == (ended, code, 1)
