"""The Python face: what `import vramplan` offers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vramplan
from vramplan.errors import InputError


def test_estimate_and_plan_by_name():
    run = vramplan.RunSpec(model="llama-2-7b", seq_len=1024, lora=vramplan.Lora(r=8))
    ledger = vramplan.estimate("llama-2-7b", run, gpu="rtx-4090")
    assert isinstance(ledger, vramplan.Ledger)
    assert ledger.peak.device_bytes == sum(line.bytes for line in ledger.lines)
    found = vramplan.plan("llama-2-7b", gpu="rtx-4090", effective_batch_size=6, run=run)
    assert found.run.micro_batch_size * found.run.accumulation == 6


def test_diagnose_text():
    assert vramplan.diagnose("all is well") is None
    text = (
        "CUDA out of memory. Tried to allocate 1.25 GiB (GPU 1; 79.10 GiB total capacity; 76.13 GiB already allocated; "
        "290.12 MiB free; 77.47 GiB reserved in total by PyTorch)"
    )
    found = vramplan.diagnose(text)
    assert found is not None
    assert found.evidence.requested_bytes == 5 * 2**28


def test_a_wrong_name_is_said():
    with pytest.raises(InputError, match="unknown model"):
        vramplan.estimate("lama-2-7b")


def test_importing_it_brings_the_types_alone():
    code = "import sys, vramplan; print(*sorted(m for m in sys.modules if m.startswith('vramplan')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["vramplan", "vramplan.core", "vramplan.core.types"]
