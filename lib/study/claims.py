"""The paper's five key findings as claims: what is measured for each, how arms are compared, and
the rule that gives a verdict.

Everything here was fixed before the study was run: the measures (`MEASURES`), which of them decides
(``primary``), the smallest difference that would matter (``smallest``), the comparisons
(`COMPARISONS`) and the rule (`rule`). Numbers in, numbers out; `lib.study.report` writes the text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats
from scipy.special import expit

from lib.metrics import bootstrap_weights, seed_interval
from lib.study.scores import multilabel_scores

ALPHA = 0.05
LEAST_SEEDS = 3
VERDICTS = ("supported", "not supported", "reversed", "undecided")
# a run has collapsed if its largest cluster holds more than this share of the images, or if the
# perplexity of its cluster sizes is below this share of K
LARGEST_CLUSTER, LEAST_PERPLEXITY = 0.5, 0.25


@dataclass(frozen=True)
class Claim:
    """A key finding of the project page: what the page says, and what the measure cannot show."""

    key: str
    title: str
    page: str
    caution: str


# fmt: off
CLAIMS: tuple[Claim, ...] = (
    Claim("convergence", "Faster convergence",
          "the P4M network stabilises clustering early in training",
          "NMI(t, t-1) shows that a network agrees with itself, not that its clusters mean "
          "anything: a network that learns nothing can be settled from the start. Read it beside "
          "the controls."),
    Claim("stability", "Improved stability", "NMI and loss fluctuate less than with AlexNet",
          "A curve is steady if nothing is learnt any more, and a slow rise counts as unsteady."),
    Claim("structure", "More structured representations",
          "clusters are more clearly separated in t-SNE maps",
          "Silhouette and Davies-Bouldin reward round clusters, whatever they consist of, and look "
          "better in a space of fewer dimensions. A t-SNE map depends on perplexity and start."),
    Claim("transfer", "Better transferability",
          "the linear probe scores higher (0.567 against 0.564)",
          "The probe of a network's own clusters says how linear K-means cells are. The probe of "
          "label combinations means little unless it beats the most frequent class. So the labels "
          "decide, one by one."),
    Claim("invariance", "No augmentation required",
          "robustness to rotation comes from the architecture instead of augmented images",
          "Under quarter turns and mirrors P4M's features cannot change, by construction, so free "
          "turns decide. A single cluster would keep every image: read the AMI beside the share. "
          "Invariance has a price: see what a linear probe can no longer tell."),
)
# fmt: on


@dataclass(frozen=True)
class Measure:
    """One number of a run: its `key` in results.json, the `claim` it is about, whether a higher
    number speaks for the claim, the `smallest` difference that would matter in its own unit, the
    step in which it is counted (`resolution`, 0: continuous), whether it decides (`primary`, one
    per claim), and which answers of the probes it is a mean of (`scores`, for the bootstrap).
    """

    key: str
    claim: str
    title: str
    higher_is_better: bool
    smallest: float
    resolution: float = 0.0
    primary: bool = False
    scores: str = ""


_SETTLED = "first epoch from which NMI(t, t-1) stays within 0.02 of its final mean"
_MAPS, _FREE = "mean of several t-SNE maps", "free turns (by 15 degrees, no quarter turns)"
# fmt: off
MEASURES: tuple[Measure, ...] = (
    Measure("converged_nmi", "convergence", f"{_SETTLED} (one past the last: never)",
            False, 1, 1, primary=True),
    Measure("converged_ami", "convergence", "the same for AMI(t, t-1)", False, 1, 1),
    Measure("nmi_sd", "stability", "standard deviation of NMI(t, t-1), second half",
            False, 0.005, primary=True),
    Measure("ami_sd", "stability", "the same for AMI(t, t-1)", False, 0.005),
    Measure("loss_increases", "stability", "epochs at which the loss rises", False, 1, 1),
    Measure("loss_increase_size", "stability", "sum of these rises, in units of ln K", False, 0.01),
    Measure("silhouette", "structure", "silhouette in the clustered space, -1 to 1",
            True, 0.02, primary=True),
    Measure("davies_bouldin", "structure", "Davies-Bouldin, lower is more separate", False, 0.1),
    Measure("map_silhouette", "structure", f"silhouette, {_MAPS}", True, 0.05),
    Measure("map_trust", "structure", f"trustworthiness, {_MAPS}", True, 0.01),
    Measure("map_findings", "structure", f"neighbours that share a label, above chance, {_MAPS}",
            True, 0.01),
    Measure("auroc_macro", "transfer", "probe of the labels: mean AUROC, 0.5 is chance",
            True, 0.01, primary=True, scores="findings"),
    Measure("ap_macro", "transfer", "probe of the labels: mean average precision",
            True, 0.01, scores="findings"),
    Measure("auroc_micro", "transfer", "probe of the labels: micro AUROC",
            True, 0.01, scores="findings"),
    Measure("probe_combinations", "transfer", "probe of label combinations (script): accuracy",
            True, 0.01, scores="combinations"),
    Measure("probe_clusters", "transfer", "probe of cluster assignments (page): accuracy",
            True, 0.02, scores="clusters"),
    Measure("kept_free", "invariance", f"share keeping their cluster under {_FREE}",
            True, 0.05, primary=True),
    Measure("ami_free", "invariance", "AMI of clusters before and after these, 0 is chance",
            True, 0.05),
    Measure("distance_free", "invariance", "distance features move (1: as far as another image)",
            False, 0.05),
    Measure("kept_lattice", "invariance", "share keeping it under turns and mirrors of the square",
            True, 0.05),
    Measure("distance_lattice", "invariance", "distance features move under these", False, 0.05),
    Measure("kept_drawn", "invariance", "share keeping it when the phantom is drawn turned",
            True, 0.05),
)
# fmt: on
MEASURE = {measure.key: measure for measure in MEASURES}

# treatment, reference, what the comparison is for; the first is the page's own
COMPARISONS: tuple[tuple[str, str, str], ...] = (
    ("p4m", "alexnet", "the page's comparison"),
    ("p4m", "alexnet-plain", "both without augmentation"),
    ("p4m", "cnn_params", "the symmetry alone, at equal parameters"),
    ("p4m", "cnn_flops", "the symmetry alone, at equal FLOPs"),
    ("p4m", "cnn_params-rotation", "symmetry against augmentation, same layout and parameters"),
    ("p4m", "cnn_flops-rotation", "symmetry against augmentation, same layout and FLOPs"),
    ("p4m", "p4", "what the mirror adds"),
    ("p4m", "p4m-rotation", "without against with augmentation, same network"),
    ("p4m", "p4m-untrained", "what training adds to P4M"),
    ("alexnet", "alexnet-untrained", "what training adds to AlexNet"),
    ("p4m", "p4m-index", "P4M on its clusters against labels index mod K"),
    ("p4m", "p4m-shuffled", "P4M on its clusters against labels shuffled once"),
    ("p4m", "p4m-linear", "standardised against linear head, P4M"),
    ("alexnet", "alexnet-linear", "standardised against linear head, AlexNet"),
    ("p4m", "p4m-running", "fresh against running batch statistics, P4M"),
    ("alexnet", "alexnet-running", "fresh against running batch statistics, AlexNet"),
)

Results = Mapping[str, Any]  # contents of results.json, see lib.study.measure.gather
Answers = Mapping[str, np.ndarray]  # of the probes of a run, see lib.study.measure.answers


# --- reading the results --------------------------------------------------------------------------


def _seeds(results: Results, arm: str) -> Mapping[str, Any]:
    return results["arms"][arm]["seeds"] if arm in results["arms"] else {}


def values_of(results: Results, arm: str, key: str) -> dict[str, float]:
    """A measure by seed, without the seeds that have no number."""
    found = {seed: run["values"].get(key) for seed, run in _seeds(results, arm).items()}
    numbers = {seed: float(v) for seed, v in found.items() if isinstance(v, int | float)}
    return {seed: v for seed, v in numbers.items() if math.isfinite(v)}


def reason(results: Results, arm: str, key: str) -> str:
    """Why a measure has no number, such as "fewer than 2 classes"; empty if nothing is known."""
    found = (run["values"].get(key) for run in _seeds(results, arm).values())
    return next((value for value in found if isinstance(value, str)), "")


def collapsed(results: Results, arm: str) -> list[str]:
    """Seeds of the runs that collapsed: most images in one cluster, or few clusters in use."""
    largest = values_of(results, arm, "largest_cluster")
    perplexity = values_of(results, arm, "perplexity")
    least = LEAST_PERPLEXITY * results["settings"]["n_clusters"]
    return [s for s in largest if largest[s] > LARGEST_CLUSTER or perplexity.get(s, least) < least]


def mean_curves(results: Results, name: str, part: str) -> dict[str, list[float]]:
    """A curve in the details of runs, such as ``kept`` of ``angles``: its mean over seeds, by arm;
    NaN where no seed has a value.
    """
    found = {}
    for arm, entry in results["arms"].items():
        tables = [run["details"].get(name) for run in entry["seeds"].values()]
        seeds = np.array([table[part] for table in tables if table], dtype=float)
        if len(seeds):
            found[arm] = np.ma.masked_invalid(seeds).mean(axis=0).filled(math.nan).tolist()
    return found


def overview(results: Results) -> dict[str, Any]:
    """What figures draw: ``dataset_label``, ``claims`` and ``measures`` (as dicts),
    ``comparisons``, and ``arms``: arm -> title, kind, ``seeds``, ``collapsed`` (seeds),
    ``measures``: key -> mean, low, high (95 % over seeds), n, by_seed.
    """
    arms = {}
    for arm, entry in results["arms"].items():
        measures = {}
        for key in dict.fromkeys(key for run in entry["seeds"].values() for key in run["values"]):
            if by_seed := values_of(results, arm, key):
                mean, low, high = seed_interval(list(by_seed.values()))
                numbers = {"mean": mean, "low": low, "high": high, "n": len(by_seed)}
                measures[key] = numbers | {"by_seed": by_seed}
        about = {"title": entry["title"], "kind": entry["kind"], "seeds": list(entry["seeds"])}
        arms[arm] = {**about, "collapsed": collapsed(results, arm), "measures": measures}
    return {
        "dataset_label": results["dataset"]["label"],
        "claims": [asdict(claim) for claim in CLAIMS],
        "measures": [asdict(measure) for measure in MEASURES],
        "comparisons": results.get("comparisons", []),
        "arms": arms,
    }


# --- statistics -----------------------------------------------------------------------------------


def paired(
    differences: ArrayLike, extra_se: float = 0.0, resolution: float = 0.0
) -> dict[str, float]:
    """Mean of paired differences (n,), one per seed, with interval, test and effect size.

    Student's t: with three to five seeds no test without an assumption on the distribution can
    reach a corrected level (the exact sign-flip test has p of at least 2 / 2^n, 0.0625 for five).
    It assumes that the differences under the same seed are roughly normal; without a difference
    between the arms they are symmetric about 0, where t errs on the safe side for long tails.

    `extra_se` is the standard error from a source that all seeds share, such as which patients were
    tested. It is added in quadrature; degrees of freedom by Welch and Satterthwaite, with this part
    taken as known. The interval is too wide rather than too narrow.

    `resolution` is the step of the measure. The standard deviation is taken to be at least that of
    rounding both arms, resolution / sqrt(6): three equal whole numbers are no proof of no spread.

    Returns
    -------
    dict
        ``n``, ``mean``, ``low``, ``high`` (95 %), ``p`` (two-sided), ``sign_flip_p`` (exact),
        ``hedges_g``: mean over standard deviation, times 1 - 3 / (4 n - 5) (Hedges 1981). NaN if n
        is too small. ValueError for no difference, or one that is not finite.
    """
    differences = np.asarray(differences, dtype=float)
    n = differences.size
    if differences.ndim != 1 or n == 0 or not np.isfinite(differences).all():
        raise ValueError(f"expected finite differences (n,), n at least 1, got {differences}")
    mean = float(differences.mean())
    found = {"n": n, "mean": mean}
    found |= dict.fromkeys(("low", "high", "p", "sign_flip_p", "hedges_g"), math.nan)
    if n < 2:
        return found
    flips = stats.permutation_test((differences,), np.mean, permutation_type="samples")
    found["sign_flip_p"] = float(flips.pvalue)
    sd = max(float(differences.std(ddof=1)), resolution / math.sqrt(6))
    between = sd**2 / n
    se = math.sqrt(between + extra_se**2)
    if se == 0:  # equal to the last digit: nothing can be said of their spread
        return found | ({"low": mean, "high": mean, "p": 1.0} if mean == 0 else {})
    df = (n - 1) * (se**2 / between) ** 2 if between > 0 else math.inf
    low, high = stats.t.interval(1 - ALPHA, df, mean, se)
    p = 2 * float(stats.t.sf(abs(mean) / se, df))
    # the correction of g leaves nothing of two values
    g = mean / sd * (1 - 3 / (4 * n - 5)) if sd > 0 and n > 2 else math.nan
    return found | {"low": float(low), "high": float(high), "p": p, "hedges_g": g}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values (Holm 1979): to reject those at most alpha keeps the chance of any
    error in the family at most alpha.

    NaN is a claim that could not be tested: it stays NaN but counts, so that the family always has
    the same size.
    """
    p = np.nan_to_num(np.asarray(p_values, dtype=float), nan=1.0)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return np.where(np.isnan(p_values), math.nan, adjusted).tolist()


def verdict(n: int, mean: float, low: float, high: float, p_holm: float, smallest: float) -> str:
    """The verdict on a claim from its primary measure, oriented so that a positive difference
    speaks for the claim. See `rule`.
    """
    if n < LEAST_SEEDS or math.isnan(p_holm):
        return "undecided"
    if p_holm <= ALPHA and mean > 0 and high >= smallest:
        return "supported"
    if p_holm <= ALPHA and mean < 0 and low <= -smallest:
        return "reversed"
    return "not supported" if high < smallest else "undecided"


def rule() -> str:
    """The rule in words, as `verdict` applies it."""
    return (
        "For each claim one measure was chosen beforehand, and the smallest difference of it that "
        "would matter. Two arms are compared seed by seed; a positive difference speaks for the "
        "claim. Student's t on the differences gives a 95 % interval and p (for the probe, a "
        "bootstrap adds the chance of the test patients); p is corrected over the "
        f"{len(CLAIMS)} claims (Holm). **Supported**: corrected p at most {ALPHA:g}, in favour, "
        "and the interval reaches the smallest difference that matters. **Reversed**: the same, "
        "against. **Not supported**: neither, and the whole interval is below the smallest "
        "difference that matters. **Undecided**: everything else, and everything with fewer than "
        f"{LEAST_SEEDS} seeds."
    )


@lru_cache
def detectable(n: int, power: float = 0.8) -> float:
    """Standardised difference (mean over standard deviation) that n seeds find with `power` at
    Holm's strictest level, by the noncentral t distribution; NaN for fewer than `LEAST_SEEDS`.
    """
    if n < LEAST_SEEDS:
        return math.nan
    critical = stats.t.ppf(1 - ALPHA / (2 * len(CLAIMS)), n - 1)

    def excess(d: float) -> float:
        return stats.nct.sf(critical, n - 1, d * math.sqrt(n)) - power

    return float(optimize.brentq(excess, 0.01, 200))


def _resampled(measure: Measure, answers: Answers, weights: np.ndarray) -> np.ndarray:
    """The measure (B,) under bootstrap weights (B, images)."""
    if measure.scores != "findings":
        return weights @ answers[measure.scores] / weights.sum(axis=1)
    micro = measure.key.endswith("micro")  # log-odds of two labels compare as probabilities only
    log_odds = expit(answers["findings"]) if micro else answers["findings"]
    return multilabel_scores(log_odds, answers["truth"], weights, micro=micro)[measure.key]


def patient_se(
    treatment: Sequence[Answers], reference: Sequence[Answers], measure: Measure, n_boot: int = 300
) -> float:
    """Standard error that the choice of test patients gives to a mean difference of probes, from
    the answers of each seed: patients are drawn with replacement, the same for all runs.

    0 if there is one patient only, or answers are missing; ValueError if two runs were tested on
    different images.
    """
    everyone = [*treatment, *reference]
    if not measure.scores or not all(measure.scores in answers for answers in everyone):
        return 0.0
    part = "test" if measure.scores == "clusters" else "labelled_test"
    if any(not np.array_equal(answers[part], everyone[0][part]) for answers in everyone):
        raise ValueError("the two arms were tested on different images")
    samples = []
    for weights in bootstrap_weights(everyone[0][f"{part}_patients"], n_boot, seed=0):
        values = [_resampled(measure, answers, weights) for answers in everyone]
        ours, theirs = values[: len(treatment)], values[len(treatment) :]
        samples.append(np.mean(ours, axis=0) - np.mean(theirs, axis=0))
    sample = np.concatenate([np.empty(0), *samples])
    sample = sample[~np.isnan(sample)]
    return float(sample.std(ddof=1)) if len(sample) > 1 else 0.0


def compare(
    results: Results,
    treatment: str,
    reference: str,
    purpose: str = "",
    answers: Mapping[str, Mapping[str, Answers]] | None = None,
    n_boot: int = 300,
) -> dict[str, Any]:
    """Two arms on every measure of every claim, over the seeds that both have; a positive
    difference speaks for the claim about `treatment`. `purpose` says what the comparison is for;
    `answers` (arm -> seed -> answers) are for the bootstrap over patients.

    Returns
    -------
    dict
        ``treatment, reference, purpose, seeds, detectable_g``; ``measures``: per measure ``measure,
        claim, primary, seeds`` and, if there are seeds, what `paired` returns, ``treatment,
        reference`` (means), ``patient_se``, ``p_holm``; ``verdicts``: per claim ``claim, measure,
        n, verdict``.
    """
    arms, entries = (treatment, reference), {}
    for key, measure in MEASURE.items():
        ours, theirs = (values_of(results, arm, key) for arm in arms)
        seeds = [seed for seed in ours if seed in theirs]
        entry = {"measure": key, "claim": measure.claim, "primary": measure.primary, "seeds": seeds}
        if seeds:
            a, b = (np.array([of[seed] for seed in seeds]) for of in (ours, theirs))
            by_arm = [[(answers or {}).get(arm, {}).get(s, {}) for s in seeds] for arm in arms]
            extra = patient_se(*by_arm, measure, n_boot)
            sign = 1 if measure.higher_is_better else -1
            entry |= paired(sign * (a - b), extra, measure.resolution)
            entry |= {"treatment": float(a.mean()), "reference": float(b.mean())}
            entry |= {"patient_se": extra, "p_holm": math.nan}
        entries[key] = entry
    decisive = [next(m for m in MEASURES if m.primary and m.claim == c.key) for c in CLAIMS]
    adjusted, verdicts = holm([entries[m.key].get("p", math.nan) for m in decisive]), []
    for measure, p in zip(decisive, adjusted, strict=True):
        entry, how = entries[measure.key], "undecided"
        if entry["seeds"]:
            entry["p_holm"] = p
            numbers = (entry[name] for name in ("n", "mean", "low", "high"))
            how = verdict(*numbers, p, measure.smallest)
        about = {"claim": measure.claim, "measure": measure.key, "n": len(entry["seeds"])}
        verdicts.append(about | {"verdict": how})
    ours, theirs = (results["arms"][arm]["seeds"] for arm in arms)
    seeds = [seed for seed in ours if seed in theirs]
    about = {"treatment": treatment, "reference": reference, "purpose": purpose, "seeds": seeds}
    about |= {"detectable_g": detectable(len(seeds)), "verdicts": verdicts}
    return about | {"measures": list(entries.values())}


def compare_all(
    results: Results, answers: Mapping[str, Mapping[str, Answers]] | None = None, n_boot: int = 300
) -> list[dict[str, Any]]:
    """`compare` for each of `COMPARISONS` whose arms are both there."""
    return [
        compare(results, *pair, purpose, answers, n_boot)
        for *pair, purpose in COMPARISONS
        if all(arm in results["arms"] for arm in pair)
    ]
