"""How well findings can be read off features or lie together in a map: arrays in, numbers out.

`lib.metrics` holds what needs no findings. A finding that all or none of the training or of the
test images have is NaN."""

from collections.abc import Mapping

import numpy as np
from scipy.spatial.distance import pdist
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_curve
from sklearn.neighbors import NearestNeighbors

from lib.metrics import bootstrap_weights, checked_split, fit_linear, standardised


def finding_scores(features, targets, train, test, groups=None, seed: int = 0) -> np.ndarray:
    """Log-odds (n_test, F) of each finding, by a logistic regression of each column of `targets`,
    bool (N, F). Other parameters and errors as `lib.metrics.probe`."""
    features, targets = np.asarray(features), np.asarray(targets)
    train, test, _ = checked_split(features, targets, train, test, groups)
    x_train, x_test = standardised(features, train, test, seed)
    scores = np.full((len(test), targets.shape[1]), np.nan)
    for finding, (learnt, asked) in enumerate(zip(targets[train].T, targets[test].T, strict=True)):
        if 0 < learnt.mean() < 1 and 0 < asked.mean() < 1:
            # findings are rare and faint: the penalty is stronger than that of lib.metrics.probe
            model = LogisticRegression(C=1 / features.shape[1], solver="newton-cholesky")
            scores[:, finding] = fit_linear(model, x_train, learnt).decision_function(x_test)
    return scores


def findings_auroc(features, targets, train, test, **options) -> np.ndarray:
    """Area under the ROC curve (F,) of each finding, by the classifiers of `finding_scores`.

    The area is the probability that an image with the finding scores higher than one without (ties
    count half): 0.5 is chance whatever the prevalence. It does not show calibration, nor how useful
    the alarms of a rare finding are. NIH's findings are a program's reading of reports."""
    log_odds = finding_scores(features, targets, train, test, **options)
    return multilabel_scores(log_odds, np.asarray(targets)[test], micro=False)["auroc"][0]


def weighted_auroc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve (B,) of `scores` (n,) for B weightings at once.

    The Mann-Whitney form, sum over positives i and negatives j of w_i w_j ([s_i > s_j] + [s_i =
    s_j] / 2) / (sum w_i sum w_j), with `positive` (n,) bool and `weights` (B, n) >= 0: for a
    bootstrap, how often each image was drawn. NaN if positives or negatives have no weight."""
    return _area(*_runs(scores, positive, weights))


def _area(ups: np.ndarray, downs: np.ndarray) -> np.ndarray:
    below = downs.sum(axis=1, keepdims=True) - np.cumsum(downs, axis=1)
    pairs = ups.sum(axis=1) * downs.sum(axis=1)
    wins = (ups * (below + downs / 2)).sum(axis=1)
    return wins / np.where(pairs > 0, pairs, np.nan)


def _average_precision(ups: np.ndarray, downs: np.ndarray) -> np.ndarray:
    """Sum over thresholds of (recall gained) x (precision there), without interpolation; equal
    scores are one threshold. A guess that knows nothing scores the prevalence, so findings of
    different frequency do not compare. NaN if the positives have no weight."""
    hits, taken = np.cumsum(ups, axis=1), np.cumsum(ups + downs, axis=1)
    precision = hits / np.where(taken > 0, taken, 1)
    total = ups.sum(axis=1)
    return (ups * precision).sum(axis=1) / np.where(total > 0, total, np.nan)


def _runs(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
    """Weight (B, runs) of positives and of negatives in each run of equal scores, highest first."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(-scores[order], prepend=-np.inf) != 0)
    sides = positive[order], ~positive[order]
    each = np.asarray(weights, dtype=float)[:, order]
    return [np.add.reduceat(each * side, starts, axis=1) for side in sides]


def multilabel_scores(probabilities, targets, weights=None, micro=True) -> dict[str, np.ndarray]:
    """Macro and micro averages of AUROC and average precision over F labels.

    Macro: the mean over labels of the number within each label, so a rare finding counts as much as
    a frequent one, and to know the frequencies helps nothing. Micro: one number over all pairs of
    image and label, so a guess that only knows how frequent each label is scores high without a
    look at any image: read it beside that of such a guess.

    `probabilities` (n, F) are comparable between labels; a column with NaN is left out. `targets`
    (n, F) are bool. `weights` (B, n) of the images are for a bootstrap; without them each counts
    once. `micro` averages cost as much as all else. Returns ``auroc_macro, auroc_micro, ap_macro,
    ap_micro`` (B,); ``auroc, ap`` (B, F)."""
    probabilities, targets = np.asarray(probabilities, dtype=float), np.asarray(targets)
    weights = np.ones((1, len(targets))) if weights is None else np.asarray(weights, dtype=float)
    known = ~np.isnan(probabilities).any(axis=0)
    columns = np.flatnonzero(known)
    runs = [_runs(probabilities[:, k], targets[:, k], weights) for k in columns]
    if micro:
        pairs = probabilities[:, known].ravel(), targets[:, known].ravel()
        all_pairs = _runs(*pairs, np.repeat(weights, known.sum(), axis=1))
    found = {}
    for name, measure in (("auroc", _area), ("ap", _average_precision)):
        found[name] = np.full((len(weights), len(known)), np.nan)
        for label, of_label in zip(columns, runs, strict=True):
            found[name][:, label] = measure(*of_label)
        found[f"{name}_macro"] = mean_known(found[name], axis=1)
        if micro:
            found[f"{name}_micro"] = measure(*all_pairs)
    return found


def finding_intervals(runs: Mapping, n_boot: int = 200) -> np.ndarray:
    """AUROC of each finding with its 95 % interval, (F, 3): a mean over runs, and a bootstrap over
    test patients. `runs` are answers of one arm as `lib.study.measure.answers` gives them."""
    first = next(iter(runs.values()))
    draws = bootstrap_weights(first["labelled_test_patients"], n_boot, 0)
    weights = np.concatenate([np.ones((1, len(first["truth"]))), *draws])
    areas = np.full((len(runs), first["truth"].shape[1], len(weights)), np.nan)
    for area, run in zip(areas, runs.values(), strict=True):
        for finding, scores in enumerate(run["findings"].T):
            if not np.isnan(scores).any():
                area[finding] = weighted_auroc(scores, run["truth"][:, finding], weights)
    means = areas.mean(axis=0)  # (F, 1 + B)
    return np.column_stack([means[:, 0], *np.nanpercentile(means[:, 1:], [2.5, 97.5], axis=1)])


def mean_known(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Mean without NaN; NaN, without a warning, if there is nothing else."""
    return np.ma.filled(np.ma.masked_invalid(values).mean(axis=axis), np.nan)


def roc_curves(probabilities: np.ndarray, targets: np.ndarray, false_positive_rates) -> dict:
    """ROC curves averaged over F labels, ``macro`` and ``micro``: true positive rates (m,).

    Macro: the mean over labels of the true positive rate at the same false positive rate (vertical
    averaging, Fawcett 2006, section 8); its area is the macro AUROC. Micro: the curve of all pairs
    of image and label. Read both as `multilabel_scores`, which has the same parameters.
    `false_positive_rates` (m,) ascend from 0 to 1; between thresholds lines are straight."""
    known = ~np.isnan(probabilities).any(axis=0)
    defined = np.flatnonzero(known & targets.any(axis=0) & ~targets.all(axis=0))
    if not len(defined):
        return dict.fromkeys(("macro", "micro"), np.full(len(false_positive_rates), np.nan))

    def curve(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
        false, true, _ = roc_curve(positive, scores)
        return np.interp(false_positive_rates, false, true)  # a vertical piece: its upper end

    macro = np.mean([curve(probabilities[:, f], targets[:, f]) for f in defined], axis=0)
    micro = curve(probabilities[:, known].ravel(), targets[:, known].ravel())
    return {"macro": macro, "micro": micro}


def finding_neighbourhood(points, targets: np.ndarray, n_neighbors=10, least=5) -> float:
    """Whether images of one finding lie together in a map `points` (N, d), `targets` (N, F) bool.

    The mean over findings of at least `least` images: of the share of their `n_neighbors` nearest
    others that have it too, less the share of all others that have it. 0 is chance, 1 the most, NaN
    if no finding is frequent enough. Images of one patient may lie together for other reasons."""
    nearest = NearestNeighbors(n_neighbors=n_neighbors).fit(points).kneighbors()[1]  # without self
    frequent = targets.T[targets.sum(axis=0) >= least]
    lifts = [has[nearest[has]].mean() - (has.sum() - 1) / (len(has) - 1) for has in frequent]
    return float(mean_known(np.array(lifts)))


def relative_distance(reference: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """How far features (N, D) move under each of T transformations, `moved` (T, N, D): (T,).

    Mean over images of |f(image) - f(moved image)|, in units of the mean distance between the
    features of two images. 0 is invariant; at 1 a moved image is as far from itself as from any
    other. NaN if all features are equal."""
    reference, moved = np.asarray(reference, dtype=float), np.asarray(moved, dtype=float)
    unit = pdist(reference).mean()
    # the difference that rounding leaves between equal images is no distance
    unit = unit if unit > 1e-6 * np.abs(reference).max() else np.nan
    return np.linalg.norm(moved - reference, axis=2).mean(axis=1) / unit
