"""The groups against their axioms, against matrices, and against GrouPy's parametrisation written
out by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from lib.groups import P4, P4M

GROUPS = pytest.mark.parametrize("group", [P4, P4M], ids=lambda group: group.name)


def matrix(g):
    """GrouPy's ``M(m) R(r)`` on (row, column), written out from its definition."""
    c, s = round(math.cos(g % 4 * math.pi / 2)), round(math.sin(g % 4 * math.pi / 2))
    return np.array([[-1 if g >= 4 else 1, 0], [0, 1]]) @ np.array([[c, -s], [s, c]])


@GROUPS
def test_axioms(group):
    elements = range(group.order)
    for a, b in itertools.product(elements, elements):
        assert np.array_equal(matrix(group.product(a, b)), matrix(a) @ matrix(b))
    for g in elements:
        assert np.array_equal(group.matrices[g], matrix(g))
        assert group.product(0, g) == group.product(g, 0) == g
        assert group.product(g, group.inverse(g)) == group.product(group.inverse(g), g) == 0
    assert len({matrix(g).tobytes() for g in elements}) == group.order


@GROUPS
@pytest.mark.parametrize("size", [1, 4, 5])
def test_action_moves_each_pixel_where_the_matrix_says(group, size):
    x = torch.randn(2, size, size)
    for g in range(group.order):
        moved = group.act_on_grid(x, g)
        for row, column in itertools.product(range(size), range(size)):
            # Twice the coordinates from the centre, so that even sizes stay in integers.
            target = matrix(g) @ (2 * np.array([row, column]) - (size - 1))
            i, j = (target + size - 1) // 2
            assert torch.equal(moved[:, i, j], x[:, row, column])


def test_bad_arguments_are_named():
    for group, element in ((P4, 4), (P4M, 8), (P4M, -1)):
        with pytest.raises(ValueError, match=f"{element}.*{group.name}"):
            group.act_on_grid(torch.zeros(3, 3), element)
    with pytest.raises(ValueError, match=r"p4 .*4, H, W"):
        P4.act_on_maps(torch.zeros(8, 3, 3), 1)
