"""What is written to disk appears whole or not at all: adapter, checkpoints, unpacked models."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vramplan.errors import DiskFull
from vramplan.train.outcome import is_disk_full

TEMPORARY, REPLACED = ".tmp-", ".old-"  # prefixes of folders in the making, and of those about to be deleted
PARTS = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt")
RANDOM_STATES = "rng_state*.pth"  # rng_state.pth, or one for each rank


@contextmanager
def whole_folder(target: Path, hint: str = "free some space, then train again with --resume") -> Iterator[Path]:
    """Yields an empty folder beside `target` to write into, and renames it to `target` at the end.

    On any error nothing is left behind and `target` is as before; a full disk is DiskFull, with `hint`. The files are
    on the disk before the name is: not even a power cut leaves a folder that only looks whole.
    """
    temporary = target.with_name(TEMPORARY + target.name)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync(temporary)
        _swap(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error) or (isinstance(error, Exception) and _no_space(target.parent)):
            raise DiskFull(f"the disk is full: {target} could not be saved", hint) from error
        raise


def save_checkpoint(target: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill the folder `target`, whole or not at all.

    Where the disk is full, all older checkpoints but the newest make room, and it is tried once more.
    """
    try:
        with whole_folder(target) as temporary:
            write(temporary)
        return
    except DiskFull:
        if not _make_room(target.parent):
            raise
    with whole_folder(target) as temporary:
        write(temporary)


def _make_room(folder: Path) -> bool:
    newest = newest_checkpoint(folder, lambda _: None)
    older = [path for path in folder.glob("checkpoint-*") if path != newest]
    for path in older if newest is not None else ():
        shutil.rmtree(path, ignore_errors=True)
    return newest is not None and bool(older)


def _sync(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(temporary: Path, target: Path) -> None:
    old = target.with_name(REPLACED + target.name)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _no_space(folder: Path) -> bool:
    """torch.save reports a full disk as a bare RuntimeError: look at the disk itself."""
    try:
        return shutil.disk_usage(folder).free < 2**20
    except OSError:
        return False


def clean(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder`, and finish a rename it was in the middle of."""
    for old in folder.glob(REPLACED + "*"):
        target = old.with_name(old.name.removeprefix(REPLACED))
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    for temporary in folder.glob(TEMPORARY + "*"):
        shutil.rmtree(temporary, ignore_errors=True)


def save_adapter(model: Any, tokenizer: Any, base: str, card: str, target: Path) -> None:
    """The adapter as plain PEFT writes it, with the tokenizer and our card in place of PEFT's.

    `base` is what PEFT will load the base model from.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    with whole_folder(target) as temporary:
        # "auto" would ask the Hub whether the vocabulary has changed; embeddings are never trained here.
        model.save_pretrained(str(temporary), save_embedding_layers=False)
        tokenizer.save_pretrained(str(temporary))
        (temporary / "README.md").write_text(card, encoding="utf-8")


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The complete checkpoint of the highest step, or None. Broken ones are passed over with a warning."""
    for path in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        problem = _problem(path)
        if problem is None:
            return path
        warn(f"{path.name} is passed over: {problem}")
    return None


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _problem(path: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None if it can."""
    states = [file.name for file in path.glob(RANDOM_STATES)]
    for name in (*PARTS, *(states or ["rng_state.pth"])):
        file = path / name
        if not file.is_file() or file.stat().st_size == 0:
            return f"{name} is missing or empty"
        if file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):  # a torn torch.save has no directory
            return f"{name} is broken"
    try:
        json.loads((path / "adapter_config.json").read_text())
        state = json.loads((path / "trainer_state.json").read_text())
        if state["global_step"] != _step(path):
            return "trainer_state.json is of another step"
        from safetensors import safe_open

        with safe_open(path / "adapter_model.safetensors", "pt") as file:  # checks the lengths of all tensors
            file.keys()
    except Exception as error:
        return f"it cannot be read ({type(error).__name__})"
    return None
