"""Build, load and call the fused CPU kernel of the Fourier group convolution (``gfourier.c``),
where a C compiler is there.

The source is compiled once for this processor, into the user's cache folder (``$XDG_CACHE_HOME`` or
``~/.cache``), by ``$CC``, ``cc`` or ``gcc``. Without a working compiler, or on another system than
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

SOURCE = Path(__file__).with_suffix(".c").with_name("gfourier.c")
FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-fopenmp"]


class Layer(ctypes.Structure):
    """The C struct of the same name."""

    _fields_ = [
        *(
            (name, ctypes.c_int)
            for name in ("order", "lifting", "n", "channels", "fields", "taps", "height", "width")
        ),
        *(
            (name, ctypes.c_int)
            for name in (
                "out_height",
                "out_width",
                "stride",
                "padding",
                "kernel_size",
                "threads",
                "parts",
            )
        ),
        ("offsets", ctypes.c_void_p),
    ]


def build() -> Path:
    """Compile ``gfourier.c`` unless this processor's library is in the cache; return the library's
    path.

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
    cpuinfo = Path("/proc/cpuinfo")
    # One library a source, compiler and processor: a home folder may be shared by different
    # machines.
    processor = (
        {
            line
            for line in cpuinfo.read_text(encoding="utf-8").splitlines()
            if line.startswith(("model name", "flags", "Features"))
        }
        if cpuinfo.exists()
        else ""
    )
    key = "\0".join(
        [
            SOURCE.read_text(encoding="utf-8"),
            compiler,
            *FLAGS,
            platform.machine(),
            *sorted(processor),
        ]
    )
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "equivariant-cxr-clustering"
    )
    library = folder / f"gfourier-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, linked = Path(scratch) / "gfourier.o", Path(scratch) / library.name
        # Linked without -fopenmp, so that OpenMP is the one PyTorch has loaded: two thread pools
        # would wait for each other.
        commands = [
            [compiler, *FLAGS, "-march=native", "-c", str(SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ]
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise OSError(
                    f"{command[0]} failed: {(done.stderr.strip() or 'no message').splitlines()[0]}"
                )
        os.replace(linked, library)
    return library


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The compiled kernel, or None; the reason is logged, once."""
    try:
        library = ctypes.CDLL(str(build()))
    except OSError as error:
        logger.info("group convolutions use PyTorch operations, not the compiled kernel: %s", error)
        return None
    for function in (library.forward, library.backward):
        function.argtypes = [
            ctypes.POINTER(Layer),
            *[ctypes.c_void_p] * (4 if function is library.forward else 5),
        ]
    return library


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the compiled kernel can be used; the first call builds it (about two seconds)."""
    return kernel() is not None


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _call(function, layer: Layer, *tensors: Tensor | None) -> None:
    layer.threads = torch.get_num_threads()
    if function(ctypes.byref(layer), *map(_address, tensors)):
        raise MemoryError("the group convolution could not allocate its scratch memory")


def _layer(
    x: Tensor,
    filters: Tensor,
    offsets: Tensor,
    out_size: tuple[int, int],
    stride: int,
    padding: int,
    kernel_size: int,
) -> Layer:
    taps, order = offsets.shape[:2]
    lifting = x.ndim == 4
    sizes = (
        order,
        lifting,
        len(x),
        x.shape[1],
        filters.shape[2],
        taps,
        *x.shape[-2:],
        *out_size,
        stride,
        padding,
        kernel_size,
        1,
        1,
    )
    return Layer(*sizes, offsets.data_ptr())


def forward(
    library: ctypes.CDLL,
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    y: Tensor,
    offsets: Tensor,
    *geometry: int,
) -> None:
    """Write the convolution into `y`; arguments as in `lib.fast.gfourier.correlate`, float32,
    contiguous, on the CPU.
    """
    _call(
        library.forward, _layer(x, filters, offsets, y.shape[-2:], *geometry), x, filters, bias, y
    )


def backward(
    library: ctypes.CDLL,
    x: Tensor,
    filters: Tensor,
    dy: Tensor,
    dx: Tensor,
    dfilters: Tensor,
    offsets: Tensor,
    *geometry: int,
) -> None:
    """Write the gradients into `dx` and `dfilters`, each skipped where it has no elements."""
    layer = _layer(x, filters, offsets, dy.shape[-2:], *geometry)
    fields, lanes = filters.shape[2], library.lanes()
    # Threads share out the channels; where these are too few, also the blocks of pixels, each part
    # with its own sum.
    layer.parts = -(-torch.get_num_threads() // x.shape[1])
    partial = (
        x.new_zeros(layer.parts, *filters.shape[:2], -(-fields // lanes) * lanes)
        if dfilters.numel()
        else None
    )
    _call(library.backward, layer, x, filters, dy, dx if dx.numel() else None, partial)
    if partial is not None:
        torch.sum(partial[..., :fields], 0, out=dfilters)
