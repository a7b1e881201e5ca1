"""Exact group convolution by the Fourier transform of the point group: 5.8 (p4m) or 3.2 (p4) times
fewer multiplications.

Let t be a filter tap and u an element of the point group (order S, matrices A(u)). Write ``P[t](x,
u) = f(x + A(u) t, u)`` for the patches and ``phi[t](h) = psi(h, A(h) t)`` for the filter. Eq. 10-11
of Cohen and Welling (2016) become a correlation over S elements at each pixel x and tap t::

    y(x, g) = sum_t sum_u P[t](x, u) phi[t](g^-1 u)

The group's Fourier transform block-diagonalises it. With a real irreducible representation rho and
``P^ = sum_u P(u) rho(u)``, it is ``y^ = P^ phi^^T`` (Serre 1977, *Linear Representations of Finite
Groups*, sec. 6.2; Bokman, Nordstrom and Kahl 2025, *Flopping for FLOPs*, do so for mirrors alone).
D4 has four irreps of dimension 1 and one of dimension 2, whose 2 x 2 product takes Strassen's
(1969) seven multiplications: 4 + 7 = 11 products of channel matrices instead of 64. C4 has two of
dimension 1 and one complex pair, whose product takes Gauss's three: 2 + 3 = 5 instead of 16. In a
lifting layer one tap stands for its orbit, with ``phi[t](h) = psi(A(h) t) / |stabilizer of t|``: a
5 x 5 filter has 6 orbits under D4 instead of 25 taps.

This module holds the algebra, and the layer by PyTorch's operations, one or a few images at a time.
A 2 x 2 product is then one product of matrices twice as large: BLAS is faster on large matrices.
``gfourier.c`` works on a few rows at a time, with Strassen's and Gauss's products. Both differ from
the dense convolution by rounding only."""

import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lib.groups import P4, P4M

GROUPS = {4: P4, 8: P4M}
PRODUCTS = {4: 5, 8: 11}  # E
CHUNK = 1 << 20  # numbers per element of the group in the patches of one chunk of images

# Row i of the first two matrices gives the combinations of patch and filter entries that product i
# multiplies. Row i of the third says to which output entries the product is added. 2 x 2 matrices
# are written (00, 01, 10, 11), complex numbers a + b i (a, b).
# fmt: off
STRASSEN = (
    [[.5,0,0,.5], [0,0,1,1], [1,0,0,0], [0,0,0,1], [1,1,0,0], [-1,0,1,0], [0,1,0,-1]],
    [[2,0,0,2], [1,0,0,0], [0,1,0,-1], [-1,0,1,0], [0,0,0,1], [1,1,0,0], [0,0,1,1]],
    [[1,0,0,1], [0,0,1,-1], [0,1,0,1], [1,0,1,0], [-1,1,0,0], [0,0,0,1], [1,0,0,0]],
)
# fmt: on
P4_BLOCKS = ((1, 0), (0, -1), (0, 1), (1, 0))
GAUSS = ([[1, 1], [1, 0], [0, -1]], [[1, 0], [-1, 1], [1, 1]], [[1, 1], [0, 1], [1, 0]])


@functools.cache
def fourier_matrices(order: int) -> tuple[np.ndarray, np.ndarray]:
    """The transforms of functions on the group and of filters, each (S, S): irreps by elements.

    The irreps of dimension 1 come first, then the entries of the one of dimension 2. The filters'
    also holds the inverse transform's factor, dimension / S."""
    m, r = np.divmod(np.arange(order), 4)
    rho = GROUPS[order].matrices.astype(float)
    signs = (-1.0) ** np.stack([0 * m, m, r, m + r] if order == 8 else [0 * r, r])
    if order == 8:
        function, filter_ = rho, rho.transpose(0, 2, 1)  # y^ = P^ phi^^T
    else:  # rotations: their first row is enough
        function, filter_ = rho[:, 0], rho[:, :, 0]
    function, filter_ = (entries.reshape(order, -1).T for entries in (function, filter_))
    return np.concatenate([signs, function]), np.concatenate([signs, 2 * filter_]) / order


@functools.cache
def bilinear_algorithm(order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices (input, filter, output) of shape (E, S), E = 11 for p4m and 5 for p4.

    ``sum_u P(u) phi(g^-1 u) == output.T @ ((filter @ phi) * (input @ P))``."""
    (function, filter_), singles = fourier_matrices(order), order // 2
    left, right, out = map(np.array, STRASSEN if order == 8 else GAUSS)
    pairs = ((left, function), (right, filter_), (out, function))
    return tuple(np.concatenate([m[:singles], products @ m[singles:]]) for products, m in pairs)


@functools.cache
def taps(order: int, kernel_size: int, lifting: bool, transposed: bool = False) -> tuple:
    """Where the numbers of P[t] and phi[t] are, for a group of `order` S and filters of odd side k.

    `lifting`: filters on the plane (one tap per orbit), not on the group. `transposed`: the
    transposed layer, which has the filters ``psi(h^-1, -h^-1 t)``. Returns offsets (T, S, 2), row
    and column, 0 to k - 1, of the tap A(u) t in the window; cells (T, S), the place of phi[t](h) in
    ``psi.flatten(-3)``; and shares (T,), one over the size of the tap's stabilizer, 1 if the layer
    does not lift."""
    group, half = GROUPS[order], kernel_size // 2
    grid = np.indices((kernel_size, kernel_size)).reshape(2, -1).T - half
    offsets = np.einsum("uij,tj->tui", group.matrices, grid) + half
    cells = offsets @ [kernel_size, 1]
    shares = np.ones(len(cells))
    if lifting:
        first = np.arange(len(cells)) == cells.min(1)
        offsets, cells = offsets[first], cells[first]
        shares = np.array([len(set(row)) / order for row in cells])
    elif transposed:  # phi[t](h) = psi(h^-1, -t)
        inverses = np.array([group.inverse(h) for h in range(order)])
        cells = (half - grid) @ [[kernel_size], [1]] + inverses * kernel_size**2
    else:
        cells = cells + np.arange(order) * kernel_size**2
    return offsets, cells, shares


def out_size(x: Tensor, kernel_size: int, stride: int, padding: int) -> tuple[int, int]:
    """Height and width of the output, as in `torch.nn.Conv2d`."""
    height, width = ((size + 2 * padding - kernel_size) // stride + 1 for size in x.shape[-2:])
    return height, width


class TorchLayer:
    """A layer by PyTorch's operations, a chunk of images at a time, and its transpose."""

    def __init__(self, x: Tensor, weight: Tensor, order: int, stride: int, padding: int) -> None:
        self.order, self.stride, self.padding, self.singles = order, stride, padding, order // 2
        self.shape, self.size = weight.shape, out_size(x, weight.shape[-1], stride, padding)
        self.fourier, of_filter = (torch.from_numpy(m).to(x) for m in fourier_matrices(order))
        self.offsets, cells, shares = taps(order, weight.shape[-1], x.ndim == 4)
        self.cells = torch.from_numpy(cells).to(x.device)
        self.transform = torch.from_numpy(shares).to(x)[:, None, None] * of_filter.T  # (T, S, S)
        entries = torch.einsum("tse,ncts->etcn", self.transform, weight.flatten(2)[..., self.cells])
        entries = entries.flatten(1, 2)  # (S, T * C, N)
        # 2 x 2 matrix, transposed, from the filters' entries; p4's a + b i is [[a, -b], [b, a]]
        blocks = torch.eye(4)[[0, 2, 1, 3]] if order == 8 else torch.tensor(P4_BLOCKS)
        self.blocks = blocks.to(x).view(2, 2, -1)
        self.single = entries[: self.singles].mT.contiguous()  # (S / 2, N, T * C)
        square = torch.einsum("jke,ern->jnkr", self.blocks, entries[self.singles :])
        self.square = square.flatten(0, 1).flatten(1)  # (2 N, 2 T * C)
        images = max(1, CHUNK // (weight.shape[1] * len(cells) * math.prod(self.size)))
        self.chunks = [slice(i, i + images) for i in range(0, len(x), images)]

    def windows(self, x: Tensor) -> Iterator[list[Tensor]]:
        """For each tap P[t](., u), views (C, n, H', W') of the padded maps, by u."""
        maps = (x.unsqueeze(2) if x.ndim == 4 else x).transpose(0, 1)
        step, ends = self.stride, [self.stride * (size - 1) + 1 for size in self.size]
        for orbit in self.offsets.tolist():
            yield [
                maps[:, :, u % maps.shape[2], i : i + ends[0] : step, j : j + ends[1] : step]
                for u, (i, j) in enumerate(orbit)
            ]

    def patches(self, x: Tensor) -> Tensor:
        """Transformed patches (S, T * C, pixels) of a chunk of images."""
        shape = (x.shape[1], len(x), *self.size)
        entries = x.new_empty(self.order, len(self.offsets), *shape)
        maps = x.new_empty(self.order, *shape)
        for t, windows in enumerate(self.windows(F.pad(x, 4 * [self.padding]))):
            torch.stack(windows, out=maps)
            torch.mm(self.fourier, maps.flatten(1), out=entries[:, t].flatten(1))
        return entries.view(self.order, -1, math.prod(shape[1:]))

    def scatter(self, entries: Tensor, dx: Tensor) -> None:
        """Write the transpose of `patches` into dx."""
        shape = (self.order, dx.shape[1], len(dx), *self.size)
        entries = entries.unflatten(1, (len(self.offsets), -1)).flatten(2)
        padded = F.pad(torch.zeros_like(dx), 4 * [self.padding])
        for t, windows in enumerate(self.windows(padded)):
            maps = (self.fourier.T @ entries[:, t]).view(shape)
            for window, part in zip(windows, maps, strict=True):
                window += part
        height, width = (slice(self.padding, self.padding + size) for size in dx.shape[-2:])
        dx.copy_(padded[..., height, width])

    def pairs(self, maps: Tensor) -> Tensor:
        """The rows of the 2 x 2 matrix of transformed maps, as (rows, 2 * channels, pixels)."""
        return maps[self.singles :].view(-1, 2 * maps.shape[1], maps.shape[2])

    def multiply(self, single: Tensor, square: Tensor, entries: Tensor) -> Tensor:
        """Products of channel matrices with transformed maps (S, rows, pixels)."""
        products = entries.new_empty(self.order, single.shape[1], entries.shape[2])
        torch.bmm(single, entries[: self.singles], out=products[: self.singles])
        pairs, results = self.pairs(entries), self.pairs(products)
        torch.bmm(square.expand(len(pairs), -1, -1), pairs, out=results)
        return products

    def forward(self, x: Tensor, y: Tensor) -> None:
        """Write the convolution into y."""
        for part in self.chunks:
            products = self.multiply(self.single, self.square, self.patches(x[part]))
            maps = self.fourier.T @ products.flatten(1)
            shape = (self.order, y.shape[1], -1, *self.size)
            y[part] = maps.view(shape).permute(2, 1, 0, 3, 4)

    def backward(self, x: Tensor, dy: Tensor, dx: Tensor | None, dweight: Tensor | None) -> None:
        """Write the gradients into dx and dweight."""
        dsingle, dsquare = torch.zeros_like(self.single), torch.zeros_like(self.square)
        for part in self.chunks:
            maps = dy[part].permute(2, 1, 0, 3, 4).flatten(1)
            products = (self.fourier @ maps).view(self.order, dy.shape[1], -1)
            if dweight is not None:
                entries = self.patches(x[part])
                dsingle.baddbmm_(products[: self.singles], entries[: self.singles].mT)
                for left, right in zip(self.pairs(products), self.pairs(entries), strict=True):
                    dsquare.addmm_(left, right.T)
            if dx is not None:
                self.scatter(self.multiply(self.single.mT, self.square.T, products), dx[part])
        if dweight is not None:
            fields, rows = self.single.shape[1:]
            blocks = dsquare.view(2, fields, 2, rows)
            doubles = torch.einsum("jke,jnkr->ern", self.blocks, blocks)
            entries = torch.cat([dsingle.mT, doubles]).unflatten(1, (-1, self.shape[1]))
            dphi = torch.einsum("tse,etcn->ncts", self.transform, entries).flatten(2)
            dweight.zero_().flatten(2).index_add_(2, self.cells.flatten(), dphi)
