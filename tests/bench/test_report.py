"""Do tables and CSV say what is in a run's JSON: losses, absences, failures and where it ran?"""

import csv
import io
import json

import pytest
import torch

from mmkernels.bench import report, report_cells, report_rows, report_tables, roofline
from mmkernels.bench import run as running
from tests.bench.fake import case
from tests.bench.fake_run import CEILINGS, GPU, record, result, run


def row(**changes) -> report_rows.Row:
    (rows,) = report_rows.suites(run([record(**changes)])).values()
    return rows[0]


def cells(table: report_tables.Table, line: int = 0) -> dict[str, str]:
    header, lines = table
    return dict(zip(header, lines[line], strict=True))


def test_the_best_peer_is_the_fastest_that_is_not_ours():
    peers = {"SDPA (dense mask)": 0.03, "eager": 0.015, "mmkernels triton": 0.001}
    found = row(peers=peers)
    assert found.best_peer == "eager" and found.best_ratio == pytest.approx(1.5)
    assert found.plain == "SDPA (dense mask)"
    assert found.ratio(found.plain) == pytest.approx(3.0)
    alone = row(peers={"mmkernels cuda": 0.001})
    assert alone.best_peer is alone.best_ratio is alone.plain is None


def test_what_a_model_calls_is_sdpa_or_the_first_peer_of_the_suite():
    conv = record(peers={"F.conv2d": 0.02, "timm": 0.01}, suite="patches")
    (rows,) = report_rows.suites(run([conv])).values()
    assert (rows[0].plain, report_tables.plain_name(rows)) == ("F.conv2d", "F.conv2d")
    forms = {"SDPA (dense mask)": 0.03, "SDPA (a call for each image)": 0.02}
    mixed = [record(), record(peers={"SDPA math": 0.02}), record(peers=forms)]
    (rows,) = report_rows.suites(run(mixed)).values()
    expected = ["SDPA", None, "SDPA (a call for each image)"]
    assert [r.plain for r in rows] == expected, "another peer is not shown as SDPA"
    several = [record(peers={name: 0.02}) for name in ("F.conv2d", "F.conv3d", "F.conv1d")]
    (rows,) = report_rows.suites(run(several)).values()
    assert report_tables.plain_name(rows[:2]) == "F.conv2d or F.conv3d"
    assert report_tables.plain_name(rows) == "plain torch"


@pytest.mark.parametrize(
    ("flops", "moved", "least", "rate"),
    [
        (5e8, 1e6, 0.005, "0.0500 TFLOP/s"),
        (5e8, 8e7, 0.008, "8.00 GB/s"),
        (None, 8e7, 0.008, "8.00 GB/s"),
        (5e8, None, 0.005, "0.0500 TFLOP/s"),
        (None, None, None, ""),
    ],
)
def test_the_ceiling_is_the_longer_of_two_times(flops, moved, least, rate):
    found = row(flops=flops, bytes=moved)
    assert found.least_s == least
    assert report_cells.rate(found, "mmkernels") == rate
    share = report_cells.percent(found.share("mmkernels"))
    assert share == (f"{100 * least / 0.01:.0f} %" if least else "")
    assert found.share("SDPA") == (least / 0.02 if least else None)


def test_a_dtype_without_a_ceiling_is_held_to_the_bytes():
    found = row(dtype="float64", bytes=8e7)
    assert (found.least_s, found.by_flops) == (0.008, False)
    assert row(dtype="float64", bytes=None).least_s is None


def test_a_headline_has_all_that_a_reader_needs():
    line = cells(report_tables.headline([row(peers={"SDPA": 0.02, "FlexAttention": 0.008})]))
    assert line == {
        "model": "ViT-B/16 224", "shape": "B1 H12 S197 D64", "mask": "full", "dtype": "float32",
        "mode": "forward", "mmkernels ms": "10.00 ± 1.00", "rate": "0.0500 TFLOP/s",
        "of the ceiling": "50 %", "best peer": "FlexAttention", "its ms": "8.000 ± 0.800",
        "over it": "**0.80×**", "over SDPA": "2.00×", "peak MiB": "3.00", "best peer's": "3.00",
    }  # fmt: skip


def test_every_implementation_has_its_line():
    one = record()
    one["results"]["SDPA"] |= {"launch_s": 7e-6, "timer": "events", "pairwise_ratio": 1.75}
    (rows,) = report_rows.suites(run([one])).values()
    header, lines = report_tables.every(rows)
    assert [line[header.index("implementation")] for line in lines] == ["mmkernels", "SDPA"]
    peer = cells((header, lines), 1)
    assert (peer["launch µs"], peer["timer"], peer["first call s"]) == ("7.00", "events", "2.50")
    assert (peer["mmkernels is faster"], peer["of turns"]) == ("2.00×", "1.75×")
    assert (peer["largest error"], peer["rate"]) == ("1.5e-07", "0.0250 TFLOP/s")
    assert cells((header, lines), 0)["mmkernels is faster"] == ""


def test_columns_without_a_cell_are_left_out():
    header, _ = report_tables.every([row(mask="", flops=None, bytes=None)])
    assert not {"mask", "rate", "of the ceiling", "launch µs"} & set(header)


def test_microseconds_where_all_is_short():
    short = row(ours=2e-5, peers={"SDPA": 1e-5})
    assert cells(report_tables.headline([short]))["mmkernels µs"] == "20.00 ± 2.00"
    assert "mmkernels ms" in report_tables.headline([short, row()])[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""), (1.0, "1.00×"), (0.9996, "**0.999×**"), (0.997, "**0.997×**"),
        (0.5, "**0.50×**"), (1.004, "1.00×"), (17.6, "17.60×"),
    ],
)  # fmt: skip
def test_a_loss_never_looks_like_a_tie(value, text):
    assert report_cells.ratio(value, marked=True) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1234567.0, "1234567"), (0.0123456, "0.0123"), (9.9, "9.90")]
)
def test_numbers_have_no_exponent(value, text):
    assert report_cells.number(value) == text


def test_a_summary_counts_losses_and_names_the_worst_case():
    ratios = (0.5, 4.0, 2.0)
    rows = [row(name=f"case {r}", peers={"eager": 0.01 * r, "SDPA": 0.02 * r}) for r in ratios]
    text = report_tables.summary(rows)
    assert "Over the best peer of each case 1.59×, over SDPA 3.17×" in text
    assert "Slower than the best peer in 1 of 3 cases; at worst 0.50× (case 0.5, " in text
    assert text.endswith("beside eager).")
    assert "1 of 4 cases have no peer here" in report_tables.summary([*rows, row(peers={})])
    assert report_tables.summary([row(peers={})]) == "No case has a peer here."


def test_what_was_left_out_is_grouped_by_reason():
    absent = {"flash-attn": "not installed", "xformers": "not installed", "Flex": "no backward"}
    data = run([record(left_out=absent), record(left_out={"xformers": "not installed"})])
    assert report_tables.left_out(data)[1] == [
        ["not installed", "flash-attn; xformers", "2"], ["no backward", "Flex", "1"]
    ]  # fmt: skip
    page = report.markdown(data, {})
    assert "| not installed | flash-attn; xformers | 2 |" in page
    assert "not installed | flash-attn; xformers | 2" in report.text(data)


def test_failures_are_loud():
    data = run([record(), record(name="bad", results={}, failed="AssertionError: out: off")])
    line = "**FAILED**: attention, bad, B1 H12 S197 D64, full, float32, forward: AssertionError"
    page = report.markdown(data, {})
    assert line in page and page.index(line) < page.index("## Attention")
    assert line in report.text(data).splitlines()[-1]
    assert "bad" not in page.replace(line, ""), "it has no line among the results"


def test_a_case_that_mmkernels_has_no_part_in_is_among_the_left_out():
    missing = record(results={}, left_out={"mmkernels": "timm is not installed"}, suite="models")
    page = report.markdown(run([record(), missing]), {})
    assert "## Models" not in page and "| timm is not installed | mmkernels | 1 |" in page


def test_cases_that_were_not_reached_are_listed():
    data = run([record()]) | {"finished": False, "not_reached": ["attention, late", "models, x"]}
    page = report.markdown(data, {})
    assert "**Cut off: 2 of 3 cases are missing.**" in page
    assert "## Not reached\n\n- attention, late\n- models, x" in page
    assert "Cut off: 2 of 3" in report.text(data)
    assert "Cut off" not in report.markdown(run([record()]), {})


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, ["Measured on a CPU"]),
        ({"quick": True}, ["Smoke test, not a result", "Measured on a CPU"]),
        (GPU, []),
        ({**GPU, "quick": True}, ["Quick run"]),
    ],
)
def test_a_run_is_called_what_it_is(environment, said):
    data = run([record()], **environment)
    for text in (report.markdown(data, {}), report.text(data)):
        found = [
            label
            for label in ("Smoke test, not a result", "Measured on a CPU", "Quick run")
            if label in text
        ]
        assert found == said


def test_the_environment_is_shown():
    data = run([record()], **GPU, dirty=True, variables={"OMP_NUM_THREADS": "2"})
    for text in (report.markdown(data, {}), report.text(data)):
        for fact in (
            "NVIDIA Fake 200, capability 9.0, 132 SMs, L2 50 MiB, 139 GiB, CUDA 13.0, driver 580.1",
            "SM clock under load 1980 MHz, memory clock 3201 MHz",
            "a CPU, 2 cores (AVX2), 2 threads",
            "0.1.0 at 0123456, with uncommitted changes", "triton 3.8.0", "OMP_NUM_THREADS=2",
            "2026-11-29T10:00:00+00:00, seed 0", "`python -m mmkernels bench`",
            "float32 0.100 TFLOP/s, bfloat16 0.400 TFLOP/s, copy 10.0 GB/s",
        ):  # fmt: skip
            assert fact in text


def test_a_checkout_without_git_has_no_commit():
    assert "0.1.0 |" in report.markdown(run([record()], commit=None, dirty=None), {})


def test_csv_has_a_row_for_each_implementation():
    one = record(scale=197, peers={"SDPA": 0.02, "eager": 0.04})
    text = report.report_csv.text(run([one, record(results={}, failed="no")]))
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [line["implementation"] for line in lines] == ["mmkernels", "SDPA", "eager"]
    sdpa = lines[1]
    assert (sdpa["median_s"], sdpa["ratio"], sdpa["samples"]) == ("0.02", "2.0", "3")
    assert (sdpa["share_of_ceiling"], sdpa["best_peer"], sdpa["scale"]) == ("0.25", "SDPA", "197")
    assert float(sdpa["flops_per_s"]) == 2.5e10 and float(sdpa["bytes_per_s"]) == 5e7
    assert lines[0]["ratio"] == "" and lines[0]["launch_s"] == ""


def test_a_bar_in_a_mask_keeps_the_columns():
    page = report.markdown(run([record(mask="causal | spans")]), {})
    (line, *_) = [line for line in page.splitlines() if r"causal \| spans" in line]
    header = next(line for line in page.splitlines() if line.startswith("| model"))
    assert line.replace(r"\|", "").count("|") == header.count("|")


def test_plots_are_shown_below_their_suites():
    images = {"overview": "a.png", "attention": "b.png", "attention-2": "c.png", "models": "d.png"}
    page = report.markdown(run([record(), record(suite="models")]), images, level=2)
    parts = ["## Benchmarks: cpu", "(a.png)", "### Attention", "(b.png)", "(c.png)", "### Models"]
    places = [page.index(part) for part in [*parts, "(d.png)"]]
    assert places == sorted(places)


def test_a_measured_run_can_be_reported(monkeypatch, tmp_path):
    """The contract with what measures: every column is filled from a real record."""
    monkeypatch.setattr(roofline, "QUICK_SIZES", {"cpu": (32, 2**12)})
    cases = [case(), case("wrong", name="broken"), case("absent", name="gone")]
    data = running.measured(cases, torch.device("cpu"), quick=True, command="c")
    path = tmp_path / "run.json"
    running.write(path, data)
    monkeypatch.setattr(report.report_plots, "why_not", lambda: "no plots")
    data = report.load(path)
    assert report.write(data, path) == [path, path.with_suffix(".md"), path.with_suffix(".csv")]
    page = path.with_suffix(".md").read_text()
    assert "a product" in page and "**FAILED**: attention, broken" in page and "no plots" in page
    assert "no such library" in page


def test_json_of_pytest_benchmark_is_read(tmp_path):
    records, failed = [record(), record(name="b")], record() | {"failed": "wrong", "results": {}}
    expected = run([*records, failed]) | {"finished": False}
    data = {
        "machine_info": {
            **expected["environment"], "ceilings": CEILINGS, "without_numbers": [failed],
        },
        "commit_info": {}, "datetime": "2026", "version": "5",
        "benchmarks": [{"name": r["name"], "extra_info": r, "stats": {}} for r in records],
    }  # fmt: skip
    path = tmp_path / "run.json"
    path.write_text(json.dumps(data))
    assert report.load(path) == expected


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 2}', '{"machine_info": {"cpu": "x"}, "benchmarks": []}']
)
def test_another_json_is_refused(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is no JSON of a run"):
        report.load(path)


def test_results_of_ours_by_backend_have_ratios_too():
    one = record()
    one["results"]["mmkernels triton"] = result(0.02, 0.01)
    (rows,) = report_rows.suites(run([one])).values()
    assert cells(report_tables.every(rows), 2)["mmkernels is faster"] == "2.00×"
