"""Puts the fused pieces into a model that PEFT has wrapped, module by module; the modelling code stays what runs.

A piece is replaced where its meaning is known: a norm, a rotary embedding and an MLP because they were tried against
ours, a Linear because it is bitsandbytes' with PEFT's plain LoRA around it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import masking_utils

from vramplan.core.fused import SHAPED
from vramplan.core.types import Levers
from vramplan.train.fast import kernels, norm, rotary
from vramplan.train.fast.checkpoint import Checkpoints
from vramplan.train.fast.flat import FlatLora, Slot
from vramplan.train.fast.linear import Base, Group, SharedInput, linears
from vramplan.train.fast.mlp import PARTS, Mlp, activation_of, gated_mlp

TOGETHER = ("q_proj", "k_proj", "v_proj")  # Linears that attention calls with the same tensor


@dataclass
class Fused:
    """What was installed. `parameters` are what the optimizer steps in the place of PEFT's own."""

    layers: nn.ModuleList
    parameters: list[nn.Parameter] = field(default_factory=list)
    checkpoints: Checkpoints | None = None
    shared: list[SharedInput] = field(default_factory=list)
    undo: list[tuple[Any, str, Any]] = field(default_factory=list)
    replaced: list[nn.Module] = field(default_factory=list)  # modules whose forward is ours
    views: set[int] = field(default_factory=set)  # ids of PEFT's parameters that are views of ours

    def forget(self) -> None:
        """Drop what an interrupted step has left: results that nobody fetched, inputs on their way."""
        for shared in self.shared:
            shared.forget()
        if self.checkpoints is not None:
            self.checkpoints.forget()

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """The gradient of any parameter of the model: of a view of ours the same view of our gradient."""
        if id(parameter) not in self.views:
            return parameter.grad
        storage = parameter.untyped_storage().data_ptr()
        flat = next(ours.grad for ours in self.parameters if ours.untyped_storage().data_ptr() == storage)
        if flat is None:
            return None
        return flat.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())

    def check(self) -> None:
        """RuntimeError if PEFT's parameters are no views of ours any more: then what is trained would not be saved."""
        ours = {parameter.untyped_storage().data_ptr() for parameter in self.parameters}
        for parameter in self.layers.parameters():
            if id(parameter) in self.views and parameter.untyped_storage().data_ptr() not in ours:
                raise RuntimeError(
                    "something moved the adapter's parameters out of the flat tensors of the fused layers"
                )

    def checkpoint_all(self) -> None:
        """From now on every layer keeps only its input."""
        for layer in self.layers:
            layer.gradient_checkpointing = True

    def offload(self) -> None:
        """From now on the checkpoints wait in host memory."""
        assert self.checkpoints is not None
        self.checkpoints.offload()

    @contextmanager
    def stock(self) -> Iterator[None]:
        """The libraries' own forward for a moment, on the same parameters."""
        ours = [(module, module.__dict__.pop("forward")) for module in self.replaced]
        globals_ = [(where, name, getattr(where, name)) for where, name, _ in self.undo]
        try:
            for where, name, what in self.undo:
                setattr(where, name, what)
            yield
        finally:
            for module, forward in ours:
                module.forward = forward
            for where, name, what in globals_:
                setattr(where, name, what)

    def uninstall(self) -> None:
        """Give back what belongs to transformers' modules (not to this model): its rotary functions."""
        for where, name, what in reversed(self.undo):
            setattr(where, name, what)
        self.undo = []


@contextmanager
def uninstalled(fused: Fused | None) -> Iterator[None]:
    """Give transformers its rotary functions back at the end."""
    try:
        yield
    finally:
        if fused is not None:
            fused.uninstall()


def why_not(model: Any, levers: Levers, device: torch.device) -> str:
    """Why this model's layers cannot be fused; "" if they can. The rule of `core.fused.is_fused`, on modules."""
    if levers.kernels != "fused":
        return "kernels are stock"
    if not kernels.available(device.type):
        return "Triton is not installed"
    if levers.upcast != "none":
        return f"upcast {levers.upcast} makes a float32 stream"
    if levers.optimizer in SHAPED:
        return f"{levers.optimizer} keeps a state that depends on each parameter's shape"
    layers = decoder_layers(model)
    if layers is None:
        return f"{type(model).__name__} has no list of decoder layers"
    for name, module in layers.named_modules():
        if hasattr(module, "lora_A") and (reason := _unlike(module)):
            return f"{name} {reason}"
        if isinstance(module, nn.Linear) and not isinstance(module, bnb.nn.Linear4bit) and not _of_adapter(name):
            return f"{name} is not quantised"
    if any(p.dim() == 3 for p in layers.parameters()):
        return "the experts are not quantised"
    return ""


def _of_adapter(name: str) -> bool:
    return ".lora_A." in f".{name}" or ".lora_B." in f".{name}"


def _unlike(lora: Any) -> str:
    """What keeps PEFT's module from being plain LoRA on a 4-bit Linear."""
    if not isinstance(lora.get_base_layer(), bnb.nn.Linear4bit):
        return "is not quantised"
    if list(lora.lora_A) != list(lora.active_adapters) or len(lora.lora_A) != 1:
        return "has several adapters"
    adapter = lora.active_adapters[0]
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in lora.lora_dropout.values()):
        return "has LoRA dropout"
    if lora.lora_variant or lora.lora_bias.get(adapter):
        return "has a variant of LoRA"
    return ""


def decoder_layers(model: Any) -> nn.ModuleList | None:
    """The list of decoder layers of a causal language model, wrapped by PEFT or not."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(base, base.base_model_prefix, None)
    layers = getattr(decoder, "layers", None)
    return layers if isinstance(layers, nn.ModuleList) else None


def install(model: Any, levers: Levers, device: torch.device, skips_last: bool, stochastic: bool) -> Fused:
    """Fuse every decoder layer and the final norm. The caller has asked `why_not`.

    `skips_last`: the layer's result is its residual plus the MLP's, so that a recomputation need not know the latter.
    """
    layers = decoder_layers(model)
    assert layers is not None
    fused = Fused(layers)
    norms: dict[Any, norm.Norm | None] = {}
    activations: dict[Any, str | None] = {}
    mlps: list[Mlp | None] = []
    anchors: list[Tensor | None] = []
    for layer in layers:
        lora, mlp = _fuse_layer(layer, fused, activations)
        mlps.append(mlp if skips_last else None)
        anchors.append(lora.parameter)
    decoder = getattr(model.get_base_model(), model.get_base_model().base_model_prefix)
    for module in decoder.modules():
        _fuse_norm(module, norms)
    fused.replaced = [module for module in decoder.modules() if "forward" in module.__dict__]
    _fuse_rotary(layers, model.get_base_model().config, fused)
    _leave_out_masks(fused)
    _checkpoint(layers, levers, device, mlps, anchors, stochastic, fused)
    return fused


def _leave_out_masks(fused: Fused) -> None:
    """transformers looks for packed rows in every forward, and waits for the card to learn that there are none. And it
    takes the capture of a CUDA graph for tracing, for which it makes a mask: keys and values of every head are then
    kept, and attention is no flash kernel any more."""
    ours = {"find_packed_sequence_indices": lambda position_ids: None, "is_tracing": lambda tensor=None: False}
    for name, what in ours.items():
        fused.undo.append((masking_utils, name, getattr(masking_utils, name)))
        setattr(masking_utils, name, what)


# -------------------------------------------------------------------------------------------------- one layer
def _fuse_layer(layer: nn.Module, fused: Fused, activations: dict[Any, str | None]) -> tuple[FlatLora, Mlp | None]:
    """Replace the Linears and the MLP of a layer, and move its adapters into one flat tensor.

    `activations` remembers what the classes of MLPs turned out to be.
    """
    lora = FlatLora()
    slots: list[tuple[Slot, list[Any]]] = []
    done: set[int] = set()
    mlp: Mlp | None = None
    for module in layer.modules():
        if all(_is_linear(getattr(module, name, None)) for name in PARTS):
            activation = _known(activations, module)
            if activation is None:
                continue
            gate, up, down = (getattr(module, name) for name in PARTS)
            mlp = Mlp(_group([gate, up], lora, slots), _group([down], lora, slots), activation)
            module.forward = _mlp_forward(mlp)
            done |= {id(gate), id(up), id(down)}
        elif all(_is_linear(getattr(module, name, None)) for name in TOGETHER):
            parts = [getattr(module, name) for name in TOGETHER]
            group = _group(parts, lora, slots)
            shared = SharedInput(group)
            for place, part in enumerate(parts):
                part.forward = shared.member(place)
            fused.shared.append(shared)
            done |= {id(part) for part in parts}
    done |= {id(module.get_base_layer()) for module in layer.modules() if hasattr(module, "lora_A")}
    for module in layer.modules():
        if _is_linear(module) and id(module) not in done:
            module.forward = _linear_forward(_group([module], lora, slots))
    if slots:
        lora.fill([(slot, pairs) for slot, pairs in slots])
        assert lora.parameter is not None
        fused.parameters.append(lora.parameter)
        fused.views |= {id(m.weight) for _, pairs in slots for pair in pairs for m in pair}
    return lora, mlp


def _known(activations: dict[Any, str | None], module: nn.Module) -> str | None:
    if type(module) not in activations:
        activations[type(module)] = activation_of(module)
    return activations[type(module)]


def _is_linear(module: Any) -> bool:
    return isinstance(module, bnb.nn.Linear4bit) or (
        hasattr(module, "lora_A") and isinstance(module.get_base_layer(), bnb.nn.Linear4bit)
    )


def _group(modules: Sequence[Any], lora: FlatLora, slots: list[tuple[Slot, list[Any]]]) -> Group:
    bases: list[Base] = []
    pairs: list[Any] = []
    scalings: list[float] = []
    for module in modules:
        adapted = hasattr(module, "lora_A")
        base = module.get_base_layer() if adapted else module
        bases.append(Base(base, base.in_features, base.out_features, len(pairs) if adapted else None))
        if adapted:
            (adapter,) = module.lora_A
            pairs.append((module.lora_A[adapter], module.lora_B[adapter]))
            scalings.append(float(module.scaling[adapter]))
    if not pairs:
        return Group(bases, lora)
    rank = pairs[0][0].weight.shape[0]
    outs = [base.outputs for base in bases if base.adapter is not None]
    slot = lora.reserve(rank, bases[0].inputs, outs, scalings)
    slots.append((slot, pairs))
    return Group(bases, lora, slot)


def _linear_forward(group: Group) -> Any:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return linears(group, x)[0]

    return forward


def _mlp_forward(mlp: Mlp) -> Any:
    def forward(x: Tensor) -> Tensor:
        return gated_mlp(mlp, x)

    return forward


# ------------------------------------------------------------------------------------------- norms and rotary
def _fuse_norm(module: nn.Module, known: dict[Any, norm.Norm | None]) -> None:
    if not type(module).__name__.endswith("RMSNorm"):
        return
    kind = type(module)
    if kind not in known:
        known[kind] = norm.norm_of(module)
    like = known[kind]
    if like is not None:
        eps: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        mine = like._replace(weight=module.weight, eps=eps)
        module.forward = lambda x, _norm=mine: norm.forward(_norm, x)


def _fuse_rotary(layers: nn.ModuleList, config: Any, fused: Fused) -> None:
    """The function that the layers' modelling file calls by name."""
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    parameters = getattr(text, "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor", 1.0) if isinstance(parameters, dict) else 1.0
    where = sys.modules[type(layers[0]).__module__]
    original = getattr(where, "apply_rotary_pos_emb", None)
    if original is None or not rotary.same_meaning(original, head_dim, int(head_dim * share)):
        return
    fused.undo.append((where, "apply_rotary_pos_emb", original))
    where.apply_rotary_pos_emb = rotary.apply_rotary  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ checkpoints
def _checkpoint(
    layers: nn.ModuleList,
    levers: Levers,
    device: torch.device,
    mlps: Sequence[Mlp | None],
    anchors: Sequence[Tensor | None],
    stochastic: bool,
    fused: Fused,
) -> None:
    from vramplan.core.timeline import checkpointed

    fused.checkpoints = Checkpoints(device, levers.checkpoint_offload, mlps, stochastic)
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = checkpointed(levers.checkpointing, index)
        layer._gradient_checkpointing_func = fused.checkpoints.function(index, anchors[index])
