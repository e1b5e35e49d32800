"""One GPU for each job of this machine: a free one is locked, and the job sees no other.

Snakemake counts GPUs but does not hand them out. Without this, every job would see all of them: trainers would spread
over all that are visible, and jobs started together would share the first.

    with one_gpu():      # CUDA_VISIBLE_DEVICES names one device in here
        ...

A SLURM job that sees one GPU is left alone: it has been given it. Where it sees several (`salloc --gpus=4`, and
`run_all.sh` started in there), its jobs share them out as on any machine.

A job that was given a GPU and cannot use it stops (`check_usable`): it would train on the CPU for weeks meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cai_em.records.files import restored

VISIBLE = "CUDA_VISIBLE_DEVICES"


def devices() -> list[str]:
    """The GPUs that jobs of this machine may use: those that `CUDA_VISIBLE_DEVICES` names, else all of them."""
    if VISIBLE in os.environ:
        return [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip()]
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
    except OSError:
        return []
    return found.stdout.split() if found.returncode == 0 else []


def _lock(path: Path) -> int | None:
    """A locked file descriptor; None where another process, of whatever user, holds the lock."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except PermissionError:  # another user made it
        descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def one_gpu(wanted: bool = True, folder: str | Path | None = None, poll_s: float = 1.0) -> Iterator[str | None]:
    """Make one free GPU the only visible one, waiting until there is one; nothing changes where there is no GPU.

    Args:
        wanted: False: do nothing.
        folder: of the lock files, the same for all jobs of the machine; the system's temporary folder by default.
        poll_s: pause between looks for a free one, seconds.

    Yields:
        The device's name for `CUDA_VISIBLE_DEVICES`; None where nothing was changed.
    """
    names = devices() if wanted else []
    if not names or ("SLURM_JOB_ID" in os.environ and len(names) == 1):
        yield None
        return
    folder, told, held = Path(folder or tempfile.gettempdir()), False, None
    while held is None:
        for name in names:
            held = _lock(folder / f"cai-em-gpu-{name.replace('/', '-')}.lock")
            if held is not None:
                break
        else:
            if not told:
                print(f"waiting for a free GPU (of {', '.join(names)})", file=sys.stderr, flush=True)
            told = True
            time.sleep(poll_s)
    try:
        with restored(VISIBLE, "CUDA_DEVICE_ORDER"):
            # nvidia-smi counts in the order of the bus, CUDA by default with the fastest first.
            os.environ[VISIBLE] = name
            os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
            yield name
    finally:
        os.close(held)


class NoGpu(RuntimeError):
    """A job was given a GPU and sees none. The message says what was found, and what to do."""


ASKED_OF_TORCH = "import torch; print(torch.cuda.is_available(), torch.version.cuda)"
"""What a process of this environment is asked before a GPU job starts."""


def check_usable() -> None:
    """Whether PyTorch can use the GPU that this job was given, asked in a process of its own, as the kernel will be.

    Raises:
        NoGpu: it cannot.
    """
    said = subprocess.run([sys.executable, "-c", ASKED_OF_TORCH], capture_output=True, text=True, check=False)
    usable, _, built = said.stdout.strip().partition(" ")
    if usable == "True":
        return
    if built in ("", "None"):
        why = "this PyTorch was built without CUDA: CAI_EM_LOCK=cuda ./run_all.sh setup installs the one that has it"
    else:
        why = (
            f"this PyTorch needs CUDA {built}, and a driver as new (for CUDA 13.0: 580 or later). The driver says: "
            f"{_driver()}"
        )
    raise NoGpu(
        "this job was given a GPU and PyTorch sees none, so it stops before it trains on the CPU while holding it: "
        f"{why}. A study without GPUs says `gpu: false` in its profile"
    )


def _driver() -> str:
    """The driver's version, or why it is not known."""
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return "nothing (nvidia-smi is not there)"
    return " ".join((found.stdout or found.stderr or "nothing").split())
