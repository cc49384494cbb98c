"""Are the plots drawn, of what they say, and left out where matplotlib is missing?"""

import importlib.util
import warnings

import pytest

from mmkernels.bench import plot_ratios, plot_scaling, report, report_plots, report_rows
from mmkernels.bench.plot_scaling import points, slope
from mmkernels.bench.plot_style import labels, powers_of_two
from tests.bench.fake_run import record, run

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


def scaling(sizes=(512, 1024, 2048)) -> list[dict]:
    """Linear and quadratic in time, in memory linear and constant."""
    found = []
    for size in sizes:
        times = {"mmkernels": 1e-6 * size, "SDPA (dense mask)": 1e-9 * size**2}
        one = record(
            suite="scaling", scale=size, ours=times.pop("mmkernels"), peers=times, mask="window 256"
        )
        one["results"]["mmkernels"]["peak_bytes"] = 2**10 * size
        found.append(one)
    return found


def whole() -> dict:
    """A run with something for every plot."""
    attention = [
        record(name=f"model {i}", mode=mode, peers={"SDPA": 0.001 * (i + 5), "eager": 0.03})
        for i in range(20)
        for mode in ("forward", "forward + backward")
    ]
    models = [record(suite="models", name=f"model {i}") for i in range(3)]
    alone = record(suite="modules", peers={})
    overhead = record(suite="overhead", flops=None, bytes=None)
    return run([*attention, *models, *scaling(), alone, overhead])


@needs_matplotlib
def test_every_plot_is_drawn(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        files = report_plots.save(whole(), tmp_path / "new" / "run", "the/run.json")
    assert set(files) == {
        "overview", "attention", "attention-2", "models", "models-times", "scaling",
        "scaling-growth", "overhead",
    }  # fmt: skip
    for name, file in files.items():
        assert file == tmp_path / "new" / f"run-{name}.png"
        data = file.read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000
        assert b"Source\x00the/run.json" in data


@needs_matplotlib
def test_losses_have_their_own_colour_and_every_case_its_label():
    names = {"won": 0.02, "lost": 0.008}
    some = run([record(name=name, peers={"SDPA": time}) for name, time in names.items()])
    (rows,) = report_rows.suites(some).values()
    figure = plot_ratios.cases("attention", rows, "here")
    ratios, shares = figure.axes
    first, second = (bar.get_facecolor() for bar in ratios.patches)
    assert first != second
    assert [bar.get_width() for bar in ratios.patches] == pytest.approx([1.0, -0.2])
    assert [label.get_text() for label in ratios.get_yticklabels()] == ["won", "lost"]
    assert [text.get_text() for text in ratios.texts] == ["2.00× SDPA", "0.80× SDPA"]
    title, place = (text.get_text() for text in figure.texts)
    assert "full, float32, forward" in title and place == "here"
    assert shares.get_xlim()[1] >= 100


@needs_matplotlib
def test_what_lies_far_beyond_the_bars_is_a_number():
    peers = {"SDPA": 0.64, "eager": 0.02}
    (rows,) = report_rows.suites(run([record(peers=peers), record(name="b")])).values()
    axes = plot_ratios.cases("attention", rows, "here").axes[0]
    assert axes.get_xlim()[1] < 3
    assert [text.get_text() for text in axes.texts][-1] == "64.00× ◇ →"


@needs_matplotlib
def test_labels_tell_cases_apart():
    some = run([record(dtype="bfloat16"), record(), record(mode="forward + backward")])
    (rows,) = report_rows.suites(some).values()
    assert labels(rows) == (
        ["ViT-B/16 224, bf16, fwd", "ViT-B/16 224, fp32, fwd", "ViT-B/16 224, fp32, fwd + bwd"],
        "full",
    )
    shapes = ("B1 S9", "B8 S9", "B8 S9 uint8")
    some = run([*(record(shape=shape) for shape in shapes), record(name="other", shape="S7 B2")])
    (rows,) = report_rows.suites(some).values()
    names = ["ViT-B/16 224, B1", "ViT-B/16 224, B8", "ViT-B/16 224, B8 uint8", "other"]
    assert labels(rows)[0] == names


@needs_matplotlib
def test_growth_shows_slopes():
    (rows,) = report_rows.suites(run(scaling())).values()
    time, memory = plot_scaling.growth(rows, "here").axes
    legends = [
        [text.get_text() for text in axes.get_legend().get_texts()] for axes in (time, memory)
    ]
    assert legends[0] == ["mmkernels, slope 1.00", "SDPA (dense mask), slope 2.00"]
    assert legends[1] == ["mmkernels, slope 1.00", "SDPA (dense mask), slope 0.00"]


def test_ticks_are_few_and_hold_1():
    assert powers_of_two(0.3, 9.0) == [0.5, 1, 2, 4, 8]
    wide = powers_of_two(0.015, 70.0)
    assert 1 in wide and len(wide) <= 6 and min(wide) >= 0.015 and max(wide) <= 70


def test_a_slope_is_that_of_the_nearest_power_law():
    assert slope([(2.0, 3.0), (4.0, 12.0), (8.0, 48.0)]) == pytest.approx(2.0)
    assert slope([(1.0, 1.0), (2.0, 4.0), (4.0, 4.0)]) == pytest.approx(1.0)
    assert slope([(2.0, 3.0)]) is None


def test_points_are_in_order_and_leave_zeros_out():
    some = scaling((1024, 512))
    some[0]["results"]["SDPA (dense mask)"]["peak_bytes"] = 0
    (rows,) = report_rows.suites(run(some)).values()
    found = points(rows, "peak_bytes", 2**10)
    assert found == {"mmkernels": [(512, 512), (1024, 1024)], "SDPA (dense mask)": [(512, 3072)]}


def test_without_matplotlib_plots_are_left_out_and_that_is_said(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    data, path = whole(), tmp_path / "run.json"
    written = report.write(data, path)
    assert [file.suffix for file in written] == [".json", ".md", ".csv"]
    said = "Plots are left out: matplotlib is not installed"
    assert said in path.with_suffix(".md").read_text() and said in report.text(data)
