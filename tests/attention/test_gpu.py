"""What only a GPU can show of its kernels: real tiles, streams, graphs, and vast tensors.

The CUDA kernels take no bias, sinks, ALiBi slopes or dropout; where they have no backward pass,
Triton's follows them.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import mmkernels as mm
from mmkernels import testing
from mmkernels._core import library, values
from mmkernels.attention import cuda
from mmkernels.attention.interval import IntervalMask
from tests.attention import backends, passes

pytestmark = pytest.mark.gpu
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
S = 1000


@pytest.fixture(params=["triton", "cuda"])
def backend(request) -> str:
    if request.param == "cuda" and (reason := library.load_error()):
        pytest.skip(reason)
    return request.param


def inputs(
    seqlen: int, head_dim: int, *, batch: int = 2, heads: int = 4, seed: int = 0
) -> list[Tensor]:
    """q, k, v that want gradients, half as many key heads as query heads."""
    sizes = (batch, seqlen, seqlen, heads, heads // 2, head_dim)
    tensors = testing.make_qkv(*sizes, dtype=torch.bfloat16, device="cuda", seed=seed)
    return [x.requires_grad_() for x in tensors]


def mask_of(name: str, seqlen: int, batch: int = 2) -> IntervalMask | None:
    mask = testing.MASKS[name](batch, seqlen, seqlen)
    return None if mask is None else mask.to("cuda")


def mask_of_rows(mask: IntervalMask, rows: int) -> IntervalMask:
    """The mask of the first rows."""
    return IntervalMask(mask.start[:, :rows], mask.end[:, :rows], mask.seqlen_k)


def both_passes(q: Tensor, k: Tensor, v: Tensor, backend: str, **options: object) -> list[Tensor]:
    """out, lse, dq, dk, dv and the gradients of bias and sinks where they are wanted."""
    out, lse = mm.attention(q, k, v, return_lse=True, backend=backend, **options)
    wanted = [x for x in (q, k, v, *options.values()) if isinstance(x, Tensor) and x.requires_grad]
    finite = lse.where(lse > -torch.inf, 0.0)
    return [out, lse, *torch.autograd.grad((out, finite), wanted, (out.detach(), finite.detach()))]


# At real sizes


@HALF
@pytest.mark.parametrize("mask", ["none", "causal", "prefix-LM", "documents", "ragged"])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize(
    ("forward", "backward"), [("triton", "triton"), ("cuda", "cuda"), ("cuda", "triton")]
)
def test_real_tiles_obey_the_error_rule(head_dim, mask, dtype, forward, backward):
    if "cuda" in (forward, backward) and (reason := library.load_error()):
        pytest.skip(reason)
    if forward == "cuda" and head_dim not in cuda.HEAD_DIMS:
        pytest.skip("the CUDA kernels have no such head dim")
    passes.check((2, S, S, 4, 2, head_dim, head_dim), mask, dtype, forward, backward)


@pytest.mark.parametrize("mask", ["none", "causal", "ragged"])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_gradients_in_any_order_differ_by_rounding_alone(head_dim, mask, backend):
    options = {"mask": mask_of(mask, S), "backend": backend}
    fixed, free = (
        both_passes(*inputs(S, head_dim), **options, deterministic=deterministic)
        for deterministic in (True, False)
    )
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), free, fixed, strict=True):
        torch.testing.assert_close(x, y, rtol=2**-6, atol=2**-8, msg=name)


@HALF
@pytest.mark.parametrize("widths", [(64, 128), (128, 64), (96, 40), (8, 256)], ids=str)
def test_values_of_another_width(widths, dtype):
    sizes = (1, S - 123, S + 30, 6, 2, *widths)
    passes.check(sizes, "causal", dtype, "triton", "triton", ("bias", "sinks"))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_float32_is_ieee(head_dim):
    sizes = (1, 500, 500, 4, 2, head_dim, head_dim)
    passes.check(sizes, "causal", torch.float32, "triton", "triton")


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_nan_behind_a_mask_reaches_nobody(head_dim, backend):
    """Hopper's forward kernel leaves rows that it may have reached to the portable one."""
    q, k, v = (x.detach() for x in inputs(S, head_dim))
    mask = mask_of("documents", S)
    hidden = ~mask.to_dense()[:, : S // 2].any(1)  # keys that none of the first rows sees
    assert hidden.any()
    dirty = [x.masked_fill(hidden[..., None, None].to(x.device), torch.nan) for x in (k, v)]
    out = mm.attention(q[:, : S // 2], *dirty, mask=mask_of_rows(mask, S // 2), backend=backend)
    wanted = mm.attention(q[:, : S // 2], k, v, mask=mask_of_rows(mask, S // 2), backend=backend)
    torch.testing.assert_close(out, wanted, rtol=2**-6, atol=2**-9)


# The same bits


@pytest.mark.parametrize("mask", ["none", "causal", "documents", "ragged"])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_every_run_gives_the_same_bits(head_dim, mask, backend):
    q, k, v = inputs(S, head_dim)
    options = {"mask": mask_of(mask, S)}
    if backend == "triton":
        bias = torch.randn(1, 4, 1, S, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        options |= {"bias": bias, "sinks": torch.randn(4, device="cuda", requires_grad=True)}
    first = both_passes(q, k, v, backend, **options)
    assert len(first) == 4 + len(options)
    for _ in range(5):
        for one, other in zip(first, both_passes(q, k, v, backend, **options), strict=True):
            assert torch.equal(one, other)


def test_a_batch_element_does_not_depend_on_the_others(backend):
    q, k, v = inputs(S, 64, batch=3)
    whole = both_passes(q, k, v, backend, causal=True)
    one = (x.detach()[1:2].requires_grad_() for x in (q, k, v))
    alone = both_passes(*one, backend, causal=True)
    for one, other in zip(alone, whole, strict=True):
        assert torch.equal(one, other[1:2])


# CUDA graphs


@pytest.mark.parametrize("built", ["inside", "outside"])
def test_a_captured_graph_replays_with_new_inputs_and_bounds(built, backend):
    seqlen = 513
    q, k, v = inputs(seqlen, 64)
    dout = torch.randn_like(q)
    mask = mask_of("ragged", seqlen)
    bounds = mask.start.clone(), mask.end.clone()

    def run() -> list[Tensor]:
        seen = IntervalMask(*bounds, seqlen) if built == "inside" else mask
        out, lse = mm.attention(q, k, v, mask=seen, return_lse=True, backend=backend)
        return [out, lse, *torch.autograd.grad(out, (q, k, v), dout)]

    # Kernels are compiled, and allocations made, before the capture.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()

    for seed, name in enumerate(("causal", "documents", "image spans", "left padding, causal"), 1):
        fresh = inputs(seqlen, 64, seed=seed)
        other = mask_of(name, seqlen)
        target = bounds if built == "inside" else (mask.start, mask.end)
        with torch.no_grad():
            for x, y in zip((q, k, v), fresh, strict=True):
                x.copy_(y)
            dout.copy_(torch.randn_like(dout))
            for x, y in zip(target, (other.start, other.end), strict=True):
                x.copy_(y.expand_as(x))
        graph.replay()
        torch.cuda.synchronize()
        replayed = [x.clone() for x in captured]
        for one, wanted in zip(replayed, run(), strict=True):
            assert torch.equal(one, wanted), name


def test_a_captured_graph_drops_anew_for_a_new_seed():
    q, k, v = (x.detach() for x in inputs(S, 64))

    def run() -> Tensor:
        return mm.attention(q, k, v, dropout_p=0.5, backend="triton")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


# Offsets of more than 31 bits


BEYOND = 2**31  # elements


def needs(gigabytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes << 30:
        pytest.skip(f"{free >> 30} GiB of GPU memory are free; the test needs {gigabytes}")


def spread(x: Tensor, dim: int) -> Tensor:
    """x with its last element along `dim` BEYOND elements behind its first, in 4 GiB."""
    step = -(-BEYOND // (x.shape[dim] - 1) // 8) * 8
    strides = [*x.stride()]
    strides[dim] = step
    room = torch.empty(step * (x.shape[dim] - 1) + x.numel(), dtype=x.dtype, device=x.device)
    view = room.as_strided(x.shape, strides)
    view.copy_(x)
    assert (x.shape[dim] - 1) * step >= BEYOND
    return view


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "rows", "heads"])
@pytest.mark.parametrize("which", ["q", "k", "v", "dout", "bias"])
def test_offsets_beyond_31_bits(which, dim, backend):
    needs(12)
    if which == "bias" and backend == "cuda":
        pytest.skip("the CUDA kernels take no bias")
    tensors = dict(zip("qkv", inputs(300, 64), strict=True))
    tensors |= {"dout": torch.randn_like(tensors["q"])}
    if backend == "triton":
        tensors["bias"] = torch.randn(2, 4, 300, 300, dtype=torch.bfloat16, device="cuda")
    place = {0: 0, 1: 2, 2: 1}[dim] if which == "bias" else dim  # (B, H, Sq, Sk)

    def run(tensors: dict[str, Tensor]) -> list[Tensor]:
        q, k, v = (tensors[name].detach().requires_grad_() for name in "qkv")
        out, lse = mm.attention(
            q, k, v, bias=tensors.get("bias"), causal=True, return_lse=True, backend=backend
        )
        return [out, lse, *torch.autograd.grad(out, (q, k, v), tensors["dout"])]

    wanted = run(tensors)
    got = run(tensors | {which: spread(tensors[which].detach(), place)})
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-2)


def test_results_of_more_than_2_to_the_31_elements(backend):
    """Every row sees the key at its place, so out is v."""
    needs(16)
    rows, heads = 2**20, 33
    q = torch.randn(1, 1, 1, 64, dtype=torch.bfloat16, device="cuda").expand(1, rows, heads, -1)
    k, v = (torch.randn(1, rows, 1, 64, dtype=torch.bfloat16, device="cuda") for _ in "kv")
    out = mm.attention(q, k, v, window_size=(0, 0), backend=backend)
    assert out.numel() > BEYOND
    for head in (0, heads - 1):
        for part in (slice(0, 1000), slice(rows - 1000, rows)):
            assert torch.equal(out[:, part, head], v[:, part, 0])


# Streams


def test_two_streams_at_once(backend):
    problems = [inputs(S, 64, seed=seed) for seed in range(2)]
    wanted = [both_passes(*problem, backend, causal=True) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    copies = [
        [torch.full_like(x, torch.nan).requires_grad_() for x in problem] for problem in problems
    ]
    torch.cuda.synchronize()
    got = []
    for stream, problem, late in zip(streams, problems, copies, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # a kernel on another stream would find NaN
            with torch.no_grad():
                for x, y in zip(late, problem, strict=True):
                    x.copy_(y)
            got.append(both_passes(*late, backend, causal=True))
    torch.cuda.synchronize()
    for results, expected in zip(got, wanted, strict=True):
        for one, other in zip(results, expected, strict=True):
            assert torch.equal(one, other)


# Synchronisation


def packed(
    q: Tensor, k: Tensor, v: Tensor, backend: str, cu_seqlens: Tensor, **options: object
) -> None:
    q, k, v = (x.detach()[0].requires_grad_() for x in (q, k, v))
    arguments = (q, k, v, cu_seqlens, cu_seqlens, S, S)
    out = mm.attention_varlen(*arguments, backend=backend, **options)
    torch.autograd.grad(out, (q, k, v), out.detach())


def decoded(
    q: Tensor, k: Tensor, v: Tensor, backend: str, lengths: Tensor, **options: object
) -> None:
    q, k, v = (x.detach() for x in (q, k, v))
    new = k[:, :1], v[:, :1]
    mm.attention_with_kvcache(q[:, :1], k, v, *new, lengths, backend=backend, **options)


# Name -> what is called, and its options, on the CPU.
CALLS = {
    "full": lambda: (both_passes, {}),
    "causal": lambda: (both_passes, {"causal": True}),
    "mask": lambda: (both_passes, {"mask": testing.MASKS["image spans"](2, S, S)}),
    "dense mask": lambda: (both_passes, {"mask": torch.rand(S, S) < 0.5}),
    "scores": lambda: (
        both_passes,
        {"alibi_slopes": torch.ones(4), "sinks": torch.zeros(4).requires_grad_(), "softcap": 9.0},
    ),
    "bias": lambda: (both_passes, {"bias": torch.zeros(1, 4, 1, S).requires_grad_()}),
    "dropout": lambda: (both_passes, {"dropout_p": 0.1}),
    "packed": lambda: (
        packed, {"cu_seqlens": torch.tensor([0, 300, S], dtype=torch.int32), "causal": True}
    ),
    "decode": lambda: (decoded, {"lengths": torch.tensor([500, 900], dtype=torch.int32)}),
}  # fmt: skip


@pytest.mark.skipif(values.ALWAYS, reason="MMKERNELS_CHECK=1 reads values")
@pytest.mark.parametrize("call", CALLS)
def test_no_call_waits_for_the_gpu(call, backend):
    if backend == "cuda" and call in ("dense mask", "scores", "bias", "dropout", "decode"):
        pytest.skip("the CUDA kernels serve no such call")
    function, options = CALLS[call]()
    options = backends.moved(options, "cuda")
    q, k, v = inputs(S, 64)
    function(q, k, v, backend, **options)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(q, k, v, backend, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
