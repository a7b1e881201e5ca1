"""Paired differences: interval, tests, correction for several claims, and power."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

ALPHA = 0.05
FAMILY = 5  # claims that are tested together
LEAST_SEEDS = 8  # fewer give no exact p below alpha after Holm's correction over the claims


def paired(differences: ArrayLike, extra_se: float = 0.0, resolution: float = 0.0) -> dict:
    """Mean of paired differences (n,), one per seed, with interval, test and effect size.

    Student's t assumes that the differences under the same seed are roughly normal. The exact
    sign-flip test assumes only that they are symmetric about 0 if the arms do not differ.

    `extra_se` is the standard error from a source that all seeds share, such as which patients were
    tested. It is added in quadrature; degrees of freedom by Welch and Satterthwaite, with this part
    taken as known. The interval is too wide rather than too narrow.

    `resolution` is the step of the measure. The standard deviation is taken to be at least that of
    rounding both arms, resolution / sqrt(6): three equal whole numbers are no proof of no spread.

    Returns ``n, mean, sd, low, high`` (95 %), ``p`` (Student's, two-sided) and ``sign_flip_p``; NaN
    if n is too small. The differences are finite, and n is at least 1."""
    differences = np.asarray(differences, dtype=float)
    n, mean = differences.size, float(differences.mean())
    found = {"n": n, "mean": mean}
    found |= dict.fromkeys(("sd", "low", "high", "p", "sign_flip_p"), math.nan)
    if n < 2:
        return found
    flips = stats.permutation_test((differences,), np.mean, permutation_type="samples")
    sd = max(float(differences.std(ddof=1)), resolution / math.sqrt(6))
    found |= {"sign_flip_p": float(flips.pvalue), "sd": sd}
    between = sd**2 / n
    se = math.sqrt(between + extra_se**2)
    if se == 0:  # equal to the last digit: nothing can be said of their spread
        return found | ({"low": mean, "high": mean, "p": 1.0} if mean == 0 else {})
    df = (n - 1) * (se**2 / between) ** 2 if between > 0 else math.inf
    low, high = stats.t.interval(1 - ALPHA, df, mean, se)
    p = 2 * float(stats.t.sf(abs(mean) / se, df))
    return found | {"low": float(low), "high": float(high), "p": p}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values (Holm 1979): to reject those at most alpha keeps the chance of any
    error in the family at most alpha. NaN, a claim that could not be tested, stays NaN but counts.
    """
    p = np.nan_to_num(np.asarray(p_values, dtype=float), nan=1.0)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return np.where(np.isnan(p_values), math.nan, adjusted).tolist()


@cache
def detectable(n: int, power: float = 0.8) -> float:
    """Standardised difference (mean over standard deviation) that n seeds find with `power` at
    Holm's strictest level, by the noncentral t distribution; NaN for fewer than three."""
    if n < 3:
        return math.nan
    critical, root = stats.t.ppf(1 - ALPHA / (2 * FAMILY), n - 1), math.sqrt(n)
    found = optimize.brentq(lambda d: stats.nct.sf(critical, n - 1, d * root) - power, 0.01, 200)
    return float(found)


def seeds_to_tell(
    sd: float, smallest: float, n: int = 0, mean: float = 0.0, extra_se: float = 0.0
) -> float:
    """Seeds that would tell: those that find `smallest`, or `mean` if that is larger, with 80 %
    power at standard deviation `sd` of the difference; once `n` are enough for a verdict, more than
    these, that find `mean`, or set an interval around it within `smallest`. `extra_se` as in
    `paired`. Infinity above 200."""

    def told(seeds: int) -> bool:
        spread = math.hypot(sd, extra_se * math.sqrt(seeds))
        wanted = max(abs(mean), smallest * (n < LEAST_SEEDS))
        half = stats.t.ppf(1 - ALPHA / 2, seeds - 1) * spread / math.sqrt(seeds)
        alike = n >= LEAST_SEEDS and half + abs(mean) <= smallest
        return detectable(seeds) * spread <= wanted or alike

    tried = range(max(LEAST_SEEDS, n + 1), 201)
    place = bisect_left(tried, True, key=told)
    return float(tried[place]) if place < len(tried) else math.inf
