"""Whole models before and after `mm.replace`: vision towers, a prefix-LM layer, SmolLM2.

Without the library that a model is from, its case says so and has no results.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.attention import masks
from mmkernels.bench import model_zoo as zoo
from mmkernels.bench.case import SEED, Case, Problem
from mmkernels.bench.model_problem import DecodingProblem, ModelProblem, TrainingProblem
from mmkernels.bench.model_zoo import Language, Vision


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The cases of this suite, the most telling ones first: bfloat16 on a GPU, float32 on a CPU.

    Args:
        device: where models and inputs are.
        quick: on a GPU three cases, and nothing compiled; on a CPU models of two small layers.
    """
    if device.type == "cpu" and quick:
        return [
            _siglip(zoo.TOY_VISION, 2, device),
            _prefix_lm(zoo.TOY_LANGUAGE, 2, 16, 8, device),
            _prefill(zoo.TOY_LANGUAGE, 2, 24, device),
            _decode(zoo.TOY_LANGUAGE, 2, 24, device),
            _vit(zoo.TOY_VISION, 2, "forward", device),
            _vit(zoo.TOY_VISION, 2, "forward + backward", device),
        ]
    if device.type == "cpu":
        return [
            _siglip(zoo.SIGLIP_B, 1, device),
            _prefix_lm(zoo.GEMMA, 1, 256, 64, device, compiles=True),
            _prefill(zoo.SMOLLM2, 1, 512, device),
            _decode(zoo.SMOLLM2, 1, 512, device),
            _vit(zoo.VIT_B, 1, "forward", device, compiles=True),
            _vit(zoo.VIT_B, 1, "forward + backward", device),
        ]
    most = [
        _siglip(zoo.SIGLIP_SO, 16, device, compiles=not quick),
        _prefix_lm(zoo.GEMMA, 8, 1024, 256, device, compiles=not quick),
        _decode(zoo.SMOLLM2, 8, 2048, device),
    ]
    if quick:
        return most
    return [
        *most,
        _prefill(zoo.SMOLLM2, 4, 4096, device, compiles=True),
        _vit(zoo.VIT_B, 64, "forward", device, compiles=True),
        _vit(zoo.VIT_B, 64, "forward + backward", device, compiles=True),
    ]


def _siglip(size: Vision, batch: int, device: torch.device, compiles: bool = False) -> Case:
    def make(dtype: torch.dtype) -> Problem:
        model = zoo.siglip(size, dtype, device)
        pixels, flops = _images(size, batch, dtype, device), _vision_flops(size, batch)
        return ModelProblem(model, zoo.siglip_forward, {"pixels": pixels}, flops, compiles)

    return _case(_named("SigLIP", size), _vision_shape(size, batch), "", "forward", device, make)


def _vit(size: Vision, batch: int, mode: str, device: torch.device, compiles: bool = False) -> Case:
    size = size._replace(prefix=1)
    with_timm = importlib.util.find_spec("timm") is not None
    library = "timm" if with_timm else "transformers"

    def make(dtype: torch.dtype) -> Problem:
        build = zoo.timm_vit if with_timm else zoo.vit
        forward = zoo.timm_vit_forward if with_timm else zoo.vit_forward
        kind = ModelProblem if mode == "forward" else TrainingProblem
        pixels, flops = _images(size, batch, dtype, device), _vision_flops(size, batch)
        return kind(build(size, dtype, device), forward, {"pixels": pixels}, flops, compiles)

    name = f"{_named('ViT', size)} ({library})"
    return _case(name, _vision_shape(size, batch), "", mode, device, make)


def _prefix_lm(
    size: Language,
    batch: int,
    image: int,
    text: int,
    device: torch.device,
    compiles: bool = False,
) -> Case:
    """An image and the first half of the text are the prefix."""
    seqlen, prefix = image + text, image + text // 2

    def make(dtype: torch.dtype) -> Problem:
        model = zoo.paligemma(size, dtype, device)
        kinds = (torch.arange(seqlen, device=device) >= prefix).long().expand(batch, -1)
        embeddings = _normal((batch, seqlen, size.hidden), dtype, device)
        inputs = {"embeddings": embeddings, "token_type_ids": kinds}
        mask = masks.prefix_lm(prefix, seqlen)
        flops = _flops(size, batch, int((mask.end - mask.start).sum()))
        return ModelProblem(model, zoo.paligemma_forward, inputs, flops, compiles)

    name, shape = _named("PaliGemma", size), _language_shape(size, batch, seqlen)
    return _case(name, shape, "prefix-LM", "forward", device, make)


def _prefill(
    size: Language, batch: int, seqlen: int, device: torch.device, compiles: bool = False
) -> Case:
    def make(dtype: torch.dtype) -> Problem:
        model, inputs = zoo.llama(size, dtype, device), {"input_ids": _ids(batch, seqlen, device)}
        flops = _flops(size, batch, seqlen * (seqlen + 1) // 2)
        return ModelProblem(model, zoo.prefill_forward, inputs, flops, compiles)

    shape = _language_shape(size, batch, seqlen)
    return _case(_language_name(size), shape, "causal", "prefill", device, make)


def _decode(size: Language, batch: int, cached: int, device: torch.device) -> Case:
    def make(dtype: torch.dtype) -> Problem:
        model = zoo.llama(size, dtype, device)
        inputs = {"input_ids": _ids(batch, cached + 1, device)}
        flops = _flops(size, batch, cached + 1)
        return DecodingProblem(model, zoo.decode_forward, inputs, flops)

    shape = _language_shape(size, batch, cached)
    return _case(_language_name(size), shape, "", "decode", device, make)


def _case(
    name: str,
    shape: str,
    mask: str,
    mode: str,
    device: torch.device,
    make: Callable[[torch.dtype], Problem],
) -> Case:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return Case("models", name, shape, mask, dtype, mode, lambda: make(dtype), wall=True)


def _named(family: str, size: Any) -> str:
    return f"{family}, toy" if size.name == "toy" else size.name


def _language_name(size: Language) -> str:
    if size is not zoo.SMOLLM2:
        return _named("Llama", size)
    return f"{size.name}, {'' if zoo.has_smollm2() else 'random '}weights"


def _vision_shape(size: Vision, batch: int) -> str:
    return f"B{batch} H{size.heads} S{size.seqlen} D{size.head_dim} L{size.layers}"


def _language_shape(size: Language, batch: int, seqlen: int) -> str:
    return f"B{batch} H{size.heads}/{size.kv_heads} S{seqlen} D{size.head_dim} L{size.layers}"


def _flops(size: Any, batch: int, pairs: int) -> float:
    """Of attention, with so many visible pairs of a query and a key."""
    return 4.0 * batch * size.layers * size.heads * size.head_dim * pairs


def _vision_flops(size: Vision, batch: int) -> float:
    return _flops(size, batch, size.seqlen**2)


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(device, dtype)


def _images(size: Vision, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _normal((batch, 3, size.image, size.image), dtype, device)


def _ids(batch: int, seqlen: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, 256, (batch, seqlen), generator=generator).to(device)
