"""The training loop: steps, progress, log and checkpoints of a run's stages.

Documents follow from the seed, the stage and the step alone, and there is no dropout; so a run that
stopped goes on exactly as if it had not, to the bit on a CPU.
"""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmkernels.models.batch import IGNORED, Batch
from mmkernels.models.chat_format import Document
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.training import checkpoints
from mmkernels.training.interrupts import Interrupts
from mmkernels.training.stages import Stage
from mmkernels.training.world import World

LOG = "log.jsonl"


@dataclass(frozen=True)
class Settings:
    """How a run is run.

    Attributes:
        run: its folder.
        device: where it computes.
        dtype: of the matrix products, by autocast; weights and sums stay float32.
        ceiling: FLOP/s of a large matrix product in that dtype, what MFU is a part of.
        save_every: seconds from checkpoint to checkpoint; there is one at the end of each stage.
    """

    run: Path
    device: torch.device
    dtype: torch.dtype
    ceiling: float
    save_every: float = 120.0


class Trainer:
    """Trains a model through stages.

    Args:
        model: on the settings' device.
        stages: in their order.
        settings: how.
        world: the processes that train together, which have the same model; None: this one alone.

    Attributes:
        step: steps done, over all stages.
    """

    def __init__(
        self,
        model: MultimodalModel,
        stages: Sequence[Stage],
        settings: Settings,
        world: World | None = None,
    ) -> None:
        self.model, self.stages, self.settings = model, stages, settings
        self.world = World() if world is None else world
        self.step = 0
        self._saved: int | None = None
        self._saving: Future | None = None
        for name, parameter in model.named_parameters():
            if "_codec" in name:  # trained before
                parameter.requires_grad_(False)
        self.world.prepare(model)
        trained = [(name, x) for name, x in model.named_parameters() if x.requires_grad]
        # Matrices first: the order of the optimizer's groups, in which its moments are numbered.
        trained.sort(key=lambda pair: pair[1].ndim < 2)
        self.names = [name for name, _ in trained]
        self.parameters = [parameter for _, parameter in trained]
        self.optimizer = self._new_optimizer()
        settings.run.mkdir(parents=True, exist_ok=True)

    def resume(self) -> bool:
        """Goes on from the newest checkpoint that is whole; whether there was one.

        Later ones, which are damaged, are set aside.
        """
        run = self.settings.run
        found = self.world.first(lambda: checkpoints.newest(run))
        if found is not None:
            moments = checkpoints.moments(self.parameters, self.names)
            checkpoints.load(found, self.model, moments, self.world)
            self.step = self._saved = found.state["step"]
            checkpoints.restore_optimizer(self.optimizer, self.names, moments)
        if self.world.rank == 0:
            checkpoints.set_aside(run, self.step if found is not None else -1)
            _cut_log(run / LOG, self.step)
        return found is not None

    def run(self, until: int | None = None) -> None:
        """Trains to the end, or until so many steps are done; then a checkpoint is written.

        An interrupt lets the step that is under way end, and leaves a checkpoint of it. Any other
        error leaves those that are there: it may have come amid a change of the weights.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM came.
            RuntimeError: the gradient is not finite.
            ValueError: a step has nothing to learn.
        """
        total = sum(stage.steps for stage in self.stages)
        last = total if until is None else min(until, total)
        saved = time.monotonic()
        log = self.settings.run / LOG
        self.model.train()
        try:
            with (
                Interrupts() as interrupts,
                _Progress(total, self.step, log, self.world.rank == 0) as progress,
            ):
                # All processes do the same, whoever of them was interrupted or is late.
                while self.step < last and not self.world.any(interrupts.noted):
                    stage, step = self._stage()
                    if step == 0:
                        self.optimizer = self._new_optimizer()
                    report = self._train(stage, step)
                    self.step += 1
                    progress.add({"step": self.step, "stage": stage.name, **report})
                    late = time.monotonic() - saved > self.settings.save_every
                    if self.world.any(late or self._stage_ended()):
                        self.save()
                        saved = time.monotonic()
                self.save()
                self._finish_saving()
                stopped = self.world.any(interrupts.noted)
        finally:
            self.model.eval()
        if stopped:
            raise KeyboardInterrupt

    def save(self) -> None:
        """Writes a checkpoint, unless the last one is of this step; several processes go on."""
        if self._saved == self.step:
            return
        self._finish_saving()
        run, state = self.settings.run, {"step": self.step}
        tensors = checkpoints.optimizer_tensors(self.optimizer, self.names)
        if self.world.plan.size == 1:
            checkpoints.save(run, self.model, tensors, state)
        else:
            self._saving = checkpoints.save_parts(run, self.model, tensors, state, self.world)
        self._saved = self.step

    def _finish_saving(self) -> None:
        if self._saving is not None:
            self._saving.result()
            self._saving = None

    def _stage(self) -> tuple[Stage, int]:
        """The stage of the next step, and which of its steps it is."""
        step = self.step
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        raise AssertionError("there is no further step")

    def _stage_ended(self) -> bool:
        ends, total = [], 0
        for stage in self.stages:
            total += stage.steps
            ends.append(total)
        return self.step in ends

    def _train(self, stage: Stage, step: int) -> dict[str, Any]:
        """One optimizer step; its loss, rate, speed and how much of the machine it used."""
        began = time.perf_counter()
        world, settings = self.world, self.settings
        documents = [stage.documents(step, micro) for micro in range(stage.accumulate)]
        batches = [world.batch(some, stage.seqlen).to(settings.device) for some in documents]
        prepared = time.perf_counter()
        learned = [sum(sum(document.learned[1:]) for document in some) for some in documents]
        if not sum(learned):
            raise ValueError(
                f"stage {stage.name!r} has no token to learn in its step {step}; its documents "
                "must have some"
            )
        loss = torch.zeros((), device=settings.device)
        for batch, count in zip(batches, learned, strict=True):
            if not count:
                continue
            with world.spread(self.model, stage.seqlen):
                with torch.autocast(
                    settings.device.type, settings.dtype, enabled=settings.dtype != torch.float32
                ):
                    part = world.loss(batch, sum(learned))
                part.backward()
            loss += part.detach()
        self._forget_unseen([document for some in documents for document in some])
        norm = world.clip(self.parameters, stage.clip)
        rate = stage.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = stage.weight_decay if group["decays"] else 0.0
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = float(world.mean(loss))  # waits for the device
        seconds = time.perf_counter() - began
        tokens = sum(len(document) for some in documents for document in some)
        flops = world.mean(torch.tensor(sum(map(self._flops, batches)), device=settings.device))
        return {
            "loss": value,
            "rate": rate,
            "norm": float(norm),
            "tokens": tokens,
            "learned": sum(learned),
            "seconds": seconds,
            "data_seconds": prepared - began,
            "tokens_per_second": tokens / seconds,
            "mfu": float(flops) / (world.plan.sp * world.plan.tp) / seconds / settings.ceiling,
        }

    def _forget_unseen(self, documents: list[Document]) -> None:
        """Takes its gradient of 0 from what no document of a step has used, lest it decay."""
        for used, embedder in (
            (any(document.images for document in documents), self.model.image_embedder),
            (any(document.audios for document in documents), self.model.audio_embedder),
        ):
            if not used:
                embedder.zero_grad(set_to_none=True)

    def _flops(self, batch: Batch) -> float:
        """Of a forward and backward: 6 for each weight and token, and attention's scores.

        Of a frozen weight 4, for it needs no gradient. What is computed twice counts once.
        """
        model = self.model
        tokens = float(batch.lengths.sum())
        learned = float((batch.targets != IGNORED).sum())
        head = _work(model.decoder.embed_tokens)
        blocks = _work(model.decoder.layers)
        inputs = 0.0
        for media, embedder in (
            (batch.images, model.image_embedder),
            (batch.audios, model.audio_embedder),
        ):
            inputs += _work(embedder) * sum(embedder.num_tokens(*x.shape[1:]) for x in media)
        sizes = model.config.decoder
        mask = batch.mask()
        keys = float((mask.end - mask.start).sum())
        scores = 12 * keys * sizes.num_attention_heads * sizes.head_dim * sizes.num_hidden_layers
        return tokens * blocks + learned * head + inputs + scores

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """AdamW; vectors do not decay.

        Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
        """
        count = sum(x.ndim >= 2 for x in self.parameters)
        groups = [
            {"params": self.parameters[:count], "decays": True},
            {"params": self.parameters[count:], "decays": False},
        ]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)


def _work(module: nn.Module) -> int:
    """FLOPs of a token's forward and backward through a module's weights."""
    return sum((6 if x.requires_grad else 4) * x.numel() for x in module.parameters())


class _Progress:
    """A bar, and a line of JSON for every step."""

    def __init__(self, total: int, done: int, log: Path, shown: bool) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, initial=done, unit="step", disable=None if shown else True)
        path = log if shown else os.devnull
        self.log = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed in __exit__

    def __enter__(self) -> "_Progress":
        return self

    def add(self, report: dict[str, Any]) -> None:
        self.log.write(json.dumps(report) + "\n")
        self.log.flush()
        self.bar.set_description(report["stage"])
        self.bar.set_postfix_str(
            f"loss {report['loss']:.3f}, {report['tokens_per_second']:,.0f} tokens/s, "
            f"MFU {report['mfu']:.0%}"
        )
        self.bar.update()

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.log.close()


def read_log(run: Path) -> list[dict[str, Any]]:
    """The steps of a run, one dict each; a last line that was cut off is left out."""
    path = run / LOG
    if not path.exists():
        return []
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            steps.append(json.loads(line))
        except ValueError:
            break
    return steps


def _cut_log(path: Path, step: int) -> None:
    """Removes what was logged after a step: it is done again."""
    lines = [json.dumps(report) for report in read_log(path.parent) if report["step"] <= step]
    aside = path.with_suffix(".part")
    aside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(aside, path)
