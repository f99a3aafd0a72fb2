"""What 4 bits did to the base's weights: for a merge onto the weights that the adapter was trained on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from vramplan.errors import InputError
from vramplan.train.adapter import Locator
from vramplan.train.outcome import first_line

BLOCK = 64  # weights that share a scale: bitsandbytes' own choice for Linear4bit


def nf4_rounding(base: Path, locate: Locator, double_quant: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """Tensor of the base -> its rounding, for every weight that loading in 4 bits would quantise.

    transformers' own quantizer says which, on a model without memory. InputError if it cannot be built.
    """
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    try:
        config = AutoConfig.from_pretrained(base)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model=model, dtype=torch.bfloat16, device_map={"": "cpu"})
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise InputError(
            f"no model can be built from {base / 'config.json'}: {first_line(error)}", "--onto original needs none"
        ) from error
    linears = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    return {
        locate(f"{name}.weight"): partial(rounded, double_quant=double_quant, in_out=module.source_cls is Conv1D)
        for name, module in linears.items()
    }


def rounded(weight: Tensor, double_quant: bool, in_out: bool = False) -> Tensor:
    """A weight after NF4 and back, in bf16, as the 4-bit layer computes with it. `in_out`: it is kept transposed."""
    values = (weight.T if in_out else weight).to(torch.bfloat16).contiguous()
    packed, state = bnb.functional.quantize_4bit(
        values, blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4"
    )
    back: Tensor = bnb.functional.dequantize_4bit(packed, state)
    return back.T if in_out else back
