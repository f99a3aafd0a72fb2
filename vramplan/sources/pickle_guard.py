"""Reads a pickle of plain values from an untrusted file: nothing is imported, called or allocated beyond its size.

A pickle is a program. This one's instructions are looked at before it runs: only those pass with which `pickle.dump`
writes dicts, lists, texts, small numbers and pairs of numbers. What that keeps out, beside code:

* a memo index of 4 billion (`LONG_BINPUT`), for which C would clear 64 GiB; lengths beyond the end of the file;
* whole numbers of millions of digits, tuples in tuples in tuples, whose hash is a recursion in C that ends the process.
"""

from __future__ import annotations

import gc
import io
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from vramplan.errors import InputError

MAX_BYTES = 4 * 2**30
MAX_OPCODES = 500_000_000  # each puts at most a reference on the stack
MAX_CONTAINERS = 64_000_000  # an empty dict or list is one byte in the file and 64 in memory
RUN_OPCODES = 4096

# Instructions whose length can be told from their first byte: references into the memo, numbers, containers. A pair is
# made of the two small numbers right before it: a memory pool's id. Numbers end at 64 bits, so that few have one hash.
_SMALL = rb"(?:K.|M..|J....)"
_SIZES = (6, 7, 5, 8, 4, 3, 2, 1, 0)  # the likeliest first: addresses and times
_LONG = rb"\x8a(?:%s)" % b"|".join(rb"\x%02x" % size + b"." * size for size in _SIZES)
_ONE = rb"h.|j....|[\x94(esuaN\x88\x89}\])]|%s(?:%s\x86)?|%s|G........|\x95........" % (_SMALL, _SMALL, _LONG)
_RUN = re.compile(rb"(?:%s){1,%d}" % (_ONE, RUN_OPCODES), re.DOTALL)
_SHORT_TEXT, _TEXT, _STOP = b"\x8c", b"X", b"."
_CALLS = b"cRibo\x81\x92\x93\x82\x83\x84PQ"  # what imports, calls, builds objects or asks for those of others


class _Plain(pickle.Unpickler):
    """Knows no class and no function: a second lock behind the first."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError("it names a class or a function")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside of the file")


def load(data: bytes, where: str) -> Any:
    """The plain values in a pickle of protocol 4 or 5. InputError with `where` for anything else."""
    check(data, where)
    try:
        return _Plain(io.BytesIO(data)).load()
    except MemoryError:
        raise InputError(f"{where}: the computer has not enough memory for it") from None
    except Exception as error:  # whatever bytes make the unpickler say: they are the file's fault
        raise InputError(f"{where}: {_reason(error)}") from None


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector of cycles: millions of containers and no cycle, it would double the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def check(data: bytes, where: str) -> None:
    """InputError unless the pickle is made of harmless instructions from its start to its end."""
    if data[:1] != b"\x80" or data[1:2] not in (b"\x04", b"\x05"):
        raise InputError(f"{where}: no pickle of protocol 4 or 5", "write it with torch.cuda.memory._dump_snapshot")
    if data.count(b"}") + data.count(b"]") > MAX_CONTAINERS:
        raise InputError(f"{where}: too many dicts and lists")
    at, size, opcodes = 2, len(data), 0
    while True:
        run = _RUN.match(data, at)
        if run is not None:
            opcodes += min(RUN_OPCODES, run.end() - at)
            at = run.end()
        code = data[at : at + 1]
        if code == _STOP and at == size - 1:
            return
        if code == _SHORT_TEXT and at + 1 < size:
            at += 2 + data[at + 1]
        elif code == _TEXT:
            at += 5 + int.from_bytes(data[at + 1 : at + 5], "little")
        elif run is None:
            raise InputError(f"{where}: {_why(code, size - at)}")
        if at > size:
            raise InputError(f"{where}: it ends in the middle")
        if opcodes > MAX_OPCODES:
            raise InputError(f"{where}: too many instructions")


def _why(code: bytes, left: int) -> str:
    if code and code in _CALLS:
        return "it is a program, which a snapshot never is; it was not run"
    if left < 10 and code in (b"", *(bytes([c]) for c in b"KMJhjG\x95\x8a\x8cX")):
        return "it ends in the middle"
    return "it holds what no snapshot has"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:100]
    return text if text.isprintable() and text else type(error).__name__
