"""What many tests share, and what holds for all: transformers' functions are its own when a module of tests is done."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

BESIDE_OTHERS = "PYTEST_XDIST_WORKER" in os.environ
if BESIDE_OTHERS:  # before torch is imported, here and in children: a thread per core in each only makes them wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if BESIDE_OTHERS:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="wants the card for itself: pytest -m cuda"))


@pytest.fixture(scope="module", autouse=True)
def _transformers_is_left_as_it_was() -> Iterator[None]:
    """Fused layers replace functions of transformers. Who forgets to give them back changes what comes later."""
    yield
    replaced = [
        name
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.") and ".modeling_" in name
        for function in [getattr(module, "apply_rotary_pos_emb", None)]
        if function is not None and not function.__module__.startswith("transformers.")
    ]
    assert replaced == []


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for each other's threads, and on a busy machine for long."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def _trained() -> Any:
    from vramplan.train import tiny

    return tiny.make_tokenizer(tiny.paragraphs()[:60])


@pytest.fixture
def tokenizer(_trained: Any) -> Any:
    """Trained on a novel, with the chat template of the tiny model."""
    from vramplan.train import tiny

    _trained.chat_template = tiny.CHAT_TEMPLATE
    return _trained


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """cli(*words): (exit code, stdout, stderr) of `vramplan *words`."""
    from vramplan.cli import run

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(word) for word in words])
        return code, *capsys.readouterr()

    return call
