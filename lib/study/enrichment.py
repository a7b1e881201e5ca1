"""Do clusters mean anything clinical? Which findings, and which things that should not matter, are
over-represented in which cluster.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import stats

from lib.data import FINDINGS, finding_matrix
from lib.metrics import ami

AGE_BANDS = ((0, 40), (40, 60), (60, 200))
CLINICAL, NUISANCE = "finding", "should not matter"


def brightness(images: np.ndarray) -> np.ndarray:
    """Mean gray value of each image, (N, H, W) uint8 to (N,), 0 to 255."""
    return np.asarray(images).reshape(len(images), -1).mean(axis=1)


def attributes(
    images: np.ndarray, metadata: pd.DataFrame
) -> dict[str, tuple[str, np.ndarray, np.ndarray]]:
    """What is known of each image, as properties that it has or has not.

    Parameters
    ----------
    images : uint8, shape (N, H, W)
    metadata : DataFrame, N rows
        ``findings``, ``view_position``, ``sex``, ``age``; empty text and NaN mean not known.

    Returns
    -------
    dict of name to (kind, has, known)
        kind is CLINICAL (the 14 findings) or NUISANCE (view, sex, age band, brightness quartile);
        has and known are bool (N,): the property, and whether it is known of the image. Properties
        that no image or every image has are left out.
    """
    findings = metadata["findings"].fillna("")
    labelled = (findings != "").to_numpy()
    found = {
        name: (CLINICAL, column, labelled)
        for name, column in zip(FINDINGS, finding_matrix(findings).T, strict=True)
    }
    for column, values in (("view_position", ("AP",)), ("sex", ("F",))):
        if column in metadata:
            text = metadata[column].fillna("").astype(str)
            for value in values:
                found[{"AP": "AP view", "F": "female"}[value]] = (
                    NUISANCE,
                    (text == value).to_numpy(),
                    (text != "").to_numpy(),
                )
    if "age" in metadata:
        age = metadata["age"].to_numpy(dtype=float)
        for low, high in AGE_BANDS:
            name = (
                f"age under {high}"
                if low == 0
                else f"age {low} and over"
                if high >= 200
                else f"age {low} to {high - 1}"
            )
            found[name] = (NUISANCE, (age >= low) & (age < high), np.isfinite(age))
    gray = brightness(images)
    low, high = np.quantile(gray, (0.25, 0.75))
    everywhere = np.ones(len(gray), dtype=bool)
    found["darkest quarter"] = (NUISANCE, gray <= low, everywhere)
    found["brightest quarter"] = (NUISANCE, gray >= high, everywhere)
    return {
        name: (kind, has, known)
        for name, (kind, has, known) in found.items()
        if known.any() and 0 < has[known].mean() < 1
    }


def enrichment(
    assignments: np.ndarray, properties: Mapping[str, tuple[str, np.ndarray, np.ndarray]]
) -> pd.DataFrame:
    """Each property in each cluster against all other clusters: Fisher's exact test (Fisher 1922),
    false-discovery rate over the table.

    Images of one patient are not independent, so p is too small where patients have many images:
    read `patient_together` beside it. A small p in a large cluster may be a small effect: read the
    ratio.

    Parameters
    ----------
    assignments : (N,) int
    properties : mapping of name to (kind, has, known)
        As `attributes` gives them.

    Returns
    -------
    DataFrame
        One row a property and cluster: ``property, kind, cluster, n`` (images of the cluster of
        which it is known), ``share`` in the cluster, ``elsewhere`` (share in all others),
        ``log2_odds`` (with 1/2 added to each cell, so that it is finite), ``p`` (two-sided), ``q``
        (Benjamini and Hochberg 1995, over all rows).

    Raises
    ------
    ValueError
        Lengths that differ.
    """
    assignments = np.asarray(assignments)
    rows = []
    for name, (kind, has, known) in properties.items():
        if len(has) != len(assignments) or len(known) != len(assignments):
            raise ValueError(
                f"property {name!r} is of {len(has)} images, the assignments of {len(assignments)}"
            )
        for cluster in np.unique(assignments):
            inside = assignments == cluster
            table = [
                [int((part & known & (has == value)).sum()) for value in (True, False)]
                for part in (inside, ~inside)
            ]
            (a, b), (c, d) = table
            rows.append(
                {
                    "property": name,
                    "kind": kind,
                    "cluster": int(cluster),
                    "n": a + b,
                    "share": a / (a + b) if a + b else np.nan,
                    "elsewhere": c / (c + d) if c + d else np.nan,
                    "log2_odds": float(np.log2((a + 0.5) * (d + 0.5) / ((b + 0.5) * (c + 0.5)))),
                    "p": float(stats.fisher_exact(table).pvalue),
                }
            )
    frame = pd.DataFrame(
        rows, columns=["property", "kind", "cluster", "n", "share", "elsewhere", "log2_odds", "p"]
    )
    frame["q"] = stats.false_discovery_control(frame["p"]) if len(frame) else []
    return frame


def patient_together(
    assignments: np.ndarray, patients: np.ndarray, seed: int = 0, repeats: int = 200
) -> dict[str, float]:
    """Do the images of one patient fall into one cluster? Pairs of images of one patient, against
    shuffled clusters.

    Returns
    -------
    dict
        ``share``, of all pairs of one patient, those in one cluster; ``expected``, the exact mean
        when clusters are shuffled among all images, sum over clusters of n_c (n_c - 1) / (N (N -
        1)); ``p``, share of shuffles (the data counted as one) with at least as many; ``pairs``.
        NaN without a pair.
    """
    assignments, codes = (
        np.unique(assignments, return_inverse=True)[1],
        np.unique(patients, return_inverse=True)[1],
    )
    n = len(assignments)

    def together(labels: np.ndarray) -> float:
        both = np.unique(codes * (labels.max() + 1) + labels, return_counts=True)[1]
        return float((both * (both - 1)).sum())

    sizes, clusters = np.bincount(codes).astype(float), np.bincount(assignments).astype(float)
    pairs = (sizes * (sizes - 1)).sum()
    if pairs == 0:
        return {"share": float("nan"), "expected": float("nan"), "p": float("nan"), "pairs": 0}
    rng = np.random.default_rng(seed)
    observed = together(assignments)
    shuffled = np.array([together(rng.permutation(assignments)) for _ in range(repeats)])
    return {
        "share": float(observed / pairs),
        "expected": float((clusters * (clusters - 1)).sum() / (n * (n - 1))),
        "p": float((1 + (shuffled >= observed).sum()) / (1 + repeats)),
        "pairs": int(pairs // 2),
    }


def drivers(
    assignments: np.ndarray, images: np.ndarray, metadata: pd.DataFrame
) -> dict[str, float]:
    """AMI of the clusters with what they may follow: 0 by chance, 1 if they are the same partition.

    Returns
    -------
    dict
        ``findings`` (the label combinations), ``view_position``, ``sex``, ``age`` (bands),
        ``brightness`` (quartiles), ``patient`` (patients with at least two images). NaN where it is
        not known or all alike.
    """
    assignments = np.asarray(assignments)
    age = (
        metadata["age"].to_numpy(dtype=float)
        if "age" in metadata
        else np.full(len(metadata), np.nan)
    )
    patients = metadata["patient_id"].astype(str)
    several = patients.map(patients.value_counts()) > 1
    quarter = np.searchsorted(
        np.quantile(brightness(images), (0.25, 0.5, 0.75)), brightness(images)
    )
    columns = {
        "findings": metadata["findings"].fillna("").astype(str),
        **{
            name: metadata[name].fillna("").astype(str)
            for name in ("view_position", "sex")
            if name in metadata
        },
        "age": pd.Series(
            np.where(
                np.isfinite(age),
                np.digitize(age, [low for low, _ in AGE_BANDS[1:]]).astype(str),
                "",
            )
        ),
        "brightness": pd.Series(quarter.astype(str)),
        "patient": patients.where(several, ""),
    }
    found = {}
    for name, values in columns.items():
        known = (values != "").to_numpy()
        labels = values.to_numpy()[known]
        found[name] = ami(assignments[known], labels) if len(set(labels)) > 1 else float("nan")
    return found


def reading(
    tables: Mapping[str, pd.DataFrame], titles: Mapping[str, str], level: float = 0.05
) -> list[str]:
    """What the tables of `enrichment` say, one sentence an arm: of how many findings, and of how
    many other properties, clusters know.
    """
    found = []
    for arm, table in tables.items():
        parts = []
        for kind, name in ((CLINICAL, "findings"), (NUISANCE, "properties that should not matter")):
            some = table[table["kind"] == kind]
            hits = some[some["q"] <= level]
            if len(some):
                parts.append(
                    f"{hits['property'].nunique()} of {some['property'].nunique()} {name} ({len(hits)} of {len(some)} cells)"
                )
        found.append(
            f"{titles.get(arm, arm)}: at a false-discovery rate of {level:g}, clusters differ in {' and in '.join(parts)}."
        )
    return found
