"""The real model, wrapped by the real PEFT, on fake tensors, made in the order in which it is made on a card."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from vramplan.core import experts
from vramplan.core.timeline import checkpoint_period
from vramplan.core.types import RunSpec, Unplannable
from vramplan.errors import InputError
from vramplan.trace.attention import DEVICE
from vramplan.trace.patches import fake_params4bit
from vramplan.trace.recorder import OUTSIDE, Tracker
from vramplan.train.varlen import implementation

PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")  # lists in a config, one entry a layer
_LAYER = re.compile(r"\.(\d+)\.")


def layer_of(name: str) -> int:
    """The decoder layer that a parameter or module belongs to, by its name; OUTSIDE if none."""
    found = _LAYER.search(f".{name}.")
    return int(found[1]) if found else OUTSIDE


# ------------------------------------------------------------------------------------------------------ loading
def configuration(config: dict[str, Any], layers: int | None) -> Any:
    """transformers' own config object, cut to `layers` decoder layers. Raises Unplannable if it knows no such model."""
    fields = {k: v for k, v in config.items() if k not in ("architectures", "auto_map", "quantization_config")}
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise Unplannable(
            f"the installed transformers knows no model_type {model_type!r}",
            "upgrade transformers, or check the config",
        )
    made = CONFIG_MAPPING[model_type](**fields)
    text = made.get_text_config()
    if layers is None:
        return text
    text.num_hidden_layers = layers
    for name in PER_LAYER:
        if getattr(text, name, None):
            with suppress(AttributeError):  # computed from the number of layers
                setattr(text, name, list(getattr(text, name))[:layers])
    return text


def skeleton(config: Any, run: RunSpec) -> Any:
    """The model on the meta device: shapes, no storage."""
    try:
        config._attn_implementation = attention = implementation(run)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    except InputError as error:
        raise Unplannable(error.message, error.hint) from error
    except ValueError as error:
        if "attention implementation" not in str(error):
            raise Unplannable(f"transformers cannot build this model: {str(error)[:200]}") from error
        raise Unplannable(
            f"transformers has no {run.levers.attention} attention for model_type {config.model_type!r}",
            "add --attn eager",
        ) from error


def load(config: Any, run: RunSpec, tracker: Tracker) -> Any:
    """The model as the 4-bit load leaves it: Linears in NF4, everything else in bf16."""
    model = skeleton(config, run)
    model.eval()
    kept = {id(m) for m in (model.get_output_embeddings(),) if m is not None}
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Linear, Conv1D) and id(module) not in kept:  # not a subclass: transformers' own rule
            tracker.at(layer_of(name))
            _quantise(model, name, module, run, tracker)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, module in model.named_modules():
        tracker.at(layer_of(name))
        if module is head and config.tie_word_embeddings:
            continue  # tied below
        kind = "embeddings" if module is table else "lm_head" if module is head else "other"
        _materialise(module, name, "weights." + kind, tracker, run.random_weights)
    tracker.at(OUTSIDE)
    if config.tie_word_embeddings:
        model.tie_weights()
    model.is_loaded_in_4bit = model.is_quantized = True
    model.quantization_method = "bitsandbytes"
    return model


def _drawn(shape: Any, drawn: bool) -> Tensor:
    """A weight arriving in bf16; random ones are drawn and scaled."""
    weight = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    return weight * 0.02 if drawn else weight


def _quantise(model: Any, name: str, linear: nn.Module, run: RunSpec, tracker: Tracker) -> None:
    outputs, inputs = linear.weight.shape if isinstance(linear, nn.Linear) else reversed(linear.weight.shape)
    with torch.device("meta"):
        quantised = bnb.nn.Linear4bit(
            inputs,
            outputs,
            bias=linear.bias is not None,
            compute_dtype=torch.bfloat16,
            compress_statistics=run.double_quant,
            quant_type="nf4",
            device="meta",
        )
    tracker.rec.scope = "weights.constants"
    weight = _drawn((outputs, inputs), run.random_weights)
    packed, state = bnbf.quantize_4bit(weight, blocksize=64, compress_statistics=run.double_quant, quant_type="nf4")
    tracker.relabel(packed, "weights.nf4", f"{name} in NF4")
    del quantised.weight
    quantised.weight = fake_params4bit(
        packed, quant_state=state, compress_statistics=run.double_quant, module=quantised, bnb_quantized=True
    )
    quantised.quant_state = state
    parent, _, short = name.rpartition(".")
    setattr(model.get_submodule(parent), short, quantised)


def _materialise(module: nn.Module, name: str, key: str, tracker: Tracker, drawn: bool) -> None:
    """Parameters and buffers that are not quantised."""
    tracker.rec.scope = key
    for short, parameter in list(module._parameters.items()):
        if parameter is None or parameter.device.type != "meta":
            continue
        value = _drawn(parameter.shape, drawn and parameter.dim() > 1)
        if parameter.dim() > 1 and layer_of(name) != OUTSIDE:
            tracker.plain.append((layer_of(name), 2 * parameter.numel()))
        module._parameters[short] = nn.Parameter(value, requires_grad=False)
    tracker.rec.scope = "weights.other"
    for short, buffer in list(module._buffers.items()):
        if buffer is not None:
            module._buffers[short] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)


# ---------------------------------------------------------------------------------------------- trainable
def prepare(model: Any, run: RunSpec, tracker: Tracker) -> Any:
    """Freeze, upcast, checkpoint: what `vramplan train` and the tutorials do before PEFT."""
    levers = run.levers
    if levers.upcast == "all":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    else:
        model.requires_grad_(False)
        if levers.upcast == "norms":
            for module in model.modules():
                if "norm" in type(module).__name__.lower():
                    module.to(torch.float32)
    tracker.at(OUTSIDE)
    if levers.kernels == "stock":
        checkpoint(model, run, tracker)
    return model


def checkpoint(model: Any, run: RunSpec, tracker: Tracker) -> None:
    """transformers' own checkpointing, as the levers say."""
    levers = run.levers
    if levers.checkpointing == "none":
        return
    every = checkpoint_period(levers.checkpointing)
    model.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    if levers.checkpoint_offload:
        _offload(model, tracker)


def _offload(model: Any, tracker: Tracker) -> None:
    """transformers' `offload=True`: what the checkpoint saves goes to pinned memory and comes back."""

    def to_host(tensor: Tensor) -> Tensor:
        tracker.hosted += 1
        try:
            return tensor.clone()
        finally:
            tracker.hosted -= 1

    def to_card(tensor: Tensor) -> Tensor:
        back = tensor.clone()
        tracker.relabel(back, "activations.checkpoints", "layer input back from the host")
        return back

    for module in model.modules():
        inner = getattr(module, "_gradient_checkpointing_func", None)
        if inner is None:
            continue

        def checkpoint(function: Any, *args: Any, _inner: Any = inner, **kwargs: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(to_host, to_card):
                return _inner(function, *args, **kwargs)

        module._gradient_checkpointing_func = checkpoint


def add_lora(model: Any, run: RunSpec, tracker: Tracker) -> Any:
    """`get_peft_model`. Raises Unplannable when PEFT refuses the targets."""
    lora = run.lora
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(model, lora.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    tracker.rec.scope = "adapter.lora"
    try:
        with _layer_by_layer(tracker), torch.device(DEVICE):
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise Unplannable(f"PEFT refuses this adapter: {error}") from error
    tracker.at(OUTSIDE)
    dtype = getattr(torch, lora.dtype)
    for name, parameter in wrapped.named_parameters():
        if not parameter.requires_grad:
            continue
        tracker.adapter.append((layer_of(name), parameter.numel()))
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    return wrapped


def _targets(model: Any, targets: tuple[str, ...]) -> str | list[str]:
    """As `vramplan.train.lora`: with experts, all-linear is named, for PEFT 0.21 would adapt experts and router too."""
    if targets != ("all-linear",):
        return list(targets)
    if not any(getattr(model.config, name, None) for name in experts.COUNTS):
        return "all-linear"
    head = model.get_output_embeddings()
    linears = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    return sorted({name.rpartition(".")[2] for name in linears})


@contextmanager
def _layer_by_layer(tracker: Tracker) -> Iterator[None]:
    """Tell the tracker which layer PEFT is at, and that it makes the adapter in host memory and moves it then."""
    create: Any = LoraModel._create_and_replace
    move: Any = LoraLayer._move_adapter_to_device_of_base_layer

    def create_on_host(self: Any, *args: Any, current_key: str, **kwargs: Any) -> Any:
        tracker.at(layer_of(current_key))
        tracker.hosted += 1
        try:
            return create(self, *args, current_key=current_key, **kwargs)
        finally:
            tracker.hosted -= 1

    def move_to_card(self: Any, adapter_name: str, device: Any = None) -> None:
        tracker.hosted -= 1
        move(self, adapter_name, device)
        for name in ("lora_A", "lora_B"):  # where the dtype stayed the same, nothing was copied
            for parameter in getattr(self, name).parameters():
                tracker.arrive(parameter)
        tracker.hosted += 1

    LoraModel._create_and_replace = create_on_host
    LoraLayer._move_adapter_to_device_of_base_layer = move_to_card
    try:
        yield
    finally:
        LoraModel._create_and_replace = create
        LoraLayer._move_adapter_to_device_of_base_layer = move


def optimizer(name: str, parameters: list[Tensor]) -> Any:
    """The optimizer that `transformers.Trainer` makes of this name."""
    adam = bnb.optim
    makers: dict[str, Any] = {
        "adamw_torch": lambda: torch.optim.AdamW(parameters, lr=1e-4, foreach=True),  # CUDA's default
        "adamw_torch_fused": lambda: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        "adamw_8bit": lambda: adam.AdamW(parameters, lr=1e-4, optim_bits=8),
        "paged_adamw_8bit": lambda: adam.AdamW(parameters, lr=1e-4, optim_bits=8, is_paged=True),
        "paged_adamw_32bit": lambda: adam.AdamW(parameters, lr=1e-4, is_paged=True),
        "lion_8bit": lambda: adam.Lion(parameters, lr=1e-4, optim_bits=8),
        "paged_lion_8bit": lambda: adam.Lion(parameters, lr=1e-4, optim_bits=8, is_paged=True),
        "lion_32bit": lambda: adam.Lion(parameters, lr=1e-4),
        "paged_lion_32bit": lambda: adam.Lion(parameters, lr=1e-4, is_paged=True),
        "sgd": lambda: torch.optim.SGD(parameters, lr=1e-4),
        "adafactor": lambda: _adafactor(parameters),
    }
    if name not in makers:
        raise Unplannable(f"no optimizer is called {name!r}", "known: " + ", ".join(makers))
    return makers[name]()


def _adafactor(parameters: list[Tensor]) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1e-4, scale_parameter=False, relative_step=False)
