"""`python -m tools.support_matrix`: rewrites README's support matrix from what the backends say.

Each row is a call. `mmkernels.explain` asks every backend whether it would serve it, forward and
backward; nothing runs. The CUDA tensors are fake ones, which need no GPU.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mmkernels as mm
from mmkernels._core import registry
from mmkernels._core.registry import Explanation
from tools.generated import ROOT, replaced, table

README = ROOT / "README.md"
# By device: the backends that its table leaves out, and why.
LEFT_OUT = {
    "cpu": {
        "triton": "`triton` serves CPU tensors in Triton's interpreter only, by name, for tests.",
        "cuda": "`cuda` serves CUDA tensors only.",
    },
    "cuda": {
        "cpu": "`cpu` serves CPU tensors only.",
        "cuda": "`cuda` serves by name only, where the extension is built, in float16 and "
        "bfloat16: `attention` with head dims of 64, 72, 80, 96 and 128, interval masks and "
        "softcap, and `patch_embed` of images in patches of 14 × 14 and 16 × 16, without padding, "
        "pos_index and token_mask. It is not yet measured on a GPU.",
    },
}


class Row(NamedTuple):
    """A feature, and a call that needs it."""

    feature: str
    function: Callable[..., Any]
    tensors: tuple[Any, ...]
    options: dict[str, Any]

    def explain(self) -> Iterator[Explanation]:
        """The forward pass's explanation and, where the call has a backward pass, its own."""
        explanation: Explanation | None = mm.explain(self.function, *self.tensors, **self.options)
        while explanation is not None:
            yield explanation
            explanation = explanation.backward


def rows() -> list[Row]:
    """One call for each feature, on the default device."""

    def qkv(dtype: torch.dtype = torch.float32, kv_heads: int = 4, value_dim: int = 32) -> tuple:
        widths = ((4, 32), (kv_heads, 32), (kv_heads, value_dim))
        return tuple(
            torch.empty(2, 16, *width, dtype=dtype, requires_grad=True) for width in widths
        )

    def images(
        feature: str,
        pixels: Tensor,
        *patch: int,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Row:
        weight = torch.empty(32, 3, *patch, dtype=dtype, requires_grad=True)
        return Row(feature, mm.patch_embed, (pixels, weight), options)

    def attention(feature: str, *tensors: Tensor, **options: Any) -> Row:
        return Row(feature, mm.attention, tensors or qkv(), options)

    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    lengths = torch.tensor([0, 10, 16], dtype=torch.int32)
    packed = [x.detach()[0].requires_grad_() for x in qkv()]
    decode = (torch.empty(2, 1, 4, 32), torch.empty(2, 64, 2, 32), torch.empty(2, 64, 2, 32))
    pages = torch.arange(8, dtype=torch.int32).view(2, 4)
    cache = {"cache_seqlens": 40}
    floats, weight = torch.empty(2, 3, 32, 48), torch.empty(32, 3, 8, 8, requires_grad=True)
    tail = {
        "prefix_tokens": torch.empty(2, 32, requires_grad=True),
        "pos_embed": torch.empty(26, 32, requires_grad=True),
        "token_mask": torch.ones(24, dtype=torch.bool),
        "mask_token": torch.empty(32, requires_grad=True),
    }
    prefix = mm.masks.prefix_lm(4, 16, device=torch.get_default_device())
    return [
        *(attention(str(dtype).removeprefix("torch."), *qkv(dtype)) for dtype in dtypes),
        attention("fewer key heads than query heads", *qkv(kv_heads=2)),
        attention("values wider or narrower than keys", *qkv(value_dim=40)),
        attention("interval mask", mask=prefix),
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
        images("images", floats, 8, 8),
        images("images, float64 weights", floats, 8, 8, dtype=torch.float64),
        images("images that are bytes, normalised", floats.to(torch.uint8), 8, 8, pixel_mean=0.5),
        images("gradient of the pixels", floats.clone().requires_grad_(), 8, 8),
        images("patches that overlap", floats, 8, 8, stride=4),
        images("video", torch.empty(2, 3, 4, 32, 48), 2, 8, 8),
        images("audio", torch.empty(2, 3, 64), 8),
        images("prefix tokens, positions, masked tokens", floats, 8, 8, **tail),
        Row(
            "images of mixed size",
            mm.patch_embed_varlen,
            ([floats[0], floats[1, :, 8:]], weight),
            {},
        ),
    ]


def backends(device: str) -> list[str]:
    """The backends of a device's table, in order of preference."""
    names = {backend.name for op in registry.operations() for backend in registry.backends(op)}
    return [name for name in registry.PREFERENCE if name in names - LEFT_OUT[device].keys()]


def answers(device: str) -> list[tuple[Row, list[Explanation]]]:
    """Every row on that device and what the backends say about its passes."""
    mode = FakeTensorMode() if device == "cuda" else contextlib.nullcontext()
    with mode, torch.device(device):
        return [(row, list(row.explain())) for row in rows()]


def matrix(device: str) -> str:
    """A device's table in Markdown, and the reasons behind every cell that is not a plain yes."""
    names = backends(device)
    lines: list[list[str]] = []
    declined: dict[str, dict[str, None]] = {name: {} for name in names}  # as ordered sets
    for row, passes in answers(device):
        cells = []
        for name in names:
            reasons = [p.reasons.get(name, f"has no {p.op}") for p in passes]
            served = [reason is None for reason in reasons]
            cells.append("yes" if all(served) else "forward" if served[0] else "no")
            declined[name].update(dict.fromkeys(r for r in reasons if r is not None))
        lines.append([row.feature, f"`{row.function.__name__}`", *cells])
    header = [f"on {device.upper()} tensors", "called as", *(f"`{name}`" for name in names)]
    parts = [table(header, lines)]
    for name, reasons in declined.items():
        if reasons:
            items = "\n".join(f"- {reason}" for reason in reasons)
            parts.append(f"Why `{name}` declines:\n\n{items}")
    parts.append(" ".join(LEFT_OUT[device].values()))
    return "\n\n".join(parts)


def block() -> str:
    """What stands in README."""
    return "\n\n".join(matrix(device) for device in LEFT_OUT)


def main() -> None:
    """Rewrites the matrix in README.md."""
    README.write_text(replaced(README.read_text(), "support matrix", block()))


if __name__ == "__main__":
    main()
