"""Attention against a KV cache in Triton: few queries, many keys, split over the whole GPU.

Row i of a sequence of L keys is at position L - Sq + i and sees the keys of its window around it.
A program takes one key head's rows of one sequence, all query heads of the group in one tile, and
an equal share of the keys that some of these rows see. With more than one share, each leaves its
running maximum m, sum l and product acc (see `triton_forward.py`), and a second kernel merges:

    M = max_s m_s,  w_s = exp(m_s - M),  out = sum_s w_s acc_s / sum_s w_s l_s,
    lse = M + log(sum_s w_s l_s),  a sink being one more term of that sum

The number of shares comes from shapes alone and the shares from the lengths, inside the kernel: a
captured CUDA graph serves any lengths, and equal calls give equal bits.

Only keys that some row of the tile sees are loaded, and only their entries of the block table. What
one row sees and another does not is kept from the latter as in `triton_forward.py`.

Layout: q (B, Sq, Hq, D); a cache (B, Smax, Hkv, D or Dv), or pages (num_blocks, page_size, Hkv, ..)
and block_table (B, max_blocks), in any strides; out (B, Sq, Hq, Dv) and lse (B, Hq, Sq) contiguous.

Source: Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023, and
flash_attn_with_kvcache of FlashAttention, whose choice of the number of splits this follows.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._core import tuning
from mmkernels._core.triton_runtime import Gpu, gpu_of, input_precision, launch
from mmkernels.attention import triton_arguments as arguments
from mmkernels.attention.triton_forward import divisor, initial_state, no_key, product
from mmkernels.attention.triton_tiles import LN2, LOG2E, any_not_finite, eights, logits


@triton.jit
def _load_rows(
    x, cells, h, m_row, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """x[block, first + o_slot, h, FIRST : FIRST + WIDTH] as (rows, WIDTH).

    0 beyond DIM and outside of m_row. block and h are one for all rows or one a row.
    """
    p, stride_b, stride_s, stride_h, stride_d = x
    block, first, o_slot = cells
    o_dim = FIRST + tl.arange(0, WIDTH)[None, :]
    o_row = block * stride_b + h * stride_h + first * stride_s + o_slot * stride_s
    p_row = p + o_row
    mask = m_row[:, None]
    if FIRST + WIDTH > DIM:
        mask = mask & (o_dim < DIM)
    return tl.load(p_row[:, None] + o_dim.to(tl.int64) * stride_d, mask=mask, other=0.0)


@triton.jit
def _cells(table, b, n0, m_key, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """block, first and o_slot of keys n0 to n0 + BLOCK_N, of which m_key are looked up.

    n0 is a multiple of BLOCK_N, and some key is of m_key. PAGE_SIZE 0: no pages.
    """
    p_table, stride_b, stride_s, last_page = table
    block = b
    first = n0.to(tl.int64)
    o_slot = tl.arange(0, BLOCK_N).to(tl.int64)
    if PAGE_SIZE > 0:
        p_entry = p_table + b * stride_b
        if PAGE_SIZE % BLOCK_N == 0:
            page = tl.load(p_entry + first // PAGE_SIZE * stride_s)
            first = first % PAGE_SIZE
        else:
            o_key = first + o_slot
            page = tl.load(p_entry + o_key // PAGE_SIZE * stride_s, mask=m_key, other=0)
            o_slot = o_key % PAGE_SIZE
            first = first * 0
        block = tl.minimum(tl.maximum(page.to(tl.int64), 0), last_page)
    return block, first, o_slot


@triton.jit
def _attend(
    query, cache, rows, scores, n0, tiles, WIDTHS: tl.constexpr, KIND: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, PRECISION: tl.constexpr,
    CLEAN: tl.constexpr,
):  # fmt: skip
    """acc1, acc2, m_i and l_i of so many tiles of keys, from n0 on."""
    D: tl.constexpr = WIDTHS[0]
    DV: tl.constexpr = WIDTHS[1]
    D1: tl.constexpr = WIDTHS[2]
    D2: tl.constexpr = WIDTHS[3]
    V1: tl.constexpr = WIDTHS[4]
    V2: tl.constexpr = WIDTHS[5]
    q1, q2 = query
    k, v, table, b, h = cache
    o_row, start, end, lo, hi, seqlen_q, length = rows
    c = scores[0]
    acc1, acc2, m_i, l_i = initial_state(q1.shape[0], V1, V2)
    for index in tl.range(0, tiles, num_stages=1 if CLEAN else None):
        n = n0 + index * BLOCK_N
        o_col = n + tl.arange(0, BLOCK_N)
        m_key = (o_col >= lo) & (o_col < hi)
        cells = _cells(table, b, n, m_key, BLOCK_N, PAGE_SIZE)
        k1 = _load_rows(k, cells, h, m_key, 0, D1, D)
        qk = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        if D2 > 0:
            k2 = _load_rows(k, cells, h, m_key, D1, D2, D)
            qk = tl.dot(q2, tl.trans(k2), qk, input_precision=PRECISION)
        s, _ = logits(qk, o_row[:, None], o_col[None, :], start[:, None], end[:, None], scores,
                      seqlen_q, length, KIND, True)  # fmt: skip
        m_new = tl.maximum(m_i, tl.max(s, 1))
        # -inf - -inf is NaN: a row that has seen nothing yet subtracts 0.
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.math.exp2((m_i - pivot) * c)
        m_i = m_new
        if q1.dtype == tl.float32:
            p = tl.math.exp2((s - pivot[:, None]) * c)
        else:  # one multiply-add; how large scores may be: docs/numerics.md
            p = tl.math.exp2(s * c - (pivot * c)[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        m_visible = s > float("-inf")
        v1 = _load_rows(v, cells, h, m_key, 0, V1, DV)
        acc1 = product(p, v1, acc1 * alpha[:, None], m_visible, CLEAN, PRECISION)
        if V2 > 0:
            v2 = _load_rows(v, cells, h, m_key, V1, V2, DV)
            acc2 = product(p, v2, acc2 * alpha[:, None], m_visible, CLEAN, PRECISION)
    return acc1, acc2, m_i * c, l_i


@triton.jit
def _close(m_i, l_i, p_sink, SINKS: tl.constexpr):
    """What makes out of acc, lse, and which rows saw no key, from m_i in powers of two and l_i."""
    m_empty = no_key(m_i, l_i)
    l_i = divisor(l_i, m_empty)
    m_i = tl.where(m_empty, 0.0, m_i)
    factor = 1.0 / l_i
    if SINKS:
        sink = tl.load(p_sink).to(tl.float32) * LOG2E
        m_all = tl.maximum(m_i, sink)
        alpha = tl.math.exp2(m_i - m_all)
        l_i = l_i * alpha + tl.math.exp2(sink - m_all)
        factor = alpha / l_i
        m_i = m_all
    return factor, tl.where(m_empty, float("-inf"), (m_i + tl.math.log2(l_i)) * LN2), m_empty


# Sizes change from call to call: they are not worth a compilation each.
@triton.jit(do_not_specialize=["seqlen_q", "capacity", "heads", "kv_heads", "tiles", "splits", "total", "last_page", "window_left", "window_right"])  # fmt: skip # noqa: E501
def decode_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_lengths, p_table, p_alibi, p_sinks,
    stride_qb, stride_qs, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd, stride_lengths, stride_table_b, stride_table_s,
    stride_alibi_b, stride_alibi_h, seqlen_q, capacity, heads, kv_heads, tiles, splits, total,
    last_page, window_left, window_right, softmax_scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr,
    V2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, PLAIN: tl.constexpr,
    SPLIT: tl.constexpr, RAGGED: tl.constexpr, EIGHTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one key head over one share of the keys: out and lse; SPLIT: acc, m and l.

    SPLIT: p_out holds acc (total, splits, Dv), m (total, splits) and l (total, splits) for the
    `total` rows of out. RAGGED: the rows of a tile need not see the same keys.
    """
    WIDTHS: tl.constexpr = (D, DV, D1, D2, V1, V2)
    KIND: tl.constexpr = (0, ALIBI, SOFTCAP, False, PLAIN)
    pid = tl.program_id(0)
    tile = pid % tiles  # what shares keys runs side by side
    kv_h = (pid // tiles % kv_heads).to(tl.int64)
    split = pid // (tiles * kv_heads) % splits
    b = (pid // (tiles * kv_heads) // splits).to(tl.int64)
    groups = heads // kv_heads
    o_packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row = o_packed // groups
    m_row = o_row < seqlen_q
    h = kv_h * groups + o_packed % groups

    length = tl.load(p_lengths + b * stride_lengths)
    length = tl.minimum(tl.maximum(length, 0), capacity).to(tl.int32)
    diagonal = o_row + (length - seqlen_q)
    start = tl.maximum(diagonal - window_left, 0)
    end = tl.minimum(diagonal + window_right + 1, length)
    m_empty = (start >= end) | ~m_row
    start = tl.where(m_empty, 0, start)
    end = tl.where(m_empty, 0, end)
    lo = tl.min(tl.where(m_empty, length, start), 0)
    hi = tl.max(end, 0)
    # Whole tiles of the cache, so that a page that is no smaller than a tile is looked up once.
    n0 = lo // BLOCK_N * BLOCK_N
    count = tl.cdiv(tl.maximum(hi - n0, 0), BLOCK_N)
    share = tl.cdiv(count, splits)
    n0 += split * share * BLOCK_N
    count = tl.minimum(share, count - split * share)  # below 0 behind the last one

    q = (p_q, eights(stride_qb, EIGHTS), eights(stride_qs, EIGHTS),
         eights(stride_qh, EIGHTS), stride_qd)  # fmt: skip
    k = (p_k, eights(stride_kb, EIGHTS), eights(stride_ks, EIGHTS),
         eights(stride_kh, EIGHTS), stride_kd)  # fmt: skip
    v = (p_v, eights(stride_vb, EIGHTS), eights(stride_vs, EIGHTS),
         eights(stride_vh, EIGHTS), stride_vd)  # fmt: skip
    cache = (k, v, (p_table, stride_table_b, stride_table_s, last_page), b, kv_h)
    rows = (o_row, start, end, lo, hi, seqlen_q, length)
    slope = 0.0
    if ALIBI:
        slope = tl.load(p_alibi + b * stride_alibi_b + h * stride_alibi_h)[:, None]
    c = softmax_scale * LOG2E if PLAIN else 1.0
    scores = (c, slope, softmax_scale, softcap, 0, 0, 0, 0)
    cells = (b, 0, o_row.to(tl.int64))
    q1 = _load_rows(q, cells, h, m_row, 0, D1, D)
    q2 = q1
    if D2 > 0:
        q2 = _load_rows(q, cells, h, m_row, D1, D2, D)
    query = (q1, q2)

    acc1, acc2, m_i, l_i = _attend(query, cache, rows, scores, n0, count, WIDTHS, KIND, BLOCK_N,
                                   PAGE_SIZE, PRECISION, False)  # fmt: skip
    if RAGGED:
        bad = any_not_finite(acc1, end > start)
        if V2 > 0:
            bad = bad | any_not_finite(acc2, end > start)
        if bad > 0:
            acc1, acc2, m_i, l_i = _attend(query, cache, rows, scores, n0, count, WIDTHS, KIND,
                                           BLOCK_N, PAGE_SIZE, PRECISION, True)  # fmt: skip

    o_out = (b * seqlen_q + o_row) * heads + h
    m_out = m_row
    if SPLIT:
        o_out = o_out * splits + split
        p_m = p_out + total.to(tl.int64) * splits * DV + o_out
        tl.store(p_m, m_i, mask=m_row)
        tl.store(p_m + total.to(tl.int64) * splits, l_i, mask=m_row)
        m_out = m_row & (l_i != 0.0)  # the merge reads no other
    else:
        factor, lse, m_empty = _close(m_i, l_i, p_sinks + h if SINKS else p_sinks, SINKS)
        tl.store(p_lse + (b * heads + h) * seqlen_q + o_row, lse, mask=m_row)
        acc1 = tl.where(m_empty[:, None], 0.0, acc1 * factor[:, None])
        acc2 = tl.where(m_empty[:, None], 0.0, acc2 * factor[:, None])
    p_row = p_out + (o_out * DV)[:, None]
    o_dim = tl.arange(0, V1)[None, :]
    tl.store(p_row + o_dim, acc1.to(p_out.dtype.element_ty), mask=m_out[:, None] & (o_dim < DV))
    if V2 > 0:
        o_dim = V1 + tl.arange(0, V2)[None, :]
        tl.store(p_row + o_dim, acc2.to(p_out.dtype.element_ty), mask=m_out[:, None] & (o_dim < DV))


@triton.jit(do_not_specialize=["seqlen_q", "heads", "splits", "total"])
def merge_kernel(
    p_partial, p_out, p_lse, p_sinks, seqlen_q, heads, splits, total,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """out and lse of one row from the shares that `decode_kernel` left of it."""
    row = tl.program_id(0).to(tl.int64)  # (b * Sq + i) * Hq + h
    h = row % heads
    p_m = p_partial + total.to(tl.int64) * splits * DV + row * splits
    p_l = p_m + total.to(tl.int64) * splits
    o_split = tl.arange(0, BLOCK_S)
    m_all = tl.max(tl.load(p_m + o_split, mask=o_split < splits, other=float("-inf")), 0)
    pivot = tl.where(m_all == float("-inf"), 0.0, m_all)
    o_dim = tl.arange(0, BLOCK_D)
    acc = tl.zeros([CHUNK, BLOCK_D], tl.float32)
    l_acc = tl.zeros([CHUNK], tl.float32)
    for first in tl.range(0, splits, CHUNK):
        o_chunk = first + tl.arange(0, CHUNK)
        m_i = tl.load(p_m + o_chunk, mask=o_chunk < splits, other=float("-inf"))
        l_i = tl.load(p_l + o_chunk, mask=o_chunk < splits, other=0.0)
        p_acc = p_partial + ((row * splits + o_chunk) * DV)[:, None] + o_dim[None, :]
        m_acc = (l_i != 0.0)[:, None] & (o_dim < DV)[None, :]
        weight = tl.math.exp2(m_i - pivot)
        l_acc += l_i * weight
        acc += tl.load(p_acc, mask=m_acc, other=0.0) * weight[:, None]
    l_all = tl.sum(l_acc, 0)
    factor, lse, m_empty = _close(m_all, l_all, p_sinks + h if SINKS else p_sinks, SINKS)
    out = tl.where(m_empty, 0.0, tl.sum(acc, 0) * factor)
    tl.store(p_out + row * DV + o_dim, out.to(p_out.dtype.element_ty), mask=o_dim < DV)
    b = row // heads // seqlen_q
    tl.store(p_lse + (b * heads + h) * seqlen_q + row // heads % seqlen_q, lse)


MAX_SPLITS = 128
MIN_KEYS = 128  # of a share, if the cache is full
MAX_RESIDENT = 4  # programs that a multiprocessor is counted on to run at once
CHUNK = 16  # shares that the merge adds up at once


@functools.lru_cache(1024)
def split_count(slots: int, programs: int, most: int) -> int:
    """Into how many shares, at most `most`, to split the keys of each of so many programs.

    1 if that keeps 80 % of the GPU's slots for programs busy on average over its waves, else the
    smallest number within 90 % of the best.
    """

    def busy(splits: int) -> float:
        return splits * programs / (-(-splits * programs // slots) * slots)

    if busy(1) >= 0.8:
        return 1
    choices = range(1, max(1, min(most, slots, MAX_SPLITS)) + 1)
    best = max(map(busy, choices))
    return next(splits for splits in choices if busy(splits) >= 0.9 * best)


def _configuration(problem: tuning.Problem, gpu: Gpu, packed: int) -> tuning.Config:
    """The tuned one, which is for one query, made to serve `packed` rows of a key head."""
    config = tuning.configuration(problem, gpu)
    rows = min(max(16, triton.next_power_of_2(packed)), tuning.max_decode_rows(problem.dtype))
    if rows == 16:
        return config._replace(BLOCK_M=rows)
    keys = 64 if max(problem.head_dim, problem.value_dim) <= 128 else 32
    return tuning.Config(rows, min(config.BLOCK_N, keys), 8, config.num_stages)


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, softmax_scale: float, softcap: float,
    window_left: int, window_right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, Sq, Hq, Dv) in q's dtype and lse (B, Hq, Sq) float32; see `_core/ops.py`."""
    batch, seqlen_q, heads, head_dim = q.shape
    blocks, block_size, kv_heads, value_dim = v_cache.shape
    capacity = block_size if block_table is None else block_size * block_table.shape[1]
    out = torch.empty((batch, seqlen_q, heads, value_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, seqlen_q), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if capacity == 0 or blocks == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    gpu, paged, packed = gpu_of(q), block_table is not None, seqlen_q * (heads // kv_heads)
    problem = tuning.Problem("decode", head_dim, value_dim, q.dtype, True)
    config = _configuration(problem, gpu, packed)
    tiles = triton.cdiv(packed, config.BLOCK_M)
    programs = tiles * batch * kv_heads
    resident = gpu.shared // tuning.shared_bytes(problem, config, gpu)
    slots = gpu.processors * min(max(resident, 1), MAX_RESIDENT)
    splits = split_count(slots, programs, capacity // max(MIN_KEYS, config.BLOCK_N))
    total = batch * seqlen_q * heads
    p_out = out if splits == 1 else lse.new_empty(total * splits * (value_dim + 2))
    if paged:  # the compiler counts the look-up of a page and the load from there as a stage each
        config = config._replace(num_stages=2 * config.num_stages - 1)
    widths = arguments.width_arguments(head_dim, value_dim)
    if widths["V2"] == 16:  # each of four warps would make the whole of a result of 16 x 16
        widths["V2"] = 32
    table_strides = block_table.stride() if paged else (0, 0)
    unbounded = capacity + seqlen_q
    common = {
        "p_lse": lse, "p_sinks": arguments.dense(sinks), "seqlen_q": seqlen_q, "heads": heads,
        "splits": splits, "total": total, "SINKS": sinks is not None, "DV": value_dim,
    }  # fmt: skip
    launch(
        decode_kernel, (programs * splits,),
        **config._asdict(), **arguments.strides("q", q), **arguments.strides("k", k_cache),
        **arguments.strides("v", v_cache), **common | widths,
        **arguments.score_arguments(alibi_slopes, None, softmax_scale, softcap),
        p_q=q, p_k=k_cache, p_v=v_cache, p_out=p_out, p_lengths=cache_seqlens,
        p_table=block_table, stride_lengths=cache_seqlens.stride(0),
        stride_table_b=table_strides[0], stride_table_s=table_strides[1], last_page=blocks - 1,
        capacity=capacity, kv_heads=kv_heads, tiles=tiles,
        window_left=min(window_left, unbounded) if window_left >= 0 else unbounded,
        window_right=min(window_right, unbounded) if window_right >= 0 else unbounded,
        PAGE_SIZE=block_size if paged else 0, SPLIT=splits > 1, RAGGED=seqlen_q > 1,
        EIGHTS=arguments.eights(q, k_cache, v_cache),
        PRECISION=input_precision(q.dtype),
    )  # fmt: skip
    if splits > 1:
        launch(
            merge_kernel, (total,), num_warps=4, num_stages=1, p_partial=p_out, p_out=out,
            BLOCK_D=triton.next_power_of_2(value_dim), BLOCK_S=triton.next_power_of_2(splits),
            CHUNK=CHUNK, **common,
        )  # fmt: skip
    return out, lse
