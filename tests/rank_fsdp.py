"""What torchrun starts in test_train_ranks.py: each of CASES with the weights sharded, and beside it whole."""

from __future__ import annotations

import json
import os
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_state import _get_module_fsdp_state
from train_tools import make_model, make_run

from vramplan.core import resident
from vramplan.core.parallel import layer_matrices
from vramplan.core.types import Levers, Lora, RunSpec
from vramplan.sources.hf_config import load_model as described
from vramplan.train.building import build_model
from vramplan.train.fused_loss import head_of
from vramplan.train.meter import Meter, count_lines
from vramplan.train.parallel import World, join
from vramplan.train.place import place_in
from vramplan.train.progress import Progress
from vramplan.train.trainer import fused_loss

KEYS = ("nf4", "constants", "embeddings", "lm_head", "experts", "plain", "other")
SETTINGS = ("checkpointing", "loss", "upcast")


def compare(root: Path, case: dict[str, Any], world: World) -> dict[str, Any]:
    changes = dict(case)
    reentrant, random_weights = changes.pop("reentrant", False), changes.pop("random_weights", False)
    levers = Levers(**{name: changes.pop(name) for name in SETTINGS if name in changes})
    folder = root / "model"
    if changes:
        folder = root / f"model-{'-'.join(changes)}"
        world.from_main(lambda: make_model(folder, root / "text.jsonl", **changes) and None)
    run = make_run(folder, root / "text.jsonl", levers=levers, lora=Lora(r=4), random_weights=random_weights)
    sharded = replace(run, gpus=world.size, parallel="fsdp")
    model = built(sharded, world)
    whole = built(replace(run, levers=replace(levers, kernels="stock")), World())  # sharded layers are never fused
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    lines = {line.key: line.bytes for line in count_lines(model, optimizer, world.device)}
    description = described(str(folder))
    planned = resident.weights(description, True, levers.upcast, world.size)
    with Gathered(model) as gathered:
        loss, gradients = step(model, levers, reentrant)
    loss_of_whole, expected = step(whole, levers, reentrant)
    return {
        "loss": loss,
        "checkpointed": bool(model.get_base_model().is_gradient_checkpointing),
        "loss of the whole": loss_of_whole,
        "gathered at most": gathered.most,
        "gathered layer": sum(2 * m.shard_bytes(2) for m in layer_matrices(description, levers.upcast)),
        "largest gradient": max(float(g.abs().max()) for g in expected.values()),
        "largest difference": max(float((gradients[n] - g).abs().max()) for n, g in expected.items()),
        "bytes": [lines.get(f"weights.{key}", 0) for key in KEYS],
        "planned bytes": [planned.nf4_bytes, planned.constants_bytes, planned.embeddings_bytes, planned.lm_head_bytes,
                          planned.experts_bytes, planned.plain_bytes, planned.other_bytes],
    }  # fmt: skip


def built(run: Any, world: World) -> Any:
    torch.manual_seed(0)
    model, _ = build_model(run, str(run.model_path), Meter(world.device), Progress(Path(os.devnull)), None, world)
    with torch.no_grad():  # PEFT's B is zero, and then so is the gradient of A
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    return model


class Gathered:
    """The most bytes that FSDP2's flat buffers and gathered weights take together, in the forward and the backward."""

    def __init__(self, model: Any) -> None:
        states = [_get_module_fsdp_state(module) for module in model.modules()]
        groups = {id(group): group for state in states if state for group in state._fsdp_param_groups}
        self.params = [param for group in groups.values() for param in group.fsdp_params]
        self.flat: dict[int, int] = {}
        self.most = {"forward": 0, "backward": 0}

    def __enter__(self) -> Gathered:
        self.stock = DefaultAllGather.allocate, FSDPParam.alloc_all_gather_outputs
        allocate, copy_out = self.stock

        def allocated(comm: Any, *size: Any, **options: Any) -> Any:
            buffer = allocate(comm, *size, **options)
            self.flat[id(buffer)] = buffer.numel() * buffer.element_size()
            weakref.finalize(buffer, self.flat.pop, id(buffer))
            self.look()
            return buffer

        def copied_out(param: Any) -> None:
            copy_out(param)
            self.look()

        DefaultAllGather.allocate, FSDPParam.alloc_all_gather_outputs = allocated, copied_out
        return self

    def __exit__(self, *error: object) -> None:
        DefaultAllGather.allocate, FSDPParam.alloc_all_gather_outputs = self.stock

    def look(self) -> None:
        whole = sum(t.untyped_storage().size() for param in self.params for t in param.all_gather_outputs)
        phase = "forward" if torch._C._current_graph_task_id() == -1 else "backward"
        self.most[phase] = max(self.most[phase], whole + sum(self.flat.values()))


def step(model: Any, levers: Levers, reentrant: bool) -> tuple[float, dict[str, Any]]:
    """The second of two forwards and backwards: what FSDP2 does lazily has happened by then."""
    if reentrant:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    ids = torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(5))
    model.train()
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if levers.loss == "fused":
                causal_lm = model.get_base_model()
                loss = fused_loss(causal_lm, head_of(causal_lm), {"input_ids": ids, "labels": ids}, None)
            else:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    cases = json.loads(os.environ["CASES"])
    world = join(RunSpec(model="x", gpus=2, parallel="fsdp"), place_in(os.environ))
    results = {name: compare(root, case, world) for name, case in cases.items()}
    if world.main:
        (root / "compared.json").write_text(json.dumps(results))
    world.leave()
