"""Has every problem a configuration that fits on every GPU, and the user's own comes first?"""

import concurrent.futures
import contextlib
import json
import shutil
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mmkernels as mm
from mmkernels._core import triton_runtime, tuning, tuning_entries, tuning_store
from mmkernels._core.triton_runtime import KIB, KNOWN_GPUS
from mmkernels._core.tuning import Config, Problem

DIMS = [(d, d) for d in (8, 16, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256)]
DIMS += [(192, 128), (64, 256), (16, 40), (72, 24), (256, 8)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
H100 = KNOWN_GPUS["sm_90"]
PROBLEM = Problem("forward", 128, 128, torch.bfloat16, True)
TUNED = Config(64, 64, 4, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No tables but the built-in one, and a process that has read nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning_store, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv("MMKERNELS_TUNING", raising=False)
    tuning.forget()
    yield tmp_path
    tuning.forget()


def entry(problem=PROBLEM, config=TUNED, **made_with):
    return {
        "problem": problem.key(),
        "config": config._asdict(),
        **tuning_entries.made_with(),
        **made_with,
    }


def problems(kernel):
    for dims in DIMS:
        for dtype in DTYPES:
            for masked in (False, True):
                for bias in (False, True):
                    yield Problem(kernel, *dims, dtype, masked, bias)


@pytest.mark.parametrize("kernel", tuning.KERNELS)
@pytest.mark.parametrize("arch", KNOWN_GPUS)
def test_every_configuration_fits(arch, kernel):
    gpu = KNOWN_GPUS[arch]
    for problem in problems(kernel):
        config = tuning.configuration(problem, gpu)
        assert problem.fits(config, gpu), (problem, config)
        assert tuning.shared_bytes(problem, config, gpu) <= gpu.shared
        assert config.num_stages in (1, 2) if arch.startswith("gfx") else config.num_stages >= 1
        assert config.num_warps in (4, 8)
        for block in config[:2]:
            assert block >= 16 and block & (block - 1) == 0


@pytest.mark.parametrize("kernel", tuning.KERNELS[:4])
def test_tiles_of_hopper_are_tall_enough_for_wgmma(kernel):
    for problem in problems(kernel):
        if problem.dtype != torch.float32:
            config = tuning.configuration(problem, H100)
            rows = config.BLOCK_N if kernel == "backward_keys" else config.BLOCK_M
            assert rows >= 64, problem


@pytest.mark.parametrize("kernel", tuning.KERNELS)
@pytest.mark.parametrize("arch", ["sm_86", "sm_90", "gfx942"])
def test_candidates_fit_and_begin_with_the_table(arch, kernel):
    gpu = KNOWN_GPUS[arch]
    for problem in problems(kernel):
        found = problem.candidates(gpu)
        assert found[0] == problem.default(gpu)
        assert len(set(found)) == len(found)
        assert all(problem.fits(config, gpu) for config in found)
    many = Problem(kernel, 64, 64, torch.bfloat16, True).candidates(H100)
    assert 10 < len(many) < 80


def test_a_gpu_with_less_memory_gets_smaller_tiles():
    for shared in range(200, 32, -8):
        gpu = replace(H100, shared=shared * KIB)
        assert PROBLEM.fits(tuning.configuration(PROBLEM, gpu), gpu)


def test_estimates_grow_with_the_tile():
    for kernel in tuning.KERNELS:
        problem = PROBLEM._replace(kernel=kernel)
        small, large = Config(64, 32, 4, 2), Config(64, 64, 4, 3)
        for estimate in (tuning.shared_bytes, tuning.registers):
            assert estimate(problem, small, H100) < estimate(problem, large, H100)
    with_bias = PROBLEM._replace(bias=True)
    assert tuning.shared_bytes(PROBLEM, TUNED, H100) < tuning.shared_bytes(with_bias, TUNED, H100)


@pytest.mark.parametrize(
    ("dim", "widths"),
    [
        (8, (16, 0)), (16, (16, 0)), (20, (32, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)),
        (80, (64, 16)), (96, (64, 32)), (112, (128, 0)), (128, (128, 0)), (160, (128, 32)),
        (192, (128, 64)), (256, (256, 0)),
    ],
)  # fmt: skip
def test_split_dim(dim, widths):
    assert tuning.split_dim(dim) == widths


@pytest.mark.parametrize(
    ("gpu", "family"),
    [
        (replace(H100, arch="sm_103"), "sm_100"),
        (replace(H100, arch="sm_87", shared=163 * KIB), "sm_80"),
        (replace(H100, arch="sm_121", shared=99 * KIB), "small"),
        (replace(H100, arch="gfx950", shared=160 * KIB), "gfx942"),
    ],
)
def test_an_unknown_gpu_takes_the_nearest_rows_and_says_so(gpu, family):
    assert tuning.family(gpu) == family
    assert gpu.arch in tuning.note(gpu) and family in tuning.note(gpu)
    assert PROBLEM.fits(tuning.configuration(PROBLEM, gpu), gpu)
    assert tuning.note(H100) is None


def test_override_nests_and_ends():
    before = tuning.configuration(PROBLEM, H100)
    with tuning.override("forward", TUNED) as outer:
        assert not outer.used
        with tuning.override("forward", Config(16, 16, 4, 1)):
            assert tuning.configuration(PROBLEM, H100) == (16, 16, 4, 1)
        assert not outer.used
        assert tuning.configuration(PROBLEM, H100) == TUNED and outer.used
        assert tuning.configuration(PROBLEM._replace(kernel="decode"), H100) != TUNED
    assert tuning.configuration(PROBLEM, H100) == before
    with pytest.raises(ValueError, match=r"kernel is 'backwards'; it must be one of .*forward"):
        tuning.override("backwards", TUNED)


def test_a_tuned_configuration_is_used_for_its_problem_alone():
    tuning_store.merge(H100.name, [entry()])
    assert tuning.configuration(PROBLEM, H100) == TUNED
    for other in (PROBLEM._replace(masked=False), PROBLEM._replace(head_dim=64)):
        assert tuning.configuration(other, H100) == other.default(H100)
    assert tuning.configuration(PROBLEM, KNOWN_GPUS["sm_80"]) != TUNED
    with tuning.override("forward", Config(16, 16, 4, 1)):
        assert tuning.configuration(PROBLEM, H100) == (16, 16, 4, 1)


def test_the_file_is_read_once(monkeypatch):
    tuning.configuration(PROBLEM, H100)
    monkeypatch.setattr(tuning_store, "read", lambda name: pytest.fail("read again"))
    other = PROBLEM._replace(head_dim=64)
    assert tuning.configuration(other, H100) == other.default(H100)


def test_tuning_can_be_switched_off(monkeypatch):
    tuning_store.merge(H100.name, [entry()])
    monkeypatch.setenv("MMKERNELS_TUNING", "0")
    assert tuning.configuration(PROBLEM, H100) == PROBLEM.default(H100)
    assert "MMKERNELS_TUNING=0" in tuning.note(H100)


@pytest.mark.parametrize(
    "made_with", [{"triton": "2.0.0"}, {"mmkernels": "0.0.1"}, {"kernels": "0123456789ab"}]
)
def test_entries_of_another_version_or_other_kernels_are_not_used_and_not_lost(made_with):
    file = tuning_store.merge(H100.name, [entry(**made_with)])
    assert tuning.configuration(PROBLEM, H100) == PROBLEM.default(H100)
    note = tuning.note(H100)
    assert str(file) in note and "another triton" in note and "other kernels" in note
    assert f"another mmkernels than {mm.__version__}" in note and "tune again" in note
    tuning_store.merge(H100.name, [entry()])
    tuning.forget()
    assert tuning.configuration(PROBLEM, H100) == TUNED
    assert tuning.note(H100) is None
    assert made_with.items() <= tuning_store.read(H100.name)[0].items()


@pytest.mark.parametrize(
    "source",
    [
        "attention/triton_decode.py",
        "_core/tuning.py",
        "patch_embed/triton_forward.py",
        "patch_embed/triton_config.py",
    ],
)
def test_an_entry_is_of_the_kernels_and_of_their_tables(source, tmp_path):
    kernels = shutil.ignore_patterns("*.so", "__pycache__")
    copy = shutil.copytree(tuning_entries.PACKAGE, tmp_path / "mmkernels", ignore=kernels)
    before = tuning_entries.digest(tuning_entries.PACKAGE)
    assert tuning_entries.digest.__wrapped__(copy) == before
    with open(copy / source, "a") as file:
        file.write("\n")
    assert tuning_entries.digest.__wrapped__(copy) != before


def test_sources_are_read_only_where_there_is_a_file(monkeypatch):
    monkeypatch.setattr(tuning_entries, "digest", lambda _: pytest.fail("sources read"))
    assert tuning.configuration(PROBLEM, H100) == PROBLEM.default(H100)


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_user_without_a_home_has_the_table(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert tuning.configuration(PROBLEM, H100) == PROBLEM.default(H100)
    assert "Set XDG_CACHE_HOME" in tuning.note(H100)
    with pytest.raises(OSError, match="Set XDG_CACHE_HOME"):
        tuning_store.merge(H100.name, [entry()])


def test_what_was_tuned_in_ieee_does_not_serve_tf32():
    problem = PROBLEM._replace(dtype=torch.float32)
    config = Config(16, 32, 4, 2)
    tuning_store.merge(H100.name, [entry(problem, config)])
    assert tuning.configuration(problem, H100) == config
    with precision("tf32"):
        assert problem.key().endswith("tf32 masked")
        assert tuning.configuration(problem, H100) == problem.default(H100)
    assert tuning.configuration(problem, H100) == config


@contextlib.contextmanager
def precision(name):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = name
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("setting", ["fp32_precision", "allow_tf32", "matmul_precision"])
def test_float32_is_ieee_unless_torch_is_told(setting):
    assert triton_runtime.input_precision(torch.float32) == "ieee"
    with precision(torch.backends.cuda.matmul.fp32_precision):
        if setting == "fp32_precision":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        elif setting == "allow_tf32":
            torch.backends.cuda.matmul.allow_tf32 = True
        else:
            torch.set_float32_matmul_precision("high")
        try:
            assert triton_runtime.input_precision(torch.float32) == "tf32"
            assert triton_runtime.input_precision(torch.bfloat16) == "ieee"
        finally:
            torch.set_float32_matmul_precision("highest")


def test_an_override_is_its_threads_own_and_may_be_entered_again():
    one, other = Config(16, 16, 4, 1), Config(32, 32, 4, 1)
    mine = tuning.override("forward", one)
    with mine, mine:
        seen = []
        thread = threading.Thread(target=lambda: seen.append(tuning.overridden("forward")))
        thread.start()
        thread.join()
        assert seen == [None]
        with tuning.override("forward", other):
            assert tuning.overridden("forward") == other
        assert tuning.overridden("forward") == one
    assert tuning.overridden("forward") is None


def test_overrides_of_two_threads_do_not_meet():
    """Interleaved: both enter, the first leaves, the second still has its own."""
    shared, step = tuning.override("forward", TUNED), threading.Barrier(2, timeout=20)

    def run(first):
        own = tuning.override("decode", Config(16, 32 if first else 64, 4, 1))
        with own, shared:
            step.wait()
            inside = [tuning.overridden("decode"), tuning.overridden("forward")]
            step.wait()
            if not first:
                step.wait()
                inside.append(tuning.overridden("decode"))
        if first:
            step.wait()
        assert inside == [own.config, TUNED] + [own.config] * (not first)
        return tuning.overridden("decode") or tuning.overridden("forward")

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, (True, False))) == [None, None]


def test_a_tuned_configuration_that_does_not_fit_is_reported():
    tuning_store.merge(H100.name, [entry(config=Config(128, 128, 4, 4))])
    with pytest.warns(UserWarning, match=r"'forward D128.* does not fit NVIDIA H100.*tune"):
        assert tuning.configuration(PROBLEM, H100) == PROBLEM.default(H100)


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "{}", '{"entries": 3}', '{"entries": [3]}',
        '{"entries": [{"problem": "x"}]}',
        '{"entries": [{"problem": "x", "config": {"BLOCK_M": 64}}]}',
        json.dumps({"entries": [entry(config=Config(64, 0, 4, 2))]}),
        json.dumps({"entries": [entry(config=Config(64, "64", 4, 2))]}),
        json.dumps({"entries": [entry(config=Config(48, 64, 4, 2))]}),
        json.dumps({"entries": [entry(config=Config(8, 64, 4, 2))]}),
        json.dumps({"entries": [entry(config=Config(64, 64, 3, 2))]}),
        json.dumps({"entries": [entry(config=Config(64, 64, 4, 40))]}),
    ],
)  # fmt: skip
def test_a_corrupt_file_is_reported_with_the_fix_and_left_alone(content):
    file = tuning_store.path(H100.name)
    file.parent.mkdir()
    file.write_text(content)
    with pytest.warns(UserWarning, match="delete it, then run python -m mmkernels tune"):
        assert tuning.configuration(PROBLEM, H100) == PROBLEM.default(H100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning.configuration(PROBLEM._replace(head_dim=64), H100)  # once a process
    assert str(file) in tuning.note(H100)
    with pytest.raises(ValueError, match=rf"{file} is not a file of tuned configurations \("):
        tuning_store.merge(H100.name, [entry()])
    assert file.read_text() == content


def test_saving_keeps_what_is_there_and_replaces_the_same_problem():
    other = PROBLEM._replace(head_dim=64)
    tuning_store.merge(H100.name, [entry(), entry(other)])
    tuning_store.merge(H100.name, [entry(config=Config(128, 32, 8, 1))])
    tuning.forget()
    assert tuning.configuration(PROBLEM, H100) == (128, 32, 8, 1)
    assert tuning.configuration(other, H100) == TUNED


def test_a_failed_save_leaves_the_old_file_and_no_other(monkeypatch):
    file = tuning_store.merge(H100.name, [entry()])
    old = file.read_text()
    monkeypatch.setattr(json, "dump", lambda value, stream, **_: stream.write("{") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tuning_store.merge(H100.name, [entry(PROBLEM._replace(head_dim=64))])
    assert file.read_text() == old
    assert not list(file.parent.glob("*.part"))


def test_the_file_is_named_after_the_gpu(cache, monkeypatch):
    wanted = cache / "mmkernels" / "tuning-nvidia-rtx-pro-6000.json"
    assert tuning_store.path("NVIDIA RTX PRO 6000") == wanted
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(cache / "home"))
    assert tuning_store.path("A/B").parent == cache / "home" / ".cache" / "mmkernels"
    assert tuning_store.path("A/B").name == "tuning-a-b.json"
