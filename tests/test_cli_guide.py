"""`estimate --gpu all`, `--price` and `gpus --for`: flags, errors and exit codes; the real thing at the end."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_cli
from test_cli import ESTIMATE, Cli, Rooms, process

from vramplan.core.types import Levers, RunSpec
from vramplan.report import waiting
from vramplan.report.waiting import watched
from vramplan.sources.profiles import gpu_names

cli, rooms = test_cli.cli, test_cli.rooms  # fixtures
FOR = ("gpus", "--for", "llama-2-7b")


# --------------------------------------------------------------------------------------------------------- estimate
def test_all_cards_and_cards_with_prices_are_a_guide(cli: Cli, rooms: Rooms) -> None:
    for words, count in (
        (("--gpu", "all"), len(gpu_names())),
        (("--price", "rtx-4090=0.35"), len(gpu_names())),
        (("--gpu", "rtx-4090", "--gpu", "t4", "--price", "t4=0"), 2),
    ):
        data = json.loads(cli(*ESTIMATE, *words, "--json").out)
        assert len(data["gpus"]) == count and {"as_asked", "flags"} < set(data["gpus"][0])
    assert "as_asked" not in json.loads(cli(*ESTIMATE, "--gpu", "t4", "--json").out)["gpus"][0]


def test_prices_arrive_by_the_card_s_own_name(cli: Cli, rooms: Rooms) -> None:
    assert cli(*ESTIMATE, "--gpu", "all", "--price", "RTX 4090=0.35", "--price", "h100-80gb = 2e0").code == 0
    assert rooms.prices == {"rtx-4090": 0.35, "h100-80gb": 2.0}
    assert cli(*FOR, "--price", "t4=0").code == 0
    assert rooms.prices == {"t4": 0.0}


BAD_PRICES = {
    "rtx-4090": "--price must be a card and its price per hour, as rtx-4090=0.35, not rtx-4090",
    "rtx-4090=": "--price must be a card",
    "=1": "--price must be a card",
    "rtx-4090=cheap": "not rtx-4090=cheap",
    "rtx-4090=nan": "--price must be a card",
    "rtx-4090=inf": "--price must be a card",
    "rtx-4090=-1": "--price must be a card",
    "rtx-4091=1": "--price 'rtx-4091' is not a known card (did you mean",
    "a100=1": "--price 'a100' is not a known card (did you mean a100-40gb or a100-80gb?",
}


@pytest.mark.parametrize("price", BAD_PRICES)
@pytest.mark.parametrize("words", [(*ESTIMATE, "--gpu", "all"), FOR])
def test_a_price_that_is_none_is_one_line(cli: Cli, rooms: Rooms, words: tuple[str, ...], price: str) -> None:
    result = cli(*words, "--price", price)
    assert (result.code, result.out, len(result.err.splitlines())) == (2, "", 1)
    assert BAD_PRICES[price] in result.err


def test_prices_that_contradict_or_say_nothing(cli: Cli, rooms: Rooms) -> None:
    result = cli(*ESTIMATE, "--price", "rtx-4090=1", "--price", "RTX4090=2")
    assert result.code == 2 and result.error == "error: --price has two prices for rtx-4090 (give one)"
    result = cli(*ESTIMATE, "--gpu", "rtx-3090", "--price", "rtx-4090=1")
    assert result.code == 2 and "card that is not compared (add --gpu rtx-4090, or --gpu all)" in result.error
    result = cli(*ESTIMATE, "--trace", "--price", "rtx-4090=1")
    assert result.code == 2 and "leave out --trace, or --price" in result.error


def test_a_named_card_must_hold_the_run_as_it_was_asked_for(cli: Cli, rooms: Rooms) -> None:
    rooms.verdict = "does_not_fit"
    assert cli(*ESTIMATE, "--gpu", "rtx-4090", "--price", "rtx-4090=1").code == 3
    assert cli(*ESTIMATE, "--price", "rtx-4090=1").code == 0


def test_packing_leaves_old_cards_out(cli: Cli, rooms: Rooms) -> None:
    result = cli(*ESTIMATE, "--gpu", "all", "--packing", "--json")
    assert "t4, v100-16gb, v100-32gb left out" in result.err
    assert not {"t4", "v100-16gb"} & {card["gpu"] for card in json.loads(result.out)["gpus"]}
    cli(*FOR, "--packing")
    assert "rtx-4090" in rooms.cards and "t4" not in rooms.cards


# ------------------------------------------------------------------------------------------------------------- gpus
def test_the_flags_of_a_run_arrive(cli: Cli, rooms: Rooms) -> None:
    flags = "--seq-len 512 --batch-size 4 --gpus 2 --recipe peft --lora-r 8 --loss fused --max_length 1024"
    assert cli(*FOR, *flags.split()).code == 0
    run = rooms.run
    assert run is not None
    assert (run.seq_len, run.micro_batch_size, run.gpus, run.parallel, run.lora.r) == (1024, 4, 2, "ddp", 8)
    assert (run.recipe, run.levers.loss, run.levers.upcast) == ("peft", "fused", "all")
    assert cli(*FOR).out.startswith("Fits cards of 8 GB with --checkpoint-offload; as asked, 24 GB.")
    assert rooms.run == RunSpec(model="llama-2-7b", levers=Levers())


def test_no_class_is_exit_3(cli: Cli, rooms: Rooms) -> None:
    rooms.verdict = "does_not_fit"
    assert cli(*FOR).code == 3
    result = cli(*FOR, "--json")
    assert result.code == 3 and json.loads(result.out)["memory_gb"] is None


@pytest.mark.parametrize("flags", ["--seq-len 512", "--price t4=1", "--loss full", "--gpus 2"])
def test_a_list_of_cards_takes_no_run(cli: Cli, rooms: Rooms, flags: str) -> None:
    result = cli("gpus", *flags.split())
    assert result.code == 2 and result.error == f"error: {flags.split()[0]} is about a run (add --for MODEL)"


def test_a_run_file_names_the_model(cli: Cli, rooms: Rooms, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('model = "llama-2-7b"\nseq_len = 256\nprice = ["t4=1", "h200=3"]\n')
    assert cli("gpus", "--config", tmp_path / "run.toml").code == 0
    assert rooms.run is not None and rooms.run.seq_len == 256
    assert rooms.prices == {"t4": 1.0, "h200": 3.0}


def test_a_model_that_is_unknown(cli: Cli, rooms: Rooms) -> None:
    result = cli("gpus", "--for", "llama-2-7bb")
    assert result.code == 2 and "llama-2-7b" in result.error
    result = cli(*FOR, "--seq-len", "4097")
    assert result.code == 2 and "--seq-len 4097 is over the 4096 positions of llama-2-7b" in result.error


# ---------------------------------------------------------------------------------------------------------- waiting
class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def slowly(count: int, seconds: float) -> Iterator[int]:
    for number in range(count):
        time.sleep(seconds)
        yield number


def test_a_bar_is_shown_on_a_terminal_where_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for stream, patience, shown in ((Screen(), 0.0, True), (Screen(), 60.0, False), (io.StringIO(), 0.0, False)):
        assert list(watched(slowly(3, 0.01), 3, "cards", stream, patience)) == [0, 1, 2]
        assert ("cards" in stream.getvalue()) is shown
    assert waiting.PATIENCE_S > 1


def test_the_bar_goes_where_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")

    def fails() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    stream = Screen()
    with pytest.raises(KeyboardInterrupt):
        list(watched(fails(), 3, "cards", stream, 0.0))
    assert stream.getvalue().count("\x1b[?25h") == stream.getvalue().count("\x1b[?25l") == 1  # the cursor is back


# --------------------------------------------------------------------------------------------------- the real thing
def test_real_guide() -> None:
    done = process(
        "estimate", "smollm2-135m", "--seq-len", "8192", "--gpu", "all", "--price", "rtx-4090=0.35", "--json"
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert {card["gpu"] for card in data["gpus"]} == set(gpu_names())
    priced = [card for card in data["gpus"] if card["price_per_hour"] is not None]
    assert [card["gpu"] for card in priced] == ["rtx-4090"] and priced[0]["cheapest"]
    assert all(card["max_seq_len"] == 8192 for card in data["gpus"] if card["verdict"] == "fits")


def test_real_choice_at_80_columns() -> None:
    done = process("gpus", "--for", "smollm2-135m", env={"PATH": "", "COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Fits cards of 8 GB as asked.")
    assert "No smaller class of cards is stored." in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
