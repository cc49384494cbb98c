"""Transfers between the processes of a group, on torch's functional collectives.

One collective serves both forms: an all-to-all with sizes of its own for every pair. Where all but
one of them are 0 it is a send to one neighbour and a receive from another.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import DeviceMesh


def check_mesh(where: str, mesh: DeviceMesh, ranks: int) -> None:
    """Raises unless `mesh` has one dimension, of `ranks` processes."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"{where}: mesh is {type(mesh).__name__}; it must be a DeviceMesh, e.g. "
            'init_device_mesh("cuda", (ranks,))'
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"{where}: mesh has {mesh.ndim} dimensions {mesh.mesh_dim_names or ''}; pick the one "
            'over which the sequence is sharded, e.g. mesh["sp"]'
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"{where}: this process is not in mesh {mesh.mesh.tolist()}; only those that are may "
            "call it"
        )
    if mesh.size() != ranks:
        raise ValueError(
            f"{where}: mesh has {mesh.size()} processes and layout {ranks} ranks; make the layout "
            "for mesh.size()"
        )


def start_exchange(
    x: Tensor, receive: Sequence[int], send: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Starts an all-to-all of the elements of x (n,); `finish` gives the result.

    Args:
        x: what is sent, that for rank 0 first.
        receive: elements from each rank.
        send: elements to each rank.
        group: the processes.
    """
    return funcol.all_to_all_single(x, list(receive), list(send), group)


def finish(pending: Tensor) -> Tensor:
    """Waits for a transfer."""
    return pending.wait() if isinstance(pending, funcol.AsyncCollectiveTensor) else pending


def pass_on(x: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """Starts sending x (n,) to the next rank and receiving `size` elements from the previous one.

    `finish` gives what was received.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    send, receive = [0] * ranks, [0] * ranks
    send[(rank + 1) % ranks] = x.numel()
    receive[(rank - 1) % ranks] = size
    return start_exchange(x, receive, send, group)


class Exchange(torch.autograd.Function):
    """An all-to-all of x (n,) that has a gradient: the same, backwards."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        receive: list[int],
        send: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        """What the others sent, that of rank 0 first."""
        ctx.sizes = receive, send, group
        return finish(start_exchange(x, receive, send, group))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradients go back to where the elements came from."""
        receive, send, group = ctx.sizes
        return Exchange.apply(dout.contiguous(), send, receive, group), None, None, None
