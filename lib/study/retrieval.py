"""Image retrieval with R-MAC descriptors, and what it finds."""

import numpy as np
import pandas as pd
import torch
from sklearn.preprocessing import normalize
from torch import Tensor, nn
from torch.nn import functional as F

from lib.features import extract
from lib.models import Backbone
from lib.study.scores import mean_known

MOST_QUERIES = 1000


def regions(size: int, levels: int = 3) -> list[tuple[int, int, int]]:
    """Square regions of a square map, as R-MAC lays them out: (top, left, side) in pixels.

    At level l, l x l squares of side 2 size / (l + 1) are spread evenly over the map. Places are
    rounded so that the regions of a map are those of its turned and mirrored copies."""
    found = {}  # in order, and once: on small maps levels share regions
    for level in range(1, levels + 1):
        side = max(1, 2 * size // (level + 1))
        room = size - side
        starts = {room * k // max(level - 1, 1) for k in range(level)}
        places = sorted(starts | {room - start for start in starts})
        found |= dict.fromkeys((top, left, side) for top in places for left in places)
    return list(found)


def rmac(maps: Tensor, levels: int = 3) -> Tensor:
    """Regional maximum activation of convolutions: maps (N, C, H, H) >= 0 to unit vectors (N, C).

    The maximum of each channel over each of `regions`, scaled to unit length, summed over regions
    and scaled again (Tolias, Sicre and Jegou 2016, *Particular object retrieval with integral
    max-pooling of CNN activations*, section 3.2). Their PCA-whitening of the regional vectors is
    left out: it would have to be learnt on other images. A map of zeros gives zeros."""
    total = torch.zeros_like(maps[:, :, 0, 0])
    for top, left, side in regions(maps.shape[2], levels):
        region = maps[:, :, top : top + side, left : left + side]
        total += F.normalize(region.amax((2, 3)))
    return F.normalize(total)


def describe(model: Backbone, images: np.ndarray, device: str | torch.device = "cpu") -> np.ndarray:
    """R-MAC descriptors (N, C) of images (N, 64, 64) uint8 from the last maps, `centred`."""
    describer = nn.Module()  # `extract` asks a module for its features
    describer.model, describer.features = model, lambda x: rmac(model.maps(x))
    return centred(extract(describer, images, device=device))


def centred(vectors: np.ndarray) -> np.ndarray:
    """Vectors (N, C) without their mean, which all images share, scaled to unit length."""
    return normalize(vectors - vectors.mean(axis=0))


def nearest(descriptors: np.ndarray, queries: np.ndarray, k: int, patients=None) -> np.ndarray:
    """The k images (Q, k) most similar by cosine to each query, most similar first.

    `queries` (Q,) and the result are rows of `descriptors` (N, C) of unit length; -1 if there are
    fewer than k. A query is not its own match, nor, with `patients` (N,), another of its patient.
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


def precision_at_k(descriptors: np.ndarray, targets: np.ndarray, patients, k: int = 5) -> dict:
    """How often the k images nearest to a query share its findings, or are of the same patient.

    At most 1,000 images are queries, drawn at random; `descriptors` (N, C) of unit length,
    `targets` (N, F) bool, `patients` (N,). Returns ``precision`` (F,): of the queries that have a
    finding, the mean share of the k nearest images *of other patients* that have it; ``chance``
    (F,), of all images of other patients; NaN if no query has it. ``same_patient``: of the queries
    whose patient has other images, the mean share of the k nearest that are of this patient, which
    says nothing of disease; ``same_patient_chance``, of all."""
    n, by_patient = len(targets), pd.DataFrame(targets).groupby(patients)
    size = by_patient.transform("size").to_numpy()  # (N,), images of the same patient
    theirs = by_patient.transform("sum").to_numpy()  # (N, F), those of them with the finding
    rest = (targets.sum(axis=0) - theirs) / np.maximum(n - size, 1)[:, None]
    queries = np.sort(np.random.default_rng(0).permutation(n)[:MOST_QUERIES])
    others = nearest(descriptors, queries, k, patients)
    hits = np.where((others >= 0)[:, :, None], targets[others], np.nan)  # (Q, k, F)
    precision = np.where(targets[queries], mean_known(hits, axis=1), np.nan)  # (Q, F)
    chance = np.where(np.isnan(precision), np.nan, rest[queries])
    several = queries[size[queries] > 1]
    matches = nearest(descriptors, several, k)
    same = np.where(matches >= 0, patients[matches] == patients[several][:, None], np.nan)
    found = {"precision": mean_known(precision, axis=0), "chance": mean_known(chance, axis=0)}
    of_all = mean_known((size[several] - 1) / (n - 1))
    return found | {"same_patient": float(mean_known(same)), "same_patient_chance": float(of_all)}
