"""The clusters of a run one by one: who is in them, who represents them, and which findings, and
which things that should not matter, they follow."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import confusion_matrix, pairwise_distances_chunked

from lib.data import finding_matrix, label_set
from lib.metrics import ami

CLINICAL, NUISANCE = "finding", "should not matter"
AGE_BANDS = {"age under 40": 0, "age 40 to 59": 40, "age 60 and over": 60}  # name: from, in years
QUARTERS = ("darkest quarter", "second quarter", "third quarter", "brightest quarter")
SEXES = {"F": "female", "M": "male"}
LEVEL = 0.05  # false-discovery rate at which a property is more frequent in a cluster
Property = tuple[str, np.ndarray, np.ndarray]  # kind, has (N,) bool, known (N,) bool


def brightness(images: np.ndarray) -> np.ndarray:
    """Mean gray value of each image, (N, H, W) uint8 to (N,), 0 to 255."""
    return np.asarray(images).reshape(len(images), -1).mean(axis=1)


def _nuisances(images: np.ndarray, metadata: pd.DataFrame) -> dict[str, pd.Series]:
    """View, sex, age band and quarter of brightness of each image; NaN if not known."""
    view, sex = (_known(metadata, column) for column in ("view_position", "sex"))
    age = metadata.get("age", pd.Series(np.nan, metadata.index)).astype(float)
    sex = sex.map(lambda value: SEXES.get(value, f"sex {value}"), na_action="ignore")
    band = pd.cut(age, [*AGE_BANDS.values(), np.inf], right=False, labels=list(AGE_BANDS))
    found = {"view_position": view + " view", "sex": sex, "age": band}
    if np.ndim(images) == 3:  # embeddings (N, D) have none
        gray = brightness(images)
        quarter = np.searchsorted(np.quantile(gray, (0.25, 0.5, 0.75)), gray)
        found["brightness"] = pd.Series(np.array(QUARTERS)[quarter], metadata.index)
    return found


def _known(metadata: pd.DataFrame, column: str) -> pd.Series:
    """A column of texts; NaN if it, or a text, is empty."""
    text = metadata.get(column, pd.Series("", metadata.index)).astype(object)
    return text.where(text != "")


def attributes(images: np.ndarray, metadata: pd.DataFrame) -> dict[str, Property]:
    """What is known of each image, (N, H, W) uint8 or embedding (N, D), as properties that it has
    or has not.

    `metadata` has ``findings``, and ``view_position, sex, age`` if known; empty texts and NaN are
    not known. Returns (kind, has, known) by name: kind is CLINICAL (the findings of
    `lib.data.label_set`) or NUISANCE (view, sex, age band, darkest and brightest quarter); has and
    known are bool (N,). Properties that no image or every image has are left out, and one of two
    that exclude each other."""
    texts, names = metadata["findings"], label_set(metadata)
    columns, labelled = finding_matrix(texts, names).T, (texts != "").to_numpy()
    found = {name: (CLINICAL, has, labelled) for name, has in zip(names, columns, strict=True)}
    for values in _nuisances(images, metadata).values():
        known = values.notna().to_numpy()
        there = sorted(set(values.dropna()) - {*QUARTERS[1:3]})
        for value in there[: 1 if values.nunique() == 2 else None]:
            found[value] = (NUISANCE, (values == value).to_numpy(), known)
    return {name: of for name, of in found.items() if len(np.unique(of[1][of[2]])) == 2}


def enrichment(assignments: np.ndarray, properties: Mapping[str, Property]) -> pd.DataFrame:
    """Each of `attributes` in each cluster against all others: Fisher's exact test (1922).

    Images of one patient are not independent, so p is too small if patients have many images. A
    small p in a large cluster may be a small effect: read the odds.

    One row per property and cluster: ``property, kind, cluster``; ``n``, images of the cluster of
    which the property is known; ``share`` of them that have it, ``elsewhere`` in all other
    clusters; ``log2_odds``, with 1/2 added to each count, so that it is finite; ``p``, two-sided;
    ``ami`` of the property and all clusters; ``q``, false-discovery rate over all rows (Benjamini
    and Hochberg 1995)."""
    rows = []
    for name, (kind, has, known) in properties.items():
        agreement = ami(assignments[known], has[known])
        for cluster in np.unique(assignments):
            inside = known & (assignments == cluster)
            outside = known & ~inside
            a, c = int((has & inside).sum()), int((has & outside).sum())
            n, m = int(inside.sum()), int(outside.sum())
            b, d = n - a, m - c
            odds = (a + 0.5) * (d + 0.5) / ((b + 0.5) * (c + 0.5))
            p = stats.fisher_exact([[a, b], [c, d]]).pvalue
            share, elsewhere = a / n if n else np.nan, c / m if m else np.nan
            numbers = n, share, elsewhere, np.log2(odds), p, agreement
            rows.append((name, kind, int(cluster), *numbers))
    columns = ("property", "kind", "cluster", "n", "share", "elsewhere", "log2_odds", "p", "ami")
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(q=stats.false_discovery_control(frame["p"]) if rows else [])


def reading(tables: Mapping[str, pd.DataFrame], titles: Mapping[str, str]) -> list[str]:
    """What the tables of `enrichment` say, one sentence per arm."""
    found, names = [], {CLINICAL: "findings", NUISANCE: "properties that should not matter"}
    rate = f"at a false-discovery rate of {LEVEL:g}"
    for arm, table in tables.items():
        parts = []
        for kind, rows in table.groupby("kind"):
            hits, n = rows[rows["q"] <= LEVEL], rows["property"].nunique()
            cells = f"({len(hits)} of {len(rows)} cells)"
            parts.append(f"{hits['property'].nunique()} of {n} {names[kind]} {cells}")
        differ = f"clusters differ in {' and in '.join(parts)}."
        found.append(f"{titles.get(arm, arm)}: {rate}, {differ}")
    return found


def drivers(assignments: np.ndarray, images: np.ndarray, metadata: pd.DataFrame) -> dict:
    """What clusters follow: their AMI, 0 by chance and 1 for the same partition, with ``findings``
    (label combinations), ``view_position``, ``sex``, ``age`` (bands), ``brightness`` (quarters) and
    ``patient`` (of several images). NaN if it is not known, or the same for all images."""
    patients, values = _known(metadata, "patient_id"), {}
    found = {"findings": _known(metadata, "findings"), **_nuisances(images, metadata)}
    found["patient"] = patients.where(patients.duplicated(keep=False))
    for name, column in found.items():
        known = column.notna().to_numpy()
        labels = column[known].astype(str)
        values[name] = ami(assignments[known], labels) if labels.nunique() > 1 else np.nan
    return values


@dataclass(frozen=True)
class Cluster:
    """One cluster, with rows of images."""

    number: int
    size: int
    medoid: int  # the image whose summed distance to the others is least
    nearest: np.ndarray  # to the centroid, the nearest first, without the medoid
    mean: np.ndarray  # (H, W) of its images, 0 to 255
    enriched: list  # (property, share, elsewhere, q): findings first, then by odds, largest first


def medoid(points: np.ndarray) -> int:
    """Row of the point (M, d) whose summed Euclidean distance to all others is least."""
    sums = pairwise_distances_chunked(points, reduce_func=lambda d, _: d.sum(axis=1))
    return int(np.argmin(np.concatenate(list(sums))))


def atlas(images, embedding, assignments, properties: Mapping, n_nearest: int = 7) -> list[Cluster]:
    """Describe the clusters of a run that have images, the largest first, with `n_nearest` images.

    `images` are uint8 (N, H, W); `embedding` (N, d) was clustered into `assignments` (N,);
    `properties` are `attributes`."""
    table = enrichment(assignments, properties)
    more = table[(table["q"] <= LEVEL) & (table["log2_odds"] > 0)]
    more = more.sort_values(["kind", "log2_odds", "property"], ascending=[True, False, True])
    numbers, sizes = np.unique(assignments, return_counts=True)
    found = []
    for number in numbers[np.argsort(-sizes, kind="stable")]:
        members = np.flatnonzero(assignments == number)
        points = np.asarray(embedding[members], dtype=np.float64)
        middle = members[medoid(points)]
        away = np.linalg.norm(points - points.mean(axis=0), axis=1)
        order = members[np.argsort(away, kind="stable")]
        nearest, mean = order[order != middle][:n_nearest], images[members].mean(axis=0)
        rows = more.loc[more["cluster"] == number, ["property", "share", "elsewhere", "q"]]
        enriched = list(rows.itertuples(index=False, name=None))
        found.append(Cluster(int(number), len(members), int(middle), nearest, mean, enriched))
    return found


def follow(assignments: np.ndarray) -> np.ndarray:
    """Number clusters, int (epochs, N), through time: each gets the number of the one it becomes.

    K-means numbers clusters anew at each epoch. From the last epoch backwards, the clusters of an
    epoch are paired with those of the next so that the most images keep their number (Kuhn 1955,
    *The Hungarian method for the assignment problem*). The last epoch keeps its numbers."""
    followed = np.array(assignments, dtype=np.int64)
    k = int(followed.max()) + 1
    for epoch in range(len(followed) - 2, -1, -1):
        shared = confusion_matrix(followed[epoch], followed[epoch + 1], labels=range(k))
        followed[epoch] = linear_sum_assignment(shared, maximize=True)[1][followed[epoch]]
    return followed


def stability(assignments: np.ndarray) -> np.ndarray:
    """How well each final cluster was there at each epoch, (epochs, K): its largest Jaccard index,
    0 to 1, with any cluster of that epoch; NaN for a cluster that is empty at the last.

    `assignments` are int (epochs, N). Hennig 2007, *Cluster-wise assessment of cluster stability*,
    section 2, with epochs in the place of resamples."""
    found = []
    for labels in assignments:
        shared = confusion_matrix(labels, assignments[-1], labels=range(assignments.max() + 1))
        union = shared.sum(axis=1, keepdims=True) + shared.sum(axis=0) - shared
        best = (shared / np.maximum(union, 1)).max(axis=0)
        found.append(np.where(shared.sum(axis=0) > 0, best, np.nan))
    return np.stack(found)
