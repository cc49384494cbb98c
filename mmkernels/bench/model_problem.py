"""A whole model as a problem: inference, a training step or decoding, around `mm.replace`.

Every implementation is a copy of the model that shares its weights. Exact results are those of the
model in float64 with its library's default attention, the yardstick's those of its eager attention.
transformers computes norms in float32 even then, for all implementations alike.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mmkernels as mm
from mmkernels import testing
from mmkernels.bench import model_peers
from mmkernels.bench.calls import GPU_BACKENDS
from mmkernels.bench.case import OURS, Call, Results, Unavailable
from mmkernels.bench.compiling import compiled

# (model, **inputs) -> what is compared.
Forward = Callable[..., Results]

# Those of attention are counted by hand: the counter does not know what a mask hides.
_PRODUCTS = {"mm", "addmm", "convolution", "convolution_backward"}


class ModelProblem:
    """Inference: a call of the model under `torch.no_grad`.

    Args:
        model: in its dtype, on its device, with its library's default attention.
        forward: what calls it.
        inputs: of `forward`, by name; floating point ones in the model's dtype.
        attention_flops: of attention's products in one forward pass, without hidden pairs.
        compiles: does torch.compile take part?
    """

    # What a call does, in forward passes of attention and in moves of all weights.
    attention_passes, weight_moves = 1.0, 1

    def __init__(
        self,
        model: Any,
        forward: Forward,
        inputs: Mapping[str, Tensor],
        attention_flops: float,
        compiles: bool = True,
    ) -> None:
        self.model, self.forward, self.inputs, self.compiles = model, forward, inputs, compiles
        call = self.call(model)
        with FlopCounterMode(display=False) as counter:
            results = call()
        counts = counter.get_flop_counts()["Global"]
        products = sum(n for op, n in counts.items() if op.__name__ in _PRODUCTS)
        self.flops = products + self.attention_passes * attention_flops
        self.bytes = self.weight_moves * sum(x.nbytes for x in model.parameters())
        self.bytes += sum(x.nbytes for x in (*inputs.values(), *results))
        backends = GPU_BACKENDS if model_peers.on_gpu(model) else ()
        self.implementations: Mapping[str, Callable[[], Call]] = {
            OURS: lambda: self.call(model_peers.replaced(model)),
            **{f"{OURS} {name}": functools.partial(self._on_backend, name) for name in backends},
            f"{OURS}, torch.compile": lambda: self._compiled(model_peers.replaced),
            "SDPA": lambda: self.call(model_peers.with_same_weights(model)),
            "torch.compile": lambda: self._compiled(model_peers.with_same_weights),
            "eager": lambda: self.call(model_peers.eager(model)),
            "FlashAttention-2": lambda: self.call(model_peers.flash_attention_2(model)),
            "Liger": self._liger,
        }

    def call(
        self, model: Any, forward: Forward | None = None, dtype: torch.dtype | None = None
    ) -> Call:
        """What is timed, of the model or a copy.

        Args:
            model: which.
            forward: a compiled one; None: the problem's.
            dtype: of inputs in floating point; None: as they are.
        """
        forward, inputs = forward or self.forward, self._inputs(dtype)

        def call() -> Results:
            with torch.no_grad():
                return forward(model, **inputs)

        return call

    def check(self, results: Results) -> float:
        """The largest absolute error; raises AssertionError where the error rule is broken."""
        errors = []
        for index, (got, exact, eager) in enumerate(zip(results, *self._expected, strict=True)):
            testing.assert_accurate(f"result {index}", got, exact, eager)
            errors.append(float((got.double() - exact).abs().max()))
        return max(errors)

    @functools.cached_property
    def _expected(self) -> tuple[Results, Results]:
        """The exact results, and eager attention's."""
        exact = self.call(copy.deepcopy(self.model).double(), dtype=torch.float64)()
        return exact, self.call(model_peers.eager(self.model))()

    def _inputs(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {
            name: x.to(dtype) if x.is_floating_point() else x for name, x in self.inputs.items()
        }

    def _compiled(self, copied: Callable[[nn.Module], Any]) -> Call:
        forward = compiled(self.forward, next(iter(self.inputs.values())).device, self.compiles)
        return self.call(copied(self.model), forward)

    def _on_backend(self, name: str) -> Call:
        call = self.call(model_peers.replaced(self.model))
        call = _within(functools.partial(mm.use_backend, name), call)
        try:
            call()
        except mm.BackendUnavailable as error:
            raise Unavailable(f"{error.op}: {error.reasons[name]}") from error
        return call

    def _liger(self) -> Call:
        model, scope = model_peers.liger(self.model)
        with scope():
            return _within(scope, self.call(model))


def _within(scope: Callable[[], AbstractContextManager[Any]], call: Call) -> Call:
    def inside() -> Results:
        with scope():
            return call()

    return inside


class TrainingProblem(ModelProblem):
    """A training step without its optimizer: forward, cross entropy, all parameters' gradients.

    `forward` returns logits (B, classes) first. Compared are the logits and the gradients of the
    first, the middle and the last weight that is in a product.
    """

    attention_passes, weight_moves = 3.5, 2  # each is read, and its gradient written

    def call(
        self, model: Any, forward: Forward | None = None, dtype: torch.dtype | None = None
    ) -> Call:
        """As of `ModelProblem`; compiled is the forward pass, which brings its backward."""
        forward, inputs = forward or self.forward, self._inputs(dtype)
        parameters = list(model.parameters())
        weights = [x.weight for x in model.modules() if isinstance(x, (nn.Linear, nn.Conv2d))]
        shown = {id(weights[place]) for place in (0, len(weights) // 2, -1)}

        def call() -> Results:
            logits = forward(model, **inputs)[0]
            labels = torch.arange(len(logits), device=logits.device) % logits.shape[1]
            loss = F.cross_entropy(logits, labels)
            gradients = torch.autograd.grad(loss, parameters)
            pairs = zip(parameters, gradients, strict=True)
            return (logits.detach(), *(grad for x, grad in pairs if id(x) in shown))

        return call


class DecodingProblem(ModelProblem):
    """One token of `input_ids` (B, S), the last, with a cache of those before it.

    The cache is transformers' `DynamicCache`, which copies itself for each token, filled before the
    clock starts. A call takes its token out of it again, at the cost of one view a layer.
    """

    def __init__(
        self,
        model: Any,
        forward: Forward,
        inputs: Mapping[str, Tensor],
        attention_flops: float,
    ) -> None:
        super().__init__(model, forward, inputs, attention_flops, compiles=False)
        config, cached = model.config, inputs["input_ids"][:, :-1].numel()
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self.bytes += cached * numbers * model.dtype.itemsize

    def call(
        self, model: Any, forward: Forward | None = None, dtype: torch.dtype | None = None
    ) -> Call:
        """As of `ModelProblem`; fills a cache."""
        from transformers import DynamicCache

        forward, ids = forward or self.forward, self.inputs["input_ids"]
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            forward(model, ids[:, :-1], past_key_values=cache)

        def call() -> Results:
            with torch.no_grad():
                results = forward(model, ids[:, -1:], past_key_values=cache)
            cache.crop(-1)
            return results

        return call

    def _compiled(self, copied: Callable[[nn.Module], Any]) -> Call:
        raise Unavailable("needs a cache that does not grow")
