"""Attention and patch embedding of DTensors: each process computes its part with the plain call.

Along every dimension of the mesh a call is divided in one way, or not at all:

| split     | attention                      | patch embedding                               |
|-----------|--------------------------------|-----------------------------------------------|
| "batch"   | B                              | samples, unless they are a list of mixed size |
| "heads"   | Hkv key heads and their groups | -                                             |
| "columns" | -                              | embed_dim, as `ColwiseParallel` divides it    |

What has no dimension that the split divides is replicated, and its gradient a sum over the
processes. A split must come out even, over all dimensions of the mesh that make it: so a process
has whole groups of heads, and the rows of a sample lie in one process. Inputs that are divided
otherwise (along the sequence, say) are first redistributed to the split that is even, attention to
heads before batch, the patch embedding to batch before columns, and made whole if none is; torch
takes an all-to-all for this where it has one.

Not `torch.distributed.tensor.experimental.register_sharding`: it takes what it found for one call
for every other whose tensors agree, so a call with another of its optional tensors, or another
bool, silently has the former's rule; and it knows no op that returns a list beside tensors.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from mmkernels.attention import call as attention_call
from mmkernels.attention.interval import IntervalMask
from mmkernels.patch_embed.call import Call as PatchCall

# Split -> the dimension of a tensor that it divides.
Axes = dict[str, int]

ROWS: Axes = {"heads": 2, "batch": 0}  # q, k, v, out
LSE: Axes = {"heads": 1, "batch": 0}


class Division(NamedTuple):
    """How a call is divided.

    Attributes:
        mesh: of the DTensors.
        splits: for each dimension of the mesh the split along it, or None.
    """

    mesh: DeviceMesh
    splits: tuple[str | None, ...]

    def local(self, x: Tensor, axes: Axes) -> Tensor:
        """This process's part of x; a plain x is the same in all processes.

        Its gradient, too, is a part: of x where a split divides x, else one of those to be summed.
        """
        if not isinstance(x, DTensor):
            whole = [Replicate()] * self.mesh.ndim
            x = DTensor.from_local(x, self.mesh, whole, run_check=False)
        # Also where nothing moves: in the backward pass this sums the parts of the gradient.
        x = x.redistribute(placements=self._placements(axes, Replicate()))
        return x.to_local(grad_placements=self._placements(axes, Partial()))

    def spread(self, x: Tensor, axes: Axes) -> DTensor:
        """The DTensor of which each process has the part x."""
        placements = self._placements(axes, Replicate())
        return DTensor.from_local(x, self.mesh, placements, run_check=False)

    def _placements(self, axes: Axes, undivided: Placement) -> list[Placement]:
        return [
            Replicate() if split is None else Shard(axes[split]) if split in axes else undivided
            for split in self.splits
        ]


def run_attention(call: attention_call.Call) -> tuple[Tensor, Tensor]:
    """out (B, Sq, Hq, Dv) and lse (B, Hq, Sq) as DTensors, of a checked call whose q is one.

    Raises:
        ValueError: dropout of a q that is divided.
    """
    q, k, v, _, _, bias, alibi_slopes, sinks, seed, *numbers = call.inputs
    sizes = {"heads": k.shape[2], "batch": k.shape[0]}
    division = _division([(x, ROWS) for x in (q, k, v)], sizes)
    mask = call.mask
    if mask is not None and mask.shape[0] > 1 and "batch" in division.splits:
        start, end = (division.local(bound, {"batch": 0}) for bound in (mask.start, mask.end))
        mask = IntervalMask._of(start, end, mask.seqlen_k)
    inputs = (
        *(division.local(x, ROWS) for x in (q, k, v)),
        *((None, None) if mask is None else (mask.start, mask.end)),
        _optional(division, bias, LSE),
        _optional(division, alibi_slopes, LSE if _ndim(alibi_slopes) == 2 else {"heads": 0}),
        _optional(division, sinks, {"heads": 0}),
        None if seed is None else _common_seed(division, seed, dropout_p=numbers[2]),
        *numbers,
    )
    out, lse = attention_call.run(call._replace(inputs=inputs, mask=mask))
    return division.spread(out, ROWS), division.spread(lse, LSE)


def run_patch_embed(call: PatchCall, run: Callable[[PatchCall], Tensor]) -> DTensor:
    """What `run` makes of a checked call whose pixels and weight are DTensors, as one.

    Args:
        call: of one tensor of pixels, or of several.
        run: of a call of plain tensors; its result is (rows, D) or (B, rows, D).
    """
    weight = call.weight
    batch = call.pixels[0].shape[0] if len(call.pixels) == 1 else 1
    tensors = [(weight, {"columns": 0}), *((x, {"batch": 0}) for x in call.pixels)]
    division = _division(tensors, {"batch": batch, "columns": weight.shape[0]})
    each = {"batch": 0}
    shared: Axes = {}
    own_positions = call.pos_per_sample and call.pos_index is None
    local = call._replace(
        pixels=[division.local(x, each) for x in call.pixels],
        weight=division.local(weight, {"columns": 0}),
        bias=_optional(division, call.bias, {"columns": 0}),
        pos_embed=_optional(
            division, call.pos_embed, {"columns": 1} | (each if own_positions else {})
        ),
        pos_index=_optional(division, call.pos_index, each if call.pos_per_sample else shared),
        prefix=_optional(division, call.prefix, {"columns": 2} | each),
        token_mask=_optional(division, call.token_mask, each if call.mask_per_sample else shared),
        mask_token=_optional(division, call.mask_token, {"columns": 0}),
    )
    out = run(local)
    return division.spread(out, {"columns": out.ndim - 1} | each)


def _division(tensors: Sequence[tuple[Tensor, Axes]], sizes: dict[str, int]) -> Division:
    """The division that moves least, of DTensors with the axes of each.

    Args:
        tensors: all on one mesh.
        sizes: split -> elements to divide, in order of preference where tensors must move.
    """
    spread = [(x, axes) for x, axes in tensors if isinstance(x, DTensor)]
    mesh = spread[0][0].device_mesh
    left = dict(sizes)
    splits: list[str | None] = []
    for mesh_dim in range(mesh.ndim):
        placed = [(x.placements[mesh_dim], axes) for x, axes in spread]
        found = {s for place, axes in placed for s, dim in axes.items() if place == Shard(dim)}
        parts = mesh.size(mesh_dim)
        even = [split for split in sizes if left[split] % parts == 0]
        chosen: str | None = None
        if even and any(place != Replicate() for place, _ in placed):
            chosen = min(even, key=lambda split: split not in found)
            left[chosen] //= parts
        splits.append(chosen)
    return Division(mesh, tuple(splits))


def _optional(division: Division, x: Tensor | None, axes: Axes) -> Tensor | None:
    """Like `Division.local`, of an x that may be absent, or 1 in a dimension that it broadcasts."""
    if x is None:
        return None
    return division.local(x, {split: dim for split, dim in axes.items() if x.shape[dim] > 1})


def _ndim(x: Tensor | None) -> int:
    return 0 if x is None else x.ndim


def _common_seed(division: Division, seed: Tensor, dropout_p: float) -> Tensor:
    """The seed that the first process drew."""
    mesh = division.mesh
    divided = {
        split for split, n in zip(division.splits, mesh.shape, strict=True) if split and n > 1
    }
    if divided:
        raise ValueError(
            f"attention: dropout_p is {dropout_p} and q, k and v are DTensors, divided by "
            f"{' and '.join(sorted(divided))}; which weights are dropped depends on batch and head "
            "index, and a process counts those of its own part; use dropout_p=0.0, or replicate "
            "all three: q.redistribute(placements=[Replicate()] * q.device_mesh.ndim)"
        )
    return DTensor.from_local(seed, mesh, [Replicate()] * mesh.ndim, run_check=True).to_local()
