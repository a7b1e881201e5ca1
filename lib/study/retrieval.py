"""Image retrieval with R-MAC descriptors, and what it finds."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.preprocessing import normalize
from sklearn.utils import check_consistent_length
from torch import Tensor, nn

from lib.features import extract
from lib.models import Backbone
from lib.study.scores import mean_known


def regions(size: int, levels: int = 3) -> list[tuple[int, int, int]]:
    """Square regions of a square map, as R-MAC lays them out: (top, left, side) in pixels.

    At level l, l x l squares of side 2 size / (l + 1) are spread evenly over the map (Tolias, Sicre
    and Jegou 2016, section 3.2). Places are rounded so that the regions are their own mirror image:
    a map and its turned copy then have the same descriptor.
    """
    found = {}  # in order, and once: on small maps levels share regions
    for level in range(1, levels + 1):
        side = max(1, 2 * size // (level + 1))
        room = size - side
        starts = {room * k // max(level - 1, 1) for k in range(level)}
        places = sorted(starts | {room - start for start in starts})
        found |= dict.fromkeys((top, left, side) for top in places for left in places)
    return list(found)


def rmac(maps: Tensor, levels: int = 3) -> Tensor:
    """Regional maximum activation of convolutions: (N, C, H, H), not negative, to unit vectors (N,
    C).

    The maximum of each channel over each of `regions`, scaled to unit length, summed over regions
    and scaled again (Tolias, Sicre and Jegou 2016, *Particular object retrieval with integral
    max-pooling of CNN activations*, section 3.2). Their PCA-whitening of the regional vectors is
    left out: it would have to be learnt on other images. A map of zeros gives zeros.
    """
    vectors = [
        maps[:, :, top : top + side, left : left + side].amax((2, 3))
        for top, left, side in regions(maps.shape[2], levels)
    ]
    unit = nn.functional.normalize
    return unit(sum(unit(vector, dim=1) for vector in vectors), dim=1)


class _Describer(nn.Module):
    """A network whose features are its R-MAC descriptors, for `lib.features.extract`."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = model

    def features(self, x: Tensor) -> Tensor:
        return rmac(self.model.maps(x))


def describe(model: Backbone, images: np.ndarray, device: str | torch.device = "cpu") -> np.ndarray:
    """R-MAC descriptors (N, C) of images (N, 64, 64) uint8 from the last maps, `centred`."""
    return centred(extract(_Describer(model), images, device=device))


def centred(vectors: np.ndarray) -> np.ndarray:
    """Vectors (N, C) without their mean, scaled to unit length: activations and pixels are not
    negative, so that all images would look alike otherwise.
    """
    return normalize(vectors - vectors.mean(axis=0))


def nearest(
    descriptors: np.ndarray, queries: np.ndarray, k: int, patients: np.ndarray | None = None
) -> np.ndarray:
    """The k images (Q, k) most similar by cosine to each query, most similar first.

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
        Rows of `descriptors`; -1 if there are fewer than k others.
    """
    own = np.arange(len(descriptors)) if patients is None else patients
    found = np.full((len(queries), k), -1)
    for start in range(0, len(queries), 128):  # (Q, N) at once would be too large
        some = queries[start : start + 128]
        similarity = descriptors[some] @ descriptors.T
        similarity[own[some][:, None] == own] = -np.inf
        order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        there = np.isfinite(np.take_along_axis(similarity, order, axis=1))
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
        At most this many images, drawn from `seed`, are queries.

    Returns
    -------
    dict
        ``precision`` (F,): of the queries that have a finding, the mean share of the k nearest
        images *of other patients* that have it; ``chance`` (F,), the same for images of other
        patients drawn at random; NaN if no query has it. ``same_patient``: of the queries whose
        patient has other images, the share of the k nearest that are of this patient, if they may
        be; ``same_patient_chance``, by chance. A method that finds the patient again, by devices,
        framing or body shape, scores high on these and says nothing of disease.
    """
    check_consistent_length(descriptors, targets, patients)
    n, codes = len(descriptors), np.unique(patients, return_inverse=True)[1]
    queries = np.sort(np.random.default_rng(seed).permutation(n)[:max_queries])
    others = nearest(descriptors, queries, k, codes)
    hits = np.where((others >= 0)[:, :, None], targets[others], np.nan)  # (Q, k, F)
    shared = mean_known(hits, axis=1)
    size, of_patient = np.bincount(codes), np.zeros((codes.max() + 1, targets.shape[1]))
    np.add.at(of_patient, codes, targets)
    asked = codes[queries]
    share = (targets.sum(axis=0) - of_patient[asked]) / np.maximum(n - size[asked], 1)[:, None]
    having = targets[queries] & ~np.isnan(shared)
    several = queries[size[asked] > 1]
    matches = nearest(descriptors, several, k)
    same = np.where(matches >= 0, codes[matches] == codes[several][:, None], np.nan)
    chance = (size[codes[several]] - 1) / max(n - 1, 1)
    return {
        "precision": mean_known(np.where(having, shared, np.nan), axis=0),
        "chance": mean_known(np.where(having, share, np.nan), axis=0),
        "same_patient": float(mean_known(same[None], axis=(1, 2))[0]),
        "same_patient_chance": float(mean_known(chance[None], axis=1)[0]),
    }
