"""Operations whose memory on CUDA has been looked at, and how they are called in a ledger.

The list is what the traces of the tested architectures run (tests/test_trace.py). An operation outside it stops the
trace: on CUDA it might allocate something else than its result.
"""

from __future__ import annotations

import bitsandbytes  # noqa: F401  registers its operations
import torch

aten = torch.ops.aten

TESTED = {"torch": "2.13", "transformers": "5.17", "peft": "0.21", "bitsandbytes": "0.50"}

# A GEMM makes its thread's cuBLAS workspace.
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.linear.default}
# bitsandbytes allocates the scales before the packed result, CUDA's dropout its mask before the result.
LAST_FIRST = {
    torch.ops.bitsandbytes.quantize_4bit.default,
    torch.ops.bitsandbytes.quantize_blockwise.default,
    aten.native_dropout.default,
}
# `torch.tensor(0.0)`: the step counters of torch's optimizers stay in host memory.
ON_HOST = {aten.lift_fresh.default}
# Phases that go through the parameters one by one: what is made belongs to the layer of the one at hand.
BY_PARAMETER = ("prepare", "lora", "optimizer", "first_optimizer")

KEYS = {
    "nll_loss_backward": "loss.gradients",
    "_log_softmax_backward": "loss.gradients",
    "_log_softmax": "loss.log_softmax",
    "dequantize": "workspace.dequantised",
}
SPOKEN = {
    "to_copy": "cast",
    "log_softmax": "log_softmax of the logits",
    "log_softmax_backward_data": "gradient of log_softmax",
    "nll_loss_backward": "gradient of nll_loss",
    "mm": "product",
    "mul.Tensor": "product",
    "native_dropout": "dropout and its mask",
}
OPERATIONS: set[object] = set()
NAMES: set[str] = {"aten", "bitsandbytes", "prim", "profiler"}
