"""A tiny model, its tokenizer and data, made on the spot; and the training child as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vramplan.core.recipes import RECIPES
from vramplan.core.types import DataSpec, Lora, Measurement, RunSpec, Schedule
from vramplan.sources import records

ROOT = Path(__file__).parent.parent
VOCAB = 512
WORDS = (
    *("the", "cat", "sat", "on", "a", "mat", "while", "old", "grey", "dogs"),
    *("ran", "over", "hills", "near", "quiet", "rivers", "under", "warm", "evening", "light"),
)


def make_text(path: Path, lines: int = 120) -> Path:
    """JSON lines with a pattern that a model can learn in a few steps."""
    texts = (" ".join(WORDS[(i + 3 * k) % len(WORDS)] for k in range(12)) + f" and {i % 7}." for i in range(lines))
    return write_rows(path, list(texts))


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_model(folder: Path, text: Path, cls: str = "LlamaForCausalLM", **changes: Any) -> Path:
    """A model of four layers of width 128 with random weights and a byte-pair tokenizer trained on `text`."""
    import torch
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train([str(text)], vocab_size=VOCAB, special_tokens=["<|end|>", "<|pad|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|pad|>", bos_token="<|end|>"
    )
    model_class = getattr(transformers, cls)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**settings, **changes})).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_run(model: Path, text: Path, recipe: str = "lean", **changes: Any) -> RunSpec:
    run = RunSpec(
        model="tiny",
        model_path=str(model),
        micro_batch_size=2,
        accumulation=2,
        seq_len=64,
        lora=Lora(r=8, targets=("all-linear",)),
        recipe=recipe,
        levers=RECIPES[recipe],
        data=DataSpec(path=str(text), kind="text", eval_fraction=0.2),
        schedule=Schedule(max_steps=6, learning_rate=5e-3, save_steps=2, warmup_ratio=0.0),
    )
    return replace(run, **changes)


def child(run_dir: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`python -m vramplan.train RUN_DIR`, started."""
    command = [sys.executable, "-m", "vramplan.train", str(run_dir), *arguments]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=pipe, stderr=pipe)


def train(run: RunSpec, run_dir: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Runs the child to its end: (exit code, what it printed on the console)."""
    run_dir.mkdir(exist_ok=True)
    records.write_json(run_dir / "run.json", run)
    process = child(run_dir, *arguments, **environment)
    out, err = process.communicate(timeout=300)
    return process.returncode, out + err


def events(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    lines = (run_dir / "progress.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [e for e in found if kind in (None, e["event"])]


def measurement(run_dir: Path) -> Measurement:
    return records.read_jsonl(run_dir / "measurement.jsonl", Measurement)[-1]
