"""A model too large for one GPU: its frozen weights shared out among the ranks, and gathered layer by layer.

While the model loads, each weight is cut the moment it is registered, so that a card never holds more than its parts
and one weight in full. Then torch's `fully_shard` (FSDP2) takes over the decoder layers: it gathers one when it runs,
in the forward, in the backward and when a checkpoint plays it again. A packed 4-bit weight must be of a floating dtype
for that (`bnb_4bit_quant_storage`); its constants, a thirtieth of it, stay whole on every rank, and so do norms, biases
and the adapter, which FSDP2 is told to ignore. Input embedding and head are gathered by hooks of ours around their
forward: FSDP2 would take twice their size for a moment. A tied embedding stays whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.modeling_layers import GradientCheckpointingLayer

from vramplan.core.parallel import shard_rows
from vramplan.errors import InputError
from vramplan.train.fused_loss import decoder_of
from vramplan.train.parallel import World

all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the name from torch 2.13 on
STORAGE = torch.bfloat16
WHOLE = "whole_shape"  # attribute of a parameter that is one rank's part: the shape of them all together


class Sharding:
    """Shares one model out among the ranks of `world`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.tied = False

    # ------------------------------------------------------------------------------------------------- loading
    @contextmanager
    def while_loading(self, *, tied: bool) -> Iterator[None]:
        """Every matrix that is registered in here is cut. `tied`: embedding and head are one, and stay whole."""
        self.tied = tied
        handle = register_module_parameter_registration_hook(self._cut)
        # transformers reserves the whole model's size on the card before it loads: more than there may be
        warmup = transformers.modeling_utils.caching_allocator_warmup
        transformers.modeling_utils.caching_allocator_warmup = lambda *_: None
        try:
            yield
        finally:
            transformers.modeling_utils.caching_allocator_warmup = warmup
            handle.remove()

    def _cut(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        """This rank's part in place of the parameter; None leaves it as it is."""
        if parameter is None or parameter.device.type == "meta" or hasattr(parameter, WHOLE):
            return None
        if not self._is_shared_out(module, parameter):
            return None
        part: nn.Parameter
        if isinstance(parameter, bnb.nn.Params4bit):
            packed = parameter.data.view(-1).view(STORAGE).view(-1, 1)  # a checkpoint may hold it as bytes
            part = bnb.nn.Params4bit(self._part(packed), requires_grad=False)
            whole = packed.shape
        else:
            part = nn.Parameter(self._part(parameter.data), requires_grad=False)
            whole = parameter.shape
        vars(part).update(vars(parameter))
        setattr(part, WHOLE, whole)
        return part

    def _is_shared_out(self, module: nn.Module, parameter: nn.Parameter) -> bool:
        if isinstance(parameter, bnb.nn.Params4bit) or parameter.dim() > 2:
            return True
        if isinstance(module, nn.Embedding) or type(module) is nn.Linear:  # every other Linear has been quantised
            return not self.tied and parameter.dim() == 2
        return isinstance(module, nn.Linear) and parameter.dim() == 2

    def _part(self, whole: Tensor) -> Tensor:
        """This rank's rows, and zeros where there are fewer than others have."""
        rows = shard_rows(whole.shape[0], self.world.size)
        start = min(rows * self.world.rank, whole.shape[0])
        mine = whole[start : start + rows]
        if mine.shape[0] == rows:
            return mine.clone()
        part = whole.new_zeros((rows, *whole.shape[1:]))
        part[: mine.shape[0]] = mine
        return part

    # ------------------------------------------------------------------------------------------------- running
    def apply(self, model: Any) -> None:
        """Make the loaded parts work as one model. InputError if it has no layers that could be gathered one by one."""
        causal_lm = model.get_base_model()
        decoder = decoder_of(causal_lm)
        layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise InputError(
                f"{type(causal_lm).__name__} has no decoder layers to share out", "train with --parallel ddp"
            )
        self._shard(decoder, layers)
        for module in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()):
            if module is not None and hasattr(module.weight, WHOLE):
                self._gather_around(module)
        self._restore_the_rest(causal_lm)

    def _shard(self, decoder: nn.Module, layers: list[nn.Module]) -> None:
        """`fully_shard` of empty weights, which are then filled with the parts that are there."""
        parts = [(module, name, part) for layer in layers for module, name, part in _parts_of(layer)]
        for module, name, part in parts:
            shape = getattr(part, WHOLE)
            module._parameters[name] = nn.Parameter(
                torch.empty(shape, dtype=part.dtype, device="meta"), requires_grad=False
            )
        ignored = {p for p in decoder.parameters() if p.device.type != "meta"}
        mesh = init_device_mesh(self.world.device.type, (self.world.size,))
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
        fully_shard(decoder, mesh=mesh, ignored_params=ignored)
        for module, name, part in parts:
            shape = getattr(part, WHOLE)
            rows = part.shape[0]
            mine = min(rows, max(shape[0] - rows * self.world.rank, 0))
            stride = torch.empty(shape, device="meta").stride()
            sharded = DTensor.from_local(
                part.data[:mine], mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
            )
            module._parameters[name] = nn.Parameter(sharded, requires_grad=False)

    def _gather_around(self, module: Any) -> None:
        """Give the module its whole weight while its forward runs, and to others by `module.whole_weight()`."""
        part = module.weight

        def whole_weight() -> Tensor:
            return self.gathered(part)

        def before(module: nn.Module, inputs: Any) -> None:
            module._parameters["weight"] = nn.Parameter(whole_weight(), requires_grad=False)

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            module._parameters["weight"] = part

        module.whole_weight = whole_weight
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)

    def gathered(self, part: nn.Parameter) -> Tensor:
        """The whole of which every rank has a part."""
        shape: torch.Size = getattr(part, WHOLE)
        whole = part.data.new_empty((part.shape[0] * self.world.size, *part.shape[1:]))
        all_gather(whole, part.data)
        return whole[: shape[0]]

    def _restore_the_rest(self, model: nn.Module) -> None:
        """What was cut and belongs to no group (position embeddings, say) becomes whole again."""
        for module, name, part in list(_parts_of(model)):
            if not hasattr(module, "whole_weight"):
                module._parameters[name] = nn.Parameter(self.gathered(part), requires_grad=False)


def _parts_of(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None and hasattr(parameter, WHOLE):
                yield each, name, parameter
