"""What can change a number: devices, versions, settings. Chooses the device, prepares Triton,
shares GPUs among workers.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from verify.errors import VerifyError

CALL_SECONDS = 60.0
"""A call of a kernel that takes longer hangs; it includes compilation."""
OUTSIDE = "VERIFY_PROCESSES"
"""The environment variable that says how many processes share the machine with this whole run."""
WORKERS_PER_GPU = 16
"""Cases are small and the CPU does most of the work: so many processes share a GPU well."""
GRID = 65_535
"""Blocks that a GPU's grid may have along its second and third axis (CUDA C++ Programming Guide,
compute capabilities)."""
KEPT = 2**30
"""Bytes of a GPU that a process keeps, though none of its tensors needs them."""
WAITING = 4
"""One worker in so many waits for processes that it started."""


def prepare(device: str | None = None) -> str:
    """The device to run on, "cuda" where there is a GPU, else "cpu"; Triton interprets on the CPU.

    Must run before Triton is imported. Processes that are started after it have one BLAS thread
    each for NumPy, in which Triton's interpreter computes: threads that wait for each other on
    shared cores take up to 70 times as long. Raises VerifyError for a device that does not exist
    here.
    """
    import torch

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is loaded

    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = device or found
    if device not in ("cpu", "cuda"):
        raise VerifyError(f"device {device!r} is unknown: cpu or cuda")
    if device == "cuda" and found == "cpu":
        raise VerifyError("device 'cuda': torch sees no CUDA GPU here; use cpu")
    interpret = "1" if device == "cpu" else "0"
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET", "0") != interpret:
        raise VerifyError(
            f"device {device!r}: Triton was imported before with "
            f"TRITON_INTERPRET={1 - int(interpret)}; start a new process"
        )
    os.environ["TRITON_INTERPRET"] = interpret
    return device


def cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def workers(device: str | None) -> int:
    """How many xdist workers suit this machine: somewhat more than cores, since tests wait for
    processes that they start; at most a few for each GPU.
    """
    import torch

    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    suited = cores() + max(1, cores() // WAITING)
    return gpus * max(1, min(WORKERS_PER_GPU, suited // gpus)) if gpus else suited


def processes() -> int:
    """How many share this machine: xdist's workers, times those of the run that started theirs."""
    outside = int(os.environ.get(OUTSIDE, "1"))
    return int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) * outside


def share_machine(worker: str | None) -> None:
    """Give an xdist worker ("gw3") its GPU, round robin, and one CPU thread, for torch and for its
    compiler: workers with more would fight for the cores.
    """
    import torch

    if worker is None:
        return
    torch.set_num_threads(1)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(int(worker.removeprefix("gw")) % gpus)


def give_back() -> None:
    """Return memory of the GPU that no tensor of this process needs, where it keeps much: others
    share the GPU.
    """
    import torch

    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT:
        torch.cuda.empty_cache()


def in_use(device: str) -> int | None:
    """Bytes that are allocated and not freed, on the GPU or in glibc's heap, as torch's tensors
    are; None where nobody says.
    """
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return None
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return found.uordblks + found.hblkhd


def held(pid: int | None) -> int:
    """Bytes of memory that a process holds; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


_MALLINFO = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Mallinfo(ctypes.Structure):
    """mallinfo(3)."""

    _fields_ = tuple((n, ctypes.c_size_t) for n in _MALLINFO.split())


def describe(device: str) -> dict[str, str]:
    """Versions and settings, printed with every result and stored with every record."""
    import torch

    facts = {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)",
        "torch": str(torch.__version__),
        "triton": _version("triton") + (" (interpreted)" if device == "cpu" else ""),
        "python": platform.python_version(),
        "attention-verify": _version("attention-verify"),
        "float32 matmul": torch.get_float32_matmul_precision(),
        "bf16 reduced reduction": str(
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        ),
        "fp16 reduced reduction": str(
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        ),
    }
    if device == "cuda":
        facts["cuda"], facts["cudnn"] = str(torch.version.cuda), str(torch.backends.cudnn.version())
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
