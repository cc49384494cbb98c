"""Builders of interval masks, as `mmkernels.masks`.

Causal and windowed masks align the last query with the last key (bottom-right): row i stands at key
i + seqlen_k - seqlen_q. Bounds are clamped to [0, seqlen_k]. A builder whose bounds follow from
sizes alone returns a cached mask, so calling it in every layer costs a look-up.

    import torch
    from mmkernels import masks

    images = masks.spans(torch.tensor([-1, 0, 0, 0, -1, 1, 1, -1]))  # -1 is text
    causal_with_images = masks.causal(8) | images
    local_with_images = (masks.causal(8) & masks.window(8, window_size=(3, -1))) | images
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from mmkernels._core.values import captured, readable
from mmkernels.attention.interval import IntervalMask

__all__ = [
    "IntervalMask",
    "causal",
    "full",
    "packed",
    "padding",
    "prefix_lm",
    "spans",
    "top_left",
    "window",
]

Device = torch.device | str | None

_cache: dict[tuple, tuple[IntervalMask, tuple[int, int]]] = {}
_CACHE_SIZE = 256

# Farther than any key, and no overflow when added to a position in int32.
_UNREACHABLE = 2**30


def full(seqlen_q: int, seqlen_k: int | None = None, *, device: Device = None) -> IntervalMask:
    """Every row sees every key.

    Args:
        seqlen_q: number of query rows.
        seqlen_k: number of keys; None: seqlen_q.
        device: where the bounds lie.

    Returns:
        A mask with bounds (1, Sq).

    Raises:
        ValueError: a size is negative.
    """
    return window(seqlen_q, seqlen_k, window_size=(-1, -1), device=device)


def causal(seqlen_q: int, seqlen_k: int | None = None, *, device: Device = None) -> IntervalMask:
    """Row i sees the keys j <= i + seqlen_k - seqlen_q.

    Args:
        seqlen_q: number of query rows.
        seqlen_k: number of keys; None: seqlen_q.
        device: where the bounds lie.

    Returns:
        A mask with bounds (1, Sq).

    Raises:
        ValueError: a size is negative.
    """
    return window(seqlen_q, seqlen_k, window_size=(-1, 0), device=device)


def window(
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    window_size: tuple[int, int],
    device: Device = None,
) -> IntervalMask:
    """Row i sees the keys i' - left <= j <= i' + right, with i' = i + seqlen_k - seqlen_q.

    Args:
        seqlen_q: number of query rows.
        seqlen_k: number of keys; None: seqlen_q.
        window_size: (left, right) in keys; -1 is unbounded.
        device: where the bounds lie.

    Returns:
        A mask with bounds (1, Sq).

    Raises:
        ValueError: a size is negative, or a window below -1.
    """
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    left, right = check_window_size("window", window_size)
    _check_sizes("window", seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    if not torch.compiler.is_compiling():  # the cache needs to know which; a graph need not
        device = torch.get_default_device() if device is None else torch.device(device)

    def build() -> IntervalMask:
        position = torch.arange(seqlen_q, dtype=torch.int32, device=device) + (seqlen_k - seqlen_q)
        return _band(
            position, position.new_zeros(()), position.new_full((), seqlen_k), left, right, seqlen_k
        )

    return _cached((seqlen_q, seqlen_k, left, right, device), build)


def padding(
    lengths: Tensor, seqlen_q: int, seqlen_k: int | None = None, *, side: str = "right"
) -> IntervalMask:
    """Every row of batch b sees the lengths[b] keys that are no padding.

    Args:
        lengths: (B,) integers. Number of real keys of each batch element.
        seqlen_q: number of query rows.
        seqlen_k: number of keys, padding included; None: seqlen_q.
        side: "right" or "left", where the padding is.

    Returns:
        A mask with bounds (B, Sq).

    Raises:
        TypeError: lengths is no integer tensor.
        ValueError: wrong rank or side; a length outside [0, seqlen_k].
    """
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    _check_sizes("padding", seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    check_integers("padding", lengths=lengths)
    if lengths.ndim != 1:
        raise ValueError(f"padding: lengths has shape {tuple(lengths.shape)}; it must be (B,)")
    if side not in ("left", "right"):
        raise ValueError(f"padding: side is {side!r}; it must be 'left' or 'right'")
    if (
        readable(lengths)
        and lengths.numel()
        and not 0 <= int(lengths.min()) <= int(lengths.max()) <= seqlen_k
    ):
        raise ValueError(
            f"padding: lengths are {lengths.tolist()}; they must lie in [0, {seqlen_k}]"
        )
    lengths = lengths.to(torch.int32).clamp(0, seqlen_k)[:, None]
    zero = torch.zeros_like(lengths)
    start, end = (zero, lengths) if side == "right" else (seqlen_k - lengths, zero + seqlen_k)
    return _intervals(start.expand(-1, seqlen_q), end.expand(-1, seqlen_q), seqlen_k)


def packed(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    total_q: int | None = None,
    total_k: int | None = None,
) -> IntervalMask:
    """Sequences packed end to end, each attending only itself: documents, or images of mixed size.

    Args:
        cu_seqlens_q: (N + 1,) integers, from 0, not decreasing. Sequence n's rows are
            cu_seqlens_q[n] to cu_seqlens_q[n + 1].
        cu_seqlens_k: the same for the keys; None: cu_seqlens_q.
        causal: each sequence is causal, bottom-right aligned within itself.
        window_size: (left, right) in keys within each sequence; -1 is unbounded.
        total_q: number of rows; those beyond the last sequence see nothing. None: cu_seqlens_q[-1],
            which reads the tensor and so synchronises a GPU.
        total_k: number of keys; None: cu_seqlens_k[-1].

    Returns:
        A mask with bounds (1, total_q).

    Raises:
        TypeError: a cu_seqlens is no integer tensor.
        ValueError: wrong rank, different lengths, not monotone from 0, or beyond the totals.
    """
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    return checked_packed(
        "packed", cu_seqlens_q, cu_seqlens_k, causal, window_size, total_q, total_k
    )


def prefix_lm(
    prefix_lengths: int | Tensor,
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    device: Device = None,
) -> IntervalMask:
    """Causal, but every row sees the whole prefix: image and prompt bidirectional, answer causal.

    Args:
        prefix_lengths: an int, or (B,) integers. Keys of the prefix.
        seqlen_q: number of query rows.
        seqlen_k: number of keys; None: seqlen_q.
        device: where the bounds lie; not needed with a tensor.

    Returns:
        A mask with bounds (1, Sq), or (B, Sq) for (B,).

    Raises:
        TypeError: prefix_lengths is neither an int nor an integer tensor.
        ValueError: a prefix outside [0, seqlen_k].
    """
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    _check_sizes("prefix_lm", seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    if is_int(prefix_lengths):
        prefix_lengths = torch.tensor([prefix_lengths], dtype=torch.int32, device=device)
    check_integers("prefix_lm", prefix_lengths=prefix_lengths)
    assert isinstance(prefix_lengths, Tensor)  # said once more, for the type checker
    if prefix_lengths.ndim != 1:
        raise ValueError(
            f"prefix_lm: prefix_lengths has shape {tuple(prefix_lengths.shape)}; it must be an "
            "int or (B,)"
        )
    if readable(prefix_lengths) and ((prefix_lengths < 0) | (prefix_lengths > seqlen_k)).any():
        raise ValueError(
            f"prefix_lm: prefix_lengths are {prefix_lengths.tolist()}; they must lie in [0, "
            f"{seqlen_k}]"
        )
    rows = causal(seqlen_q, seqlen_k, device=prefix_lengths.device)
    end = torch.maximum(rows.end, prefix_lengths.to(torch.int32)[:, None]).clamp_(max=seqlen_k)
    return _intervals(torch.zeros_like(end), end, seqlen_k)


def top_left(seqlen_q: int, seqlen_k: int, *, device: Device = None) -> IntervalMask:
    """Row i sees the keys j <= i: `is_causal` of torch's SDPA; not `causal` if Sq != Sk.

    Args:
        seqlen_q: number of query rows.
        seqlen_k: number of keys.
        device: where the bounds lie.

    Returns:
        A mask with bounds (1, Sq).

    Raises:
        ValueError: a size is negative.
    """
    _check_sizes("top_left", seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    if seqlen_q == seqlen_k:
        return causal(seqlen_q, device=device)
    end = torch.arange(1, seqlen_q + 1, dtype=torch.int32, device=device).clamp_(max=seqlen_k)
    return _intervals(torch.zeros_like(end)[None], end[None], seqlen_k)


def spans(ids: Tensor) -> IntervalMask:
    """A row inside a span sees its whole span, any other row only itself.

    `causal(s) | spans(ids)` makes image or audio spans bidirectional inside causal text.

    Args:
        ids: (S,) or (B, S) integers. Neighbours with the same id >= 0 form a span; a negative id is
            in none.

    Returns:
        A mask with bounds (1 or B, S).

    Raises:
        TypeError: ids is no integer tensor.
        ValueError: wrong rank; an id that stands in two separate runs (they could not see each
            other).
    """
    check_integers("spans", ids=ids)
    if ids.ndim not in (1, 2):
        raise ValueError(f"spans: ids has shape {tuple(ids.shape)}; it must be (S,) or (B, S)")
    ids = torch.atleast_2d(ids)
    seqlen = ids.shape[1]
    position = torch.arange(seqlen, dtype=torch.int32, device=ids.device).expand(ids.shape)
    breaks = (ids[:, 1:] != ids[:, :-1]) | (ids[:, 1:] < 0)
    edge = ids.new_ones((ids.shape[0], min(seqlen, 1)), dtype=torch.bool)
    first, last = torch.cat((edge, breaks), 1), torch.cat((breaks, edge), 1)
    if readable(ids):
        for row_ids, row_first in zip(ids, first & (ids >= 0), strict=True):
            heads = row_ids[row_first]
            ordered = heads.sort().values
            repeats = ordered[1:][ordered[1:] == ordered[:-1]]
            if repeats.numel():
                raise ValueError(
                    f"spans: ids holds the id {repeats[0]} in two separate runs, which could not "
                    "see each other; give each run an id of its own"
                )
    start = position.where(first, 0).cummax(1).values
    end = (position + 1).where(last, seqlen + 1).flip(1).cummin(1).values.flip(1)
    return _intervals(start, end, seqlen)


def checked_packed(
    where: str,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    window_size: tuple[int, int],
    total_q: int | None,
    total_k: int | None,
) -> IntervalMask:
    """`packed` with the caller's name `where` in its errors."""
    left, right = check_window_size(where, window_size)
    check_integers(where, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if cu_seqlens_q.ndim != 1 or cu_seqlens_q.shape != cu_seqlens_k.shape or not len(cu_seqlens_q):
        raise ValueError(
            f"{where}: cu_seqlens_q and cu_seqlens_k have shapes {tuple(cu_seqlens_q.shape)} and "
            f"{tuple(cu_seqlens_k.shape)}; both must be (N + 1,)"
        )
    if cu_seqlens_q.device != cu_seqlens_k.device:
        raise ValueError(
            f"{where}: cu_seqlens_q is on {cu_seqlens_q.device} and cu_seqlens_k on "
            f"{cu_seqlens_k.device}; move one"
        )
    total_q = int(cu_seqlens_q[-1]) if total_q is None else total_q
    total_k = int(cu_seqlens_k[-1]) if total_k is None else total_k
    _check_sizes(where, total_q=total_q, total_k=total_k)
    if readable(cu_seqlens_q, cu_seqlens_k):
        check_cu_seqlens(where, "cu_seqlens_q", cu_seqlens_q, total_q)
        check_cu_seqlens(where, "cu_seqlens_k", cu_seqlens_k, total_k)
    position, first, last = packed_rows(cu_seqlens_q, cu_seqlens_k, total_q)
    return _band(position, first, last, left, 0 if causal else right, total_k)


def packed_rows(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For each packed row: the key it stands at, its sequence's first key and one past its last.

    All (total_q,) int32. Rows beyond the last sequence have no keys.
    """
    row = torch.arange(total_q, dtype=torch.int32, device=cu_seqlens_q.device)
    q_bounds, k_bounds = cu_seqlens_q.to(torch.int32), cu_seqlens_k.to(torch.int32)
    sequence = torch.searchsorted(q_bounds[1:], row, right=True)
    q_bounds, k_bounds = (torch.cat((bounds, bounds[-1:])) for bounds in (q_bounds, k_bounds))
    first, last = k_bounds[sequence], k_bounds[sequence + 1]
    return row - q_bounds[sequence + 1] + last, first, last


def check_window_size(where: str, window_size: tuple[int, int]) -> tuple[int, int]:
    """window_size as two ints >= -1, or an error that names the caller `where`."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(
            f"{where}: window_size is {window_size!r}; it must be (left, right), -1 for unbounded"
        )
    left, right = window_size
    if not all(map(is_int, window_size)):
        raise TypeError(f"{where}: window_size is {window_size!r}; both must be ints")
    if left < -1 or right < -1:
        raise ValueError(f"{where}: window_size is {window_size!r}; both must be >= -1 (unbounded)")
    return min(left, _UNREACHABLE), min(right, _UNREACHABLE)


def check_cu_seqlens(where: str, name: str, cu_seqlens: Tensor, total: int) -> None:
    """Raises unless cu_seqlens starts at 0, never decreases and ends within `total`."""
    values = cu_seqlens.tolist()
    if values[0] != 0 or any(a > b for a, b in itertools.pairwise(values)):
        shown = f"{values[:8]}{'...' if len(values) > 8 else ''}"
        raise ValueError(
            f"{where}: {name} is {shown}; it must start at 0 and never decrease "
            "(the cumulative sum of the sequence lengths)"
        )
    if values[-1] > total:
        raise ValueError(
            f"{where}: {name} ends at {values[-1]}, beyond the {total} packed rows it indexes"
        )


def _check_sizes(where: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if not is_int(size):
            raise TypeError(f"{where}: {name} is {size!r}; it must be an int")
        if size < 0:
            raise ValueError(f"{where}: {name} is {size}; it must be >= 0")


def is_int(value: object) -> bool:
    """Is it an int, maybe a symbolic one, and not a bool?"""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_integers(where: str, **tensors: object) -> None:
    """Raises a TypeError that names the tensor which holds no integers."""
    for name, tensor in tensors.items():
        if (
            not isinstance(tensor, Tensor)
            or tensor.dtype == torch.bool
            or tensor.is_floating_point()
            or tensor.is_complex()
        ):
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{where}: {name} is {got}; it must be an integer tensor")


def _band(
    position: Tensor, first: Tensor, last: Tensor, left: int, right: int, seqlen_k: int
) -> IntervalMask:
    """Keys of [first, last) within (left, right) of `position`; all (Sq,) int32 or scalars."""
    start = first.expand_as(position) if left < 0 else torch.maximum(position - left, first)
    end = last.expand_as(position) if right < 0 else torch.minimum(position + right + 1, last)
    return _intervals(start[None], end[None], seqlen_k)


def _intervals(start: Tensor, end: Tensor, seqlen_k: int) -> IntervalMask:
    empty = start >= end
    return IntervalMask._of(start.masked_fill(empty, 0), end.masked_fill(empty, 0), seqlen_k)


def _cached(key: tuple, build: Callable[[], IntervalMask]) -> IntervalMask:
    """The mask under `key`, built outside of inference mode so that autograd may save it later."""
    if torch.compiler.is_compiling():
        return build()
    # Under a mode like FakeTensorMode a mask that was made outside is of no use.
    moded = torch._C._len_torch_dispatch_stack() > 0
    mask, versions = (None, None) if moded else _cache.get(key, (None, None))
    if mask is None or versions != mask.versions():  # somebody has written into the bounds
        with torch.inference_mode(False):
            mask = build()
        # A fake tensor must not outlive its mode, nor memory of a graph capture its graph.
        if type(mask.start) is Tensor and not moded and not captured(key[-1]):
            while len(_cache) >= _CACHE_SIZE:
                _cache.pop(next(iter(_cache)), None)
            _cache[key] = mask, mask.versions()
    return mask
