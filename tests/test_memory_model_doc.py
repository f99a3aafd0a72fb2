"""docs/memory-model.md, read beside played steps: its tables must hold, and name every large tensor."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from measured import h200, model

from vramplan.core import architecture as arch
from vramplan.core import fused
from vramplan.core.expandable import allocator
from vramplan.core.ledger import NO_CARD
from vramplan.core.loss import chunk_tokens
from vramplan.core.tape import GRANULE
from vramplan.core.timeline import Step
from vramplan.core.types import GpuProfile, Levers, Lora, ModelSpec, RunSpec
from vramplan.core.varlen import documents

PAGE = Path(__file__).parent.parent / "docs" / "memory-model.md"
DTYPES = {"bf16": "bfloat16", "float32": "float32", "int64": "int64", "bool": "bool", "uint8": "uint8"}
Linears = list[tuple[str, dict[str, int]]]  # name, and the letters that are its own

PLAIN = Levers(loss="full", checkpointing="none", optimizer="adamw_torch", allocator="native", kernels="stock")
FUSED = replace(PLAIN, kernels="fused")
SHAPES = {"llama-3.1-8b": (2, 1024), "qwen2.5-0.5b": (3, 700), "qwen3-0.6b": (2, 1100)}
RUNS: dict[str, tuple[dict[str, Any], GpuProfile]] = {
    "plain": ({"levers": PLAIN}, NO_CARD),
    "cudnn": ({"levers": PLAIN, "lora": Lora(r=8)}, h200()),
    "upcast": ({"levers": replace(PLAIN, upcast="all"), "lora": Lora(dropout=0.1)}, NO_CARD),
    "fused loss": ({"levers": replace(PLAIN, loss="fused"), "lora": Lora(dropout=0.1)}, NO_CARD),
    "fused loss, upcast": ({"levers": replace(PLAIN, loss="fused", upcast="all"), "driver": "loop"}, NO_CARD),
    "eager": ({"levers": replace(PLAIN, attention="eager", optimizer="adafactor")}, NO_CARD),
    "padded": ({"levers": PLAIN, "padding": True}, NO_CARD),
    "packed": ({"levers": PLAIN, "packing": True}, NO_CARD),
    "checkpoints": ({"levers": replace(PLAIN, checkpointing="all"), "accumulation": 2}, NO_CARD),
    "offloaded": ({"levers": replace(PLAIN, checkpointing="all", checkpoint_offload=True, upcast="all")}, NO_CARD),
    "fused": ({"levers": FUSED}, NO_CARD),
    "fused, cudnn": ({"levers": FUSED, "lora": Lora(r=8), "driver": "loop"}, h200()),
    "fused, fused loss": ({"levers": replace(FUSED, loss="fused")}, NO_CARD),
    "fused, eager": ({"levers": replace(FUSED, attention="eager")}, NO_CARD),
    "fused, checkpoints": ({"levers": replace(FUSED, checkpointing="all"), "accumulation": 2}, NO_CARD),
    "fused, offloaded": ({"levers": replace(FUSED, checkpointing="all", checkpoint_offload=True)}, NO_CARD),
}
EXPERTS = {"mixtral-8x7b": (2, 1024), "qwen3-30b-a3b": (3, 700)}
CASES = [(name, shape, key) for key in RUNS for name, shape in SHAPES.items()]
CASES += [(name, shape, "plain") for name, shape in EXPERTS.items()]
CASES += [("llama-2-7b", (2, 1024), "cudnn")]  # as many key heads as query heads
CASES += [("llama-3.1-70b", (2, 1024), "fused")]  # weights too large to be dequantised in one piece


# ------------------------------------------------------------------------------------------------------ the page
@dataclass
class Row:
    """One row of a table of tensors, and what was seen of it."""

    table: str
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    formulas: tuple[str, ...]
    born: tuple[str, ...]
    dies: tuple[str, ...]
    seen: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def where(self) -> str:
        return f"{self.table}: {', '.join(self.names)}"

    @cached_property
    def needs_linear(self) -> bool:
        """Whether its formulas are those of one Linear, or of its group."""
        return bool(set(re.findall(r"\b[iosGO]\b", " ".join(self.formulas))))

    def speaks_of(self, fused_layers: bool) -> bool:
        """Whether the row's table is about such layers: those of one kind of layer say so in their heading."""
        return not self.table.startswith("Stock layers" if fused_layers else "Fused layers")


def tables() -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(heading, columns, rows of cells) of every table of the page."""
    heading = ""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for at, line in enumerate(lines):
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if set(line) <= set("|-") and line.startswith("|-"):
            cells = []
            for row in lines[at + 1 :]:
                if not row.startswith("|"):
                    break
                cells.append([cell.strip() for cell in row.strip("|").split("|")])
            yield heading, [cell.strip() for cell in lines[at - 1].strip("|").split("|")], cells


def alternatives(cell: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in cell.split(" or "))


@cache
def page() -> list[Row]:
    return [
        Row(heading, tuple(re.findall(r"`([^`]+)`", cells[0])), *map(alternatives, cells[1:5]))
        for heading, columns, rows in tables()
        if columns[:5] == ["tensor", "dtype", "bytes", "born", "dies"]
        for cells in rows
    ]


@cache
def compiled(formula: str) -> CodeType:
    text = formula.replace("·", "*").replace("/", "//")
    return compile(re.sub(r"ceil\((\w+(?:\*\w+)*)//(\w+)\)", r"-(-(\1)//\2)", text), formula, "eval")


def value(formula: str, letters: dict[str, int]) -> int:
    """A formula of the page in numbers."""
    return int(eval(compiled(formula), {"__builtins__": {}}, letters))


# ------------------------------------------------------------------------------------------------- a played step
@dataclass(frozen=True)
class Seen:
    """A kind of tensor in a played step; bytes are not rounded."""

    name: str
    dtype: str
    bytes: int
    rounded: int
    born: str
    dies: str


def played(spec: ModelSpec, run: RunSpec, gpu: GpuProfile) -> set[Seen]:
    step = Step(spec, run, gpu)
    step.play()
    rec = step.rec
    phases: dict[int, list[str]] = defaultdict(lambda: ["", "stays"])
    marks, phase = list(rec.marks), ""
    for at, event in enumerate(rec.events):
        while marks and marks[0][0] <= at:
            phase = marks.pop(0)[1].partition(" ")[0]
        phases[abs(event)][event < 0] = phase
    sizes = {**dict.fromkeys(("float32", "int32"), 4), "bfloat16": 2, "int64": 8, "uint8": 1, "bool": 1}
    return {
        Seen(name, dtype, rows * columns * sizes[dtype], size, *phases[ident])
        for ident, (_, name, rows, columns, dtype, size) in enumerate(rec.info)
        if ident
    }


def letters_of(spec: ModelSpec, run: RunSpec) -> dict[str, int]:
    batch, seq, wide = run.micro_batch_size, run.seq_len, 4 if run.levers.upcast == "all" else 2
    labelled = batch * (seq - 1)
    return {
        "B": batch, "S": seq, "T": batch * seq, "H": spec.hidden_size, "I": spec.intermediate_size,
        "V": spec.vocab_size, "h": spec.num_heads, "g": spec.num_kv_heads, "D": spec.head_dim,
        "A": arch.query_width(spec), "K": arch.key_width(spec), "r": run.lora.r, "w": wide, "P": labelled,
        "c": (chunk := chunk_tokens(labelled, spec.hidden_size, spec.vocab_size, fused.is_fused(spec, run))),
        "u": labelled % chunk or chunk, "F": sum(rows * columns for rows, columns in fused.lora_shapes(spec, run.lora)),
        "E": spec.num_experts, "k": spec.num_experts_per_token,
        "J": spec.moe_intermediate_size or spec.intermediate_size,
        "R": batch * seq * spec.num_experts_per_token, "d": documents(batch, seq),
    }  # fmt: skip


def letters_of_linears(spec: ModelSpec) -> Linears:
    """(Linear, the letters of it and of its group), once for each size of a slice of it."""
    linears, out = {x.short: x for x in arch.layer_linears(spec)}, []
    for group in fused.groups(spec):
        together = {"G": len(group), "O": sum(linears[name].out_features for name in group)}
        for x in (linears[name] for name in group):
            for rows in {stop - start for start, stop in fused.slices(x.out_features, x.in_features)}:
                out.append((x.short, {"i": x.in_features, "o": x.out_features, "s": rows, **together}))
    return out


def matches(row: Row, name: str, linears: Linears) -> Iterator[dict[str, int]]:
    """The letters of a Linear with which a row speaks of this name; {} where it needs none."""
    for pattern in row.names:
        if pattern == name and not row.needs_linear:
            yield {}
        elif "{l}" in pattern or row.needs_linear:
            yield from (own for short, own in linears if pattern.replace("{l}", short) == name)


def holds(row: Row, tensor: Seen, linears: Linears, letters: dict[str, int], strict: bool) -> bool:
    """Whether the row states this tensor; notes which of its alternatives did."""
    stream = {**DTYPES, "stream": "float32" if letters["w"] == 4 else "bfloat16"}
    for own in matches(row, tensor.name, linears):
        dtypes = [d for d in row.dtypes if stream[d] == tensor.dtype]
        formulas = [f for f in row.formulas if fits(f, {**letters, **own}, tensor)]
        if dtypes and formulas and (not strict or (tensor.born in row.born and tensor.dies in row.dies)):
            row.seen["dtype"].update(dtypes)
            row.seen["bytes"].update(formulas)
            row.seen["strict" if strict else "loose"].add(f"{tensor.born}, {tensor.dies}")
            return True
    return False


def fits(formula: str, letters: dict[str, int], tensor: Seen) -> bool:
    return value(formula, letters) == tensor.bytes and tensor.rounded == -(-tensor.bytes // GRANULE) * GRANULE


def named(rows: list[Row], name: str, linears: Linears) -> bool:
    """Whether the table of fused layers speaks of this name: then it must be right about small ones, too."""
    return any(row.table == "Fused layers" and any(True for _ in matches(row, name, linears)) for row in rows)


@cache
def played_case(name: str, shape: tuple[int, int], key: str) -> tuple[ModelSpec, RunSpec, set[Seen]]:
    spec = replace(model(name), num_layers=2)
    changes, gpu = RUNS[key]
    run = RunSpec(model=name, micro_batch_size=shape[0], seq_len=shape[1], **changes)
    return spec, run, played(spec, run, gpu)


@cache
def compared() -> dict[str, list[str]]:
    """What every case has that no row states; the rows note what they were seen with."""
    out = {}
    for name, shape, key in CASES:
        spec, run, seen = played_case(name, shape, key)
        letters, strict = letters_of(spec, run), run.levers.checkpointing == "none"
        linears, rows = letters_of_linears(spec), [r for r in page() if r.speaks_of(fused.is_fused(spec, run))]
        missing = []
        for tensor in sorted(seen, key=lambda t: t.name):
            stated = [holds(row, tensor, linears, letters, strict) for row in rows]
            if not any(stated) and (tensor.bytes >= letters["T"] * letters["H"] or named(rows, tensor.name, linears)):
                missing.append(f"{tensor}")
        out[f"{name}, {key}"] = missing
    return out


# --------------------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize("case", [f"{name}, {key}" for name, _, key in CASES])
def test_every_large_tensor_is_on_the_page(case):
    assert compared()[case] == []


def test_every_statement_of_the_page_occurs():
    compared()
    wrong = []
    for row in page():
        phases = row.seen["strict"] or row.seen["loose"]
        seen = {
            "dtype": row.seen["dtype"],
            "bytes": row.seen["bytes"],
            "born": {p.split(", ")[0] for p in phases},
            "dies": {p.split(", ")[1] for p in phases},
        }
        for what, stated in (("dtype", row.dtypes), ("bytes", row.formulas), ("born", row.born), ("dies", row.dies)):
            wrong += [f"{row.where()}: {what} {s} does not occur" for s in stated if s not in seen[what]]
    assert wrong == []


def test_every_name_of_the_page_occurs():
    compared()
    names = {t.name for case in CASES for t in played_case(*case)[2]}
    shorts = [x.short for name in (*SHAPES, *EXPERTS) for x in arch.layer_linears(model(name))]
    stated = [n for row in page() for n in row.names]
    assert [n for n in stated if not names & {n.replace("{l}", short) for short in shorts}] == []


@pytest.mark.parametrize("size", [1, 512, 513, 2**20, 2**20 + 1, 9 * 2**20 + 5, 10 * 2**20, 11 * 2**20 - 700,
                                  13 * 2**20 + 1, 20 * 2**20, 47 * 2**20 + 3])  # fmt: skip
@pytest.mark.parametrize("kind", ["native", "expandable"])
def test_the_allocator_table(kind, size):
    rows = next(rows for _, columns, rows in tables() if columns[0] == "request")
    memory = allocator(kind)
    memory.malloc(size)
    found = []
    for request, allocated, native, expandable, _ in rows:
        bounds, _, only = request.partition(",")
        if only.strip() in ("", kind) and eval(bounds.replace("≤", "<="), {"Q": size}):
            reserved = value(native if kind == "native" else expandable, {"Q": size})
            found.append((reserved, [value(f, {"Q": size}) for f in alternatives(allocated)]))
    ((reserved, allocated),) = found
    assert memory.reserved == reserved
    assert memory.allocated == (allocated[-1] if allocated[-1] - allocated[0] <= 2**20 else allocated[0])


def test_letters_are_explained():
    legend = {letter.strip() for _, columns, rows in tables() if columns[0] == "letter" for row in rows
              for letter in row[0].split(",")}  # fmt: skip
    used = {c for row in page() for f in row.formulas for c in re.findall(r"\b[A-Za-z]\b", f)}
    assert used - legend - {"A", "K", "R"} == set()  # these three are defined in terms of others


@pytest.mark.parametrize(("key", "name"), [("plain", "activation"), ("fused", "norm again")])
def test_a_wrong_formula_is_found(key, name):
    """The comparison can fail: another size, dtype or phase is not what was played."""
    spec, run, every = played_case("llama-3.1-8b", SHAPES["llama-3.1-8b"], key)
    seen = next(t for t in every if t.name == name)
    rows = [r for r in page() if name in r.names]
    linears, letters = letters_of_linears(spec), letters_of(spec, run)
    assert any(holds(r, seen, linears, letters, True) for r in rows)
    for change in ({"formulas": ("T·r",)}, {"dtypes": ("float32",)}, {"born": ("optimizer",)}, {"dies": ("stays",)}):
        assert not any(holds(replace(r, **change), seen, linears, letters, True) for r in rows)
