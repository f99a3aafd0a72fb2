"""The fused loss inside real architectures, the optimizer on a CPU, the training arguments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from vramplan.core.types import OPTIMIZERS, RunSpec, Schedule  # noqa: E402
from vramplan.errors import InputError  # noqa: E402
from vramplan.train.fused_loss import head_of  # noqa: E402
from vramplan.train.progress import Progress  # noqa: E402
from vramplan.train.trainer import fused_loss, training_arguments, usable_optimizer  # noqa: E402

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What each architecture does with its logits or positions that is not Llama's.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 8},
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": {},
    "Gemma2ForCausalLM": {"final_logit_softcapping": 0.5, "sliding_window": 8},
    "GraniteForCausalLM": {"logits_scaling": 8.0},
    "CohereForCausalLM": {"logit_scale": 0.0625},
    "Phi3ForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "GPTNeoXForCausalLM": {},
    "PhiForCausalLM": {},  # its lm_head has a bias
    "StableLmForCausalLM": {},
}


def padded_batch() -> dict[str, Any]:
    torch.manual_seed(1)
    ids = torch.randint(3, 128, (3, 24))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row, length in enumerate((24, 17, 9)):
        ids[row, length:], mask[row, length:], labels[row, length:] = 0, 0, -100
    labels[0, :10] = -100  # a prompt
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_loss_is_the_models_own(name: str) -> None:
    """Value and gradient at the embeddings, on a padded batch of which the fused path does not see the mask."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**SMALL, **ARCHITECTURES[name]})).float().eval()
    with torch.no_grad():  # larger logits, so that scaling and capping show
        model.get_output_embeddings().weight.normal_(0, 1)
    inputs = padded_batch()
    first = next(p for n, p in model.named_parameters() if "layers.0" in n and p.dim() == 2)
    for p in model.parameters():
        p.requires_grad_(p is first)

    own = model(**inputs).loss
    (expected,) = torch.autograd.grad(own, first)
    loss = fused_loss(model, head_of(model), inputs, None)
    (gradient,) = torch.autograd.grad(loss, first)
    torch.testing.assert_close(loss, own.detach(), check_dtype=False)
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_on_a_cpu(name: str, tmp_path: Path) -> None:
    chosen = usable_optimizer(name, CPU, Progress(tmp_path / "p"))
    warned = (tmp_path / "p").exists()
    assert warned == (chosen != name)
    args = transformers.TrainingArguments(output_dir=str(tmp_path), optim=chosen, use_cpu=True, report_to="none")
    cls, keywords = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    parameter = torch.nn.Parameter(torch.ones(8192))
    parameter.grad = torch.ones_like(parameter)
    cls([parameter], **keywords).step()
    assert (parameter < 1).all()


def test_an_optimizer_that_fails_is_replaced_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(bitsandbytes.optim.AdamW, "update_step", refuse)
    assert usable_optimizer("adamw_8bit", CPU, Progress(tmp_path / "p")) == "adamw_torch"
    assert "no kernel" in (tmp_path / "p").read_text()


def test_arguments_say_what_the_run_says(tmp_path: Path) -> None:
    run = RunSpec(
        model="m",
        micro_batch_size=3,
        accumulation=5,
        schedule=Schedule(max_steps=7, learning_rate=1e-3, lr_scheduler_type="linear", weight_decay=0.1, seed=9),
    )
    args = training_arguments(run, tmp_path, CPU, "adamw_8bit")
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.max_steps) == (3, 5, 7)
    assert (args.learning_rate, args.lr_scheduler_type, args.weight_decay, args.seed) == (1e-3, "linear", 0.1, 9)
    assert (args.optim, args.bf16, args.use_cpu, args.report_to) == ("adamw_8bit", True, True, [])
    epochs = training_arguments(replace(run, schedule=Schedule(num_train_epochs=2.5)), tmp_path, CPU, "sgd")
    assert (epochs.max_steps, epochs.num_train_epochs) == (-1, 2.5)


def test_a_schedule_transformers_does_not_know_is_bad_input(tmp_path: Path) -> None:
    run = RunSpec(model="m", schedule=Schedule(lr_scheduler_type="zigzag"))
    with pytest.raises(InputError, match="zigzag"):
        training_arguments(run, tmp_path, CPU, "sgd")
