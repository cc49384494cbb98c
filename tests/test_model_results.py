"""Does what README and docs say of the trained model come from its run, and is it true?"""

import json

import pytest

from mmkernels.models.trained import TINY

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from mmkernels.models.multimodal import MultimodalModel
from mmkernels.training import digits, evaluate, phrases, report, speech
from mmkernels.training.examples import Material
from tools import model_results

RECORD = json.loads((TINY / report.RUN).read_text())


def test_pages_show_the_committed_run():
    assert model_results.README.read_text() == model_results.readme(), "run `make docs`"
    assert model_results.PAGE.read_text() == model_results.page(), "run `make docs`"


@pytest.mark.parametrize("task", report.TARGETS)
def test_the_committed_run_reached_its_targets(task):
    assert RECORD["results"]["voices"][task]["accuracy"] >= report.TARGETS[task]


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_a_sum_needs_both(modality):
    result = RECORD["results"]["voices"]["sum"]
    assert result["shuffled"][modality] <= result["chance"] + 0.06


def test_the_model_was_trained_from_nothing_by_the_command_that_is_shown():
    assert RECORD["preset"] == "tiny"
    assert not RECORD["environment"]["quick"]
    assert RECORD["environment"]["command"].startswith("python -m mmkernels train")
    assert sum(stage["steps"] for stage in RECORD["training"]["stages"].values()) > 1000


def test_the_files_are_small_enough_to_ship():
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 8e6


def test_the_committed_model_answers_as_its_run_says():
    """Other questions than the run's own: so many wrong by chance would be one in ten thousand."""
    pytest.importorskip("espeakng_loader")
    clips = speech.espeak_clips(["en-gb-scotland+Alicia", "en+steph"], settings=2, seed=5)
    material = Material(
        digits.split()["test"], speech.SpeechBank.of(clips), phrases.talk(), train=False
    )
    results = evaluate.evaluate(
        MultimodalModel.from_pretrained(TINY), material, evaluate.Judges(), count=40, seed=11,
        tasks=("see", "hear", "sum"),
    )  # fmt: skip
    for task, result in results.items():
        assert result.accuracy >= report.TARGETS[task] - 0.2, task
