"""What is measured on a finished run, and on the baselines it must be read beside."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

from lib import metrics
from lib.data import finding_matrix, label_combinations
from lib.deepcluster import cluster
from lib.features import extract, normalise
from lib.images import rotate
from lib.memory import freed_memory_kept
from lib.runs import Run, TrainConfig, assign, embed, load_model
from lib.study.schema import ANYTHING, FLAG, NUMBER, TEXT, WHOLE, problems

SYMMETRIES = tuple((mirrored, turns) for mirrored in (False, True) for turns in range(4))
ANGLES = (15.0, 30.0, 45.0, 60.0, 75.0)
PIXELS = "pixels"  # arm of the raw-pixel baseline


def pixel_features(images: np.ndarray) -> np.ndarray:
    """Raw pixels as features: (N, 64, 64) uint8 -> (N, 4096) float32 in [-1, 1]. The baseline that
    knows no network.
    """
    return normalise(torch.from_numpy(np.array(images))).flatten(1).numpy()


def evaluate_features(
    features: np.ndarray,
    embedding: np.ndarray,
    assignments: np.ndarray,
    metadata: pd.DataFrame,
    seed: int = 0,
    n_boot: int = 1000,
) -> dict[str, Any]:
    """Probes of frozen features, and how the clusters agree with the labels.

    Parameters
    ----------
    features : ndarray, shape (N, D)
        What the probes read.
    embedding : ndarray, shape (N, d)
        The same after PCA, whitening and L2: what was clustered.
    assignments : ndarray, shape (N,)
        The clusters of the embedding.
    metadata : DataFrame, N rows
        ``patient_id``, ``findings``, ``split``. Images with no findings text are left out of what
        needs labels. If a patient_id is empty, intervals are over images, and a warning says so.

    Returns
    -------
    dict
        ``clusters``, ``label_combinations`` (see ``metrics.probe``), ``findings`` (see
        ``metrics.findings_auroc``), ``labels`` with NMI and AMI of clusters with label combinations
        and the NMI of a permutation, ``structure`` (see ``metrics.cluster_structure``). What the
        data cannot tell is None.
    """
    train, test = (np.flatnonzero(metadata["split"] == part) for part in ("train", "test"))
    patients = metadata["patient_id"].to_numpy()
    if not (patients != "").all():  # an empty id is no patient whom all these images share
        warnings.warn(
            "some images have no patient id: intervals are over images, and no patient can be kept on one side",
            stacklevel=2,
        )
        patients = None
    numbers: dict[str, Any] = {
        "clusters": None,
        "label_combinations": None,
        "findings": None,
        "labels": None,
        "structure": metrics.cluster_structure(embedding, assignments, seed=seed),
    }
    options = {"groups": patients, "seed": seed, "n_boot": n_boot}
    if len(train) and len(test):
        numbers["clusters"] = metrics.probe(features, assignments, train, test, **options)
    codes = label_combinations(metadata["findings"])
    labelled = codes >= 0
    train, test = train[labelled[train]], test[labelled[test]]
    if len(train) and len(test):
        numbers["label_combinations"] = metrics.probe(features, codes, train, test, **options)
        numbers["findings"] = metrics.findings_auroc(
            features, finding_matrix(metadata["findings"]), train, test, **options
        )
    if labelled.any():
        numbers["labels"] = {
            "nmi": metrics.nmi(assignments[labelled], codes[labelled]),
            "ami": metrics.ami(assignments[labelled], codes[labelled]),
            "nmi_permuted": metrics.chance_nmi(assignments[labelled], codes[labelled], seed=seed),
        }
    return numbers


@freed_memory_kept()
def evaluate_pixels(
    images: np.ndarray, metadata: pd.DataFrame, config: TrainConfig, n_boot: int = 1000
) -> dict[str, Any]:
    """The same measures for raw pixels, clustered with the arms' own PCA size, K and seed. No
    training.
    """
    features = pixel_features(images)
    assignments, whiten, _ = cluster(features, config, config.epochs + 1)
    return evaluate_features(
        features, np.asarray(whiten.transform(features)), assignments, metadata, config.seed, n_boot
    )


@freed_memory_kept()
def evaluate_run(run: Run, metadata: pd.DataFrame, n_boot: int = 1000) -> dict[str, Any]:
    """`evaluate_features` of a finished run's last features and clusters."""
    features = np.asarray(run.features)
    return evaluate_features(
        features, embed(run, features), run.final_assignments, metadata, run.config.seed, n_boot
    )


def evaluate_training(run: Run, seed: int = 0) -> dict[str, Any]:
    """Numbers of the curves: convergence, stability, chance level (defined in ``lib.metrics``).
    Empty where the run has no two epochs.
    """
    curve = run.metrics["nmi_prev"].dropna().to_numpy()
    loss = run.metrics["loss"].to_numpy()
    if not len(curve):
        return {}
    number, size = metrics.increases(loss)
    return {
        "nmi_final": float(curve[-1]),
        "ami_final": float(run.metrics["ami_prev"].iloc[-1]),
        "nmi_chance": metrics.chance_nmi(run.assignments[-2], run.assignments[-1], seed=seed),
        "converged_at": 1 + metrics.convergence_epoch(curve),  # the curve starts at epoch 2
        "nmi_sd": metrics.stability(curve),
        "loss_increases": number,
        "loss_increase_size": size,
        "loss_final": float(loss[-1]),
        "largest_cluster": float(run.metrics["largest_cluster"].iloc[-1]),
        "clusters_used": int(run.metrics["clusters_used"].iloc[-1]),
    }


@freed_memory_kept()
def evaluate_symmetry(
    run: Run, images: np.ndarray, sample: int = 256, seed: int = 0
) -> dict[str, Any]:
    """Share of images that keep their cluster when they are turned or mirrored.

    Parameters
    ----------
    images : ndarray uint8, shape (N, 64, 64)
    sample : int
        At most this many images are tried.

    Returns
    -------
    dict
        ``symmetries``, 8 shares in the order of SYMMETRIES (the first is the image itself),
        ``lattice`` the mean of the seven others, ``angles`` share for each of ANGLES degrees (black
        corners, bilinear), ``free`` their mean, ``n``.
    """
    index = np.sort(
        np.random.default_rng(seed).choice(len(images), min(sample, len(images)), replace=False)
    )
    chosen = np.array(images[index])
    model = load_model(run)

    def clusters_of(moved: np.ndarray) -> np.ndarray:
        return assign(run, extract(model, np.ascontiguousarray(moved)))

    reference = clusters_of(chosen)
    symmetric = [
        np.rot90(chosen[:, :, ::-1] if mirrored else chosen, turns, (1, 2))
        for mirrored, turns in SYMMETRIES
    ]
    x = normalise(torch.from_numpy(chosen))
    turned = [
        ((rotate(x, torch.full((len(x),), a)) + 1) * 127.5)
        .round()
        .clamp(0, 255)
        .byte()[:, 0]
        .numpy()
        for a in ANGLES
    ]
    symmetries = metrics.kept_share(reference, np.stack([clusters_of(m) for m in symmetric]))
    free = metrics.kept_share(reference, np.stack([clusters_of(m) for m in turned]))
    return {
        "symmetries": symmetries.tolist(),
        "lattice": float(symmetries[1:].mean()),
        "angles": dict(zip(map(str, ANGLES), free.tolist(), strict=True)),
        "free": float(free.mean()),
        "n": len(chosen),
    }


_MAYBE = (NUMBER, None)
_PROBE = {
    **dict.fromkeys(("accuracy", "low", "high", "majority", "chance"), NUMBER),
    **dict.fromkeys(("n_classes", "n_train", "n_test", "unseen"), WHOLE),
    "converged": FLAG,
}
_AUROC = {
    **dict.fromkeys(("mean", "low", "high"), _MAYBE),
    **{key: [_MAYBE] for key in ("per_finding", "per_finding_low", "per_finding_high")},
    "n_findings": WHOLE,
    "converged": FLAG,
}
_TRAINING = {
    **{
        f"{name}?": NUMBER
        for name in (
            "nmi_final",
            "ami_final",
            "nmi_chance",
            "loss_increase_size",
            "loss_final",
            "largest_cluster",
        )
    },
    **{f"{name}?": WHOLE for name in ("loss_increases", "clusters_used")},
    "converged_at?": _MAYBE,
    "nmi_sd?": _MAYBE,  # of a single epoch there is none
}
SCHEMA: dict[str, Any] = {
    **dict.fromkeys(("dataset", "dataset_label", "attribution"), TEXT),
    **dict.fromkeys(("n_images", "n_patients", "n_test", "n_clusters"), WHOLE),
    "seeds": [WHOLE],
    "arms": {
        "*": {
            "parameters": WHOLE,
            "config": {"*": ANYTHING},  # as lib.runs.TrainConfig
            "seeds": {
                "*": {
                    "features": {
                        "clusters": (_PROBE, None),
                        "label_combinations": (_PROBE, None),
                        "findings": (_AUROC, None),
                        "labels": (dict.fromkeys(("nmi", "ami", "nmi_permuted"), NUMBER), None),
                        "structure": dict.fromkeys(("silhouette", "davies_bouldin"), _MAYBE),
                    },
                    "training?": _TRAINING,
                    "symmetry?": {
                        "symmetries": [NUMBER],
                        "angles": {"*": NUMBER},
                        **dict.fromkeys(("lattice", "free"), NUMBER),
                        "n": WHOLE,
                    },
                    "ln_k?": NUMBER,
                }
            },
        }
    },
}


def validate(results: Any) -> Iterator[str]:
    """Problems of results.json against `SCHEMA`, one line each; none if it fits."""
    return problems(results, SCHEMA, "results")
