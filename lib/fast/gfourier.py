"""Exact group convolution through the Fourier transform of the point group: 5.8 (p4m) or 3.2 (p4)
times fewer multiplications.

With t a filter tap and u an element of the point group (order S, matrices A(u)), write ``P[t](x, u)
= f(x + A(u) t, u)`` for the patches and ``phi[t](h) = psi(h, A(h) t)`` for the filter. Eq. 10-11 of
Cohen and Welling (2016) become, at each pixel x and tap t, a correlation over a group of S
elements::

    y(x, g) = sum_t sum_u P[t](x, u) phi[t](g^-1 u)

which the group's Fourier transform block-diagonalises: with a real irreducible representation rho
and ``P^(rho) = sum_u P(u) rho(u)``, ``y^(rho) = P^(rho) phi^(rho)^T``. D4 has four irreps of
dimension 1 and one of dimension 2, whose 2 x 2 product takes Strassen's (1969) seven
multiplications: 4 + 7 = 11 products of channel matrices in place of 64. C4 has two of dimension 1
and one complex pair, whose product takes Gauss's three: 2 + 3 = 5 in place of 16. Written out, ``y
= output^T ((filter phi) * (input P))`` with three small constant matrices and an entry-wise
product; the transforms are additions. For a lifting layer one tap stands for its orbit, with
``phi[t](h) = psi(A(h) t) / |stabilizer of t|``: a 5 x 5 filter has 6 orbits under D4, in place of
25 taps.

The block form is textbook representation theory (Serre 1977, *Linear Representations of Finite
Groups*, sec. 6.2); for mirrors alone, Bokman, Nordstrom and Kahl (2025), *Flopping for FLOPs*, save
by splitting features by parity likewise.

The patches are k*k times the input, so they exist for a few images (in the compiled kernel: a few
rows) at a time and are made again in the backward pass. Results differ from the dense convolution's
by rounding only."""

from __future__ import annotations

import ctypes
import functools
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from lib.fast import gkernel
from lib.groups import element_matrices

BLOCK_ELEMENTS = (
    1 << 20
)  # numbers an element of the group in a block of the PyTorch path: little memory, large matrix products


# Strassen's and Gauss's algorithms, a row a multiplication: factors of the patches' entries, of the
# filters' entries, and what the product adds to which entry of the output; last, the filters'
# entries again from their factors, a row an entry. 2 x 2 matrices are written (00, 01, 10, 11),
# complex numbers a + b i (a, b).
STRASSEN = (
    [
        [0.5, 0, 0, 0.5],
        [0, 0, 1, 1],
        [1, 0, 0, 0],
        [0, 0, 0, 1],
        [1, 1, 0, 0],
        [-1, 0, 1, 0],
        [0, 1, 0, -1],
    ],
    [
        [2, 0, 0, 2],
        [1, 0, 0, 0],
        [0, 1, 0, -1],
        [-1, 0, 1, 0],
        [0, 0, 0, 1],
        [1, 1, 0, 0],
        [0, 0, 1, 1],
    ],
    [
        [1, 0, 0, 1],
        [0, 0, 1, -1],
        [0, 1, 0, 1],
        [1, 0, 1, 0],
        [-1, 1, 0, 0],
        [0, 0, 0, 1],
        [1, 0, 0, 0],
    ],
    [[0, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0, 0], [0, 0, 0, 0, -1, 0, 1], [0, 0, 0, 0, 1, 0, 0]],
)
GAUSS = (
    [[1, 1], [1, 0], [0, -1]],
    [[1, 0], [-1, 1], [1, 1]],
    [[1, 1], [0, 1], [1, 0]],
    [[1, 0, 0], [1, 1, 0]],
)
PRODUCTS = {4: 5, 8: 11}  # E, by the order of the group


@functools.cache
def fourier_matrices(order: int) -> tuple[np.ndarray, np.ndarray]:
    """The group's Fourier transform, irreps by elements: those of dimension 1, and the entries of
    the one of dimension 2.

    Entries are (00, 01, 10, 11) for p4m; p4's matrices are rotations, a + b i with (a, b) their
    first row."""
    m, r = np.divmod(np.arange(order), 4)
    rho = element_matrices(order)
    signs = (-1.0) ** np.stack([0 * m, m, r, m + r] if order == 8 else [0 * r, r])
    return signs, (rho if order == 8 else rho[:, 0]).reshape(order, -1).T


@functools.cache
def bilinear_algorithm(order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices (input, filter, output) of shape (E, S) with ``sum_u P(u) phi(g^-1 u) == output.T @
    ((filter @ phi) * (input @ P))``.

    E = 11 for p4m (S = order = 8), 5 for p4 (S = 4).
    """
    signs, entries = fourier_matrices(order)
    rho = element_matrices(order)
    moved = (
        (rho.transpose(0, 2, 1) if order == 8 else rho[:, :, 0]).reshape(order, -1).T
    )  # y^ = P^ phi^^T: the filter's is transposed
    left, right, out, _ = map(np.array, STRASSEN if order == 8 else GAUSS)
    return (
        np.concatenate([signs, left @ entries]),
        np.concatenate([signs, 2 * right @ moved])
        / order,  # the inverse transform's factor, dimension / S
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
    grid = np.stack(np.meshgrid(*[np.arange(-half, half + 1)] * 2, indexing="ij"), -1).reshape(
        -1, 2
    )
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


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def out_size(x: Tensor, stride: int, padding: int, kernel_size: int) -> tuple[int, int]:
    """Height and width of the output, as in `torch.nn.Conv2d`."""
    height, width = ((size + 2 * padding - kernel_size) // stride + 1 for size in x.shape[-2:])
    return height, width


class _Blocks:
    """The layer, block by block, with PyTorch's operations: transformed patches of a block of the
    output, and the transpose of that map.

    A library's matrix product is the faster the larger it is, so the 2 x 2 product is one of
    matrices twice as large each way, without Strassen's seventh: a block has S transformed maps,
    not E, and needs 4 + 8 products of channel matrices (p4: 2 + 4).

    A block is a few rows of an image, or a few whole images: enough for the products to be fast,
    little enough for memory and cache. Its arrays are made once for the layer and used again: fresh
    memory for each block would cost more than the arithmetic."""

    def __init__(
        self, x: Tensor, filters: Tensor, order: int, stride: int, padding: int, kernel_size: int
    ) -> None:
        self.stride, self.padding, self.kernel_size = stride, padding, kernel_size
        self.size = out_size(x, stride, padding, kernel_size)
        self.transform = torch.from_numpy(np.concatenate(fourier_matrices(order))).to(x)  # (S, S)
        self.singles = order // 2  # irreps of dimension 1
        self.recover = torch.tensor((STRASSEN if order == 8 else GAUSS)[3]).to(x)
        _, rows, fields = filters.shape
        entries = (self.recover @ filters[self.singles :].flatten(1)).unflatten(1, (rows, fields))
        self.single = filters[: self.singles]
        # (2 rows, 2 fields), with y^ = square^T P^ for each row of the matrix P^
        blocks = (
            entries
            if order == 8
            else torch.stack([entries[0], entries[1], -entries[1], entries[0]])
        )
        self.square = blocks.unflatten(0, (2, 2)).transpose(1, 2).reshape(2 * rows, 2 * fields)
        corners = filter_transform(order, kernel_size, x.ndim == 4)[
            0
        ].tolist()  # of the taps A(u) t in the window
        n, (tall, wide) = len(x), self.size
        maps = 1 if x.ndim == 4 else order
        # blocks of equal size: a small last one would be multiplied slowly
        most_rows, most_images = (
            max(1, BLOCK_ELEMENTS // max(1, max(rows, fields) * wide * rest)) for rest in (1, tall)
        )
        images, lines = (
            ceil_div(total, ceil_div(total, most)) if total else 0
            for total, most in ((n, most_images), (tall, most_rows))
        )
        self.blocks = [
            (image, min(images, n - image), line, min(lines, tall - line))
            for image in range(0, n, images or 1)
            for line in range(0, tall, lines)
        ]
        kinds = {(count, many) for _, count, _, many in self.blocks}
        self.shapes = {kind: self._arrays(x, fields, order, maps, corners, *kind) for kind in kinds}

    def _arrays(
        self, x: Tensor, fields: int, order: int, maps: int, corners: list, images: int, lines: int
    ) -> SimpleNamespace:
        """Arrays for blocks of `lines` rows of `images` images, and the views of them that hold
        P[t](., u).
        """
        channels, wide, count = x.shape[1], self.size[1], len(corners)
        high, across = (lines - 1) * self.stride + self.kernel_size, x.shape[-1] + 2 * self.padding
        pixels = images * lines * wide
        window = x.new_zeros(images, channels, maps, high, across)
        patches = x.new_empty(order, channels * count, pixels)
        strides = (
            maps * high * across,
            channels * maps * high * across,
            self.stride * across,
            self.stride,
        )
        shape = (channels, images, lines, wide)
        return SimpleNamespace(
            window=window,
            patches=patches,
            parts=[
                window.as_strided(shape, strides, (u % maps * high + down) * across + right)
                for orbit in corners
                for u, (down, right) in enumerate(orbit)
            ],
            places=[
                patches.as_strided(
                    shape,
                    (count * pixels, lines * wide, wide, 1),
                    (u * channels * count + t) * pixels,
                )
                for t in range(count)
                for u in range(order)
            ],
            entries=x.new_empty(order, channels * count, pixels),
            outputs=x.new_empty(order, fields, images, lines, wide),
            products=x.new_empty(order, fields, pixels),
        )

    def _overlap(self, height: int, line: int, high: int) -> tuple[slice, slice]:
        """Rows of the image under the window of the output's row `line`, and their place in the
        window.
        """
        top = line * self.stride - self.padding
        first, last = max(top, 0), min(top + high, height)
        return slice(first, max(first, last)), slice(first - top, max(first, last) - top)

    def gather(self, x: Tensor, block: tuple[int, int, int, int]) -> Tensor:
        """Transformed P[t] of a block at each pixel, shape (S, channels * T, pixels); overwritten
        by the next call.
        """
        image, images, line, lines = block
        a, width = self.shapes[images, lines], x.shape[-1]
        maps = (x.unsqueeze(2) if x.ndim == 4 else x)[image : image + images]
        rows, inside = self._overlap(x.shape[-2], line, a.window.shape[-2])
        a.window[..., : inside.start, :] = 0
        a.window[..., inside.stop :, :] = 0
        a.window[..., inside, self.padding : self.padding + width] = maps[..., rows, :]
        torch._foreach_copy_(a.places, a.parts)
        return torch.mm(self.transform, a.patches.flatten(1), out=a.entries.flatten(1)).view_as(
            a.entries
        )

    def _doubles(self, maps: Tensor) -> Tensor:
        """Of the S transformed maps (S, rows, pixels), the rows of the 2 x 2 matrix: (2, 2 rows,
        pixels), for p4 (1, 2 rows, pixels).
        """
        return maps[self.singles :].view(-1, 2 * maps.shape[1], maps.shape[2])

    def scatter(self, products: Tensor, dx: Tensor, block: tuple[int, int, int, int]) -> None:
        """Transpose of `gather`, of the filters' products with `products`, added to the gradient of
        the images.
        """
        image, images, line, lines = block
        a, width = self.shapes[images, lines], dx.shape[-1]
        torch.bmm(self.single, products[: self.singles], out=a.entries[: self.singles])
        of, into = self._doubles(products), self._doubles(a.entries)
        torch.bmm(self.square.expand(len(of), -1, -1), of, out=into)
        torch.mm(self.transform.T, a.entries.flatten(1), out=a.patches.flatten(1))
        a.window.zero_()
        torch._foreach_add_(a.parts, a.places)  # one after the other: the parts overlap
        rows, inside = self._overlap(dx.shape[-2], line, a.window.shape[-2])
        maps = (dx.unsqueeze(2) if dx.ndim == 4 else dx)[image : image + images]
        maps[..., rows, :] += a.window[..., inside, self.padding : self.padding + width]
        a.window[..., : self.padding] = 0
        a.window[..., self.padding + width :] = 0

    def analyse(self, dy: Tensor, block: tuple[int, int, int, int]) -> Tensor:
        """Transformed gradient of the output in a block, shape (S, fields, pixels); overwritten by
        the next call.
        """
        image, images, line, lines = block
        a = self.shapes[images, lines]
        a.outputs.copy_(
            dy[image : image + images, :, :, line : line + lines].permute(2, 1, 0, 3, 4)
        )
        return torch.mm(self.transform, a.outputs.flatten(1), out=a.products.flatten(1)).view_as(
            a.products
        )

    def correlate(
        self, entries: Tensor, products: Tensor, dsingle: Tensor, dsquare: Tensor
    ) -> None:
        """Add a block's part to the gradients of `single` and `square`."""
        dsingle.baddbmm_(entries[: self.singles], products[: self.singles].mT)
        for a, b in zip(self._doubles(entries), self._doubles(products), strict=True):
            dsquare.addmm_(a, b.T)

    def filter_gradient(self, dsingle: Tensor, dsquare: Tensor) -> Tensor:
        """Gradient of the filters, (E, rows, fields), from those of `single` and `square`."""
        _, rows, fields = dsingle.shape
        blocks = dsquare.view(2, rows, 2, fields).transpose(1, 2).flatten(0, 1)
        entries = (
            blocks
            if len(self.recover) == 4
            else torch.stack([blocks[0] + blocks[3], blocks[1] - blocks[2]])
        )
        return torch.cat(
            [dsingle, (self.recover.T @ entries.flatten(1)).unflatten(1, (rows, fields))]
        )

    def synthesise(self, entries: Tensor, y: Tensor, block: tuple[int, int, int, int]) -> None:
        """Transpose of `analyse`, of the filters' products with `entries`, written to the block's
        part of the output.
        """
        image, images, line, lines = block
        a = self.shapes[images, lines]
        torch.bmm(self.single.mT, entries[: self.singles], out=a.products[: self.singles])
        of, into = self._doubles(entries), self._doubles(a.products)
        torch.bmm(self.square.T.expand(len(of), -1, -1), of, out=into)
        torch.mm(self.transform.T, a.products.flatten(1), out=a.outputs.flatten(1))
        y[image : image + images, :, :, line : line + lines].permute(2, 1, 0, 3, 4).copy_(a.outputs)


def _offsets(x: Tensor, order: int, stride: int, padding: int, kernel_size: int) -> Tensor:
    return filter_transform(order, kernel_size, x.ndim == 4)[0]


def _compiled(x: Tensor) -> ctypes.CDLL | None:
    return gkernel.kernel() if x.device.type == "cpu" and x.dtype == torch.float32 else None


@torch.library.custom_op("cxr::group_correlate", mutates_args=())
def correlate(
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    order: int,
    stride: int,
    padding: int,
    kernel_size: int,
) -> Tensor:
    """Group convolution with transformed filters, as one operator of PyTorch: differentiable once,
    a whole to torch.compile.

    Parameters
    ----------
    x : Tensor, shape (n, channels, height, width) for a lifting layer, else (n, channels, S,
    height, width) filters : Tensor, shape (E, channels * T, fields)
        The stored filters after `filter_transform`, rows channel-major.
    bias : Tensor or None, shape (fields,)
    order : int
        S, 4 for p4 and 8 for p4m.
    stride, padding, kernel_size : int

    Returns
    -------
    Tensor, shape (n, fields, S, height', width')
    """
    x, filters, bias = (
        x.contiguous(),
        filters.contiguous(),
        None if bias is None else bias.contiguous(),
    )
    geometry = (order, stride, padding, kernel_size)
    y = _like_output(x, filters, bias, *geometry)
    if library := _compiled(x):
        gkernel.forward(library, x, filters, bias, y, _offsets(x, *geometry), *geometry[1:])
        return y
    with torch.autocast(x.device.type, enabled=False):
        layer = _Blocks(x, filters, *geometry)
        for block in layer.blocks:
            layer.synthesise(layer.gather(x, block), y, block)
    return y if bias is None else y.add_(bias[:, None, None, None])


@correlate.register_fake
def _like_output(
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    order: int,
    stride: int,
    padding: int,
    kernel_size: int,
) -> Tensor:
    return x.new_empty(
        x.shape[0], filters.shape[2], order, *out_size(x, stride, padding, kernel_size)
    )


@torch.library.custom_op("cxr::group_correlate_backward", mutates_args=())
def correlate_backward(
    dy: Tensor,
    x: Tensor,
    filters: Tensor,
    order: int,
    stride: int,
    padding: int,
    kernel_size: int,
    needs_x: bool,
    needs_filters: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `correlate` for x and for the filters, each of size 0 where it is not needed."""
    dy, x, filters = dy.contiguous(), x.contiguous(), filters.contiguous()
    geometry = (order, stride, padding, kernel_size)
    dx, dfilters = _like_gradients(dy, x, filters, *geometry, needs_x, needs_filters)
    if library := _compiled(x):
        gkernel.backward(
            library, x, filters, dy, dx, dfilters, _offsets(x, *geometry), *geometry[1:]
        )
        return dx, dfilters
    with torch.autocast(x.device.type, enabled=False):
        dx.zero_()
        layer = _Blocks(x, filters, *geometry)
        gradients = (
            [torch.zeros_like(of) for of in (layer.single, layer.square)] if needs_filters else []
        )
        for block in layer.blocks:
            products = layer.analyse(dy, block)
            if needs_filters:
                layer.correlate(layer.gather(x, block), products, *gradients)
            if needs_x:
                layer.scatter(products, dx, block)
        if needs_filters:
            dfilters.copy_(layer.filter_gradient(*gradients))
    return dx, dfilters


@correlate_backward.register_fake
def _like_gradients(
    dy: Tensor,
    x: Tensor,
    filters: Tensor,
    order: int,
    stride: int,
    padding: int,
    kernel_size: int,
    needs_x: bool,
    needs_filters: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs_x else 0), filters.new_empty(
        filters.shape if needs_filters else 0
    )


def _save(ctx, inputs, output) -> None:
    x, filters, bias, *ctx.geometry = inputs
    ctx.bias = bias is not None
    ctx.save_for_backward(x, filters)


def _gradients(ctx, dy: Tensor) -> tuple:
    needs_x, needs_filters, needs_bias, *_ = ctx.needs_input_grad
    dx, dfilters = correlate_backward(dy, *ctx.saved_tensors, *ctx.geometry, needs_x, needs_filters)
    dbias = dy.sum((0, 2, 3, 4)) if ctx.bias and needs_bias else None
    return (
        dx if needs_x else None,
        dfilters if needs_filters else None,
        dbias,
        None,
        None,
        None,
        None,
    )


correlate.register_autograd(_gradients, setup_context=_save)


def fourier_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: Tensor,
    order: int,
    stride: int,
    padding: int,
) -> Tensor:
    """Group convolution through the group's Fourier transform.

    Parameters
    ----------
    x : Tensor, shape (n, channels, height, width) for a lifting layer, else (n, channels, S,
    height, width) weight : Tensor, shape (fields, channels, S_in, k, k) bias : Tensor or None,
    shape (fields,) transform : Tensor, shape (E * T, S_in * k * k)
        Second result of `filter_transform`.
    order, stride, padding : int

    Returns
    -------
    Tensor, shape (n, fields, S, height', width'), of the wider of the dtypes of x and weight
    (autocast does not narrow it)"""
    channels = weight.shape[1]
    dtype = torch.promote_types(x.dtype, weight.dtype)
    with torch.autocast(x.device.type, enabled=False):
        # (channels, E * T, fields), then entry by entry
        entries = transform.to(dtype).expand(channels, -1, -1) @ weight.to(dtype).flatten(
            2
        ).permute(1, 2, 0)
    filters = entries.unflatten(1, (PRODUCTS[order], -1)).transpose(0, 1).flatten(1, 2)
    return correlate(
        x.to(dtype),
        filters,
        bias if bias is None else bias.to(dtype),
        order,
        stride,
        padding,
        weight.shape[-1],
    )
