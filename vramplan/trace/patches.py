"""What of the libraries cannot run under `FakeTensorMode`, or would take a CPU's path: replaced, and put back after.

Every replacement is a (where, name, what) triple, so that the list below is the whole of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import torch
import torch.cuda.amp.common
import torch.utils.checkpoint
from bitsandbytes.optim import optimizer as bnb_optimizer
from torch import Tensor
from torch.nn import functional
from transformers import masking_utils

from vramplan.core.resident import MIN_PAGED
from vramplan.trace import fused
from vramplan.trace.attention import DEVICE, Attention, dropout
from vramplan.trace.autocast import cuda_lists
from vramplan.trace.recorder import Tracker
from vramplan.train import varlen

MISSING = object()


def fake_params4bit(
    data: Any = None,
    requires_grad: bool = False,
    quant_state: Any = None,
    blocksize: int | None = None,
    compress_statistics: bool = True,
    quant_type: str = "nf4",
    quant_storage: Any = torch.uint8,
    module: Any = None,
    bnb_quantized: bool = False,
    **_: Any,
) -> Any:
    """`Params4bit` without its subclass, which refuses FakeTensors."""
    tensor = data.detach()
    tensor.requires_grad_(False)
    tensor._is_param = True
    tensor.blocksize, tensor.compress_statistics = blocksize or 64, compress_statistics
    tensor.quant_type, tensor.quant_state, tensor.quant_storage = quant_type, quant_state, quant_storage
    tensor.module, tensor.bnb_quantized = module, bnb_quantized
    return tensor


def _swap(left: Tensor, right: Tensor) -> None:
    """`Module._apply` on FakeTensors wants `swap_tensors`, which refuses tensors with weak references."""
    if left.untyped_storage()._cdata != right.untyped_storage()._cdata or left.dtype != right.dtype:
        left.data = right.data


def _replacements(tracker: Tracker, padded: bool) -> list[tuple[Any, str, Any]]:
    def paged(*shape: int, dtype: Any = torch.float32, device: Any = None) -> Any:
        tracker.hosted += 1  # managed memory is not the caching allocator's
        try:
            tensor: Any = torch.empty(*shape, dtype=dtype, device=DEVICE)
        finally:
            tracker.hosted -= 1
        tensor.is_paged, tensor.page_deviceid = True, 0
        return tensor

    def state_buffer(self: Any, p: Tensor, dtype: Any = torch.float32) -> Any:
        if not self.is_paged or p.numel() < MIN_PAGED:
            return torch.zeros_like(p, dtype=dtype, device=p.device)
        tracker.at(tracker.home_of(p))  # its scales come next
        return paged(*p.shape, dtype=dtype)

    def map_of_256(*args: Any, **kwargs: Any) -> Tensor:
        return torch.empty(256, dtype=torch.float32, device=DEVICE)

    nothing = lambda *args, **kwargs: None  # noqa: E731
    yes = lambda *args, **kwargs: True  # noqa: E731
    no = lambda *args, **kwargs: False  # noqa: E731
    return [
        *fused.replacements(tracker),
        (torch.cuda.amp.common, "amp_definitely_not_available", no),  # else autocast("cuda") turns itself off
        (torch.cuda, "is_bf16_supported", yes),
        (torch.utils, "swap_tensors", _swap),
        (functional, "dropout", dropout),
        (functional, "scaled_dot_product_attention", Attention(tracker)),
        (varlen, "flash_fits", yes),
        (masking_utils, "is_tracing", no),  # a FakeTensor counts as tracing, which always makes a mask
        (masking_utils, "find_packed_sequence_indices", nothing),
        (masking_utils, "fast_all", lambda mask: not padded),  # a mask without data: the run says what is in it
        (bnb.nn.modules, "Params4bit", fake_params4bit),
        (bnbf, "get_paged", paged),
        (bnbf, "prefetch_tensor", nothing),
        (bnbf, "is_on_gpu", yes),
        (bnbf, "create_dynamic_map", map_of_256),
        (bnbf, "name2qmap", {}),  # code tables that functional keeps for the whole process
        (bnb_optimizer, "sync_gpu", nothing),
        (bnb_optimizer.Optimizer8bit, "get_state_buffer", state_buffer),
    ]


@contextlib.contextmanager
def like_cuda(tracker: Tracker, padded: bool = False) -> Iterator[None]:
    """The libraries behave as on a CUDA machine, until the end of the block; `padded`: the masks hold padding."""
    undo: list[tuple[Any, str, Any]] = []
    device = torch.utils.checkpoint.DefaultDeviceType.get_device_type()
    try:
        for where, name, what in _replacements(tracker, padded):
            undo.append((where, name, where.__dict__.get(name, MISSING)))
            setattr(where, name, what)
        torch.utils.checkpoint.DefaultDeviceType.set_device_type("cuda")  # recomputation restores this one's autocast
        with cuda_lists():
            yield
    finally:
        torch.utils.checkpoint.DefaultDeviceType.set_device_type(device)
        for where, name, what in reversed(undo):
            if what is MISSING:
                delattr(where, name)
            else:
                setattr(where, name, what)
