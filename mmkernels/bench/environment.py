"""What the numbers depend on: machine, versions and settings, as they go into the JSON."""

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import mmkernels
from mmkernels import doctor
from mmkernels.bench.case import SEED

ROOT = Path(__file__).resolve().parents[2]
# Before anything is measured: what else the machine was doing.
LOAD_AVERAGE = os.getloadavg()[0]
LIBRARIES = (
    "triton", "numpy", "timm", "transformers", "flash-attn", "flashinfer-python", "xformers",
    "mslk", "liger-kernel",
)  # fmt: skip
# What else changes a time; not MMKERNELS_* as a whole, for some of those are folders.
SWITCHES = (
    "MMKERNELS_BACKEND", "MMKERNELS_CHECK", "MMKERNELS_TUNING", "TRITON_INTERPRET",
    "NVIDIA_TF32_OVERRIDE", "CUDA_LAUNCH_BLOCKING",
)  # fmt: skip


def describe(device: torch.device, quick: bool, command: str) -> dict[str, object]:
    """The environment of this process.

    Args:
        device: that is measured.
        quick: whether it is a quick run.
        command: that started it.
    """
    return {
        "device": device_name(device),
        "device_type": device.type,
        **(_gpu(device) if device.type == "cuda" else {}),
        "cpu": doctor.PROBES["cpu"]().value,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": LOAD_AVERAGE,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "os": _os(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mmkernels": mmkernels.__version__,
        "libraries": _versions(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "KMP_", "MKL_", "GOMP_")) or name in SWITCHES
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **_commit(),
        "command": command,
        "seed": SEED,
        "quick": quick,
    }


def device_name(device: torch.device) -> str:
    """What the device is called in tables and paths: the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _gpu(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size // 2**20,
        "gpu_memory_gib": round(properties.total_memory / 2**30),
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        **_asked(properties, "driver_version", "clocks.max.sm", "power.limit"),
    }


def clocks(device: torch.device) -> dict[str, str]:
    """The clocks of a GPU as they are now; to be asked when it was busy."""
    if device.type != "cuda":
        return {}
    return _asked(torch.cuda.get_device_properties(device), "clocks.sm", "clocks.mem")


def _asked(properties: Any, *fields: str) -> dict[str, str]:
    """What nvidia-smi says of a GPU; nothing where it is not there or does not answer."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            [*query, f"--id=GPU-{properties.uuid}"], capture_output=True, text=True, timeout=10
        )
    except subprocess.TimeoutExpired:
        return {}
    values = done.stdout.strip().split(", ") if done.returncode == 0 else []
    return dict(zip(fields, values, strict=False))


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> dict[str, object]:
    """Of the checkout that this package lies in, if it is one and git is there."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return {"commit": None, "dirty": None}

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip()

    return {"commit": git("rev-parse", "HEAD") or None, "dirty": bool(git("status", "--porcelain"))}


def _os() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.machine()}"
