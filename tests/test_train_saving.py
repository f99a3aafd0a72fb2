"""Folders appear whole or not at all; the newest complete checkpoint is found."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from vramplan.errors import VramplanError  # noqa: E402
from vramplan.train.saving import clean, newest_checkpoint, whole_folder  # noqa: E402


def make_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    safetensors_torch.save_file({"a": torch.ones(64, 64)}, path / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"x": torch.ones(1000)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    warnings: list[str] = []
    return newest_checkpoint(folder, warnings.append), warnings


def test_newest_is_by_number_not_by_name(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 9)
    last = make_checkpoint(tmp_path, 10)
    assert newest(tmp_path) == (last, [])
    assert newest(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "torn"])
def test_broken_checkpoints_are_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    whole = make_checkpoint(tmp_path, 4)
    file = make_checkpoint(tmp_path, 6) / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    found, warnings = newest(tmp_path)
    assert found == whole
    assert len(warnings) == 1
    assert "checkpoint-6" in warnings[0]


def test_whole_folder_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").touch()
    with whole_folder(target) as temporary:
        (temporary / "new").touch()
        assert (target / "old").exists()
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("exists", [True, False])
def test_disk_full_leaves_everything_as_it_was(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "adapter"
    if exists:
        target.mkdir()
        (target / "old").touch()
    with pytest.raises(VramplanError, match="the disk is full") as caught, whole_folder(target) as temporary:
        (temporary / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.exit_code == 1
    assert [p.name for p in tmp_path.rglob("*")] == (["adapter", "old"] if exists else [])


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), whole_folder(tmp_path / "x"):
        raise ValueError("mine")
    assert list(tmp_path.iterdir()) == []


def test_clean_finishes_what_a_killed_process_began(tmp_path: Path) -> None:
    (tmp_path / ".tmp-adapter").mkdir()
    (tmp_path / ".old-adapter").mkdir()  # killed between the two renames
    (tmp_path / ".old-model").mkdir()  # killed after them
    (tmp_path / "model").mkdir()
    clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model"]
