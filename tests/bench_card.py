"""Plans of `vramplan fit` played on a CUDA card under their caps: python tests/bench_card.py --write FILE [options]

For each model, cap and sequence length the plan is made as `fit` makes it for a card with so much memory, and played
with random weights under `set_per_process_memory_fraction`, without the guard: what runs out of memory ends. Then one
micro-batch with a row more. `--sweep` plays every setting that `fit` could have chosen for a few steps; `--context` the
longest sequence at one row. Rows go to FILE as JSON lines; what is there already is not played again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as `train` does, before torch

import torch
from bitsandbytes.optim import PagedAdamW8bit

from vramplan.core.parallel import outside_bytes
from vramplan.core.plan import plan, settings_of
from vramplan.core.room import Quick, divisors
from vramplan.core.timeline import checkpointed
from vramplan.core.types import SEARCHED, GpuProfile, Lora, Plan, RunSpec
from vramplan.core.units import GIB
from vramplan.sources.gpu import live_gpu
from vramplan.sources.hf_config import load_model, raw_config
from vramplan.train.building import build_model
from vramplan.train.fast.graphs import CudaGraphs, Graphs
from vramplan.train.fused_loss import head_of
from vramplan.train.meter import Meter
from vramplan.train.outcome import first_line, is_out_of_memory
from vramplan.train.pressure import let_go
from vramplan.train.trainer import every_row, fused_loss, labelled_rows, trained_parameters

STEPS, SWEPT_STEPS, WARM = 20, 8, 3  # the first WARM steps are not timed: the second shape's graph is made in them
FEW_MICRO_STEPS = 2  # of a step with more: the others are like the second
Row = dict[str, Any]


class Silent:
    """Stands in for `vramplan.train.progress.Progress`."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def __call__(self, *args: Any, **kwargs: Any) -> None: ...


class Card:
    """One model with random weights and fused layers on the card, in which the levers of a run can be set."""

    def __init__(self, key: str, rank: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(raw_config(key)))
            run = RunSpec(model=key, random_weights=True, lora=Lora(r=rank))
            self.model, fused = build_model(run, folder, Meter(torch.device("cuda", 0)), Silent())
        assert fused is not None
        self.fused, self.base = fused, self.model.get_base_model()
        self.head = head_of(self.base, True)
        self.trained = trained_parameters(self.model, fused)
        self.vocab_size = self.model.get_input_embeddings().num_embeddings
        self.total_bytes = torch.cuda.get_device_properties(0).total_memory
        self.model.train()

    def set(self, run: RunSpec, allocator_bytes: int | None) -> None:
        share = 1.0 if allocator_bytes is None else min(allocator_bytes / self.total_bytes, 1.0)
        torch.cuda.set_per_process_memory_fraction(share)
        for index, layer in enumerate(self.fused.layers):
            layer.gradient_checkpointing = checkpointed(run.levers.checkpointing, index)
        assert self.fused.checkpoints is not None
        self.fused.checkpoints.host = None
        if run.levers.checkpoint_offload and run.levers.checkpointing != "none":
            self.fused.checkpoints.offload()
        self.clear()

    def clear(self) -> None:
        for parameter in self.trained:
            parameter.grad = None
        self.fused.forget()
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # of the streams that graphs were captured on
        torch.cuda.empty_cache()

    def batch(self, rows: int, tokens: int) -> dict[str, Any]:
        ids = torch.randint(0, self.vocab_size, (rows, tokens), device="cuda")
        return {"input_ids": ids, "labels": ids.clone()}

    def ordinary(self, inputs: dict[str, Any], items: torch.Tensor) -> torch.Tensor:
        return self._micro_step(inputs, items, labelled_rows)

    def static(self, inputs: dict[str, Any], items: torch.Tensor) -> torch.Tensor:
        return self._micro_step(inputs, items, every_row)

    def _micro_step(self, inputs: dict[str, Any], items: torch.Tensor, rows_of: Any) -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            loss = fused_loss(self.base, self.head, inputs, items, rows_of)
        loss.backward()
        return loss

    def play(self, run: RunSpec, steps: int, seconds: float = 1e9) -> Row:
        """Steps of a run; how it ended, the middle step's time, peaks."""
        told: list[str] = []
        graphs = Graphs(self.static, self.trained, self.fused.forget, told.append, CudaGraphs(torch.device("cuda", 0)))
        row: Row = {"ended": "ok", "steps_s": []}
        try:
            for step_s in self._steps(run, graphs, steps, seconds, row):
                row["steps_s"].append(round(step_s, 5))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            row |= {"ended": "oom", "message": first_line(error, 200)}
            let_go(error)
        times = sorted(row["steps_s"][WARM:] or row["steps_s"][-1:])
        micro_steps = min(run.accumulation, FEW_MICRO_STEPS)
        if times:
            step_s = times[len(times) // 2]
            row |= {"step_s": step_s, "tokens_per_s": round(run.micro_batch_size * run.seq_len * micro_steps / step_s)}
        row |= {"steps": len(row["steps_s"]), "micro_steps": micro_steps, "graphs": len(graphs.made), "told": told}
        graphs.drop("the run is over")
        self.clear()
        return row

    def _steps(self, run: RunSpec, graphs: Graphs, steps: int, seconds: float, row: Row) -> Iterator[float]:
        optimizer = PagedAdamW8bit(self.trained, lr=1e-5)
        batches = [self.batch(run.micro_batch_size, run.seq_len) for _ in range(FEW_MICRO_STEPS)]
        items = torch.tensor(float(run.micro_batch_size * (run.seq_len - 1) * run.accumulation), device="cuda")
        retries, begun = torch.cuda.memory_stats()["num_alloc_retries"], time.perf_counter()
        for step in range(steps):
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            for turn in range(min(run.accumulation, FEW_MICRO_STEPS)):
                inputs = batches[(step + turn) % FEW_MICRO_STEPS]
                graphs.run(inputs, items, lambda inputs=inputs: self.ordinary(inputs, items))  # type: ignore[misc]
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            optimizer.step()
            for parameter in self.trained:
                parameter.grad = None
            torch.cuda.synchronize()
            yield time.perf_counter() - start
            if step < 2:  # in the second the optimizer's state is there, and no graph yet
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
            row["reserved_bytes"] = torch.cuda.memory_reserved()
            row["retries"] = torch.cuda.memory_stats()["num_alloc_retries"] - retries
            if time.perf_counter() - begun > seconds:
                return

    def one_more(self, run: RunSpec) -> Row:
        """Whether a micro-batch with a row more survives, and the time of an ordinary one of each size."""
        row: Row = {}
        items = torch.tensor(1.0, device="cuda")
        for name, rows in (("ordinary", run.micro_batch_size), ("one_more", run.micro_batch_size + 1)):
            try:
                inputs, times = self.batch(rows, run.seq_len), []
                for _ in range(3):
                    start = time.perf_counter()
                    self.ordinary(inputs, items)
                    torch.cuda.synchronize()
                    times.append(time.perf_counter() - start)
                row[f"{name}_micro_s"] = round(min(times), 5)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                let_go(error)
                row[name] = "oom"
            inputs = {}
            self.clear()
        return row


# ------------------------------------------------------------------------------------------------------- what to play
def capped(gpu: GpuProfile, gib: float | None) -> GpuProfile:
    """The card with so much memory; None: whole."""
    return gpu if gib is None else replace(gpu, usable_bytes=min(int(gib * GIB), gpu.usable_bytes))


def described(found: Plan, run: RunSpec, speed: int | None, cap: float | None) -> Row:
    gpu, peak = found.gpu, found.ledger.peak
    return {
        "model": run.model, "cap_gib": cap, "effective_batch_size": found.effective_batch_size, "seq": run.seq_len,
        "micro": run.micro_batch_size, "accumulation": run.accumulation, "rank": run.lora.r,
        "checkpointing": run.levers.checkpointing, "offload": run.levers.checkpoint_offload,
        "budget_bytes": found.budget_bytes, "allocator_bytes": found.budget_bytes - outside_bytes(run, gpu),
        "predicted_peak_bytes": peak.allocated_bytes, "predicted_reserved_bytes": peak.reserved_bytes,
        "predicted_device_bytes": peak.device_bytes, "predicted_tokens_per_s": speed,
    }  # fmt: skip


def shape_of(row: Row) -> tuple[Any, ...]:
    return tuple(
        row[key] for key in ("kind", "cap_gib", "model", "seq", "micro", "accumulation", "checkpointing", "offload")
    )


def plan_rows(options: argparse.Namespace, key: str, gpu: GpuProfile) -> Iterator[tuple[Row, RunSpec]]:
    """Each plan once, under the smallest cap that it is for."""
    for tokens in options.seq_len:
        known: dict[tuple[Any, ...], Row] = {}
        for cap in options.caps:
            found = plan(load_model(key), RunSpec(model=key, seq_len=tokens), capped(gpu, cap), options.effective)
            if found.verdict == "does_not_fit":
                continue
            chosen = next(c for c in found.candidates if (c.levers, c.micro_batch_size) ==
                          (found.run.levers, found.run.micro_batch_size))  # fmt: skip
            row = {"kind": "plan", "also": []} | described(found, found.run, chosen.tokens_per_s, cap)
            same = shape_of(row | {"cap_gib": None})
            known.setdefault(same, row | {"run": found.run})["also"].append(cap)
        yield from ((row, row.pop("run")) for row in known.values())


def sweep_rows(options: argparse.Namespace, key: str, gpu: GpuProfile) -> Iterator[tuple[Row, RunSpec]]:
    """Every setting and micro-batch of which the tensors fit under the cap."""
    for tokens in options.seq_len:
        for cap in options.caps:
            card, quick = capped(gpu, cap), Quick(load_model(key))
            found = plan(load_model(key), RunSpec(model=key, seq_len=tokens), card, options.effective)
            for variant in settings_of(found.run, SEARCHED):
                for micro in divisors(options.effective):
                    run = replace(variant, micro_batch_size=micro, accumulation=options.effective // micro)
                    if quick.bytes(run, card) <= card.usable_bytes:
                        chosen = run.levers == found.run.levers and micro == found.run.micro_batch_size
                        row = described(found, run, quick.speed(run, card), cap)
                        yield {"kind": "sweep", "chosen": chosen} | row, run


def context_rows(options: argparse.Namespace, key: str, gpu: GpuProfile) -> Iterator[tuple[Row, RunSpec]]:
    for cap in options.caps:
        run = RunSpec(model=key, seq_len=512, lora=Lora(r=options.rank))
        found = plan(load_model(key), run, capped(gpu, cap), 1, "context")
        yield {"kind": "context"} | described(found, found.run, None, cap), found.run


# -------------------------------------------------------------------------------------------------------------- main
def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["qwen2.5-0.5b", "llama-3.2-1b", "qwen2.5-3b", "llama-3.1-8b"])
    parser.add_argument("--caps", nargs="+", type=lambda x: None if x == "whole" else float(x),
                        default=[8.0, 12.0, 16.0, 24.0, 48.0, 80.0, None])  # fmt: skip
    parser.add_argument("--seq-len", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--effective", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1e9, help="of one run; no more steps are begun then")
    parser.add_argument("--until", type=float, default=1e9, help="no run is begun after so many seconds")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sweep", action="store_true")
    which.add_argument("--context", action="store_true")
    return parser.parse_args()


def main() -> None:
    options, begun = arguments(), time.monotonic()
    gpu = live_gpu(0)
    rows_of = sweep_rows if options.sweep else context_rows if options.context else plan_rows
    steps = SWEPT_STEPS if options.sweep else 1 if options.context else STEPS
    done = (
        {shape_of(r) for r in map(json.loads, options.write.read_text().splitlines())} if options.write.exists() else ()
    )
    about = {"gpu": gpu.name, "driver": gpu.driver, "python": platform.python_version()}
    about["allocator"] = os.environ["PYTORCH_CUDA_ALLOC_CONF"]
    about["versions"] = {
        name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
    }
    for key in options.models:
        card: Card | None = None
        for row, run in rows_of(options, key, gpu):
            if shape_of(row) in done or time.monotonic() - begun > options.until:
                continue
            card = card or Card(key, options.rank)
            card.set(run, row["allocator_bytes"])
            row |= card.play(run, steps, options.seconds)
            if row["kind"] == "plan" and row["ended"] == "ok":
                row |= card.one_more(run)
            with options.write.open("a") as file:
                file.write(json.dumps(row | about) + "\n")
            names = ("cap_gib", "seq", "micro", "checkpointing", "offload", "ended", "steps", "graphs", "tokens_per_s",
                     "predicted_tokens_per_s", "one_more")  # fmt: skip
            print(
                key,
                *map(row.get, names),
                f"{(row.get('peak_bytes') or 0) - row['predicted_peak_bytes']:+,}",
                flush=True,
            )
        del card
        gc.collect()


if __name__ == "__main__":
    sys.exit(main())
