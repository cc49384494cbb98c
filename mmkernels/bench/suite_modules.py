"""The suite of modules: those of `mmkernels.modules` beside the originals."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from mmkernels.bench import module_peers, suite_patches
from mmkernels.bench.case import Case
from mmkernels.bench.module_problem import ModuleProblem, Peer
from mmkernels.bench.module_settings import CAUSAL, PADDING, Attention, Embedding
from mmkernels.bench.patch_problem import Shape
from mmkernels.bench.suite_patches import FORWARD, FORWARD_BACKWARD

MODES = (FORWARD, FORWARD_BACKWARD)


class Model(NamedTuple):
    """A module in a model, and how large a batch it is measured with.

    Attributes:
        name: of the model, and its input.
        of: the module, with one sample.
        gpu: samples that fill a GPU.
        cpu: samples for a few cores.
    """

    name: str
    of: Attention | Embedding
    gpu: int
    cpu: int


def _embedding(module: str, name: str, **peers: Callable[[Shape], Peer]) -> Model:
    """Of a model of the suite of patches."""
    shape, gpu, cpu = suite_patches.MODELS[name]
    if module != "VisionEmbeddings":  # the others add neither class token nor positions
        shape = shape._replace(prefix=0, positions=False)
    return Model(name, Embedding(module, shape, peers), gpu, cpu)


# The most telling ones first.
MODELS = [
    Model("ViT-B/16 224", Attention(197, 768, 12), 256, 4),
    _embedding("VisionEmbeddings", "CLIP-L/14 336", transformers=module_peers.clip),
    Model("CLIP-L/14 text", Attention(77, 768, 12, CAUSAL), 512, 16),
    Model("BERT-base 512", Attention(512, 768, 12, PADDING), 64, 2),
    _embedding("PatchEmbed", "ViT-B/16 224", timm=module_peers.timm),
    _embedding("VisionEmbeddings", "SigLIP-so400m/14 384", transformers=module_peers.siglip),
    _embedding("VisionEmbeddings", "DINOv2-B/14 224", transformers=module_peers.dinov2),
    _embedding("TubeletEmbed", "VideoMAE-B 16×224", transformers=module_peers.videomae),
    _embedding("AudioPatchEmbed", "AST 128×1024", transformers=module_peers.ast),
]
# So many are all that a quick run on a GPU measures, and that a CPU has the time to compile.
TELLING = 2


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The cases, the most telling first; see `suites.cases`."""
    found = []
    if device.type == "cuda":
        for model in MODELS[:TELLING] if quick else MODELS:
            found += [_case(model, torch.bfloat16, mode, device, True) for mode in MODES]
        for model in [] if quick else MODELS:
            found += [_case(model, torch.float32, mode, device, True) for mode in MODES]
        return found
    for index, model in enumerate(MODELS):
        modes = MODES[index >= TELLING :] if quick else MODES
        compiled = index < TELLING and not quick
        found += [_case(model, torch.float32, mode, device, compiled, quick) for mode in modes]
    for model in [] if quick else MODELS:
        if model.of.module != "TubeletEmbed":  # seconds a call, on CPUs that know no bfloat16
            found.append(_case(model, torch.bfloat16, FORWARD, device, False))
    return found


def _case(
    model: Model,
    dtype: torch.dtype,
    mode: str,
    device: torch.device,
    compiled: bool,
    toy: bool = False,
) -> Case:
    of = model.of.sized(model.gpu if device.type == "cuda" else model.cpu)
    of = of.quick() if toy else of

    def make() -> ModuleProblem:
        return ModuleProblem(
            of.setting(device), dtype, device, backward=mode == FORWARD_BACKWARD, compiled=compiled
        )

    return Case("modules", f"{of.module}, {model.name}", of.text(), of.mask, dtype, mode, make)
