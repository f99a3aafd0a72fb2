"""Plays loading, preparation and one optimizer step with the real libraries.

The step is a run's first: it makes the optimizer's state and the workspaces, which stay. All else in it is as in the
steps after, so one is enough; `unrolling` replays it twice.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from vramplan.core.masks import padded
from vramplan.core.tape import Recorder
from vramplan.core.types import GpuProfile, ModelSpec, RunSpec, Unplannable
from vramplan.core.varlen import documents
from vramplan.trace import attention, rules
from vramplan.trace import model as models
from vramplan.trace.attention import DEVICE
from vramplan.trace.autocast import autocast
from vramplan.trace.fused import fuse
from vramplan.trace.patches import like_cuda
from vramplan.trace.recorder import OUTSIDE, Tracker
from vramplan.train.fast.install import Fused, uninstalled
from vramplan.train.fused_loss import decoder_of, fused_cross_entropy, head_of
from vramplan.train.varlen import arguments


def trace(config: dict[str, Any], run: RunSpec, gpu: GpuProfile, layers: int, spec: ModelSpec | None = None) -> Tracker:
    """The record of `run` on the model of this config.json, cut to `layers` decoder layers.

    `spec` is our description of the model, where there is one: it says what a fused layer's recomputation leaves out.
    """
    tracker = Tracker(gpu, rules.RULES | attention.RULES)
    collecting = gc.isenabled()
    gc.disable()  # what dies is what the libraries drop, not what the collector happens to find
    gc.freeze()  # and where they collect themselves, only what the trace made is looked at
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with like_cuda(tracker, padded(run)), fake, tracker:
            tracker.calibrate()
            tracker.rec = Recorder()
            _play(config, run, tracker, layers, spec)
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return tracker


def _play(config: dict[str, Any], run: RunSpec, tracker: Tracker, layers: int, spec: ModelSpec | None) -> None:
    tracker.begin("load")
    model = models.load(models.configuration(config, layers), run, tracker)
    gc.collect()
    tracker.begin("prepare")
    tracker.rec.scope = "weights.other"
    model = models.prepare(model, run, tracker)
    tracker.begin("lora")
    model = models.add_lora(model, run, tracker)
    fused = fuse(model, spec, run, tracker, layers)
    if fused is None and run.levers.kernels == "fused":
        models.checkpoint(model.get_base_model(), run, tracker)
    tracker.at(OUTSIDE)
    gc.collect()
    model.train()
    with uninstalled(fused):
        step = TracedStep(model, run, tracker, layers, fused)
        step.play()
        tracker.begin("end")
        step.close()


class TracedStep:
    """The optimizer step of the trainer or the loop, on the traced model."""

    def __init__(self, model: Any, run: RunSpec, tracker: Tracker, layers: int, fused: Fused | None) -> None:
        self.model, self.run, self.tracker = model, run, tracker
        views = set() if fused is None else fused.views
        self.parameters: list[Any] = [] if fused is None else list(fused.parameters)
        self.parameters += [p for p in model.parameters() if p.requires_grad and id(p) not in views]
        self.names = {module: name for name, module in model.named_modules()}
        self.layers = layers_of(model, layers)
        self.layers_done = False
        self.head = head_of(model.get_base_model(), fused is not None) if run.levers.loss == "fused" else None
        self.hooks = self._watch()
        tracker.begin("ready")
        self.optimizer = models.optimizer(run.levers.optimizer, self.parameters)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    # ---------------------------------------------------------------------------------------------------- play
    def play(self) -> None:
        tracker, run = self.tracker, self.run
        loss: Any = None
        for _ in range(min(run.accumulation, 2)):
            loss = None
            loss = self.micro_step()
        tracker.begin("optimizer")
        tracker.rec.scope = "optimizer.scratch"
        if run.driver == "trainer":
            loss = None
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        tracker.at(OUTSIDE)
        tracker.settle("optimizer.state")
        tracker.begin("zero_grad")
        self.optimizer.zero_grad(set_to_none=True)
        del loss

    def micro_step(self) -> Tensor:
        tracker, run = self.tracker, self.run
        tracker.begin("forward")
        tracker.rec.scope = "activations.inputs"
        inputs = self.batch()
        with autocast():
            output: Any = self.loss(inputs)
            loss = None if run.driver == "trainer" else output["loss"]
            if loss is not None:
                del output
        if loss is None:  # accelerate's convert_outputs_to_fp32
            output = convert_to_fp32(output)
            loss = output["loss"]
            del output
        tracker.begin("backward")
        tracker.rec.scope = "activations.gradients"
        tracker.in_backward = True
        loss.backward()
        tracker.in_backward = False
        tracker.at(OUTSIDE, "end")
        for parameter in self.parameters:
            if parameter.grad is not None:
                tracker.relabel(parameter.grad, "adapter.gradients", "gradient of the adapter")
        return loss.detach() if run.driver == "trainer" else loss

    def batch(self) -> dict[str, Any]:
        run = self.run
        ids = torch.zeros(run.micro_batch_size, run.seq_len, dtype=torch.long, device=DEVICE)
        if run.packing:
            inputs = {"input_ids": ids, "labels": torch.zeros_like(ids), **borders(run)}
        elif run.driver == "loop":
            inputs = {"input_ids": ids, "labels": ids}
        else:
            inputs = {"input_ids": ids, "labels": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}
        if run.driver == "loop":
            return {**inputs, "use_cache": False}
        if run.levers.loss == "full":
            inputs["num_items_in_batch"] = torch.zeros((), dtype=torch.long, device=DEVICE)
        return inputs

    def loss(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.head is None:
            output: dict[str, Any] = self.model(**inputs)
            return output
        labelled = self.run.micro_batch_size * (self.run.seq_len - 1)  # `labelled_rows` of plain text
        rows, targets = (torch.zeros(labelled, dtype=torch.long, device=DEVICE) for _ in range(2))
        decoder = decoder_of(self.model.get_base_model())
        hidden = decoder(input_ids=inputs["input_ids"], use_cache=False, **arguments(inputs))[0]
        return {"loss": fused_cross_entropy(hidden, rows, targets, self.head, 1.0)}

    # ---------------------------------------------------------------------------------------------------- hooks
    def _watch(self) -> list[Any]:
        """Marks for the layers, and the names of the modules at work."""
        hooks = [
            nn.modules.module.register_module_forward_pre_hook(self._enter),
            nn.modules.module.register_module_forward_hook(self._leave, always_call=True),
        ]
        for index, layer in enumerate(self.layers):
            hooks.append(layer.register_forward_pre_hook(self._layer_begins(index), with_kwargs=True))
            hooks.append(layer.register_forward_hook(self._layer_ends(index)))
        return hooks

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self.layers_done:  # not when the last layer returns: its caller still holds its input then
            self.layers_done = False
            self.tracker.at(OUTSIDE, "head")
            self.tracker.rec.scope = "activations.head"
        self.tracker.modules.append(self.names.get(module, type(module).__name__))

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if self.tracker.modules:
            self.tracker.modules.pop()
        if not self.tracker.in_backward and self.names.get(module, "").endswith(("lm_head", ".norm", "final_norm")):
            self.tracker.rec.scope = "loss.logits"

    def _layer_begins(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tracker = self.tracker
            if tracker.in_backward:
                tracker.at(index)
                tracker.recomputing, tracker.rec.scope = True, "activations.layers"
                return
            tracker.at(index)
            tracker.rec.scope = "activations.layers"
            hidden = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
            if hidden is not None and getattr(module, "gradient_checkpointing", False) and index:
                tracker.relabel(hidden, "activations.checkpoints", "layer input kept")
            if index == 0 and hidden is not None and hidden.requires_grad:
                hidden.register_hook(lambda _: tracker.at(OUTSIDE, "embed"))

        return hook

    def _layer_ends(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            tracker = self.tracker
            if tracker.in_backward:
                return
            self.layers_done = index == len(self.layers) - 1
            hidden = next((t for t in tree_leaves(out) if isinstance(t, Tensor)), None)
            if hidden is not None and hidden.requires_grad:
                hidden.register_hook(lambda _: self._layer_backward(index))

        return hook

    def _layer_backward(self, index: int) -> None:
        self.tracker.recomputing = False
        self.tracker.at(index)


def borders(run: RunSpec) -> dict[str, Any]:
    """What a packed batch brings, with as many documents as there can be."""
    edges = documents(run.micro_batch_size, run.seq_len) + 1
    positions = torch.zeros(run.micro_batch_size, run.seq_len, dtype=torch.long, device=DEVICE)
    cumulative = {f"cu_seq_lens_{side}": torch.zeros(edges, dtype=torch.int32, device=DEVICE) for side in "qk"}
    return {"position_ids": positions, **cumulative, "max_length_q": run.seq_len, "max_length_k": run.seq_len}


def layers_of(model: nn.Module, count: int) -> nn.ModuleList:
    """The list of decoder layers: the first of that length that is not inside another. Raises Unplannable."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise Unplannable(f"{type(model).__name__} has no list of {count} decoder layers")
