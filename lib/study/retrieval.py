"""Image retrieval with R-MAC descriptors, and what it finds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lib.features import extract
from lib.models import Backbone


def regions(
    height: int, width: int, levels: int = 3, overlap: float = 0.4
) -> list[tuple[int, int, int]]:
    """Square regions of a map, as R-MAC lays them out: (top, left, side), side in pixels.

    At level l squares of side 2 min(H, W) / (l + 1) stand in l rows along the shorter side and,
    along the longer one, in as many more as bring the overlap of neighbours nearest to `overlap`
    (Tolias, Sicre and Jegou 2016, section 3.2). Places are rounded so that the set of regions of a
    square map is its own mirror image: descriptors of a map and of its turned copy are then the
    same.

    Raises
    ------
    ValueError
        A size or `levels` below 1.
    """
    if min(height, width, levels) < 1:
        raise ValueError(
            f"regions need a map of at least one pixel and one level, got {height} x {width} and {levels}"
        )
    short = min(height, width)
    steps = np.arange(1, 7)
    distance = (max(height, width) - short) / steps
    extra = (
        0
        if height == width
        else int(steps[np.argmin(np.abs((short**2 - short * distance) / short**2 - overlap))])
    )
    found = []
    for level in range(1, levels + 1):
        side = max(1, 2 * short // (level + 1))
        rows, columns = (level + (extra if length > short else 0) for length in (height, width))
        found += [
            (top, left, side)
            for top in _places(height, side, rows)
            for left in _places(width, side, columns)
        ]
    return list(dict.fromkeys(found))  # on small maps levels share regions


def _places(length: int, side: int, number: int) -> list[int]:
    """`number` starts of intervals of `side` pixels, spread evenly over `length` and symmetric
    about its middle.
    """
    room = length - side
    starts = [int(room * k / (number - 1)) if number > 1 else room // 2 for k in range(number)]
    mirrored = [room - start for start in starts]
    return sorted({*starts, *mirrored})


def rmac(maps: Tensor, levels: int = 3) -> Tensor:
    """Regional maximum activation of convolutions: (N, C, H, W), not negative, to unit vectors (N,
    C).

    The maximum of each channel over each of `regions`, scaled to unit length, summed over regions
    and scaled to unit length again (Tolias, Sicre and Jegou 2016, *Particular object retrieval with
    integral max-pooling of CNN activations*, section 3.2). Their PCA-whitening of the regional
    vectors is left out: it would have to be learnt on other images. A map of zeros gives a vector
    of zeros."""
    if maps.ndim != 4:
        raise ValueError(f"maps must have shape (N, C, H, W), got {tuple(maps.shape)}")
    vectors = [
        maps[:, :, top : top + side, left : left + side].amax((2, 3))
        for top, left, side in regions(*maps.shape[2:], levels)
    ]
    return nn.functional.normalize(
        sum(nn.functional.normalize(vector, dim=1) for vector in vectors), dim=1
    )


class _Describer(nn.Module):
    """A network whose features are its R-MAC descriptors, for `lib.features.extract`."""

    def __init__(self, model: Backbone, levels: int) -> None:
        super().__init__()
        self.model, self.levels = model, levels

    def features(self, x: Tensor) -> Tensor:
        return rmac(self.model.maps(x), self.levels)


def describe(
    model: Backbone, images: np.ndarray, device: str | torch.device = "cpu", levels: int = 3
) -> np.ndarray:
    """R-MAC descriptors (N, C) of images (N, 64, 64) uint8 from a network's last convolutional
    maps, centred, unit length.

    The mean of all descriptors is taken off first: activations are not negative, so that without it
    all images look alike."""
    vectors = extract(_Describer(model, levels), images, device=device)
    vectors = vectors - vectors.mean(axis=0)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def nearest(
    descriptors: np.ndarray, queries: np.ndarray, k: int, patients: np.ndarray | None = None
) -> np.ndarray:
    """The k images most similar to each query by cosine, most similar first.

    Parameters
    ----------
    descriptors : (N, C) float, unit length
    queries : (Q,) int
        Rows of `descriptors`. A query is never its own match.
    k : int
    patients : (N,), optional
        If given, images of the query's own patient are no matches either.

    Returns
    -------
    (Q, k) int
        Rows of `descriptors`; -1 where there are fewer than k others.
    """
    found = np.full((len(queries), k), -1)
    for start in range(
        0, len(queries), 128
    ):  # all queries at once would need as many rows as long as the data set
        some = queries[start : start + 128]
        similarity = descriptors[some] @ descriptors.T
        excluded = (
            patients[some][:, None] == patients[None]
            if patients is not None
            else np.zeros(similarity.shape, dtype=bool)
        )
        excluded[np.arange(len(some)), some] = True
        similarity[excluded] = -np.inf
        order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        there = ~np.isneginf(np.take_along_axis(similarity, order, axis=1))
        found[start : start + len(some), : order.shape[1]] = np.where(there, order, -1)
    return found


def precision_at_k(
    descriptors: np.ndarray,
    targets: np.ndarray,
    patients: np.ndarray,
    k: int = 5,
    max_queries: int = 1000,
    seed: int = 0,
) -> dict[str, np.ndarray | float]:
    """How often the images retrieved for a query share its findings; hits of the same patient are
    counted apart.

    Parameters
    ----------
    descriptors : (N, C) float, unit length
    targets : (N, F) bool
    patients : (N,)
    k : int
        Matches looked at for each query.
    max_queries, seed : int
        At most this many images are queries, drawn from `seed`.

    Returns
    -------
    dict
        ``precision`` (F,), for each finding the share of the k nearest images *of other patients*
        that have it, in the mean over the queries that have it; ``chance`` (F,), the same for
        images of other patients drawn at random; NaN where no query has the finding.
        ``same_patient``, among the queries whose patient has other images, the share of the k
        nearest that are of the same patient, when they may be; ``same_patient_chance``, the same
        for matches drawn at random. A method that finds the patient again, by devices, framing or
        body shape, scores high on these and says nothing of disease.

    Raises
    ------
    ValueError
        Lengths that differ, k below 1.
    """
    descriptors, targets, patients = (
        np.asarray(descriptors),
        np.asarray(targets),
        np.asarray(patients),
    )
    n = len(descriptors)
    if len(targets) != n or len(patients) != n or k < 1:
        raise ValueError(
            f"expected one row an image and k >= 1, got {descriptors.shape}, {targets.shape}, {patients.shape} and k = {k}"
        )
    queries = np.sort(np.random.default_rng(seed).permutation(n)[:max_queries])
    others = nearest(descriptors, queries, k, patients)
    hit = np.where((others >= 0)[:, :, None], targets[others], np.nan).astype(float)  # (Q, k, F)
    shared = _nanmean_last(hit)
    codes = np.unique(patients, return_inverse=True)[1]
    size = np.bincount(codes)
    of_patient = np.zeros((len(size), targets.shape[1]))
    np.add.at(of_patient, codes, targets)
    remaining = n - size[codes[queries]]
    share = (targets.sum(axis=0) - of_patient[codes[queries]]) / np.maximum(remaining, 1)[:, None]
    precision, chance = np.full(targets.shape[1], np.nan), np.full(targets.shape[1], np.nan)
    for finding in range(targets.shape[1]):
        having = targets[queries, finding] & ~np.isnan(shared[:, finding])
        if having.any():
            precision[finding], chance[finding] = (
                shared[having, finding].mean(),
                share[having, finding].mean(),
            )
    several = np.flatnonzero(size[codes[queries]] > 1)
    same = same_chance = float("nan")
    if len(several):
        matches = nearest(descriptors, queries[several], k)
        same = float(
            ((codes[matches] == codes[queries[several]][:, None]) & (matches >= 0)).sum()
            / (matches >= 0).sum()
        )
        same_chance = float(((size[codes[queries[several]]] - 1) / (n - 1)).mean())
    return {
        "precision": precision,
        "chance": chance,
        "same_patient": same,
        "same_patient_chance": same_chance,
    }


def _nanmean_last(hit: np.ndarray) -> np.ndarray:
    """Mean over the matches that are there, (Q, k, F) to (Q, F); NaN if none is."""
    known = ~np.isnan(hit)
    number = known.sum(axis=1)
    return np.divide(
        np.where(known, hit, 0).sum(axis=1),
        number,
        out=np.full(number.shape, np.nan),
        where=number > 0,
    )
