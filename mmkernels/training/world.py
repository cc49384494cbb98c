"""The processes that train together, on torch.distributed; most often one.

Documents follow from seed and step, so every process makes those of the whole step and takes its
part of them. What a step learns is then the same however many processes there are, and a run may
go on with other numbers of them.

    dp    rows of a batch go to different processes
    sp    so do the positions of a row; attention goes round a ring
    tp    so do heads and the MLP's columns

FSDP2 keeps a part of the weights, gradients and moments on each of the dp * sp processes; DDP keeps
all of them on each.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from mmkernels.models.batch import Batch
from mmkernels.models.chat_format import Document
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.training.stages import fit

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """How a run is spread.

    Attributes:
        dp: processes that take different rows.
        sp: processes that share each row.
        tp: processes that share each layer.
        ddp: all weights on each process, instead of parts of them.
    """

    dp: int = 1
    sp: int = 1
    tp: int = 1
    ddp: bool = False

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.dp * self.sp * self.tp

    @property
    def data(self) -> int:
        """Processes that see different tokens."""
        return self.dp * self.sp

    def __str__(self) -> str:
        return f"--dp {self.dp} --sp {self.sp} --tp {self.tp}" + " --ddp" * self.ddp


class World:
    """This process among those that train together.

    Args:
        plan: how the run is spread.
        device: "cpu" or "cuda".

    Attributes:
        rank: of this process; 0 writes.
        device: where this process computes.

    Raises:
        ValueError: torchrun has started another number of processes than the plan needs.
    """

    def __init__(self, plan: Plan = Plan(), device: str = "cpu") -> None:
        self.plan, self.rank, self.device = plan, 0, torch.device(device)
        self._forward: nn.Module | None = None
        self._spreads: dict[int, AbstractContextManager] = {}  # by the length of a row
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started != plan.size:
            raise ValueError(
                f"{plan} needs {plan.size} processes, and there are {started}; start them by "
                f"torchrun --nproc-per-node {plan.size} -m mmkernels train {plan} ..."
            )
        if plan.ddp and plan.tp > 1:
            raise ValueError(f"{plan}: with --tp weights are in parts anyway; leave --ddp out")
        if plan.size == 1:
            return
        if device == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            _join("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        self.rank = dist.get_rank()
        names = ("dp", "sp", "tp")
        mesh = init_device_mesh(device, (plan.dp, plan.sp, plan.tp), mesh_dim_names=names)
        self._sp_mesh = mesh["sp"]
        self._dp_rank, self._sp_rank, _ = mesh.get_coordinate() or (0, 0, 0)
        # FSDP and tensor parallelism want to be two dimensions of one mesh.
        both = (plan.data, plan.tp)
        self._mesh = init_device_mesh(device, both, mesh_dim_names=("data", "tp"))
        self.files: Any = dist.new_group(backend="gloo")  # of the threads that write checkpoints

    def first(self, act: Callable[[], T]) -> T:
        """What act() returns on rank 0, which alone runs it; or its error, on all."""
        if self.plan.size == 1:
            return act()
        result: list[Any] = [None, None]
        if self.rank == 0:
            try:
                result = [act(), None]
            except Exception as error:
                result = [None, error]
        dist.broadcast_object_list(result, group=self.files)
        if result[1] is not None:
            raise result[1]
        return result[0]

    def prepare(self, model: MultimodalModel) -> None:
        """Spreads a model that is alike on all processes.

        Raises:
            ValueError: the model's heads or columns do not divide by tp, or it has adapters.
        """
        self._forward = model
        plan = self.plan
        if plan.size == 1:
            return
        if plan.tp > 1:
            _split_layers(model, self._mesh["tp"], plan.tp)
        if plan.data == 1:
            return
        if plan.ddp:
            group = self._mesh["data"].get_group()
            self._forward = nn.parallel.DistributedDataParallel(model, process_group=group)
            return
        from torch.distributed.fsdp import fully_shard

        stay = {p for name, p in model.named_parameters() if "_codec" in name}
        mesh = self._mesh["data"]
        for layer in model.decoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=stay)

    def batch(self, documents: Sequence[Document], seqlen: int) -> Batch:
        """This process's part of a micro-batch.

        Raises:
            ValueError: a document is longer than a row.
        """
        rows = fit(documents, seqlen)
        if self.plan.data == 1:
            return Batch.of(rows, seqlen)
        # As many rows for each process; those without documents cost what a row costs.
        rows += [[] for _ in range(-len(rows) % self.plan.dp)]
        batch = Batch.of(rows[self._dp_rank :: self.plan.dp], seqlen)
        if self.plan.sp > 1:
            batch.part = _layout(seqlen, self.plan.sp).positions(self._sp_rank)
        return batch

    def spread(self, model: MultimodalModel, seqlen: int) -> AbstractContextManager:
        """In which a batch's forward and backward run."""
        if self.plan.sp == 1:
            return nullcontext()
        from mmkernels.distributed import context_parallel

        if seqlen not in self._spreads:
            layout = _layout(seqlen, self.plan.sp)
            self._spreads[seqlen] = context_parallel(model.decoder, self._sp_mesh, layout)
        return self._spreads[seqlen]

    def loss(self, batch: Batch, learned: int) -> Tensor:
        """This process's share of the loss, so large that its gradients' mean is the whole's."""
        assert self._forward is not None
        return self._forward(batch, learned) * self.plan.data

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.plan.size == 1:
            return x
        x = x.clone()
        dist.all_reduce(x)
        return x / self.plan.size

    def any(self, flag: bool) -> bool:
        """Whether one process says so."""
        if self.plan.size == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def clip(self, parameters: list[nn.Parameter], most: float) -> Tensor:
        """Scales gradients to a norm of at most `most`; the norm they had, over all processes.

        Raises:
            RuntimeError: the norm is not finite.
        """
        if self.plan.size == 1:
            return nn.utils.clip_grad_norm_(parameters, most, error_if_nonfinite=True)
        # Those on one mesh can be summed as they are; there is one without layers that are split.
        by_mesh: dict[Any, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                mesh = getattr(parameter.grad, "device_mesh", None)
                by_mesh.setdefault(mesh, []).append(parameter.grad)
        norms = [whole(nn.utils.get_total_norm(grads)) for grads in by_mesh.values()]
        norm = torch.stack(norms).norm()
        if not norm.isfinite():
            raise RuntimeError(f"the norm of the gradient is {float(norm)}; it is not finite")
        scale = min(most / (float(norm) + 1e-6), 1.0)
        for grads in by_mesh.values():
            for grad in grads:
                grad.mul_(scale)
        return norm

    def close(self) -> None:
        """Leaves the others."""
        if self.plan.size > 1:
            dist.destroy_process_group()


def _join(backend: str) -> None:
    """Meets the processes of the same start of torchrun.

    Its store outlives a start, and with it the addresses of processes that have died.
    """
    store, rank, size = next(rendezvous("env://"))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend, store=PrefixStore(f"start {start}", store), rank=rank, world_size=size
    )


def peer_lost(error: RuntimeError) -> bool:
    """Whether a transfer failed for the other side is gone; the backends say so in words alone."""
    words = (
        "closed by peer", "reset by peer", "Broken pipe", "timed out", "Timed out",
        "ncclRemoteError", "ncclSystemError",
    )  # fmt: skip
    return dist.is_initialized() and any(word in str(error) for word in words)


def whole(x: Tensor) -> Tensor:
    """A tensor of which each process may hold a part; all of them have to ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


@cache
def _layout(seqlen: int, ranks: int) -> Any:
    from mmkernels.distributed import Layout

    return Layout.zigzag(seqlen, ranks)


def _split_layers(model: MultimodalModel, mesh: Any, tp: int) -> None:
    """Source: Shoeybi et al., "Megatron-LM", 2019."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    config = model.config.decoder
    if model.config.lora_rank:
        raise ValueError(f"--tp {tp}: the model has adapters, which cannot be split; use --dp")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % tp:
            raise ValueError(
                f"--tp is {tp}, and the decoder's {name} {getattr(config, name)}; it must divide it"
            )
    for layer in model.decoder.layers:
        plan: dict[str, Any] = {
            f"self_attn.{name}_proj": ColwiseParallel() for name in ("q", "k", "v")
        }
        plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
        plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        if config.qk_norm:  # one weight for all heads, so its gradient is the sum over them
            norms = ("self_attn.q_norm", "self_attn.k_norm")
            style = SequenceParallel(sequence_dim=2, use_local_output=True)
            plan |= dict.fromkeys(norms, style)
        parallelize_module(layer, mesh, plan)
