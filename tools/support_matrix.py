"""`python -m tools.support_matrix`: rewrites README's support matrix from what the backends say.

Each row is a call. `mmkernels.explain` asks every backend whether it would serve it, forward and
backward; nothing runs.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mmkernels as mm
from mmkernels._core import registry
from mmkernels._core.registry import Explanation
from tools.generated import ROOT, replaced, table

README = ROOT / "README.md"


class Row(NamedTuple):
    """A feature, and a call that needs it."""

    feature: str
    function: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    options: dict[str, Any]

    def explain(self) -> Iterator[Explanation]:
        """The forward pass's explanation and, where the call has a backward pass, its own."""
        explanation: Explanation | None = mm.explain(self.function, *self.tensors, **self.options)
        while explanation is not None:
            yield explanation
            explanation = explanation.backward


def rows() -> list[Row]:
    """One call for each feature, on the CPU."""

    def qkv(dtype: torch.dtype = torch.float32, kv_heads: int = 4, value_dim: int = 32) -> tuple:
        widths = ((4, 32), (kv_heads, 32), (kv_heads, value_dim))
        return tuple(
            torch.empty(2, 16, *width, dtype=dtype, requires_grad=True) for width in widths
        )

    def attention(feature: str, *tensors: Tensor, **options: Any) -> Row:
        return Row(feature, mm.attention, tensors or qkv(), options)

    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    lengths = torch.tensor([0, 10, 16], dtype=torch.int32)
    packed = [x.detach()[0].requires_grad_() for x in qkv()]
    decode = (torch.empty(2, 1, 4, 32), torch.empty(2, 64, 2, 32), torch.empty(2, 64, 2, 32))
    pages = torch.arange(8, dtype=torch.int32).view(2, 4)
    cache = {"cache_seqlens": 40}
    return [
        *(attention(str(dtype).removeprefix("torch."), *qkv(dtype)) for dtype in dtypes),
        attention("fewer key heads than query heads", *qkv(kv_heads=2)),
        attention("values wider or narrower than keys", *qkv(value_dim=40)),
        attention("interval mask", mask=mm.masks.prefix_lm(4, 16)),
        attention("dense bool mask", mask=torch.arange(16) % 2 == 0),
        attention("bias", bias=torch.empty(4, 16, 16)),
        attention("bias with a gradient", bias=torch.empty(4, 16, 16, requires_grad=True)),
        attention("ALiBi", alibi_slopes=torch.ones(4)),
        attention("sinks with a gradient", sinks=torch.zeros(4, requires_grad=True)),
        attention("softcap", softcap=30.0),
        attention("dropout", dropout_p=0.1),
        Row("packed sequences", mm.attention_varlen, (*packed, lengths, lengths, 10, 10), {}),
        Row("KV cache", mm.attention_with_kvcache, decode, cache),
        Row(
            "paged KV cache",
            mm.attention_with_kvcache,
            (decode[0], *(x.view(8, 16, 2, 32) for x in decode[1:])),
            {**cache, "block_table": pages},
        ),
        Row("KV cache, softcap", mm.attention_with_kvcache, decode, {**cache, "softcap": 30.0}),
    ]


def backends() -> list[str]:
    """The names of all backends of any operation, fastest first."""
    names = {backend.name for op in registry.operations() for backend in registry.backends(op)}
    return sorted(names, key=registry.PREFERENCE.index)


def matrix() -> str:
    """The table in Markdown, and the reasons behind every cell that is not a plain yes."""
    names = backends()
    lines: list[list[str]] = []
    declined: dict[str, dict[str, None]] = {name: {} for name in names}  # as ordered sets
    for row in rows():
        passes = list(row.explain())
        cells = []
        for name in names:
            reasons = [p.reasons.get(name, f"has no {p.op}") for p in passes]
            served = [reason is None for reason in reasons]
            cells.append("yes" if all(served) else "forward" if served[0] else "no")
            declined[name].update(dict.fromkeys(r for r in reasons if r is not None))
        lines.append([row.feature, f"`{row.function.__name__}`", *cells])
    parts = [table(["on CPU tensors", "called as", *(f"`{name}`" for name in names)], lines)]
    for name, reasons in declined.items():
        if reasons:
            items = "\n".join(f"- {reason}" for reason in reasons)
            parts.append(f"Why `{name}` declines:\n\n{items}")
    return "\n\n".join(parts)


def main() -> None:
    """Rewrites the matrix in README.md."""
    README.write_text(replaced(README.read_text(), "support matrix", matrix()))


if __name__ == "__main__":
    main()
