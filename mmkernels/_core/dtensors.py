"""DTensors, told from other tensors without importing torch.distributed.tensor.

That import is slow, and whoever has a DTensor has made it already.
"""

import sys
from typing import Any

from torch import Tensor
from torch.nn import Parameter


def is_dtensor(x: Any) -> bool:
    """Whether x is a `torch.distributed.tensor.DTensor`."""
    if type(x) is Tensor or type(x) is Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def gathered(x: Tensor) -> Tensor:
    """All of x, as a plain tensor."""
    return x.full_tensor() if is_dtensor(x) else x  # type: ignore[attr-defined]


def beside(x: Tensor, other: Tensor) -> Tensor:
    """x, as a replicated DTensor where `other` is one: torch combines no DTensor with a tensor."""
    if is_dtensor(x) or not is_dtensor(other):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(other, DTensor)
    mesh = other.device_mesh
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


def check_together(where: str, **tensors: Tensor) -> None:
    """Raises unless all tensors are DTensors on the mesh of the first, or none is one."""
    (first_name, first), *others = tensors.items()
    for name, x in others:
        if is_dtensor(x) != is_dtensor(first):
            spread, plain = (first_name, name) if is_dtensor(first) else (name, first_name)
            raise TypeError(
                f"{where}: {spread} is a DTensor and {plain} is a plain tensor; make it one: where "
                f"each process has its part, DTensor.from_local({plain}, {spread}.device_mesh, "
                f"{spread}.placements), where each has all, distribute_tensor likewise"
            )
        if is_dtensor(x):
            meshes = [tensor.device_mesh for tensor in (first, x)]  # type: ignore[attr-defined]
            if meshes[0] != meshes[1]:
                raise ValueError(
                    f"{where}: {first_name} is on {meshes[0]} and {name} on {meshes[1]}; "
                    f"distribute both over one mesh"
                )
