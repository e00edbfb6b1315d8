"""The ranks of a run that torchrun started, one process a GPU: who they are, and what they tell each other.

A run on one rank sends nothing, and each message costs it nothing: `sum_` gives back what it is given, and so on.
Numbers of a step go between GPUs by NCCL, what the hosts decide by gloo; on CPUs all goes by gloo. All ranks must send
the same messages in the same order.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from sae.errors import InputError

T = TypeVar("T")
PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others: the first may be writing a large file. When one has ended, torchrun ends the
others much sooner."""

# torch 2.13 has new names for these two.
_all_gather: Callable[..., object] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., object] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Ranks:
    """Rank `rank` of `size`."""

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, compare=False)
    """torch's process group; None for that of all."""

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes what belongs to all."""
        return self.rank == 0

    def span(self, n: int) -> tuple[int, int]:
        """The first of n things that this rank has, and the one after its last: ranks in order, as equal as can be."""
        return n * self.rank // self.size, n * (self.rank + 1) // self.size

    def each(self) -> "list[Ranks]":
        """All of them."""
        return [Ranks(rank, self.size) for rank in range(self.size)]

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks of a tensor of any shape, in its memory; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: Shaped[Tensor, "*any"]) -> Shaped[Tensor, "ranks *any"]:
        """The tensors of all ranks, of one shape, along a new first dimension."""
        return self.send(tensor).get()

    def send(self, tensor: Shaped[Tensor, "*any"], out: Shaped[Tensor, "ranks *any"] | None = None) -> "Sent":
        """As `gather`, into memory that is given or new, to be waited for later."""
        if self.size == 1:
            return Sent(tensor.unsqueeze(0))
        out = tensor.new_empty(self.size, *tensor.shape) if out is None else out
        # As bytes: gloo does not know all types.
        to, part = (one.view(-1).view(torch.uint8) for one in (out, tensor.contiguous()))
        return Sent(out, _all_gather(to, part, group=self.group, async_op=True))

    def send_rows(self, rows: Float[Tensor, "n d"]) -> "Sent":
        """This rank's part of the rows' sum over the ranks, to be waited for later; n is a multiple of their number."""
        out = rows.new_empty(rows.shape[0] // self.size, rows.shape[1])
        return Sent(out, _reduce_scatter(out, rows, group=self.group, async_op=True))

    def send_sum(self, tensor: Shaped[Tensor, "*any"]) -> "Sent":
        """As `sum_`, to be waited for later."""
        if self.size == 1:
            return Sent(tensor)
        return Sent(tensor, dist.all_reduce(tensor, group=self.group, async_op=True))

    def join(self, part: Shaped[Tensor, "*part"], total: int, dim: int = 0) -> Shaped[Tensor, "*whole"]:
        """A tensor of which every rank has its `span` of `total` along `dim`, whole."""
        if self.size == 1:
            return part
        widest = -(-total // self.size)
        moved = part.movedim(dim, 0)
        room = moved.new_zeros(widest, *moved.shape[1:])
        room[: moved.shape[0]] = moved
        spans = [one.span(total) for one in self.each()]
        pieces = [got[: last - first] for got, (first, last) in zip(self.gather(room), spans, strict=True)]
        return torch.cat(pieces).movedim(0, dim)

    def most(self, *values: int) -> list[int]:
        """The largest of each value over the ranks, decided by the hosts."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return [int(value) for value in found]

    def counts(self, n: int) -> list[int]:
        """Every rank's number, in their order."""
        return [int(count) for count in self.gather(torch.tensor(n))]

    def objects(self, value: T) -> list[T]:
        """Every rank's value, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def lead(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank, which alone does it. An InputError of it is raised on all."""
        if self.size == 1:
            return work()
        told: list[Any] = [None]
        if self.leads:
            try:
                told = [(work(), None)]
            except InputError as error:
                told = [(None, error)]
        dist.broadcast_object_list(told, src=0)
        result, refused = told[0]
        if refused is not None:
            raise refused
        return result

    def to_lead(self, value: T | None, owner: int) -> T | None:
        """What the rank `owner` gives, on the first one and on itself; None on the others."""
        if owner == 0 or self.rank not in (0, owner):
            return value
        told: list[Any] = [value]
        if self.rank == owner:
            dist.send_object_list(told, dst=0)
        else:
            dist.recv_object_list(told, src=owner)
        return told[0]

    def apart(self) -> "Ranks":
        """The same ranks by a way of their own, for what is told beside other things, on another stream of a GPU."""
        return self if self.size == 1 else replace(self, group=dist.new_group(timeout=PATIENCE))

    def wait(self) -> None:
        """Returns when all ranks have come here."""
        self.most(0)


ALONE = Ranks()


@dataclass(frozen=True)
class Sent:
    """What the ranks make together, on its way: other work may be given to the GPU before it is asked for."""

    result: Shaped[Tensor, "*any"]
    work: Any = None

    def get(self) -> Shaped[Tensor, "*any"]:
        """It; what follows on the GPU waits for it."""
        if self.work is not None:
            self.work.wait()
        return self.result


def meet() -> Ranks:
    """The ranks of this run, which is alone where torchrun has not started it; its GPU is the current one from then on.

    Raises:
        InputError: more ranks of this host than it has GPUs, where it has some.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if not dist.is_initialized():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        on_gpu = torch.cuda.is_available()
        if on_gpu and local >= torch.cuda.device_count():
            raise InputError(
                f"rank {local} of this host has no GPU, torch sees {torch.cuda.device_count()}: start as many ranks as "
                "there are GPUs, torchrun --nproc-per-node gpu"
            )
        if on_gpu:
            torch.cuda.set_device(local)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE,
            device_id=torch.device("cuda", local) if on_gpu else None,
        )  # fmt: skip
    return Ranks(dist.get_rank(), dist.get_world_size())
