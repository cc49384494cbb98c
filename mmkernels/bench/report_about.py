"""What a run was measured on, and what its numbers do not say."""

from collections.abc import Mapping
from typing import Any

from mmkernels.bench.report_cells import number

SMOKE = "Smoke test, not a result: its sizes say nothing about speed."
ON_A_CPU = "Measured on a CPU: says nothing about GPUs."
QUICK = "Quick run: the most telling cases only."


def is_smoke(data: Mapping[str, Any]) -> bool:
    """Whether the sizes are those of a smoke test."""
    environment = data["environment"]
    return bool(environment["quick"] and environment["device_type"] == "cpu")


def labels(data: Mapping[str, Any]) -> list[str]:
    """What has to be said before any number."""
    environment, missing = data["environment"], len(data["not_reached"])
    found = [SMOKE] if is_smoke(data) else []
    found += [ON_A_CPU] if environment["device_type"] == "cpu" else []
    found += [QUICK] if environment["quick"] and not is_smoke(data) else []
    if not data["finished"]:
        found.append(f"Cut off: {missing} of {missing + len(data['records'])} cases are missing.")
    return found


def facts(data: Mapping[str, Any]) -> dict[str, str]:
    """What the numbers depend on, by what it is called."""
    env = data["environment"]
    changed = ", with uncommitted changes" if env["dirty"] else ""
    found = {
        "GPU": _gpu(env) if env["device_type"] == "cuda" else "",
        "CPU": f"{env['cpu']} ({env['cpu_capability']}), {env['threads']} threads",
        "load before the run": f"{env['load_average']:.1f}",
        "memory": f"{env['memory_gib']} GiB",
        "system": env["os"],
        "Python": env["python"],
        "torch": env["torch"],
        "mmkernels": env["mmkernels"] + _commit(env) + changed,
        "libraries": _pairs(env["libraries"], " "),
        "variables": _pairs(env["variables"], "="),
        "measured": f"{env['date']}, seed {env['seed']}" + _duration(env),
        "command": f"`{env['command']}`",
        "ceilings, of the same run": ceilings(data),
    }
    return {name: text for name, text in found.items() if text}


def place(data: Mapping[str, Any]) -> str:
    """In one line what it was measured on, and when; for the title of a plot."""
    env = data["environment"]
    name = env["device"] if env["device_type"] == "cuda" else env["cpu"]
    line = f"{name}, torch {env['torch']}, {env['date'][:10]}"
    return f"{line}. {SMOKE}" if is_smoke(data) else line


def ceilings(data: Mapping[str, Any]) -> str:
    """Products by dtype, and the copy."""
    measured = data["ceilings"]
    parts = [f"{name} {number(rate / 1e12)} TFLOP/s" for name, rate in measured["matmul"].items()]
    return ", ".join((*parts, f"copy {number(measured['copy']['bytes'] / 1e9)} GB/s"))


def _gpu(env: Mapping[str, Any]) -> str:
    parts = [
        env["device"],
        f"capability {env['capability']}",
        f"{env['multiprocessors']} SMs",
        f"L2 {env['l2_mib']} MiB",
        f"{env['gpu_memory_gib']} GiB",
        f"CUDA {env['cuda']}",
    ]
    asked = {
        "driver_version": "driver", "cudnn": "cuDNN", "clocks.sm": "SM clock under load",
        "clocks.max.sm": "at most", "clocks.mem": "memory clock", "power.limit": "power limit",
    }  # fmt: skip
    return ", ".join(parts + [f"{text} {env[name]}" for name, text in asked.items() if name in env])


def _commit(env: Mapping[str, Any]) -> str:
    return f" at {env['commit'][:7]}" if env["commit"] else ""


def _duration(env: Mapping[str, Any]) -> str:
    return f", {env['seconds']:.0f} s in all" if "seconds" in env else ""


def _pairs(values: Mapping[str, str], between: str) -> str:
    return ", ".join(f"{name}{between}{value}" for name, value in values.items())
