"""The import law of the house, read from the syntax tree of every file, and checked on real processes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "vramplan"
TORCH_STACK = {
    "torch", "transformers", "bitsandbytes", "peft", "accelerate", "datasets", "safetensors", "tokenizers",
    "liger_kernel", "gguf", "numpy", "pyarrow", "huggingface_hub", "sentencepiece", "jinja2",
}  # fmt: skip


@dataclass(frozen=True)
class Room:
    """What the files of one room may import: modules of ours (with all below them), and third-party packages.

    `lazily` are third-party packages that only a function may import.
    """

    ours: tuple[str, ...]
    third_party: frozenset[str] = frozenset()
    lazily: frozenset[str] = frozenset()


WITH_TORCH = ("vramplan.core", "vramplan.sources.records", "vramplan.errors")
ROOMS = {
    "core": Room(ours=("vramplan.core",)),
    "sources": Room(
        ours=("vramplan.core", "vramplan.sources", "vramplan.errors"),
        lazily=frozenset({"huggingface_hub", "tomli", "yaml"}),
    ),
    "sources/gpu.py": Room(
        ours=("vramplan.core", "vramplan.sources", "vramplan.errors"), lazily=frozenset({"pynvml"})
    ),
    "report": Room(
        ours=("vramplan.core", "vramplan.errors", "vramplan.report"), third_party=frozenset({"rich"})
    ),
    "launch": Room(ours=("vramplan.core", "vramplan.sources", "vramplan.errors", "vramplan.launch")),
    # trace plays what train does: loss, layers and the attention of packed rows are the trainer's own
    "trace": Room(
        ours=(*WITH_TORCH, "vramplan.trace", *(f"vramplan.train.{name}" for name in ("fused_loss", "fast", "varlen"))),
        third_party=frozenset(TORCH_STACK),
    ),
    "train": Room(ours=(*WITH_TORCH, "vramplan.train"), third_party=frozenset(TORCH_STACK)),
    # what goes into somebody else's trainer reads its model and explains its end itself: no launcher does it
    "train/callback.py": Room(
        ours=(*WITH_TORCH, "vramplan.train", "vramplan.sources", "vramplan.report.compare"),
        third_party=frozenset(TORCH_STACK),
    ),
    "train/observed.py": Room(
        ours=(*WITH_TORCH, "vramplan.train", "vramplan.sources"), third_party=frozenset(TORCH_STACK)
    ),
    "train/fast/triton_kernels.py": Room(
        ours=("vramplan.core", "vramplan.train.fast"), third_party=frozenset({"torch", "triton", "bitsandbytes"})
    ),
    "cli": Room(
        ours=("vramplan.core", "vramplan.errors", "vramplan.sources", "vramplan.report", "vramplan.launch",
              "vramplan.cli"),
        third_party=frozenset({"click"}),
    ),
    "errors.py": Room(ours=()),
    "__init__.py": Room(ours=("vramplan.core", "vramplan.sources", "vramplan.errors", "vramplan.train.callback")),
    "__main__.py": Room(ours=("vramplan.cli",)),
}  # fmt: skip


def room_of(path: str) -> Room:
    """The rule for a path relative to the package: the file's own if it has one, else its folder's."""
    return ROOMS.get(path) or ROOMS[path.partition("/")[0]]


def imports(tree: ast.Module, path: str) -> Iterator[tuple[str, bool, int]]:
    """(absolute module name, inside a function or for type checking only, line) of every import in a file."""
    parts = ("vramplan", *Path(path).with_suffix("").parts)
    package = parts[:-1]

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool, int]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, lazy, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield (inner if is_module(inner) else module), lazy, node.lineno
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            lazy = True
        for child in ast.iter_child_nodes(node):
            yield from walk(child, lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    yield from walk(tree, False)


def is_module(name: str) -> bool:
    if not name.startswith("vramplan."):
        return False
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def broken(source: str, path: str) -> list[str]:
    """Every import in `source`, as the file `path`, that the law forbids."""
    room = room_of(path)
    found = []
    for name, lazy, line in imports(ast.parse(source), path):
        top = name.partition(".")[0]
        if top == "vramplan":
            fine = name == "vramplan" or any(name == ours or name.startswith(ours + ".") for ours in room.ours)
        elif top in sys.stdlib_module_names:
            fine = True
        else:
            fine = top in room.third_party or (lazy and top in room.lazily)
        if not fine:
            found.append(f"{path}:{line} imports {name}")
    return found


FILES = sorted(str(path.relative_to(PACKAGE).as_posix()) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_law(path: str) -> None:
    assert broken((PACKAGE / path).read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/x.py", "import click"),
        ("core/x.py", "from vramplan.errors import InputError"),
        ("core/x.py", "from ..sources import records"),
        ("core/x.py", "def f():\n    import numpy"),
        ("sources/x.py", "def f():\n    import pynvml"),
        ("sources/gpu.py", "import pynvml"),
        ("sources/x.py", "import huggingface_hub"),
        ("sources/x.py", "from vramplan.report import tables"),
        ("report/x.py", "import click"),
        ("report/x.py", "from vramplan.sources.records import encode"),
        ("launch/x.py", "def f():\n    import rich.console"),
        ("launch/x.py", "from vramplan.train import tiny"),
        ("cli/x.py", "import rich"),
        ("cli/x.py", "def f():\n    from vramplan.train.tiny import main"),
        ("cli/x.py", "from vramplan import train"),
        ("train/x.py", "from vramplan.sources.gpu import live_gpu"),
        ("trace/x.py", "from vramplan.train import load"),
    ],
)
def test_the_law_can_be_broken(path: str, source: str) -> None:
    assert broken(source, path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/x.py", "from .types import Line\nimport heapq"),
        ("sources/gpu.py", "def f():\n    import pynvml"),
        ("report/x.py", "from rich.table import Table"),
        ("train/x.py", "import torch\nfrom vramplan.sources import records"),
        ("cli/x.py", "import click\nfrom vramplan import __version__"),
    ],
)
def test_the_law_allows_what_it_should(path: str, source: str) -> None:
    assert broken(source, path) == []


# ------------------------------------------------------------------------------------------------- real processes
def loaded_by(code: str) -> tuple[set[str], set[str]]:
    """(all modules, third-party packages) that `code` loads in a fresh interpreter, beyond what its start loads."""
    end = "import json\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    script = f"import sys\nbefore = set(sys.modules)\n{code}\n{end}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    modules = set(json.loads(done.stdout.splitlines()[-1]))
    tops = {name.partition(".")[0] for name in modules}
    known = set(sys.stdlib_module_names) | {"vramplan"}
    return modules, {name for name in tops - known if not name.startswith("_")}


def light_modules() -> list[str]:
    names = []
    for path in FILES:
        if path.startswith(("train/", "trace/")) or path == "__main__.py":
            continue
        parts = [part for part in Path(path).with_suffix("").parts if part != "__init__"]
        names.append(".".join(("vramplan", *parts)))
    return names


def test_no_light_module_imports_more_than_its_face_needs() -> None:
    names = light_modules()
    inner = [name for name in names if not name.startswith(("vramplan.cli", "vramplan.report"))]
    assert loaded_by(f"import {', '.join(inner)}")[1] == set()
    assert loaded_by(f"import {', '.join(name for name in names if 'vramplan.cli' in name)}")[1] == {"click"}
    rich = loaded_by(f"import {', '.join(name for name in names if 'vramplan.report' in name)}")[1]
    assert rich <= {"rich", "pygments", "markdown_it", "mdurl"} and "rich" in rich


def run_cli(*words: str) -> str:
    return f"from vramplan.__main__ import main\nassert main({list(words)!r}) == 0"


HEAVY = TORCH_STACK | {"pynvml", "tomli"}


@pytest.mark.parametrize("flags", [(), ("--gpu", "rtx-4090")])
def test_estimate_imports_neither_torch_nor_anything_heavy(flags: tuple[str, ...]) -> None:
    modules, packages = loaded_by(run_cli("estimate", "llama-2-7b", *flags))
    assert packages & HEAVY == set()
    assert {"click", "rich"} <= packages
    lazy = {"rich.progress", "rich.live", "subprocess", "tempfile", "urllib.request", "importlib.metadata", "traceback"}
    assert modules & lazy == set()


def test_json_does_without_rich() -> None:
    assert loaded_by(run_cli("estimate", "llama-2-7b", "--json"))[1] == {"click"}
    assert loaded_by(run_cli("models", "--json"))[1] == {"click"}
