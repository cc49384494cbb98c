"""Does the page say what run.json holds, whatever recordings and codecs there are?"""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch

for library in ("tokenizers", "safetensors", "sklearn", "tqdm", "matplotlib"):
    pytest.importorskip(library)

from mmkernels.training import evaluate, report  # noqa: E402 (may be absent)
from mmkernels.training.recipes import SHARES  # noqa: E402
from tests.training import small  # noqa: E402

REAL = {
    "real_test": small.bank(("jackson", "theo"), "fsdd", 2),
    "real_speaker": small.bank(("george",), "fsdd", 3),
}
CODELESS = tuple(task for task in SHARES if task not in ("draw", "say"))
LOG = [
    {"step": n, "stage": stage, "loss": 5.0 / n, "tokens": 100 * n, "seconds": 0.5, "mfu": n / 10}
    for n, stage in enumerate(["pretrain"] * 3 + ["finetune"] * 30, 1)
]
COMMAND = "python -m mmkernels train --quick --seed 5"
PICTURES = ("loss.png", "samples.png", "attention.png")


def write(out, banks, codecs=True, log=LOG):
    """The record of an untrained model's report, and what was printed."""
    model = small.model(codecs)

    def generate(model, prompts, samplings):
        """A text for each, and a drawing and a sound for every other one."""
        text = list(model.tokenizer.encode("I see a seven."))
        v = model.vocabulary
        drawing = [v.image_start, *[v.first_image_code] * 16, v.image_end]
        sound = [v.audio_start, *[v.first_audio_code] * 9, v.audio_end]
        media = drawing + sound if codecs else []
        return [text + media * (place % 2) for place in range(len(prompts))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "generate", generate)
        out.mkdir()
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        printed = report.write(
            out, small.RECIPE, model, banks, device=torch.device("cpu"), command=COMMAND, seed=1
        )
    return json.loads((out / "run.json").read_text()), printed


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, record, printed) with all sets of recordings."""
    out = tmp_path_factory.mktemp("report") / "run"
    return out, *write(out, {**small.banks(), **REAL})


def test_the_page_is_made_of_the_record_alone(written):
    out, record, printed = written
    text = (out / "report.md").read_text()
    assert report.page(record) == text
    assert printed in text
    for name in PICTURES:
        assert f"({name})" in text
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.part")) + list(out.glob(".*"))


def leaves(value, path=()):
    """(path, number) of every number."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


def changed(record, path, value):
    record = copy.deepcopy(record)
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return record


def test_each_number_of_the_table_is_the_records(written):
    _, record, _ = written
    table = 0
    for path, _ in leaves(record["results"]):
        if path[-1] in ("accuracy", "chance", "image", "audio") and "harder_group" not in path:
            found = sum(
                "43.2%" in row for row in report.rows(changed(record, ["results", *path], 0.432))
            )
            assert found == 1, path
            table += 1
    assert table == sum(
        2 + len(r["shuffled"]) for of in record["results"].values() for r in of.values()
    )


@pytest.mark.parametrize(
    ("path", "value", "shown"),
    [
        (("preset",), "smol", "# mmkernels smol"),
        (("parameters",), 98765432, "98,765,432 parameters"),
        (("training", "seconds"), 4321.0, "72 minutes"),
        (("judges", "digit", "accuracy", "test digits"), 0.4321, "43.2% of test digits"),
        *(
            (("judges", "speech", "accuracy", words), 0.4321, f"43.2% of {words}")
            for words in (report.SETS[name] for name in ("voices", "real_test", "real_speaker"))
        ),
        (("results", "voices", "see", "harder_group", "accuracy"), 0.4321, "43.2% right"),
        (("results", "voices", "see", "harder_group", "count"), 4321, "4321 were asked about"),
        (("results", "voices", "draw", "colour_accuracy"), 0.4321, "drawings, 43.2% have"),
        (("results", "voices", "hear", "by_voice", "dora"), 0.4321, "| 43.2%"),
        (("results", "voices", "see", "by_seen", "3"), 0.4321, "| 43.2%"),
        (("results", "voices", "say", "by_digit", "0"), 0.4321, "| 43.2%"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_the_rest_of_the_page_is_the_records_too(path, value, shown, written):
    group = {"accuracy": 1.0, "count": 1}
    record = changed(written[1], ["results", "voices", "see", "harder_group"], group)
    assert shown not in report.page(record)
    assert shown in report.page(changed(record, path, value))


def test_where_it_comes_from(written):
    text = report.origin(written[1])
    record = written[1]
    assert f"{sum(x.numel() for x in small.model().parameters()):,} parameters" in text
    assert f"`{COMMAND}`" in text
    assert record["environment"]["cpu"] in text
    assert record["environment"]["date"][:10] in text
    assert "commit unknown" in report.origin(changed(record, ["environment", "commit"], None))
    dirty = changed(
        changed(record, ["environment", "commit"], "f" * 40), ["environment", "dirty"], True
    )
    assert "commit fffffff with changes" in report.origin(dirty)


def test_training_is_summed_up_from_the_log(written):
    training = written[1]["training"]
    assert training["seconds"] == pytest.approx(33 * 0.5)
    assert training["tokens_per_second"] == pytest.approx(100 * sum(range(1, 34)) / 16.5)
    assert training["mfu"] == pytest.approx(1.7)
    assert training["stages"]["pretrain"] == {
        "steps": 3, "tokens": 600, "seconds": 1.5, "loss": pytest.approx(5 / 3),
    }  # fmt: skip
    assert training["stages"]["finetune"]["steps"] == 30


def test_all_is_asked_with_voices_and_what_is_heard_with_each_set(written):
    results = written[1]["results"]
    assert list(results) == ["voices", "real_test", "real_speaker"]
    assert set(results["voices"]) == set(SHARES)
    for name in REAL:
        assert set(results[name]) == set(report.REAL_TASKS)
        assert set(results[name]["hear"]["by_voice"]) <= set(REAL[name].voices)
    assert {r["count"] for of in results.values() for r in of.values()} == {small.RECIPE.evaluated}


def test_targets_stand_beside_what_they_are_for(written):
    rows = {row[0]: row[-1] for row in report.rows(written[1])}
    assert {task: f"≥ {target:.0%}" for task, target in report.TARGETS.items()} == {
        title: target for title, target in rows.items() if target
    }


def test_judges_say_how_sure_they_are(written):
    judges = written[1]["judges"]
    assert set(judges) == {"digit", "speech"}
    assert judges["digit"]["accuracy"]["test digits"] > 0.95
    assert set(judges["speech"]["accuracy"]) == {
        report.SETS[name] for name in ("voices", "real_test", "real_speaker")
    }
    text = report.judged(written[1])
    assert f"trained on {judges['digit']['trained_on']}" in text
    assert f"{judges['digit']['accuracy']['test digits']:.1%} of test digits" in text


def test_what_each_digit_and_voice_gets(written):
    tables = report.fairness(written[1])
    assert len(tables) == 2
    assert re.findall(r"^\| (\w+)", tables[0], re.M) == ["digit", "see", "hear", "draw", "say"]
    for voice in written[1]["results"]["voices"]["hear"]["by_voice"]:
        assert f"| {voice} " in tables[1]


ABSENT = {
    "nothing but training": ({}, "train", "the recordings that it was trained on"),
    "a real test": ({"real_test": REAL["real_test"]}, "real_test", "real speakers, recordings"),
    "a real speaker": (REAL, "real_speaker", "a real speaker never heard"),
}


@pytest.mark.parametrize("case", ABSENT)
def test_without_synthetic_voices_it_says_what_it_asked_with(case, tmp_path):
    """As where espeakng-loader is not installed."""
    more, first, words = ABSENT[case]
    record, printed = write(tmp_path / "run", {"train": small.banks()["train"], **more})
    assert next(iter(record["results"])) == first
    assert set(record["results"]) == {first, *more}
    assert set(record["results"][first]) == set(SHARES)
    text = (tmp_path / "run" / "report.md").read_text()
    assert text == report.page(record) and printed in text
    assert words in report.asked(record)
    assert report.SETS["train"] not in record["judges"]["speech"]["accuracy"]
    if not more:
        assert "nothing was left to measure it on" in report.judged(record)


@pytest.mark.parametrize("banks", [{}, REAL], ids=["voices", "and real ones"])
def test_a_model_without_codecs(banks, tmp_path):
    """As of the preset smol: nothing is drawn or said, and nobody judges."""
    record, _ = write(tmp_path / "run", {**small.banks(), **banks}, codecs=False)
    assert record["judges"] == {}
    assert set(record["results"]["voices"]) == set(CODELESS)
    text = (tmp_path / "run" / "report.md").read_text()
    assert "Judges" not in text and "drawings" not in text
    assert text == report.page(record)


@pytest.mark.parametrize("log", [[], LOG[:1], LOG[:4]], ids=len)
def test_a_short_log(log, tmp_path):
    """No warning, and no division by zero."""
    record, _ = write(tmp_path / "run", small.banks(), codecs=False, log=log)
    assert sum(stage["steps"] for stage in record["training"]["stages"].values()) == len(log)
    assert (tmp_path / "run" / "loss.png").exists()


def test_only_the_recipes_tasks_are_asked(tmp_path):
    assert set(SHARES) == set(small.RECIPE.shares)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "RECIPE", replace(small.RECIPE, shares={"hear": 1.0, "sum": 1.0}))
        record, _ = write(tmp_path / "run", {**small.banks(), **REAL}, codecs=False)
    assert {name: set(of) for name, of in record["results"].items()} == {
        name: {"hear", "sum"} for name in ("voices", *REAL)
    }
    text = (tmp_path / "run" / "report.md").read_text()
    assert text == report.page(record) and "harder to read" not in text
