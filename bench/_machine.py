"""The facts a measurement depends on besides its code."""

import platform
import subprocess
import time
from pathlib import Path

import torch


def machine(device: str) -> dict[str, str]:
    """What a number depends on besides the code: hardware, versions, threads, commit, day."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "none"
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": triton_version,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    """The processor's name as the system gives it, often vague, and what torch uses of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    products = [flag for flag in ("avx512_bf16", "amx_tile") if flag in flags]
    return " ".join([name, torch.backends.cpu.get_cpu_capability(), *products])


def commit() -> str:
    """The commit measured, "+" if files differ from it, "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
