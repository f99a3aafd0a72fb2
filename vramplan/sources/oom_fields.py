"""One out-of-memory message -> its kind and its numbers.

All patterns run on the message without any white space: terminals and logs break lines inside words and numbers. The
wording is that of torch 1.13 to 2.15 (c10/cuda/CUDACachingAllocator.cpp, CUDAMallocAsyncAllocator.cpp) and of the
libraries around it. Each clause stands alone, so that any order and any truncation leaves what is whole.
"""

from __future__ import annotations

import re
from typing import Any

from vramplan.core.types import GpuProcess
from vramplan.core.units import parse_size

UNKNOWN_BYTES = 2**63  # WSL shows 2^64 bytes, 17179869184.00 GiB, for "the driver does not say"

_SIZE = r"(\d{1,20}(?:\.\d{1,9})?(?:bytes|[KMGT]i?B|B))"

# kind -> what its message holds. The first that matches decides; torch's text with numbers comes first.
KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("host", re.compile(r"DefaultCPUAllocator:(?:can'tallocatememory|notenoughmemory)", re.I)),
    ("shm", re.compile(r"insufficientsharedmemory\(shm\)|workersareoutofsharedmemory|unabletowritetofile</torch_",
                       re.I)),
    ("vllm", re.compile(r"ValueError:(?:Noavailablememoryforthecacheblocks|.{0,400}largerthan(?:theavailableKVcache"
                        r"memory|themaximumnumberoftokensthatcanbestoredinKVcache))", re.I)),
    ("torch", re.compile(rf"TriedtoAllocate(?:{_SIZE}|morethan1EBmemory)", re.I)),
    ("torch", re.compile(r"Allocationwaspreemptivelyrejected|exceedper_process_memory_fraction", re.I)),
    ("cudaMallocAsync", re.compile(r"Allocationondevice\d*wouldexceedallowedmemory", re.I)),
    ("bitsandbytes", re.compile(r"Erroroutofmemoryatline\d+infile", re.I)),
    ("triton", re.compile(r"TritonError\[(?:CUDA|HIP)\]:outofmemory", re.I)),
    ("nccl", re.compile(r"NCCL.{0,200}(?:Cudafailure\d*'outofmemory'|FailedtoCUDAcalloc)|Cudafailure\d*'outofmemory'",
                        re.I)),
    ("cublas", re.compile(r"CU(?:BLAS|SPARSE|SOLVER)_STATUS_ALLOC_FAILED")),
    ("cudnn", re.compile(r"CUDNN_STATUS_(?:ALLOC_FAILED|INTERNAL_ERROR)")),
    ("cuda", re.compile(r"(?:CUDA|HIP)(?:driver|runtime)?error(?:\(\d+\))?:outofmemory|CUDA_ERROR_OUT_OF_MEMORY|"
                        r"cudaErrorMemoryAllocation|hipErrorOutOfMemory|cudafailedwitherror2outofmemory|"
                        r"UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY", re.I)),
    ("torch", re.compile(r"\A(?:[\w.]*(?:Error|Exception):)?(?:CUDA|HIP|XPU)outofmemory", re.I)),
    ("torch", re.compile(r"\A(?:torch\.)?(?:cuda\.)?OutOfMemoryError(?::|\Z)")),
    ("host", re.compile(r"exit(?:s|ed)?(?:with)?(?:return|status)?(?:code|status)[:=]?\(?(?:-9|137)\b|"
                        r"<Signals\.SIGKILL|Signal9\(SIGKILL\)|Outofmemory:Killedprocess|oom[-_]kill|OOMKilled(?!\W*false)|"
                        r"systemd-oomd(?:\[\d+\]:)?Killed|lowonresource:memory|runninglowonmemory|"
                        r"iskilledbysignal:Killed|pagingfileistoosmall|Cannotallocatememory|\AMemoryError(?::|\Z)|"
                        r"ArrayMemoryError:|\AKilled\Z|line\d+:\d+Killed", re.I)),
)  # fmt: skip

# Told by what ended the process, not by what asked for memory; the log may say it better elsewhere.
WEAK = re.compile(r"CUDNN_STATUS_INTERNAL_ERROR|exit|SIGKILL|\AKilled|Killed\Z|bysignal:Killed", re.I)

_PATTERNS = {
    "requested_bytes": (rf"TriedtoAllocate{_SIZE}", rf"Requestedsize:?{_SIZE}", rf"Requested:{_SIZE}",
                        rf"FailedtoCUDAcalloc(?:async)?{_SIZE}", rf"Unabletoallocate{_SIZE}",
                        rf"{_SIZE}KVcacheisneeded"),
    "total_bytes": (rf"totalcapaci?tyof{_SIZE}", rf";{_SIZE}totalcapacity", rf"Devicelimit:{_SIZE}"),
    "free_bytes": (rf"ofwhich{_SIZE}", rf";{_SIZE}free", rf"Free\(accordingtoCUDA\):{_SIZE}",
                   rf"availableKVcachememory\({_SIZE}"),
    "process_bytes": (rf"thisprocesshas{_SIZE}",),
    "allowed_bytes": (rf"{_SIZE}allowed;", rf"PyTorchlimit\([^)]*\):{_SIZE}"),
    "allocated_bytes": (rf"Oftheallocatedmemory{_SIZE}", rf";{_SIZE}alreadyallocated", rf"Currentlyallocated:{_SIZE}"),
    "private_pools_bytes": (rf"with{_SIZE}allocatedinprivatepools",),
    "reserved_unallocated_bytes": (rf",and{_SIZE}isreservedbyPyTorchbut", rf",and{_SIZE}\Z", rf";{_SIZE}cached\)"),
}  # fmt: skip
_FIELDS = {name: tuple(re.compile(p, re.I) for p in patterns) for name, patterns in _PATTERNS.items()}
_RESERVED = re.compile(rf";{_SIZE}reservedintotal", re.I)
_OTHERS = re.compile(rf"Process(\d{{1,10}})has{_SIZE}", re.I)
_GPU = re.compile(r"GPU(\d{1,4})hasatotal|\(GPU(\d{1,4});|ondevice(\d{1,4})would", re.I)
_REQUEST = re.compile(r"Triedtoallocate", re.I)
_NEVER_ZERO = ("process_bytes", "total_bytes", "requested_bytes")
MAX_OTHERS = 64


def kind_of(compact: str) -> str | None:
    """Who wrote this message (white space removed), or None if it reports no lack of memory."""
    return next((kind for kind, pattern in KINDS if pattern.search(compact)), None)


def numbers(compact: str) -> dict[str, Any]:
    """The fields of `OomEvidence` that a message (white space removed) holds; sizes in bytes, unknown ones None."""
    requests = [match.start() for match in _REQUEST.finditer(compact)]
    compact = compact[: requests[1]] if len(requests) > 1 else compact  # the next rank's message, glued to this one
    found: dict[str, Any] = {name: _first(compact, patterns) for name, patterns in _FIELDS.items()}
    for name in _NEVER_ZERO:
        found[name] = found[name] or None
    reserved, allocated = _first(compact, (_RESERVED,)), found["allocated_bytes"]
    if reserved is not None and allocated is not None:  # torch up to 2.0 gives the total instead
        found["reserved_unallocated_bytes"] = max(reserved - allocated, 0)
    gpu = _GPU.search(compact)
    found["gpu_index"] = int(next(filter(None, gpu.groups()))) if gpu else None
    found["others"] = tuple(
        GpuProcess(pid=int(pid), used_bytes=size(text) or None) for pid, text in _OTHERS.findall(compact)[:MAX_OTHERS]
    )
    return found


def _first(compact: str, patterns: tuple[re.Pattern[str], ...]) -> int | None:
    for pattern in patterns:
        match = pattern.search(compact)
        if match is not None:
            return size(match[1])
    return None


def size(text: str) -> int | None:
    """ "1.25GiB" -> bytes, by the unit's own meaning; None for what no card has."""
    value = parse_size(text)
    return value if value < UNKNOWN_BYTES else None
