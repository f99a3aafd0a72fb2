"""One fine-tuning run from top to bottom: tokenizer, data, 4-bit model, LoRA, training, adapter, measurement."""

from __future__ import annotations

import os
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import transformers

from vramplan.core.types import RunSpec
from vramplan.errors import InputError
from vramplan.train import data
from vramplan.train.fsdp import Sharding
from vramplan.train.fused_loss import Head, head_of
from vramplan.train.load import load_model, load_tokenizer, resolve
from vramplan.train.lora import add_lora, prepare
from vramplan.train.meter import Meter, recorded
from vramplan.train.outcome import Interrupted, StopSignal
from vramplan.train.parallel import World, join
from vramplan.train.place import Place
from vramplan.train.progress import Progress
from vramplan.train.ranks import RankTrainer
from vramplan.train.saving import clean, newest_checkpoint, save_adapter
from vramplan.train.trainer import AlreadyDone, QloraTrainer, Reporter, training_arguments, usable_optimizer

SAMPLE_TOKENS = 40
CHECK_TOKENS = 16  # length of the batch on which the fused loss is compared with the model's own


def finetune(
    run: RunSpec, run_dir: Path, *, resume: bool, progress: Progress, stop: StopSignal, place: Place | None = None
) -> str:
    """Runs the whole and returns the last line for the user. Every ending leaves a Measurement, failures raise.

    `place` is this process among those of the run, all of which do the same.
    """
    place = place or Place()
    world = join(run, place, stop)
    meter = Meter(world.device)

    def work() -> str:
        message = _finetune(run, run_dir, meter, world, resume=resume, progress=progress, stop=stop)
        world.leave()
        return message

    return recorded(meter, place.file(run_dir, "measurement.jsonl"), work)


def _finetune(
    run: RunSpec, run_dir: Path, meter: Meter, world: World, *, resume: bool, progress: Progress, stop: StopSignal
) -> str:
    refuse_what_is_not_built(run)
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(run.schedule.seed)
    checkpoint = world.from_main(partial(_checkpoint, run_dir, resume, progress))

    # The tokenizer and the data come first: they fail in seconds, the model loads for minutes.
    progress.phase("data", f"reading {run.data.path if run.data else 'no data'}")
    source = world.from_main(partial(resolve, run, run_dir))
    tokenizer = load_tokenizer(run, source)
    splits = data.build(run, tokenizer, report=progress.report)

    model = build_model(run, source, meter, progress, world)
    _check_vocabulary(model, tokenizer, splits)
    head = head_of(model.get_base_model()) if run.levers.loss == "fused" else None
    optimizer = usable_optimizer(run.levers.optimizer, meter.device, progress)
    trainer_of = QloraTrainer if world.size == 1 else partial(RankTrainer, world=world)
    trainer = trainer_of(
        head=head,
        meter=meter,
        model=model,
        args=training_arguments(run, run_dir, meter.device, optimizer),
        train_dataset=splits.train,
        data_collator=data.Collator(tokenizer.pad_token_id, run.seq_len),
    )
    trainer.add_callback(Reporter(trainer, progress, world.agreed, splits.examples))
    if head is not None:
        check_fused_loss(trainer, head, splits.train[0]["input_ids"])

    if splits.eval is not None and checkpoint is None:
        progress.phase("eval", "held-out loss before training")
        meter.eval_loss_before = _evaluate(trainer, splits.eval, progress)

    progress.phase("train", f"optimizer {optimizer}")
    if world.size > 1:
        transformers.set_seed(run.schedule.seed + world.rank)  # each rank's dropout is its own
    _train(trainer, checkpoint, stop)
    meter.ranks = world.gather(meter.measurement("finished"))
    stopped = world.agreed.asked

    if stopped and trainer.state.global_step == 0:
        raise Interrupted("stopped before the first step; nothing to save")
    progress.phase("save", f"writing {run_dir / 'adapter'}")
    world.from_main(partial(save_adapter, model, tokenizer, source, run_dir / "adapter"))
    if stopped:
        raise Interrupted(f"stopped after step {trainer.state.global_step}; checkpoint and adapter are saved")

    if splits.eval is not None:
        progress.phase("eval", "held-out loss after training")
        meter.eval_loss_after = _evaluate(trainer, splits.eval, progress)
    prompt = os.environ.get("VRAMPLAN_SAMPLE_PROMPT")
    if prompt:
        progress("sample", text=sample(model, tokenizer, prompt, SAMPLE_TOKENS, chat=splits.kind == "messages"))
    return f"{trainer.state.global_step} steps, adapter in {run_dir / 'adapter'}"


def _checkpoint(run_dir: Path, resume: bool, progress: Progress) -> Path | None:
    """The checkpoint to go on from, in a folder tidied up. InputError if there is one and nobody asked for it."""
    checkpoints = run_dir / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    for folder in (run_dir, checkpoints):
        clean(folder)
    checkpoint = newest_checkpoint(checkpoints, progress.warning)
    if checkpoint is not None and not resume:
        raise InputError(f"{run_dir} already holds {checkpoint.name}", "add --resume, or choose another folder")
    if checkpoint is None and resume:
        progress.warning("there is no checkpoint to resume from: training starts at step 0")
    return checkpoint


def build_model(run: RunSpec, source: str, meter: Meter, progress: Progress, world: World | None = None) -> Any:
    """The 4-bit model, prepared and wrapped by PEFT, measured after each of the three; shared out if the world is."""
    world = world or World()
    sharding = Sharding(world) if world.sharded else None
    progress.phase("load", f"loading {run.model} in 4 bits on {meter.device.type}")
    model = load_model(run, source, meter.device, progress.warning, sharding)
    meter.phase("loaded")

    progress.phase("prepare", f"upcast {run.levers.upcast}, checkpointing {run.levers.checkpointing}")
    model = prepare(model, run.levers, meter.device, progress.warning)
    meter.phase("prepared")

    progress.phase("lora", f"r={run.lora.r} on {', '.join(run.lora.targets)}")
    model = add_lora(model, run.lora)
    world.same(p for p in model.parameters() if p.requires_grad)
    if sharding is not None:
        sharding.apply(model)
    meter.trainable_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    meter.phase("with_lora")
    return model


def refuse_what_is_not_built(run: RunSpec) -> None:
    if run.levers.resident_layers is not None:
        raise InputError("streaming layers from the host is not built yet", "leave resident_layers out")


def _check_vocabulary(model: Any, tokenizer: Any, splits: Any) -> None:
    """A token the embedding has no row for would end as an assertion inside a kernel. Looked for only if possible."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= rows:
        return
    for split in (splits.train, splits.eval):
        for index in range(len(split) if split is not None else 0):
            if max(split[index]["input_ids"]) >= rows:
                raise InputError(f"the tokenizer makes tokens of {len(tokenizer)}, the model knows only {rows}")


def check_fused_loss(trainer: QloraTrainer, head: Head, tokens: list[int]) -> None:
    """Compare the fused loss with the model's own on a small padded batch; InputError if they differ.

    The head's formula is read from the config; an architecture that does something else with its logits shows here.
    """
    long, short = list(tokens)[:CHECK_TOKENS], list(tokens)[: max(CHECK_TOKENS // 2, 2)]
    rows = [{"input_ids": t, "labels": t, "attention_mask": [1] * len(t)} for t in (long, short)]
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    trainer.model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        own = float(trainer.model(**inputs).loss)
        fused = float(trainer.fused_loss(inputs, None))
    if not abs(own - fused) <= 0.01 + 0.01 * abs(own):
        name = type(trainer.model.get_base_model()).__name__
        raise InputError(
            f"the fused loss does not reproduce {name}'s own ({fused:.4f} against {own:.4f})", "train with --loss full"
        )


def _evaluate(trainer: QloraTrainer, dataset: Any, progress: Progress) -> float | None:
    loss = trainer.evaluation_loss(dataset)
    progress("eval", step=trainer.state.global_step, loss=loss)
    if isfinite(loss):
        return loss
    progress.warning(f"the held-out loss is {loss}")
    return None


def _train(trainer: QloraTrainer, checkpoint: Path | None, stop: StopSignal) -> None:
    stop.training = True
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except AlreadyDone:
        pass
    finally:
        stop.training = False


def sample(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, *, chat: bool) -> str:
    """Greedy: with `chat` the answer to the prompt as a user's message, else the prompt and how it goes on."""
    if chat:
        message = [{"role": "user", "content": prompt}]
        template = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        inputs = tokenizer.apply_chat_template(message, **template)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {k: v.to(model.device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    how = {"max_new_tokens": max_new_tokens, "do_sample": False, "use_cache": True}
    model.eval()
    with torch.no_grad():
        output = model.generate(**inputs, **how, pad_token_id=tokenizer.pad_token_id)[0]
    shown = output[inputs["input_ids"].shape[1] :] if chat else output
    return str(tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False))
