"""How fast and how steadily a curve of epochs settles: arrays in, numbers out.

A curve is a row (T,) of finite values, one per epoch, T at least 1."""

import math

import numpy as np
from numpy.typing import ArrayLike


def plateau(curve: ArrayLike) -> float:
    """Mean of the last quarter (rounded up) of a curve (T,)."""
    return float(np.mean(curve[-math.ceil(len(curve) / 4) :]))


def settling_time(curve: ArrayLike, share: float = 0.9) -> float:
    """Where a curve (T,) first reaches `share` of its own plateau, 0 to T - 1, interpolated. Early
    is not good in itself: a network that never learns has settled from the start."""
    curve = np.asarray(curve)
    least = share * plateau(curve)
    above = int(np.flatnonzero(curve >= least)[0]) if (curve >= least).any() else len(curve) - 1
    if above == 0:
        return 0.0
    before, after = curve[above - 1 : above + 1]
    return above - 1 + float((least - before) / (after - before))


def shortfall(curve: ArrayLike) -> float:
    """Area between a curve (T,) and its plateau, in epochs of the plateau; NaN if that is <= 0."""
    level = plateau(curve)
    return float((1 - np.asarray(curve) / level).sum()) if level > 0 else math.nan


def spread(curve: ArrayLike) -> float:
    """Standard deviation of a curve (T,) around a smooth trend, without its first quarter.

    Each value is compared with the mean of its two neighbours, which no straight trend changes; the
    square of the difference is 3/2 of the variance of independent values (Gasser, Sroka and
    Jennen-Steinmetz 1986). 0 is steady; NaN if three values are not left."""
    rest = np.asarray(curve)[len(curve) // 4 :]
    if len(rest) < 3:
        return math.nan
    return float(np.sqrt(np.mean((rest[1:-1] - (rest[:-2] + rest[2:]) / 2) ** 2) * 2 / 3))


def convergence_epoch(curve: ArrayLike, tolerance: float = 0.02) -> float:
    """Version 0.1: epoch from which a curve (T,) is within `tolerance` of its plateau, or NaN."""
    outside = np.flatnonzero(np.abs(np.asarray(curve) - plateau(curve)) > tolerance)
    first = outside[-1] + 2 if len(outside) else 1
    return float(first) if first <= len(curve) else math.nan


def raw_spread(curve: ArrayLike) -> float:
    """Version 0.1: standard deviation (n - 1) of the second half of a curve (T,), or NaN."""
    half = np.asarray(curve)[len(curve) // 2 :]
    return float(half.std(ddof=1)) if len(half) > 1 else math.nan
