"""Curves that settle where they were made to, and spreads that were planted."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.study import curves


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 0.5))
def test_convergence_epoch_is_the_first_from_which_the_curve_stays(curve, tolerance):
    final = np.mean(curve[-math.ceil(len(curve) / 4) :])
    inside = [abs(value - final) <= tolerance for value in curve]
    stays = [epoch for epoch in range(1, len(curve) + 1) if all(inside[epoch - 1 :])]
    expected = stays[0] if stays else math.nan
    assert curves.convergence_epoch(curve, tolerance) == pytest.approx(expected, nan_ok=True)


def test_a_curve_settles_where_it_crosses_90_percent_of_its_plateau():
    rise = [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert curves.settling_time(rise) == pytest.approx(1.8)
    assert curves.settling_time(3 * np.array(rise)) == pytest.approx(1.8), "no unit"
    assert curves.settling_time([1.0, 0.2, 0.9, 1.0]) == 0, "it begins there"
    assert curves.shortfall(rise) == pytest.approx(1.5)
    assert curves.shortfall([0.7] * 5) == 0


def test_a_trend_is_no_spread_and_noise_is():
    rng, steps = np.random.default_rng(0), np.arange(4000)
    assert curves.spread(0.3 + 0.02 * steps) == pytest.approx(0, abs=1e-9)
    noise = rng.normal(0, 0.05, len(steps))
    assert curves.spread(noise + 0.001 * steps) == pytest.approx(0.05, rel=0.03)
    assert curves.raw_spread(noise + 0.001 * steps) > 0.5, "version 0.1 measured the trend"
    assert np.isnan([curves.spread([1.0, 2.0]), curves.raw_spread([1.0])]).all()
    assert curves.raw_spread([9.0, 0.0, 1.0, 3.0]) == pytest.approx(math.sqrt(2))
