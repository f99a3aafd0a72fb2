"""Operations whose memory on CUDA has been looked at, and how they are called in a ledger.

The list is what the traces of the tested architectures run, and what on CUDA surely allocates nothing but its result.
Any other operation stops the trace: on a card it might need more.
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
BY_PARAMETER = ("prepare", "lora", "optimizer")

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
# fmt: off
OPERATIONS = frozenset({
    "aten._foreach_add_", "aten._foreach_addcdiv_", "aten._foreach_addcmul_", "aten._foreach_div_",
    "aten._flash_attention_backward", "aten._flash_attention_forward", "aten._foreach_lerp_", "aten._foreach_mul_",
    "aten._foreach_sqrt", "aten._fused_adamw_", "aten._grouped_mm",
    "aten._local_scalar_dense", "aten._log_softmax", "aten._log_softmax_backward_data", "aten._safe_softmax",
    "aten._scaled_dot_product_cudnn_attention", "aten._scaled_dot_product_cudnn_attention_backward",
    "aten._scaled_dot_product_efficient_attention", "aten._scaled_dot_product_efficient_attention_backward",
    "aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_flash_attention_backward", "aten._softmax",
    "aten._softmax_backward_data", "aten._to_copy", "aten._unsafe_view", "aten.abs", "aten.abs_", "aten.add",
    "aten.add_", "aten.addmm", "aten.addmm_",
    "aten.alias", "aten.as_strided", "aten.all", "aten.amax", "aten.any", "aten.arange", "aten.argmax",
    "aten.baddbmm", "aten.bitwise_and", "aten.bitwise_not", "aten.bitwise_or", "aten.bmm", "aten.cat", "aten.ceil",
    "aten.clamp", "aten.clamp_", "aten.clone", "aten.constant_pad_nd", "aten.copy_", "aten.cos", "aten.cumsum",
    "aten.detach", "aten.div", "aten.div_", "aten.embedding", "aten.empty", "aten.empty_like", "aten.eq", "aten.erf",
    "aten.exp", "aten.exp_", "aten.expand", "aten.fill_", "aten.floor", "aten.floor_divide", "aten.full",
    "aten.full_like", "aten.gather", "aten.ge", "aten.gelu", "aten.gelu_backward", "aten.gt", "aten.histc",
    "aten.index", "aten.index_copy_", "aten.index_put", "aten.index_put_", "aten.index_select", "aten.le", "aten.le_",
    "aten.leaky_relu", "aten.leaky_relu_backward", "aten.lift_fresh", "aten.linalg_vector_norm", "aten.linear",
    "aten.log", "aten.log1p", "aten.logical_and", "aten.logical_and_", "aten.logical_not", "aten.logical_or",
    "aten.lt", "aten.masked_fill", "aten.masked_fill_", "aten.masked_scatter", "aten.max", "aten.maximum",
    "aten.mean", "aten.min", "aten.minimum", "aten.mm", "aten.mul", "aten.mul_", "aten.native_dropout",
    "aten.native_dropout_backward", "aten.native_layer_norm", "aten.native_layer_norm_backward", "aten.ne",
    "aten.neg", "aten.neg_", "aten.new_empty", "aten.new_empty_strided", "aten.new_ones", "aten.new_zeros",
    "aten.nll_loss_backward", "aten.nll_loss_forward", "aten.normal_", "aten.ones", "aten.ones_like", "aten.permute",
    "aten.pow", "aten.pow_", "aten.prod", "aten.promote_types", "aten.rand", "aten.reciprocal", "aten.relu",
    "aten.remainder", "aten.repeat", "aten.round", "aten.rsqrt", "aten.rsqrt_", "aten.rsub", "aten.scalar_tensor",
    "aten.scatter", "aten.scatter_", "aten.scatter_add", "aten.scatter_add_", "aten.select", "aten.select_backward",
    "aten.set_", "aten.sigmoid", "aten.sigmoid_", "aten.sigmoid_backward", "aten.sign", "aten.silu", "aten.silu_",
    "aten.silu_backward", "aten.sin", "aten.slice", "aten.slice_backward", "aten.softplus", "aten.softplus_backward",
    "aten.sort", "aten.split", "aten.split_with_sizes", "aten.sqrt", "aten.square", "aten.squeeze", "aten.stack",
    "aten.sub", "aten.sub_", "aten.sum", "aten.t", "aten.tanh", "aten.tanh_", "aten.tanh_backward",
    "aten.threshold_backward", "aten.topk", "aten.transpose", "aten.tril", "aten.triu", "aten.unbind", "aten.unfold",
    "aten.uniform_", "aten.unsqueeze", "aten.var", "aten.var_mean", "aten.view", "aten.where", "aten.zero_",
    "aten.zeros", "aten.zeros_like", "bitsandbytes.dequantize_4bit", "bitsandbytes.dequantize_blockwise",
    "bitsandbytes.gemm_4bit", "bitsandbytes.optimizer_update_32bit", "bitsandbytes.optimizer_update_8bit_blockwise",
    "bitsandbytes.quantize_4bit", "bitsandbytes.quantize_blockwise", "prim.device",
    "profiler._record_function_enter_new", "profiler._record_function_exit",
})
# fmt: on
