"""A drop-in module beside the original with the same parameters, and the check of its results.

The original in float64 is the oracle, and in its own dtype the yardstick of the error rule.
Inference is measured in evaluation mode, where torch has a fast path of its own; training with the
gradients of all parameters and, inside of a model, of the input.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.bench import calls
from mmkernels.bench.case import OURS, SEED, Call, Results

# (module, input) -> output.
Run = Callable[[Any, Tensor], Tensor]


class Peer(NamedTuple):
    """The same module in another library.

    Attributes:
        module: with parameters of its own.
        names: the original's name of a parameter -> the peer's.
        run: how it is called with the original's input.
    """

    module: nn.Module
    names: Mapping[str, str]
    run: Run = lambda module, x: module(x)


class Setting(NamedTuple):
    """What is compared.

    Attributes:
        name: of the original.
        original: the module.
        ours: backend -> the drop-in, whose state dict is the original's.
        x: the input, float32; it wants a gradient where the module stands inside of a model.
        flops: of the forward pass, and of forward and backward.
        peers: name -> the peer, or what was raised when it was made.
        run: how the original and ours are called; what else it gives them is on the device.
    """

    name: str
    original: nn.Module
    ours: Callable[[str], nn.Module]
    x: Tensor
    flops: tuple[float, float]
    peers: Mapping[str, Peer | Exception]
    run: Run = lambda module, x: module(x)


class ModuleProblem:
    """Seeded parameters and dout, and the modules that hold them.

    Args:
        setting: what is compared.
        dtype: of input and parameters.
        device: where they lie.
        backward: whether it is training.
        compiled: whether torch.compile takes part.
    """

    def __init__(
        self,
        setting: Setting,
        dtype: torch.dtype,
        device: torch.device,
        *,
        backward: bool,
        compiled: bool,
    ) -> None:
        self.setting = setting
        self.place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.x = setting.x.detach().to(**self.place).requires_grad_(setting.x.requires_grad)
        generator = torch.Generator().manual_seed(SEED)
        self.original = _randomized(setting.original, generator).to(**self.place).train(backward)
        with torch.no_grad():
            out = setting.run(self.original, self.x)
        self.dout = torch.randn(out.shape, generator=generator).to(out) if backward else None
        self.flops: float | None = setting.flops[backward]
        parameters = sum(x.nbytes for x in self.original.parameters())
        inputs = self.x.nbytes * (1 + (backward and self.x.requires_grad))
        self.bytes: float | None = inputs + (1 + backward) * (parameters + out.nbytes)
        found: dict[str, Callable[[], Call]] = {OURS: functools.partial(self._ours, "auto")}
        if device.type == "cuda":
            for name in calls.GPU_BACKENDS:
                found[f"{OURS} {name}"] = functools.partial(self._ours, name)
        found[setting.name] = lambda: self._call(self.original, self.x, self.dout)
        found["torch.compile"] = functools.partial(self._compiled, compiled)
        for name, peer in setting.peers.items():
            found[name] = functools.partial(self._peer, peer)
        self.implementations: Mapping[str, Callable[[], Call]] = found

    def _call(self, module: nn.Module, x: Tensor, dout: Tensor | None) -> Call:
        return _solver(lambda: self.setting.run(module, x), x, module.parameters(), dout)

    def _ours(self, backend: str) -> Call:
        module = self.setting.ours(backend).to(**self.place).train(self.original.training)
        module.load_state_dict(self.original.state_dict())
        call = self._call(module, self.x, self.dout)
        return call if backend == "auto" else calls.on_backend(backend, call)

    def _compiled(self, wanted: bool) -> Call:
        run = calls.compiled(lambda: self.setting.run(self.original, self.x), wanted)
        return _solver(run, self.x, self.original.parameters(), self.dout)

    def _peer(self, peer: Peer | Exception) -> Call:
        if isinstance(peer, Exception):
            raise peer
        module, names, run = peer
        module.to(**self.place).train(self.original.training)
        parameters = []
        for name, parameter in self.original.named_parameters():
            same = module.get_parameter(names[name])
            with torch.no_grad():
                same.copy_(parameter.view_as(same))
            parameters.append(same)
        return _solver(lambda: run(module, self.x), self.x, parameters, self.dout)

    @functools.cached_property
    def expected(self) -> tuple[Results, Results]:
        """out and gradients of the original: in float64, and in its own dtype."""
        x = self.x.detach().double().requires_grad_(self.x.requires_grad)
        dout = None if self.dout is None else self.dout.double()
        oracle = copy.deepcopy(self.original).double().train()  # evaluation may have a fast path
        exact = self._call(oracle, x, dout)
        return exact(), self._call(self.original, self.x, self.dout)()

    def check(self, results: Results) -> float:
        """The largest error of out and, in training, of the gradients."""
        names = ["out"]
        if self.dout is not None:
            names += ["dx"] * self.x.requires_grad
            names += [f"d{name}" for name, _ in self.original.named_parameters()]
        return calls.largest_error(names, results, *self.expected)


def _solver(
    run: Callable[[], Tensor], x: Tensor, parameters: Iterable[Tensor], dout: Tensor | None
) -> Call:
    return calls.solver(run, [x] * x.requires_grad + list(parameters), dout)


@torch.no_grad()
def _randomized(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Normal parameters, for many begin as zeros; weights such that their products are, too."""
    for name, parameter in module.named_parameters():
        size = parameter[0].numel() if name.endswith("weight") else 1
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * size**-0.5)
    return module
