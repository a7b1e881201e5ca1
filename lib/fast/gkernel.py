"""Build, load and call the compiled CPU kernel (``gfourier.c``): float32, contiguous arrays.

A C compiler (``$CC``, ``cc`` or ``gcc``) builds it once for this processor, into the user's cache
folder (``$XDG_CACHE_HOME`` or ``~/.cache``). Without a working compiler, or on another system than
Linux, `kernel` returns None and PyTorch's operations compute the same."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib.fast.gfourier import bilinear_algorithm, taps

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("gfourier.c")
FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-march=native"]
Norm = tuple[Tensor, Tensor, Tensor, float]  # gamma, beta, statistics (as of `forward`), eps


def _fields(**kinds: str) -> list[tuple[str, type]]:
    return [(name, getattr(ctypes, kind)) for kind in kinds for name in kinds[kind].split()]


class Layer(ctypes.Structure):
    """The C struct of the same name."""

    _ints = "order lifting n channels fields taps height width out_height out_width stride padding"
    _fields_ = _fields(c_int=f"{_ints} kernel_size threads", c_long="next_field next_channel")
    _fields_ += _fields(c_void_p="offsets cells shares factors")


class Maps(ctypes.Structure):
    """The C struct of the same name."""

    _fields_ = _fields(c_int="n fields order height width threads", c_double="eps")
    _fields_ += _fields(c_void_p="gamma beta statistics")


def build() -> Path:
    """Compile ``gfourier.c`` unless this processor's library is in the cache; return its path.
    OSError without a compiler, or if it fails; the message holds the first line it wrote."""
    if sys.platform != "linux":
        raise OSError(f"the kernel is built on Linux only, this is {sys.platform}")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise OSError("no C compiler found (cc or gcc)")
    # One library per source, compiler and processor: machines may share a home folder.
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    processor = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    key = [SOURCE.read_text(encoding="utf-8"), compiler, *FLAGS, platform.machine()]
    digest = hashlib.sha256("\0".join([*key, *sorted(processor)]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    library = cache / "equivariant-cxr-clustering" / f"gfourier-{digest}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        compiled, linked = Path(scratch) / "gfourier.o", Path(scratch) / library.name
        # Linked without -fopenmp, so that OpenMP is the one PyTorch has loaded: two thread pools
        # would wait for each other.
        for command in (
            [compiler, *FLAGS, "-c", str(SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = (done.stderr.strip() or "no message").splitlines()[0]
                raise OSError(f"{command[0]} failed: {said}")
        os.replace(linked, library)
    return library


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The compiled kernel, or None; the reason is logged, once."""
    try:
        return ctypes.CDLL(str(build()))
    except OSError as error:
        logger.info("group convolutions use PyTorch operations, not the compiled kernel: %s", error)
        return None


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the compiled kernel can be used; the first call builds it (about two seconds)."""
    return kernel() is not None


def _address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _call(name: str, sizes: ctypes.Structure, *tensors: Tensor | None) -> None:
    if getattr(kernel(), name)(ctypes.byref(sizes), *map(_address, tensors)):
        raise MemoryError("the group convolution could not allocate its scratch memory")


@functools.cache
def _tables(order: int, kernel_size: int, lifting: bool, transposed: bool) -> tuple:
    """The arrays that a `Layer` points to, and their addresses."""
    offsets, cells, shares = taps(order, kernel_size, lifting, transposed)
    tables = [np.ascontiguousarray(table, np.int32) for table in (offsets, cells)]
    tables += [np.ascontiguousarray(t, np.float32) for t in (shares, bilinear_algorithm(order)[1])]
    return tables, [table.ctypes.data for table in tables]


def _layer(x: Tensor, weight: Tensor, y: Tensor, stride, padding, transposed=False) -> Layer:
    order, kernel_size, lifting = y.shape[2], weight.shape[-1], x.ndim == 4
    tables, addresses = _tables(order, kernel_size, lifting, transposed)
    field, channel, *_ = weight.stride()
    sizes = (order, lifting, len(x), x.shape[1], y.shape[1], len(tables[0]), *x.shape[-2:])
    geometry = (*y.shape[-2:], stride, padding, kernel_size, torch.get_num_threads())
    steps = (channel, field) if transposed else (field, channel)
    return Layer(*sizes, *geometry, *steps, *addresses)


def forward(x, weight, bias, y, stride: int, padding: int, statistics=None) -> None:
    """Write the convolution into `y` and, if wanted, mean, variance and unbiased variance of the
    fields of y into `statistics`, float64 (3, fields). All but the geometry are tensors."""
    _call("forward", _layer(x, weight, y, stride, padding), x, weight, bias, y, statistics, None)


def forward_pool(x, weight, bias, out, size: Sequence[int], stride: int, padding: int) -> None:
    """Write the blur pool of the ReLU of the convolution into `out`. `size` is that of the maps
    between them, (n, N, S, H', W'), which are kept of one image per thread only."""
    layer = _layer(x, weight, torch.empty(size, device="meta"), stride, padding)
    _call("forward", layer, x, weight, bias, None, None, out)


def input_gradient(dy: Tensor, weight: Tensor, dx: Tensor, padding: int) -> None:
    """Write the gradient of the input of a layer of stride 1 between group maps into `dx`."""
    layer = _layer(dy, weight, dx, 1, weight.shape[-1] - 1 - padding, transposed=True)
    _call("forward", layer, dy, weight, None, dx, None, None)


def weight_gradient(x: Tensor, dy: Tensor, dweight: Tensor, stride: int, padding: int) -> None:
    """Write the gradient of the weight into `dweight`."""
    _call("weight_gradient", _layer(x, dweight, dy, stride, padding), x, dy, dweight)


def _maps(y: Tensor, norm: Norm | None) -> Maps:
    gamma, beta, statistics, eps = norm or (None, None, None, 0)
    return Maps(*y.shape, torch.get_num_threads(), eps, *map(_address, (gamma, beta, statistics)))


def pool(y: Tensor, out: Tensor, norm: Norm | None = None) -> None:
    """Write the blur pool of ``relu(norm(y))`` into `out`."""
    _call("pool", _maps(y, norm), y, out)


def pool_gradient(y: Tensor, dout: Tensor, dy: Tensor | None, *sums: Tensor, norm=None) -> None:
    """Write the gradient of `y` through `pool` and the statistics into `dy`.

    `sums` are a table (3, fields), float64, and the gradients of gamma and beta (2, fields). A call
    for all images with `dy` None writes them; one for all or some images needs the table."""
    table, of_norm = sums or (None, None)
    _call("pool_gradient", _maps(y, norm), y, dout, table, of_norm, dy)
