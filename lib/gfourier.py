"""Exact group convolution through the Fourier transform of the point group: 5.8 (p4m) or 3.2 (p4) times fewer multiplications.

With t a filter tap and u an element of the point group (order S, matrices A(u)), write ``P[t](x, u) = f(x + A(u) t, u)`` for the patches
and ``phi[t](h) = psi(h, A(h) t)`` for the filter. Eq. 10-11 of Cohen and Welling (2016) become, at each pixel x and tap t, a correlation
over a group of S elements::

    y(x, g) = sum_t sum_u P[t](x, u) phi[t](g^-1 u)

which the group's Fourier transform block-diagonalises: with a real irreducible representation rho and ``P^(rho) = sum_u P(u) rho(u)``,
``y^(rho) = P^(rho) phi^(rho)^T``. D4 has four irreps of dimension 1 and one of dimension 2, whose 2 x 2 product takes Strassen's (1969)
seven multiplications: 4 + 7 = 11 products of channel matrices in place of 64. C4 has two of dimension 1 and one complex pair, whose product
takes Gauss's three: 2 + 3 = 5 in place of 16. Written out, ``y = output^T ((filter phi) * (input P))`` with three small constant matrices
and an entry-wise product; the transforms are additions. For a lifting layer one tap stands for its orbit, with
``phi[t](h) = psi(A(h) t) / |stabilizer of t|``: a 5 x 5 filter has 6 orbits under D4, in place of 25 taps.

The block form is textbook representation theory (Serre 1977, *Linear Representations of Finite Groups*, sec. 6.2); for mirrors alone,
Bokman, Nordstrom and Kahl (2025), *Flopping for FLOPs*, save by splitting features by parity likewise.

The patches are k*k times the input, so they exist for a few images (in the compiled kernel: a few rows) at a time and are made again in
the backward pass. Results differ from the dense convolution's by rounding only.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lib import gkernel
from lib.groups import element_matrices

CHUNK_BYTES = 32 << 20  # size of the patches held at a time by the PyTorch path


# Strassen's and Gauss's algorithms, a row a multiplication: factors of the patches' entries, of the filters' entries, and what the product
# adds to which entry of the output. 2 x 2 matrices are written (00, 01, 10, 11), complex numbers a + b i (a, b).
STRASSEN = (
    [[0.5, 0, 0, 0.5], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0], [-1, 0, 1, 0], [0, 1, 0, -1]],
    [[2, 0, 0, 2], [1, 0, 0, 0], [0, 1, 0, -1], [-1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]],
    [[1, 0, 0, 1], [0, 0, 1, -1], [0, 1, 0, 1], [1, 0, 1, 0], [-1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]],
)
GAUSS = ([[1, 1], [1, 0], [0, -1]], [[1, 0], [-1, 1], [1, 1]], [[1, 1], [0, 1], [1, 0]])
PRODUCTS = {4: 5, 8: 11}  # E, by the order of the group


@functools.cache
def bilinear_algorithm(order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices (input, filter, output) of shape (E, S) with ``sum_u P(u) phi(g^-1 u) == output.T @ ((filter @ phi) * (input @ P))``.

    E = 11 for p4m (S = order = 8), 5 for p4 (S = 4).
    """
    m, r = np.divmod(np.arange(order), 4)
    signs = (-1.0) ** np.stack([0 * m, m, r, m + r] if order == 8 else [0 * r, r])  # irreps of dimension 1
    rho = element_matrices(order)
    # y^ = P^ phi^^T: the filter's matrix is transposed. p4's matrices are rotations, P^ = a + b i with (a, b) their first row.
    entries = (rho if order == 8 else rho[:, 0]).reshape(order, -1).T
    moved = (rho.transpose(0, 2, 1) if order == 8 else rho[:, :, 0]).reshape(order, -1).T
    left, right, out = map(np.array, STRASSEN if order == 8 else GAUSS)
    return (
        np.concatenate([signs, left @ entries]),
        np.concatenate([signs, 2 * right @ moved]) / order,  # the inverse transform's factor, dimension / S
        np.concatenate([signs, out @ entries]),
    )


@functools.cache
def filter_transform(order: int, kernel_size: int, lifting: bool) -> tuple[Tensor, Tensor]:
    """The taps of a layer and the transform of its filters.

    Parameters
    ----------
    order : int
        Order of the point group, S.
    kernel_size : int
        Odd side k of the filters.
    lifting : bool
        True for filters on the plane, one tap an orbit; False for filters on the group, every tap.

    Returns
    -------
    offsets : Tensor, shape (T, S, 2), int32
        Row and column, 0 to k - 1, of the tap A(u) t in the window.
    transform : Tensor, shape (E * T, S_in * k * k), float64
        ``transform @ psi.flatten(-3)`` are the entries (e, t) of the transformed phi[t].
    """
    half, matrices = kernel_size // 2, element_matrices(order)
    synthesis = bilinear_algorithm(order)[1]
    grid = np.stack(np.meshgrid(*[np.arange(-half, half + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)
    orbits = np.einsum("uij,tj->tui", matrices, grid) + half  # (k * k, S, 2)
    cells = orbits @ [kernel_size, 1]  # (k * k, S)
    if lifting:
        first = np.arange(len(grid)) == cells.min(1)
        orbits, cells = orbits[first], cells[first]
        share = np.array([len(set(row)) / order for row in cells])
    else:
        cells = cells + np.arange(order) * kernel_size**2
        share = np.ones(len(cells))
    transform = np.zeros((len(synthesis), len(cells), (1 if lifting else order) * kernel_size**2))
    for t, row in enumerate(cells):
        for h, cell in enumerate(row):
            transform[:, t, cell] += synthesis[:, h] * share[t]
    return torch.from_numpy(orbits.astype(np.int32)), torch.from_numpy(transform).flatten(0, 1)


def out_size(x: Tensor, stride: int, padding: int, kernel_size: int) -> tuple[int, int]:
    """Height and width of the output, as in `torch.nn.Conv2d`."""
    height, width = ((size + 2 * padding - kernel_size) // stride + 1 for size in x.shape[-2:])
    return height, width


class _Patches:
    """Transformed patches of a chunk of images, and the transpose of that map; the PyTorch path."""

    def __init__(self, x: Tensor, order: int, stride: int, padding: int, kernel_size: int) -> None:
        self.shape, self.padding, self.lifting = x.shape, padding, x.ndim == 4
        self.size = out_size(x, stride, padding, kernel_size)
        self.input, _, self.output = (torch.from_numpy(matrix).to(x) for matrix in bilinear_algorithm(order))
        # Where in the padded maps, (channels, images, S, rows, columns), the patch P[t](., u) lies.
        self.slices = [
            [
                (
                    ...,
                    0 if self.lifting else u,
                    *(slice(at, at + (n - 1) * stride + 1, stride) for at, n in zip(corner, self.size, strict=True)),
                )
                for u, corner in enumerate(orbit)
            ]
            for orbit in filter_transform(order, kernel_size, self.lifting)[0].tolist()
        ]

    def _maps(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(2) if self.lifting else x).transpose(0, 1)

    def gather(self, x: Tensor) -> Tensor:
        """Transformed P[t] at each pixel, shape (E, channels * T, n * pixels), of images x (n, ...)."""
        maps = F.pad(self._maps(x), [self.padding] * 4)
        patches = x.new_empty(self.input.shape[1], len(maps), len(self.slices), len(x), *self.size)
        for t, orbit in enumerate(self.slices):
            for u, where in enumerate(orbit):
                patches[u, :, t] = maps[where]
        return (self.input @ patches.flatten(1)).view(len(self.input), len(maps) * len(self.slices), -1)

    def scatter(self, entries: Tensor, n: int) -> Tensor:
        """Transpose of `gather`, shape (n, ...)."""
        patches = (self.input.T @ entries.flatten(1)).view(self.input.shape[1], self.shape[1], len(self.slices), n, *self.size)
        height, width = (size + 2 * self.padding for size in self.shape[-2:])
        maps = entries.new_zeros(self.shape[1], n, 1 if self.lifting else len(patches), height, width)
        for t, orbit in enumerate(self.slices):
            for u, where in enumerate(orbit):
                maps[where] += patches[u, :, t]
        maps = maps[..., self.padding : height - self.padding, self.padding : width - self.padding].transpose(0, 1)
        return maps.squeeze(2) if self.lifting else maps

    def analyse(self, y: Tensor) -> Tensor:
        """Transformed gradient of the output, dy (n, fields, S, height, width), shape (E, fields, n * pixels)."""
        return (self.output @ y.permute(2, 1, 0, 3, 4).flatten(1)).view(len(self.output), y.shape[1], -1)

    def synthesise(self, entries: Tensor, n: int) -> Tensor:
        """Transpose of `analyse`, shape (n, fields, S, height, width)."""
        return (self.output.T @ entries.flatten(1)).view(self.output.shape[1], -1, n, *self.size).permute(2, 1, 0, 3, 4)

    def chunks(self, filters: Tensor) -> list[slice]:
        """Slices of the batch whose patches are of about CHUNK_BYTES."""
        image = len(self.input) * filters.shape[1] * self.size[0] * self.size[1] * filters.element_size()
        step = max(1, CHUNK_BYTES // image)
        return [slice(start, start + step) for start in range(0, self.shape[0], step)]


def _offsets(x: Tensor, order: int, stride: int, padding: int, kernel_size: int) -> Tensor:
    return filter_transform(order, kernel_size, x.ndim == 4)[0]


def _compiled(x: Tensor) -> ctypes.CDLL | None:
    return gkernel.kernel() if x.device.type == "cpu" and x.dtype == torch.float32 else None


@torch.library.custom_op("cxr::group_correlate", mutates_args=())
def correlate(x: Tensor, filters: Tensor, bias: Tensor | None, order: int, stride: int, padding: int, kernel_size: int) -> Tensor:
    """Group convolution with transformed filters, as one operator of PyTorch: differentiable once, a whole to torch.compile.

    Parameters
    ----------
    x : Tensor, shape (n, channels, height, width) for a lifting layer, else (n, channels, S, height, width)
    filters : Tensor, shape (E, channels * T, fields)
        The stored filters after `filter_transform`, rows channel-major.
    bias : Tensor or None, shape (fields,)
    order : int
        S, 4 for p4 and 8 for p4m.
    stride, padding, kernel_size : int

    Returns
    -------
    Tensor, shape (n, fields, S, height', width')
    """
    x, filters, bias = x.contiguous(), filters.contiguous(), None if bias is None else bias.contiguous()
    geometry = (order, stride, padding, kernel_size)
    y = _like_output(x, filters, bias, *geometry)
    if library := _compiled(x):
        gkernel.forward(library, x, filters, bias, y, _offsets(x, *geometry), *geometry[1:])
        return y
    with torch.autocast(x.device.type, enabled=False):
        patches = _Patches(x, *geometry)
        for part in patches.chunks(filters):
            y[part] = patches.synthesise(filters.mT @ patches.gather(x[part]), len(y[part]))
    return y if bias is None else y.add_(bias[:, None, None, None])


@correlate.register_fake
def _like_output(x: Tensor, filters: Tensor, bias: Tensor | None, order: int, stride: int, padding: int, kernel_size: int) -> Tensor:
    return x.new_empty(x.shape[0], filters.shape[2], order, *out_size(x, stride, padding, kernel_size))


@torch.library.custom_op("cxr::group_correlate_backward", mutates_args=())
def correlate_backward(
    dy: Tensor, x: Tensor, filters: Tensor, order: int, stride: int, padding: int, kernel_size: int, needs_x: bool, needs_filters: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `correlate` for x and for the filters, each of size 0 where it is not needed."""
    dy, x, filters = dy.contiguous(), x.contiguous(), filters.contiguous()
    geometry = (order, stride, padding, kernel_size)
    dx, dfilters = _like_gradients(dy, x, filters, *geometry, needs_x, needs_filters)
    if library := _compiled(x):
        gkernel.backward(library, x, filters, dy, dx, dfilters, _offsets(x, *geometry), *geometry[1:])
        return dx, dfilters
    with torch.autocast(x.device.type, enabled=False):
        dfilters.zero_()
        patches = _Patches(x, *geometry)
        for part in patches.chunks(filters):
            dz = patches.analyse(dy[part])
            if needs_filters:
                dfilters.baddbmm_(patches.gather(x[part]), dz.mT)
            if needs_x:
                dx[part] = patches.scatter(filters @ dz, len(dx[part]))
    return dx, dfilters


@correlate_backward.register_fake
def _like_gradients(
    dy: Tensor, x: Tensor, filters: Tensor, order: int, stride: int, padding: int, kernel_size: int, needs_x: bool, needs_filters: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs_x else 0), filters.new_empty(filters.shape if needs_filters else 0)


def _save(ctx, inputs, output) -> None:
    x, filters, bias, *ctx.geometry = inputs
    ctx.bias = bias is not None
    ctx.save_for_backward(x, filters)


def _gradients(ctx, dy: Tensor) -> tuple:
    needs_x, needs_filters, needs_bias, *_ = ctx.needs_input_grad
    dx, dfilters = correlate_backward(dy, *ctx.saved_tensors, *ctx.geometry, needs_x, needs_filters)
    dbias = dy.sum((0, 2, 3, 4)) if ctx.bias and needs_bias else None
    return dx if needs_x else None, dfilters if needs_filters else None, dbias, None, None, None, None


correlate.register_autograd(_gradients, setup_context=_save)


def fourier_conv(x: Tensor, weight: Tensor, bias: Tensor | None, transform: Tensor, order: int, stride: int, padding: int) -> Tensor:
    """Group convolution through the group's Fourier transform.

    Parameters
    ----------
    x : Tensor, shape (n, channels, height, width) for a lifting layer, else (n, channels, S, height, width)
    weight : Tensor, shape (fields, channels, S_in, k, k)
    bias : Tensor or None, shape (fields,)
    transform : Tensor, shape (E * T, S_in * k * k)
        Second result of `filter_transform`.
    order, stride, padding : int

    Returns
    -------
    Tensor, shape (n, fields, S, height', width'), of the wider of the dtypes of x and weight (autocast does not narrow it)
    """
    channels = weight.shape[1]
    dtype = torch.promote_types(x.dtype, weight.dtype)
    with torch.autocast(x.device.type, enabled=False):
        # (channels, E * T, fields), then entry by entry
        entries = transform.to(dtype).expand(channels, -1, -1) @ weight.to(dtype).flatten(2).permute(1, 2, 0)
    filters = entries.unflatten(1, (PRODUCTS[order], -1)).transpose(0, 1).flatten(1, 2)
    return correlate(x.to(dtype), filters, bias if bias is None else bias.to(dtype), order, stride, padding, weight.shape[-1])
