"""The model of a run, ready to be trained, and what watches over its training."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers

from vramplan.core.types import Ledger, RunSpec
from vramplan.errors import InputError
from vramplan.train import data
from vramplan.train.audit import audit
from vramplan.train.audit_causes import Loaded, float32_names
from vramplan.train.fast.graphs import CudaGraphs, Graphs
from vramplan.train.fast.install import Fused
from vramplan.train.fsdp import Sharding
from vramplan.train.guard import Guard
from vramplan.train.health import Health
from vramplan.train.load import load_model
from vramplan.train.lora import add_lora, fuse, prepare, stochastic
from vramplan.train.meter import Meter
from vramplan.train.parallel import World
from vramplan.train.pressure import Card
from vramplan.train.progress import Progress
from vramplan.train.rehearsal import Rehearsal
from vramplan.train.relief import CheckpointRelief, FusedRelief, Relief
from vramplan.train.trainer import QloraTrainer
from vramplan.train.varlen import refuse_unpackable


def refuse_what_is_not_built(run: RunSpec) -> None:
    if run.levers.resident_layers is not None:
        raise InputError("streaming layers from the host is not built yet", "leave resident_layers out")


def build_model(
    run: RunSpec,
    source: str,
    meter: Meter,
    progress: Progress,
    prediction: Ledger | None = None,
    world: World | None = None,
) -> tuple[Any, Fused | None]:
    """The 4-bit model and its fused layers: prepared and wrapped by PEFT, measured after each, then audited.

    Shared out if the world is.
    """
    world = world or World()
    sharding = Sharding(world) if world.sharded else None
    progress.phase("load", f"loading {run.model} in 4 bits on {meter.device.type}")
    model = load_model(run, source, meter.device, sharding)
    if run.packing:
        refuse_unpackable(model.config)
    float32 = float32_names(model)
    meter.phase("loaded")

    # Fused layers read a weight where it lies: of a sharded one only a part lies there.
    levers = run.levers if sharding is None else replace(run.levers, kernels="stock")
    progress.phase("prepare", f"upcast {levers.upcast}, checkpointing {levers.checkpointing}")
    model = prepare(model, levers, meter.device, progress.warning)
    meter.phase("prepared")

    progress.phase("lora", f"r={run.lora.r} on {', '.join(run.lora.targets)}")
    transformers.set_seed(run.schedule.seed)  # the adapter's start depends on nothing that was drawn before
    model = add_lora(model, run.lora)
    world.same(p for p in model.parameters() if p.requires_grad)
    if sharding is not None:
        sharding.apply(model)
    meter.trainable_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fused = fuse(model, levers, meter.device, progress.warning)
    meter.phase("with_lora")
    progress.report(audit(Loaded(model, run, meter.device, prediction, float32)))
    return model, fused


def watch_over(
    trainer: QloraTrainer, run: RunSpec, splits: data.Splits, progress: Progress, world: World | None = None
) -> None:
    """Give the trainer what makes it survive: guard, health, and the rehearsal unless the run leaves it out.

    With sharded weights nobody can do a micro-batch again, the others are in the middle of it: no guard there.
    """
    world = world or World()
    trainer.health = Health(run, trainer.model, partial(_redo, trainer, world), trainer.meter, progress.report)
    if trainer.fused is not None:
        trainer.health.gradient = trainer.fused.gradient
    if world.size > 1:
        trainer.health.agree = lambda bad: bool(world.sum(bad)[0])
    if world.sharded:
        return
    trainer.guard = make_guard(trainer, run, splits, progress)
    trainer.graphs = make_graphs(trainer, run, progress) if world.size == 1 else None
    if run.schedule.rehearsal:
        trainer.add_callback(Rehearsal(trainer, trainer.guard, progress.report, splits.eval))


def make_guard(trainer: QloraTrainer, run: RunSpec, splits: data.Splits, progress: Progress) -> Guard:
    """The guard of this process, with the measures that its layers can take."""
    model, meter, fused = trainer.model, trainer.meter, trainer.fused
    if fused is None:
        relief: Relief = CheckpointRelief(model.get_base_model(), run.levers, meter.device)
    else:
        relief = FusedRelief(fused, run.levers, meter.device)

    return Guard(
        rows=run.micro_batch_size,
        accumulation=run.accumulation,
        width=splits.longest,
        parameters=lambda: trainer.trained,
        card=Card(meter.device) if fused is None else Card(meter.device, fused.forget),
        relief=relief,
        report=progress.report,
        meter=meter,
        drop_graphs=trainer.drop_graphs,
    )


def make_graphs(trainer: QloraTrainer, run: RunSpec, progress: Progress) -> Graphs | None:
    """What runs micro-steps as CUDA graphs, where the run wants that and nothing of them is left to chance."""
    fused, device = trainer.fused, trainer.meter.device
    if fused is None or trainer.head is None or device.type != "cuda":
        return None
    if not run.schedule.cuda_graphs or run.schedule.full_determinism or stochastic(trainer.model):
        return None  # what is drawn within a graph would be drawn again and again

    def tell(message: str) -> None:
        progress.phase("graphs", message)

    def ready() -> None:
        if trainer.guard is not None:
            trainer.guard.gradients.ready()

    recorder = CudaGraphs(device, lambda: trainer.meter.temporary_bytes)
    return Graphs(trainer.static_micro_step, trainer.trained, fused.forget, tell, recorder, ready)


def _redo(trainer: QloraTrainer, world: World, inputs: dict[str, Any]) -> Any:
    """The forward of a micro-batch once more, without gradients."""
    if world.sharded:
        raise RuntimeError("the forward of one rank alone would wait for the others")
    with torch.no_grad(), trainer.accelerator.autocast():
        return trainer.compute_loss(trainer.model, inputs)
