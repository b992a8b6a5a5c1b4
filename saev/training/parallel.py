"""Data parallelism: several processes share each batch of an SAE, through torch.distributed.

Every process reads the whole stream and takes its own rows of each batch. The sum over processes is the whole
batch's, so they train the same SAE as one process would. B batch, D d_vit, W processes, n any number.
"""

import collections.abc
import contextlib
import dataclasses
import datetime
import os
import pathlib
import typing as tp

import beartype
import torch
from torch import Tensor

from saev import errors, helpers


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class World:
    """The processes that train together. `rank` is this process's number."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def share(self, x_BD: Tensor) -> Tensor:
        """This process's rows of a batch."""
        n = len(x_BD) // self.size
        return x_BD[self.rank * n : (self.rank + 1) * n]

    def all_values(self, value_n: Tensor) -> Tensor:
        """The values of all processes, concatenated in rank order. n may differ between processes."""
        if self.size == 1:
            return value_n
        n_W = [torch.zeros(1, dtype=torch.int64, device=value_n.device) for _ in range(self.size)]
        torch.distributed.all_gather(n_W, torch.tensor([len(value_n)], device=value_n.device))
        lengths = [int(n) for n in n_W]
        padded = torch.nn.functional.pad(value_n, (0, max(lengths) - len(value_n)))
        out_W = [torch.empty_like(padded) for _ in range(self.size)]
        torch.distributed.all_gather(out_W, padded)
        return torch.cat([out[:n] for out, n in zip(out_W, lengths, strict=True)])

    def mean(self, *tensors: Tensor) -> None:
        """Replaces each tensor by its mean over the processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                # The encoder's gradient is contiguous only when transposed.
                flat = tensor if tensor.is_contiguous() else tensor.T
                torch.distributed.all_reduce(flat)
                flat /= self.size

    def any(self, flags: Tensor) -> Tensor:
        """Element-wise `or` over processes."""
        if self.size == 1:
            return flags
        counts = flags.to(torch.uint8)
        torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX)
        return counts.bool()

    @contextlib.contextmanager
    def locked(
        self, fpaths: collections.abc.Iterable[pathlib.Path], what: str
    ) -> collections.abc.Generator[None]:
        """Holds lock files (`helpers.locked`). The first process takes them while the others wait."""
        room: tp.Any = None
        if self.size > 1:
            month = datetime.timedelta(days=30)
            room = torch.distributed.new_group(timeout=month, backend="gloo")
        with contextlib.ExitStack() as locks:
            # sorted, so that two commands cannot wait for each other
            for fpath in sorted(fpaths) if self.is_first else []:
                locks.enter_context(helpers.locked(fpath, what))
            if room is not None:
                torch.distributed.barrier(room)
            yield


@contextlib.contextmanager
def joined(n_processes: int, device: torch.device) -> collections.abc.Generator[World]:
    """This process's world, from torchrun's WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: the number of processes differs from --data-parallel.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size != n_processes:
        raise errors.UserError(
            f"--data-parallel {n_processes}: {size} process(es) were started. Use `torchrun --nproc-per-node "
            f"{n_processes} train.py ...`, or leave torchrun out: train.py then starts them."
        )
    if size == 1:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30)
    )
    try:
        yield World(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()
