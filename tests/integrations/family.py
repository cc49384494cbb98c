"""A family of transformers models: how a tiny one is made, fed, and held to the error rule."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmkernels.testing import assert_accurate

MAJOR = int(transformers.__version__.split(".")[0])
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Served:
    """How many modules `mm.replace` switches and how many it must leave.

    Attributes:
        attention: attention modules switched.
        left: attention modules left as they are.
        patches: patch embeddings switched.
        patches_left: convolutions over pixels or samples left.
    """

    attention: int
    left: int = 0
    patches: int = 0
    patches_left: int = 0


@dataclass(frozen=True)
class Family:
    """One row of the matrix.

    Attributes:
        name: for people.
        model: class name in transformers.
        config: makes the tiny configuration.
        inputs: variant -> makes its inputs.
        served: what `mm.replace` is to do.
        served_in_4: the same in transformers 4, where that differs.
        output: what is compared, one row a token; None: logits, else the last hidden state.
        generates: inputs of `generate`; None: the model does not.
        caches: kinds of cache to generate with.
    """

    name: str
    model: str
    config: Callable[[], Any]
    inputs: dict[str, Callable[[], Inputs]]
    served: Served
    served_in_4: Served | None = None
    output: Callable[[Any], Tensor] | None = None
    generates: Callable[[], Inputs] | None = None
    caches: tuple[str, ...] = ("dynamic",)

    @property
    def expected(self) -> Served:
        """What `mm.replace` is to do in the running version."""
        return self.served_in_4 if MAJOR == 4 and self.served_in_4 else self.served

    def build(self, implementation: str | None = None) -> nn.Module:
        """The model in evaluation mode, with weights large enough that attention matters.

        Args:
            implementation: of attention, where the constructor looks at it; None: the default.
        """
        torch.manual_seed(0)
        chosen = {} if implementation is None else {"attn_implementation": implementation}
        if MAJOR > 4:  # grouped matrix products know no float64
            chosen["experts_implementation"] = "eager"
        model = getattr(transformers, self.model)._from_config(self.config(), **chosen).eval()
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if parameter.ndim > 1:
                    parameter.normal_(std=0.15)
                elif name.endswith("sinks"):
                    parameter.normal_()
                if name.endswith("Attention.q.weight"):  # T5 has no scale but in these
                    parameter.mul_(model.config.d_kv**-0.5)
        return model


def numbers(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(batch: int = 2, length: int = 24, seed: int = 1) -> Tensor:
    """Ids that no tiny model takes for a special token."""
    return torch.randint(8, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side: str, lengths: tuple[int, ...] = (24, 15), length: int = 24) -> Tensor:
    """(B, S) 1 at real tokens."""
    position = torch.arange(length)
    if side == "left":
        position = position.flip(0)
    return (position < torch.tensor(lengths)[:, None]).long()


@dataclass
class Measured:
    """What a model gave.

    Attributes:
        output: of real tokens only.
        gradients: of every parameter that has one, of a fixed projection of the output.
    """

    output: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)


def measure(family: Family, model: nn.Module, inputs: Inputs) -> Measured:
    """One forward and one backward pass."""
    model.zero_grad()
    output = _rows(family, model(**inputs), inputs)
    # Whole numbers, which are drawn alike whatever the default dtype is.
    weight = torch.randint(-3, 4, output.shape, generator=torch.Generator().manual_seed(2))
    (output * weight).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Measured(output.detach(), gradients)


def result(family: Family, model: nn.Module, inputs: Inputs) -> Tensor:
    """The output of real tokens, without gradients."""
    with torch.no_grad():
        return _rows(family, model(**inputs), inputs)


def _rows(family: Family, outputs: Any, inputs: Inputs) -> Tensor:
    if family.output is not None:
        output = family.output(outputs)
    else:
        output = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    for name in ("decoder_attention_mask", "pixel_attention_mask", "attention_mask"):
        real = inputs.get(name)
        # What a padded row holds is nobody's business: zeros here, an average in eager.
        if real is not None and real.shape == output.shape[:2]:
            return output[real.bool()]
    return output


def exactly(family: Family, eager: nn.Module, inputs: Inputs) -> Measured:
    """What the eager model would give without rounding: all of it in float64."""
    wide = {n: x.double() if _is_float(x) else x for n, x in inputs.items()}
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            return measure(family, copy.deepcopy(eager).double(), wide)
    finally:
        torch.set_default_dtype(torch.float32)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


class _Float64(TorchFunctionMode):
    """Models ask for float32 in norms, rotary embeddings and softmax: here that is float64."""

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32:
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)


# The error of eager is one draw from many: which way the roundings of two layers, with about eight
# operations each between two tensors that are stored, happen to fall. A draw of almost none is no
# yardstick, so one rounding for each operation is always allowed.
ROUNDING = 16 * torch.finfo(torch.float32).eps


def assert_parity(got: Measured, exact: Measured, eager: Measured) -> None:
    """The error rule, for the output and every gradient.

    A gradient is a sum, and rounds as its terms do: that of a key's bias is zero, what is added up
    is not, and those of sinks cancel among the rows. The terms are about as large as the largest
    gradient in the same module: for a bias its weight's, for sinks their projections'.
    """
    _assert_yardstick("output", eager.output, exact.output, exact.output.abs().max().item())
    assert_accurate("output", got.output, exact.output, eager.output, ROUNDING)
    assert got.gradients.keys() == eager.gradients.keys() == exact.gradients.keys()
    sizes = {name: gradient.abs().max().item() for name, gradient in exact.gradients.items()}
    for name, gradient in got.gradients.items():
        wanted = exact.gradients[name]
        module = name.rpartition(".")[0]
        size = max(size for other, size in sizes.items() if other.startswith(f"{module}."))
        _assert_yardstick(name, eager.gradients[name], wanted, size)
        terms = size / max(sizes[name], 1e-300)
        assert_accurate(name, gradient, wanted, eager.gradients[name], ROUNDING * terms)


def _assert_yardstick(name: str, eager: Tensor, exact: Tensor, size: float) -> None:
    """Twice eager's error means something only where eager computes the same thing."""
    error = (eager - exact).abs().max().item()
    assert error <= 1e-4 * size, f"{name}: eager itself is {error:.2g} off, of {size:.2g}"
