"""A run on several GPUs, started by torchrun or `accelerate launch`: their command lines, and nothing of our own.

On several machines the run folder is on storage that all of them see; the process of rank 0 writes it.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from vramplan.core.types import RunSpec
from vramplan.errors import InputError
from vramplan.sources import records

PORT = 29400
HOST = "FIRST_MACHINE"  # what the user puts in: a name or address of it that the others can reach
CONFIG = "accelerate.yaml"


def per_machine(run: RunSpec, machines: int) -> int:
    """GPUs of each machine. InputError if they cannot be shared out evenly."""
    if run.gpus % machines:
        raise InputError(f"--gpus {run.gpus} cannot be spread evenly over --num-machines {machines}")
    return run.gpus // machines


def torchrun_words(run: RunSpec, run_dir: Path, *, resume: bool, machines: int = 1) -> list[str]:
    """The arguments of torchrun for one machine; the same on each."""
    if machines == 1:
        meeting = ["--standalone"]
    else:
        where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HOST}:{PORT}", "--rdzv-id", run_dir.name]
        meeting = ["--nnodes", str(machines), *where]
    again = ["--resume"] if resume else []
    count = str(per_machine(run, machines))
    return [*meeting, "--nproc-per-node", count, "-m", "vramplan.train", str(run_dir), *again]


def accelerate_config(run: RunSpec, machines: int) -> str:
    """The same for `accelerate launch`. MULTI_GPU also where weights are sharded: our training process does that."""
    lines = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": "false",
        "distributed_type": "MULTI_GPU",
        "downcast_bf16": "'no'",
        "enable_cpu_affinity": "false",
        "gpu_ids": "all",
        "machine_rank": "0",
        "main_process_ip": HOST if machines > 1 else None,
        "main_process_port": str(PORT) if machines > 1 else None,
        "main_training_function": "main",
        "mixed_precision": "bf16",
        "num_machines": str(machines),
        "num_processes": str(run.gpus),
        "rdzv_backend": "static",
        "same_network": "true",
        "use_cpu": "false",
    }
    return "".join(f"{name}: {value}\n" for name, value in lines.items() if value is not None)


def write_launch(run: RunSpec, run_dir: Path, *, resume: bool, machines: int) -> dict[str, str]:
    """Write accelerate's config into the run folder; returns the two command lines, "torchrun" and "accelerate"."""
    run_dir = run_dir.absolute()
    config = run_dir / CONFIG
    torchrun = shlex.join(["torchrun", *torchrun_words(run, run_dir, resume=resume, machines=machines)])
    records.write_text(config, accelerate_config(run, machines))
    rank = ["--machine_rank", "0"] if machines > 1 else []
    again = ["--resume"] if resume else []
    words = ["accelerate", "launch", "--config_file", str(config), *rank, "-m", "vramplan.train", str(run_dir), *again]
    return {"torchrun": torchrun, "accelerate": shlex.join(words)}
