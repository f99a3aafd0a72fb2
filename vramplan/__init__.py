"""vramplan: plan, fit and run QLoRA fine-tuning on the GPU you can afford.

    import vramplan
    ledger = vramplan.estimate("llama-3.1-8b", vramplan.RunSpec(model="llama-3.1-8b", seq_len=4096), gpu="rtx-4090")
    print(ledger.peak.device_bytes, vramplan.plan("llama-3.1-8b", gpu="rtx-4090", effective_batch_size=16).reason)

Importing this is cheap: the standard library and the types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from vramplan.core.types import (
    Diagnosis,
    GpuProfile,
    Ledger,
    Levers,
    Lora,
    Measurement,
    ModelSpec,
    Plan,
    RunSpec,
)

if TYPE_CHECKING:
    from vramplan.train.callback import VramplanCallback

__version__ = "0.1.0"
__all__ = [
    "Diagnosis",
    "GpuProfile",
    "Ledger",
    "Levers",
    "Lora",
    "Measurement",
    "ModelSpec",
    "Plan",
    "RunSpec",
    "VramplanCallback",
    "diagnose",
    "estimate",
    "plan",
]


def __getattr__(name: str) -> Any:
    """What needs torch and transformers is imported when it is asked for."""
    if name != "VramplanCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from vramplan.train.callback import VramplanCallback
    except ModuleNotFoundError as error:
        from vramplan.errors import MissingExtra

        raise MissingExtra(f"VramplanCallback (no module named {error.name!r})") from error
    return VramplanCallback


def estimate(model: str | ModelSpec, run: RunSpec | None = None, gpu: str | GpuProfile | None = None) -> Ledger:
    """What every byte of a run will be, at the highest point of a steady step.

    `model` is a built-in name, a Hub id, a path, or a ModelSpec; `gpu` a card's name, "live" for this machine's, or a
    profile, whose chip decides some sizes; `run` defaults to the lean recipe at 1 x 2048 tokens. The lines of the
    ledger add up to `peak.device_bytes`; a notebook shows it as a table. Raises vramplan.errors.VramplanError for bad
    input and Unplannable for a run that has no answer.
    """
    from vramplan.core.ledger import estimate as of

    spec = _model(model)
    return of(spec, run or RunSpec(model=spec.name), None if gpu is None else _gpu(gpu))


def plan(
    model: str | ModelSpec,
    *,
    gpu: str | GpuProfile,
    effective_batch_size: int,
    run: RunSpec | None = None,
    objective: Literal["speed", "memory", "context"] = "speed",
) -> Plan:
    """The best run on this card with exactly this effective batch; its verdict may be "does_not_fit", with advice.

    Searched are micro-batch, checkpointing and where checkpoints wait; everything else stays as `run` has it.
    `objective`: the most tokens/s (modelled), the fewest bytes, or the longest sequence that fits. Raises as
    `estimate` does.
    """
    from vramplan.core.plan import plan as of

    spec = _model(model)
    return of(spec, run or RunSpec(model=spec.name), _gpu(gpu), effective_batch_size, objective)


def diagnose(text: str, model: str | ModelSpec | None = None, run: RunSpec | None = None) -> Diagnosis | None:
    """Causes and fixes of the out-of-memory report in `text` (a message, a log); None if it holds none."""
    from vramplan.core.diagnose import diagnose as of
    from vramplan.sources.oom_text import parse

    evidence = parse(text)
    spec = None if model is None else _model(model)
    return None if evidence is None else of(evidence, spec, run)


def _model(model: str | ModelSpec) -> ModelSpec:
    if isinstance(model, ModelSpec):
        return model
    from vramplan.sources.hf_config import load_model

    return load_model(model)


def _gpu(gpu: str | GpuProfile) -> GpuProfile:
    if isinstance(gpu, GpuProfile):
        return gpu
    if gpu == "live":
        from vramplan.sources.gpu import live_gpu

        return live_gpu()
    from vramplan.sources.profiles import load_gpu

    return load_gpu(gpu)
