"""Out-of-memory reports of every dialect: real ones (with where they come from), and ones made from the templates."""

# ruff: noqa: E501 -- quoted texts
from __future__ import annotations

import io
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vramplan.core.diagnose import diagnose
from vramplan.core.types import GpuProcess, OomEvidence
from vramplan.core.units import GIB, MIB
from vramplan.errors import InputError
from vramplan.sources.log_stream import BLOCK_BYTES
from vramplan.sources.oom_text import NEEDLES, SHARED, parse, read_evidence

TORCH_2_11_CAP = (  # measured, torch 2.11, set_per_process_memory_fraction
    "CUDA out of memory. Tried to allocate 176.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which 131.13 GiB is "
    "free. Including non-PyTorch memory, this process has 8.66 GiB memory in use. 8.00 GiB allowed; Of the allocated "
    "memory 7.83 GiB is allocated by PyTorch, and 165.78 MiB is reserved by PyTorch but unallocated. If reserved but "
    "unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  "
    "See documentation for Memory Management  (https://docs.pytorch.org/docs/stable/notes/cuda.html)"
)
NUMBERS = (
    "requested_bytes", "gpu_index", "total_bytes", "free_bytes", "allowed_bytes", "process_bytes", "allocated_bytes",
    "reserved_unallocated_bytes", "private_pools_bytes", "others",
)  # fmt: skip


def gib(x: float) -> int:
    return round(x * GIB)


def mib(x: float) -> int:
    return round(x * MIB)


REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "torch 2.11, cap": (
        TORCH_2_11_CAP,
        {"requested_bytes": mib(176), "gpu_index": 0, "total_bytes": gib(139.80), "free_bytes": gib(131.13),
         "allowed_bytes": gib(8), "process_bytes": gib(8.66), "allocated_bytes": gib(7.83),
         "reserved_unallocated_bytes": mib(165.78)},
    ),
    "torch 2.0, github.com/lm-sys/FastChat/issues/2701": (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 1.25 GiB (GPU 1; 79.10 GiB total capacity; 76.13 GiB "
        "already allocated; 290.12 MiB free; 77.47 GiB reserved in total by PyTorch) If reserved memory is >> allocated "
        "memory try setting max_split_size_mb to avoid fragmentation.",
        {"requested_bytes": gib(1.25), "gpu_index": 1, "total_bytes": gib(79.10), "free_bytes": mib(290.12),
         "allocated_bytes": gib(76.13), "reserved_unallocated_bytes": gib(77.47) - gib(76.13)},
    ),
    "torch before 1.4, github.com/shllln/GenerativeGraph/issues/5": (
        "RuntimeError: CUDA out of memory. Tried to allocate 1024.00 KiB (GPU 0; 11.17 GiB total capacity; 10.90 GiB "
        "already allocated; 576.00 KiB free; 30.96 MiB cached)",
        {"requested_bytes": MIB, "gpu_index": 0, "total_bytes": gib(11.17), "free_bytes": 576 * 1024,
         "allocated_bytes": gib(10.90), "reserved_unallocated_bytes": mib(30.96)},
    ),
    "torch 2.1, github.com/carolchenyx/MGFN./issues/35": (
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.70 GiB. GPU 0 has a total capacty of 6.00 "
        "GiB of which 0 bytes is free. Of the allocated memory 2.93 GiB is allocated by PyTorch, and 2.30 GiB is "
        "reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting max_split_size_mb "
        "to avoid fragmentation.  See documentation for Memory Management and PYTORCH_CUDA_ALLOC_CONF",
        {"requested_bytes": gib(1.70), "gpu_index": 0, "total_bytes": gib(6), "free_bytes": 0,
         "allocated_bytes": gib(2.93), "reserved_unallocated_bytes": gib(2.30)},
    ),
    "torch 2.1 under WSL, github.com/axolotl-ai-cloud/axolotl/issues/998": (
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacty of 24.00 "
        "GiB of which 0 bytes is free. Including non-PyTorch memory, this process has 17179869184.00 GiB memory in use. "
        "Process 2954422 has 17179869184.00 GiB memory in use. Of the allocated memory 23.01 GiB is allocated by PyTorch, "
        "and 121.23 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting "
        "max_split_size_mb to avoid fragmentation.",
        {"requested_bytes": mib(20), "gpu_index": 0, "total_bytes": gib(24), "free_bytes": 0,
         "allocated_bytes": gib(23.01), "reserved_unallocated_bytes": mib(121.23),
         "others": (GpuProcess(pid=2954422),)},
    ),
    "torch 2.4 to 2.5, private pools, github.com/vllm-project/vllm/issues/15039": (
        "(VllmWorkerProcess pid=486731) ERROR 03-19 10:55:18 [multiproc_worker_utils.py:242] torch.OutOfMemoryError: CUDA "
        "out of memory. Tried to allocate 128.00 MiB. GPU 2 has a total capacity of 79.33 GiB of which 16.00 MiB is free. "
        "Process 37008 has 79.29 GiB memory in use. Of the allocated memory 69.59 GiB is allocated by PyTorch, with 46.00 "
        "MiB allocated in private pools (e.g., CUDA Graphs), and 118.90 MiB is reserved by PyTorch but unallocated. If "
        "reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid "
        "fragmentation. See documentation for Memory Management",
        {"requested_bytes": mib(128), "gpu_index": 2, "total_bytes": gib(79.33), "free_bytes": mib(16),
         "allocated_bytes": gib(69.59), "private_pools_bytes": mib(46), "reserved_unallocated_bytes": mib(118.90),
         "others": (GpuProcess(pid=37008, used_bytes=gib(79.29)),)},
    ),
    "HIP, github.com/ROCm/TheRock/issues/1054": (
        "torch.OutOfMemoryError: HIP out of memory. Tried to allocate 16.00 GiB. GPU 0 has a total capacity of 15.24 GiB "
        "of which 15.09 GiB is free. Of the allocated memory 0 bytes is allocated by PyTorch, and 0 bytes is reserved by "
        "PyTorch but unallocated. If reserved but unallocated memory is large try setting",
        {"requested_bytes": gib(16), "gpu_index": 0, "total_bytes": gib(15.24), "free_bytes": gib(15.09),
         "allocated_bytes": 0, "reserved_unallocated_bytes": 0},
    ),
    "XPU, github.com/intel/torch-xpu-ops/issues/3011": (
        "torch.OutOfMemoryError: XPU out of memory. Tried to allocate 4.66 GiB. GPU 0 has a total capacity of 5.65 GiB of "
        "which 5.65 GiB is free. Of the allocated memory 195.50 KiB is allocated by PyTorch, and 1.81 MiB is reserved by "
        "PyTorch but unallocated. Please use `empty_cache` to release all unoccupied cached memory.",
        {"requested_bytes": gib(4.66), "gpu_index": 0, "total_bytes": gib(5.65), "free_bytes": gib(5.65),
         "allocated_bytes": 195 * 1024 + 512, "reserved_unallocated_bytes": mib(1.81)},
    ),
    "HIP, more free than there is, github.com/ROCm/TheRock/issues/4598": (
        "torch.OutOfMemoryError: HIP out of memory. Tried to allocate 16.00 GiB. GPU 0 has a total capacity of 15.49 GiB "
        "of which 84.98 GiB is free. Of the allocated memory 1.67 GiB is allocated by PyTorch, and 8.08 GiB is reserved "
        "by PyTorch but unallocated. If reserved but unallocated memory is large try setting",
        {"requested_bytes": gib(16), "gpu_index": 0, "total_bytes": gib(15.49), "free_bytes": gib(84.98),
         "allocated_bytes": gib(1.67), "reserved_unallocated_bytes": gib(8.08)},
    ),
    "spilled on Windows, github.com/YingqianWang/iPASSR/issues/9": (
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 10.73 GiB (GPU 0; 8.00 GiB total capacity; "
        "17.20 GiB already allocated; 0 bytes free; 19.15 GiB reserved in total by PyTorch) If reserved memory is >> "
        "allocated memory try setting max_split_size_mb to avoid fragmentation.",
        {"requested_bytes": gib(10.73), "gpu_index": 0, "total_bytes": gib(8), "free_bytes": 0,
         "allocated_bytes": gib(17.20), "reserved_unallocated_bytes": gib(19.15) - gib(17.20)},
    ),
}  # fmt: skip

# Made from the templates of torch's binaries and of the libraries, not seen in anyone's log.
MADE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cudaMallocAsync": (
        "cudaMallocAsync",
        "torch.OutOfMemoryError: Allocation on device 0 would exceed allowed memory. (out of memory)\n"
        "Currently allocated     : 16.66 GiB\nRequested               : 4.07 GiB\nDevice limit            : 23.65 GiB\n"
        "Free (according to CUDA): 19.69 MiB\nPyTorch limit (set by user-supplied memory fraction)\n"
        "                        : 17179869184.00 GiB\n",
        {"requested_bytes": gib(4.07), "gpu_index": 0, "total_bytes": gib(23.65), "free_bytes": mib(19.69),
         "allocated_bytes": gib(16.66)},
    ),
    "torch 1.13 with a cap": (
        "torch",
        "CUDA out of memory. Tried to allocate 512.00 MiB (GPU 0; 23.65 GiB total capacity; 9.00 GiB already allocated; "
        "12.00 GiB free; 10.00 GiB allowed; 9.75 GiB reserved in total by PyTorch)",
        {"requested_bytes": mib(512), "gpu_index": 0, "total_bytes": gib(23.65), "free_bytes": gib(12),
         "allowed_bytes": gib(10), "allocated_bytes": gib(9), "reserved_unallocated_bytes": mib(768)},
    ),
    "torch 2.15, preempted": (
        "torch",
        "torch.OutOfMemoryError: CUDA out of memory. Allocation was preemptively rejected because it would exceed "
        "per_process_memory_fraction limit. Requested size: 300.00 MiB",
        {"requested_bytes": mib(300)},
    ),
    "2.15, expandable reserve": (
        "torch",
        "CUDA out of memory. Tried to allocate 3.00 GiB. This allocation exceeds the expandable-segment reserve of 2.00 "
        "GiB. GPU 0 has a total capacity of 24.00 GiB of which 1.00 GiB is free.",
        {"requested_bytes": gib(3), "gpu_index": 0, "total_bytes": gib(24), "free_bytes": gib(1)},
    ),
    "more than an exabyte": ("torch", "CUDA out of memory. Tried to allocate more than 1EB memory.", {}),
    "accelerator": ("cuda", "torch.AcceleratorError: CUDA error: out of memory\nCUDA kernel errors might be", {}),
    "driver": ("cuda", "RuntimeError: CUDA driver error: out of memory", {}),
    "cublas": ("cublas", "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", {}),
    "cudnn": ("cudnn", "RuntimeError: cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", {}),
    "triton": ("triton", "RuntimeError: Triton Error [CUDA]: out of memory", {}),
    "nccl": (
        "nccl",
        "host:1:2 [3] include/alloc.h:178 NCCL WARN Cuda failure 'out of memory'\n\n"
        "host:1:2 [3] include/alloc.h:185 NCCL WARN Failed to CUDA calloc 6291456 bytes\n",
        {"requested_bytes": 6291456},
    ),
    "bitsandbytes": ("bitsandbytes", "Error out of memory at line 380 in file /b/csrc/pythonInterface.c", {}),
    "torchrun": ("host", "ERROR:torch.distributed.elastic.multiprocessing.api:failed (exitcode: -9) local_rank: 0", {}),
    "docker": ("host", "container exited with code 137", {}),
    "shell": ("host", "train.sh: line 12: 27657 Killed                  python train.py", {}),
    "cpu allocator": (
        "host",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)",
        {"requested_bytes": 4294967296},
    ),
    "numpy": ("host", "numpy.core._exceptions._ArrayMemoryError: Unable to allocate 1.50 GiB for an array",
              {"requested_bytes": gib(1.5)}),
}  # fmt: skip


SEEN: dict[str, tuple[str, str, dict[str, Any]]] = {  # in other people's issues, of those that are not PyTorch's own
    "XPU, 4 GB, github.com/intel/intel-extension-for-pytorch/issues/629": (
        "torch",
        "RuntimeError: Current platform can NOT allocate memory block with size larger than 4GB! Tried to allocate 6.85 "
        "GiB (GPU  0; 15.56 GiB total capacity; 0 bytes already allocated; 0 bytes reserved in total by PyTorch)",
        {"requested_bytes": gib(6.85), "gpu_index": 0, "total_bytes": gib(15.56), "allocated_bytes": 0,
         "reserved_unallocated_bytes": 0},
    ),
    "old runtime, github.com/rowanz/neural-motifs/issues/58": (
        "cuda", "RuntimeError: cuda runtime error (2) : out of memory at /pytorch/aten/src/THC/THCTensorRandom.cu:25", {},
    ),
    "tensorview, github.com/junjie18/CMT/issues/15": (
        "cuda", "failed to RuntimeError: TensorStorage /io/include/tensorview/tensor.h 168\n"
        "cuda failed with error 2 out of memory. use CUDA_LAUNCH_BLOCKING=1 to get correct traceback.", {},
    ),
    "vLLM, github.com/vllm-project/vllm/issues/10439": (
        "vllm",
        'vllm-1  | ERROR 11-18 18:07:28 engine.py:366]     raise ValueError("No available memory for the cache blocks. "\n'
        "vllm-1  | ERROR 11-18 18:07:28 engine.py:366] ValueError: No available memory for the cache blocks. Try "
        "increasing `gpu_memory_utilization` when initializing the engine.", {},
    ),
    "vLLM, one request, github.com/vllm-project/vllm/issues/16118": (
        "vllm",
        "ERROR 04-05 01:12:55 [core.py:390] ValueError: To serve at least one request with the models's max seq len "
        "(1048576), (24.00 GiB KV cache is needed, which is larger than the available KV cache memory (9.97 GiB). Try "
        "increasing `gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine.",
        {"requested_bytes": gib(24), "free_bytes": gib(9.97)},
    ),
    "vLLM 0.2, github.com/vllm-project/vllm/issues/2418": (
        "vllm",
        "ValueError: The model's max seq len (4096) is larger than the maximum number of tokens that can be stored in KV "
        "cache (3664). Try increasing `gpu_memory_utilization` or decreasing `max_model_len` when", {},
    ),
    "shm, github.com/open-mmlab/mmsegmentation/issues/1356": (
        "shm", "ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm)",
        {},
    ),
    "shm by its worker, github.com/THU-DA-6D-Pose-Group/GDR-Net/issues/16": (
        "shm",
        "RuntimeError: DataLoader worker (pid 3216) is killed by signal: Bus error. It is possible that dataloader's "
        "workers are out of shared memory. Please try to raise your shared memory limit.", {},
    ),
    "shm is full, github.com/idiap/ESLAM/issues/20": (
        "shm", "RuntimeError: unable to write to file </torch_31911_952036340_6686>: No space left on device (28)", {},
    ),
    "a worker was killed, github.com/mittagessen/kraken/issues/266": (
        "host", "RuntimeError: DataLoader worker (pid 22048) is killed by signal: Killed.", {},
    ),
    "Slurm, github.com/chrisknewman/tusas/issues/149": (
        "host", "slurmstepd: error: Detected 1 oom_kill event in StepId=440575.0. Some of the step tasks have been OOM Killed.",
        {},
    ),
    "Slurm, older, github.com/hafs-community/HAFS/issues/101": (
        "host", "slurmstepd: error: Detected 1 oom-kill event(s) in step 3495064.0 cgroup. Some of your processes may have "
        "been killed by the cgroup out-of-memory handler.", {},
    ),
    "systemd-oomd, github.com/systemd/systemd/issues/23606": (
        "host",
        "Dec 18 19:34:56 user-desktop systemd-oomd[840]: Killed /user.slice/user-1001.slice/user@1001.service/app.slice/"
        "app-org.gnome.Terminal.slice/vte-spawn-dbb4a75e-031f-480d-924b-5de5af7579d2.scope due to memory pressure for "
        "/user.slice/user-1001.slice/user@1001.service being 51.07% > 50.00% for > 20s with reclaim activity", {},
    ),
    "systemd, the same": (
        "host", "Dec 18 19:34:56 user-desktop systemd[1837]: vte-spawn-dbb4a75e.scope: systemd-oomd killed 12 process(es) in "
        "this unit.", {},
    ),
    "Kubernetes, github.com/kubernetes/kubernetes/issues/131530": (
        "host", "State:          Terminated\n  Reason:       OOMKilled\n  Exit Code:    0", {},
    ),
    "Kubernetes evicts, github.com/kubeflow/kubeflow/issues/1261": (
        "host", "The node was low on resource: memory.", {},
    ),
    "flyte, github.com/flyteorg/flyte/issues/2376": (
        "host", "[f8107735c673549d7acd-n0-0] terminated with exit code (137). Reason [Error]. Message:", {},
    ),
    "DeepSpeed, github.com/deepspeedai/DeepSpeed/issues/3232": (
        "host", "[2023-04-14 13:11:27,885] [ERROR] [launch.py:434:sigkill_handler] ['/usr/bin/python3', '-u', 'main.py', "
        "'--deepspeed', '--output_dir', '/content/output'] exits with return code = -9", {},
    ),
    "a kernel log, github.com/gensyn-ai/rl-swarm/issues/463": (
        "host", "[597411.196310] p2pd invoked oom-killer: gfp_mask=0x140cca(GFP_HIGHUSER_MOVABLE|__GFP_COMP), order=0, "
        "oom_score_adj=0", {},
    ),
}  # fmt: skip


def numbers_of(evidence: OomEvidence | None) -> dict[str, Any]:
    assert evidence is not None
    return {name: value for name in NUMBERS if (value := getattr(evidence, name)) not in (None, ())}


@pytest.mark.parametrize("name", REAL)
def test_real_texts_in_every_field(name: str) -> None:
    text, expected = REAL[name]
    evidence = parse(text)
    assert numbers_of(evidence) == expected
    assert evidence is not None and evidence.kind == "torch"
    assert "\n" not in evidence.message and "If reserved" not in evidence.message


@pytest.mark.parametrize("name", MADE)
def test_texts_made_from_templates(name: str) -> None:
    kind, text, expected = MADE[name]
    evidence = parse(f"loading ...\n{text}")
    assert evidence is not None and evidence.kind == kind
    assert numbers_of(evidence) == expected


@pytest.mark.parametrize("name", SEEN)
def test_texts_of_other_people(name: str) -> None:
    kind, text, expected = SEEN[name]
    for whole in (f"loading ...\n{text}", f"[rank3]: {text}".replace("\n", "\n[rank3]: ")):
        evidence = parse(whole)
        assert evidence is not None and evidence.kind == kind
        assert numbers_of(evidence) == expected


def test_every_string_that_is_searched_for_has_a_shared_one() -> None:
    """A block without any of the latter is not searched for the former."""
    assert [needle for needle in NEEDLES if not any(part in needle for part in SHARED)] == []


@pytest.mark.parametrize("name", [*REAL, *MADE, *SEEN])
def test_what_is_parsed_is_found_in_a_stream(name: str) -> None:
    text = REAL[name][0] if name in REAL else (MADE | SEEN)[name][1]
    data = b"x\n" * 100 + text.encode() + b"\n"
    found = read_evidence(io.BytesIO(data))
    assert found is not None and numbers_of(found) == numbers_of(parse(text))


@pytest.mark.parametrize(
    ("name", "key"),
    [("shm, github.com/open-mmlab/mmsegmentation/issues/1356", "shared_memory"),
     ("vLLM, one request, github.com/vllm-project/vllm/issues/16118", "kv_cache"),
     ("Kubernetes, github.com/kubernetes/kubernetes/issues/131530", "host_memory")],
)  # fmt: skip
def test_what_is_not_the_cards_memory_has_advice_of_its_own(name: str, key: str) -> None:
    evidence = parse(SEEN[name][1])
    assert evidence is not None and diagnose(evidence).cause_keys[0] == key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "step 137 loss 1e-9",
        "except torch.cuda.OutOfMemoryError:\n    skip()",
        "try a smaller batch if you run out of memory",
        "Killed the spider; the room was memory enough",
        "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 131072",
        'if "CUDA out of memory" in str(error):',
        "finished with exit code: 1",
        '"OOMKilled": false,',
        "RuntimeError: DataLoader worker (pid 25902) is killed by signal: Segmentation fault",
        'raise ValueError("No available memory for the cache blocks. "',
    ],
)
def test_what_is_no_report(text: str) -> None:
    assert parse(text) is None


# -------------------------------------------------------------------------------------------- wrapped, cut, mixed
@given(st.integers(20, 200), st.sampled_from(sorted(REAL)), st.sampled_from(["", "[rank1]: ", "[default1]:"]))
@example(20, "torch 2.11, cap", "[rank1]: ")
def test_lines_broken_anywhere_change_nothing(width: int, name: str, prefix: str) -> None:
    text, expected = REAL[name]
    text = text[max(text.find(f"{who} out") for who in ("CUDA", "HIP", "XPU")) :]
    lines = [text[i : i + width] for i in range(0, len(text), width)]
    evidence = parse("before\n" + "\n".join(prefix + line for line in lines) + "\n\nafter")
    assert numbers_of(evidence) == expected
    assert evidence is not None and evidence.rank == (1 if prefix else None)


@given(st.sampled_from(sorted(REAL)), st.floats(0.2, 1))
def test_a_cut_message_holds_what_is_whole_and_nothing_else(name: str, share: float) -> None:
    text, expected = REAL[name]
    evidence = parse(text[: int(share * len(text))])
    if evidence is None:
        return
    for field, value in numbers_of(evidence).items():
        assert value == expected[field]


CLAUSES: dict[str, dict[str, Any]] = {
    "Tried to allocate 1.50 GiB. ": {"requested_bytes": gib(1.5)},
    "GPU 3 has a total capacity of 23.65 GiB of which 45.75 MiB is free. ": {
        "gpu_index": 3, "total_bytes": gib(23.65), "free_bytes": mib(45.75)},
    "Process 12 has 1.00 GiB memory in use. ": {"others": (GpuProcess(pid=12, used_bytes=gib(1)),)},
    "Including non-PyTorch memory, this process has 22.48 GiB memory in use. ": {"process_bytes": gib(22.48)},
    "20.00 GiB allowed; ": {"allowed_bytes": gib(20)},
    "Of the allocated memory 19.00 GiB is allocated by PyTorch, with 46.00 MiB allocated in private pools (e.g., CUDA "
    "Graphs), and 257.71 MiB is reserved by PyTorch but unallocated. ": {
        "allocated_bytes": gib(19), "private_pools_bytes": mib(46), "reserved_unallocated_bytes": mib(257.71)},
}  # fmt: skip


@given(st.lists(st.sampled_from(sorted(CLAUSES)), min_size=1, unique=True))
def test_clauses_in_any_order(clauses: list[str]) -> None:
    clauses = list(dict.fromkeys(["Tried to allocate 1.50 GiB. ", *clauses]))
    expected: dict[str, Any] = {}
    for clause in clauses:
        expected |= CLAUSES[clause]
    assert numbers_of(parse("torch.OutOfMemoryError: CUDA out of memory. " + "".join(clauses))) == expected


def test_several_ranks_the_first_one_wins() -> None:
    def message(rank: int, size: str) -> str:
        return (
            f"[rank{rank}]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {size} GiB.\n"
            f'[rank{1 - rank}]:   File "x.py", line 1, in other\n'
            f"[rank{rank}]: GPU {rank} has a total capacity of 2{rank}.00 GiB of which 1.00 GiB is free.\n"
        )

    evidence = parse(message(1, "2.00") + message(0, "3.00"))
    assert evidence is not None and evidence.rank == 1
    assert numbers_of(evidence) == {
        "requested_bytes": gib(2), "gpu_index": 1, "total_bytes": gib(21), "free_bytes": gib(1)
    }  # fmt: skip


def test_two_messages_on_one_line_are_not_mixed() -> None:
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. " + TORCH_2_11_CAP
    assert numbers_of(parse(text)) == {"requested_bytes": gib(2)}


def test_a_killed_process_is_believed_only_where_nothing_says_more() -> None:
    killed = "ERROR:torch.distributed.elastic: failed (exitcode: -9) local_rank: 1\n"
    first = parse(killed + TORCH_2_11_CAP)
    assert first is not None and first.kind == "torch"
    alone = parse(killed)
    assert alone is not None and alone.kind == "host"


def test_lines_after_a_cut_message_are_not_part_of_it() -> None:
    evidence = parse("RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB\nstep 1\nstep 2\n")
    assert evidence is not None and evidence.message == "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB"


def test_units_keep_their_meaning() -> None:
    evidence = parse("CUDA out of memory. Tried to allocate 1.50 GB. GPU 0 has a total capacity of 24.00 GiB of which")
    assert evidence is not None and (evidence.requested_bytes, evidence.total_bytes) == (1_500_000_000, gib(24))


def test_zero_bytes_of_others_are_unknown_and_zero_free_is_zero() -> None:
    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24.00 GiB of which 0 bytes is "
        "free. Process 7 has 0 bytes memory in use. "
    )
    evidence = parse(text)
    assert evidence is not None and evidence.free_bytes == 0 and evidence.others == (GpuProcess(pid=7),)


# ---------------------------------------------------------------------------------------------------- traceback
def test_frames_of_the_failing_rank_innermost_last() -> None:
    log = (
        '[rank0]: Traceback (most recent call last):\n[rank0]:   File "/a/train.py", line 9, in <module>\n'
        '[rank1]:   File "/a/other.py", line 1, in elsewhere\n'
        "[rank0]:     trainer.train()\n"
        '[rank0]:   File "/lib/transformers/loss/loss_utils.py", line 37, in fixed_cross_entropy\n'
        "[rank0]:     loss = nn.functional.cross_entropy(source)\n[rank0]:            ^^^^^^\n"
        f"[rank0]: torch.OutOfMemoryError: {TORCH_2_11_CAP}\n"
    )
    evidence = parse(log)
    assert evidence is not None
    assert evidence.frames == ("/a/train.py:9 <module>", "transformers/loss/loss_utils.py:37 fixed_cross_entropy")


def test_frames_of_a_notebook_and_of_a_boxed_traceback() -> None:
    box = f"│ /lib/peft/utils/other.py:151 in prepare_model_for_kbit_training │\n╰────╯\nOutOfMemoryError: {TORCH_2_11_CAP}"
    evidence = parse(box)
    assert evidence is not None and evidence.frames == ("peft/utils/other.py:151 prepare_model_for_kbit_training",)
    cell = f"File /lib/torch/nn/functional.py:3462, in cross_entropy(input)\n\nOutOfMemoryError: {TORCH_2_11_CAP}"
    evidence = parse(cell)
    assert evidence is not None and evidence.frames == ("torch/nn/functional.py:3462 cross_entropy",)


def test_an_old_traceback_above_other_output_is_not_ours() -> None:
    old = 'Traceback (most recent call last):\n  File "old.py", line 1, in f\nValueError: x\n'
    evidence = parse(old + "step\n" * 40 + TORCH_2_11_CAP)
    assert evidence is not None and evidence.frames == ()


def test_signs_far_above_the_report() -> None:
    warning = "UserWarning: None of the inputs have requires_grad=True. Gradients will be None\n"
    log = warning + "step\n" * 10**6 + TORCH_2_11_CAP
    evidence = read_evidence(io.BytesIO(log.encode()))
    assert evidence is not None and evidence.signs == ("checkpointing_inactive",)
    assert parse(TORCH_2_11_CAP) is not None and parse(TORCH_2_11_CAP).signs == ()  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------- streams
@pytest.mark.parametrize("shift", [-2000, -700, -300, -5, 0, 40])
def test_a_report_across_two_blocks(shift: int) -> None:
    filler = b"x" * 99 + b"\n"
    before = filler * ((BLOCK_BYTES + shift) // 100)
    before += b"y" * (BLOCK_BYTES + shift - len(before) - 1) + b"\n"
    evidence = read_evidence(io.BytesIO(before + TORCH_2_11_CAP.encode() + b"\n" + filler * 20))
    assert numbers_of(evidence) == REAL["torch 2.11, cap"][1]


class Long(io.BytesIO):
    """A log of `blocks` MiB without a line break, then a report."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None and size > 0  # never all at once
        self.blocks -= 1
        if self.blocks > 0:
            return b"out of memory? " * (size // 15)
        return b"\n" + TORCH_2_11_CAP.encode() if self.blocks == 0 else b""


def test_memory_does_not_grow_with_the_log() -> None:
    tracemalloc.start()
    try:
        evidence = read_evidence(Long(40))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert numbers_of(evidence) == REAL["torch 2.11, cap"][1]
    assert peak < 16 * MIB


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(encoding: str, tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_bytes(("größe\r\n" + TORCH_2_11_CAP + "\r\n").encode(encoding))
    assert numbers_of(read_evidence(log)) == REAL["torch 2.11, cap"][1]


def test_colours_and_progress_bars() -> None:
    text = (
        "\r  0%|   | 0/100 [00:00<?, ?it/s]\r  1%|\x1b[31mx\x1b[0m\r\x1b[31mtorch.OutOfMemoryError\x1b[0m: "
        + TORCH_2_11_CAP
    )
    evidence = parse(text)
    assert numbers_of(evidence) == REAL["torch 2.11, cap"][1]
    assert evidence is not None and evidence.message.startswith("torch.OutOfMemoryError: CUDA out of memory.")


def test_text_streams_and_files(tmp_path: Path) -> None:
    assert numbers_of(read_evidence(io.StringIO(TORCH_2_11_CAP))) == REAL["torch 2.11, cap"][1]
    (tmp_path / "empty").touch()
    assert read_evidence(tmp_path / "empty") is None


@pytest.mark.parametrize("name", ["missing", ".", "nul\0l"])
def test_what_cannot_be_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read_evidence(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (b"\x80\x04\x95", "snapshot"),
        (b"PK\x03\x04", "only gzip"),
        (b"\x1f\x8b\x08\x00" + b"\xff" * 20, "cannot be unpacked"),
    ],
)
def test_snapshots_and_archives_are_no_log(head: bytes, word: str) -> None:
    with pytest.raises(InputError, match=word):
        read_evidence(io.BytesIO(head + b"rest"))


# --------------------------------------------------------------------------------------------------------- hostile
PIECES = st.sampled_from(
    [*(text for text, _ in REAL.values()), *(text for _, text, _ in MADE.values()), "\n", "\r\n", "[rank1]: ", "│", "9" * 40,
     "Tried to allocate ", "9999999999.99 GiB", "Process 99999999999 has", "Killed", "CUDA out of memory. "]
)  # fmt: skip


@given(st.text())
def test_any_text_is_survived(text: str) -> None:
    parse(text)


@given(st.lists(st.one_of(PIECES, st.text(max_size=20)), max_size=12).map("".join))
@settings(max_examples=200, deadline=None)
def test_any_mixture_gives_nothing_or_sound_numbers(text: str) -> None:
    evidence = parse(text)
    if evidence is None:
        return
    assert evidence.message and "\n" not in evidence.message and len(evidence.message) <= 1200
    for name, value in numbers_of(evidence).items():
        if name not in ("others", "gpu_index"):
            assert 0 <= value < 2**63


@given(st.binary(max_size=4000))
def test_any_bytes_are_survived(data: bytes) -> None:
    try:
        evidence = read_evidence(io.BytesIO(data))
    except InputError as error:
        assert data[:1] in (b"\x80", b"P", b"\x1f", b"\x28", b"\xfd", b"B"), error.message
    else:
        assert evidence is None or evidence.message
