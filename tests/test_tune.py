"""Does tuning save the fastest configuration that is right, and show why others are not?"""

import json
import pwd
import sys
import types

import pytest
import torch

import mmkernels as mm
from mmkernels import __main__ as cli
from mmkernels import tune
from mmkernels._core import tuning, tuning_choice, tuning_entries, tuning_store
from mmkernels._core.triton_runtime import KNOWN_GPUS
from mmkernels._core.tuning import Problem
from mmkernels._core.tuning_search import Case, neighbours

GPU = KNOWN_GPUS["sm_90"]
PROBLEM = Problem("forward", 64, 64, torch.float32, True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning_store, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv("MMKERNELS_TUNING", raising=False)
    tuning.forget()
    yield tmp_path
    tuning.forget()


class Kernel:
    """A kernel whose time and faults depend on its configuration.

    Args:
        times: milliseconds by configuration; 10 for all others.
        wrong: configurations with a wrong result.
        broken: configurations that cannot be launched.
    """

    def __init__(self, times=None, wrong=(), broken=()):
        self.times, self.wrong, self.broken = times or {}, wrong, broken

    def case(self, problem):
        def config():
            return tuning_choice.configuration(problem, GPU)

        def verify():
            if config() in self.broken:
                raise RuntimeError("out of resource: shared memory\nhint")
            assert config() not in self.wrong, "out: max error 3 is above 0.1"

        return Case(problem, verify, lambda: self.times.get(config(), 10.0))


def search(kernel, problems=(PROBLEM,), **options):
    return tune.tune(problems, GPU, kernel.case, measure=lambda run: run(), **options)


def saved():
    return {e["problem"]: e["config"] for e in tuning_store.read(GPU.name)}


CANDIDATES = PROBLEM.candidates(GPU)
TABLE, FAST, FASTER = CANDIDATES[0], CANDIDATES[3], CANDIDATES[5]


def test_the_fastest_is_saved_and_used():
    [result] = search(Kernel({FAST: 4.0, FASTER: 3.0}))
    assert result.best == (FASTER, 3.0, None)
    assert [trial.config for trial in result.trials] == CANDIDATES
    assert tuning.configuration(PROBLEM, GPU) == FASTER
    [entry] = tuning_store.read(GPU.name)
    assert entry == {
        "problem": "forward D64 Dv64 float32 masked",
        "config": FASTER._asdict(),
        "milliseconds": 3.0,
        "table_milliseconds": 10.0,
        **tuning_entries.made_with(),
        "torch": torch.__version__,
        "mmkernels": mm.__version__,
    }


def test_one_that_is_wrong_or_fails_never_wins_and_is_shown():
    kernel = Kernel({FAST: 4.0, FASTER: 3.0, TABLE: 2.0}, wrong=[FASTER], broken=[TABLE])
    [result] = search(kernel)
    assert result.best.config == FAST
    text = tune.render(result)
    assert "AssertionError: out: max error 3 is above 0.1" in text
    assert "RuntimeError: out of resource: shared memory\n" in text + "\n"
    assert "4.000 ms" in text and f"table: {TABLE[0]} x {TABLE[1]}" in text and "failed" in text


def test_where_none_is_right_nothing_is_saved():
    [result] = search(Kernel(wrong=CANDIDATES))
    assert result.best is None and saved() == {}
    assert f"none of {len(CANDIDATES)} configurations was right" in tune.render(result)


def test_a_case_that_cannot_be_made_fails_its_problem_alone():
    other = PROBLEM._replace(masked=False)

    def make(problem):
        if problem == PROBLEM:
            raise RuntimeError("out of memory")
        return Kernel().case(problem)

    first, second = tune.tune([PROBLEM, other], GPU, make, measure=lambda run: run())
    assert first.best is None and first.trials[0].problem == "RuntimeError: out of memory"
    assert second.best is not None and saved().keys() == {other.key()}


def test_a_kernel_that_ignores_the_configuration_is_no_measurement():
    result, *_ = tune.tune(
        [PROBLEM], GPU, lambda p: Case(p, lambda: None, lambda: 1.0), measure=lambda run: run()
    )
    assert result.best is None
    assert result.trials[0].problem == "RuntimeError: the forward kernel did not run"


def test_the_table_stays_where_others_are_hardly_faster():
    [result] = search(Kernel({FAST: 9.9}))
    assert result.best.config == TABLE
    [result] = search(Kernel({FAST: 9.7}))
    assert result.best.config == FAST


def test_quick_tries_what_differs_in_one_field():
    [result] = search(Kernel(), select=neighbours)
    tried = [trial.config for trial in result.trials]
    assert tried[0] == TABLE and 2 < len(tried) < len(CANDIDATES)
    assert all(sum(a != b for a, b in zip(c, TABLE, strict=True)) == 1 for c in tried[1:])


def test_what_ships_is_tried_however_few_are():
    config = CANDIDATES[-1]
    assert config not in neighbours(CANDIDATES)
    file = tuning_store.shipped_path(GPU.name)
    file.parent.mkdir()
    entry = {"problem": PROBLEM.key(), "config": config._asdict(), "milliseconds": 2.0}
    file.write_text(json.dumps({"gpu": GPU.name, "entries": [entry]}))
    [result] = search(Kernel({config: 3.0}), select=neighbours)
    assert result.best.config == config and len(result.trials) == 1 + len(neighbours(CANDIDATES))


def test_a_quick_run_does_not_replace_what_a_full_one_found_by_what_is_slower():
    far = CANDIDATES[-1]
    kernel = Kernel({far: 3.0, neighbours(CANDIDATES)[1]: 8.0})
    search(kernel)
    assert saved() == {PROBLEM.key(): far._asdict()}
    search(kernel, select=neighbours)
    assert saved() == {PROBLEM.key(): far._asdict()}


def test_an_earlier_result_is_kept_through_an_interrupt():
    other = PROBLEM._replace(masked=False)
    search(Kernel(), [other], select=neighbours)

    def make(problem):
        if problem != PROBLEM:
            raise KeyboardInterrupt
        return Kernel({FAST: 1.0}).case(problem)

    with pytest.raises(KeyboardInterrupt):
        tune.tune([PROBLEM, PROBLEM._replace(head_dim=32)], GPU, make, measure=lambda run: run())
    assert saved().keys() == {PROBLEM.key(), other.key()}
    assert tuning.configuration(PROBLEM, GPU) == FAST


def test_progress_without_tqdm(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    search(Kernel(), select=neighbours)
    error = capsys.readouterr().err
    assert "forward D64" in error and error.endswith("\n")


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As if there were a GPU, with a fake kernel on it."""
    monkeypatch.setattr(tune, "unavailable", lambda dry: None)
    monkeypatch.setattr(tune, "current_gpu", lambda: GPU)
    monkeypatch.setattr(tune, "make_case", lambda problem, *_: Kernel({FAST: 1}).case(problem))
    monkeypatch.setattr(tune, "measure", lambda run: run())


def test_the_command_prints_and_saves(on_a_gpu, capsys):
    argv = ["--kernel", "forward", "decode", "--head-dim", "64", "80", "--dtype", "float32"]
    assert cli.main(["tune", "--quick", *argv]) == 0
    text = capsys.readouterr().out
    assert "decode D80 Dv80 float32 masked: " in text
    assert text.endswith(f"saved in {tuning_store.path(GPU.name)}\n")
    assert len(saved()) == 6  # decode always has lengths, a mask


def test_the_command_prints_json(on_a_gpu, capsys):
    argv = ["--kernel", "backward_bias", "--head-dim", "64", "--quick", "--json"]
    assert cli.main(["tune", *argv]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["gpu"] == GPU.name and report["file"] == str(tuning_store.path(GPU.name))
    problem = report["problems"]["backward_bias D64 Dv64 bfloat16 masked bias"]
    assert problem["best"]["config"] == problem["trials"][0]["config"]


def test_the_command_fails_where_no_configuration_is_right(on_a_gpu, monkeypatch, capsys):
    kernel = Kernel(broken=CANDIDATES)
    monkeypatch.setattr(tune, "make_case", lambda *_: kernel.case(PROBLEM))
    argv = ["--kernel", "forward", "--head-dim", "64", "--dtype", "float32"]
    assert cli.main(["tune", *argv]) == 1
    assert "was right; the table serves" in capsys.readouterr().out


def test_the_command_prints_what_it_found_before_an_interrupt(on_a_gpu, monkeypatch, capsys):
    def make(problem, *_):
        if problem.head_dim == 80:
            raise KeyboardInterrupt
        return Kernel({FAST: 1}).case(problem)

    monkeypatch.setattr(tune, "make_case", make)
    argv = ["--kernel", "forward", "--head-dim", "64", "80", "--quick", "--json"]
    assert cli.main(["tune", *argv]) == 130
    report = json.loads(capsys.readouterr().out)
    assert report["problems"].keys() == saved().keys()
    assert len(report["problems"]) == len(report["not_reached"]) == 2


def test_the_command_refuses_a_corrupt_file_before_it_measures(on_a_gpu, monkeypatch, capsys):
    file = tuning_store.path(GPU.name)
    file.parent.mkdir()
    file.write_text("{")
    monkeypatch.setattr(tune, "make_case", lambda *_: pytest.fail("measured"))
    assert cli.main(["tune"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and "delete it" in error and error.count("\n") == 1
    assert file.read_text() == "{"


def test_the_command_cannot_save_without_a_home_and_says_so_before_it_measures(
    on_a_gpu, monkeypatch, capsys
):
    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(tune, "make_case", lambda *_: pytest.fail("measured"))
    assert cli.main(["tune"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert "no folder to save tuned configurations" in error and "Set XDG_CACHE_HOME" in error


def test_all_kernels_but_the_bias_gradient_are_tuned_the_most_important_first(on_a_gpu, capsys):
    assert cli.main(["tune", "--quick", "--json"]) == 0
    names = list(json.loads(capsys.readouterr().out)["problems"])
    kernels = list(dict.fromkeys(name.split()[0] for name in names))
    assert kernels == [
        "forward", "backward_keys", "backward_queries", "patch_forward", "decode", "patch_weight",
    ]  # fmt: skip
    assert names[0].startswith("forward D128") and len(set(names)) == len(names)
    assert "patch_forward K32 uint8 bfloat16 128x256" in names
    assert saved().keys() == set(names)


def test_patch_problems_are_named_by_the_command(on_a_gpu, capsys):
    argv = ["--kernel", "patch_weight", "--patch", "7", "16", "--dtype", "float32", "--quick"]
    assert cli.main(["tune", *argv]) == 0
    wanted = [
        f"patch_weight K{k} {pixels} float32" for k in (16, 64) for pixels in ("float32", "uint8")
    ]
    assert list(saved()) == wanted


def test_past_the_limit_no_problem_is_begun_and_the_rest_is_named(on_a_gpu, monkeypatch, capsys):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(tune, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    argv = ["--kernel", "forward", "decode", "--head-dim", "64", "--dtype", "float32", "--json"]
    assert cli.main(["tune", "--limit", "15", *argv]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["problems"]) == ["forward D64 Dv64 float32"]
    assert report["not_reached"] == [
        "forward D64 Dv64 float32 masked",
        "decode D64 Dv64 float32 masked",
    ]
    assert saved().keys() == set(report["problems"])
    assert cli.main(["tune", "--limit", "0", *argv[:-1]]) == 0
    assert "forward D64 Dv64 float32: not reached\n" in capsys.readouterr().out


def test_a_dry_run_without_the_interpreter_says_how(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert cli.main(["tune", "--dry-run"]) == 2
    assert "TRITON_INTERPRET=1 python -m mmkernels tune --dry-run" in capsys.readouterr().err


def test_a_dry_run_searches_and_leaves_nothing(on_a_gpu, monkeypatch, capsys, cache):
    made = []

    def case(problem, device, toy):
        made.append((device, toy))
        return Kernel({FAST: 1}).case(problem)

    monkeypatch.setattr(tune, "make_case", case)
    monkeypatch.setattr(tune, "current_gpu", lambda: pytest.fail("asked for a GPU"))
    assert cli.main(["tune", "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["dry_run"], report["file"], report["gpu"]) == (True, None, "NVIDIA H100")
    assert "forward D128 Dv128 float16" in report["problems"]
    assert all(len(p["trials"]) == 2 and p["best"] for p in report["problems"].values())
    assert set(made) == {("cpu", True)} and not list(cache.iterdir())
    assert tuning.configuration(PROBLEM, GPU) == TABLE
    assert cli.main(["tune", "--dry-run", "--kernel", "decode"]) == 0
    assert capsys.readouterr().out.endswith("a dry run: nothing is saved\n")


def test_a_dry_run_ignores_what_is_wrong_with_the_users_file(on_a_gpu, capsys):
    file = tuning_store.path(GPU.name)
    file.parent.mkdir()
    file.write_text("{")
    assert cli.main(["tune", "--dry-run", "--kernel", "decode"]) == 0
    assert file.read_text() == "{"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_exit_code_2(capsys):
    assert cli.main(["tune"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert error.startswith("mmkernels tune: ") and "whose GPU is to be tuned" in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--head-dim", "300"], "--head-dim is 300; it must lie in [1, 256]"),
        (["--kernel", "sideways"], "sideways"),
        (["--dtype", "float64"], "float64"),
        (["--patch", "15"], "invalid choice: 15"),
        (["--limit", "-1"], "--limit is -1.0; it must be a number of seconds, 0 or more"),
        (["--limit", "nan"], "--limit is nan"),
        (["--dry-run", "--dtype", "bfloat16"], "a dry run takes float16 or float32"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["tune", *argv])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["tune", "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    options = ["--quick", "--limit", "--dry-run", "--kernel", "--head-dim", "--patch"]
    options += ["--dtype", "--bias", "--json"]
    assert all(option in text for option in options)
