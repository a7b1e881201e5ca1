"""Several processes that train one run together, child processes, and memory.

``torchrun`` starts the processes of a run; they talk through NCCL (GPUs) or gloo (CPUs). Each holds
the whole network and takes its share of the images: gradients are summed, batch norm uses the
statistics of the whole batch, and rank 0 clusters the features of all. A single process is a
`World` of one in which every exchange does nothing, so the loop reads the same in both cases."""

import contextlib
import ctypes
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import joblib
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from lib.paths import ROOT


def resolve_device(device: str) -> torch.device:
    """``"auto"`` is a CUDA GPU if there is one, else the CPU; RuntimeError if one is absent."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device 'cuda' is not available here; use --device cpu or auto")
    return torch.device(device)


class World:
    """The `size` processes of a run, seen from one; that of rank 0, `main`, writes the files."""

    def __init__(self, rank: int = 0, size: int = 1, device: str | torch.device = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.main = rank == 0

    def share(self, n: int) -> slice:
        """This process's contiguous share of n rows; shares differ by at most one row."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, in place."""
        if self.size > 1:
            there = values.to(self.device)  # NCCL takes tensors on a GPU only
            dist.all_reduce(there)
            values.copy_(there)
        return values

    def gather(self, mine: np.ndarray | Tensor, n: int) -> np.ndarray | Tensor | None:
        """All rows (n, D) on rank 0, None on the others; `mine` is this process's `share`."""
        if self.size == 1:
            return mine
        mine = torch.as_tensor(mine).to(self.device)
        if not self.main:
            dist.send(mine.contiguous(), 0)
            return None
        rows = mine.new_empty(n, *mine.shape[1:])
        rows[self.share(n)] = mine
        for rank in range(1, self.size):
            dist.recv(rows[World(rank, self.size).share(n)], rank)
        return rows if self.device.type == "cuda" else rows.numpy()

    def broadcast(self, values: np.ndarray | None, n: int) -> np.ndarray:
        """Rank 0's integers (n,) on every process."""
        if self.size == 1:
            return values
        sent = torch.as_tensor(values if self.main else np.zeros(n, np.int64)).to(self.device)
        dist.broadcast(sent, 0)
        return sent.cpu().numpy()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes, in one exchange."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.sum(torch.cat([g.flatten() for g in gradients]))
        parts = flat.split([g.numel() for g in gradients])
        for gradient, summed in zip(gradients, parts, strict=True):
            gradient.copy_(summed.view_as(gradient))

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.sum(torch.zeros(1, device=self.device))


ALONE = World()


@contextlib.contextmanager
def join(device: str, timeout: float = 600.0) -> Iterator[World]:
    """The world this process belongs to: that of ``torchrun``, else itself alone.

    A process that waits for another one fails after `timeout` seconds. RuntimeError if the device
    is absent, or if there are fewer GPUs than processes on this machine: each takes one."""
    found = resolve_device(device)
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield World(device=found)
        return
    backend, gpu = "gloo", None
    if found.type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise RuntimeError(f"process {local} has no GPU of its own: --nproc at most {there}")
        torch.cuda.set_device(local)
        backend, gpu = "nccl", torch.device("cuda", local)
        found = gpu
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout), device_id=gpu)
    yield World(dist.get_rank(), dist.get_world_size(), found)
    # Not in a `finally`: after an error the others may be inside an exchange, and this would block.
    dist.destroy_process_group()


def share_batch_norm(model: nn.Module, world: World) -> nn.Module:
    """Let the batch norms of `model` use the statistics of all processes' shares of a batch: by
    ``torch.nn.SyncBatchNorm`` on GPUs, `SharedBatchNorm` on CPUs. A state_dict keeps its names."""
    if world.size == 1:
        return model
    if world.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, child in model.named_children():
        convert = SharedBatchNorm if isinstance(child, _BatchNorm) else share_batch_norm
        setattr(model, name, convert(child, world))
    return model


class SharedBatchNorm(_BatchNorm):
    """Batch norm over all processes on CPUs, with the parameters and buffers of `norm`."""

    def __init__(self, norm: _BatchNorm, world: World) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.world = world
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(self, name, buffer)

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        count = float(self.world.sum(torch.tensor(x.numel() / x.shape[1], dtype=torch.float64)))
        # sums enter every process's result, so all_reduce sums their gradients, too
        mean = all_reduce(x.sum(axes)) / count
        centred = x - mean.view(shape)  # squares about the mean: about zero they lose digits
        variance = all_reduce(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, rate)
            self.running_var.lerp_(variance * (count / (count - 1)), rate)
        y = centred * (variance + self.eps).rsqrt().view(shape)
        return y * self.weight.view(shape) + self.bias.view(shape) if self.affine else y


class ProcessFailed(RuntimeError):
    """A child process ended with exit status `status`; `tail` holds the last lines it wrote."""

    def __init__(self, status: int, tail: str) -> None:
        super().__init__(f"a process ended with status {status}\n{tail}")
        self.status, self.tail = status, tail


def cores() -> int:
    """CPU cores that this process may use: its affinity and its container's limit count."""
    return joblib.cpu_count()


def run_process(command: Sequence[str], *, env=None, log: Path | None = None, echo=False) -> None:
    """Run `command` in the project's folder, with the variables `env` besides this process's; it
    ends if this call is interrupted. ProcessFailed if its status is not 0.

    All that it prints goes to the file `log`, and to stderr with `echo`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONUTF8": "1", **(env or {})}
    tail, text = deque(maxlen=60), {"encoding": "utf-8", "errors": "replace"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with (
        open(log or os.devnull, "w", encoding="utf-8") as file,
        subprocess.Popen(command, cwd=ROOT, env=variables, **pipes, **text) as process,
    ):
        try:
            for line in process.stdout:
                file.write(line)
                tail.append(line)
                if echo:
                    sys.stderr.write(line)
            process.wait()
        finally:  # which does nothing to a process that has ended
            process.terminate()  # a launcher ends its workers, too
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
    if process.returncode:
        raise ProcessFailed(process.returncode, "".join(tail))


def run_processes(jobs: Mapping, at_once: int, log_of: Callable, on_end: Callable) -> None:
    """`run_process` for each of `jobs`, commands by name, `at_once` at a time; cores are shared out
    evenly. Output goes to the file ``log_of(name)``. A job that fails does not stop the others:
    ``on_end(name, error)`` gets its error, else None."""
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // at_once))}

    def one(name: str) -> None:
        error = None
        try:
            run_process(jobs[name], env=threads, log=log_of(name))
        except ProcessFailed as failed:
            error = failed
        on_end(name, error)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, jobs))  # raises what `on_end` raises, and begins no other job then


def memory(groups: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int:
    """Bytes that this process may use: the machine's, or fewer if JupyterHub (``MEM_LIMIT``), a
    container or a control group says so. Folder of the groups, file that names this process's."""
    said = [os.environ.get("MEM_LIMIT", "")]
    if os.path.exists(own):
        for line in Path(own).read_text(encoding="utf-8").splitlines():
            _, kind, path = line.split(":", 2)  # version 2 names no kind
            name = "memory.limit_in_bytes" if kind else "memory.max"
            places = [Path(f"{groups}/{kind}{p}/{name}") for p in (path, *Path(path).parents)]
            said += [place.read_text("ascii").strip() for place in places if place.is_file()]
    if hasattr(os, "sysconf"):  # not on Windows
        said.append(str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    return min((int(text) for text in said if text.isdecimal() and int(text) > 0), default=2**40)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Context in which glibc keeps the memory of freed arrays for the next ones.

    By default it returns large arrays to the system and gets them again page by page, zeroed, at
    every step of training. Arrays above 640 MB are still returned, since kept memory fragments.
    Nothing happens below 4 GB of memory or without glibc."""
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        yield
        return
    if memory() >= 4 * 2**30:
        mallopt(-3, 640 << 20)  # M_MMAP_THRESHOLD of glibc's malloc.h
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    try:
        yield
    finally:
        trim(0)
