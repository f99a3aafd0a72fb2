"""Changes that would save memory, each priced by a full estimate, and the command that carries one out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .fused import is_fused
from .ledger import estimate
from .recipes import RECIPES, lever_flags
from .room import Quick, divisors
from .types import Fix, GpuProfile, Ledger, Lora, ModelSpec, RunSpec, Schedule

Change = Callable[[RunSpec], RunSpec]

ROOMY = 0.97  # of the budget: a fix below is preferred to one that only just fits
LEAST_SEQ_LEN = 128
DATA_FLAGS = {"kind": "--data-kind", "split": "--split", "config": "--data-config", "revision": "--data-revision",
              "text_column": "--text-column", "eval_path": "--eval-data", "eval_split": "--eval-split",
              "eval_fraction": "--eval-fraction", "on_bad_row": "--on-bad-row", "truncation": "--truncation",
              "train_sampling_strategy": "--train-sampling-strategy"}  # fmt: skip
LEANER_OPTIMIZER = {  # the same rule with states of 8 bits, in memory that can be paged out
    "adamw_torch_fused": "paged_adamw_8bit",
    "adamw_torch": "paged_adamw_8bit",
    "adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_8bit",
    "lion_32bit": "paged_lion_8bit",
    "paged_lion_32bit": "paged_lion_8bit",
    "lion_8bit": "paged_lion_8bit",
}


LEAN_REMOVES = ("logits", "upcast", "optimizer", "eager_attention")  # causes; fragmentation needs no other recipe


@dataclass(frozen=True, slots=True)
class Option:
    """One change that applies to a run. `key` is that of the cause it removes; cheaper ones come first."""

    key: str
    title: str
    change: Change
    changes_training: bool = False


# ------------------------------------------------------------------------------------------------------- pricing
class Pricer:
    """Prices changes of one run on one card against one budget (None: nothing to hold them against)."""

    def __init__(self, model: ModelSpec, ledger: Ledger, gpu: GpuProfile, budget: int | None) -> None:
        self.model, self.gpu, self.budget = model, gpu, budget
        self.run = ledger.run
        self.base_bytes = ledger.peak.device_bytes
        self.quick = Quick(model)
        self.saved: dict[str, int] = {}  # by the key of an option
        self.keys: dict[str, str] = {}  # title of a fix -> cause it removes
        self.floor_bytes: int | None = None  # where nothing fits: the least that was tried

    def fixes(self) -> tuple[Fix, ...]:
        """Every change that saves something; those that leave training as it is first, by their cost in speed."""
        singles = [(option, self.price(option)) for option in self.same_training()]
        self.saved = {option.key: fix.saves_bytes for option, fix in singles}
        useful = [(option, fix) for option, fix in singles if fix.saves_bytes > 0]
        found = [fix for _, fix in useful]
        if len(useful) > 1 and self.budget is not None and not any(fix.fits for fix in found):
            found.append(self.price(self.together([option for option, _ in useful])))
        if not any(fix.fits for fix in found) or self.budget is None:
            found += [fix for fix in map(self.price, self.other_training()) if fix.saves_bytes > 0]
        if self.budget is not None and not any(fix.fits for fix in found):
            found += self._last_resort([option for option, _ in useful])
        return tuple(found)

    def ranked(self, fixes: tuple[Fix, ...], cause: str) -> tuple[Fix, ...]:
        """What fits first, training unchanged before all else of it, then what fits with room, then what removes this
        cause, then what costs least.

        Where nothing fits, or the run should have fitted as it was, the largest saving comes first.
        """
        should_fit = self.budget is not None and self.base_bytes <= self.budget
        by_size = self.budget is None or should_fit

        def rank(numbered: tuple[int, Fix]) -> tuple[bool, bool, bool, bool, int]:
            number, fix = numbered
            key = self.keys.get(fix.title)
            other = key != cause and not (key == "recipe" and cause in LEAN_REMOVES)
            if by_size or not fix.fits:
                return not fix.fits, fix.changes_training, False, other and should_fit, -fix.saves_bytes
            return False, fix.changes_training, fix.device_bytes > ROOMY * (self.budget or 0), other, number

        return tuple(fix for _, fix in sorted(enumerate(fixes), key=rank))

    def _last_resort(self, savings: list[Option]) -> list[Fix]:
        """Every saving and shorter sequences too, if that fits; else only its size is kept."""
        everything = joined(savings).change
        seq_len = self.run.seq_len
        while seq_len // 2 >= LEAST_SEQ_LEN and not self.fits(replace(everything(self.run), seq_len=seq_len)):
            seq_len //= 2
        title = f"{'every saving, and ' if savings else ''}sequences of {seq_len} tokens"
        fix = self.price(Option("sequence", title, lambda old: replace(everything(old), seq_len=seq_len), True))
        self.floor_bytes = fix.device_bytes
        return [fix] if fix.fits else []

    def price(self, option: Option) -> Fix:
        """The changed run, estimated in full."""
        self.keys[option.title] = option.key
        run = option.change(self.run)
        need = estimate(self.model, run, self.gpu).peak.device_bytes
        return Fix(
            title=option.title,
            run=run,
            device_bytes=need,
            saves_bytes=self.base_bytes - need,
            fits=None if self.budget is None else need <= self.budget,
            changes_training=option.changes_training,
            command=command(run),
        )

    def fits(self, run: RunSpec) -> bool:
        """By the sum of the live tensors: for searching; what is shown is estimated in full."""
        return self.budget is not None and self.quick.bytes(run, self.gpu) <= self.budget

    # --------------------------------------------------------------------------------------------------- options
    def same_training(self) -> list[Option]:
        """Changes that leave data, effective batch and optimizer rule as they are; the cheapest in speed first."""
        run, levers = self.run, self.run.levers
        out = self._fused()
        if levers.allocator != "expandable":
            out.append(Option("fragmentation", "expandable segments", lever(allocator="expandable")))
        if levers.upcast != "none":
            out.append(Option("upcast", "embeddings, head and norms left in bf16", lever(upcast="none")))
        if levers.loss != "fused":
            out.append(Option("logits", "fused loss, no whole logits", lever(loss="fused")))
        if levers.attention == "eager" and self.model.attn_logit_softcapping is None:  # only eager does soft-capping
            out.append(Option("eager_attention", "sdpa attention", lever(attention="sdpa")))
        if levers.optimizer in LEANER_OPTIMIZER:
            leaner = LEANER_OPTIMIZER[levers.optimizer]
            out.append(Option("optimizer", f"optimizer {leaner}", lever(optimizer=leaner)))
        if run.micro_batch_size > 1:
            micro = self._micro_batch()
            title = f"micro-batch {micro} x accumulation {run.accumulation * run.micro_batch_size // micro}"
            out.append(Option("batch", title, lambda old: split(old, micro)))
        if not levers.checkpoint_offload and levers.checkpointing != "none":
            out.append(Option("offload", "checkpoints in host memory", lever(checkpoint_offload=True)))
        if levers.checkpointing != "all":
            out.append(Option("checkpointing", "every layer checkpointed", lever(checkpointing="all")))
        if not levers.checkpoint_offload and levers.checkpointing == "none":  # there are none yet to be moved
            both = lever(checkpointing="all", checkpoint_offload=True)
            out.append(Option("offload", "every layer checkpointed to host memory", both))
        return out

    def _fused(self) -> list[Option]:
        """Fused layers, which are faster too: with all of the lean recipe, or alone where nothing else is missing."""
        leaner = lean(self.model, self.run)
        if is_fused(self.model, self.run) or not is_fused(self.model, leaner):
            return []
        if replace(self.run.levers, kernels="fused") == leaner.levers:
            return [Option("recipe", "fused layers", lever(kernels="fused"))]
        title = "the lean recipe (fused layers and loss, nothing upcast)"
        return [Option("recipe", title, lambda old: lean(self.model, old))]

    def _micro_batch(self) -> int:
        """The largest smaller micro-batch that divides the old one and fits; 1 if none does."""
        smaller = divisors(self.run.micro_batch_size)[:-1]
        return next((micro for micro in reversed(smaller) if self.fits(split(self.run, micro))), 1)

    def together(self, options: list[Option]) -> Option:
        """As few of them as fit together, those that save most first; all of them if none of it fits."""
        chosen: list[Option] = []
        for option in sorted(options, key=lambda option: -self.saved[option.key]):
            so_far = joined(chosen).change(self.run)
            if option.change(so_far) == so_far:  # another has done it already
                continue
            chosen.append(option)
            if self.fits(joined(chosen).change(self.run)) and self.price(joined(chosen)).fits:
                break
        return joined(chosen)

    def other_training(self) -> list[Option]:
        """Changes that train something else: shorter sequences, a smaller rank."""
        out, run = [], self.run
        if run.seq_len > LEAST_SEQ_LEN:
            shorter = run.seq_len // 2
            while shorter // 2 >= LEAST_SEQ_LEN and not self.fits(replace(run, seq_len=shorter)):
                shorter //= 2
            if not self.fits(replace(run, seq_len=shorter)):
                shorter = run.seq_len // 2
            title = f"sequences of {shorter} tokens"
            out.append(Option("sequence", title, lambda old: replace(old, seq_len=shorter), True))
        if run.lora.r > 1:
            r = run.lora.r // 2
            out.append(Option("rank", f"LoRA rank {r}", lambda old: replace(old, lora=replace(old.lora, r=r)), True))
        return out


def lever(**changes: Any) -> Change:
    return lambda run: replace(run, levers=replace(run.levers, **changes))


def lean(model: ModelSpec, run: RunSpec) -> RunSpec:
    """The run with the lean recipe, its own checkpoints and optimizer rule. Held-out losses are those of the stock
    recipe to 0.1 % (docs/measurements.md)."""
    old = run.levers
    eager = old.attention == "eager" and model.attn_logit_softcapping is not None  # only eager does soft-capping
    levers = replace(
        RECIPES["lean"],
        checkpointing=old.checkpointing,
        checkpoint_offload=old.checkpoint_offload,
        optimizer=LEANER_OPTIMIZER.get(old.optimizer, old.optimizer),
        attention="eager" if eager else "sdpa" if old.attention == "eager" else old.attention,
        resident_layers=old.resident_layers,
    )
    return replace(run, recipe="lean", levers=levers)


def split(run: RunSpec, micro: int) -> RunSpec:
    """A smaller micro-batch with more accumulation: their product stays exactly."""
    return replace(run, micro_batch_size=micro, accumulation=run.accumulation * run.micro_batch_size // micro)


def joined(options: list[Option]) -> Option:
    def change(run: RunSpec) -> RunSpec:
        for option in options:
            run = option.change(run)
        return run

    title = " + ".join(option.title for option in options)
    return Option("together", title, change, any(option.changes_training for option in options))


# ------------------------------------------------------------------------------------------------------- command
def command(run: RunSpec) -> str:
    """The `vramplan train` command line that means exactly this run (its driver is always the trainer)."""
    import shlex

    words = ["vramplan", "train", run.model, "--data", run.data.path if run.data else "FILE"]
    words += ["--batch-size", str(run.micro_batch_size), "--accumulation", str(run.accumulation)]
    words += ["--seq-len", str(run.seq_len)]
    words += ["--gpus", str(run.gpus), "--parallel", run.parallel] if run.gpus > 1 else []
    words += _lora_flags(run.lora)
    recipe = run.recipe if run.recipe in RECIPES else "lean"
    words += ["--recipe", recipe] if recipe != "lean" else []
    words += lever_flags(run.levers, RECIPES[recipe])
    words += [] if run.double_quant else ["--no-double-quant"]
    words += ["--padding"] if run.padding else []
    words += ["--packing"] if run.packing else []
    words += ["--model-path", run.model_path] if run.model_path and not run.random_weights else []
    words += ["--trust-remote-code"] if run.trust_remote_code else []
    words += ["--random-weights"] if run.random_weights else []
    if run.data is not None:
        words += _differing(run.data, DATA_FLAGS)
        words += [word for name in ("assistant_only_loss", "completion_only_loss") if not getattr(run.data, name)
                  for word in ("--no-" + name.replace("_", "-"),)]  # fmt: skip
    words += _differing(run.schedule, {f: "--" + f.replace("_", "-") for f in Schedule.__dataclass_fields__})
    return " ".join(shlex.quote(word) for word in words)


def _lora_flags(lora: Lora) -> list[str]:
    words = _differing(lora, {"r": "--lora-r", "alpha": "--lora-alpha", "dropout": "--lora-dropout"})
    return words if lora.targets == ("all-linear",) else [*words, "--lora-targets", ",".join(lora.targets)]


def _differing(value: Any, flags: dict[str, str]) -> list[str]:
    """Flags of the fields that do not have their default."""
    fields = value.__dataclass_fields__
    given = (
        (flag, getattr(value, name)) for name, flag in flags.items() if getattr(value, name) != fields[name].default
    )
    return [word for flag, setting in given for word in _flag(flag, setting)]


def _flag(flag: str, setting: Any) -> list[str]:
    if setting is True:
        return [flag]
    return [flag, ",".join(setting) if isinstance(setting, tuple) else str(setting)]
