"""One fine-tuning run from top to bottom: tokenizer, data, 4-bit model, LoRA, training, adapter, measurement."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import transformers

from vramplan.core.types import Ledger, RunSpec
from vramplan.errors import InputError, NotFinite, OutOfMemory
from vramplan.sources import records
from vramplan.train import data
from vramplan.train.audit import audit, read_prediction
from vramplan.train.audit_causes import Loaded, float32_names
from vramplan.train.card import Card as ModelCard
from vramplan.train.evaluation import AlreadyDone, EarlyStopping
from vramplan.train.fast.install import Fused
from vramplan.train.fused_loss import Head, head_of
from vramplan.train.guard import Guard
from vramplan.train.health import Health
from vramplan.train.load import load_model, load_tokenizer, resolve
from vramplan.train.lora import add_lora, fuse, prepare
from vramplan.train.meter import Meter, recorded
from vramplan.train.outcome import Interrupted, StopSignal
from vramplan.train.packing_check import check_packing
from vramplan.train.pressure import Card
from vramplan.train.progress import Progress
from vramplan.train.reading import read_data
from vramplan.train.rehearsal import Rehearsal
from vramplan.train.relief import CheckpointRelief, FusedRelief, Relief
from vramplan.train.reporting import usable_reporters
from vramplan.train.saving import clean, newest_checkpoint, save_adapter
from vramplan.train.schedule import check_held_out, check_schedule, seed_everything
from vramplan.train.trainer import QloraTrainer, Reporter, training_arguments, usable_optimizer
from vramplan.train.varlen import refuse_unpackable

SAMPLE_TOKENS = 40
CHECK_TOKENS = 16  # length of the batch on which the fused loss is compared with the model's own


def finetune(run: RunSpec, run_dir: Path, *, resume: bool, progress: Progress, stop: StopSignal) -> str:
    """Runs the whole and returns the last line for the user. Every ending leaves a Measurement, failures raise."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    meter = Meter(device)

    def work() -> str:
        return _finetune(run, run_dir, meter, resume=resume, progress=progress, stop=stop)

    return recorded(meter, run_dir, work)


def _finetune(run: RunSpec, run_dir: Path, meter: Meter, *, resume: bool, progress: Progress, stop: StopSignal) -> str:
    refuse_what_is_not_built(run)
    check_schedule(run)
    run = _with_reports(run, run_dir)
    transformers.utils.logging.disable_progress_bar()
    seed_everything(run.schedule)
    checkpoints = run_dir / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    for folder in (run_dir, checkpoints):
        clean(folder)
    checkpoint = newest_checkpoint(checkpoints, progress.warning)
    if checkpoint is not None and not resume:
        raise InputError(f"{run_dir} already holds {checkpoint.name}", "add --resume, or choose another folder")
    if checkpoint is None and resume:
        progress.warning("there is no checkpoint to resume from: training starts at step 0")

    # The tokenizer and the data come first: they fail in seconds, the model loads for minutes.
    source = resolve(run, run_dir)
    tokenizer = load_tokenizer(run, source)
    splits = read_data(run, run_dir, tokenizer, progress, resume=resume)
    check_held_out(run.schedule, splits.eval)

    model, fused = build_model(run, source, meter, progress, read_prediction(run_dir))
    _check_vocabulary(model, tokenizer, splits)
    head = head_of(model.get_base_model(), fused is not None) if run.levers.loss == "fused" else None
    optimizer = usable_optimizer(run.levers.optimizer, meter.device, progress)
    trainer = QloraTrainer(
        head=head,
        fused=fused,
        meter=meter,
        model=model,
        args=training_arguments(run, run_dir, meter.device, optimizer),
        train_dataset=splits.train,
        eval_dataset=splits.eval,
        data_collator=data.Collator(tokenizer.pad_token_id, run.seq_len, run.packing),
    )
    trainer.load_best = run.schedule.load_best_model_at_end
    reporter = Reporter(trainer, progress, stop, splits.examples)
    trainer.add_callback(reporter)
    patience = EarlyStopping(run.schedule) if run.schedule.early_stopping_patience is not None else None
    if patience is not None:
        trainer.add_callback(patience)
    watch_over(trainer, run, splits, progress)
    if checkpoint is not None and trainer.guard is not None:
        trainer.guard.load(checkpoint)
    if head is not None:
        check_fused_loss(trainer, head, splits.train[0]["input_ids"])
    if run.packing:
        check_packing(trainer, splits.train[0]["input_ids"])

    if splits.eval is not None and checkpoint is None:
        progress.phase("eval", "held-out loss before training")
        meter.eval_loss_before = _finite(trainer.evaluate()["eval_loss"])

    progress.phase("train", f"optimizer {optimizer}")
    _train(trainer, checkpoint, stop)

    if stop.asked and trainer.state.global_step == 0:
        raise Interrupted("stopped before the first step; nothing to save")
    if patience is not None and patience.is_over():
        progress.phase("train", f"stopped early at step {trainer.state.global_step}: the held-out loss does not fall")
    best_step = None if stop.asked else _back_to_the_best(trainer, progress)
    adapter, card = run_dir / "adapter", ModelCard(run, splits, run_dir, best_step)
    progress.phase("save", f"writing {adapter}")
    so_far = meter.measurement("interrupted" if stop.asked else "finished")
    save_adapter(model, tokenizer, source, card.text(so_far), adapter)
    if stop.asked:
        raise Interrupted(f"stopped after step {trainer.state.global_step}; checkpoint and adapter are saved")

    if splits.eval is not None:
        meter.eval_loss_after = _loss_after(trainer, reporter, best_step, progress)
        records.write_text(adapter / "README.md", card.text(meter.measurement("finished")))
    prompt = os.environ.get("VRAMPLAN_SAMPLE_PROMPT")
    if prompt:
        progress("sample", text=sample(model, tokenizer, prompt, SAMPLE_TOKENS, chat=splits.chat))
    return f"{trainer.state.global_step} steps, adapter in {run_dir / 'adapter'}"


def _with_reports(run: RunSpec, run_dir: Path) -> RunSpec:
    """Who is reported to, told apart from "all", under the run folder's name if the run has none."""
    s = run.schedule
    reporters = usable_reporters(s, run_dir)
    return replace(run, schedule=replace(s, report_to=reporters, run_name=s.run_name or run_dir.name))


def build_model(
    run: RunSpec, source: str, meter: Meter, progress: Progress, prediction: Ledger | None = None
) -> tuple[Any, Fused | None]:
    """The 4-bit model and its fused layers: prepared and wrapped by PEFT, measured after each, then audited."""
    progress.phase("load", f"loading {run.model} in 4 bits on {meter.device.type}")
    model = load_model(run, source, meter.device)
    if run.packing:
        refuse_unpackable(model.config)
    float32 = float32_names(model)
    meter.phase("loaded")

    progress.phase("prepare", f"upcast {run.levers.upcast}, checkpointing {run.levers.checkpointing}")
    model = prepare(model, run.levers, meter.device, progress.warning)
    meter.phase("prepared")

    progress.phase("lora", f"r={run.lora.r} on {', '.join(run.lora.targets)}")
    transformers.set_seed(run.schedule.seed)  # the adapter's start depends on nothing that was drawn before
    model = add_lora(model, run.lora)
    meter.trainable_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fused = fuse(model, run.levers, meter.device, progress.warning)
    meter.phase("with_lora")
    progress.report(audit(Loaded(model, run, meter.device, prediction, float32)))
    return model, fused


def watch_over(trainer: QloraTrainer, run: RunSpec, splits: data.Splits, progress: Progress) -> None:
    """Give the trainer what makes it survive: guard, health, and the rehearsal unless the run leaves it out."""
    model, meter, fused = trainer.model, trainer.meter, trainer.fused
    if fused is None:
        relief: Relief = CheckpointRelief(model.get_base_model(), run.levers, meter.device)
    else:
        relief = FusedRelief(fused, run.levers, meter.device)

    def forget() -> None:
        if fused is not None:
            fused.forget()

    trainer.guard = Guard(
        rows=run.micro_batch_size,
        accumulation=run.accumulation,
        width=splits.longest,
        parameters=lambda: trainer.trained,
        card=Card(meter.device, forget),
        relief=relief,
        report=progress.report,
        meter=meter,
    )

    def redo(inputs: dict[str, Any]) -> Any:
        with torch.no_grad(), trainer.accelerator.autocast():
            return trainer.compute_loss(model, inputs)

    trainer.health = Health(run, model, redo, meter, progress.report)
    if run.schedule.rehearsal:
        trainer.add_callback(Rehearsal(trainer, trainer.guard, progress.report, splits.eval))


def refuse_what_is_not_built(run: RunSpec) -> None:
    if run.levers.resident_layers is not None:
        raise InputError("streaming layers from the host is not built yet", "leave resident_layers out")


def _check_vocabulary(model: Any, tokenizer: Any, splits: data.Splits) -> None:
    """A token the embedding has no row for would end as an assertion inside a kernel. Looked for only if possible."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= rows:
        return
    if any(max(split.store.ids) >= rows for split in (splits.train, splits.eval) if split is not None):
        raise InputError(f"the tokenizer makes tokens of {len(tokenizer)}, the model knows only {rows}")


def check_fused_loss(trainer: QloraTrainer, head: Head, tokens: list[int]) -> None:
    """Compare fused loss and layers with the model's own on a small padded batch; InputError if they differ.

    The head's formula is read from the config, and what a layer's pieces mean was found by trying them: an architecture
    that does something else shows here.
    """
    long, short = list(tokens)[:CHECK_TOKENS], list(tokens)[: max(CHECK_TOKENS // 2, 2)]
    rows = [{"input_ids": t, "labels": t, "attention_mask": [1] * len(t)} for t in (long, short)]
    collator = data.Collator(trainer.data_collator.pad_token_id, packed=trainer.data_collator.packed)
    inputs = trainer._prepare_inputs(collator(rows))
    trainer.model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        with trainer.fused.stock() if trainer.fused is not None else nullcontext():
            own = float(trainer.model(**inputs).loss)
        fused = float(trainer.fused_loss(inputs, None))
    if not abs(own - fused) <= 0.01 + 0.01 * abs(own):
        name = type(trainer.model.get_base_model()).__name__
        raise InputError(
            f"the fused loss does not reproduce {name}'s own ({fused:.4f} against {own:.4f})",
            "train with --loss full --kernels stock",
        )


def _back_to_the_best(trainer: QloraTrainer, progress: Progress) -> int | None:
    """Load the adapter with the lowest held-out loss, if that is asked for; its step, or None if it is the last."""
    step = trainer.load_best_adapter() if trainer.load_best else None
    if step is not None:
        loss = trainer.state.best_metric
        progress.phase("train", f"back to the adapter of step {step}, whose held-out loss was {loss:.4f}")
    return step


def _loss_after(trainer: QloraTrainer, reporter: Reporter, best_step: int | None, progress: Progress) -> float | None:
    """The held-out loss of the adapter that was saved; not measured twice where the last step was evaluated."""
    step = trainer.state.global_step
    if best_step is None and trainer.evaluated is not None and trainer.evaluated[0] == step:
        return _finite(trainer.evaluated[1])
    progress.phase("eval", "held-out loss after training")
    loss = trainer.evaluation_loss(trainer.eval_dataset)  # not `evaluate`: who is reported to has been told the end
    reporter.evaluated(step if best_step is None else best_step, loss)
    return _finite(loss)


def _finite(loss: float) -> float | None:
    return loss if isfinite(loss) else None


def _train(trainer: QloraTrainer, checkpoint: Path | None, stop: StopSignal) -> None:
    stop.training = True
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except AlreadyDone:
        pass
    except (OutOfMemory, NotFinite) as error:
        saved = newest_checkpoint(Path(trainer.args.output_dir), lambda _: None)
        kept = f"{saved.name} is the last checkpoint" if saved is not None else "no checkpoint had been saved"
        raise type(error)(f"{error.message}; {kept}", error.hint) from error
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
