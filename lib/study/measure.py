"""Everything that is measured on one finished run, kept beside it, so that comparing runs costs
nothing.

`lib.metrics` defines the numbers, `lib.study.claims` compares them between arms. Each function here
is given the images and the labels; nothing here trains a network."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import expit
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from lib import metrics, paths
from lib.data import finding_matrix, label_combinations, patient_groups
from lib.data.phantom import make_phantoms
from lib.deepcluster import cluster, resolve_device
from lib.features import extract, normalise
from lib.images import rotate
from lib.memory import freed_memory_kept
from lib.runs import Run, TrainConfig, assign, embed, load_model
from lib.study import enrichment, retrieval
from lib.study.evaluate import SYMMETRIES, pixel_features

FORMAT = 2  # raise it when a number would come out differently: what was measured before is then measured again
NAME, SCORES = "measures.json", "scores.npz"
PIXELS, RANDOM = (
    "pixels",
    "random",
)  # arms that are no network: raw pixels, and random assignments of them
ANGLES = tuple(range(0, 360, 15))
LEAST_SIDED = 10  # one-sided effusions in training and in test
MOVES = {"mirrored": (True, 0), "upside_down": (False, 2), "quarter_turn": (False, 1)}


@dataclass(frozen=True)
class Effort:
    """How much is looked at.

    Attributes
    ----------
    n_turned : int
        Images that are turned.
    n_moved : int
        Images of the probes for mirrored, upside-down and turned films.
    n_map : int
        Images of a t-SNE map.
    perplexities, map_seeds : tuple of int
        One map each; a single t-SNE proves nothing.
    n_neighbors : int
        Neighbours looked at in a map.
    k : int
        Matches retrieved.
    """

    n_turned: int = 96
    n_moved: int = 240
    n_map: int = 400
    perplexities: tuple[int, ...] = (10, 30)
    map_seeds: tuple[int, ...] = (0, 1)
    n_neighbors: int = 10
    k: int = 5


@dataclass(frozen=True)
class _Subject:
    """What is measured: a run, or a baseline that was never a network."""

    features: np.ndarray  # (N, D) of all images, what probes read
    embedding: np.ndarray  # (N, d), what was clustered
    assignments: np.ndarray  # (N,)
    extract: Callable[[np.ndarray], np.ndarray]  # images (M, 64, 64) -> features (M, D)
    embed: Callable[[np.ndarray], np.ndarray]
    assign: Callable[[np.ndarray], np.ndarray]
    describe: Callable[[np.ndarray], np.ndarray]  # images -> unit vectors to retrieve by
    seed: int


def of_run(
    run: Run,
    images: np.ndarray,
    metadata: pd.DataFrame,
    turned: np.ndarray | None = None,
    effort: Effort = Effort(),
    redo: bool = False,
) -> dict[str, Any]:
    """Measure a finished run, or read what was measured before.

    Parameters
    ----------
    run : Run
    images : ndarray uint8, shape (N, 64, 64)
    metadata : DataFrame, N rows
    turned : ndarray uint8, shape (N, 64, 64), optional
        The same scenes as `images`, each drawn turned and mirrored at random (see
        `turned_phantoms`).
    effort : Effort
    redo : bool
        Measure again.

    Returns
    -------
    dict
        ``values`` (one number a measure; None where the data cannot tell), ``details`` (curves,
        parts, tables), ``of`` (what was measured). Written to measures.json in the run's folder,
        with the image-by-image answers of the probes in scores.npz.
    """

    def measure() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        features, device = np.asarray(run.features), resolve_device(run.config.device)
        model = load_model(run, device)
        subject = _Subject(
            features,
            embed(run, features),
            run.final_assignments,
            lambda some: extract(model, some, device=device),
            lambda some: embed(run, some),
            lambda some: assign(run, some),
            lambda some: retrieval.describe(model, some, device),
            run.config.seed,
        )
        numbers, scores = _measure(subject, images, metadata, turned, effort)
        _add_training(numbers, run)
        return numbers, scores

    identity = {
        "run": _digest((run.path / "config.json").read_bytes(), np.asarray(run.features)),
        **_of(metadata, effort, turned),
    }
    return _kept(run.path, identity, measure, redo)


def of_pixels(
    folder: Path,
    images: np.ndarray,
    metadata: pd.DataFrame,
    config: TrainConfig,
    turned: np.ndarray | None = None,
    effort: Effort = Effort(),
    redo: bool = False,
    at_random: bool = False,
) -> dict[str, Any]:
    """The same for raw pixels, clustered with the arms' own PCA size, K and seed, or for random
    clusters of them.

    Parameters
    ----------
    folder : Path
        Where to keep the numbers.
    config : TrainConfig
        Of the arms; gives PCA size, K and seed.
    at_random : bool
        Clusters are drawn anew for every image that is asked about: the control that knows nothing
        at all. What would read pixels all the same is then left out.
    """

    def measure() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        features = pixel_features(images)
        clusters, whiten, kmeans = cluster(features, config, config.epochs + 1)
        transform = lambda some: np.asarray(whiten.transform(some))  # noqa: E731
        nearest = lambda some: np.asarray(kmeans.predict(transform(some)))  # noqa: E731
        if at_random:
            rng = np.random.default_rng([config.seed, 1])
            nearest = lambda some: rng.integers(config.n_clusters, size=len(some))  # noqa: E731
            clusters = nearest(features)

        def describe(some: np.ndarray) -> np.ndarray:
            vectors = pixel_features(some)
            vectors = vectors - vectors.mean(axis=0)
            return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

        subject = _Subject(
            features,
            transform(features),
            clusters,
            pixel_features,
            transform,
            nearest,
            describe,
            config.seed,
        )
        numbers, scores = _measure(
            subject, images, metadata, turned, effort, clusters_only=at_random
        )
        if at_random:
            other = nearest(features)
            numbers["values"] |= {
                "nmi_final": metrics.nmi(clusters, other),
                "ami_final": metrics.ami(clusters, other),
            }
            of_pixels = ("map_trust", "map_findings", "distance_")
            numbers["values"] = {
                name: value
                for name, value in numbers["values"].items()
                if not name.startswith(of_pixels)
            }
        return numbers, scores

    settings = {name: getattr(config, name) for name in ("n_clusters", "pca_dim", "seed", "epochs")}
    identity = {
        "run": _digest(repr((settings, at_random)).encode(), np.asarray(images)),
        **_of(metadata, effort, turned),
    }
    return _kept(folder, identity, measure, redo)


def turned_phantoms(dataset: str, images: np.ndarray) -> np.ndarray | None:
    """The same phantoms as in `images`, each mirrored with probability 1/2 and turned by a random
    angle *before* it is drawn.

    No pixel is interpolated and no corner is black, unlike when a picture is turned. None if
    `images` are not upright phantoms that can be drawn again."""
    source = paths.load_json(paths.dataset_dir(dataset) / "manifest.json")["source"]
    if source.get("kind") != "phantom" or "seed" not in source or "orientation" in source:
        return None
    again, table = make_phantoms(len(images), source["seed"])
    order = np.argsort(table["image_id"].to_numpy(), kind="stable")
    if not np.array_equal(again[order], images):
        return None
    return make_phantoms(len(images), source["seed"], "any")[0][order]


def scores_of(folder: Path) -> dict[str, np.ndarray]:
    """Image-by-image answers of the probes; empty if there are none.

    ``test`` (n,), rows of the images tested, and ``clusters`` (n,), whether the answer is right;
    ``labelled_test`` (m,), ``combinations`` (m,), right or not, and ``findings`` (m, 14), log-odds.
    """
    path = folder / SCORES
    if not path.exists():
        return {}
    with np.load(path) as stored:
        return dict(stored)


# --- the parts ------------------------------------------------------------------------------------


def _digest(*parts: bytes | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part))
    return digest.hexdigest()


def _of(metadata: pd.DataFrame, effort: Effort, turned: np.ndarray | None) -> dict[str, Any]:
    text = metadata.to_csv(index=False).encode()
    return {
        "format": FORMAT,
        "metadata": _digest(text),
        "effort": asdict(effort),
        "turned": turned is not None,
    }


def _kept(folder: Path, identity: dict[str, Any], measure: Callable, redo: bool) -> dict[str, Any]:
    """What measures.json holds if it is about the very same thing, else what `measure` finds."""
    path = folder / NAME
    identity = {
        **identity,
        "effort": {
            k: list(v) if isinstance(v, tuple) else v for k, v in identity["effort"].items()
        },
    }
    if path.exists() and not redo:
        try:
            there = paths.load_json(path)
        except ValueError:
            there = {}
        if there.get("of") == identity:
            return there
    with freed_memory_kept():
        numbers, scores = measure()
    if scores:
        with paths.atomic_write(folder / SCORES) as handle:
            np.savez(handle, **scores)
    # last: it vouches for the scores
    paths.save_json(path, {"of": identity, **numbers})
    return paths.load_json(path)


def _add_training(numbers: dict[str, Any], run: Run) -> None:
    """Convergence and stability, of a run with at least two epochs."""
    nmi, ami, loss = (
        run.metrics[name].dropna().to_numpy() for name in ("nmi_prev", "ami_prev", "loss")
    )
    if not len(nmi):
        return
    n_epochs, ln_k = len(run.metrics), math.log(run.config.n_clusters)

    def converged(curve: np.ndarray) -> float:
        first = 1 + metrics.convergence_epoch(curve)  # the curve starts at epoch 2
        return n_epochs + 1.0 if math.isnan(first) else first

    number, size = metrics.increases(loss)
    numbers["values"] |= {
        "converged_nmi": converged(nmi),
        "converged_ami": converged(ami),
        "nmi_sd": metrics.stability(nmi),
        "ami_sd": metrics.stability(ami),
        "loss_increases": number,
        "loss_increase_size": size / ln_k,
        "loss_final": float(loss[-1]) / ln_k,
        "nmi_final": float(nmi[-1]),
        "ami_final": float(ami[-1]),
        "nmi_chance": metrics.chance_nmi(
            run.assignments[-2], run.assignments[-1], seed=run.config.seed
        ),
    }


def _measure(
    subject: _Subject,
    images: np.ndarray,
    metadata: pd.DataFrame,
    turned: np.ndarray | None,
    effort: Effort,
    clusters_only: bool = False,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    values: dict[str, Any] = metrics.occupancy(
        subject.assignments, int(subject.assignments.max()) + 1
    )
    details: dict[str, Any] = {}
    with threadpool_limits(limits=1, user_api="blas"), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "the linear probe did not converge", RuntimeWarning
        )  # told in details instead
        scores = _transfer(subject, metadata, values, details, clusters_only)
        _structure(subject, metadata, effort, values, details)
        _invariance(subject, images, turned, effort, values, details)
        _meaning(subject, images, metadata, values)
        if not clusters_only:
            _laterality(subject, images, metadata, effort, values, details)
            _retrieval(subject, images, metadata, effort, values, details)
    return {"values": values, "details": details}, scores


def _transfer(
    subject: _Subject,
    metadata: pd.DataFrame,
    values: dict[str, Any],
    details: dict[str, Any],
    clusters_only: bool,
) -> dict[str, np.ndarray]:
    """The linear probe three ways, on patients that it was not fitted on."""
    features, patients = subject.features, patient_groups(metadata)
    train, test = (np.flatnonzero(metadata["split"] == part) for part in ("train", "test"))
    if not len(train) or not len(test):
        return {}
    scores: dict[str, np.ndarray] = {"test": test}
    options = {"groups": patients, "seed": subject.seed}
    found = metrics.probe(features, subject.assignments, train, test, n_boot=0, **options)
    values |= {
        "probe_clusters": found["accuracy"],
        "probe_clusters_majority": found["majority"],
        "probe_clusters_chance": found["chance"],
    }
    probabilities, classes = metrics.class_probabilities(
        features, subject.assignments, train, test, **options
    )
    scores["clusters"] = classes[probabilities.argmax(axis=1)] == subject.assignments[test]
    details["probe_converged"] = {"clusters": found["converged"]}
    codes = label_combinations(metadata["findings"])
    train, test = train[codes[train] >= 0], test[codes[test] >= 0]
    if clusters_only or not len(train) or not len(test):
        return scores
    probabilities, classes = metrics.class_probabilities(features, codes, train, test, **options)
    right = classes[probabilities.argmax(axis=1)] == codes[test]
    frequent = np.bincount(codes[train]).argmax()
    share = np.bincount(np.searchsorted(classes, codes[train]), minlength=len(classes)) / len(train)
    one_of = codes[test][:, None] == classes
    values |= {
        "probe_combinations": float(right.mean()),
        "probe_combinations_majority": float((codes[test] == frequent).mean()),
        "micro_combinations": _micro(probabilities, one_of),
        "micro_combinations_prevalence": _micro(np.tile(share, (len(test), 1)), one_of),
    }
    targets = finding_matrix(metadata["findings"])
    log_odds = metrics.finding_scores(features, targets, train, test, **options)
    averages = {
        name: value[0]
        for name, value in metrics.multilabel_scores(expit(log_odds), targets[test]).items()
    }
    guess = np.where(np.isnan(log_odds), np.nan, metrics.prevalence_guess(targets, train, test))
    blind = metrics.multilabel_scores(guess, targets[test])
    for name in ("auroc_macro", "auroc_micro", "ap_macro", "ap_micro"):
        values[name], values[f"{name}_prevalence"] = float(averages[name]), float(blind[name][0])
    details["findings"] = {
        "auroc": averages["auroc"],
        "ap": averages["ap"],
        "prevalence": targets[test].mean(axis=0),
    }
    return scores | {"labelled_test": test, "combinations": right, "findings": log_odds}


def _micro(probabilities: np.ndarray, targets: np.ndarray) -> float:
    return float(
        metrics.weighted_auroc(probabilities.ravel(), targets.ravel(), np.ones((1, targets.size)))[
            0
        ]
    )


def _structure(
    subject: _Subject,
    metadata: pd.DataFrame,
    effort: Effort,
    values: dict[str, Any],
    details: dict[str, Any],
) -> None:
    """Clusters in the space they were made in, and in several t-SNE maps of it."""
    values |= metrics.cluster_structure(subject.embedding, subject.assignments, seed=0)
    n = len(subject.embedding)
    index = np.sort(np.random.default_rng(0).choice(n, min(effort.n_map, n), replace=False))
    neighbours = min(effort.n_neighbors, (len(index) - 1) // 2 - 1)
    if neighbours < 1:
        return
    points, labels = subject.embedding[index], subject.assignments[index]
    targets = finding_matrix(metadata["findings"])[index]
    maps = []
    for perplexity in sorted({min(p, (len(index) - 1) // 3) for p in effort.perplexities}):
        for seed in effort.map_seeds:
            flat = TSNE(
                perplexity=perplexity, init="random", random_state=seed, n_jobs=1
            ).fit_transform(points)
            several = 1 < len(np.unique(labels)) < len(labels)
            maps.append(
                {
                    "perplexity": perplexity,
                    "seed": seed,
                    "trustworthiness": metrics.trustworthiness(points, flat, neighbours),
                    "findings": metrics.finding_neighbourhood(flat, targets, neighbours),
                    "silhouette": float(silhouette_score(flat, labels)) if several else math.nan,
                }
            )
    for name, key in (
        ("map_trust", "trustworthiness"),
        ("map_findings", "findings"),
        ("map_silhouette", "silhouette"),
    ):
        values[name] = float(np.mean([m[key] for m in maps]))
    details["maps"] = maps


def _moved(images: np.ndarray, mirrored: bool, turns: int) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(images[:, :, ::-1] if mirrored else images, turns, (1, 2)))


def _turned(images: np.ndarray, degrees: float) -> np.ndarray:
    """Pictures turned counter-clockwise, black corners; quarter turns exactly."""
    if degrees % 90 == 0:
        return _moved(images, False, round(degrees / 90) % 4)
    x = normalise(torch.from_numpy(np.array(images)))
    return (
        ((rotate(x, torch.full((len(x),), float(degrees))) + 1) * 127.5)
        .round()
        .clamp(0, 255)
        .byte()[:, 0]
        .numpy()
    )


def _invariance(
    subject: _Subject,
    images: np.ndarray,
    turned: np.ndarray | None,
    effort: Effort,
    values: dict[str, Any],
    details: dict[str, Any],
) -> None:
    """Who keeps the cluster, and how far features move, under the symmetries of the square and
    under free turns.
    """
    index = np.sort(
        np.random.default_rng(0).choice(
            len(images), min(effort.n_turned, len(images)), replace=False
        )
    )
    chosen = np.array(images[index])
    reference = subject.extract(chosen)
    home = subject.assign(reference)
    lattice = [subject.extract(_moved(chosen, *symmetry)) for symmetry in SYMMETRIES]
    free = [
        lattice[round(angle / 90) % 4]
        if angle % 90 == 0
        else subject.extract(_turned(chosen, angle))
        for angle in ANGLES
    ]
    for name, moved in (("symmetries", lattice), ("angles", free)):
        clusters = np.stack([subject.assign(some) for some in moved])
        details[name] = {
            "kept": metrics.kept_share(home, clusters),
            "ami": np.array([metrics.ami(home, some) for some in clusters]),
            "distance": metrics.relative_distance(
                subject.embed(reference), np.stack([subject.embed(some) for some in moved])
            ),
        }
    off = np.array([angle % 90 != 0 for angle in ANGLES])
    for key in ("kept", "ami", "distance"):
        values[f"{key}_lattice"] = float(np.mean(details["symmetries"][key][1:]))
        values[f"{key}_free"] = float(np.mean(details["angles"][key][off]))
    if turned is not None:
        drawn = subject.assign(subject.extract(np.array(turned[index])))
        values |= {
            "kept_drawn": float((drawn == home).mean()),
            "ami_drawn": metrics.ami(home, drawn),
        }


def _laterality(
    subject: _Subject,
    images: np.ndarray,
    metadata: pd.DataFrame,
    effort: Effort,
    values: dict[str, Any],
    details: dict[str, Any],
) -> None:
    """The price of invariance: can a linear classifier still tell left from right, and up from
    down?

    A film and its moved copy are both in the data, so 0.5 is chance, exactly so for features that
    cannot change. A mirrored film looks as in situs inversus."""
    patients = patient_groups(metadata)
    index = np.sort(
        np.random.default_rng(1).choice(
            len(images), min(effort.n_moved, len(images)), replace=False
        )
    )
    test = (metadata["split"] == "test").to_numpy()[index]
    if test.any() and not test.all():
        here = subject.extract(np.array(images[index]))
        for name, move in MOVES.items():
            features = np.concatenate(
                [here, subject.extract(_moved(np.array(images[index]), *move))]
            )
            answers = np.repeat([0, 1], len(index))
            both = np.tile(test, 2)
            options = {"groups": np.tile(patients[index], 2), "seed": subject.seed, "n_boot": 0}
            values[f"tells_{name}"] = metrics.probe(
                features, answers, np.flatnonzero(~both), np.flatnonzero(both), **options
            )["accuracy"]
    if "side" not in metadata:
        return
    one_sided = metadata["side"].isin(["L", "R"]) & metadata["findings"].fillna("").str.split(
        "|"
    ).map(lambda f: "Effusion" in f)
    index = np.flatnonzero(one_sided & metadata["split"].isin(["train", "test"]))
    here = np.tile((metadata["split"] == "test").to_numpy()[index], 2)
    details["effusions"] = {"train": int((~here).sum() // 2), "test": int(here.sum() // 2)}
    if min(details["effusions"].values()) < LEAST_SIDED:
        return
    # With its mirror image, whose effusion is on the other side, each film stands on both sides:
    # else the few effusions of the few patients on one side differ from those on the other in more
    # than the side, and a code that cannot know it seems to be wrong of it.
    features = np.concatenate(
        [subject.features[index], subject.extract(_moved(np.array(images[index]), True, 0))]
    )
    left = (metadata["side"] == "L").to_numpy()[index]
    targets, train, test = (
        np.concatenate([left, ~left])[:, None],
        np.flatnonzero(~here),
        np.flatnonzero(here),
    )
    found = metrics.findings_auroc(
        features,
        targets,
        train,
        test,
        groups=np.tile(patients[index], 2),
        seed=subject.seed,
        n_boot=0,
    )
    values["tells_effusion_side"] = found["mean"]


def _meaning(
    subject: _Subject, images: np.ndarray, metadata: pd.DataFrame, values: dict[str, Any]
) -> None:
    """Agreement of clusters with findings and with what should not matter."""
    codes = label_combinations(metadata["findings"])
    known = codes >= 0
    if known.any():
        values["nmi_findings"] = metrics.nmi(subject.assignments[known], codes[known])
        values["nmi_findings_chance"] = metrics.chance_nmi(
            subject.assignments[known], codes[known], seed=subject.seed
        )
    for name, value in enrichment.drivers(subject.assignments, images, metadata).items():
        values[f"follows_{name}"] = value
    together = enrichment.patient_together(
        subject.assignments, patient_groups(metadata), seed=subject.seed
    )
    values |= {
        "patient_together": together["share"],
        "patient_together_chance": together["expected"],
    }


def _retrieval(
    subject: _Subject,
    images: np.ndarray,
    metadata: pd.DataFrame,
    effort: Effort,
    values: dict[str, Any],
    details: dict[str, Any],
) -> None:
    """Precision at k by finding, and how often the same patient is found again."""
    some = np.flatnonzero(metadata["findings"].fillna("") != "")
    if not len(some):
        return
    targets, patients = finding_matrix(metadata["findings"])[some], patient_groups(metadata)[some]
    found = retrieval.precision_at_k(subject.describe(images)[some], targets, patients, effort.k)
    lift = found["precision"] - found["chance"]
    values |= {
        "retrieval_lift": float(np.nanmean(lift)) if np.isfinite(lift).any() else math.nan,
        "retrieval_same_patient": found["same_patient"],
        "retrieval_same_patient_chance": found["same_patient_chance"],
    }
    details["retrieval"] = {"precision": found["precision"], "chance": found["chance"]}
