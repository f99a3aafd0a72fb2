"""The data of a run, read and shown; alone, or before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vramplan.core.types import RunSpec
from vramplan.train import data
from vramplan.train.load import load_tokenizer, resolve
from vramplan.train.progress import Progress
from vramplan.train.samples import sample_rows


def look_at_data(run: RunSpec, run_dir: Path, progress: Progress) -> str:
    """Read the data and show it as the model would see it, without a model."""
    tokenizer = load_tokenizer(run, resolve(run, run_dir))
    splits = read_data(run, run_dir, tokenizer, progress)
    return f"{splits.examples:,} rows to train on; nothing was trained"


def read_data(run: RunSpec, run_dir: Path, tokenizer: Any, progress: Progress, *, resume: bool = False) -> data.Splits:
    """The rows as tokens; the first of them are shown if the run wants that."""
    progress.phase("data", f"reading {run.data.path if run.data else 'no data'}")
    splits = data.build(run, tokenizer, report=progress.report, run_dir=run_dir, resume=resume)
    if run.data is not None and not resume:
        for sample_row in sample_rows(splits, tokenizer, run.data.show_samples):
            progress.report(sample_row)
    return splits
