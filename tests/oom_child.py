"""What `bench_oom.py` plays in a forked process: a training script as people write it, or a run as vramplan plays it.

The parent has imported everything and touched no card. The child caps itself, plays, and writes what a script would
print, traceback and all, to the job's log, and what it measured to the job's result.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from oom_cases import Job
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from vramplan.train.measure import measure
from vramplan.train.outcome import is_out_of_memory
from vramplan.train.random_model import random_model

OK, OOM, ERROR = 0, 3, 1
SETTINGS = {"native": "expandable_segments:False", "expandable": "expandable_segments:True"}
IGNORED = -100
MEASURED = "measurement.jsonl"
Batch = dict[str, torch.Tensor]


class Silent:
    """Stands in for `vramplan.train.progress.Progress`, and for its stop signal: nobody stops."""

    asked = False

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def __call__(self, *args: Any, **kwargs: Any) -> None: ...


def main(job: Job) -> int:
    """The whole life of the child; its exit code."""
    log = os.open(job.folder / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    code = play(job)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def play(job: Job) -> int:
    """Play it, tell how it ended; a script that fails prints its traceback."""
    begun, row, code = time.perf_counter(), {"ended": "ok"}, OK
    try:
        settle(job)
        row["ready_s"] = round(time.perf_counter() - begun, 2)
        SCRIPTS[job.script](job)
    except BaseException as error:
        code = OOM if is_out_of_memory(error) else ERROR
        row["ended"] = "oom" if code == OOM else "error"
        traceback.print_exc()
    if job.device == "cuda":
        row |= numbers()
    if (job.folder / MEASURED).is_file():  # it resets torch's own peak at each phase
        phases = json.loads((job.folder / MEASURED).read_text().splitlines()[-1])["phases"]
        row["peak_bytes"] = max((phase["peak_bytes"] or 0 for phase in phases), default=0)
    row["seconds"] = round(time.perf_counter() - begun, 2)
    (job.folder / "result.json").write_text(json.dumps(row))
    return code


def settle(job: Job) -> None:
    """Allocator and cap, before anything is on the card."""
    transformers.utils.logging.disable_progress_bar()
    if job.device != "cuda":
        return
    os.environ.pop("PYTORCH_ALLOC_CONF", None)
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = SETTINGS[job.run.levers.allocator]
    with suppress(Exception):  # torch was imported under other settings; what holds in the end is in the row
        torch._C._accelerator_setAllocatorSettings(SETTINGS[job.run.levers.allocator])
    if job.cap_bytes is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(job.cap_bytes / total, 1.0))


def numbers() -> dict[str, Any]:
    try:
        stats = torch.cuda.memory_stats()
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "retries": stats["num_alloc_retries"],
            "expandable": torch.cuda.memory._snapshot()["allocator_settings"].get("expandable_segments"),
        }
    except Exception as error:  # the card itself may be full
        return {"numbers": str(error)[:200]}


# -------------------------------------------------------------------------------------------------- their own script
def load(job: Job) -> Any:
    """The 4-bit base. Random weights, quantised layer by layer, stand for a checkpoint; where loading itself is the
    matter, there is one: a file of zeros, read by from_pretrained."""
    twist, run = job.twist, job.run
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=run.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, twist.get("compute", "bfloat16")),
    )  # fmt: skip
    if "dtype" not in twist and not twist.get("twice"):
        return random_model(run, Path(run.model), quantization, torch.device(job.device))
    options: dict[str, Any] = {"dtype": getattr(torch, twist.get("dtype", "bfloat16")), "device_map": {"": job.device}}
    if twist.get("quantised", True):
        options["quantization_config"] = quantization
    return AutoModelForCausalLM.from_pretrained(run.model, **options)


def build(job: Job) -> Any:
    run, levers, twist = job.run, job.run.levers, job.twist
    first = load(job) if twist.get("twice") else None
    model = load(job)
    del first
    how = {"use_reentrant": False}
    checkpointed = levers.checkpointing == "all" and twist.get("inactive") != "config"
    if levers.upcast == "all":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointed, gradient_checkpointing_kwargs=how
        )
    elif checkpointed:
        model.gradient_checkpointing_enable(how)
    if twist.get("inactive") == "config":
        model.config.gradient_checkpointing = True
    targets = "all-linear" if run.lora.targets == ("all-linear",) else list(run.lora.targets)
    lora = LoraConfig(r=run.lora.r, lora_alpha=run.lora.alpha, lora_dropout=run.lora.dropout, target_modules=targets,
                      task_type="CAUSAL_LM", modules_to_save=twist.get("modules_to_save"))  # fmt: skip
    return get_peft_model(model, lora)


def vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


class Rows(Dataset[dict[str, list[int]]]):
    """Random tokens, as many rows as are played; of the twist's lengths, or with one long row in the second step."""

    def __init__(self, job: Job, vocab: int, count: int | None = None) -> None:
        run, twist = job.run, job.twist
        batch = run.micro_batch_size * run.accumulation
        lengths = [run.seq_len] * (count or batch * (run.schedule.max_steps or 3))
        if count is None and "long" in twist:
            lengths[batch] = twist["long"]
        if count is None and "lengths" in twist:
            lengths = [n for n in twist["lengths"] for _ in range(batch)]
        self.lengths, self.vocab = lengths, vocab

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = random.Random(index).choices(range(self.vocab), k=self.lengths[index])
        return {"input_ids": ids, "labels": ids}


def collate(rows: list[dict[str, list[int]]]) -> Batch:
    width = max(len(row["input_ids"]) for row in rows)
    padded = {name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])
              for name, fill in (("input_ids", 0), ("labels", IGNORED))}  # fmt: skip
    if any(len(row["input_ids"]) < width for row in rows):
        padded["attention_mask"] = (padded["labels"] != IGNORED).long()
    return padded


def arguments(job: Job) -> TrainingArguments:
    run, twist = job.run, job.twist
    more: dict[str, Any] = {}
    if "eval_batch" in twist:
        more = {"per_device_eval_batch_size": twist["eval_batch"], "eval_strategy": "steps", "eval_steps": 1}
    if run.levers.checkpointing == "all" and twist.get("inactive") != "config":
        more |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    steps = len(twist["lengths"]) if "lengths" in twist else run.schedule.max_steps or 3
    steps = 1 if "eval_batch" in twist else steps  # each would be evaluated after
    return TrainingArguments(
        output_dir=str(job.folder / "out"), per_device_train_batch_size=run.micro_batch_size,
        gradient_accumulation_steps=run.accumulation, max_steps=steps, bf16=True, optim=run.levers.optimizer,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
        train_sampling_strategy="sequential", use_cpu=job.device == "cpu", **more,
    )  # fmt: skip


def with_trainer(job: Job) -> None:
    transformers.set_seed(0)
    model, twist = build(job), job.twist
    vocab = vocabulary(model)
    more: dict[str, Any] = {}
    if "eval_batch" in twist:
        more["eval_dataset"] = Rows(job, vocab, twist.get("keep_logits", 2 * twist["eval_batch"]))
    if "keep_logits" in twist:
        more["compute_metrics"] = lambda prediction: {"first": float(prediction.predictions.flat[0])}
    if twist.get("reduced"):
        more["preprocess_logits_for_metrics"] = lambda logits, labels: logits.argmax(-1)
    trainer = Trainer(model=model, args=arguments(job), train_dataset=Rows(job, vocab), data_collator=collate, **more)
    trainer.train()
    finish(job, model)


def with_loop(job: Job) -> None:
    """The loop of the tutorials."""
    transformers.set_seed(0)
    model = build(job)
    keep(job, model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments(job))
    optimizer = kind(parameters, **options)
    if job.twist.get("inactive") != "eval":
        model.train()
    if job.device == "cuda":
        torch.cuda.empty_cache()
    for batch in batches(job, model):
        with torch.autocast(job.device, dtype=torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print({"loss": float(loss.detach())}, flush=True)
        del loss
    finish(job, model)


def batches(job: Job, model: Any) -> Iterator[Batch]:
    rows = Rows(job, vocabulary(model))
    size = job.run.micro_batch_size
    for start in range(0, len(rows), size):
        batch = collate([rows[n] for n in range(start, start + size)])
        yield {name: tensor.to(job.device) for name, tensor in batch.items()}


def keep(job: Job, model: Any) -> None:
    """What a probe of the layers' outputs collects on the card: some rows of each layer, each step."""
    if "keep" not in job.twist:
        return
    kept: list[torch.Tensor] = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if len(kept) < 10_000:
            kept.append(hidden.detach()[:, : job.twist["keep"]].float().clone())

    for layer in model.get_base_model().model.layers:
        layer.register_forward_hook(note)


def finish(job: Job, model: Any) -> None:
    if job.twist.get("merge"):
        model.merge_and_unload()


# ---------------------------------------------------------------------------------------------------- vramplan's path
def with_vramplan(job: Job) -> None:
    """The run as `vramplan train` builds it, without its guard: what runs out of memory ends."""

    def unheld(trainer: Any) -> Any:
        return transformers.TrainerCallback()

    stop: Any = Silent()
    measure(job.run, job.folder, torch.device(job.device, 0) if job.device == "cuda" else torch.device("cpu"),
            progress=stop, stop=stop, also=unheld)  # fmt: skip


SCRIPTS = {"trainer": with_trainer, "loop": with_loop, "vramplan": with_vramplan}


# ------------------------------------------------------------------------------------------------------- other things
def hold(left_bytes: int, context_bytes: int, ready: int) -> None:
    """Fill the card but for `left_bytes` and the context of one more process; say so through `ready`; wait."""
    free = torch.cuda.mem_get_info()[0]
    kept = torch.empty(max(free - left_bytes - context_bytes, 0), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    os.write(ready, b"." if kept.numel() else b"!")
    while True:
        time.sleep(60)


def checkpoint_of_zeros(folder: Path) -> None:
    """A bf16 checkpoint beside a config.json: a safetensors header, and a hole in the file for the weights."""
    path = folder / "model.safetensors"
    if path.exists():
        return
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.get_text_config().tie_word_embeddings:
            continue
        size = 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with path.open("wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        file.truncate(8 + len(words) + end)
