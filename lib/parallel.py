"""Several processes that train one run together, each on its own device, and what the loop asks of
them (`World`).

They are started by PyTorch's own launcher, ``torchrun``, on one machine or many, and talk through
NCCL (GPUs) or gloo (CPUs). A single process is a `World` of one in which every exchange does
nothing, so the loop reads the same in both cases.

Every process holds the whole network and takes a share of each batch. What depends on the whole
batch is made to see the whole batch: gradients are summed, batch norm takes its mean and variance
over all shares, dropout draws the whole batch's mask and keeps its own rows. So a step on two
processes is, to rounding, the step of one process on the same batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

TIMEOUT = 600.0  # seconds; rank 0 writes the features of a large set while the others wait
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def resolve_device(device: str) -> torch.device:
    """``"auto"`` is a CUDA GPU if there is one, else the CPU. RuntimeError if a GPU is asked for
    and missing.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[device]:
        raise RuntimeError(f"device {device!r} is not available here; use --device cpu or auto")
    return torch.device(device)


class World:
    """The processes of a run, seen from one of them.

    Attributes
    ----------
    rank : int
        Number of this process, 0 to `size` - 1. Rank 0 (`main`) writes the files.
    size : int
    device : torch.device
        Where this process computes.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str | torch.device = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self._batch: tuple[int, slice] | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This process's contiguous share of n rows; shares differ by one row at most."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def share_of_batch(self, n: int) -> slice:
        """`share`, remembered for the dropout masks of the batch."""
        self._batch = (n, self.share(n))
        return self._batch[1]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, in place, on the device where they are."""
        if self.size > 1:
            moved = values.to(self.device)  # NCCL takes a GPU's tensors only
            dist.all_reduce(moved)
            if moved is not values:
                values.copy_(moved)
        return values

    def all_rows(self, mine: Tensor, n: int) -> Tensor:
        """Rows (n, ...) of which each process holds its `share`: all of them, on every process, in
        their order.
        """
        if self.size == 1:
            return mine
        everyone = torch.zeros((n, *mine.shape[1:]), dtype=mine.dtype, device=self.device)
        everyone[self.share(n)] = mine.to(self.device)
        return self.sum(everyone).to(mine.device)

    def collect(self, mine: np.ndarray, n: int, rows: int = 8192) -> np.ndarray | None:
        """As `all_rows`, for arrays too large to be everywhere: all rows on rank 0, None elsewhere."""
        if self.size == 1:
            return mine
        if not self.main:
            for start in range(0, len(mine), rows):
                dist.send(torch.from_numpy(mine[start : start + rows]).to(self.device), 0)
            return None
        everyone = np.empty((n, *mine.shape[1:]), mine.dtype)
        everyone[self.share(n)] = mine
        for rank in range(1, self.size):
            theirs = World(rank, self.size).share(n)
            for start in range(theirs.start, theirs.stop, rows):
                block = everyone[start : min(start + rows, theirs.stop)]
                received = torch.from_numpy(block).to(self.device)
                dist.recv(received, rank)
                block[:] = received.cpu().numpy()
        return everyone

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes, in one exchange."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.sum(torch.cat([g.flatten() for g in gradients]))
        for gradient, summed in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(summed.view_as(gradient))

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.sum(torch.zeros(1, device=self.device))

    def check_equal(self, value: int, what: str) -> None:
        """RuntimeError on every process unless all of them have the same `value`."""
        values = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        values[self.rank] = value
        found = self.sum(values).tolist()
        if len(set(found)) > 1:
            raise RuntimeError(
                f"the processes do not agree on {what} ({found}): the run folder must be on a disk that all of them see"
            )


ALONE = World()


@contextmanager
def join(device: str, timeout: float = TIMEOUT) -> Iterator[World]:
    """The world this process belongs to: that of ``torchrun`` if it was started by it, else itself
    alone.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda", "mps"}
        With CUDA, the process takes the GPU of its local rank.
    timeout : float
        Seconds after which a process that waits for another gives up with an error.

    Raises
    ------
    RuntimeError
        The device is not there, there are fewer GPUs than processes on this machine, or several
        processes ask for MPS.
    """
    found = resolve_device(device)
    if dist.is_available() and dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), _own(found))
        return
    size = int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in LAUNCHED) else 1
    if size == 1:
        yield World(device=found)
        return
    if found.type == "mps":
        raise RuntimeError(
            "several processes cannot share an MPS device; use --device cpu, or one process"
        )
    found = _own(found)
    options: dict[str, Any] = {"device_id": found} if found.type == "cuda" else {}
    dist.init_process_group(
        "nccl" if found.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout), **options
    )
    yield World(dist.get_rank(), size, found)
    # Not in a `finally`: after an error the others may be waiting for us, and taking leave would
    # wait for them. The launcher ends all.
    dist.destroy_process_group()


def _own(device: torch.device) -> torch.device:
    """The GPU of this process among those of its machine."""
    if device.type != "cuda":
        return device
    local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= there:
        raise RuntimeError(
            f"process {local} of this machine has no GPU of its own: {there} are here; start at most {there} processes"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def share_layers(model: nn.Module, world: World) -> nn.Module:
    """Make the layers of `model` that look at a whole batch look at the whole batch of all
    processes.

    Batch norm becomes ``torch.nn.SyncBatchNorm`` on GPUs and `SharedBatchNorm` on CPUs, where
    PyTorch has none; dropout becomes `SharedDropout`. Parameters stay the same objects and a
    state_dict keeps its names, so checkpoints fit any number of processes. A world of one gets its
    model back unchanged."""
    if world.size == 1:
        return model
    if world.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, child in model.named_children():
        if isinstance(child, nn.Dropout):
            setattr(model, name, SharedDropout(child.p, world).train(child.training))
        elif isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
            setattr(model, name, SharedBatchNorm(child, world).train(child.training))
        else:
            setattr(model, name, share_layers(child, world))
    return model


class _Sum(torch.autograd.Function):
    """Sum over all processes. A share enters every process's result, so its gradient is the sum of
    theirs.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.sum(values.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.world.sum(gradient.contiguous().clone()), None


class SharedBatchNorm(_BatchNorm):
    """Batch norm over the shares of all processes, with the parameters and buffers of `norm`.

    Mean first, then squares about it: sums of squares about zero would lose digits. Shares may
    differ in length."""

    def __init__(self, norm: _BatchNorm, world: World) -> None:
        super().__init__(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
        self.world = world
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            setattr(self, name, buffer)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"batch norm expects maps of shape (N, C, ...), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        count = float(self.world.sum(torch.tensor(x.numel() / x.shape[1], dtype=torch.float64)))
        mean = _Sum.apply(x.sum(axes), self.world) / count
        centred = x - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes), self.world) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                rate = (
                    1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                )
                self.running_mean.lerp_(mean, rate)
                self.running_var.lerp_(variance * (count / (count - 1)), rate)
        y = centred * (variance + self.eps).rsqrt().view(shape)
        return y * self.weight.view(shape) + self.bias.view(shape) if self.affine else y


class SharedDropout(nn.Module):
    """Dropout whose mask is drawn for the whole batch, on every process alike; each keeps its own
    rows.

    On a CPU it drops what ``torch.nn.Dropout`` drops in one process with the same seed; on a GPU
    other entries, as often."""

    def __init__(self, p: float, world: World) -> None:
        super().__init__()
        self.p, self.world = p, world

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        total, rows = self.world._batch
        mask = torch.empty((total, *x.shape[1:]), dtype=x.dtype, device=x.device).bernoulli_(
            1 - self.p
        )
        return x * mask[rows].div_(1 - self.p)
