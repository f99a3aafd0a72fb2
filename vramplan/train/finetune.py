"""One fine-tuning run from top to bottom: tokenizer, data, 4-bit model, LoRA, training, adapter, measurement."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import transformers

from vramplan.core.types import Measurement, RunSpec
from vramplan.errors import InputError, NotFinite, OutOfMemory
from vramplan.sources import records
from vramplan.train import data
from vramplan.train.audit import read_prediction
from vramplan.train.building import build_model, refuse_what_is_not_built, watch_over
from vramplan.train.card import Card
from vramplan.train.checks import check_layers, check_vocabulary
from vramplan.train.evaluation import AlreadyDone, EarlyStopping
from vramplan.train.fast.install import Fused, uninstalled
from vramplan.train.fused_loss import head_of
from vramplan.train.load import load_tokenizer, resolve
from vramplan.train.meter import Meter, recorded
from vramplan.train.outcome import Interrupted, StopSignal
from vramplan.train.parallel import World, join
from vramplan.train.place import Place
from vramplan.train.progress import Progress
from vramplan.train.ranks import RankTrainer
from vramplan.train.reading import read_data
from vramplan.train.reporter import Reporter
from vramplan.train.reporting import usable_reporters
from vramplan.train.saving import clean, newest_checkpoint, save_adapter
from vramplan.train.schedule import check_held_out, check_schedule, seed_everything
from vramplan.train.trainer import QloraTrainer, training_arguments, usable_optimizer

SAMPLE_TOKENS = 40


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
    check_schedule(run)
    run = _with_reports(run, run_dir)
    transformers.utils.logging.disable_progress_bar()
    seed_everything(run.schedule)
    checkpoint = world.from_main(partial(_checkpoint, run_dir, resume, progress))

    # The tokenizer and the data come first: they fail in seconds, the model loads for minutes.
    source = world.from_main(partial(resolve, run, run_dir))
    tokenizer = load_tokenizer(run, source)
    read = partial(read_data, run, run_dir, tokenizer, progress)
    splits = world.main_first(partial(read, resume=resume), partial(read, resume=True))
    check_held_out(run.schedule, splits.eval)

    model, fused = build_model(run, source, meter, progress, read_prediction(run_dir), world)
    check_vocabulary(model, tokenizer, splits)
    with uninstalled(fused):
        trainer = _trainer(run, run_dir, model, fused, splits, tokenizer.pad_token_id, meter, progress, world)
        reporter = Reporter(trainer, progress, world.agreed, splits.examples)
        trainer.add_callback(reporter)
        watch_over(trainer, run, splits, progress, world)
        if checkpoint is not None and trainer.guard is not None:
            trainer.guard.load(checkpoint)
        check_layers(trainer, run, splits.train[0]["input_ids"])

        if splits.eval is not None and checkpoint is None:
            progress.phase("eval", "held-out loss before training")
            meter.eval_loss_before = _finite(trainer.evaluate()["eval_loss"])

        progress.phase("train", f"optimizer {trainer.args.optim.value}")
        if world.size > 1:
            transformers.set_seed(run.schedule.seed + world.rank)  # each rank's dropout is its own
        _train(trainer, checkpoint, stop, progress)
        meter.ranks = world.gather(meter.measurement("finished"))
        step = trainer.state.global_step
        if world.agreed.asked and step == 0:
            raise Interrupted("stopped before the first step; nothing to save")

        best_step = None if world.agreed.asked else world.from_main(partial(_back_to_the_best, trainer, progress))
        if best_step is not None:
            world.same(trainer.trained)
        card = Card(run, splits, run_dir, best_step)
        ended = "interrupted" if world.agreed.asked else "finished"
        world.from_main(partial(_save, run_dir, model, tokenizer, source, card, meter.measurement(ended), progress))
        if world.agreed.asked:
            raise Interrupted(f"stopped after step {step}; checkpoint and adapter are saved")

        if splits.eval is not None:
            meter.eval_loss_after = _loss_after(trainer, reporter, best_step, progress)
            text = card.text(meter.measurement("finished"))
            world.from_main(partial(records.write_text, run_dir / "adapter" / "README.md", text))
        prompt = os.environ.get("VRAMPLAN_SAMPLE_PROMPT")
        if prompt:
            progress("sample", text=sample(model, tokenizer, prompt, SAMPLE_TOKENS, chat=splits.chat))
    return f"{step} steps, adapter in {run_dir / 'adapter'}"


def _trainer(
    run: RunSpec,
    run_dir: Path,
    model: Any,
    fused: Fused | None,
    splits: data.Splits,
    pad_token_id: int,
    meter: Meter,
    progress: Progress,
    world: World,
) -> QloraTrainer:
    """The trainer of this process, and whether it stops early."""
    trainer_of = QloraTrainer if world.size == 1 else partial(RankTrainer, world=world)
    optimizer = usable_optimizer(run.levers.optimizer, meter.device, progress)
    trainer = trainer_of(
        head=head_of(model.get_base_model(), fused is not None) if run.levers.loss == "fused" else None,
        fused=fused,
        meter=meter,
        model=model,
        args=training_arguments(run, run_dir, meter.device, optimizer),
        train_dataset=splits.train,
        eval_dataset=splits.eval,
        data_collator=data.Collator(pad_token_id, run.seq_len, run.packing),
    )
    trainer.load_best = run.schedule.load_best_model_at_end
    if run.schedule.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(run.schedule))
    return trainer


def _save(
    run_dir: Path, model: Any, tokenizer: Any, source: str, card: Card, so_far: Measurement, progress: Progress
) -> None:
    adapter = run_dir / "adapter"
    progress.phase("save", f"writing {adapter}")
    save_adapter(model, tokenizer, source, card.text(so_far), adapter)


def _with_reports(run: RunSpec, run_dir: Path) -> RunSpec:
    """Who is reported to, told apart from "all", under the run folder's name if the run has none."""
    s = run.schedule
    reporters = usable_reporters(s, run_dir)
    return replace(run, schedule=replace(s, report_to=reporters, run_name=s.run_name or run_dir.name))


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


def _train(trainer: QloraTrainer, checkpoint: Path | None, stop: StopSignal, progress: Progress) -> None:
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
        trainer.graphs = None  # what they hold is of no use to what follows
    patience = next((c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStopping)), None)
    if patience is not None and patience.is_over():
        progress.phase("train", f"stopped early at step {trainer.state.global_step}: the held-out loss does not fall")


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
