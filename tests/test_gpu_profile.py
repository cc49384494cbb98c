"""What limits a kernel, read off ncu's table or the clock."""

import json

import pytest
import torch

from tools import profiled
from tools.gpu import profile
from tools.gpu.process import Done

CASES = [
    {"case": "forward", "backend": "triton"},
    {"case": "backward", "backend": "triton"},
]
# Written by hand after the form that the manual of Nsight Compute's command line documents for
# `--csv --page raw`: messages, names, units, and a row a kernel.
FIXED = (
    "ID,Process ID,Process Name,Host Name,Kernel Name,Context,Stream,Block Size,Grid Size,Device,CC"
)
NAMES = [*FIXED.split(","), *(name for names in profile.METRICS.values() for name in names)]
UNITS = [*[""] * 11, "ns", *["%"] * 7, "register/thread"]


def launched(number: int, kernel: str, *figures: object) -> list[str]:
    fixed = [number, 4711, "python3", "localhost", kernel, 1, 7, "(128, 1, 1)", "(132, 1, 1)", 0]
    return [str(x) for x in (*fixed, "9.0", *figures)]


SPIN = ("at::cuda::spin_kernel(long)", "1,500", 1, 0, 0, 0, 0, 0, 1, 16)
ROWS = [
    launched(0, *SPIN),
    launched(1, "_forward", "1,250,000", "81.5", "78.2", "(!) n/a", "40", "12", "30", "18.7", 168),
    launched(2, *SPIN),
    launched(3, "_delta", 20000, "11", 0, 0, "88", "85", "40", "70", 32),
    launched(4, "_keys, 64", 900000, "65", "(!) n/a", "20", "50", "5", "20", "12", 255),
]


def text_of(rows: list[list[str]]) -> list[str]:
    quoted = [",".join(f'"{word}"' for word in row) for row in (NAMES, UNITS, *rows)]
    return ["==PROF== Connected to process 4711", *quoted, "==PROF== Disconnected"]


def test_rows_belong_to_the_case_in_front_of_them():
    rows = profile.counted(text_of(ROWS), CASES)
    assert [(row["case"], row["kernel"]) for row in rows] == [
        ("forward", "_forward"), ("backward", "_delta"), ("backward", "_keys, 64"),
    ]  # fmt: skip
    assert rows[0] == {
        "case": "forward", "backend": "triton", "kernel": "_forward", "microseconds": 1250.0,
        "sm": 81.5, "tensor": 78.2, "memory": 40.0, "dram": 12.0, "l2": 30.0, "occupancy": 18.7,
        "registers": 168.0, "limiter": "tensor pipe",
    }  # fmt: skip
    assert rows[2]["tensor"] == 20.0  # of the second metric, where the GPU has not the first
    assert [row["limiter"] for row in rows] == ["tensor pipe", "DRAM", "other pipes of the SM"]


def test_a_table_in_another_unit_or_without_a_metric(monkeypatch):
    with pytest.raises(ValueError, match="the unit of time is 'hour'"):
        profile.counted([line.replace('"ns"', '"hour"') for line in text_of(ROWS)], CASES)
    lines = [line.replace("sm__throughput", "sm__other") for line in text_of(ROWS)]
    assert {row["limiter"] for row in profile.counted(lines, CASES)} == {"unknown"}
    assert profile.counted(["==ERROR== ERR_NVGPUCTRPERM"], CASES) == []


@pytest.mark.parametrize(
    ("figures", "wanted"),
    [
        ((59, 59, 59, 59), "latency"),
        ((61, 10, 20, 60), "other pipes of the SM"),
        ((90, 72, 20, 60), "tensor pipe"),
        ((70, 70, 75, 20), "caches and shared memory"),
        ((70, 70, 75, 61), "DRAM"),
        ((None, 70, 75, 61), "unknown"),
        ((70, None, 30, None), "other pipes of the SM"),
    ],
)
def test_the_limiter(figures, wanted):
    names = ("sm", "tensor", "memory", "dram")
    assert profile.limiter(dict(zip(names, figures, strict=True))) == wanted


def test_the_limiter_by_the_clock():
    found = [profile.limiter_by_clock(*of) for of in ((59, True), (60, True), (70, False))]
    assert found == ["latency", "tensor pipe", "DRAM"]
    assert profile.limiter_by_clock(None, True) == "unknown"


class FakeRun:
    """Answers as ncu and the script would."""

    dry = False

    def __init__(self, table: list[str]) -> None:
        self.table, self.parts, self.found = table, [], {}
        self.record = self.runner = self

    def say(self, name: str, line: str) -> None: ...

    def put(self, profile: dict) -> None:
        self.found = profile

    def python(self, step, name, words, seconds, launcher=()):
        self.parts.append((name, round(seconds)))
        printed = {"cases": CASES, "left_out": {}}
        if launcher:
            with open(launcher[-1], "w") as file:
                file.write("\n".join(self.table))
        elif "--clock" in words:
            printed["rows"] = [{"kernel": "x"}]
        return Done(0, False, 1.0, f"==WARNING== of ncu\n{json.dumps(printed)}\n")


def test_it_counts_where_ncu_may(monkeypatch):
    monkeypatch.setattr(profile, "tool", lambda name: f"/bin/{name}")
    run = FakeRun(text_of(ROWS))
    profile.profile(run, 60)
    assert run.parts == [("ncu, triton", 21), ("ncu, cuda", 42)]
    assert run.found["cuda"]["source"] == "ncu" and len(run.found["cuda"]["rows"]) == 3


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (["==ERROR== ERR_NVGPUCTRPERM: no permission"], "==ERROR== ERR_NVGPUCTRPERM"),
        ([], "ncu counted no kernel"),
        (text_of([*ROWS, ROWS[0], ROWS[1]]), "reads otherwise than expected: IndexError"),
        (['"A","B"', '"1","2"'], "reads otherwise than expected: KeyError"),
    ],
)
def test_without_counters_the_clock_serves(table, why, monkeypatch):
    monkeypatch.setattr(profile, "tool", lambda name: f"/bin/{name}")
    run = FakeRun(table)
    profile.profile(run, 60)
    assert [name for name, _ in run.parts][:2] == ["ncu, triton", "by the clock, triton"]
    found = run.found["triton"]
    assert found["source"] == "torch.profiler" and why in found["why_not_ncu"]
    assert found["rows"]


def test_without_ncu_the_clock_has_all_the_time(monkeypatch):
    monkeypatch.setattr(profile, "tool", lambda name: None)
    run = FakeRun([])
    profile.profile(run, 60)
    assert run.parts == [("by the clock, triton", 30), ("by the clock, cuda", 60)]
    assert run.found["cuda"]["why_not_ncu"] == "ncu is not on PATH"


# The script


def test_work_is_counted_once():
    """Of a causal pass half the pairs and the diagonal; of patches each pixel and weight once."""
    full, causal = (profiled.attention(profiled.TOY, "cuda", 64, x, False) for x in (False, True))
    assert full.flops == 4 * 2 * 40 * 40 * 64
    assert causal.flops == full.flops * 41 / 80
    assert full.bytes == 4 * 2 * 40 * 64 * 2
    of = profiled.patches(profiled.TOY, "cuda", 16, 32, 32, True)
    assert of.flops == 2 * 4 * 32 * 768
    assert of.bytes == (3 * 32 * 32 + 32 * 768 + 4 * 32) * 2


def test_what_a_backend_declines_or_fails_in_is_left_out(monkeypatch, capsys):
    def launches(sizes, backend):
        def fail():
            raise RuntimeError("it broke")

        yield profiled.attention(sizes, "cuda", 64, False, False)
        yield profiled.Launch("broken", "triton", fail, 1.0, 1.0)
        yield profiled.Launch("good", "triton", lambda: lambda: None, 1.0, 1.0)

    monkeypatch.setattr(profiled, "launches", launches)
    assert profiled.main(["--toy", "--clock"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [case["case"] for case in found["cases"]] == ["good"]
    assert found["left_out"]["broken"] == "RuntimeError: it broke"
    assert "CUDA kernels run on NVIDIA GPUs" in found["left_out"]["attention forward, D64, full"]
    assert profiled.main(["--toy", "--clock", "--limit", "-1"]) == 0
    assert len(json.loads(capsys.readouterr().out)["not_reached"]) == 3


def test_what_was_launched_before_an_interrupt_is_printed(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    calls = {"first": lambda: None, "second": interrupted, "third": lambda: None}
    monkeypatch.setattr(
        profiled,
        "launches",
        lambda *_: (
            profiled.Launch(name, "triton", lambda call=call: call, 1.0, 1.0)
            for name, call in calls.items()
        ),
    )
    assert profiled.main(["--toy", "--clock"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [case["case"] for case in found["cases"]] == ["first"]
    assert found["not_reached"] == ["second", "third"]


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["attention", "decode", "patches"])
def test_kernels_run_and_are_timed(kind):
    makers = {
        "attention": lambda s: profiled.attention(s, "triton", 64, True, True),
        "decode": profiled.decode,
        "patches": lambda s: profiled.patches(s, "triton", 16, 32, 32, True),
    }
    rows = profiled.clocked(makers[kind](profiled.TOY).prepare(), "cpu")
    op = {"attention": "attention_backward", "decode": "attention_decode"}
    assert [row["kernel"] for row in rows] == [f"mmkernels::{op.get(kind, 'patch_embed_backward')}"]
    assert rows[0]["microseconds"] > 0


def test_every_kernel_of_both_backends_is_launched():
    for backend, only in (("triton", {"decode, D128"}), ("cuda", set())):
        names = [launch.case for launch in profiled.launches(profiled.FULL, backend)]
        assert len(names) == len(set(names)) == 12 + len(only)
        assert {launch.backend for launch in profiled.launches(profiled.FULL, backend)} == {backend}
    assert profiled.FULL.dtype == torch.bfloat16
