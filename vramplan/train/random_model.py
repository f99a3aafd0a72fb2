"""A model of the right shapes without its weights: for measuring memory and speed on a card, and for tests."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast
from transformers.quantizers import AutoHfQuantizer

from vramplan.core.types import RunSpec
from vramplan.errors import InputError
from vramplan.train.outcome import first_line
from vramplan.train.varlen import implementation

STANDARD_DEVIATION = 0.02  # initializer_range of most configs


def random_model(
    run: RunSpec,
    folder: Path,
    quantization: BitsAndBytesConfig,
    device: torch.device,
    filling: AbstractContextManager[None] | None = None,
) -> Any:
    """The model of `folder`/config.json, quantised layer by layer on the device: no full bf16 copy ever exists.

    The same modules are quantised as by `from_pretrained`: transformers' own quantizer replaces them. Parameters get
    their values within `filling`.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=run.trust_remote_code)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=torch.bfloat16,
                attn_implementation=implementation(run),
                trust_remote_code=run.trust_remote_code,
            )
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise InputError(f"no model can be built from {folder / 'config.json'}: {first_line(error)}") from error
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=torch.bfloat16, device_map={"": device})
    generator = torch.Generator(device).manual_seed(run.schedule.seed)
    tied = model.get_output_embeddings() if model.config.get_text_config().tie_word_embeddings else None
    with filling or nullcontext():
        for module in model.modules():
            if module is not tied:  # `tie_weights` gives it the embedding
                _fill(module, quantization, device, generator)
    model.tie_weights()
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    model.name_or_path = model.config.name_or_path = str(folder)
    model.eval()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the blocks of all those temporaries
    return model


def _fill(
    module: nn.Module, quantization: BitsAndBytesConfig, device: torch.device, generator: torch.Generator
) -> None:
    """Replace the module's own meta parameters by random ones on the device, 4-bit where it is a Linear4bit."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.device.type != "meta":
            module.register_parameter(name, nn.Parameter(parameter.to(device), requires_grad=False))
            continue
        packs = isinstance(module, bnb.nn.Linear4bit) and name == "weight"
        value = _random(name, parameter, device, generator, packs)
        if packs:
            packed = bnb.nn.Params4bit(
                value,
                requires_grad=False,
                compress_statistics=quantization.bnb_4bit_use_double_quant,
                quant_type=quantization.bnb_4bit_quant_type,
                quant_storage=quantization.bnb_4bit_quant_storage,
                module=module,
            )
            module.weight = packed.to(device)
        else:
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for name, buffer in list(module.named_buffers(recurse=False)):
        module._buffers[name] = buffer.to(device)


def _random(name: str, like: Tensor, device: torch.device, generator: torch.Generator, packs: bool) -> Tensor:
    shape, dtype = like.shape, torch.bfloat16
    if like.dim() < 2:  # norms and biases
        return torch.full(shape, 0.0 if "bias" in name else 1.0, dtype=dtype, device=device)
    if not packs:  # embeddings and head stay as they are: a copy beside them could be the highest point of a small run
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, STANDARD_DEVIATION, generator=generator)
    # Two temporaries rather than one filled in place: with these sizes freed, the packed weights of a native allocator
    # find blocks that it can split, and no unused tails count as allocated.
    return torch.randn(shape, dtype=dtype, device=device, generator=generator) * STANDARD_DEVIATION


def byte_tokenizer(folder: Path) -> Any:
    """Bytes as tokens 0 to 255, then <|end|> and <|pad|>: text becomes input without a tokenizer's vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = json.loads((folder / "config.json").read_text()).get("vocab_size", 0)
    if isinstance(size, int) and 0 < size < len(alphabet) + 2:
        raise InputError(f"a vocabulary of {size} is too small for bytes as tokens", f"{len(alphabet) + 2} are needed")
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
