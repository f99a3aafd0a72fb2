"""Where CUDA allocates otherwise than the CPU that stands in for it, by operation (attention apart).

Sources: bitsandbytes 0.50.2 `backends/cuda/ops.py`, ATen of torch 2.11 to 2.13 (`native/cuda/SoftMax.cu`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bitsandbytes  # noqa: F401  registers its operations
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from vramplan.core.bnb_kernel import uses_fused_kernel
from vramplan.trace.recorder import Rule, Tracker

aten = torch.ops.aten
GEMM_4BIT = [a.name for a in torch.ops.bitsandbytes.gemm_4bit.default._schema.arguments]


def gemm_4bit(tr: Tracker, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """bitsandbytes' forward: the fused kernel, or the weight in bf16 and `F.linear`. Its fake hides the latter."""
    given = dict(zip(GEMM_4BIT, args, strict=False)) | kwargs  # the dispatcher passes keywords by position
    x, shape, bias = given["A"], given["shapeB"], given.get("bias")
    inputs, outputs = x.shape[-1], shape[0]
    gpu = tr.gpu
    if uses_fused_kernel(x.numel() // inputs, outputs, inputs, gpu.compute_capability, gpu.sm_count):
        return NotImplemented
    with tr:
        absmax_8bit = given.get("absmax_8bit")
        if absmax_8bit is not None:  # undo the double quantisation of the scales; both live until the product is done
            absmax_dq = torch.empty_like(absmax_8bit, dtype=torch.float32)
            absmax = absmax_dq + given["absmax_offset"]
            tr.relabel(absmax, "workspace.dequantised", "scales in fp32")
            tr.relabel(absmax_dq, "workspace.dequantised", "scales in fp32")
        weight = torch.empty(tuple(shape), dtype=x.dtype, device=x.device)
        tr.relabel(weight, "workspace.dequantised", "weight dequantised")
        out = functional.linear(x, weight, bias)
        if bias is not None:
            tr.workspace("cublaslt")
        return out


def item(tr: Tracker, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`.item()` of a tensor without data: a number that takes the usual branch."""
    if args[0].dtype == torch.bool:
        return False
    return 1.0 if args[0].is_floating_point() else 1


def softmax_backward(tr: Tracker, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """SoftMax.cu: the product of gradient and output is a tensor of its own."""
    out = func(*args, **kwargs)
    tr.track(out, str(func))
    size = torch.promote_types(args[0].dtype, args[1].dtype).itemsize * args[0].numel()
    with tr.scratch(size, name="softmax gradient times softmax"):
        return out


def safe_softmax(tr: Tracker, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A softmax, then a mask of the rows that were all minus infinity."""
    out = func(*args, **kwargs)
    tr.track(out, str(func))
    with tr.scratch(args[0].numel(), name="rows of minus infinity"):
        return out


def tracked(tr: Tracker, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run, and note what came out: for rules that allocate around an operation."""
    out = func(*args, **kwargs)
    for leaf in tree_leaves(out):
        if isinstance(leaf, Tensor):
            tr.track(leaf, str(func))
    return out


def grouped_mm(tr: Tracker, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`torch._grouped_mm`: one CUTLASS kernel for bf16 on capability 9 and 10, else a product per expert."""
    left, right = args[:2]
    if left.dtype != torch.bfloat16 or tr.gpu.compute_capability[0] not in (9, 10):
        tr.workspace("cublas")
    shape: tuple[int, ...] = (left.shape[0], right.shape[-1])
    if left.dim() == right.dim() == 2:  # the gradient of the experts: a product for each group
        offsets = args[2] if len(args) > 2 else kwargs["offs"]
        shape = (offsets.shape[0], *shape)
    with tr:
        return torch.empty(shape, dtype=left.dtype, device=left.device)


def index_put(tr: Tracker, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The backward of indexing adds into its zeros in place (not under a subclass); CUDA sorts the indices first."""
    accumulate = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    if not accumulate:
        return NotImplemented
    count = max(i.numel() for i in args[1] if i is not None)
    with tr.scratch(*[8 * count] * 4, 16 * count, name="indices sorted"):
        return args[0]


def sort(tr: Tracker, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Above 4096 elements a radix sort, with scratch."""
    out = tracked(tr, func, args, kwargs)
    count = args[0].numel()
    if count > 4096:
        with tr.scratch(8 * count, 16 * count, name="sort scratch"):
            pass
    return out


def in_place(tr: Tracker, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A gradient written into zeros that nobody else holds."""
    return args[0]


RULES: dict[Any, Rule] = {
    torch.ops.bitsandbytes.gemm_4bit.default: gemm_4bit,
    aten._local_scalar_dense.default: item,
    aten._softmax_backward_data.default: softmax_backward,
    aten._safe_softmax.default: safe_softmax,
    aten._grouped_mm.default: grouped_mm,
    aten.index_put.default: index_put,
    aten.sort.default: sort,
    aten.sort.stable: sort,
    aten.scatter.src: in_place,
}
