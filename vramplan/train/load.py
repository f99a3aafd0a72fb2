"""From a folder, a Hub id or a GGUF file to a 4-bit NF4 model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig

from vramplan.core.types import RunSpec
from vramplan.errors import InputError, MissingExtra, VramplanError
from vramplan.train.fsdp import STORAGE, Sharding
from vramplan.train.outcome import first_line, is_disk_full, is_out_of_memory
from vramplan.train.random_model import byte_tokenizer, random_model
from vramplan.train.saving import whole_folder
from vramplan.train.varlen import implementation


# --------------------------------------------------------------------------------------------------- where it is
def resolve(run: RunSpec, run_dir: Path) -> str:
    """What transformers and plain PEFT can load: an absolute folder, or a Hub id. Unpacks a GGUF file once."""
    name = run.model_path or run.model
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise InputError(f"there is no GGUF file {name}")
        return str(_unpack_gguf(path, run_dir / "model"))
    if path.is_dir():
        return str(path.resolve())
    if path.is_file():
        raise InputError(f"{name} is a file; the model is a folder, a Hub id or a .gguf file")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"there is no model folder {name}")
    return name


def _unpack_gguf(path: Path, folder: Path) -> Path:
    """Dequantise a GGUF file to bf16 safetensors plus tokenizer in `folder`, unless that was done before."""
    if (folder / "config.json").is_file():
        return folder
    try:
        import gguf  # noqa: F401  transformers reads GGUF through it
    except ModuleNotFoundError:
        raise MissingExtra("reading a GGUF file (pip install gguf)") from None
    with clear_errors(str(path)), whole_folder(folder) as temporary:
        place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model = AutoModelForCausalLM.from_pretrained(
            **place,
            dtype=torch.bfloat16,
            device_map={"": "cpu"},
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


# ------------------------------------------------------------------------------------------------- the tokenizer
def load_tokenizer(run: RunSpec, source: str) -> Any:
    """The model's tokenizer, with a padding token. A random model without one gets bytes as tokens."""
    if run.random_weights and not any((Path(source) / n).exists() for n in ("tokenizer.json", "tokenizer_config.json")):
        return byte_tokenizer(Path(source))
    with clear_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=run.trust_remote_code)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError(f"the tokenizer of {source} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# ----------------------------------------------------------------------------------------------------- the model
def load_model(run: RunSpec, source: str, device: torch.device, sharding: Sharding | None = None) -> Any:
    """The model on `device`: linear layers in NF4, everything else in bf16, nothing trainable yet.

    With `sharding` only this rank's part of each matrix stays.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=run.double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.uint8 if sharding is None else STORAGE,
    )
    cutting = sharding.while_loading(tied=_is_tied(run, source)) if sharding is not None else nullcontext()
    if run.random_weights:
        model = random_model(run, Path(source), quantization, device, cutting)
    else:
        with cutting:
            model = _pretrained(run, source, quantization, device)
    if device.type == "cpu":
        _keep_canonical_packing(model)
    return model


def _is_tied(run: RunSpec, source: str) -> bool:
    """Whether the model's head is its input embedding."""
    with clear_errors(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=run.trust_remote_code)
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def _pretrained(run: RunSpec, source: str, quantization: BitsAndBytesConfig, device: torch.device) -> Any:
    with clear_errors(source):
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            quantization_config=quantization,
            dtype=torch.bfloat16,
            attn_implementation=implementation(run),
            device_map={"": device.index or 0 if device.type == "cuda" else "cpu"},
            trust_remote_code=run.trust_remote_code,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random numbers there
        raise InputError(
            f"the weights of {source} lack {len(missing)} tensors, first {missing[0]}",
            "the checkpoint is incomplete, or belongs to another architecture",
        )
    return model


def _keep_canonical_packing(model: nn.Module) -> None:
    """Keep bitsandbytes 0.50 from repacking weights on CPUs with AVX512-BF16.

    It repacks in place at the first forward in eval mode, and the repacked layer has no backward: training after an
    evaluation would fail.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


# -------------------------------------------------------------------------------------------------------- errors
@contextmanager
def clear_errors(source: str) -> Iterator[None]:
    """What the Hub, transformers and safetensors raise, as one sentence."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{source} cannot be loaded: {first_line(error)}") from error
    except Exception as error:
        if is_out_of_memory(error) or is_disk_full(error):
            raise
        raise _explained(source, error) from error


def _explained(source: str, error: Exception) -> VramplanError:
    """Bad input (exit code 2), or a Hub that cannot be reached (exit code 1)."""
    seen: BaseException | None = error
    text = ""
    while seen is not None:  # the Hub's own error is often the cause of a vaguer one
        text += f"{type(seen).__name__} {seen} "
        seen = seen.__cause__ or seen.__context__
    text = text.lower()
    if "gatedrepo" in text or "gated repo" in text:
        return InputError(
            f"{source} is gated: its owner must grant you access",
            f"ask for access at https://huggingface.co/{source}, then set HF_TOKEN or run `hf auth login`",
        )
    if "trust_remote_code" in text:
        return InputError(f"{source} brings its own code", "if you trust it, add --trust-remote-code")
    if Path(source).exists():
        return InputError(f"{source} cannot be loaded: {first_line(error)}")
    if "401" in text or "404" in text or "repositorynotfound" in text:
        return InputError(
            f"there is no model {source} on the Hub, or it is private", "check the name, and HF_TOKEN if it is private"
        )
    if any(word in text for word in ("connect", "offline", "timed out", "timeout", "localentrynotfound", "resolve")):
        return VramplanError(
            f"Hub unreachable: {source} is neither a folder here nor in the cache",
            "check the connection, or pass a folder that holds the model",
        )
    return InputError(f"{source} cannot be loaded: {first_line(error)}")
