"""Numbers that say how good a clustering is, and how sure one can be: arrays in, numbers out.

Every docstring gives the definition, the range and what the number cannot show.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.spatial.distance import pdist
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import trustworthiness as sklearn_trustworthiness
from sklearn.metrics import (
    adjusted_mutual_info_score,
    davies_bouldin_score,
    normalized_mutual_info_score,
    roc_curve,
    silhouette_score,
)
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

# ---------------------------------------------------------------- agreement of two clusterings


def nmi(a: ArrayLike, b: ArrayLike) -> float:
    """Normalised mutual information of two clusterings of the same images.

    I(a; b) / ((H(a) + H(b)) / 2), the arithmetic normalisation (Caron et al. 2018 use the geometric
    one in equation 3, which is never smaller). 0: independent, 1: equal up to renaming.

    It is not corrected for chance: two random clusterings of N images into K clusters already score
    well above 0 when N / K is small (see `chance_nmi`, `ami`). Between consecutive epochs it shows
    that a network agrees with itself, not that the clusters mean anything.

    Parameters
    ----------
    a, b : (N,)
        Labels: integers or strings.

    Raises
    ------
    ValueError
        Different lengths, no labels, or more than one axis.
    """
    return float(normalized_mutual_info_score(*_label_pair(a, b)))


def ami(a: ArrayLike, b: ArrayLike) -> float:
    """Adjusted mutual information (Vinh, Epps and Bailey 2010): `nmi` with the value expected by
    chance taken to 0.

    1: equal up to renaming; 0 in the mean for independent clusterings of the same sizes, so
    slightly negative values occur. It does not say which clusters agree, nor that agreement has a
    meaning. Parameters and errors as `nmi`."""
    return float(adjusted_mutual_info_score(*_label_pair(a, b)))


def chance_nmi(a: ArrayLike, b: ArrayLike, seed: int, repeats: int = 5) -> float:
    """Mean NMI of `a` with random permutations of `b`: what unrelated clusterings with these very
    cluster sizes score.

    In [0, 1]; the floor to draw under a curve of NMI. It grows with the number of clusters and
    falls with the number of images. Parameters and errors as `nmi`; `repeats` permutations, drawn
    from `seed`."""
    a, b = _label_pair(a, b)
    rng = np.random.default_rng(seed)
    return float(
        np.mean([normalized_mutual_info_score(a, rng.permutation(b)) for _ in range(repeats)])
    )


def occupancy(assignments: ArrayLike, n_clusters: int) -> dict[str, float]:
    """How evenly the images fill the clusters: signs of collapse.

    Parameters
    ----------
    assignments : (N,) int, 0 to n_clusters - 1
    n_clusters : int

    Returns
    -------
    dict
        ``clusters_used``, clusters with an image (1 to n_clusters); ``largest_cluster``, its share
        of the images (1 / n_clusters to 1); ``perplexity``, exp of the entropy of the sizes (1: all
        in one, n_clusters: all of equal size). Even sizes are no sign of quality: random
        assignments are perfectly even.

    Raises
    ------
    ValueError
        No assignments, or one outside 0 to n_clusters - 1.
    """
    labels = np.asarray(assignments)
    if labels.ndim != 1 or len(labels) == 0 or labels.min() < 0 or labels.max() >= n_clusters:
        extent = f"{labels.min()} to {labels.max()}" if labels.size else "nothing"
        raise ValueError(
            f"assignments must be (N,) and lie in 0..{n_clusters - 1}, got shape {labels.shape} with {extent}"
        )
    share = np.bincount(labels, minlength=n_clusters) / len(labels)
    share = share[share > 0]
    return {
        "clusters_used": len(share),
        "largest_cluster": float(share.max()),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
    }


def kept_share(reference: ArrayLike, moved: ArrayLike) -> np.ndarray:
    """Share of images that keep their cluster under each of T transformations.

    Parameters
    ----------
    reference : (N,)
        Clusters of the images as they are.
    moved : (T, N)
        Clusters of the transformed images under the *same* centres.

    Returns
    -------
    (T,) float
        In [0, 1]; 1: invariant. A constant clustering keeps every image: read it beside
        `occupancy`.

    Raises
    ------
    ValueError
        The shapes do not fit.
    """
    reference, moved = np.asarray(reference), np.asarray(moved)
    if (
        reference.ndim != 1
        or moved.ndim != 2
        or moved.shape[1] != len(reference)
        or len(reference) == 0
    ):
        raise ValueError(
            f"expected reference (N,) and moved (T, N) with N > 0, got {reference.shape} and {moved.shape}"
        )
    return (moved == reference).mean(axis=1)


def relative_distance(reference: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """How far features move under each of T transformations, in units of how far different images
    lie apart.

    Mean over images of |f(image) - f(moved image)|, divided by the mean distance of the features of
    two different images. 0: invariant; about 1: a moved image is as far from itself as from any
    other. Features that are all equal have no such unit: NaN.

    Parameters
    ----------
    reference : (N, D) float
        Features of the images as they are, N of at least 2.
    moved : (T, N, D) float

    Returns
    -------
    (T,) float

    Raises
    ------
    ValueError
        The shapes do not fit.
    """
    reference, moved = np.asarray(reference, dtype=float), np.asarray(moved, dtype=float)
    if (
        reference.ndim != 2
        or moved.ndim != 3
        or moved.shape[1:] != reference.shape
        or len(reference) < 2
    ):
        raise ValueError(
            f"expected reference (N, D) and moved (T, N, D) with N > 1, got {reference.shape} and {moved.shape}"
        )
    unit = pdist(reference).mean()
    # what rounding leaves between equal images is no distance
    if not unit > 1e-6 * np.abs(reference).max():
        return np.full(len(moved), np.nan)
    return np.linalg.norm(moved - reference, axis=2).mean(axis=1) / unit


def _label_pair(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 1 or b.ndim != 1 or len(a) != len(b) or len(a) == 0:
        raise ValueError(
            f"expected two labellings (N,) of the same N > 0 images, got shapes {a.shape} and {b.shape}"
        )
    return a, b


# ---------------------------------------------------------------- linear probes on frozen features


def probe(
    features: np.ndarray,
    labels: ArrayLike,
    train: ArrayLike,
    test: ArrayLike,
    groups: ArrayLike | None = None,
    seed: int = 0,
    n_boot: int = 1000,
    max_dim: int = 256,
    prior_variance: float = 25.0,
) -> dict[str, float]:
    """Accuracy of a linear classifier on frozen features, beside the guesses it must be measured
    against.

    Multinomial logistic regression on standardised features, fitted on the training images. It
    shows what can be read off the features *linearly*. Where the labels are the clusters of these
    same features, a high accuracy only says that K-means cells are convex regions of them, which
    they are by construction: it says nothing of disease.

    Parameters
    ----------
    features : (N, D) float
    labels : (N,)
        Classes: integers or strings.
    train, test : (n,) int or (N,) bool
        Disjoint sets of images.
    groups : (N,), optional
        Patient of each image. None may be in both sets; the bootstrap draws patients, since images
        of one patient are alike. Without it, images are drawn.
    seed : int
        Of the bootstrap, and of the randomised PCA.
    n_boot : int
        Bootstrap samples of the test set; 0: no interval, its bounds are NaN.
    max_dim : int
        More features than this are first reduced by PCA, fitted on the training images.
    prior_variance : float
        Strength of the ridge penalty, told as the variance of a class's logit under the Gaussian
        prior on the weights that it amounts to: C = `prior_variance` / D, so one value means the
        same for every D. The default leaves sharp classes (clusters) nearly free.

    Returns
    -------
    dict
        ``accuracy`` on the test images, in [0, 1], with ``low`` and ``high``, the 95 % percentile
        bootstrap interval (Efron 1979) over patients of the *test* set: it does not hold the chance
        of another training set or network (seeds are for that); ``majority``, accuracy of always
        answering the most frequent class of the training images (the first of equally frequent
        ones); ``chance``, expected accuracy of guessing with the classes' shares in training;
        ``n_classes`` in training, ``n_train``, ``n_test``; ``unseen``, number of test images whose
        class is not in training: these count as errors; ``converged``, False if the optimiser ran
        out of iterations, of which a warning tells as well. With one class in training there is
        nothing to fit: the answer is that class, and accuracy equals majority.

    Raises
    ------
    ValueError
        Lengths that differ, an empty set, overlapping sets, a patient in both sets, or features
        that are not finite.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    train, test, groups = _checked_split(features, labels, train, test, groups)
    classes, counts = np.unique(labels[train], return_counts=True)
    probabilities, converged = _class_probabilities(
        features, labels, train, test, seed, max_dim, prior_variance
    )
    predicted = classes[probabilities.argmax(axis=1)]
    correct = predicted == labels[test]
    # share in training of each test image's class; 0 if unseen
    position = np.searchsorted(classes, labels[test]).clip(max=len(classes) - 1)
    share = np.where(classes[position] == labels[test], counts[position] / len(train), 0.0)
    low, high = _percentile_interval(
        _resampled_mean(correct, draws) for draws in _resamples(groups[test], n_boot, seed)
    )
    return {
        "accuracy": float(correct.mean()),
        "low": low,
        "high": high,
        "majority": float((labels[test] == classes[counts.argmax()]).mean()),
        "chance": float(share.mean()),
        "n_classes": len(classes),
        "n_train": len(train),
        "n_test": len(test),
        "unseen": int((share == 0).sum()),
        "converged": converged,
    }


def _class_probabilities(
    features: np.ndarray,
    labels: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    seed: int,
    max_dim: int,
    prior_variance: float,
) -> tuple[np.ndarray, bool]:
    """Probability (n_test, classes in training) of each class, and whether the fit converged."""
    if (labels[train] == labels[train][0]).all():
        return np.ones((len(test), 1)), True
    x_train, x_test = _standardised(features, train, test, max_dim, seed)
    model, converged = _fitted(
        LogisticRegression(C=prior_variance / features.shape[1], tol=1e-3, max_iter=2000),
        x_train,
        labels[train],
    )
    return model.predict_proba(x_test), converged


def class_probabilities(
    features: np.ndarray,
    labels: ArrayLike,
    train: ArrayLike,
    test: ArrayLike,
    groups: ArrayLike | None = None,
    seed: int = 0,
    max_dim: int = 256,
    prior_variance: float = 25.0,
) -> tuple[np.ndarray, np.ndarray]:
    """What the classifier of `probe` answers, image by image.

    Returns
    -------
    probabilities : (n_test, C) float
        Of each class of the training images.
    classes : (C,)

    Other parameters and errors as `probe`, whose accuracy is that of the most probable class.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    train, test, groups = _checked_split(features, labels, train, test, groups)
    return _class_probabilities(features, labels, train, test, seed, max_dim, prior_variance)[
        0
    ], np.unique(labels[train])


def finding_scores(
    features: np.ndarray,
    targets: np.ndarray,
    train: ArrayLike,
    test: ArrayLike,
    groups: ArrayLike | None = None,
    seed: int = 0,
    max_dim: int = 256,
    prior_variance: float = 1.0,
) -> np.ndarray:
    """Log-odds (n_test, F) that the classifiers of `findings_auroc` give each finding of each test
    image.

    NaN in the column of a finding that, or whose absence, is missing in the training or the test
    images. Parameters and errors as `findings_auroc`."""
    features, targets = np.asarray(features), np.asarray(targets)
    if targets.ndim != 2 or targets.dtype != bool:
        raise ValueError(
            f"targets must be bool (N, F), got {targets.dtype} of shape {targets.shape}"
        )
    train, test, groups = _checked_split(features, targets, train, test, groups)
    scores, _ = _finding_scores(features, targets, train, test, seed, max_dim, prior_variance)
    columns = np.full((len(test), targets.shape[1]), np.nan)
    for finding, score in scores.items():
        columns[:, finding] = score
    return columns


def _finding_scores(
    features: np.ndarray,
    targets: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    seed: int,
    max_dim: int,
    prior_variance: float,
) -> tuple[dict[int, np.ndarray], bool]:
    """Log-odds (n_test,) of each finding that can be learnt and tested, and whether all fits
    converged.
    """
    x_train, x_test = _standardised(features, train, test, max_dim, seed)
    scores, converged = {}, True
    for finding in range(targets.shape[1]):
        if all(0 < targets[part, finding].mean() < 1 for part in (train, test)):
            model = LogisticRegression(
                C=prior_variance / features.shape[1], solver="newton-cholesky"
            )
            model, ended = _fitted(model, x_train, targets[train, finding])
            scores[finding] = model.decision_function(x_test)
            converged &= ended
    return scores, converged


def findings_auroc(
    features: np.ndarray,
    targets: np.ndarray,
    train: ArrayLike,
    test: ArrayLike,
    groups: ArrayLike | None = None,
    seed: int = 0,
    n_boot: int = 1000,
    max_dim: int = 256,
    prior_variance: float = 1.0,
) -> dict[str, float | np.ndarray]:
    """Area under the ROC curve of each finding, by one linear classifier a finding on frozen
    features.

    Binary logistic regression of each finding against its absence. The area is the probability that
    an image with the finding scores higher than one without (ties count half): 0.5 is chance
    whatever the prevalence, 1 perfect. It does not show calibration, nor how useful a rare
    finding's alarms are, and NIH's findings were read from reports by a program (Wang et al. 2017),
    not from the images.

    Parameters
    ----------
    features : (N, D) float
    targets : (N, F) bool
        Findings of each image.
    train, test, groups, seed, n_boot, max_dim
        As for `probe`.
    prior_variance : float
        As for `probe`; findings are rare and faint, hence the stronger penalty.

    Returns
    -------
    dict
        ``per_finding`` (F,), with ``per_finding_low`` and ``per_finding_high``; NaN where the
        finding, or its absence, is missing in the training or the test images; ``mean`` of those
        that are not, with ``low`` and ``high`` (95 % percentile bootstrap over test patients; in
        each sample the mean is over the findings it holds); ``n_findings``, how many these are;
        ``converged``.

    Raises
    ------
    ValueError
        As `probe`.
    """
    features, targets = np.asarray(features), np.asarray(targets)
    if targets.ndim != 2 or targets.dtype != bool:
        raise ValueError(
            f"targets must be bool (N, F), got {targets.dtype} of shape {targets.shape}"
        )
    train, test, groups = _checked_split(features, targets, train, test, groups)
    scores, converged = _finding_scores(
        features, targets, train, test, seed, max_dim, prior_variance
    )

    def areas(draws: np.ndarray) -> np.ndarray:
        """Areas (samples, F) under the bootstrap weights (samples, n_test)."""
        values = np.full((len(draws), targets.shape[1]), np.nan)
        for finding, score in scores.items():
            values[:, finding] = weighted_auroc(score, targets[test, finding], draws)
        return values

    per_finding = areas(np.ones((1, len(test))))[0]
    samples = [areas(draws) for draws in _resamples(groups[test], n_boot, seed)] if scores else []
    low, high = _percentile_interval(
        np.nanmean(sample[~np.isnan(sample).all(axis=1)], axis=1) for sample in samples
    )
    bounds = [
        _percentile_interval(sample[:, finding] for sample in samples)
        if finding in scores
        else (np.nan, np.nan)
        for finding in range(targets.shape[1])
    ]
    return {
        "mean": float(np.mean(per_finding[list(scores)])) if scores else float("nan"),
        "low": low,
        "high": high,
        "per_finding": per_finding,
        "per_finding_low": np.array([bound[0] for bound in bounds]),
        "per_finding_high": np.array([bound[1] for bound in bounds]),
        "n_findings": len(scores),
        "converged": converged,
    }


def weighted_auroc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for many weightings of the same scores at once.

    The Mann-Whitney form, sum over positives i and negatives j of w_i w_j ([s_i > s_j] + [s_i =
    s_j] / 2) / (sum w_i sum w_j).

    Parameters
    ----------
    scores : (n,) float
    positive : (n,) bool
    weights : (B, n)
        Not negative; for a bootstrap, how often each image was drawn.

    Returns
    -------
    (B,) float
        In [0, 1]; NaN where the positives or the negatives have no weight.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) != 0)  # of runs of equal scores
    weights = np.asarray(weights, dtype=float)[:, order]
    ups = np.add.reduceat(weights * positive[order], starts, axis=1)
    downs = np.add.reduceat(weights * ~positive[order], starts, axis=1)
    below = np.cumsum(downs, axis=1) - downs
    pairs = ups.sum(axis=1) * downs.sum(axis=1)
    wins = (ups * (below + downs / 2)).sum(axis=1)
    return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def weighted_average_precision(
    scores: np.ndarray, positive: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Average precision for many weightings of the same scores at once.

    sum over thresholds of (recall gained) x (precision there), without interpolation; equal scores
    are one threshold. A guess that knows nothing scores the prevalence, so values of findings of
    different frequency do not compare.

    Parameters
    ----------
    scores, positive, weights
        As for `weighted_auroc`.

    Returns
    -------
    (B,) float
        In [0, 1]; NaN where the positives have no weight.
    """
    order = np.argsort(-np.asarray(scores, dtype=float), kind="stable")
    starts = np.flatnonzero(np.diff(-scores[order], prepend=-np.inf) != 0)
    weights = np.asarray(weights, dtype=float)[:, order]
    ups = np.add.reduceat(weights * positive[order], starts, axis=1)
    taken = np.cumsum(np.add.reduceat(weights, starts, axis=1), axis=1)
    precision = np.divide(np.cumsum(ups, axis=1), taken, out=np.zeros_like(taken), where=taken > 0)
    total = ups.sum(axis=1)
    return np.divide(
        (ups * precision).sum(axis=1), total, out=np.full(len(weights), np.nan), where=total > 0
    )


def multilabel_scores(
    probabilities: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray | None = None,
    micro: bool = True,
) -> dict[str, np.ndarray]:
    """Macro and micro averages of AUROC and average precision over F labels.

    Macro: the mean over labels of the number computed within each label, so a rare finding counts
    as much as a frequent one and knowing the frequencies helps nothing. Micro: one number over all
    image-label pairs, so a guess that only knows how frequent each label is ranks the pairs of
    frequent labels first and scores high without looking at any image; read it beside
    `prevalence_guess`.

    Parameters
    ----------
    probabilities : (n, F) float
        Comparable between labels; a column with NaN is left out.
    targets : (n, F) bool
    weights : (B, n), optional
        Of the images, for a bootstrap; without it each counts once.
    micro : bool
        Whether to compute the micro averages, which cost as much as all else.

    Returns
    -------
    dict
        ``auroc_macro``, ``auroc_micro``, ``ap_macro``, ``ap_micro``, each (B,); ``auroc`` and
        ``ap`` of each label, (B, F).

    Raises
    ------
    ValueError
        Shapes that do not fit.
    """
    probabilities, targets = np.asarray(probabilities, dtype=float), np.asarray(targets)
    if probabilities.shape != targets.shape or targets.ndim != 2 or targets.dtype != bool:
        raise ValueError(
            f"expected probabilities (n, F) and bool targets (n, F), got {probabilities.shape} and {targets.shape}"
        )
    weights = np.ones((1, len(targets))) if weights is None else np.asarray(weights, dtype=float)
    known = np.flatnonzero(~np.isnan(probabilities).any(axis=0))
    found = {name: np.full((len(weights), targets.shape[1]), np.nan) for name in ("auroc", "ap")}
    for label in known:
        found["auroc"][:, label] = weighted_auroc(
            probabilities[:, label], targets[:, label], weights
        )
        found["ap"][:, label] = weighted_average_precision(
            probabilities[:, label], targets[:, label], weights
        )
    averages = {f"{name}_macro": _nanmean(values) for name, values in found.items()}
    if micro:
        pairs = (
            probabilities[:, known].ravel(),
            targets[:, known].ravel(),
            np.repeat(weights, len(known), axis=1),
        )
        nothing = np.full(len(weights), np.nan)
        averages["auroc_micro"] = weighted_auroc(*pairs) if len(known) else nothing
        averages["ap_micro"] = weighted_average_precision(*pairs) if len(known) else nothing
    return averages | found


def prevalence_guess(targets: np.ndarray, train: ArrayLike, test: ArrayLike) -> np.ndarray:
    """Probabilities (n_test, F) of a guess that looks at no image: each label's share of the
    training images, the same for all.
    """
    targets = np.asarray(targets)
    return np.tile(targets[train].mean(axis=0), (len(targets[test]), 1))


def roc_curves(
    probabilities: np.ndarray, targets: np.ndarray, false_positive_rates: np.ndarray
) -> dict[str, np.ndarray]:
    """ROC curves averaged over F labels, macro and micro.

    Macro: the mean over labels of the true positive rate at the same false positive rate (vertical
    averaging, Fawcett 2006, section 8); its area is the macro AUROC. Micro: the curve of all
    image-label pairs. What was said of `multilabel_scores` holds for both.

    Parameters
    ----------
    probabilities : (n, F) float
        Comparable between labels; a column with NaN is left out, and from the macro average one
        whose targets are all equal.
    targets : (n, F) bool
    false_positive_rates : (m,) float
        In [0, 1], ascending: where the curves are read, with straight lines between thresholds.

    Returns
    -------
    dict
        ``macro``, ``micro``: true positive rates (m,); NaN where no label can be told.
    """
    targets = np.asarray(targets)
    known = np.flatnonzero(~np.isnan(probabilities).any(axis=0))
    told = [label for label in known if targets[:, label].any() and not targets[:, label].all()]
    if not told:
        return dict.fromkeys(("macro", "micro"), np.full(len(false_positive_rates), np.nan))

    def curve(some: np.ndarray, positive: np.ndarray) -> np.ndarray:
        false, true, _ = roc_curve(positive, some)
        return np.interp(
            false_positive_rates, false, true
        )  # where it goes straight up, its upper end

    macro = np.mean([curve(probabilities[:, label], targets[:, label]) for label in told], axis=0)
    return {
        "macro": macro,
        "micro": curve(probabilities[:, known].ravel(), targets[:, known].ravel()),
    }


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean of each row without NaN; NaN, and no warning, for a row of nothing else."""
    known = ~np.isnan(values)
    number = known.sum(axis=1)
    return np.divide(
        np.where(known, values, 0).sum(axis=1),
        number,
        out=np.full(len(values), np.nan),
        where=number > 0,
    )


def _checked_split(
    features: np.ndarray,
    labels: np.ndarray,
    train: ArrayLike,
    test: ArrayLike,
    groups: ArrayLike | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of both sets, and the groups (each image its own if there are none)."""
    n = len(features)
    groups = np.arange(n) if groups is None else np.asarray(groups)
    if features.ndim != 2 or len(labels) != n or len(groups) != n:
        raise ValueError(
            f"features, labels and groups must have one row an image, got {features.shape}, {labels.shape} and {groups.shape}"
        )
    if not np.isfinite(features).all():
        raise ValueError(
            f"features hold NaN or infinite values, first in row {np.argmin(np.isfinite(features).all(axis=1))}"
        )
    train, test = (
        np.arange(n)[part if part.dtype == bool else part.astype(int)]
        for part in (np.asarray(train), np.asarray(test))
    )
    if len(train) == 0 or len(test) == 0:
        raise ValueError(
            f"both sets must hold images, got {len(train)} for training and {len(test)} for testing"
        )
    shared = np.intersect1d(groups[train], groups[test])
    if len(shared):
        raise ValueError(
            f"{len(shared)} patients (or images) are in both train and test, first {shared[0]}: split by patient"
        )
    return train, test, groups


def _standardised(
    features: np.ndarray, train: np.ndarray, test: np.ndarray, max_dim: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Training and test features at zero mean and unit variance, as far as the training images
    tell.

    PCA after that only rotates and truncates: the components keep their variances, so a ridge
    penalty means the same as before it."""
    scaler = StandardScaler().fit(features[train])
    x_train, x_test = scaler.transform(features[train]), scaler.transform(features[test])
    if x_train.shape[1] > max_dim:
        pca = PCA(min(max_dim, len(train)), random_state=seed).fit(x_train)
        x_train, x_test = pca.transform(x_train), pca.transform(x_test)
    return x_train, x_test


def _fitted(
    model: LogisticRegression, x: np.ndarray, y: np.ndarray
) -> tuple[LogisticRegression, bool]:
    """The fitted model and whether it converged; if not, a warning says so in terms of the probe."""
    # hundreds of small steps: handing each to a pool of threads costs more than it saves, and far
    # more on a busy machine
    with warnings.catch_warnings(record=True) as caught, threadpool_limits(limits=1):
        warnings.simplefilter("always")
        model.fit(x, y)
    converged = True
    for entry in caught:
        if issubclass(entry.category, ConvergenceWarning):
            converged = False
        else:
            warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)
    if not converged:
        warnings.warn(
            f"the linear probe did not converge in {model.max_iter} iterations: its score is a lower bound",
            RuntimeWarning,
            stacklevel=3,
        )
    return model, converged


# ---------------------------------------------------------------- intervals


def seed_interval(values: ArrayLike) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval by Student's t.

    It covers the chance of the seeds (start, batches, clustering) under roughly normal results, not
    that of the data set.

    Parameters
    ----------
    values : (n,) float
        One number a seed.

    Returns
    -------
    mean, low, high : float
        The bounds are NaN for a single seed: one run shows no spread.

    Raises
    ------
    ValueError
        No values, or more than one axis.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"expected values (n,) of at least one seed, got shape {values.shape}")
    mean = float(values.mean())
    if len(values) == 1:
        return mean, float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return mean, float(mean - half), float(mean + half)


def paired_interval(a: ArrayLike, b: ArrayLike) -> tuple[float, float, float]:
    """Mean of ``a - b`` over seeds that both arms share, with its 95 % interval (`seed_interval` of
    the differences).

    An interval without 0 says that the arms differ at this number of seeds; one with 0 does not say
    that they are equal.

    Raises
    ------
    ValueError
        Different lengths, or as `seed_interval`.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape:
        raise ValueError(
            f"paired values need one of each arm for every seed, got shapes {a.shape} and {b.shape}"
        )
    return seed_interval(a - b)


def _resamples(groups: np.ndarray, n_boot: int, seed: int, block: int = 64) -> Iterator[np.ndarray]:
    """Bootstrap weights (up to `block`, n): how often each image is drawn when whole groups are
    drawn with replacement.

    Nothing comes for fewer than two groups, of which no spread can be learnt.
    """
    _, index = np.unique(groups, return_inverse=True)
    n_groups = index.max() + 1
    rng = np.random.default_rng(seed)
    for start in range(0, n_boot if n_groups > 1 else 0, block):
        yield rng.multinomial(
            n_groups, np.full(n_groups, 1 / n_groups), size=min(block, n_boot - start)
        )[:, index]


def _resampled_mean(values: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Mean of `values` (n,) in each bootstrap sample, weights (samples, n)."""
    return draws @ values / draws.sum(axis=1)


def _percentile_interval(blocks: Iterable[np.ndarray]) -> tuple[float, float]:
    """2.5 and 97.5 percentile of blocks of bootstrap values, NaN if there are none."""
    values = np.concatenate([np.empty(0), *blocks])
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


# ---------------------------------------------------------------- curves over epochs


def convergence_epoch(curve: ArrayLike, tolerance: float = 0.02) -> float:
    """First epoch from which a curve stays within `tolerance` of its final mean, that of its last
    quarter (rounded up).

    Parameters
    ----------
    curve : (T,) float
        One value an epoch, such as NMI(t, t-1).
    tolerance : float
        In the units of the curve, at least 0.

    Returns
    -------
    float
        Position in the curve, counted from 1; NaN if even its last value lies outside. Early is not
        good in itself: a network that never learns is converged from the start.

    Raises
    ------
    ValueError
        An empty curve, or one with NaN (leave out the first epoch, which has no epoch before it).
    """
    curve = _checked_curve(curve)
    final = curve[-math.ceil(len(curve) / 4) :].mean()
    outside = np.flatnonzero(np.abs(curve - final) > tolerance)
    first = int(outside[-1]) + 2 if len(outside) else 1
    return float(first) if first <= len(curve) else float("nan")


def stability(curve: ArrayLike) -> float:
    """Standard deviation (n - 1) of a curve over its second half (rounded up): 0 is perfectly
    steady.

    A slow trend counts as unsteadiness too. NaN for a single value in that half. Errors as
    `convergence_epoch`."""
    half = _checked_curve(curve)
    half = half[len(half) // 2 :]
    return float(half.std(ddof=1)) if len(half) > 1 else float("nan")


def increases(loss: ArrayLike) -> tuple[int, float]:
    """Number of epochs at which the loss is higher than at the one before, and the sum of these
    rises: (0, 0.0) if it only falls.

    The sum is in units of the loss; arms with different losses at chance (ln K) are not comparable
    by it. Errors as `convergence_epoch`."""
    steps = np.diff(_checked_curve(loss))
    return int((steps > 0).sum()), float(steps[steps > 0].sum())


def _checked_curve(curve: ArrayLike) -> np.ndarray:
    curve = np.asarray(curve, dtype=float)
    if curve.ndim != 1 or len(curve) == 0 or not np.isfinite(curve).all():
        raise ValueError(
            f"expected a curve (T,) of finite values, got {curve}: leave out epochs that have no value"
        )
    return curve


# ---------------------------------------------------------------- structure of an embedding


def cluster_structure(
    embedding: np.ndarray, assignments: ArrayLike, seed: int = 0, max_samples: int = 5000
) -> dict[str, float]:
    """How compact and separate clusters are in the space they were made in.

    Both numbers grow better by fitting K-means closer to this very space, prefer round clusters,
    and are not comparable between spaces of different dimension or scaling without a control;
    neither knows of any label.

    Parameters
    ----------
    embedding : (N, D) float
    assignments : (N,) int
    seed : int
        Of the subsample.
    max_samples : int
        Images for the silhouette, whose cost is quadratic; a cluster that shrinks to one image in
        the subsample adds 0 to it.

    Returns
    -------
    dict
        ``silhouette`` (Rousseeuw 1987), -1 to 1, high is separate; ``davies_bouldin`` (Davies and
        Bouldin 1979), from 0, low is separate. NaN where they are not defined: one cluster, or as
        many as images.

    Raises
    ------
    ValueError
        Lengths that differ.
    """
    embedding, labels = np.asarray(embedding), np.asarray(assignments)
    if embedding.ndim != 2 or labels.shape != embedding.shape[:1]:
        raise ValueError(
            f"expected embedding (N, D) and assignments (N,), got {embedding.shape} and {labels.shape}"
        )
    part = _subsample(len(labels), max_samples, seed)

    def defined(some: np.ndarray) -> bool:
        return 1 < len(np.unique(some)) < len(some)

    return {
        "silhouette": float(silhouette_score(embedding[part], labels[part]))
        if defined(labels[part])
        else float("nan"),
        "davies_bouldin": float(davies_bouldin_score(embedding, labels))
        if defined(labels)
        else float("nan"),
    }


def label_neighbourhood(
    points: np.ndarray, labels: ArrayLike, n_neighbors: int = 10, seed: int = 0, repeats: int = 200
) -> dict[str, float]:
    """Whether images of one label lie together in a map: purity of neighbourhoods against permuted
    labels.

    Parameters
    ----------
    points : (N, d) float
        A map such as t-SNE's, or any embedding.
    labels : (N,)
        Integers, bools or strings.
    n_neighbors : int
        Nearest other points looked at, fewer than N.
    seed, repeats : int
        Of the permutations.

    Returns
    -------
    dict
        ``purity``, mean share of a point's neighbours that have its label, 0 to 1; ``baseline``,
        its exact expectation when labels are permuted, sum over labels of n_c (n_c - 1) / (N (N -
        1)); ``low`` and ``high``, the central 95 % of permutations; ``p``, share of permutations
        (the data counted as one) that are at least as pure. With a frequent label both purity and
        baseline are near 1: read the difference. Several images of one patient lie together for
        reasons other than disease, which permuting images does not take off.

    Raises
    ------
    ValueError
        Lengths that differ, or not 1 <= n_neighbors < N.
    """
    points = np.asarray(points)
    _, labels = np.unique(np.asarray(labels), return_inverse=True)
    n = len(points)
    if points.ndim != 2 or labels.shape != (n,) or not 1 <= n_neighbors < n:
        raise ValueError(
            f"expected points (N, d), labels (N,) and 1 <= n_neighbors < N, got {points.shape}, {labels.shape} and {n_neighbors}"
        )
    neighbours = (
        NearestNeighbors(n_neighbors=n_neighbors).fit(points).kneighbors(return_distance=False)
    )  # (N, n_neighbors), without self
    rng = np.random.default_rng(seed)

    def purity(some: np.ndarray) -> float:
        return float((some[neighbours] == some[:, None]).mean())

    observed = purity(labels)
    permuted = np.array([purity(rng.permutation(labels)) for _ in range(repeats)])
    sizes = np.bincount(labels).astype(float)
    low, high = _percentile_interval([permuted])
    return {
        "purity": observed,
        "baseline": float((sizes * (sizes - 1)).sum() / (n * (n - 1))),
        "low": low,
        "high": high,
        "p": float((1 + (permuted >= observed).sum()) / (1 + repeats)),
    }


def finding_neighbourhood(
    points: np.ndarray, targets: np.ndarray, n_neighbors: int = 10, least: int = 5
) -> float:
    """Whether images of one finding lie together in a map: how much oftener the neighbours of such
    an image have it than images at large.

    For each finding that at least `least` images have: the share of the `n_neighbors` nearest
    others that have it too, in the mean over the images with it, less the share of all other images
    that have it; then the mean over findings. 0: no more than by chance; at most
    1. Several images of one patient lie together for reasons other than disease, which this does
       not take off.

    Parameters
    ----------
    points : (N, d) float
    targets : (N, F) bool
    n_neighbors : int
        Fewer than N.
    least : int

    Returns
    -------
    float
        NaN if no finding is frequent enough.

    Raises
    ------
    ValueError
        Lengths that differ, or not 1 <= n_neighbors < N.
    """
    points, targets = np.asarray(points), np.asarray(targets)
    n = len(points)
    if points.ndim != 2 or targets.ndim != 2 or len(targets) != n or not 1 <= n_neighbors < n:
        raise ValueError(
            f"expected points (N, d), targets (N, F) and 1 <= n_neighbors < N, got {points.shape}, {targets.shape}, {n_neighbors}"
        )
    neighbours = (
        NearestNeighbors(n_neighbors=n_neighbors).fit(points).kneighbors(return_distance=False)
    )
    counts = targets.sum(axis=0)
    frequent = np.flatnonzero(counts >= max(least, 1))
    lifts = [
        targets[neighbours[targets[:, f]], f].mean() - (counts[f] - 1) / (n - 1) for f in frequent
    ]
    return float(np.mean(lifts)) if lifts else float("nan")


def trustworthiness(
    embedding: np.ndarray,
    points: np.ndarray,
    n_neighbors: int = 10,
    seed: int = 0,
    max_samples: int = 5000,
) -> float:
    """Share of neighbours in a map that are neighbours in the space it was made from (Venna and
    Kaski 2001).

    0 to 1; 1: no false neighbours, about 0.5: a random map. It does not punish torn neighbourhoods,
    nor say that clusters are real.

    Parameters
    ----------
    embedding : (N, D) float
        The space the map was made from.
    points : (N, d) float
        The map.
    n_neighbors : int
        Fewer than half of the images compared.
    seed, max_samples : int
        Of the subsample: memory is quadratic. Values from samples of different sizes are not
        comparable.

    Raises
    ------
    ValueError
        Lengths that differ, or too many neighbours.
    """
    embedding, points = np.asarray(embedding), np.asarray(points)
    if len(embedding) != len(points):
        raise ValueError(
            f"embedding and points must hold the same images, got {len(embedding)} and {len(points)}"
        )
    part = _subsample(len(points), max_samples, seed)
    return float(sklearn_trustworthiness(embedding[part], points[part], n_neighbors=n_neighbors))


def _subsample(n: int, largest: int, seed: int) -> np.ndarray:
    """Sorted indices of at most `largest` of n images."""
    return (
        np.arange(n)
        if n <= largest
        else np.sort(np.random.default_rng(seed).choice(n, largest, replace=False))
    )
