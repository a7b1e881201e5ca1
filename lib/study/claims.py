"""The paper's five key findings as claims: what is measured for each, how arms are compared, and
the rule that gives a verdict.

Everything here is fixed before a result is seen: the measures (`MEASURES`), which of them decides
(``primary``), the smallest difference that would matter (``smallest``), the comparisons
(`COMPARISONS`) and the rule (`rule`). Numbers in, numbers and text out; no network."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats
from scipy.special import expit

from lib.metrics import multilabel_scores, prevalence_guess, roc_curves, seed_interval
from lib.study.markdown import number, span, table
from lib.study.schema import FLAG, NUMBER, TEXT, WHOLE, problems

FORMAT = 1  # of claims.json
ALPHA = 0.05
LEAST_SEEDS = 3
VERDICTS = ("supported", "not supported", "reversed", "undecided")
NOT_CLINICAL = "Not for clinical use."


@dataclass(frozen=True)
class Claim:
    """A key finding of the project page.

    Attributes
    ----------
    key, title : str
    page : str
        What the page says, in short.
    caution : str
        What the measure cannot show.
    """

    key: str
    title: str
    page: str
    caution: str


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "convergence",
        "Faster convergence",
        "the P4M network stabilises clustering early in training",
        "NMI(t, t-1) shows that a network agrees with itself, not that it agrees with anything real: a network that learns nothing, or "
        "fixed labels that mean nothing, can be settled from the start. The controls stand in the same figure.",
    ),
    Claim(
        "stability",
        "Improved stability",
        "NMI and loss fluctuate less than with AlexNet",
        "A curve is steady if nothing is learnt any more, and a slow rise counts as unsteady.",
    ),
    Claim(
        "structure",
        "More structured representations",
        "clusters are more clearly separated in t-SNE maps",
        "Silhouette and Davies-Bouldin reward round clusters in their own space, whatever they are made of, and look better in a space "
        "of fewer dimensions, which a network with fewer features than PCA components has. A map depends on perplexity and start.",
    ),
    Claim(
        "transfer",
        "Better transferability",
        "the linear probe scores higher (0.567 against 0.564)",
        "The probe of a network's own clusters says how linear K-means cells are, and the one of label combinations means little unless it "
        "beats the share of the most frequent class; so the findings decide, and the other two stand beside them.",
    ),
    Claim(
        "invariance",
        "No augmentation required",
        "robustness to rotation comes from the architecture instead of augmented images",
        "Under quarter turns and mirrors of the square a P4M code cannot change, by construction, so these do not decide; turns off the "
        "lattice do. A clustering with one cluster keeps every image: read the AMI beside the share. Invariance has a price: see "
        "laterality.",
    ),
)


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    Attributes
    ----------
    key : str
        As in ``measures.json``.
    claim : str
        Key of its claim.
    title : str
    higher_is_better : bool
        Whether a higher number speaks for the claim.
    smallest : float
        Smallest difference that would matter, in the measure's units.
    resolution : float
        Step in which it is counted (0: continuous). Differences cannot be known finer than that.
    primary : bool
        Decides the verdict; one a claim.
    scores : str
        Which image-by-image answers it is the mean of, for the bootstrap over patients; empty:
        none.
    """

    key: str
    claim: str
    title: str
    higher_is_better: bool
    smallest: float
    resolution: float = 0.0
    primary: bool = False
    scores: str = ""


MEASURES: tuple[Measure, ...] = (
    Measure(
        "converged_nmi",
        "convergence",
        "first epoch from which NMI(t, t-1) stays within 0.02 of its final mean (one past the last: never)",
        False,
        1.0,
        1.0,
        primary=True,
    ),
    Measure("converged_ami", "convergence", "the same for AMI(t, t-1)", False, 1.0, 1.0),
    Measure(
        "nmi_sd",
        "stability",
        "standard deviation of NMI(t, t-1) over the second half of training",
        False,
        0.005,
        primary=True,
    ),
    Measure("ami_sd", "stability", "the same for AMI(t, t-1)", False, 0.005),
    Measure("loss_increases", "stability", "epochs at which the loss rises", False, 1.0, 1.0),
    Measure("loss_increase_size", "stability", "sum of these rises, in units of ln K", False, 0.01),
    Measure(
        "silhouette",
        "structure",
        "silhouette of the clusters in the clustered space, -1 to 1",
        True,
        0.02,
        primary=True,
    ),
    Measure(
        "davies_bouldin",
        "structure",
        "Davies-Bouldin index there, lower is more separate",
        False,
        0.1,
    ),
    Measure(
        "map_silhouette",
        "structure",
        "silhouette of the clusters in t-SNE, mean of several maps",
        True,
        0.05,
    ),
    Measure("map_trust", "structure", "trustworthiness of t-SNE, mean of several maps", True, 0.01),
    Measure(
        "map_findings",
        "structure",
        "neighbours in t-SNE that share a finding, above chance, mean of several maps",
        True,
        0.01,
    ),
    Measure(
        "auroc_macro",
        "transfer",
        "probe of the 14 findings: mean AUROC, 0.5 is chance",
        True,
        0.01,
        primary=True,
        scores="findings",
    ),
    Measure(
        "ap_macro",
        "transfer",
        "probe of the 14 findings: mean average precision",
        True,
        0.01,
        scores="findings",
    ),
    Measure(
        "auroc_micro",
        "transfer",
        "probe of the 14 findings: micro AUROC",
        True,
        0.01,
        scores="findings",
    ),
    Measure(
        "probe_combinations",
        "transfer",
        "probe of label combinations (published script): accuracy",
        True,
        0.01,
        scores="combinations",
    ),
    Measure(
        "probe_clusters",
        "transfer",
        "probe of cluster assignments (page): accuracy",
        True,
        0.02,
        scores="clusters",
    ),
    Measure(
        "kept_free",
        "invariance",
        "share keeping their cluster under turns by 15 degrees, off the lattice",
        True,
        0.05,
        primary=True,
    ),
    Measure(
        "ami_free",
        "invariance",
        "AMI of clusters before and after these turns, 0 is chance",
        True,
        0.05,
    ),
    Measure(
        "distance_free",
        "invariance",
        "distance features move under these turns, 1: as far as another image",
        False,
        0.05,
    ),
    Measure(
        "kept_lattice",
        "invariance",
        "share keeping their cluster under the 7 turns and mirrors of the square",
        True,
        0.05,
    ),
    Measure("distance_lattice", "invariance", "distance features move under these", False, 0.05),
    Measure(
        "kept_drawn",
        "invariance",
        "share keeping their cluster when the same phantom is drawn turned",
        True,
        0.05,
    ),
)

# tables over all arms: heading, then the measures that are its columns; what a number must be read
# beside stands next to it
TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "training": (
        "Curves",
        {
            "converged_nmi": "settled at epoch",
            "nmi_final": "last NMI",
            "nmi_chance": "chance",
            "ami_final": "last AMI",
            "nmi_sd": "sd of NMI",
            "loss_final": "last loss / ln K",
        },
    ),
    "structure": (
        "Structure",
        {
            "silhouette": "silhouette",
            "davies_bouldin": "Davies-Bouldin",
            "map_silhouette": "silhouette, t-SNE",
            "map_trust": "trustworthiness, t-SNE",
            "map_findings": "finding neighbours above chance, t-SNE",
        },
    ),
    "probes": (
        "Linear probes",
        {
            "probe_clusters": "clusters",
            "probe_clusters_majority": "majority",
            "probe_combinations": "combinations",
            "probe_combinations_majority": "majority",
            "auroc_macro": "14 findings, mean AUROC",
            "ap_macro": "mean average precision",
            "ap_macro_prevalence": "of a guess",
        },
    ),
    "averages": (
        "Macro and micro averages",
        {
            "auroc_macro": "findings, macro AUROC",
            "auroc_macro_prevalence": "guess",
            "auroc_micro": "findings, micro AUROC",
            "auroc_micro_prevalence": "guess",
            "micro_combinations": "combinations, micro AUROC",
            "micro_combinations_prevalence": "guess",
        },
    ),
    "invariance": (
        "Clusters kept",
        {
            "kept_lattice": "turns and mirrors of the square",
            "kept_free": "free turns",
            "ami_free": "AMI, free turns",
            "distance_free": "distance, free turns",
            "kept_drawn": "phantom drawn turned",
        },
    ),
    "price": (
        "The price of invariance: a linear probe tells",
        {
            "tells_mirrored": "a mirrored film",
            "tells_upside_down": "an upside-down film",
            "tells_quarter_turn": "a quarter turn",
            "tells_effusion_side": "left from right effusion (AUROC)",
        },
    ),
    "meaning": (
        "What clusters follow (AMI, 0 is chance)",
        {
            f"follows_{name}": name.replace("_", " ")
            for name in ("findings", "view_position", "sex", "age", "brightness", "patient")
        },
    ),
    "retrieval": (
        "Retrieval",
        {
            "retrieval_lift": "precision at 5 of a finding, above chance",
            "retrieval_same_patient": "matches of the same patient",
            "retrieval_same_patient_chance": "by chance",
        },
    ),
}

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
)


# --- statistics -----------------------------------------------------------------------------------


def paired(
    differences: ArrayLike, extra_se: float = 0.0, resolution: float = 0.0
) -> dict[str, float]:
    """Mean of paired differences, one a seed, with interval, test and effect size.

    Student's t on the differences. With three to five seeds no test without an assumption on their
    distribution can reach a corrected level: the exact sign-flip test has p of at least 2 / 2^n,
    0.0625 for five. So t is used, which assumes that the differences between two arms under the
    same seed are roughly normal; under no difference they are symmetric about 0, where t errs
    little and on the safe side for long tails. The sign-flip p is given beside it.

    Parameters
    ----------
    differences : (n,) float
    extra_se : float
        Standard error from another source that all seeds share, such as which patients were tested.
        It is added in quadrature; degrees of freedom by Welch and Satterthwaite, this part taken as
        known. Seeds share the test set, so some of it may count twice: the interval is wide rather
        than narrow.
    resolution : float
        Step of the measure. The standard deviation of the differences is taken to be at least that
        of rounding both arms, resolution / sqrt(6): three equal whole numbers are not proof of no
        spread.

    Returns
    -------
    dict
        ``n``, ``mean``, ``low``, ``high`` (95 %), ``p`` (two-sided), ``sign_flip_p`` (exact, for n
        up to 12), ``hedges_g``: mean over standard deviation of the differences, times 1 - 3 / (4 n
        - 5) (Hedges 1981), positive where the mean is. NaN where n is too small.

    Raises
    ------
    ValueError
        Nothing to compare, or values that are not finite.
    """
    differences = np.asarray(differences, dtype=float)
    n = differences.size
    if differences.ndim != 1 or n == 0 or not np.isfinite(differences).all():
        raise ValueError(
            f"expected differences (n,) of at least one seed, all finite, got {differences}"
        )
    mean = float(differences.mean())
    found = {
        "n": n,
        "mean": mean,
        "low": math.nan,
        "high": math.nan,
        "p": math.nan,
        "sign_flip_p": math.nan,
        "hedges_g": math.nan,
    }
    if n < 2:
        return found
    sd = max(float(differences.std(ddof=1)), resolution / math.sqrt(6))
    between = sd**2 / n
    se = math.sqrt(between + extra_se**2)
    if n <= 12:
        sums = np.abs(np.array(list(product((1, -1), repeat=n))) @ differences)
        found["sign_flip_p"] = float((sums >= abs(differences.sum()) * (1 - 1e-12)).mean())
    if (
        se == 0
    ):  # all differences are the same to the last digit: nothing can be said of their spread
        return found | ({"low": mean, "high": mean, "p": 1.0} if mean == 0 else {})
    df = (n - 1) * (se**2 / between) ** 2 if between > 0 else math.inf
    half = float(stats.t.ppf(1 - ALPHA / 2, df)) * se
    p = 2 * float(stats.t.sf(abs(mean) / se, df))
    g = (
        mean / sd * (1 - 3 / (4 * n - 5)) if sd > 0 and n > 2 else math.nan
    )  # the correction leaves nothing of two values
    return found | {"low": mean - half, "high": mean + half, "p": p, "hedges_g": g}


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p of a family (Holm 1979): each at most the level with a chance of at most the level
    for any error in the family.

    NaN stands for a claim that could not be tested: it stays NaN but counts, so that the family is
    always the same size."""
    p = np.array([1.0 if math.isnan(value) else value for value in p_values])
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [
        math.nan if math.isnan(value) else float(a)
        for value, a in zip(p_values, adjusted, strict=True)
    ]


def verdict(n: int, mean: float, low: float, high: float, p_holm: float, smallest: float) -> str:
    """The verdict on a claim, from its primary measure, oriented so that a positive difference
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
        "For each claim one measure was chosen beforehand, and for it the smallest difference that would matter. Differences between two "
        "arms are taken seed by seed; positive speaks for the claim. Student's t on them gives a 95 % interval and p (for the probe, the "
        f"chance of the test patients is added by a bootstrap over patients); p is corrected over the {len(CLAIMS)} claims (Holm). "
        f"Supported: corrected p at most {ALPHA:g}, in favour, and the interval reaches the smallest difference that matters. Reversed: "
        "the same against. Not supported: neither, and the whole interval lies below the smallest difference that matters. Undecided at "
        f"this n: all else, and whatever has fewer than {LEAST_SEEDS} seeds."
    )


@lru_cache
def detectable(n: int, power: float = 0.8) -> float:
    """Standardised difference (mean over standard deviation of the differences) that n seeds find
    with `power` at Holm's strictest level.

    From the noncentral t distribution; NaN for fewer than `LEAST_SEEDS`.
    """
    if n < LEAST_SEEDS:
        return math.nan
    df = n - 1
    critical = stats.t.ppf(1 - ALPHA / (2 * len(CLAIMS)), df)
    return float(
        optimize.brentq(lambda d: stats.nct.sf(critical, df, d * math.sqrt(n)) - power, 0.01, 200)
    )


def patient_se(
    treatment: Sequence[Mapping[str, np.ndarray]],
    reference: Sequence[Mapping[str, np.ndarray]],
    measure: Measure,
    targets: np.ndarray,
    patients: np.ndarray,
    n_boot: int = 300,
    seed: int = 0,
) -> float:
    """Standard error that the choice of test patients gives to a mean difference of probes.

    Patients of the test set are drawn with replacement; in each sample the difference of the two
    arms is computed for every seed and averaged. All seeds and both arms see the same draw, which
    is what makes it a paired comparison.

    Parameters
    ----------
    treatment, reference : sequence of mappings, one a seed
        As `lib.study.measure.scores_of` gives them.
    measure : Measure
        With ``scores``.
    targets : (N, 14) bool
        Findings of all images.
    patients : (N,)
        Patient of each image.

    Returns
    -------
    float
        0 if there is one patient only, or the answers are missing.
    """
    rows = "test" if measure.scores == "clusters" else "labelled_test"
    if not all(measure.scores in scores and rows in scores for scores in (*treatment, *reference)):
        return 0.0
    tested = treatment[0][rows]
    if any(not np.array_equal(scores[rows], tested) for scores in (*treatment, *reference)):
        raise ValueError("the two arms were tested on different images")
    _, groups = np.unique(patients[tested], return_inverse=True)
    if groups.max() < 1:
        return 0.0
    draws = np.random.default_rng(seed).multinomial(
        groups.max() + 1, np.full(groups.max() + 1, 1 / (groups.max() + 1)), size=n_boot
    )
    probabilities = measure.key.endswith(
        "micro"
    )  # log-odds of different findings rank alike only within a finding

    def values(scores: Mapping[str, np.ndarray], weights: np.ndarray) -> np.ndarray:
        if measure.scores != "findings":
            return weights @ scores[measure.scores] / weights.sum(axis=1)
        log_odds = scores["findings"]
        if probabilities:
            log_odds = expit(log_odds)
        return multilabel_scores(log_odds, targets[tested], weights, micro=probabilities)[
            measure.key
        ]

    samples = []
    for block in np.array_split(draws, -(-n_boot // 32)):
        weights = block[:, groups].astype(float)
        differences = [
            values(a, weights) - values(b, weights)
            for a, b in zip(treatment, reference, strict=True)
        ]
        samples.append(np.mean(differences, axis=0))
    total = np.concatenate(samples)
    total = total[~np.isnan(total)]
    return float(total.std(ddof=1)) if len(total) > 1 else 0.0


def compare(
    values: Mapping[str, Mapping[int, Mapping[str, float | None]]],
    treatment: str,
    reference: str,
    purpose: str = "",
    scores: Mapping[str, Mapping[int, Mapping[str, np.ndarray]]] | None = None,
    targets: np.ndarray | None = None,
    patients: np.ndarray | None = None,
    n_boot: int = 300,
) -> dict[str, Any]:
    """Two arms on every measure of every claim, over the seeds that both have.

    Parameters
    ----------
    values : mapping of arm to mapping of seed to values
        ``values`` of ``measures.json``.
    treatment, reference : str
        Arms; a positive difference speaks for the claim about `treatment`.
    purpose : str
        What the comparison is for.
    scores : mapping of arm to mapping of seed to answers, optional
        See `lib.study.measure.scores_of`; with `targets` and `patients` for the bootstrap over
        patients of the primary measure.

    Returns
    -------
    dict
        As ``comparisons`` in claims.json.
    """
    seeds = sorted(set(values[treatment]) & set(values[reference]))
    found: list[dict[str, Any]] = []
    for measure in MEASURES:
        pairs = [
            (values[treatment][seed].get(measure.key), values[reference][seed].get(measure.key))
            for seed in seeds
        ]
        usable = [
            seed
            for seed, pair in zip(seeds, pairs, strict=True)
            if all(v is not None and math.isfinite(v) for v in pair)
        ]
        entry: dict[str, Any] = {
            "measure": measure.key,
            "claim": measure.claim,
            "primary": measure.primary,
            "seeds": usable,
        }
        if usable:
            a, b = (
                np.array([values[arm][seed][measure.key] for seed in usable], dtype=float)
                for arm in (treatment, reference)
            )
            extra = 0.0
            if (
                measure.scores
                and scores is not None
                and targets is not None
                and patients is not None
            ):
                by_arm = [
                    [scores.get(arm, {}).get(seed, {}) for seed in usable]
                    for arm in (treatment, reference)
                ]
                extra = patient_se(*by_arm, measure, targets, patients, n_boot)
            sign = 1 if measure.higher_is_better else -1
            entry |= paired(sign * (a - b), extra, measure.resolution)
            entry |= {
                "treatment": float(a.mean()),
                "reference": float(b.mean()),
                "patient_se": extra,
                "p_holm": math.nan,
            }
        found.append(entry)
    primary = [
        next(e for e in found if e["claim"] == claim.key and e["primary"]) for claim in CLAIMS
    ]
    verdicts = []
    for claim, entry, adjusted in zip(
        CLAIMS, primary, holm([e.get("p", math.nan) for e in primary]), strict=True
    ):
        measure = next(m for m in MEASURES if m.key == entry["measure"])
        if entry["seeds"]:
            entry["p_holm"] = adjusted
            how = verdict(
                entry["n"], entry["mean"], entry["low"], entry["high"], adjusted, measure.smallest
            )
        else:
            how = "undecided"
        verdicts.append(
            {"claim": claim.key, "verdict": how, "n": len(entry["seeds"]), "measure": measure.key}
        )
    return {
        "treatment": treatment,
        "reference": reference,
        "purpose": purpose,
        "seeds": seeds,
        "verdicts": verdicts,
        "measures": found,
        "detectable_g": detectable(len(seeds)),
    }


# --- claims.json ----------------------------------------------------------------------------------


def over_seeds(values: Mapping[int, Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Mean and 95 % interval over seeds of every measure of an arm."""
    keys = {key: None for numbers in values.values() for key in numbers}
    found = {}
    for key in keys:
        by_seed = {seed: numbers.get(key) for seed, numbers in values.items()}
        known = [v for v in by_seed.values() if v is not None and math.isfinite(v)]
        if known:
            mean, low, high = seed_interval(known)
            found[key] = {
                "mean": mean,
                "low": low,
                "high": high,
                "n": len(known),
                "by_seed": by_seed,
            }
    return found


def assemble(
    head: Mapping[str, Any],
    arms: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Mapping[int, Mapping[str, float | None]]],
    details: Mapping[str, Any],
    missing: Sequence[str],
    scores: Mapping[str, Mapping[int, Mapping[str, np.ndarray]]] | None = None,
    targets: np.ndarray | None = None,
    patients: np.ndarray | None = None,
    n_boot: int = 300,
) -> dict[str, Any]:
    """Contents of claims.json.

    Parameters
    ----------
    head : mapping
        ``dataset, dataset_label, attribution, n_images, n_patients, n_test, n_clusters, epochs``.
    arms : mapping of arm to mapping
        ``title, kind, backbone, parameters, flops, feature_dim, rotation, pseudo_labels`` of each.
    values, scores, targets, patients
        As for `compare`, which is called for every pair of `COMPARISONS` that is there.
    details : mapping
        What figures show besides.
    missing : sequence of str
        Runs and arms that are not there, one line each.

    Raises
    ------
    ValueError
        The result does not fit the schema, see `validate`.
    """
    comparisons = [
        compare(values, treatment, reference, purpose, scores, targets, patients, n_boot)
        for treatment, reference, purpose in COMPARISONS
        if treatment in values and reference in values
    ]
    result = {
        "format": FORMAT,
        **head,
        "notice": NOT_CLINICAL,
        "rule": rule(),
        "alpha": ALPHA,
        "claims": [
            {"key": c.key, "title": c.title, "page": c.page, "caution": c.caution} for c in CLAIMS
        ],
        "measures": [
            {
                "key": m.key,
                "claim": m.claim,
                "title": m.title,
                "higher_is_better": m.higher_is_better,
                "smallest": m.smallest,
                "primary": m.primary,
            }
            for m in MEASURES
        ],
        "arms": {
            arm: {**arms[arm], "seeds": sorted(by_seed), "measures": over_seeds(by_seed)}
            for arm, by_seed in values.items()
        },
        "comparisons": comparisons,
        "missing": list(missing),
        "details": dict(details),
    }
    misfits = list(validate(result))
    if misfits:
        raise ValueError(f"claims.json would not fit its schema: {'; '.join(misfits[:5])}")
    return result


_INTERVAL = {"mean": NUMBER, "low": (NUMBER, None), "high": (NUMBER, None)}
SCHEMA: dict[str, Any] = {
    "format": WHOLE,
    "dataset": TEXT,
    "dataset_label": TEXT,
    "attribution": TEXT,
    "notice": TEXT,
    "n_images": WHOLE,
    "n_patients": WHOLE,
    "n_test": WHOLE,
    "n_clusters": WHOLE,
    "epochs": WHOLE,
    "rule": TEXT,
    "alpha": NUMBER,
    "claims": [{"key": TEXT, "title": TEXT, "page": TEXT, "caution": TEXT}],
    "measures": [
        {
            "key": TEXT,
            "claim": TEXT,
            "title": TEXT,
            "higher_is_better": FLAG,
            "smallest": NUMBER,
            "primary": FLAG,
        }
    ],
    "arms": {
        "*": {
            "title": TEXT,
            "kind": TEXT,
            "backbone": TEXT,
            "rotation": FLAG,
            "pseudo_labels": TEXT,
            "parameters": WHOLE,
            "feature_dim": WHOLE,
            "flops": WHOLE,
            "seeds": [WHOLE],
            "measures": {"*": {**_INTERVAL, "n": WHOLE, "by_seed": {"*": (NUMBER, None)}}},
        }
    },
    "comparisons": [
        {
            "treatment": TEXT,
            "reference": TEXT,
            "purpose": TEXT,
            "seeds": [WHOLE],
            "detectable_g": (NUMBER, None),
            "verdicts": [{"claim": TEXT, "verdict": VERDICTS, "n": WHOLE, "measure": TEXT}],
            "measures": [
                {
                    "measure": TEXT,
                    "claim": TEXT,
                    "primary": FLAG,
                    "seeds": [WHOLE],
                    "n?": WHOLE,
                    "mean?": NUMBER,
                    **{
                        f"{name}?": (NUMBER, None)
                        for name in ("low", "high", "p", "p_holm", "sign_flip_p", "hedges_g")
                    },
                    **{f"{name}?": NUMBER for name in ("treatment", "reference", "patient_se")},
                }
            ],
        }
    ],
    "missing": [TEXT],
    "details": {"*": "anything"},
}


def validate(result: Any) -> Iterator[str]:
    """Problems of claims.json against `SCHEMA`, one line each; none if it fits."""
    return problems(result, SCHEMA, "claims")


# --- text -----------------------------------------------------------------------------------------


def _p(value: float | None) -> str:
    return (
        "–"
        if value is None or not math.isfinite(value)
        else "< 0.001"
        if value < 0.001
        else f"{value:.3f}"
    )


def verdict_text(entry: Mapping[str, Any]) -> str:
    """``"undecided at n = 3"``, ``"supported"``, ..."""
    return f"undecided at n = {entry['n']}" if entry["verdict"] == "undecided" else entry["verdict"]


def verdict_table(result: Mapping[str, Any], comparison: Mapping[str, Any] | None = None) -> str:
    """The five claims with verdicts, as Markdown; of the page's own comparison unless another is
    given.
    """
    comparison = comparison or (result["comparisons"][0] if result["comparisons"] else None)
    if comparison is None:
        return "No two arms can be compared yet."
    measures, arms = {m["key"]: m for m in result["measures"]}, result["arms"]
    by_key = {e["measure"]: e for e in comparison["measures"]}
    rows = []
    for claim, decided in zip(result["claims"], comparison["verdicts"], strict=True):
        entry = by_key[decided["measure"]]
        rows.append(
            [
                claim["title"],
                measures[decided["measure"]]["title"],
                number(entry.get("treatment")),
                number(entry.get("reference")),
                number(entry.get("mean")),
                span(entry.get("low"), entry.get("high")),
                _p(entry.get("p_holm")),
                number(entry.get("hedges_g"), 1),
                f"**{verdict_text(decided)}**",
            ]
        )
    header = [
        "claim of the page",
        "measure, fixed beforehand",
        arms[comparison["treatment"]]["title"],
        arms[comparison["reference"]]["title"],
    ]
    header += ["difference, positive speaks for the claim", "95 %", "p, corrected", "g", "verdict"]
    return table(header, rows)


def glance(results: Sequence[Mapping[str, Any]]) -> str:
    """README's claims at a glance, as Markdown: a row a claim, a column a dataset, from several
    claims.json.
    """
    claims, measures = results[0]["claims"], {m["key"]: m for m in results[0]["measures"]}
    rows = []
    for index, claim in enumerate(claims):
        cells = []
        for result in results:
            comparison = result["comparisons"][0]
            decided = comparison["verdicts"][index]
            entry = next(e for e in comparison["measures"] if e["measure"] == decided["measure"])
            numbers = f"{number(entry.get('treatment'))} / {number(entry.get('reference'))}"
            cells.append(
                f"**{verdict_text(decided)}**: {numbers}; {number(entry.get('mean'))} ({span(entry.get('low'), entry.get('high'))})"
            )
        rows.append(
            [f"{claim['title']}: {claim['page']}", measures[decided["measure"]]["title"], *cells]
        )
    heads = [f"{r['dataset_label']}, {len(r['comparisons'][0]['seeds'])} seeds" for r in results]
    return table(["the page's finding", "measure, fixed beforehand", *heads], rows)


def sentences(result: Mapping[str, Any]) -> list[str]:
    """What the page's comparison says on this data, a sentence a claim, from the numbers."""
    found = []
    for comparison in result["comparisons"][:1]:
        by_key = {e["measure"]: e for e in comparison["measures"]}
        names = [result["arms"][comparison[side]]["title"] for side in ("treatment", "reference")]
        for claim, decided in zip(result["claims"], comparison["verdicts"], strict=True):
            entry = by_key[decided["measure"]]
            where = f"on {result['dataset_label']}"
            if not entry["seeds"]:
                found.append(f"{claim['title']}: cannot be measured {where}.")
                continue
            numbers = f"{number(entry['treatment'])} ({names[0]}) against {number(entry['reference'])} ({names[1]})"
            numbers += f", n = {entry['n']} seed{'s' * (entry['n'] != 1)}"
            ending = {
                "supported": "the claim holds here",
                "reversed": "here it is the other way round",
                "not supported": "here there is no advantage of a size that would matter",
                "undecided": "this number of seeds cannot tell"
                if entry["n"] >= LEAST_SEEDS
                else f"fewer than {LEAST_SEEDS} seeds decide nothing",
            }[decided["verdict"]]
            found.append(f"{claim['title']} {where}: {numbers}; {ending}.")
    return found


def fewer_seeds(result: Mapping[str, Any]) -> list[str]:
    """A sentence for each set of seeds that some arms have in place of all."""
    having = Counter(tuple(arm["seeds"]) for arm in result["arms"].values())
    every = {seed for seeds in having for seed in seeds}
    return [
        f"Of the {having.total()} arms and controls {n} {'have' if n > 1 else 'has'} the seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))} alone."
        for seeds, n in having.most_common()
        if set(seeds) != every
    ]


def markdown(result: Mapping[str, Any], command: str = "") -> str:
    """claims.md: verdicts first, then every comparison and measure."""
    made = f" Made by `{command}`." if command else ""
    made += "".join(f" {sentence}" for sentence in fewer_seeds(result))
    known = f"{result['n_patients']:,}" if result["n_patients"] else "unknown"
    blocks = [
        f"# Which of the paper's claims hold: {result['dataset_label']}",
        f"**{result['notice']}** {result['attribution']}",
        f"{result['n_images']:,} images of {known} patients, "
        f"{result['n_test']:,} of them for testing; K = {result['n_clusters']}, {result['epochs']} epochs.{made} Verdicts are about this "
        "data, these network widths and this number of seeds, not about the paper's own runs.",
        verdict_table(result),
        "**The rule.** " + result["rule"],
    ]
    blocks.append("## In words\n\n" + "\n".join(f"- {line}" for line in sentences(result)))
    blocks.append(
        "## What the measures cannot show\n\n"
        + "\n".join(f"- **{c['title']}.** {c['caution']}" for c in result["claims"])
    )
    header = [
        "arm",
        "backbone",
        "rotation",
        "trained on",
        "parameters",
        "MFLOPs an image",
        "features",
        "seeds",
    ]
    rows = [
        [
            a["title"],
            a["backbone"],
            "yes" if a["rotation"] else "no",
            a["pseudo_labels"],
            f"{a['parameters']:,}",
            f"{a['flops'] / 1e6:,.1f}",
            f"{a['feature_dim']:,}",
            ", ".join(map(str, a["seeds"])),
        ]
        for a in result["arms"].values()
    ]
    blocks.append("## Arms\n\n" + table(header, rows))
    blocks.append(
        "Parameters of the body, without the top layer; FLOPs of one image's features, group convolutions computed densely. Matched: "
        "images, "
        "input size, PCA, K, optimiser, epochs, seeds."
    )
    for heading, columns in TABLES.values():
        blocks.append(f"## {heading}\n\n{measure_table(result, columns)}")
    if turned := turned_table(result):
        blocks.append(f"## Clusters kept, trained on phantoms hung in any orientation\n\n{turned}")
    if result["missing"]:
        blocks.append(
            "## What is missing\n\n" + "\n".join(f"- {line}" for line in result["missing"])
        )
    titles = {m["key"]: m["title"] for m in result["measures"]}
    for comparison in result["comparisons"]:
        a, b = (result["arms"][comparison[side]]["title"] for side in ("treatment", "reference"))
        power = comparison["detectable_g"]
        note = f"Seeds {', '.join(map(str, comparison['seeds']))}. "
        if power is not None and math.isfinite(power):
            note += f"Found with 80 % power at this n: a difference of {power:.1f} standard deviations of the paired differences."
        verdicts = "; ".join(
            f"{c['title'].lower()}: {verdict_text(v)}"
            for c, v in zip(result["claims"], comparison["verdicts"], strict=True)
        )
        rows = [
            [
                titles[e["measure"]] + (" **(decides)**" if e["primary"] else ""),
                number(e.get("treatment")),
                number(e.get("reference")),
                number(e.get("mean")),
                span(e.get("low"), e.get("high")),
                _p(e.get("p")),
                _p(e.get("sign_flip_p")),
                number(e.get("hedges_g"), 1),
            ]
            for e in comparison["measures"]
            if e["seeds"]
        ]
        header = ["measure", a, b, "difference", "95 %", "p", "sign-flip p", "g"]
        blocks.append(
            f"## {a} against {b}: {comparison['purpose']}\n\n{note} Verdicts: {verdicts}.\n\n{table(header, rows)}"
        )
    return "\n\n".join(blocks) + "\n"


def measure_table(
    result: Mapping[str, Any],
    columns: Mapping[str, str],
    arms: Sequence[str] | None = None,
    digits: int = 3,
) -> str:
    """A row an arm, a column a measure, each cell the mean over seeds, from `LEAST_SEEDS` on with
    its 95 % interval.

    Arms with none of the measures are left out.
    """
    rows = []
    for arm in arms or result["arms"]:
        entry = result["arms"].get(arm)
        if entry is None or not any(key in entry["measures"] for key in columns):
            continue
        cells = []
        for key in columns:
            found = entry["measures"].get(key)
            text = number(found and found["mean"], digits)
            if (
                found is not None and found["n"] >= LEAST_SEEDS
            ):  # an interval from two seeds covers anything
                text += f" ({span(found['low'], found['high'], digits)})"
            cells.append(text)
        rows.append([entry["title"], *cells, str(len(entry["seeds"]))])
    if not rows:
        return "No run has these numbers."
    return table(["arm", *columns.values(), "seeds"], rows)


def turned_table(result: Mapping[str, Any]) -> str:
    """`measure_table` of clusters kept by networks trained on phantoms hung in any orientation;
    empty if none was.
    """
    turned = result["details"].get("trained_on_turned_images", {})
    arms = {
        arm: {**result["arms"][arm], "measures": numbers, "seeds": numbers["kept_free"]["by_seed"]}
        for arm, numbers in turned.items()
    }
    return measure_table({"arms": arms}, TABLES["invariance"][1]) if arms else ""


def rocs(
    scores: Mapping[str, Mapping[int, Mapping[str, np.ndarray]]],
    arms: Sequence[str],
    targets: np.ndarray,
    train: np.ndarray,
    false_positive_rates: np.ndarray,
) -> dict[str, dict[str, np.ndarray]]:
    """ROC curves of arms' probes of findings, means over seeds, and last that of a guess that looks
    at no image.

    Their areas are the measures ``auroc_macro`` and ``auroc_micro``; the guess has those that end
    in ``_prevalence``.

    Parameters
    ----------
    scores : mapping of arm to mapping of seed to answers
        See `lib.study.measure.scores_of`.
    arms : sequence of str
        Those wanted; without answers an arm is left out.
    targets : (N, 14) bool
    train : (n,) int
        Images with findings of the training part: what the guess, ``"guess"``, knows. It is asked
        for the same findings as the probes.
    false_positive_rates : (m,) float

    Returns
    -------
    dict of arm to dict
        ``macro``, ``micro``, true positive rates (m,), see `lib.metrics.roc_curves`.
    """
    answers = {
        arm: [given for given in scores.get(arm, {}).values() if "findings" in given]
        for arm in arms
    }
    found = {}
    for arm in filter(answers.get, arms):
        each = [
            roc_curves(
                expit(given["findings"]), targets[given["labelled_test"]], false_positive_rates
            )
            for given in answers[arm]
        ]
        found[arm] = {
            name: np.mean([curves[name] for curves in each], axis=0) for name in ("macro", "micro")
        }
    if found:
        asked = answers[next(iter(found))][0]
        guess = prevalence_guess(targets, train, asked["labelled_test"])
        guess[np.isnan(asked["findings"])] = np.nan
        found["guess"] = roc_curves(guess, targets[asked["labelled_test"]], false_positive_rates)
    return found


def mean_curves(
    details: Mapping[str, Mapping[int, Mapping[str, Any]]], part: str
) -> dict[str, dict[str, list[float | None]]]:
    """Curves of an arm's seeds, such as ``details[arm][seed]["angles"]``, averaged; None where no
    seed has a value.
    """
    found: dict[str, dict[str, list[float | None]]] = {}
    for arm, by_seed in details.items():
        curves = [numbers[part] for numbers in by_seed.values() if part in numbers]
        if not curves:
            continue
        found[arm] = {}
        for key in curves[0]:
            stacked = np.array(
                [[math.nan if v is None else v for v in curve[key]] for curve in curves],
                dtype=float,
            )
            known = ~np.isnan(stacked)
            sums, counts = np.where(known, stacked, 0).sum(axis=0), known.sum(axis=0)
            found[arm][key] = [
                float(a / b) if b else None for a, b in zip(sums, counts, strict=True)
            ]
    return found
