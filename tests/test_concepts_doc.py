"""docs/concepts.md: the numbers beside the tutorial's claims are those that an estimate gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vramplan.cli import run
from vramplan.core.units import GIB, MIB

PAGE = (Path(__file__).parent.parent / "docs" / "concepts.md").read_text(encoding="utf-8")
TARGETS = "q_proj,k_proj,v_proj,o_proj"
AUDITED = f"""\
model_name_or_path: meta-llama/Llama-2-7b-hf
use_peft: true
load_in_4bit: true
use_bnb_nested_quant: true
lora_r: 8
lora_target_modules: [{TARGETS}]
max_length: 2048
per_device_train_batch_size: 1
gradient_checkpointing: true
bf16: true
"""


def row(claim: str) -> str:
    """What the page says beside a claim."""
    (found,) = [line for line in PAGE.splitlines() if line.startswith("| ") and claim in line.split(" | ")[0]]
    return found.split(" | ", 1)[1]


def says(claim: str, *numbers: str) -> None:
    absent = [number for number in numbers if number not in row(claim)]
    assert absent == [], f"{claim}: {row(claim)}"


def mib(size: int) -> str:
    return f"{size / MIB:,.0f}"


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*flags: str, model: str = "llama-2-7b") -> Any:
        words = ["--recipe", "peft", "--lora-r", "8", "--lora-targets", TARGETS] if model == "llama-2-7b" else []
        assert run(["estimate", model, *words, *flags, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def line(ledger: Any, key: str) -> int:
    (found,) = [each["bytes"] for each in ledger["lines"] if each["key"] == key]
    assert isinstance(found, int)
    return found


def test_weights(tell: Any) -> None:
    large, stock, plain = tell(model="llama-65b"), tell(), tell("--no-double-quant")
    says("65-billion", f"{large['resident']['loaded_bytes'] / GIB:.1f} GiB")
    says("16 possible", mib(line(stock, "weights.nf4")), f"{2 * line(stock, 'weights.nf4'):,}",
         mib(stock["resident"]["loaded_bytes"]))  # fmt: skip
    one, two = line(stock, "weights.constants"), line(plain, "weights.constants")
    says("non-trivial chunk", *(f"{size / MIB:.1f}" for size in (one, two, two - one)))


def test_adapter(tell: Any) -> None:
    stock, fewer, wide = tell(), tell("--lora-targets", "q_proj,v_proj"), tell("--lora-r", "64")
    trained, everything = stock["trainable_parameters"], stock["total_parameters"] + stock["trainable_parameters"]
    says("trainable params", f"{trained:,}")
    assert f"{fewer['trainable_parameters']:,}" in PAGE
    says("all params", f"{everything:,}", f"{stock['total_parameters']:,}", f"{100 * trained / everything:.4f} %")
    peak, wider = stock["peak"]["allocated_bytes"], wide["peak"]["allocated_bytes"]
    says("overkill", f"{wide['trainable_parameters']:,}", mib(peak), mib(wider), mib(wider - peak))
    assert tell("--lora-dropout", "0.05")["peak"] == tell("--lora-dropout", "0")["peak"] == stock["peak"]
    assert tell("--lora-alpha", "16")["peak"] == stock["peak"]


def test_peak(tell: Any) -> None:
    stock, lean = tell(), tell("--recipe", "lean")
    phases = {phase["name"]: mib(phase["peak_bytes"]) for phase in stock["phases"]}
    loss = sum(each["bytes"] for each in stock["lines"] if each["key"].startswith("loss."))
    others = [tell(*flags)["peak"]["allocated_bytes"] for flags in (("--batch-size", "2"), ("--seq-len", "1024"))]
    peaks = map(mib, (*others, lean["peak"]["allocated_bytes"]))
    says("out of memory in the forward", phases["forward"], phases["backward"], mib(loss), *peaks)
    kept = [line(ledger, "activations.checkpoints") for ledger in (stock, tell("--upcast", "none"))]
    says("are stored in", *map(mib, kept))
    wide, four = tell("--accumulation", "4"), tell("--batch-size", "4")
    says("gradient accumulation", *(mib(each["peak"]["allocated_bytes"]) for each in (wide, four)))
    says("few gigs", *(f"{each['peak']['device_bytes'] / GIB:.2f}" for each in (stock, lean)))


def test_compute_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of TRL that says no dtype: bitsandbytes then computes in float32."""
    (tmp_path / "run.yml").write_text(AUDITED)
    assert run(["audit", str(tmp_path / "run.yml"), "--model", "llama-2-7b", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    (found,) = [each for each in findings if each["cause"] == 10]
    says("float32 compute dtype", f"{found['bytes'] / MIB:.1f} MiB")
