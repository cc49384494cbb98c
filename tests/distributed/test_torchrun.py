"""Does `torchrun -m mmkernels train` train, end clearly when a process dies, and start again?"""

import os
import subprocess
import sys

import pytest

for library in ("tokenizers", "safetensors", "sklearn", "tqdm", "PIL", "matplotlib"):
    pytest.importorskip(library)

from mmkernels.models.multimodal import MultimodalModel  # noqa: E402 (may be absent)
from mmkernels.training import checkpoints  # noqa: E402
from mmkernels.training.loop import read_log  # noqa: E402


def torchrun(out, *options, restarts=0, kill=""):
    """The end of `torchrun -m mmkernels train` of the small model in two processes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", str(restarts), "-m", "tests.training.driver", "--dtype", "float32",
        "--out", str(out), *options,
    ]  # fmt: skip
    variables = {"OMP_NUM_THREADS": "1", "MMKERNELS_TEST_KILL": kill}
    return subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    done = torchrun(out, "--dp", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the table") == 1  # of rank 0 alone
    return out


def losses(out):
    return [line["loss"] for line in read_log(out)]


def test_it_writes_the_model(straight):
    assert len(losses(straight)) == 9
    MultimodalModel.from_pretrained(straight / "model")


def test_a_process_that_dies_ends_the_run_and_another_start_goes_on(straight, tmp_path):
    done = torchrun(tmp_path, "--dp", "2", kill="1 7")
    assert done.returncode != 0
    said = "rank 0 has lost another process"
    assert said in done.stderr and "The last checkpoint is of step 5" in done.stderr
    assert checkpoints.newest(tmp_path).state == {"step": 5}
    assert not (tmp_path / "model").exists()
    done = torchrun(tmp_path, "--sp", "2", "--resume")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == pytest.approx(losses(straight), rel=2e-3)


def test_torchrun_starts_it_again(straight, tmp_path):
    done = torchrun(tmp_path, "--dp", "2", restarts=1, kill="1 7")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == losses(straight)  # to the bit
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (
        straight / "model" / "model.safetensors"
    ).read_bytes()
