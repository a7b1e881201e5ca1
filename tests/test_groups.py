"""The groups against their axioms, against matrices, and against GrouPy's parametrisation written
out by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.groups import P4, P4M

GROUPS = pytest.mark.parametrize("group", [P4, P4M], ids=lambda group: group.name)
groups = st.sampled_from([P4, P4M])


def matrix(g):
    """GrouPy's ``M(m) R(r)`` on (row, column), written out from its definition."""
    c, s = round(math.cos(g % 4 * math.pi / 2)), round(math.sin(g % 4 * math.pi / 2))
    return np.array([[-1 if g >= 4 else 1, 0], [0, 1]]) @ np.array([[c, -s], [s, c]])


@GROUPS
def test_axioms(group):
    elements = range(group.order)
    for a, b in itertools.product(elements, elements):
        assert np.array_equal(matrix(group.product(a, b)), matrix(a) @ matrix(b))
        for c in elements:
            assert group.product(group.product(a, b), c) == group.product(a, group.product(b, c))
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


@given(groups, st.integers(0, 7), st.integers(0, 7))
def test_maps_move_their_group_axis_by_the_inverse_element(group, g, u):
    g, u = g % group.order, u % group.order
    x = torch.arange(group.order, dtype=torch.float32)[:, None, None].expand(-1, 3, 3)
    assert group.act_on_maps(x, g)[u].unique().tolist() == [group.product(group.inverse(g), u)]


def test_bad_arguments_are_named():
    for size in (0, 2, 4):
        with pytest.raises(ValueError, match=f"kernel_size.*{size}"):
            P4M.filter_indices(size, 8)
    for group, element in ((P4, 4), (P4M, 8), (P4M, -1)):
        with pytest.raises(ValueError, match=f"{element}.*{group.name}"):
            group.act_on_grid(torch.zeros(3, 3), element)
    with pytest.raises(ValueError, match=r"p4 .*4, H, W"):
        P4.act_on_maps(torch.zeros(8, 3, 3), 1)
