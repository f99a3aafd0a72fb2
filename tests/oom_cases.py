"""The runs of `bench_oom.py` that go out of memory, each for one known cause. Pure arithmetic: no torch here.

A case says what its script does, what `vramplan diagnose` is told of it (`run`), and which causes are right
(`expected`, decided by what is provoked, before anything was played). Its cap lies between what the run needs without
the cause and what it takes with it: by the ledgers of both, or, where the cause is none of the ledger's business, by
playing the script once without a cap (`measured`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from vramplan.core import architecture as arch
from vramplan.core.fixes import lever, split
from vramplan.core.ledger import estimate
from vramplan.core.recipes import RECIPES
from vramplan.core.types import GpuProfile, Lora, ModelSpec, RunSpec, Schedule
from vramplan.core.units import MIB
from vramplan.sources.hf_config import parse_config, raw_config

STEPS = 3
LEAST_GAP = 1.03  # between the two sides of a cap: below that a case says nothing


@dataclass(frozen=True)
class Case:
    """One run that shall go out of memory.

    `model` is a built-in name, cut to `layers` layers. `twist` is what the script does beside `run`. `fixed` is the run
    without the cause (None: `run` itself), `provoked` the one with it (None: `run`). `share`: where between the two
    the cap lies.
    """

    name: str
    expected: tuple[str, ...]
    model: str
    layers: int
    run: RunSpec
    script: str = "trainer"  # trainer | loop: written with transformers and PEFT; vramplan: its own path
    twist: dict[str, Any] = field(default_factory=dict)
    fixed: RunSpec | None = None
    provoked: RunSpec | None = None
    measured: bool = False
    share: float = 0.5
    rule: str = "between"  # how the cap is found: see `Sides`

    @property
    def cause(self) -> str:
        return self.name.partition("/")[0]

    @property
    def config(self) -> dict[str, Any]:
        """The model's own `config.json` with fewer layers."""
        config = dict(raw_config(self.model))
        config["num_hidden_layers"] = self.layers
        if config.get("layer_types"):
            config["layer_types"] = config["layer_types"][: self.layers]
        if "max_window_layers" in config:
            config["max_window_layers"] = self.layers
        return config

    @property
    def spec(self) -> ModelSpec:
        return parse_config(self.config, name=f"{self.model}-{self.layers}", source="cut")

    def placed(self, root: Path) -> Case:
        """The case with its model in a folder below `root`."""
        folder = root / f"{self.model}-{self.layers}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        runs = {name: value for name in ("run", "fixed", "provoked") if (value := getattr(self, name))}
        return replace(self, **{name: replace(value, model=str(folder)) for name, value in runs.items()})


@dataclass(frozen=True)
class Job:
    """One process of the bench: what it plays, under which cap, and where it writes."""

    run: RunSpec
    script: str
    folder: Path  # of log.txt and result.json
    cap_bytes: int | None = None
    twist: dict[str, Any] = field(default_factory=dict)
    device: str = "cuda"


@dataclass(frozen=True)
class Sides:
    """Allocator bytes: `low` is what the run needs without the cause, `high` what it takes with it (None: measured)."""

    low_bytes: int
    high_bytes: int | None

    def cap(self, share: float) -> int:
        assert self.high_bytes is not None
        return int(self.low_bytes + share * (self.high_bytes - self.low_bytes)) // MIB * MIB

    @property
    def apart(self) -> bool:
        return self.high_bytes is None or self.high_bytes >= LEAST_GAP * self.low_bytes


def sides(case: Case, gpu: GpuProfile) -> Sides:
    spec = case.spec
    need = estimate(spec, case.fixed or case.run, gpu).peak
    if case.rule == "too_large":  # nothing that diagnose can propose fits below
        least = lever(checkpointing="all", checkpoint_offload=True)(replace(case.run, micro_batch_size=1, seq_len=128))
        floor = estimate(spec, least, gpu)
        return Sides(floor.resident.loaded_bytes // 2, floor.resident.loaded_bytes)
    if case.measured:
        return Sides(need.minimum_bytes, None)
    if case.rule == "weights":  # the whole checkpoint on the card
        width = 4 if case.twist.get("dtype") == "float32" else 2
        return Sides(need.minimum_bytes, width * arch.total_parameters(spec))
    ledger = estimate(spec, case.provoked or case.run, gpu)
    if case.rule == "prepared":  # already gone before the first step
        return Sides(need.minimum_bytes, ledger.resident.prepared_bytes)
    if case.rule == "twice":
        return Sides(need.minimum_bytes, 2 * ledger.resident.loaded_bytes)
    if case.rule == "holder":  # another process leaves so much to this one, and the run needs more
        return Sides(ledger.peak.allocated_bytes // 2, ledger.peak.allocated_bytes)
    return Sides(need.minimum_bytes, ledger.peak.allocated_bytes)


# ----------------------------------------------------------------------------------------------------- what is played
def stock(batch: int, tokens: int, *, r: int = 16, targets: tuple[str, ...] = ("all-linear",), driver: str = "trainer",
          **levers: Any) -> RunSpec:  # fmt: skip
    """The tutorials' recipe, with some levers set otherwise."""
    return RunSpec(model="", micro_batch_size=batch, seq_len=tokens, recipe="peft", random_weights=True, driver=driver,
                   levers=replace(RECIPES["peft"], **levers), lora=Lora(r=r, targets=targets),
                   schedule=Schedule(max_steps=STEPS))  # fmt: skip


def lean(batch: int, tokens: int, *, r: int = 16, **levers: Any) -> RunSpec:
    return RunSpec(model="", micro_batch_size=batch, seq_len=tokens, random_weights=True, lora=Lora(r=r),
                   levers=replace(RECIPES["lean"], **levers), schedule=Schedule(max_steps=STEPS))  # fmt: skip


def _script(run: RunSpec) -> str:
    return "vramplan" if run.recipe == "lean" else run.driver


def _named(cause: str, rows: list[tuple[Any, ...]], make: Any) -> Iterator[Case]:
    for number, (model, layers, *rest) in enumerate(rows, 1):
        case = make(f"{cause}/{number}-{model}", model, layers, *rest)
        yield replace(case, script=_script(case.run))


def logits() -> Iterator[Case]:
    """Vocabulary far wider than everything else of the step; the cap is below what the loss alone takes."""
    rows = [("llama-3.2-1b", 16, stock(8, 1024), 0.5), ("qwen2.5-0.5b", 24, stock(16, 512, driver="loop"), 0.5),
            ("gemma-2-2b", 8, stock(4, 1024), 0.6), ("llama-3.1-8b", 4, stock(4, 2048), 0.5),
            ("qwen2.5-3b", 12, stock(4, 2048, driver="loop"), 0.8), ("qwen2.5-1.5b", 28, stock(8, 1024), 0.93),
            ("qwen3-1.7b", 14, stock(2, 4096), 0.4),
            ("llama-3.2-3b", 14, stock(6, 1024, upcast="none"), 0.7)]  # fmt: skip
    return _named("logits", rows, lambda name, model, layers, run, share: Case(
        name, ("logits",), model, layers, run, fixed=lever(loss="fused")(run), share=share))  # fmt: skip


def checkpointing() -> Iterator[Case]:
    """Small vocabularies and many layers: what the layers save is most of the step."""
    none = {"checkpointing": "none"}
    rows = [("llama-2-7b", 8, stock(2, 1024, **none), 0.5), ("mistral-7b-v0.1", 6, stock(4, 1024, **none), 0.4),
            ("tinyllama-1.1b", 22, stock(4, 1024, driver="loop", **none), 0.5),
            ("smollm2-360m", 32, stock(8, 512, upcast="none", **none), 0.5),
            ("phi-3-mini-4k", 8, stock(2, 2048, upcast="none", **none), 0.6),
            ("smollm2-1.7b", 24, stock(2, 1024, **none), 0.5), ("llama-3.2-1b", 16, lean(8, 1024, **none), 0.5),
            ("llama-2-7b", 8, lean(4, 2048, **none), 0.3)]  # fmt: skip
    return _named("checkpointing", rows, lambda name, model, layers, run, share: Case(
        name, ("checkpointing",), model, layers, run, fixed=lever(checkpointing="all")(run), share=share))  # fmt: skip


def inactive() -> Iterator[Case]:
    """diagnose is told that every layer is checkpointed, and none is: the loop never calls model.train(), or the flag
    is set in the config, which transformers 5 does not read."""
    rows = [("tinyllama-1.1b", 22, stock(4, 1024, driver="loop", upcast="none"), "eval"),
            ("llama-2-7b", 8, stock(2, 1024, driver="loop", upcast="none"), "eval"),
            ("smollm2-360m", 32, stock(8, 512, upcast="none"), "config"),
            ("mistral-7b-v0.1", 6, stock(2, 2048, upcast="none"), "config")]  # fmt: skip
    return _named("inactive", rows, lambda name, model, layers, run, how: Case(
        name, ("checkpointing",), model, layers, run, twist={"inactive": how},
        provoked=lever(checkpointing="none")(run)))  # fmt: skip


def eager() -> Iterator[Case]:
    """Sequences so long that the scores are more than the logits: heads x tokens over the vocabulary."""
    rows = [("llama-2-7b", 4, stock(1, 4096, attention="eager")),
            ("mistral-7b-v0.1", 4, stock(1, 4096, attention="eager", driver="loop")),
            ("smollm2-1.7b", 8, stock(1, 6144, attention="eager")),
            ("smollm2-360m", 12, stock(1, 8192, attention="eager", upcast="none")),
            ("phi-3-mini-4k", 6, stock(2, 4096, attention="eager")),
            ("tinyllama-1.1b", 12, stock(2, 2048, attention="eager", driver="loop")),
            ("llama-3.1-8b", 3, stock(1, 6144, attention="eager"))]  # fmt: skip
    return _named("eager_attention", rows, lambda name, model, layers, run: Case(
        name, ("eager_attention",), model, layers, run, fixed=lever(attention="sdpa")(run)))  # fmt: skip


def long_sample() -> Iterator[Case]:
    """The second step's row is far longer than diagnose is told, and nothing cuts it. Only what names the length, or
    says that the run is not the one described, is right: what gave way (logits, say) would fit as described."""
    rows = [("llama-3.2-1b", 8, stock(1, 512), 4096), ("qwen2.5-0.5b", 12, stock(1, 512), 8192),
            ("mistral-7b-v0.1", 4, stock(1, 1024, driver="loop"), 8192),
            ("llama-3.1-8b", 4, stock(1, 512, upcast="none"), 3072),
            ("smollm2-1.7b", 12, stock(1, 1024, driver="loop"), 8192)]  # fmt: skip
    return _named("long_sample", rows, lambda name, model, layers, run, length: Case(
        name, ("long_sample", "not_as_described"), model, layers, run, twist={"long": length},
        provoked=replace(run, seq_len=length)))  # fmt: skip


def fragmentation() -> Iterator[Case]:
    """Steps of ever longer rows, and small tensors kept from each layer: the cap is above all that ever lives at once,
    so only the allocator's pieces can be what is missing."""
    rows = [("llama-3.2-1b", 8, 2048), ("smollm2-360m", 16, 4096), ("tinyllama-1.1b", 12, 2048),
            ("qwen2.5-0.5b", 12, 3072)]  # fmt: skip
    return _named("fragmentation", rows, lambda name, model, layers, length: Case(
        name, ("fragmentation",), model, layers, stock(1, length, driver="loop", r=64), measured=True,
        twist={"lengths": [length * n // 8 for n in range(1, 9)], "keep": 256}, rule="fragmented"))  # fmt: skip


def other_process() -> Iterator[Case]:
    """No cap: another process holds all but some of the card."""
    rows = [("llama-3.2-1b", 16, lean(4, 1024)), ("tinyllama-1.1b", 22, stock(4, 1024)),
            ("qwen2.5-1.5b", 14, lean(8, 1024)), ("smollm2-1.7b", 24, stock(2, 1024, driver="loop"))]  # fmt: skip
    return _named("other_process", rows, lambda name, model, layers, run: Case(
        name, ("other_process",), model, layers, run, twist={"holder": True}, rule="holder"))  # fmt: skip


def evaluation() -> Iterator[Case]:
    """Evaluation of larger batches than are trained on, and evaluation that keeps all logits for its metrics."""
    rows = [("llama-3.2-1b", 4, stock(1, 512), {"eval_batch": 16}),
            ("qwen2.5-0.5b", 8, stock(1, 512, upcast="none"), {"eval_batch": 16}),
            ("tinyllama-1.1b", 6, stock(1, 1024), {"eval_batch": 32}),
            ("gemma-2-2b", 4, stock(1, 256), {"eval_batch": 16}),
            ("llama-3.2-1b", 4, stock(1, 256), {"eval_batch": 2, "keep_logits": 24}),
            ("qwen2.5-0.5b", 8, stock(1, 512, upcast="none"), {"eval_batch": 1, "keep_logits": 12}),
            ("smollm2-1.7b", 4, stock(2, 512), {"eval_batch": 2, "keep_logits": 40}),
            ("gemma-2-2b", 4, stock(1, 256), {"eval_batch": 1, "keep_logits": 16})]  # fmt: skip
    return _named("evaluation", rows, lambda name, model, layers, run, twist: Case(
        name, ("evaluation",), model, layers, run, twist=twist, measured=True))  # fmt: skip


def optimizer() -> Iterator[Case]:
    """Ranks so high, and batches so small, that float32 states are most of the step."""
    rows = [("llama-3.2-1b", 16, stock(1, 128, r=256)), ("tinyllama-1.1b", 22, stock(1, 256, r=512)),
            ("smollm2-1.7b", 12, stock(1, 256, r=512, driver="loop", optimizer="adamw_torch")),
            ("qwen2.5-1.5b", 14, stock(1, 128, r=512, upcast="none")),
            ("llama-3.2-1b", 8, lean(1, 512, r=512, optimizer="adamw_torch_fused"))]  # fmt: skip
    return _named("optimizer", rows, lambda name, model, layers, run: Case(
        name, ("optimizer",), model, layers, run, fixed=lever(optimizer="paged_adamw_8bit")(run)))  # fmt: skip


def loading() -> Iterator[Case]:
    """A first copy of the model is still on the card when it is loaded again; weights that come without quantisation;
    and in float32."""
    twice = [("qwen2.5-7b", 2, stock(1, 128, upcast="none")), ("gemma-2-2b", 8, stock(1, 64, upcast="none")),
             ("llama-3.1-8b", 4, stock(1, 128, upcast="none"))]  # fmt: skip
    yield from _named("loaded_twice", twice, lambda name, model, layers, run: Case(
        name, ("loading",), model, layers, run, twist={"twice": True}, rule="twice"))  # fmt: skip
    whole = [("llama-2-7b", 8, stock(1, 256, upcast="none"), "bfloat16", "unquantised"),
             ("mistral-7b-v0.1", 6, stock(1, 256, upcast="none"), "bfloat16", "unquantised"),
             ("tinyllama-1.1b", 22, stock(1, 256, upcast="none", driver="loop"), "bfloat16", "unquantised"),
             ("llama-2-7b", 4, stock(1, 256, upcast="none"), "float32", "float32_base"),
             ("smollm2-1.7b", 12, stock(1, 256, upcast="none"), "float32", "float32_base")]  # fmt: skip
    # Whole weights in float32 are unquantised too: both say what is wrong.
    yield from _named("whole_weights", whole, lambda name, model, layers, run, dtype, key: Case(
        name, (key,) if key == "unquantised" else (key, "unquantised"), model, layers, run, rule="weights",
        twist={"dtype": dtype, "quantised": False}))  # fmt: skip
    wide = [("qwen2.5-7b", 2, stock(1, 128, upcast="none")), ("gemma-2-2b", 6, stock(1, 64, upcast="none")),
            ("llama-3.1-8b", 2, stock(1, 128, upcast="none", driver="loop"))]  # fmt: skip
    yield from _named("float32_base", wide, lambda name, model, layers, run: Case(
        name, ("float32_base",), model, layers, run, measured=True, share=0.4,
        twist={"dtype": "float32", "quantised": True}))  # fmt: skip


def upcast() -> Iterator[Case]:
    """Vocabulary matrices that the float32 copies of prepare_model_for_kbit_training no longer let onto the card."""
    rows = [("qwen2.5-7b", 2, stock(1, 128)), ("gemma-2-2b", 6, stock(1, 64)), ("llama-3.1-8b", 2, stock(1, 128)),
            ("gemma-2-9b", 2, stock(1, 64, driver="loop")), ("qwen2.5-14b", 2, stock(1, 128))]  # fmt: skip
    return _named("upcast", rows, lambda name, model, layers, run: Case(
        name, ("upcast",), model, layers, run, fixed=lever(upcast="none")(run), rule="prepared"))  # fmt: skip


def batch() -> Iterator[Case]:
    """Nothing is left to turn but the micro-batch (checkpoints in host memory cost more)."""
    rows = [("llama-3.2-1b", 16, lean(64, 1024)), ("qwen2.5-0.5b", 24, lean(64, 512)),
            ("smollm2-1.7b", 24, lean(32, 1024)),
            ("llama-3.1-8b", 8, lean(16, 2048)), ("mistral-7b-v0.1", 8, lean(24, 1024))]  # fmt: skip
    return _named("batch", rows, lambda name, model, layers, run: Case(
        name, ("batch",), model, layers, run, fixed=split(run, run.micro_batch_size // 4)))  # fmt: skip


def sequence() -> Iterator[Case]:
    """One row, every saving: the sequence is what is left. "too_large" says so too, where only training something
    else fits."""
    rows = [("llama-3.2-1b", 16, lean(1, 65536)), ("qwen2.5-1.5b", 14, lean(1, 32768)),
            ("smollm2-1.7b", 24, lean(1, 8192)),
            ("llama-3.1-8b", 8, lean(1, 32768)), ("mistral-7b-v0.1", 8, lean(1, 16384))]  # fmt: skip
    return _named("sequence", rows, lambda name, model, layers, run: Case(
        name, ("sequence", "too_large"), model, layers, run, fixed=replace(run, seq_len=run.seq_len // 2)))  # fmt: skip


def absurd() -> Iterator[Case]:
    """One tensor that no card of this size can hold; no cap."""
    rows = [("llama-3.2-1b", 2, stock(3, 32768, attention="eager")),
            ("qwen2.5-1.5b", 2, stock(4, 32768, attention="eager", driver="loop")),
            ("llama-3.2-1b", 1, stock(180, 4096))]  # fmt: skip
    return _named("larger_than_card", rows, lambda name, model, layers, run: Case(
        name, ("larger_than_card",), model, layers, run, rule="no_cap"))  # fmt: skip


def too_large() -> Iterator[Case]:
    """Half of what the weights alone take."""
    rows = [("llama-3.1-8b", 8, lean(1, 1024)), ("gemma-2-9b", 4, lean(1, 512)), ("qwen2.5-7b", 6, stock(1, 512))]
    return _named("too_large", rows, lambda name, model, layers, run: Case(
        name, ("too_large",), model, layers, run, rule="too_large"))  # fmt: skip


def outside() -> Iterator[Case]:
    """bitsandbytes computing in float32; a trainable head; a merge on the card after training."""
    wide = [("mistral-7b-v0.1", 4, stock(1, 256, upcast="none")),
            ("llama-2-7b", 4, stock(1, 256, upcast="none", driver="loop")),
            ("phi-3-mini-4k", 4, stock(1, 256, upcast="none"))]  # fmt: skip
    yield from _named("float32_compute", wide, lambda name, model, layers, run: Case(
        name, ("float32_compute",), model, layers, run, twist={"compute": "float32"}, measured=True))  # fmt: skip
    heads = [("mistral-7b-v0.1", 4, stock(1, 256), ["lm_head"], 0.8),
             ("llama-3.1-8b", 2, stock(1, 128), ["lm_head"], 0.6),
             ("qwen2.5-7b", 2, stock(1, 128, driver="loop"), ["lm_head"], 0.8),
             ("llama-2-7b", 4, stock(1, 256, upcast="none"), ["embed_tokens", "lm_head"], 0.8)]  # fmt: skip
    yield from _named("trainable_head", heads, lambda name, model, layers, run, modules, share: Case(
        name, ("trainable_head",), model, layers, run, twist={"modules_to_save": modules}, measured=True,
        share=share))  # fmt: skip
    merged = [("mistral-7b-v0.1", 2, stock(1, 128, upcast="none")), ("llama-2-7b", 2, stock(1, 128, upcast="none")),
              ("phi-3-mini-4k", 2, stock(1, 64, upcast="none"))]  # fmt: skip
    yield from _named("saving", merged, lambda name, model, layers, run: Case(
        name, ("saving",), model, layers, run, twist={"merge": True}, measured=True))  # fmt: skip


def cases() -> list[Case]:
    """All of them, the causes in turn: however early a run of the bench ends, it has seen most causes."""
    groups: dict[str, list[Case]] = {}
    makers = (logits, checkpointing, inactive, eager, long_sample, fragmentation, other_process, evaluation, optimizer,
              loading, upcast, batch, sequence, absurd, too_large, outside)  # fmt: skip
    for case in chain.from_iterable(make() for make in makers):
        groups.setdefault(case.cause, []).append(case)
    return [case for turn in zip_longest(*groups.values()) for case in turn if case is not None]
