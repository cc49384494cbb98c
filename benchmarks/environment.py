"""What the numbers depend on: machine, versions and settings, as they go into the JSON."""

import os
import platform
from collections.abc import Sequence

import torch

import mmkernels
from mmkernels import doctor

SEED = 0
# Before anything is measured: what else the machine was doing.
LOAD_AVERAGE = os.getloadavg()[0]


def describe(arguments: Sequence[str], quick: bool) -> dict[str, object]:
    """The environment of this process.

    Args:
        arguments: pytest's arguments.
        quick: whether the sizes are those of a smoke test.
    """
    return {
        "cpu": doctor.PROBES["cpu"]().value,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": LOAD_AVERAGE,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "os": _os(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mmkernels": mmkernels.__version__,
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "KMP_", "MKL_", "GOMP_"))
        },
        "command": " ".join(("pytest", *arguments)),
        "seed": SEED,
        "quick": quick,
    }


def _os() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.machine()}"
