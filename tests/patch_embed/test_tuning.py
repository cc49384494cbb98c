"""Which tiles does the patch embedding take, from the built-in table and from what was measured?"""

from dataclasses import replace

import pytest
import torch

import mmkernels as mm
from mmkernels._core import triton_runtime, tuning_choice, tuning_entries, tuning_store
from mmkernels._core.triton_runtime import KIB, KNOWN_GPUS
from mmkernels._core.tuning_choice import Config
from mmkernels.patch_embed import triton_config, triton_fit
from mmkernels.patch_embed.triton_config import Problem

bf16, fp32, u8 = torch.bfloat16, torch.float32, torch.uint8
DTYPES = [(bf16, bf16), (u8, bf16), (fp32, bf16), (fp32, fp32), (u8, fp32)]
H100 = KNOWN_GPUS["sm_90"]
FORWARD = Problem("patch_forward", 64, bf16, bf16)
WEIGHT = Problem("patch_weight", 64, bf16, bf16)
ROWS, DIM = 256 * 197, 768  # nine turns of the largest tiles


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    """No tables but the built-in one, and a process that has read nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning_store, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv("MMKERNELS_TUNING", raising=False)
    tuning_choice.forget()
    yield
    tuning_choice.forget()


def problems(gpu):
    for pixels, dtype in DTYPES:
        for step in (16, 32, 64):
            problem = Problem("patch_forward", step, pixels, dtype)
            yield from triton_config.by_tile(problem, gpu)
            yield problem._replace(kernel="patch_weight")


def save(*measured):
    """As `tune` would: (problem, configuration, milliseconds)."""
    made_with = tuning_entries.made_with()
    entries = [
        {"problem": p.key(), "config": c._asdict(), "milliseconds": t, **made_with}
        for p, c, t in measured
    ]
    tuning_store.merge(H100.name, entries)
    tuning_choice.forget()


@pytest.mark.parametrize("arch", KNOWN_GPUS)
def test_candidates_fit_and_begin_with_the_table(arch):
    gpu = KNOWN_GPUS[arch]
    for problem in problems(gpu):
        first, *others = problem.candidates(gpu)
        row = triton_config.row(problem.dtype, gpu)
        assert first in (*row.forward, row.weight), problem  # as it stands: all fit
        assert first == problem.default(gpu) and len(set(others)) == len(others) >= 1
        assert all(problem.fits(config, gpu) for config in (first, *others)), problem
        assert all(c[:2] == problem.tile for c in others) or problem.tile is None


def test_a_gpu_with_less_memory_gets_fewer_stages():
    gpu = replace(H100, shared=100 * KIB)
    problem = FORWARD._replace(tile=(128, 256))
    assert problem.default(gpu).num_stages < problem.default(H100).num_stages
    assert triton_fit.shared_bytes(problem, problem.default(gpu), gpu) <= gpu.shared


def test_names():
    assert FORWARD._replace(tile=(128, 64)).key() == "patch_forward K64 bfloat16 bfloat16 128x64"
    assert WEIGHT._replace(pixels=u8).key() == "patch_weight K64 uint8 bfloat16"


def test_the_pace_of_all_tile_sizes_is_measured_or_of_none():
    """The table would take the largest; where the next was fastest, calls of many turns take it."""
    large, middle, small = triton_config.by_tile(FORWARD, H100)
    tuned = [
        (large, Config(128, 256, 8, 4), 3.0),
        (middle, Config(128, 128, 8, 4), 2.0),
        (small, Config(64, 64, 8, 2), 6.0),
    ]
    assert triton_config.forward(FORWARD, ROWS, DIM, H100) == Config(128, 256, 8, 3)
    save(*tuned[1:])
    assert triton_config.forward(FORWARD, ROWS, DIM, H100) == Config(128, 256, 8, 3)
    assert triton_config.forward(FORWARD, 197, DIM, H100) == Config(64, 64, 8, 2)
    save(*tuned)
    assert triton_config.forward(FORWARD, ROWS, DIM, H100) == Config(128, 128, 8, 4)
    assert triton_config.forward(FORWARD._replace(pixels=u8), ROWS, DIM, H100)[:2] == (128, 256)


def test_one_turn_of_small_tiles_beats_one_of_large_ones():
    """48 tiles of 64 x 64 run at once; twelve of 128 x 128 would leave most of the GPU idle."""
    paces = ((128, 256), 1.0), ((128, 128), 1.1), ((64, 64), 1.5)
    save(*((FORWARD._replace(tile=tile), Config(*tile, 8, 3), time) for tile, time in paces))
    assert triton_config.forward(FORWARD, 197, DIM, H100)[:2] == (64, 64)
    assert triton_config.forward(FORWARD, ROWS, DIM, H100)[:2] == (128, 256)


def test_a_saved_configuration_of_another_tile_is_passed_over():
    problem = FORWARD._replace(tile=(128, 128))
    save((problem, Config(64, 64, 4, 2), 1.0))
    with pytest.warns(UserWarning, match="does not fit"):
        assert tuning_choice.configuration(problem, H100) == problem.default(H100)


def test_the_weights_gradient_takes_what_was_tuned_and_an_override_before_it():
    assert tuning_choice.configuration(WEIGHT, H100) == triton_config.TABLE["sm_90"].weight
    save((WEIGHT, Config(64, 128, 4, 2), 1.0))
    assert tuning_choice.configuration(WEIGHT, H100) == Config(64, 128, 4, 2)
    with tuning_choice.override("patch_weight", Config(64, 64, 4, 2)) as asked:
        assert tuning_choice.configuration(WEIGHT, H100) == asked.config and asked.used


def test_an_override_of_the_forward_pass_is_of_any_tile():
    with tuning_choice.override("patch_forward", Config(64, 64, 4, 2)) as asked:
        assert triton_config.forward(FORWARD, ROWS, DIM, H100) == asked.config and asked.used


def test_the_files_are_read_once(monkeypatch):
    read, files = tuning_entries.read, []
    monkeypatch.setattr(tuning_entries, "read", lambda file: files.append(file) or read(file))
    triton_config.forward(FORWARD, ROWS, DIM, H100)
    triton_config.forward(FORWARD, 197, DIM, H100)
    tuning_choice.configuration(WEIGHT, H100)
    assert len(files) == len(set(files)) == 2, "the user's and the one that ships"


@pytest.mark.compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("pixels", [bf16, u8], ids=str)
@pytest.mark.parametrize("shape", ["ViT-B/16", "SigLIP-so400m/14"])
def test_the_estimate_of_shared_memory_bounds_what_triton_takes(shape, pixels, arch):
    from tests.patch_embed.test_triton_compiled import Row, launches
    from tests.triton_harness import resources

    gpu, step = KNOWN_GPUS[arch], 64 if shape == "ViT-B/16" else 32
    for kernel, config in (("forward", Config(64, 128, 8, 4)), ("weight", Config(128, 64, 8, 2))):
        row = Row(arch, shape, bf16, pixels, kernel, config)
        launch = next(x for x in launches(row) if x.kernel.__name__ == f"{kernel}_kernel")
        used = resources(launch.compile(arch)).shared
        problem = Problem(f"patch_{kernel}", step, pixels, bf16)
        assert used <= triton_fit.shared_bytes(problem, config, gpu) <= 2 * used + 2 * KIB


@pytest.mark.compiled
@pytest.mark.parametrize(("side", "step"), [(16, 64), (14, 32), (7, 16)])
@pytest.mark.parametrize("pixels", [bf16, u8], ids=str)
def test_a_call_asks_for_its_own_problem(pixels, side, step):
    from tests.triton_harness import recording_launcher

    launcher = recording_launcher(H100)
    problem = Problem("patch_forward", step, pixels, bf16)
    small = problem._replace(tile=(64, 64))
    gradient = problem._replace(kernel="patch_weight")
    save((small, Config(64, 64, 8, 2), 1.0), (gradient, Config(64, 128, 4, 2), 1.0))
    weight = torch.empty(768, 3, side, side, dtype=bf16, requires_grad=True)
    images = torch.empty(1, 3, 14 * side, 14 * side, dtype=pixels)
    triton_runtime.emulate(launcher)
    try:
        out = mm.patch_embed(images, weight, backend="triton")
        out.backward(torch.empty_like(out))
    finally:
        triton_runtime.emulate(None)
    launched = {x.kernel.__name__: x for x in launcher.run.launches}
    for name, config in (("forward", (64, 64, 8, 2)), ("weight", (64, 128, 4, 2))):
        launch = launched[f"{name}_kernel"]
        taken = launch.arguments | launch.options
        assert tuple(taken[field] for field in Config._fields) == config


def test_the_patches_of_the_command_have_the_steps_that_it_says():
    pytest.importorskip("triton")
    from mmkernels._core.tuning_patch_cases import PATCH_STEPS
    from mmkernels.patch_embed.triton_arguments import layout

    for side, step in PATCH_STEPS.items():
        made = layout(torch.Size((768, 3, 1, side, side)))
        assert step == made.WIDTH * made.BLOCK_ROWS
