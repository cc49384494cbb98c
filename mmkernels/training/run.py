"""One training run from nothing to a table: data, codecs, stages, evaluation.

A run lives in one folder and can be stopped at any time; started again with resume, it goes on.

Processes that torchrun has started share the folder; the first of them writes all but checkpoints.

    start/          the model before its first step, codecs trained
    checkpoints/    the newest two
    log.jsonl       a line for each step
    settings.json   what may not change while the run goes on
    model/          the trained model, in bfloat16
    run.json        the evaluation and where it comes from
    report.md, loss.png, samples.png, attention.png
"""

import functools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels._core.progress import progress
from mmkernels.models import checkpoint, config, smollm
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.models.tokenizer import Tokenizer
from mmkernels.training import codecs, digits, phrases, recipes, speech, text
from mmkernels.training.digits import COLOURS, Digits
from mmkernels.training.examples import Material
from mmkernels.training.finetune import Finetuning
from mmkernels.training.loop import Settings, Trainer
from mmkernels.training.pretrain import Pretraining
from mmkernels.training.recipes import Recipe
from mmkernels.training.speech import SpeechBank
from mmkernels.training.stages import Stage
from mmkernels.training.world import World, whole

SETTINGS = "settings.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def train(
    recipe: Recipe,
    out: Path,
    *,
    data: Path | None,
    seed: int,
    device: torch.device,
    dtype: str,
    resume: bool,
    world: World | None = None,
) -> tuple[MultimodalModel, dict[str, SpeechBank]]:
    """Trains, and writes model/.

    Args:
        recipe: what and how long.
        out: the run's folder.
        data: real recordings and verse, or None.
        seed: of all chance, from 0 to 2³¹ − 1.
        device: where to compute.
        dtype: "float32", "bfloat16", or "auto": what the run has, or else the faster one.
        resume: go on with the run in `out`; without one, begin.
        world: the processes that train together; None: this one alone.

    Returns:
        The model as it was saved, in evaluation mode, and the recordings by what they are for.

    Raises:
        ValueError: `out` holds a run and resume is False, or one of other settings; or `out`,
            `data` or `seed` is none; or the model cannot be spread so.
    """
    world = World() if world is None else world
    settings = world.first(lambda: _settings(recipe, out, data, seed, dtype, resume))
    banks = speech.load(data, quick=recipe.evaluated < 100)
    images = digits.split()
    ceilings = world.first(lambda: {name: _ceiling(kind, device) for name, kind in DTYPES.items()})
    if settings["dtype"] == "auto":
        faster = ceilings["bfloat16"] > 1.5 * ceilings["float32"]
        settings["dtype"] = "bfloat16" if faster else "float32"
    if world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_file(out / SETTINGS, json.dumps(settings, indent=1).encode())
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        begin = functools.partial(_start, recipe, out, images["train"], banks["train"], data, seed)
        if world.plan.size > 1:  # the first trains the codecs, the others read them
            world.first(lambda: begin() and None)
        model = begin()
        stages = _stages(recipe, model, images["train"], banks["train"], data, seed)
        model.to(device).checkpointing = recipe.checkpointing
        dtype = settings["dtype"]
        kept = Settings(out, device, DTYPES[dtype], ceilings[dtype] * world.plan.size)
        trainer = Trainer(model, stages, kept, world)
        trainer.resume()
        trainer.run()
    finally:
        torch.set_deterministic_debug_mode(mode)
    weights = {}
    for name, x in model.own_weights().items():
        gathered = whole(x)
        if world.rank == 0:
            weights[name] = gathered.cpu()
    world.first(lambda: model.save_pretrained(out / "model", torch.bfloat16, weights))
    return MultimodalModel.from_pretrained(out / "model").to(device), banks


def _settings(
    recipe: Recipe,
    out: Path,
    data: Path | None,
    seed: int,
    dtype: str,
    resume: bool,
) -> dict[str, Any]:
    """Those of the run in `out`, or new ones; nothing is written."""
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed is {seed}; it must lie in [0, 2**31)")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder for the run")
    path = out / SETTINGS
    asked = {
        "recipe": json.loads(json.dumps(asdict(recipe))),
        "seed": seed,
        "data": _found(data),
        "dtype": dtype,
    }
    if path.exists():
        if not resume:
            raise ValueError(
                f"{out} already holds a run; give another folder, or --resume to go on with it"
            )
        found = json.loads(path.read_text())
        for key, value in asked.items():
            if found.get(key) != value and (key, value) != ("dtype", "auto"):
                raise ValueError(
                    f"{out} holds a run with {key} {found.get(key)!r}; it cannot go on with "
                    f"{value!r}. Give what it was begun with, or another folder"
                )
        return dict(found)
    return asked


def _found(data: Path | None) -> dict[str, int] | None:
    """How much a folder has of what is learned from."""
    if data is None:
        return None
    return {
        "recordings": sum(1 for _ in (data / "fsdd" / "recordings").glob("*.wav")),
        "characters": sum(map(len, text.corpus(data).values())),
    }


def _ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large matrix product, the best of a few."""
    edge = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        float((a @ b)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * edge**3 / best


def _start(
    recipe: Recipe, out: Path, images: Digits, bank: SpeechBank, data: Path | None, seed: int
) -> MultimodalModel:
    """The model before its first step; kept, for its codecs take a minute."""
    folder = out / "start"
    if folder.exists():
        model = MultimodalModel.from_pretrained(folder)
        if recipe.preset == "smol":
            smollm.freeze(model)
        return model
    torch.manual_seed(seed)
    if recipe.preset == "smol":
        model = smollm.multimodal()
    else:
        texts = [*text.corpus(data).values(), *(f"{q}\n{a}" for q, a in phrases.talk() * 3)]
        tokenizer = Tokenizer.train(texts, recipe.vocabulary)
        model = MultimodalModel(config.tiny(len(tokenizer)), tokenizer)
    for name, steps in _codec_training(model, recipe, images, bank, seed):
        with progress(recipe.codec_steps, "step") as advance:
            for _, loss in steps:
                advance(f"{name}, loss {loss:.3f}")
    model.save_pretrained(folder)
    return model


def _codec_training(
    model: MultimodalModel, recipe: Recipe, images: Digits, bank: SpeechBank, seed: int
) -> Iterator[tuple[str, Iterator[tuple[int, float]]]]:
    steps = recipe.codec_steps
    if model.image_codec is not None:
        yield (
            "image codec",
            codecs.train_image_codec(model.image_codec, images, steps=steps, seed=seed),
        )
    if model.audio_codec is not None:
        yield (
            "audio codec",
            codecs.train_audio_codec(model.audio_codec, bank, steps=steps, seed=seed),
        )


def material(model: MultimodalModel, images: Digits, bank: SpeechBank) -> Material:
    """Training's images and recordings, with their codes where the model has codecs.

    What may be said is real speech where there is any, else all.
    """
    drawings: Tensor | None = None
    if model.image_codec is not None:
        count = len(images.labels)
        drawings = torch.stack(
            [
                model.image_codec.encode(
                    digits.drawing(images.images, torch.full((count,), colour))
                )
                for colour in range(len(COLOURS))
            ],
            dim=1,
        )
    sayings, sayable = None, None
    if model.audio_codec is not None:
        frames = model.audio_codec.config.patch_size[1]
        codes = model.audio_codec.encode(bank.mels)
        sayings = [
            row[: length // frames].tolist()
            for row, length in zip(codes, bank.lengths.tolist(), strict=True)
        ]
        real = any(source != "espeak" for source in bank.sources)
        sayable = [
            [
                index
                for index in (bank.digits == digit).nonzero()[:, 0].tolist()
                if bank.sources[index] != "espeak" or not real
            ]
            for digit in range(10)
        ]
    return Material(images, bank, phrases.talk(), True, drawings, sayings, sayable)


def _stages(
    recipe: Recipe,
    model: MultimodalModel,
    images: Digits,
    bank: SpeechBank,
    data: Path | None,
    seed: int,
) -> list[Stage]:
    made = material(model, images, bank)
    stages = []
    if recipe.pretrain_steps:
        corpus = text.corpus(data).values()
        ids = torch.tensor([token for part in corpus for token in model.tokenizer.encode(part)])
        documents = Pretraining(model, made, ids, seed, recipe.pretrain_documents)
        stages.append(
            Stage("pretrain", recipe.pretrain_steps, documents, recipe.pretrain_rate, 30, final=1.0)
        )
    if recipe.look_steps:
        large = replace(made, in_the_middle=1.0)
        questions = Finetuning(model, large, recipes.LOOK, seed + 2, recipe.finetune_questions)
        stages.append(
            Stage("look", recipe.look_steps, questions, recipe.finetune_rate, 30, final=1.0)
        )
    questions = Finetuning(model, made, recipe.shares, seed + 1, recipe.finetune_questions)
    stages.append(
        Stage("finetune", recipe.finetune_steps, questions, recipe.finetune_rate, warmup=30)
    )
    return [replace(stage, accumulate=recipe.accumulate) for stage in stages]
