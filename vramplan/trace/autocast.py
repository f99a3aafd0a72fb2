"""bf16 autocast with CUDA's lists of operations, on the CPU that stands in for the card.

Source: torch 2.13 `aten/src/ATen/autocast_mode.h` (`AT_FORALL_FP32`, `AT_FORALL_FP32_SET_OPT_DTYPE`). The CPU's own
lists lack most of these.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from vramplan.trace.attention import CPU_AUTOCAST, DEVICE

# Computed in float32: the inputs are cast.
# fmt: off
FP32 = [
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "group_norm", "frobenius_norm.dim", "cosine_similarity", "nll_loss", "nll_loss2d", "kl_div", "l1_loss",
    "smooth_l1_loss", "huber_loss", "mse_loss", "binary_cross_entropy_with_logits", "dist", "logsumexp",
]
# No cast of the input: the operation itself computes in float32 and returns it.
FP32_RESULT = [
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm", "sum",
    "sum.dim_IntList",
]
# fmt: on


def _operation(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _up(value: Any) -> Any:
    wide = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.float() if wide else value


def _casting(op: Any) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(CPU_AUTOCAST):
            wide = [_up(x) for x in reversed(args)][::-1]  # the compiler evaluates the arguments from the right
            return op(*wide, **{name: _up(x) for name, x in kwargs.items()})

    return kernel


def _widening(op: Any) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(CPU_AUTOCAST):
            stated = kwargs.get("dtype") is not None or any(isinstance(x, torch.dtype) for x in args)
            if args[0].is_floating_point() and not stated:
                kwargs["dtype"] = torch.float32
            return op(*args, **kwargs)

    return kernel


@contextlib.contextmanager
def cuda_lists() -> Iterator[None]:
    """The stand-in's autocast casts as CUDA's would, until the end of the block."""
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some of them replace a kernel of the CPU's own list: that is the point
            for names, wrap in ((FP32, _casting), (FP32_RESULT, _widening)):
                for name in names:
                    library.impl(name, wrap(_operation(name)), "AutocastCPU")
        yield
    finally:
        library._destroy()


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    """`torch.autocast("cuda", torch.bfloat16)` for the stand-in, and for "cuda", which PEFT asks about."""
    devices = (DEVICE, "cuda")
    before = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    for device in devices:
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        for device, (enabled, dtype) in zip(devices, before, strict=True):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
