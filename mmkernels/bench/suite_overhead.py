"""What a call costs where there is next to nothing to compute."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

import mmkernels as mm
from mmkernels import testing
from mmkernels.bench import attention_masks, attention_peers, decode_peers
from mmkernels.bench.attention_problem import AttentionProblem, Size
from mmkernels.bench.attention_sdpa import sdpa
from mmkernels.bench.case import OURS, SEED, Call, Case, Problem, Results
from mmkernels.bench.decode_problem import CacheSize, DecodeProblem

SIZE, CACHE = Size(1, 16, 4, 4, 32), CacheSize(1, 16, 4, 4, 32)
PATCH, WIDTH = 16, 32
MODES = ("forward", "forward that records a graph", "forward + backward")


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The suite, alike in every kind of run; as `mmkernels.bench.suites.cases`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def attention(mode: str) -> Callable[[], Problem]:
        peers = {OURS: attention_peers.ours(), "SDPA": sdpa()}
        full = attention_masks.full()
        return lambda: _unrated(AttentionProblem(SIZE, full, dtype, mode, device, peers))

    def decode() -> Problem:
        peers = {OURS: decode_peers.ours(), "SDPA": decode_peers.masked(decode_peers.sdpa())}
        return _unrated(DecodeProblem(CACHE, dtype, device, False, peers))

    def patch() -> Problem:
        return PatchProblem(dtype, device)

    def case(name: str, shape: str, mode: str, make: Callable[[], Problem], mask: str = "") -> Case:
        return Case("overhead", name, shape, mask, dtype, mode, make, wall=True)

    image = f"B1 3×{PATCH}×{PATCH} P{PATCH} D{WIDTH}"
    return [
        *(case("attention", str(SIZE), mode, attention(mode), "full") for mode in MODES),
        case("attention_with_kvcache", str(CACHE), "decode", decode),
        case("patch_embed", image, "forward", patch),
    ]


def _unrated(problem: AttentionProblem | DecodeProblem) -> Problem:
    """Without flops and bytes, which would be compared with ceilings that are not the matter."""
    problem.flops = problem.bytes = None
    return problem


class PatchProblem:
    """One image of one patch; attributes as of `Problem`."""

    flops: float | None = None
    bytes: float | None = None

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(SEED)
        shapes = ((1, 3, PATCH, PATCH), (WIDTH, 3, PATCH, PATCH), (WIDTH,))
        self._inputs = [torch.randn(x, generator=generator).to(device, dtype) for x in shapes]
        pixels, weight, bias = self._inputs

        def conv2d() -> Results:
            tokens = F.conv2d(pixels, weight, bias, stride=PATCH)
            return (tokens.flatten(2).transpose(1, 2),)

        self.implementations: Mapping[str, Callable[[], Call]] = {
            OURS: lambda: lambda: (mm.patch_embed(pixels, weight, bias),),
            "F.conv2d": lambda: conv2d,
        }

    def check(self, results: Results) -> float:
        """The largest error; raises AssertionError if it breaks the error rule."""
        (tokens,) = results
        exact = mm.patch_embed(*(x.double() for x in self._inputs), backend="reference")
        testing.assert_accurate("tokens", tokens, exact, testing.eager_patch_embed(*self._inputs))
        return float((tokens.double() - exact).abs().max())
