"""The point groups of the wallpaper groups p4 and p4m: product, inverse, action on square grids and
on filters.

An element is one integer ``g = 4*m + r``: `r` quarter turns counter-clockwise (as displayed, rows
downward), then, if ``m == 1``, a mirror that swaps top and bottom. With grid points written as
(row, column) around the centre of the grid, `g` is the matrix ::

    A(g) = [[(-1)**m, 0], [0, 1]] @ [[cos, -sin], [sin, cos]](r * 90 degrees)

which is the order and the convention of GrouPy, the code of Cohen and Welling, *Group Equivariant
Convolutional Networks* (ICML 2016, sections 4.2-4.4). Functions are moved by the left action ``[g
f](x) = f(g^-1 x)`` (eq. 4), so acting with `a * b` is acting with `b`, then with `a`."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


def element_matrices(order: int) -> np.ndarray:
    """Matrices ``A(g)`` acting on (row, column), shape (order, 2, 2), int64, for g = 0 .. order-1."""
    quarter = np.array([[0, -1], [1, 0]])
    mirror = np.array([[-1, 0], [0, 1]])
    rotations = [np.linalg.matrix_power(quarter, r) for r in range(4)]
    return np.stack(
        [np.linalg.matrix_power(mirror, g // 4) @ rotations[g % 4] for g in range(order)]
    )


@dataclass(frozen=True)
class PointGroup:
    """A finite group of symmetries of the square grid; use the instances `P4` and `P4M`.

    Parameters
    ----------
    name : str
        Name of the wallpaper group, ``"p4"`` or ``"p4m"``.
    order : int
        Number of elements (the stabilizer size S): 4 for p4, 8 for p4m.

    Attributes
    ----------
    matrices : ndarray, shape (order, 2, 2)
        Action on (row, column).
    table : ndarray, shape (order, order)
        ``table[a, b]`` is the element ``a * b``: first b, then a.
    inverses : ndarray, shape (order,)
        ``inverses[g]`` is the inverse of g.
    """

    name: str
    order: int
    matrices: np.ndarray = field(init=False, repr=False, compare=False)
    table: np.ndarray = field(init=False, repr=False, compare=False)
    inverses: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        matrices = element_matrices(self.order)
        products = np.einsum("aij,bjk->abik", matrices, matrices)
        table = (products[:, :, None] == matrices).all((-1, -2)).argmax(-1)
        for name, value in {
            "matrices": matrices,
            "table": table,
            "inverses": (table == 0).argmax(1),
        }.items():
            value.setflags(write=False)
            object.__setattr__(self, name, value)

    def element(self, g: int) -> int:
        """Return `g` if it is an element of the group, else raise ValueError."""
        if not 0 <= g < self.order:
            raise ValueError(
                f"{g} is no element of {self.name}: its elements are 0 to {self.order - 1}"
            )
        return int(g)

    def product(self, a: int, b: int) -> int:
        """The element ``a * b``: first b, then a."""
        return int(self.table[self.element(a), self.element(b)])

    def inverse(self, g: int) -> int:
        """The element that undoes g."""
        return int(self.inverses[self.element(g)])

    def act_on_grid(self, x: Tensor, g: int) -> Tensor:
        """Move a function on a grid: ``[g f](x) = f(g^-1 x)``.

        Parameters
        ----------
        x : Tensor, shape (..., H, W)
            Images, planar feature maps or filters; the centre of the grid stays in place. A quarter
            turn swaps H and W.
        g : int
            Element, 0 to order-1.

        Returns
        -------
        Tensor, shape (..., H, W) or (..., W, H)
        """
        turned = torch.rot90(x, self.element(g) % 4, (-2, -1))
        return turned.flip(-2) if g >= 4 else turned

    def act_on_maps(self, x: Tensor, g: int) -> Tensor:
        """Move a function on the group: ``[g f](x, u) = f(g^-1 x, g^-1 u)`` (Cohen and Welling
        2016, sec. 4.4).

        Parameters
        ----------
        x : Tensor, shape (..., S, H, W)
            Group feature maps or filters, S = order.
        g : int
            Element, 0 to order-1.

        Returns
        -------
        Tensor, shape (..., S, H, W) or (..., S, W, H)
        """
        if x.ndim < 3 or x.shape[-3] != self.order:
            raise ValueError(
                f"{self.name} feature maps have shape (..., {self.order}, H, W), not {tuple(x.shape)}"
            )
        source = torch.tensor(self.table[self.inverse(g)], device=x.device)
        return self.act_on_grid(x, g).index_select(-3, source)

    def filter_indices(self, kernel_size: int, stabilizer_in: int) -> Tensor:
        """Where each value of each transformed filter is found in the stored filter.

        ``psi.flatten(-3)[..., index[g]]`` is the filter moved by g, ``psi(g^-1 u, g^-1 t)``, at (u,
        row, column) in C order.

        Parameters
        ----------
        kernel_size : int
            Odd side k of the filters.
        stabilizer_in : int
            S_in: 1 for filters on the plane (k, k), the group's order for filters on the group (S,
            k, k).

        Returns
        -------
        Tensor, shape (order, S_in * k * k), int64
        """
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be odd, so that a filter turns about its centre pixel; got {kernel_size}"
            )
        if stabilizer_in not in (1, self.order):
            raise ValueError(
                f"stabilizer_in must be 1 or {self.order} for {self.name}, got {stabilizer_in}"
            )
        positions = torch.arange(stabilizer_in * kernel_size**2).reshape(
            stabilizer_in, kernel_size, kernel_size
        )
        act = self.act_on_grid if stabilizer_in == 1 else self.act_on_maps
        return torch.stack([act(positions, g).flatten() for g in range(self.order)])


P4 = PointGroup("p4", 4)
P4M = PointGroup("p4m", 8)
