"""Build, load and call the fused CPU kernel of the Fourier group convolution (``gfourier.c``).

A C compiler (``$CC``, ``cc`` or ``gcc``) builds it once for this processor, into the user's cache
folder (``$XDG_CACHE_HOME`` or ``~/.cache``). Without a working compiler, or on another system than
Linux, `kernel` returns None and `lib.fast.gfourier` computes the same with PyTorch's operations.
"""

from __future__ import annotations

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
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("gfourier.c")
FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-march=native"]
SIZES = """order lifting n channels fields taps height width out_height out_width stride padding
kernel_size threads parts"""


class Layer(ctypes.Structure):
    """The C struct of the same name."""

    _fields_ = [*((name, ctypes.c_int) for name in SIZES.split()), ("offsets", ctypes.c_void_p)]


def build() -> Path:
    """Compile ``gfourier.c`` unless this processor's library is in the cache; return its path.

    Raises
    ------
    OSError
        If there is no compiler, or it fails; the message holds the first line it wrote.
    """
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


def _call(function, layer: Layer, *tensors: Tensor | None) -> None:
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
    if function(ctypes.byref(layer), *pointers):
        raise MemoryError("the group convolution could not allocate its scratch memory")


def _layer(
    x: Tensor, filters: Tensor, y: Tensor, offsets: Tensor, *geometry: int, parts: int = 1
) -> Layer:
    taps, order = offsets.shape[:2]
    sizes = (order, x.ndim == 4, len(x), x.shape[1], filters.shape[2], taps, *x.shape[-2:])
    rest = (*y.shape[-2:], *geometry, torch.get_num_threads(), parts)
    return Layer(*sizes, *rest, offsets.data_ptr())


def forward(
    library: ctypes.CDLL,
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    y: Tensor,
    offsets: Tensor,
    *geometry: int,
) -> None:
    """Write the convolution into `y`: float32, contiguous, on the CPU.

    `filters` (E, C * T, N) and `offsets` are those of `lib.fast.gfourier`; `geometry` is stride,
    padding, kernel_size.
    """
    _call(library.forward, _layer(x, filters, y, offsets, *geometry), x, filters, bias, y)


def backward(
    library: ctypes.CDLL,
    x: Tensor,
    filters: Tensor,
    dy: Tensor,
    dx: Tensor | None,
    dfilters: Tensor | None,
    offsets: Tensor,
    *geometry: int,
) -> None:
    """Write the gradients into `dx` and `dfilters`, unless None."""
    fields, lanes = filters.shape[2], library.lanes()
    # Threads share out the channels. If these are too few, they also share out the blocks of
    # pixels, each part with its own sum.
    parts = -(-torch.get_num_threads() // x.shape[1])
    layer = _layer(x, filters, dy, offsets, *geometry, parts=parts)
    partial = None
    if dfilters is not None:
        partial = x.new_zeros(parts, *filters.shape[:2], -(-fields // lanes) * lanes)
    _call(library.backward, layer, x, filters, dy, dx, partial)
    if partial is not None:
        torch.sum(partial[..., :fields], 0, out=dfilters)
