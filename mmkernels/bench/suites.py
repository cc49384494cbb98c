"""The suites, by name; each module has `cases(device, quick)`."""

import importlib
from collections.abc import Sequence

import torch

from mmkernels.bench.case import Case

# In the order in which they run.
SUITES = {
    "attention": "attention's forward and backward pass under every mask",
    "decode": "attention with a KV cache, one new token a sequence",
    "patches": "patch embedding: images, video, spectrograms",
    "modules": "drop-in modules beside the originals",
    "models": "whole models before and after mm.replace",
    "scaling": "attention's growth with the sequence",
    "overhead": "what a call costs where there is next to nothing to compute",
}


def cases(names: Sequence[str], device: torch.device, quick: bool) -> list[Case]:
    """The cases of some suites.

    Args:
        names: of SUITES.
        device: where tensors lie. On a GPU sizes fill one; on a CPU a batch is small.
        quick: on a GPU a few telling cases at full size; on a CPU tiny sizes, which say nothing of
            speed.

    Raises:
        ValueError: a name is none of SUITES.
    """
    if unknown := set(names) - set(SUITES):
        raise ValueError(f"suite is {sorted(unknown)}; it must be of {', '.join(SUITES)}")
    found = []
    for name in SUITES:
        if name in names:
            module = importlib.import_module(f"mmkernels.bench.suite_{name}")
            found += module.cases(device, quick)
    return found
