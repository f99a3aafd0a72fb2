"""What holds for every test: transformers' own functions are its own again when a module of tests is done."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


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
