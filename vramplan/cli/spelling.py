"""Command lines as Hugging Face users write them, in our words: other names, underscores, `--flag True`, run files.

Runs before click parses. What the command itself knows always comes first: a name below is looked up only if it does
not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from vramplan.errors import InputError

if TYPE_CHECKING:
    from vramplan.cli.from_file import Origin

# Names of TrainingArguments, SFTConfig, ModelConfig and LoraConfig -> ours.
ALIASES = {
    "--max-seq-length": "--seq-len",
    "--max-length": "--seq-len",
    "--r": "--lora-r",
    "--lora-rank": "--lora-r",
    "--target-modules": "--lora-targets",
    "--lora-target-modules": "--lora-targets",
    "--output-dir": "--output",
    "--attn-implementation": "--attn",
    "--bnb-4bit-use-double-quant": "--double-quant",
    "--use-bnb-nested-quant": "--double-quant",
    "--dataset-name": "--data",
    "--dataset-train-split": "--split",
    "--dataset-text-field": "--text-column",
    "--evaluation-strategy": "--eval-strategy",
}
MODEL = ("--model-name-or-path", "--model-name", "--model")

_TRUE, _FALSE, _ANY = ("true",), ("false",), ()
# What is so anyway: (the values that say it, why). Another value is refused; without any, all are fine.
GIVEN = {
    "--bf16": (_TRUE, "training computes in bf16"),
    "--load-in-4bit": (_TRUE, "the model is always loaded in 4 bits"),
    "--bnb-4bit-quant-type": (("nf4",), "weights are quantised to NF4"),
    "--bnb-4bit-compute-dtype": (("bfloat16", "torch.bfloat16"), "training computes in bf16"),
    "--torch-dtype": (("bfloat16", "auto"), "training computes in bf16"),
    "--dtype": (("bfloat16", "auto"), "training computes in bf16"),
    "--use-peft": (_TRUE, "an adapter is what is trained"),
    "--task-type": (("causal_lm",), "an adapter of a causal language model is what is trained"),
    "--bias": (("none",), "biases are not trained"),
    "--do-train": (_TRUE, "that is what train does"),
    "--do-eval": (_TRUE, "rows that are held out are evaluated"),
    "--logging-first-step": (_TRUE, "the first step is always reported"),
    "--use-liger-kernel": (_TRUE, "--loss fused is what it is for"),
    "--remove-unused-columns": (_ANY, "columns are read by their names"),
    "--eval-accumulation-steps": (_ANY, "evaluation keeps no logits"),
    "--prediction-loss-only": (_TRUE, "evaluation keeps no logits"),
    "--metric-for-best-model": (("eval_loss", "loss"), "the best adapter is that with the lowest held-out loss"),
    "--greater-is-better": (_FALSE, "the best adapter is that with the lowest held-out loss"),
}
# What is not built: (why, what to do instead). `False` after it is no question of ours.
REFUSED = {
    "--push-to-hub": ("nothing is uploaded", "hf upload YOUR/REPOSITORY RUN_DIR/adapter does it"),
    "--hub-model-id": ("nothing is uploaded", "hf upload YOUR/REPOSITORY RUN_DIR/adapter does it"),
    "--fp16": ("training computes in bf16", "leave it out"),
    "--load-in-8bit": ("the model is loaded in 4 bits", "leave it out"),
    "--deepspeed": ("DeepSpeed is not supported", "leave it out"),
    "--neftune-noise-alpha": ("noise on the embeddings is not built", "leave it out"),
    "--label-smoothing-factor": ("the loss does not smooth labels", "leave it out"),
    "--use-dora": ("DoRA is not built", "leave it out"),
    "--use-rslora": ("rank-stabilised scaling is not built", "--lora-alpha sets the scale"),
}
# Flags of other commands that a command has a reason not to have: (command, flag) -> what to do instead.
_CHOSEN = "fit chooses it: --effective-batch-size is what stays"
_OTHERS = "vramplan estimate MODEL --gpu NAME judges others"
ABSENT = {
    **{("fit", flag): _CHOSEN for flag in ("--batch-size", "--per-device-train-batch-size", "--accumulation",
                                           "--gradient-accumulation-steps")},
    ("check", "--gpu"): f"it looks at this machine's card; {_OTHERS}",
    ("measure", "--gpu"): f"it measures on this machine's card; {_OTHERS}",
    ("calibrate", "--gpu"): "it measures this machine's card; --gpu-index says which",
    ("train", "--gpu"): "it trains on this machine; CUDA_VISIBLE_DEVICES says on which card, --gpus N on how many",
    ("gpus", "--gpu"): f"--for MODEL names the cards that hold it; {_OTHERS}",
}  # fmt: skip
_BOOLEANS = (*_TRUE, *_FALSE)
_NOTHING = ("false", "none", "no", "0", "0.0")


class Translation:
    """One command line on its way into our words. `words` is the result, `model` what a file says of MODEL, `origin`
    the file of `--from`, `own` the command line alone, its files unread."""

    def __init__(self, command: click.Command) -> None:
        self.command = command.name or ""
        self.options = {
            name: param
            for param in command.params
            if isinstance(param, click.Option)
            for name in (*param.opts, *param.secondary_opts)
        }
        self.words: list[str] = []
        self.notes: list[str] = []
        self.model: str | None = None
        self._given: set[str] = set()  # canonical names that were written on the command line
        self._files: list[str] = []
        self.origin: Origin | None = None
        self.own: list[str] = []
        self._from: str | None = None

    def read(self, args: Sequence[str]) -> Translation:
        rest = deque(args)
        while rest:
            word = rest.popleft()
            if word == "--":
                self.words += [word, *rest]
                break
            if word.startswith("--"):
                self._flag(word, rest)
            else:
                self.words.append(word)
        self.own = [f"--config={file}" for file in self._files]
        self.own += [] if self._from is None else [f"--from={self._from}"]
        self.own += self.words
        for file in self._files:
            self._read_file(file)
        if self._from is not None:
            self._read_origin(self._from)
        return self

    def _flag(self, word: str, rest: deque[str]) -> None:
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name not in self.options:
            name = ALIASES.get(name, name)
        said = value if equals else None
        if name in self.options:
            self._known(name, said, rest)
        elif name in MODEL:
            self.words.append(("--base=" if "--base" in self.options else "") + _value(name, said, rest))
        elif name == "--resume-from-checkpoint" and "--resume" in self.options:
            self._resume(_value(name, said, rest))
        elif name in GIVEN:
            self._so_anyway(name, said, rest)
        elif name in REFUSED:
            self._refuse(name, said, rest)
        else:
            self.words.append(word)  # click says that there is no such option

    def _known(self, name: str, said: str | None, rest: deque[str]) -> None:
        param = self.options[name]
        self._given.add(param.name or "")
        if name == "--config":
            self._files.append(_value(name, said, rest))
        elif name == "--from":
            path = _value(name, said, rest)
            if path.lower().endswith(".toml"):  # a run file of ours
                self._files.append(path)
            else:
                self._from = path
        elif param.is_flag:
            if said is None and rest and rest[0].lower() in _BOOLEANS:
                said = rest.popleft()
            self.words += _switched(name, param, said)
        else:
            self.words.append(name if said is None else f"{name}={said}")

    def _resume(self, value: str) -> None:
        """transformers takes True or a folder; we go on from the newest checkpoint of a run folder."""
        if value.lower() in _NOTHING:
            return
        if value.rstrip("/").rpartition("/")[2].startswith("checkpoint-"):
            raise InputError(
                "--resume-from-checkpoint takes the run folder, not one checkpoint", "the newest whole one is taken"
            )
        self.words.append("--resume")
        if value.lower() not in _TRUE:
            self.words.append(f"--output={value}")

    def _so_anyway(self, name: str, said: str | None, rest: deque[str]) -> None:
        values, why = GIVEN[name]
        boolean = values in (_TRUE, _FALSE)
        if said is None and rest and (rest[0].lower() in _BOOLEANS or not boolean):
            said = rest.popleft()
        said = "true" if said is None else said
        if values and said.lower() not in values:
            raise InputError(f"{name} {said} is not possible: {why}", f"leave out {name}")
        self.notes.append(f"{name} needs no saying: {why}")

    def _refuse(self, name: str, said: str | None, rest: deque[str]) -> None:
        if said is None and rest and rest[0].lower() in _NOTHING:
            said = rest.popleft()
        if said is None or said.lower() not in _NOTHING:
            why, instead = REFUSED[name]
            raise InputError(f"{name}: {why}", instead)

    # ------------------------------------------------------------------------------------------------ run files
    def _read_file(self, path: str) -> None:
        """Put the file's settings in front; what is on the command line too stays as it is there."""
        from vramplan.sources.run_file import read_run_file

        here, self.words = self.words, []
        for key, value in read_run_file(path).items():
            name = ALIASES.get(f"--{key}", f"--{key}")
            param = self.options.get(name)
            if name in MODEL:
                self.model = str(value)
            elif param is None and name not in GIVEN and name not in REFUSED:
                _check_elsewhere(name, path)
            elif param is None or param.name not in self._given:
                values = value if isinstance(value, list) and param is not None and param.multiple else [value]
                for each in values:
                    text = ",".join(each) if isinstance(each, list) else str(each)
                    self._flag(f"{name}={text}", deque())
        self.words += here

    def _read_origin(self, path: str) -> None:
        """The run of another file in front; what a flag or a run file says too stays as it is there."""
        from vramplan.cli.from_file import read_origin

        self.origin = read_origin(path)
        names = {param.name or "" for param in self.options.values()}
        self.words = [*self.origin.words(self.command, names, self._given), *self.words]
        self.notes += self.origin.notes
        self.model = self.model or self.origin.run.model or None


def _value(name: str, said: str | None, rest: deque[str]) -> str:
    if said is None and not rest:
        raise InputError(f"{name} needs a value")
    return rest.popleft() if said is None else said


def _switched(name: str, param: click.Option, said: str | None) -> list[str]:
    """`--x True`, `--x=False` as `--x`, `--no-x` or nothing."""
    if said is None:
        return [name]
    if said.lower() not in _BOOLEANS:
        raise InputError(f"{name} is true or false, not {said}")
    wanted = (said.lower() in _TRUE) == (name in param.opts)
    names = param.opts if wanted else param.secondary_opts
    return [next(n for n in names if n.startswith("--"))] if names else []


def _check_elsewhere(name: str, path: str) -> None:
    """One file serves estimate, fit and train: a flag of another command is passed over, an unknown one refused."""
    from importlib import import_module

    known = set()
    for command in ("train", "fit", "estimate", "measure"):
        for param in import_module(f"vramplan.cli.{command}").command.params:
            known |= {*param.opts, *param.secondary_opts}
    if name not in known:
        raise InputError(f"{path}: there is no flag {name}", suggestion(name, known))


def suggestion(name: str, known: set[str], command: str | None = None) -> str:
    """What to write instead of a flag that `command` does not know; "" where nothing is near."""
    reason = ABSENT.get((command or "", name.replace("_", "-")))
    if reason is not None:
        return reason
    from vramplan.sources.profiles import suggest

    return suggest(name, sorted({*known, *ALIASES}))
