"""`estimate --explain`: every line of a ledger taken apart, its tensors adding up to it; and what `--help` shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import click
import pytest
from golden_tools import check_golden

from vramplan.cli import COMMANDS, helping, root
from vramplan.core.explain import RULES, explain, find
from vramplan.core.ledger import estimate
from vramplan.core.recipes import RECIPES
from vramplan.core.types import Levers, Lora, RunSpec
from vramplan.report.explain import show_explanation
from vramplan.sources.hf_config import load_model
from vramplan.sources.profiles import load_gpu

Call = Callable[..., tuple[int, str, str]]
NO_TENSORS = ("overhead.",)
LEVERS = (RECIPES["lean"], RECIPES["peft"],
          replace(RECIPES["peft"], checkpointing="none", optimizer="adamw_8bit"),
          replace(RECIPES["lean"], upcast="norms", optimizer="adafactor"))  # fmt: skip


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("levers", LEVERS)
@pytest.mark.parametrize("name", ["llama-2-7b", "gemma-2-2b", "pythia-1.4b", "qwen3-30b-a3b"])
def test_the_tensors_of_a_line_add_up_to_it(name: str, levers: Levers, gpus: int) -> None:
    spec = load_model(name)
    parallel, card = ("fsdp", load_gpu("a100-80gb")) if gpus > 1 else ("none", None)
    run = RunSpec(model=name, levers=levers, seq_len=512, lora=Lora(r=8), gpus=gpus, parallel=parallel,
                  double_quant=gpus == 1)  # fmt: skip
    ledger = estimate(spec, run, card)
    for line in ledger.lines:
        found = explain(ledger, line, card)
        assert line.key in RULES and found.formula and found.source, line.key
        if line.key.startswith(NO_TENSORS):
            assert found.parts == ()
        else:
            assert sum(part.bytes for part in found.parts) == line.bytes, line.key
            assert all(part.tensors > 0 for part in found.parts)


def test_overheads_are_made_of_the_peak() -> None:
    ledger = estimate(load_model("llama-2-7b"), RunSpec(model="llama-2-7b"))
    line = find(ledger, "overhead.allocator")
    assert line is not None
    numbers = dict(explain(ledger, line).numbers)
    assert numbers["smallest cap"] - numbers["allocated at the peak"] == line.bytes
    assert numbers["smallest cap"] == ledger.peak.minimum_bytes


@pytest.mark.parametrize("wanted", ["weights.nf4", "nf4", "NF4", "4-bit weights (NF4)", " weights.nf4 "])
def test_a_line_has_several_names(wanted: str) -> None:
    ledger = estimate(load_model("llama-2-7b"), RunSpec(model="llama-2-7b"))
    line = find(ledger, wanted)
    assert line is not None and line.key == "weights.nf4"


def test_an_ambiguous_name_is_none() -> None:
    """ "gradients" is what is behind the dot of activations', the loss's and the adapter's."""
    run = RunSpec(model="llama-2-7b", levers=RECIPES["peft"], accumulation=2)
    ledger = estimate(load_model("llama-2-7b"), run)
    assert sum(line.key.endswith(".gradients") for line in ledger.lines) > 1
    assert find(ledger, "gradients") is None and find(ledger, "weights") is None


def test_golden() -> None:
    ledger = estimate(load_model("llama-2-7b"), RunSpec(model="llama-2-7b"))
    for name in ("weights.nf4", "activations.layers", "overhead.allocator"):
        line = find(ledger, name)
        assert line is not None
        found = explain(ledger, line)
        check_golden(
            f"explain_{name.partition('.')[0]}",
            lambda stream, width, found=found: show_explanation(stream, found, width=width),
        )


def test_the_command(cli: Call) -> None:
    code, out, _ = cli("estimate", "llama-2-7b", "--explain", "adapter.lora", "--gpu", "all")
    assert code == 0 and "39,976,960 x 4" in out and out.startswith("adapter.lora, LoRA adapter, r=16: 152.5 MiB")
    found = json.loads(cli("estimate", "llama-2-7b", "--explain", "nf4", "--json")[1])
    assert sum(part["bytes"] for part in found["tensors"]) == found["line"]["bytes"]
    assert found["numbers"]["H"] == 4096


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--explain", "weights.nf5"), "did you mean weights.nf4"),
        (("--explain", "zzz"), "one of weights.nf4, weights.constants"),
        (("--explain", "nf4", "--trace"), "leave out --trace, or --explain"),
        (("--recipe", "leen"), "--recipe cannot be 'leen' (did you mean lean?)"),
        (("--attn", "zzz"), "--attn cannot be 'zzz' (one of sdpa, eager, flash_attention_2)"),
    ],
)
def test_a_wrong_name_has_its_nearest_beside_it(words: tuple[str, ...], wanted: str, cli: Call) -> None:
    code, out, err = cli("estimate", "llama-2-7b", *words)
    assert (code, out) == (2, "") and wanted in err


# --------------------------------------------------------------------------------------------------------- --help
def options_of(name: str) -> list[click.Option]:
    command = root.get_command(click.Context(root), name)
    assert command is not None
    return [param for param in command.params if isinstance(param, click.Option) and not param.hidden]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_flag_and_all_of_it_tells_every_one(name: str, cli: Call) -> None:
    short, whole = cli(name, "--help")[1], cli(name, "--help-all")[1]
    for option in options_of(name):
        flag = helping.flag_of(option)
        assert flag in short or f"--[no-]{flag[2:]}" in short, flag
        assert flag in whole and " ".join(str(option.help).split()[:3]) in " ".join(whole.split()), flag
    assert len(short.splitlines()) <= len(whole.splitlines())
    assert len(short.splitlines()) <= (70 if name == "train" else 55)
    assert short.count("Example:") == whole.count("Example:") == 1


def test_a_short_help_is_whole(cli: Call) -> None:
    assert "--help-all" not in cli("models", "--help")[1] and "--help-all" in cli("train", "--help")[1]
    assert len(cli("--help")[1].splitlines()) <= 44
