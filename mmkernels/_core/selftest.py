"""Tiny calls of the public operators: which backends serve them, and how far off they are.

The part of the doctor that needs a working torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mmkernels as mm
from mmkernels._core.registry import Explanation

# What a user can do where a backend declines a sample call.
REMEDIES = {
    "cpu": "pass tensors that are on the CPU",
    "triton": 'pass tensors that are on a GPU; without triton: pip install "mmkernels[triton]"',
    "cuda": 'name it, with 16-bit tensors on an NVIDIA GPU; README, "Install", has the build',
}

# The test fails on an error of more roundings than this, relative to the largest value.
ALLOWED_ROUNDINGS = 16


@dataclass
class BackendFact:
    """One backend of one operation.

    Attributes:
        available: it can serve the sample call.
        chosen: it is the one that would.
        problem: why it declines.
        remedy: what the user can do about that.
        passed: whether the self-test's results were the reference's; None if it did not run.
        detail: the errors that the self-test measured, or the exception that it met.
    """

    available: bool
    chosen: bool
    problem: str | None = None
    remedy: str | None = None
    passed: bool | None = None
    detail: str | None = None


# Operation -> backend -> fact.
Operations = dict[str, dict[str, BackendFact]]


class Sample(NamedTuple):
    """A tiny call of a public operator.

    Attributes:
        function: the operator.
        tensors: its floating-point arguments.
        options: its other arguments.
        differentiable: whether the call has a backward pass.
    """

    function: Callable[..., Any]
    tensors: list[Tensor]
    options: dict[str, Any]
    differentiable: bool

    def to(self, dtype: torch.dtype, device: str, differentiable: bool) -> "Sample":
        """The same call in another dtype, on another device, with or without a backward pass."""
        tensors = [tensor.detach().to(device, dtype) for tensor in self.tensors]
        if differentiable:
            tensors = [tensor.requires_grad_() for tensor in tensors]
        options = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        return Sample(self.function, tensors, options, differentiable)

    def results(self, backend: str) -> list[tuple[Tensor, ...]]:
        """What the call returns and, if it is differentiable, the gradients of its tensors."""
        made = self.function(*self.tensors, **self.options, backend=backend)
        outputs = made if isinstance(made, tuple) else (made,)
        if not self.differentiable:
            return [outputs]
        loss = sum((x.square().sum() for x in outputs), torch.zeros((), device=outputs[0].device))
        return [tuple(x.detach() for x in outputs), torch.autograd.grad(loss, self.tensors)]


def sample_calls() -> list[Sample]:
    """One call of each public operator, float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # A head dim and patches that every backend serves.
    qkv = [normal(2, 11, 4, 64), normal(2, 13, 2, 64), normal(2, 13, 2, 64)]
    cache = [normal(2, 1, 4, 64), normal(2, 16, 2, 64), normal(2, 16, 2, 64)]
    lengths = torch.tensor([13, 5], dtype=torch.int32)
    images = [normal(2, 3, 40, 32), normal(40, 3, 16, 16) / 28, normal(40)]
    return [
        Sample(mm.attention, qkv, {"causal": True, "return_lse": True}, True),
        Sample(
            mm.attention_with_kvcache, cache, {"cache_seqlens": lengths, "return_lse": True}, False
        ),
        Sample(mm.patch_embed, images, {}, True),
    ]


def examine(check: bool) -> dict[str, Operations]:
    """Every backend of every operation, on the CPU and on the GPU if there is one.

    Args:
        check: also run each and compare it with the reference in float64.

    Returns:
        dtype and device of the sample calls, e.g. "float32 on cpu" -> operations.
    """
    places = [(torch.float32, "cpu")]
    if torch.cuda.is_available():
        places.append((torch.bfloat16, "cuda"))
    found: dict[str, Operations] = {}
    for dtype, device in places:
        operations = found[f"{str(dtype).removeprefix('torch.')} on {device}"] = {}
        for sample in sample_calls():
            call = sample.to(dtype, device, sample.differentiable)
            explained = _explain(call)
            if check:
                _check(call, explained)
            operations |= explained
    return found


def _explain(call: Sample) -> Operations:
    operations: Operations = {}
    explanation: Explanation | None = mm.explain(call.function, *call.tensors, **call.options)
    while explanation is not None:
        operations[explanation.op] = {
            name: BackendFact(
                available=reason is None,
                chosen=name == explanation.backend,
                problem=reason,
                remedy=REMEDIES.get(name) if reason else None,
            )
            for name, reason in explanation.reasons.items()
        }
        explanation = explanation.backward
    return operations


def _check(call: Sample, operations: Operations) -> None:
    """Fills in `passed` and `detail` of all backends that can serve the call."""
    forward, *backward = operations.values()
    for name in (name for name, fact in forward.items() if _serves(fact, call, name)):
        facts = [forward[name], *(op[name] for op in backward if _serves(op[name], call, name))]
        try:
            _compare(facts, call, name)
        except Exception as error:
            for fact in facts:
                fact.passed, fact.detail = False, f"{type(error).__name__}: {error}"


def _serves(fact: BackendFact, call: Sample, backend: str) -> bool:
    """By itself or, on a GPU, by name; on a CPU the latter is Triton's interpreter."""
    if fact.available or call.tensors[0].device.type == "cpu":
        return fact.available
    asked = mm.explain(call.function, *call.tensors, **call.options, backend=backend)
    return asked.reasons[backend] is None


def _compare(facts: list[BackendFact], call: Sample, backend: str) -> None:
    # float64 of the rounded inputs, so that only the backend's own error counts.
    differentiable = len(facts) > 1
    exact = call.to(torch.float64, "cpu", differentiable).results("reference")
    dtype, device = call.tensors[0].dtype, call.tensors[0].device.type
    results = call.to(dtype, device, differentiable).results(backend)
    allowed = ALLOWED_ROUNDINGS * torch.finfo(dtype).eps
    for fact, got, wanted in zip(facts, results, exact, strict=True):
        errors = [
            float((x.cpu().double() - y).abs().max() / y.abs().max())
            for x, y in zip(got, wanted, strict=True)
        ]
        fact.passed = all(error <= allowed for error in errors)  # false for a NaN
        fact.detail = "relative errors " + ", ".join(f"{error:.0e}" for error in errors)
