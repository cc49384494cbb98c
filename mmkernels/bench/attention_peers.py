"""Who computes attention, by name: mmkernels, torch's own functions, and other libraries.

Masks are made before the clock starts, in the form that each takes best, unless a name says that
the call builds its mask.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import mmkernels as mm
from mmkernels.bench import attention_libraries
from mmkernels.bench.attention_masks import BenchMask
from mmkernels.bench.attention_problem import Attention, AttentionProblem, Prepare, Size
from mmkernels.bench.attention_sdpa import additive, sdpa, sdpa_by_image
from mmkernels.bench.calls import GPU_BACKENDS
from mmkernels.bench.case import OURS, Unavailable
from mmkernels.bench.compiling import compiled


def peers(
    mask: BenchMask, size: Size, device: torch.device, telling: bool, with_flex: bool = True
) -> dict[str, Prepare]:
    """Name -> implementation, `OURS` first.

    Args:
        mask: of the case.
        size: likewise.
        device: likewise.
        telling: also those that are slow to time (they materialise the scores) or to compile.
        with_flex: FlexAttention takes part, which compiles for some seconds.
    """
    gpu = device.type == "cuda"
    given = " (dense mask)" if mask.dense else " (is_causal)" if mask.causal else ""
    found: dict[str, Prepare] = {OURS: ours()}
    if gpu:
        found |= {f"{OURS} {backend}": ours(backend) for backend in GPU_BACKENDS}
    if mask.dense:
        found[f"{OURS}, mask built inside"] = ours(inside=True)
    found[f"SDPA{given}"] = sdpa()
    if mask.dense and size.heads != size.kv_heads:
        found["SDPA (dense mask, repeated keys)"] = sdpa(repeated=True)
    if mask.lengths and not mask.padded:
        found["SDPA (a call for each image)"] = sdpa_by_image
    if gpu:
        found |= {
            f"SDPA flash{given}": sdpa(SDPBackend.FLASH_ATTENTION),
            # Of the kernels that take a mask these know no grouped heads.
            f"SDPA efficient{given}": sdpa(SDPBackend.EFFICIENT_ATTENTION, repeated=True),
            f"SDPA cudnn{given}": sdpa(SDPBackend.CUDNN_ATTENTION),
        } | attention_libraries.LIBRARIES
    if telling:
        found[f"SDPA math{given}"] = sdpa(SDPBackend.MATH)
        found["eager"] = eager
        found["torch.compile"] = compiled_eager
        if mask.dense:
            found["FlexAttention, mask built inside"] = flex(inside=True)
    if mask.dense:
        found["FlexAttention"] = flex(wanted=with_flex)
    return found


def ours(backend: str = "auto", inside: bool = False) -> Prepare:
    """`mmkernels.attention`; `inside`: every call builds its mask."""

    def prepare(problem: AttentionProblem) -> Attention:
        interval = problem.interval
        if backend != "auto":
            plan = mm.explain(mm.attention, *problem.qkv, mask=interval, backend=backend)
            for part in filter(None, (plan, plan.backward)):
                if part.backend is None:
                    raise Unavailable(part.reasons[backend])
        if inside:
            build = problem.mask.interval(problem.device)
            return lambda q, k, v: mm.attention(q, k, v, mask=build(), backend=backend)
        return lambda q, k, v: mm.attention(q, k, v, mask=interval, backend=backend)

    return prepare


def eager(problem: AttentionProblem) -> Attention:
    """`eager_form` of the problem."""
    mask = additive(problem)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return eager_form(q, k, v, mask).transpose(1, 2)

    return attention


def eager_form(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as the eager code of transformers writes it, with its softmax in float32.

    Args:
        q: (B, Hq, Sq, D).
        k: (B, Hkv, Sk, D).
        v: likewise.
        mask: added to the scores; None: there is none.
    """
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


def compiled_eager(problem: AttentionProblem) -> Attention:
    """The same through torch.compile."""
    return compiled(eager(problem), problem.device)


def flex(inside: bool = False, wanted: bool = True) -> Prepare:
    """torch's FlexAttention, compiled; `inside`: every call builds its block mask, compiled too."""

    def prepare(problem: AttentionProblem) -> Attention:
        if problem.backward and problem.device.type == "cpu":
            raise Unavailable("has no backward pass on a CPU")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        size, device = problem.size, problem.device
        mask_mod = problem.mask.mask_mod(device)
        batch = size.batch if problem.mask.padded else None
        sizes = (batch, None, size.seqlen, size.seqlen, device)
        attend = compiled(flex_attention, device, wanted)
        create = compiled(create_block_mask, device) if inside else create_block_mask
        block_mask = create(mask_mod, *sizes)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            here = create(mask_mod, *sizes) if inside else block_mask
            grouped = size.heads != size.kv_heads
            return attend(q, k, v, block_mask=here, enable_gqa=grouped).transpose(1, 2)

        return attention

    return prepare
