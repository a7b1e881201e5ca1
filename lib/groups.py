"""The point groups of p4 and p4m: product, inverse, action on square grids and on filters.

An element is one integer ``g = 4*m + r``: `r` quarter turns counter-clockwise (as displayed, rows
downward), then, if ``m == 1``, a mirror that swaps top and bottom. On points (row, column) around
the centre of the grid, `g` is the matrix ::

    A(g) = [[(-1)**m, 0], [0, 1]] @ [[cos, -sin], [sin, cos]](r * 90 degrees)

This is the order and the convention of GrouPy, the code of Cohen and Welling, *Group Equivariant
Convolutional Networks* (ICML 2016, sections 4.2-4.4). An element moves a function by ``[g f](x) =
f(g^-1 x)`` (eq. 4). Acting with `a * b` is acting with `b`, then with `a`."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PointGroup:
    """A finite group of symmetries of the square grid; use the instances `P4` and `P4M`."""

    name: str  # of the wallpaper group, "p4" or "p4m"
    order: int  # number of elements, the size S of the stabilizer: 4 or 8

    @cached_property
    def matrices(self) -> np.ndarray:
        """Action on (row, column), shape (order, 2, 2)."""
        quarter, mirror = np.array([[0, -1], [1, 0]]), np.array([[-1, 0], [0, 1]])
        power = np.linalg.matrix_power
        return np.stack([power(mirror, g // 4) @ power(quarter, g % 4) for g in range(self.order)])

    @cached_property
    def table(self) -> np.ndarray:
        """Products, shape (order, order): ``table[a, b]`` is ``a * b``, first b, then a."""
        products = np.einsum("aij,bjk->abik", self.matrices, self.matrices)
        return (products[:, :, None] == self.matrices).all((-1, -2)).argmax(-1)

    def element(self, g: int) -> int:
        """Return `g` if it is an element of the group, else raise ValueError."""
        if not 0 <= g < self.order:
            raise ValueError(f"{g} is no element of {self.name}: choose 0 to {self.order - 1}")
        return int(g)

    def product(self, a: int, b: int) -> int:
        """The element ``a * b``: first b, then a."""
        return int(self.table[self.element(a), self.element(b)])

    def inverse(self, g: int) -> int:
        """The element that undoes g."""
        return int((self.table[self.element(g)] == 0).argmax())

    def act_on_grid(self, x: Tensor, g: int) -> Tensor:
        """Move functions on a grid, (..., H, W): ``[g f](x) = f(g^-1 x)``.

        The centre of the grid stays in place. A quarter turn swaps H and W."""
        turned = torch.rot90(x, self.element(g) % 4, (-2, -1))
        return turned.flip(-2) if g >= 4 else turned

    def act_on_maps(self, x: Tensor, g: int) -> Tensor:
        """Move functions on the group, (..., S, H, W): ``[g f](x, u) = f(g^-1 x, g^-1 u)``.

        See Cohen and Welling (2016), sec. 4.4. A quarter turn swaps H and W."""
        if x.ndim < 3 or x.shape[-3] != self.order:
            expected = f"(..., {self.order}, H, W)"
            raise ValueError(f"{self.name} maps have shape {expected}, not {tuple(x.shape)}")
        source = torch.tensor(self.table[self.inverse(g)], device=x.device)
        return self.act_on_grid(x, g).index_select(-3, source)

    def filter_indices(self, kernel_size: int, stabilizer_in: int) -> Tensor:
        """For each value of each moved filter, its place in the stored filter: int64, shape
        (order, S_in * k * k), axis 1 in C order of (u, row, column).

        ``psi.flatten(-3)[..., index[g]]`` is the filter moved by g, ``psi(g^-1 u, g^-1 t)``. S_in
        is 1 for filters on the plane, the group's order for filters on the group. ValueError if
        the side k is even."""
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd: a filter has a centre; got {kernel_size}")
        places = torch.arange(stabilizer_in * kernel_size**2)
        places = places.view(stabilizer_in, kernel_size, kernel_size)
        act = self.act_on_grid if stabilizer_in == 1 else self.act_on_maps
        return torch.stack([act(places, g).flatten() for g in range(self.order)])


def filter_bank(weight: Tensor, index: Tensor) -> Tensor:
    """All moved filters as planar ones, (out_channels * S, in_channels * S_in, k, k).

    `weight` is (out_channels, in_channels, S_in, k, k), `index` from `PointGroup.filter_indices`.
    """
    moved = weight.flatten(2).index_select(2, index.flatten()).unflatten(2, index.shape)
    return moved.transpose(1, 2).flatten(2).flatten(0, 1).unflatten(1, (-1, *weight.shape[-2:]))


P4 = PointGroup("p4", 4)
P4M = PointGroup("p4m", 8)
