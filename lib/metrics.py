"""Numbers that say how good a clustering is, and how sure one can be: arrays in, numbers out.

Each docstring says what the number is, its range, and what it cannot show. Arrays that do not fit
raise a ValueError."""

import math
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from sklearn import metrics as sklearn_metrics
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_array, check_consistent_length
from threadpoolctl import threadpool_limits

MAX_FEATURES = 256  # of a linear classifier; more are first reduced by PCA


def nmi(a: ArrayLike, b: ArrayLike) -> float:
    """Normalised mutual information of two clusterings, labels (N,) each.

    I(a; b) / ((H(a) + H(b)) / 2): 0 is independent, 1 is equal up to renaming. (Caron et al. 2018
    divide by the geometric mean in equation 3, which never gives less.) It is not corrected for
    chance: random clusterings of N images into K clusters score well above 0 if N / K is small (see
    `chance_nmi`). Between consecutive epochs it only shows that a network agrees with itself."""
    return float(sklearn_metrics.normalized_mutual_info_score(a, b))


def ami(a: ArrayLike, b: ArrayLike) -> float:
    """Adjusted mutual information (Vinh, Epps and Bailey 2010): `nmi` with its chance level at 0.
    1 is equal up to renaming; independent clusterings score 0 on average, some a little less."""
    return float(sklearn_metrics.adjusted_mutual_info_score(a, b))


def chance_nmi(a: ArrayLike, b: ArrayLike, seed: int, repeats: int = 5) -> float:
    """Mean NMI of `a` with random permutations of `b`: the floor under a curve of NMI, which
    is the higher, the more clusters and the fewer images there are."""
    rng = np.random.default_rng(seed)
    return float(np.mean([nmi(a, rng.permutation(b)) for _ in range(repeats)]))


def occupancy(assignments: ArrayLike, n_clusters: int) -> dict[str, float]:
    """How evenly images (N,), numbered 0 to `n_clusters` - 1, fill the clusters: signs of collapse.

    ``clusters_used``, clusters with an image (1 to n_clusters); ``largest_cluster``, its share of
    the images (1 / n_clusters to 1); ``perplexity``, exp of the entropy of the sizes (1: all in
    one, n_clusters: all of equal size). Even sizes show no quality: random clusters are even."""
    labels = np.asarray(assignments)
    if labels.ndim != 1 or not labels.size or labels.min() < 0 or labels.max() >= n_clusters:
        raise ValueError(f"expected assignments (N,) from 0 to {n_clusters - 1}, got {labels}")
    share = np.bincount(labels) / len(labels)
    used, perplexity = int((share > 0).sum()), float(np.exp(stats.entropy(share)))
    return {"clusters_used": used, "largest_cluster": float(share.max()), "perplexity": perplexity}


def kept_share(reference: ArrayLike, moved: ArrayLike) -> np.ndarray:
    """Share (T,) of images that keep their cluster under each of T transformations.

    `moved` (T, N) holds the clusters of the moved images under the *same* centroids as `reference`
    (N,). 1 is invariant. A single cluster keeps every image: read it beside `occupancy`."""
    return (np.asarray(moved) == np.asarray(reference)).mean(axis=1)


def cluster_structure(embedding: np.ndarray, assignments, seed=0, max_samples=5000) -> dict:
    """How compact and separate clusters (N,) are in the space (N, D) in which they were made.

    ``silhouette`` (Rousseeuw 1987), -1 to 1, high is separate, of at most `max_samples` random
    images; ``davies_bouldin`` (Davies and Bouldin 1979), from 0, low is separate. NaN if not
    defined: one cluster, or as many as images. Both prefer round clusters, and improve if K-means
    fits this very space more closely. Spaces of other dimension or scaling do not compare."""
    x, labels = np.asarray(embedding), np.asarray(assignments)
    check_consistent_length(x, labels)
    some = np.sort(np.random.default_rng(seed).permutation(len(x))[:max_samples])

    def score(measure, x: np.ndarray, labels: np.ndarray) -> float:
        return float(measure(x, labels)) if 1 < len(np.unique(labels)) < len(labels) else math.nan

    silhouette = score(sklearn_metrics.silhouette_score, x[some], labels[some])
    davies_bouldin = score(sklearn_metrics.davies_bouldin_score, x, labels)
    return {"silhouette": silhouette, "davies_bouldin": davies_bouldin}


def probe(features, labels, train, test, groups=None, seed=0, n_boot=1000) -> dict:
    """Accuracy of a linear classifier on frozen features, beside two guesses to compare it with.

    Multinomial logistic regression on standardised features: what can be read off them *linearly*.
    If the labels are the clusters of these same features, a high accuracy only says that K-means
    cells are convex: it says nothing of disease.

    `features` are (N, D) float, `labels` (N,) int or str; a test image of a class that is not in
    training counts as an error. `train` and `test` are disjoint sets of images, (n,) int or (N,)
    bool; `groups` (N,), the patient of each image, none in both sets. Without `n_boot` bootstrap
    samples, 0, ``low`` and ``high`` are NaN.

    Returns ``accuracy``, 0 to 1; ``low, high``, its 95 % interval over *test* patients, whose
    images are alike (percentile bootstrap, Efron 1979), but not over training sets or networks;
    ``majority``, accuracy of always answering the most frequent class in training; ``chance``,
    expected accuracy of guessing with the shares in training; ``classes`` (C,) in training and
    ``n_classes``; ``probabilities`` (n_test, C); ``correct`` (n_test,) bool."""
    features, labels = np.asarray(features), np.asarray(labels)
    train, test, groups = checked_split(features, labels, train, test, groups)
    classes, counts = np.unique(labels[train], return_counts=True)
    probabilities = np.ones((len(test), 1))
    if len(classes) > 1:
        x_train, x_test = standardised(features, train, test, seed)
        # a weak L2 penalty: the prior variance of a logit is 25, for any number of features
        model = LogisticRegression(C=25 / features.shape[1], tol=1e-3, max_iter=2000)
        probabilities = fit_linear(model, x_train, labels[train]).predict_proba(x_test)
    truth = labels[test][:, None] == classes  # (n_test, C)
    correct = classes[probabilities.argmax(axis=1)] == labels[test]
    samples = (w @ correct / w.sum(axis=1) for w in bootstrap_weights(groups[test], n_boot, seed))
    low, high = percentile_interval(samples)
    found = {"accuracy": float(correct.mean()), "low": low, "high": high, "correct": correct}
    found["majority"] = float(truth[:, counts.argmax()].mean())
    found["chance"] = float((truth @ counts).mean() / len(train))
    found |= {"classes": classes, "n_classes": len(classes), "probabilities": probabilities}
    return found


def checked_split(features: np.ndarray, y: np.ndarray, train, test, groups) -> tuple:
    """Rows to train and to test on, and groups (N,); ValueError for a patient in both, or NaN."""
    n = len(check_array(features))
    groups = np.arange(n) if groups is None else np.asarray(groups)
    check_consistent_length(features, y, groups)
    train, test = (np.arange(n)[np.asarray(part)] for part in (train, test))
    if not len(train) or not len(test):
        raise ValueError(f"both sets must hold images: {len(train)} to train, {len(test)} to test")
    both = np.intersect1d(groups[train], groups[test])
    if len(both):
        raise ValueError(f"{len(both)} patients are in both train and test, such as {both[0]}")
    return train, test, groups


def standardised(features: np.ndarray, train: np.ndarray, test: np.ndarray, seed: int) -> tuple:
    """Both sets, scaled to mean 0 and variance 1 in training; of more than 256 features, a PCA."""
    steps: list = [StandardScaler()]
    if features.shape[1] > MAX_FEATURES:
        steps.append(PCA(min(MAX_FEATURES, len(train)), random_state=seed))
    scale = make_pipeline(*steps).fit(features[train])
    return scale.transform(features[train]), scale.transform(features[test])


def fit_linear(model: LogisticRegression, x: np.ndarray, y: np.ndarray) -> LogisticRegression:
    """Fit `model` in one thread: to share its hundreds of small steps costs more than it saves."""
    with threadpool_limits(limits=1):
        return model.fit(x, y)


def bootstrap_weights(groups: np.ndarray, n_boot: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn if whole groups (n,) are drawn with replacement: blocks (b, n)
    of up to 64 samples. Fewer than two groups show no spread: no block."""
    names, index = np.unique(groups, return_inverse=True)
    even, rng = np.full(len(names), 1 / len(names)), np.random.default_rng(seed)
    for start in range(0, n_boot if len(names) > 1 else 0, 64):
        yield rng.multinomial(len(names), even, size=min(64, n_boot - start))[:, index]


def percentile_interval(blocks: Iterable[np.ndarray]) -> tuple[float, float]:
    """2.5 and 97.5 percentile of blocks of bootstrap values, NaN left out; NaN if none is left."""
    values = np.concatenate([np.empty(0), *blocks])
    values = values[~np.isnan(values)]
    low, high = np.percentile(values, [2.5, 97.5]) if len(values) else (math.nan, math.nan)
    return float(low), float(high)


def seed_interval(values: ArrayLike) -> tuple[float, float, float]:
    """Mean over seeds (n,) and its 95 % interval by Student's t: mean, low, high.

    It covers the chance of the seeds (start, batches, clustering), not that of the data set, and
    presumes roughly normal results. The bounds of a single seed are NaN: it shows no spread."""
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"expected values (n,) of at least one seed, got shape {values.shape}")
    mean, half = float(values.mean()), math.nan
    if len(values) > 1:  # SciPy's own interval is NaN for equal values, which do occur here
        half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half
