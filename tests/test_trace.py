"""The tracer against the card, and what it says of models that are not described."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import torch
from measured import MIB, h200, rows, step_run

from vramplan.cli import run as run_cli
from vramplan.core.types import Levers, RunSpec, Unplannable
from vramplan.sources.hf_config import raw_config
from vramplan.trace import known
from vramplan.trace.ledger import estimate
from vramplan.trace.patches import like_cuda
from vramplan.trace.recorder import Tracker, UnknownOperation
from vramplan.trace.unrolling import traced

# Models whose first row no other run of the process came before.
FIRST = [next(r for r in rows("h200-step-memory.jsonl") if r["model"] == name)
         for name in ("llama-3.1-8b", "gemma-2-9b", "pythia-1.4b", "smollm2-135m")]  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 256, "n_layer": 6, "n_head": 4, "vocab_size": 1024,
        "architectures": ["GPT2LMHeadModel"]}  # fmt: skip


@pytest.mark.parametrize("row", FIRST, ids=lambda row: row["model"])
def test_peaks_on_the_card(row):
    found, mib = traced(raw_config(row["model"]), step_run(row), h200()), row["mib"]
    assert found.allocated_bytes / MIB == pytest.approx(mib["peak"], rel=0.0002)
    assert found.peak["forward"] / MIB == pytest.approx(mib["fwd_peak"], rel=0.0002)
    assert found.peak["optimizer"] / MIB == pytest.approx(mib["opt_peak"], rel=0.001)
    assert found.after["load"] / MIB == pytest.approx(mib["loaded"], abs=0.02)
    assert found.after["lora"] / MIB == pytest.approx(mib["with_lora"], abs=0.02)
    assert found.reserved_bytes / MIB == pytest.approx(mib["reserved"], rel=0.02)


@pytest.mark.parametrize("row", rows("h200-event-exact.jsonl"), ids=lambda row: row["model"])
def test_to_the_byte(row):
    """Every allocation of these steps was recorded on the card and compared: the peaks are the same number."""
    found = traced(raw_config(row["model"]), step_run(row), h200())
    assert found.peak["forward"] == row["mib"]["fwd_peak"] * MIB
    assert found.peak["backward"] == row["mib"]["bwd_peak"] * MIB


def test_few_layers_stand_for_all():
    run = RunSpec(model="smollm2-135m", seq_len=256, levers=Levers(checkpointing="every-2"))
    few, all_of_them = (traced(raw_config("smollm2-135m"), run, h200(), full_depth=full) for full in (False, True))
    assert few.unrolled.played < all_of_them.unrolled.played == 30
    stacked = 2048  # the norms of all gradients, as one tensor
    assert few.peak == pytest.approx(all_of_them.peak, abs=stacked)
    assert few.after == pytest.approx(all_of_them.after, abs=stacked)


def test_rows_of_the_ledger_add_up():
    ledger = estimate(GPT2, None, RunSpec(model="gpt2", seq_len=128), h200())
    exact = [line.bytes for line in ledger.lines if not line.key.startswith("overhead") or "rounding" in line.key]
    assert sum(exact) == ledger.peak.allocated_bytes
    assert sum(line.bytes for line in ledger.lines) == ledger.peak.device_bytes
    assert ledger.model.model_type == "gpt2"
    assert ledger.model.num_layers == 6


def test_an_operation_that_is_not_known_stops_it():
    assert "aten.mm" in known.OPERATIONS
    tracker = Tracker(h200(), {})
    with tracker, pytest.raises(UnknownOperation, match="digamma"):
        torch.digamma(torch.zeros(3))


def test_an_architecture_that_transformers_does_not_know():
    with pytest.raises(Unplannable, match="knows no model_type 'nonesuch'"):
        traced({"model_type": "nonesuch"}, RunSpec(model="x"), h200())


def test_attention_that_the_model_does_not_have():
    config = {**GPT2, "model_type": "gptj", "rotary_dim": 16}
    with pytest.raises(Unplannable, match="no sdpa attention for model_type 'gptj'"):
        traced(config, RunSpec(model="x", seq_len=64), h200())


def test_the_libraries_are_put_back():
    import bitsandbytes as bnb
    from torch.nn import functional

    before = (functional.dropout, functional.scaled_dot_product_attention, bnb.nn.modules.Params4bit)
    with like_cuda(Tracker(h200(), {})):
        assert functional.dropout is not before[0]
    assert (functional.dropout, functional.scaled_dot_product_attention, bnb.nn.modules.Params4bit) == before


def test_estimate_traces_what_is_not_described(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GPT2))
    assert run_cli(["estimate", str(path), "--seq-len", "128", "--trace", "--gpu", "t4", "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    assert payload["peak"]["allocated_bytes"] > 0
    assert payload["gpus"][0]["verdict"] == "fits"
    assert payload["gpus"][0]["max_batch_size"] is None
    assert run_cli(["estimate", str(path)]) == 2
    assert "--trace" in capsys.readouterr().err


def test_full_depth_is_about_tracing(capsys):
    assert run_cli(["estimate", "llama-2-7b", "--full-depth"]) == 2
    assert "--trace" in capsys.readouterr().err
