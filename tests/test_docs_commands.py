"""The commands that README and docs show are run here as they stand; what needs a card, the Hub or hours is parsed."""

from __future__ import annotations

import gzip
import io
import pickle
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from factories import make_plan
from snapshot_tools import out_of_memory

from vramplan.cli import COMMANDS, root, run
from vramplan.core.types import RunSpec
from vramplan.errors import InputError
from vramplan.sources.records import write_json

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# these reach for a card, the Hub or a training process: only their flags are looked at
PARSED = {"train", "measure", "calibrate", "run", "quickstart", "merge", "watch", "check"}
PARSED_FLAGS = {"--probe", "--verify"}
OTHER_CODES = {  # what the page says of them: the lock has risen, a card is too small
    "vramplan lock --check vramplan.lock": 5,
    "vramplan estimate llama-65b --seq-len 512 --gpu rtx-4090 --gpu rtx-a6000": 3,
    "vramplan estimate llama-3.1-8b --recipe peft --gpu rtx-3060-12gb --timeline": 3,
    "vramplan estimate llama-3.1-8b --seq-len 16384 --gpu rtx-4060 --gpu rtx-3060-12gb --gpu rtx-4090 --gpu h100-80gb"
    " --price rtx-4090=0.35 --price h100-80gb=2": 3,
}

REPORT = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 352.00 MiB. GPU 0 has a total capacity of 6.00 GiB "
    "of which 100.00 MiB is free. Including non-PyTorch memory, this process has 2.40 GiB memory in use.\n"
)
QLORA = """\
base_model: meta-llama/Llama-3.1-8B
load_in_4bit: true
adapter: qlora
lora_r: 32
lora_target_linear: true
sequence_len: 8192
micro_batch_size: 2
gradient_accumulation_steps: 4
gradient_checkpointing: true
eager_attention: true
bf16: true
optimizer: paged_adamw_8bit
"""


@dataclass(frozen=True)
class Shown:
    """One line of a fenced block. What is piped into a command is replaced by the report."""

    page: str
    line: int
    text: str
    piped: bool = False

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def only_parsed(self) -> bool:
        return self.words[1] in PARSED or bool(PARSED_FLAGS & set(self.words))


def shown(page: Path) -> list[Shown]:
    """Of each fenced block the lines that are commands: ours, what is piped into ours, and edits in between."""
    found, fenced = [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        match = re.match(r"\s*(?:\$ )?(?:(.*)\|\s*)?((?:vramplan|sed -i) .*)$", line) if fenced else None
        if match:
            found.append(Shown(page.name, number, match[2].strip(), piped=bool(match[1])))
    return found


def tried() -> list[Any]:
    return [pytest.param(page, id=page.name) for page in PAGES if shown(page)]


def prepare(folder: Path) -> None:
    """What the pages take for granted: logs, a snapshot, a run folder, another trainer's file."""
    for name in ("train.log", "rank0.log"):
        (folder / name).write_text(REPORT)
    (folder / "rank1.log.gz").write_bytes(gzip.compress(REPORT.encode()))
    (folder / "oom.pickle").write_bytes(pickle.dumps(out_of_memory().snapshot(), 4))
    (folder / "qlora.yml").write_text(QLORA)
    (folder / "axolotl.yml").write_bytes((ROOT / "tests" / "configs" / "axolotl.yml").read_bytes())
    mine = folder / "runs" / "my-run"
    mine.mkdir(parents=True)
    plan = make_plan()
    assert isinstance(plan.run, RunSpec)
    write_json(mine / "run.json", plan.run)
    write_json(mine / "plan.json", plan)
    (mine / "log.txt").write_text(REPORT)


def parse(words: list[str]) -> click.Context:
    """Click's own parser, with nothing run: raises on a flag or a value that is none."""
    command = root.get_command(click.Context(root), words[1])
    assert command is not None
    return command.make_context(words[1], words[2:])


@pytest.mark.parametrize("page", tried())
def test_the_commands_of_a_page(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in shown(page):
        if command.words[0] == "sed":
            subprocess.run(command.words, check=True, timeout=10)
            continue
        if command.only_parsed:
            parse(command.words)
            continue
        if command.piped:
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(REPORT.encode())))
        code = run(command.words[1:])
        out, err = capsys.readouterr()
        wanted = OTHER_CODES.get(" ".join(command.words), 0)
        assert code == wanted, f"{command.page}:{command.line}: {command.text}\nexit {code}, not {wanted}\n{err}{out}"
        assert out, f"{command.page}:{command.line}: {command.text} says nothing"


def test_all_that_pages_show_is_seen() -> None:
    """A pattern that finds no command would let every page pass."""
    found = {page.name: len(shown(page)) for page in PAGES}
    assert found["cli.md"] >= 6
    assert found["oom-playbook.md"] >= 7
    assert found["concepts.md"] >= 2
    assert {command.piped for page in PAGES for command in shown(page)} == {True, False}


def test_a_misspelt_flag_is_seen() -> None:
    with pytest.raises(InputError, match="--seq-lenn"):
        parse(["vramplan", "measure", "llama-3.1-8b", "--seq-lenn", "4"])


# ------------------------------------------------------------------------------------------- in the running text
def inline(page: Path) -> list[str]:
    """Commands between backticks, outside of fenced blocks; they may go over the end of a line."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [" ".join(text.split()) for text in re.findall(r"`(vramplan [^`]+)`", prose)]


def flags_of(name: str) -> set[str]:
    command = root.get_command(click.Context(root), name)
    assert command is not None
    own = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    return own | {"--help", "--help-all"}


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES if inline(page)])
def test_flags_in_the_text_of_a_page_exist(page: Path) -> None:
    for text in inline(page):
        own = re.sub(r"\[flags of [^]]*\]", "", text.split(" -- ")[0])  # "[flags of estimate, without --gpu]"
        name = own.split()[1]
        assert name in COMMANDS or name.startswith("-"), f"{page.name}: {text}"
        if name in COMMANDS:
            flags = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", own.replace("--[no-]", "--"))
            assert set(flags) <= flags_of(name), f"{page.name}: {text}: {sorted(set(flags) - flags_of(name))}"


def complete() -> list[str]:
    """Those without a placeholder: they name a built-in model."""
    return list(dict.fromkeys(text for page in PAGES for text in inline(page) if " llama-" in text))


@pytest.mark.parametrize("text", complete())
def test_whole_commands_in_the_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(shlex.split(text)[1:])
    out, err = capsys.readouterr()
    assert (code, bool(out)) == (OTHER_CODES.get(text, 0), True), err


# ------------------------------------------------------------------------------------------------- files that are named
NAMED = re.compile(r"`((?:[\w.-]+/)*[\w-]+\.py|(?:vramplan|tests|docs|profiles)/[\w./-]+)`")
LINKED = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def missing(page: Path, text: str) -> list[str]:
    """What a page names that is nowhere: a path from the root or a package, a bare name from any folder of ours."""
    ours = {path.name for folder in ("vramplan", "tests") for path in (ROOT / folder).rglob("*.py")}
    bases = (ROOT, ROOT / "vramplan")
    named = [name for name in NAMED.findall(text) if not any((base / name).exists() for base in bases)]
    linked = [name for name in LINKED.findall(text) if not (page.parent / name).exists()]
    return [name for name in named if name not in ours] + linked


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_files_that_a_page_names_exist(page: Path) -> None:
    assert missing(page, page.read_text(encoding="utf-8")) == []


def test_a_file_that_is_nowhere_is_seen() -> None:
    text = "`vramplan/core/typos.py`, `typos.py`, `core/types.py`, `types.py`, [page](concept.md), [page](cli.md#fit)"
    assert missing(ROOT / "docs" / "data.md", text) == ["vramplan/core/typos.py", "typos.py", "concept.md"]
