"""The paper's five key findings as claims: what is measured for each, how arms are compared, and
the rule that gives a verdict. ``docs/plan.md`` fixed all of it before the study was run, the
smallest differences that would matter included. `lib.study.report` writes the text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lib.metrics import bootstrap_weights, seed_interval
from lib.study.inference import ALPHA, LEAST_SEEDS, holm, paired, seeds_to_tell
from lib.study.scores import multilabel_scores

VERDICTS = ("supported", "reversed", "not supported", "no difference that matters", "cannot tell")
# a run has collapsed if its largest cluster holds more than this share of the images, or if the
# perplexity of its cluster sizes is below this share of K
LARGEST_CLUSTER, LEAST_PERPLEXITY = 0.5, 0.5


@dataclass(frozen=True)
class Claim:
    """A key finding of the project page: what the page says, and what the measure cannot show."""

    key: str
    title: str
    page: str
    caution: str
    beside: tuple[str, ...]  # measures that stand beside the caution
    exploratory: bool = True  # by the plan, whose power for the smallest difference is below 80 %


# fmt: off
CLAIMS: tuple[Claim, ...] = (
    Claim("convergence", "Faster convergence",
          "the P4M network stabilises clustering early in training",
          "AMI(t, t-1) shows that a network agrees with itself, not that its clusters mean "
          "anything. Read it beside the controls.", ("shortfall_ami",), exploratory=False),
    Claim("stability", "Improved stability", "NMI and loss fluctuate less than with AlexNet",
          "A curve is steady if nothing is learnt any more. Two halves of the patients ask more of "
          "a clustering.", ("ami_halves",)),
    Claim("structure", "More structured representations",
          "clusters are more clearly separated in t-SNE maps",
          "Silhouettes reward round clusters, whatever they consist of. Gaussian points that are "
          "clustered in the same way show how much of it K-means makes by itself.",
          ("silhouette",)),
    Claim("transfer", "Better transferability",
          "the linear probe scores higher (0.567 against 0.564)",
          "The probe of a network's own clusters says how linear K-means cells are. The probe of "
          "label combinations means little unless it beats the most frequent class. So the labels "
          "decide, one by one.", ("auroc_macro", "auroc_macro_own")),
    Claim("invariance", "No augmentation required",
          "robustness to rotation comes from the architecture instead of augmented images",
          "Under quarter turns and mirrors P4M's features cannot change, by construction, so other "
          "turns decide. Invariance has a price: see what a linear probe can no longer tell.",
          ("distance_free",)),
)
# fmt: on


@dataclass(frozen=True)
class Measure:
    """One number of a run."""

    key: str  # in results.json
    claim: str
    title: str
    higher_is_better: bool  # whether a higher number speaks for the claim
    smallest: float  # difference that would matter, in its own unit
    resolution: float = 0.0  # step in which it is counted; 0: continuous
    primary: bool = False  # whether it decides, one per claim
    scores: str = ""  # answers of the probes of which it is a mean, for the bootstrap


_MAPS, _FREE = "mean of several t-SNE maps", "turns off the lattice (by 15 degrees)"
# fmt: off
MEASURES: tuple[Measure, ...] = (
    Measure("settled_ami", "convergence",
            "epochs until AMI(t, t-1) is at 90 % of its plateau (one past the last: never)",
            False, 2, primary=True),
    Measure("shortfall_ami", "convergence", "area between AMI(t, t-1) and its plateau, in epochs",
            False, 1),
    Measure("converged_nmi", "convergence",
            "version 0.1: epoch from which NMI(t, t-1) stays within 0.02 of its plateau",
            False, 2, 1),
    Measure("spread_ami", "stability", "spread of AMI(t, t-1) around a smooth trend",
            False, 0.01, primary=True),
    Measure("spread_loss", "stability", "the same of the loss, in units of ln K", False, 0.01),
    Measure("ami_halves", "stability",
            "AMI of two halves of the patients on the others' images", True, 0.05),
    Measure("nmi_sd", "stability",
            "version 0.1: standard deviation of NMI(t, t-1), second half", False, 0.01),
    Measure("map_silhouette", "structure", f"silhouette of the clusters, {_MAPS}",
            True, 0.05, primary=True),
    Measure("silhouette", "structure", "silhouette in the clustered space, -1 to 1", True, 0.05),
    Measure("davies_bouldin", "structure", "Davies-Bouldin, lower is more separate", False, 0.1),
    Measure("map_trust", "structure", f"trustworthiness, {_MAPS}", True, 0.01),
    Measure("map_findings", "structure", f"neighbours that share a label, above chance, {_MAPS}",
            True, 0.01),
    Measure("auroc_macro", "transfer", "probe of the labels: mean AUROC, 0.5 is chance",
            True, 0.01, primary=True, scores="findings"),
    Measure("auroc_macro_own", "transfer", "the same on the seed's own split by patients",
            True, 0.01),
    Measure("ap_macro", "transfer", "probe of the labels: mean average precision",
            True, 0.01, scores="findings"),
    Measure("probe_combinations", "transfer", "probe of label combinations (script): accuracy",
            True, 0.01, scores="combinations"),
    Measure("probe_clusters", "transfer", "probe of cluster assignments (page): accuracy",
            True, 0.02, scores="clusters"),
    Measure("ami_free", "invariance", f"AMI of clusters before and after {_FREE}",
            True, 0.05, primary=True),
    Measure("kept_free", "invariance", "share keeping their cluster under these", True, 0.05),
    Measure("distance_free", "invariance", "distance features move (1: as far as another image)",
            False, 0.05),
    Measure("kept_lattice", "invariance", "share keeping it under turns and mirrors of the square",
            True, 0.05),
    Measure("kept_drawn", "invariance", "share keeping it when the phantom is drawn turned",
            True, 0.05),
)
# fmt: on
MEASURE = {measure.key: measure for measure in MEASURES}

# treatment, reference, what the comparison is for; the first is the page's own
COMPARISONS: tuple[tuple[str, str, str], ...] = (
    ("p4m", "alexnet", "the page's comparison"),
    ("p4m", "cnn_params", "the symmetry alone, at equal parameters"),
    ("p4m-described", "alexnet-described", "the page's comparison, loop as described"),
    ("p4m", "cnn_params-rotation", "symmetry against augmentation, same layout and parameters"),
    ("p4m", "p4m-rotation", "without against with augmentation, same network"),
    ("p4m", "alexnet-plain", "both without augmentation"),
    ("p4m", "cnn_flops", "the symmetry alone, at equal FLOPs"),
    ("p4m", "cnn_flops-rotation", "symmetry against augmentation, same layout and FLOPs"),
    ("p4m", "p4", "what the mirror adds"),
    ("p4m", "p4m-untrained", "what training adds to P4M"),
    ("alexnet", "alexnet-untrained", "what training adds to AlexNet"),
    ("cnn_params", "cnn_params-untrained", "what training adds to the plain CNN"),
    ("p4m", "p4m-index", "P4M on its clusters against labels index mod K"),
    ("p4m", "p4m-shuffled", "P4M on its clusters against labels shuffled once"),
    ("alexnet", "alexnet-index", "AlexNet on its clusters against labels index mod K"),
    ("alexnet", "alexnet-shuffled", "AlexNet on its clusters against labels shuffled once"),
    ("p4m", "p4m-described", "the loop that learns against the loop as described, P4M"),
    ("alexnet", "alexnet-described", "the same for AlexNet"),
)

Results = Mapping  # contents of results.json, see lib.study.measure.gather
Answers = Mapping[str, np.ndarray]  # of the probes of a run, see lib.study.measure.answers
ByArm = Mapping[str, Mapping[str, Answers]]  # by arm and seed


def _seeds(results: Results, arm: str) -> Mapping:
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
    """Mean over seeds by arm of a curve in the details of runs, such as ``kept`` of ``angles``."""
    found = {}
    for arm, entry in results["arms"].items():
        tables = [run["details"].get(name) for run in entry["seeds"].values()]
        seeds = np.array([table[part] for table in tables if table], dtype=float)
        if len(seeds):
            found[arm] = np.ma.masked_invalid(seeds).mean(axis=0).filled(math.nan).tolist()
    return found


def overview(results: Results) -> dict:
    """What figures draw: ``dataset_label``, ``claims`` and ``measures`` (as dicts),
    ``comparisons``, and ``arms``: arm -> title, kind, ``seeds``, ``collapsed`` (seeds),
    ``measures``: key -> mean, low, high (95 % over seeds), n, by_seed."""
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
    found = {"dataset_label": results["dataset"]["label"], "arms": arms}
    found |= {"claims": list(map(asdict, CLAIMS)), "measures": list(map(asdict, MEASURES))}
    return found | {"comparisons": results.get("comparisons", [])}


def verdict(n: int, mean: float, low: float, high: float, p_holm: float, smallest: float) -> str:
    """The verdict by `rule` on a difference that speaks for the claim if it is positive."""
    if n < LEAST_SEEDS or math.isnan(p_holm):
        return "cannot tell"
    if -smallest < low and high < smallest:
        return "no difference that matters"
    if p_holm <= ALPHA:
        return "supported" if mean > 0 else "reversed"
    return "not supported" if high < smallest else "cannot tell"


def rule() -> str:
    """The rule in words, as `verdict` applies it."""
    return (
        "For each claim one measure was chosen beforehand, and the smallest difference of it that "
        "would matter. Two arms are compared seed by seed; a positive difference speaks for the "
        "claim. The interval is Student's, 95 % (for the probe, a bootstrap adds the chance of the "
        "test patients). p is the larger of the exact sign-flip test's and Student's, corrected "
        f"over the {len(CLAIMS)} claims (Holm). **No difference that matters**: the interval lies "
        "within plus and minus the smallest difference. **Supported**, **reversed**: corrected p "
        f"at most {ALPHA:g}, in favour or against. **Not supported**: the interval lies below the "
        "smallest difference that matters. **Cannot tell**: everything else, everything with "
        f"fewer than {LEAST_SEEDS} seeds, and a verdict that the interval without the collapsed "
        "runs speaks against. **Exploratory**: the plan expected a power below 80 % for the "
        "smallest difference that matters."
    )


def patient_se(treatment: Sequence, reference: Sequence, measure: Measure, n_boot=300) -> float:
    """Standard error that the choice of test patients, drawn with replacement, gives to a mean
    difference of probes, from the answers of each seed. 0 if there is one patient only, or answers
    are missing; ValueError if two runs were tested on different images."""
    everyone = [*treatment, *reference]
    if not measure.scores or not all(measure.scores in answers for answers in everyone):
        return 0.0
    part = "test" if measure.scores == "clusters" else "labelled_test"
    if any(not np.array_equal(answers[part], everyone[0][part]) for answers in everyone):
        raise ValueError("the two arms were tested on different images")
    values = [_resampled(answers, part, measure, n_boot) for answers in everyone]
    ours, theirs = values[: len(treatment)], values[len(treatment) :]
    sample = np.mean(ours, axis=0) - np.mean(theirs, axis=0)
    sample = sample[~np.isnan(sample)]
    return float(sample.std(ddof=1)) if len(sample) > 1 else 0.0


def _resampled(answers: dict, part: str, measure: Measure, n_boot: int) -> np.ndarray:
    """The number (n_boot,) in samples of the test patients. Those of the findings are kept among
    the answers, since an arm is compared several times."""
    draws = bootstrap_weights(answers[f"{part}_patients"], n_boot, seed=0)
    if measure.scores != "findings":
        right = (w @ answers[measure.scores] / w.sum(axis=1) for w in draws)
        return np.concatenate([np.empty(0), *right])
    if (name := f"resampled {n_boot}") not in answers:
        pair = answers["findings"], answers["truth"]
        blocks = [multilabel_scores(*pair, weights, micro=False) for weights in draws]
        keys = [m.key for m in MEASURES if m.scores == "findings"]
        found = {key: [np.empty(0), *(block[key] for block in blocks)] for key in keys}
        answers[name] = {key: np.concatenate(some) for key, some in found.items()}
    return answers[name][measure.key]


def _difference(results, measure: Measure, arms, answers: ByArm, n_boot, without=()) -> dict:
    """Two arms on one measure, over the seeds that both have, but for those `without`."""
    ours, theirs = (values_of(results, arm, measure.key) for arm in arms)
    seeds = [seed for seed in ours if seed in theirs and seed not in without]
    about = {"measure": measure.key, "claim": measure.claim, "primary": measure.primary}
    if not seeds:
        return about | {"seeds": seeds}
    a, b = (np.array([of[seed] for seed in seeds]) for of in (ours, theirs))
    by_arm = [[answers.get(arm, {}).get(s, {}) for s in seeds] for arm in arms]
    extra = patient_se(*by_arm, measure, n_boot)
    sign = 1 if measure.higher_is_better else -1
    found = about | {"seeds": seeds} | paired(sign * (a - b), extra, measure.resolution)
    found |= {"treatment": float(a.mean()), "reference": float(b.mean())}
    return found | {"patient_se": extra, "p_holm": math.nan}


def _decide(entries: Sequence[dict]) -> list[str]:
    """Correct p over the deciding measures, in place; a verdict for each."""
    larger = [np.fmax(e.get("p", math.nan), e.get("sign_flip_p", 0.0)) for e in entries]
    verdicts = []
    for entry, p in zip(entries, holm(larger), strict=True):
        if not entry["seeds"]:
            verdicts.append("cannot tell")
            continue
        entry["p_holm"] = p
        numbers = (entry[name] for name in ("n", "mean", "low", "high"))
        verdicts.append(verdict(*numbers, p, MEASURE[entry["measure"]].smallest))
    return verdicts


def compare(results: Results, *arms: str, purpose="", answers=None, n_boot=300) -> dict:
    """Two `arms`, treatment and reference, on every measure of every claim, over the seeds that
    both have; a positive difference speaks for the claim about the first. `purpose` says what the
    comparison is for; `answers` are for the bootstrap over patients.

    Returns ``treatment, reference, purpose, seeds``; ``collapsed``: seeds in which one of the two
    did; ``measures``: per measure ``measure, claim, primary, seeds`` and, if there are seeds, what
    `paired` returns, ``treatment, reference`` (means), ``patient_se``, ``p_holm``; ``verdicts``:
    per claim ``claim, measure, n, verdict``, ``whole`` (mean and interval without the collapsed
    seeds, if there are any) and ``needed`` (seeds that would tell)."""
    entries = {k: _difference(results, m, arms, answers or {}, n_boot) for k, m in MEASURE.items()}
    decisive = [next(m for m in MEASURES if m.primary and m.claim == c.key) for c in CLAIMS]
    decided, verdicts = _decide([entries[m.key] for m in decisive]), []
    fallen = sorted({seed for arm in arms for seed in collapsed(results, arm)}, key=int)
    for measure, how in zip(decisive, decided, strict=True):
        entry = entries[measure.key]
        about = {"claim": measure.claim, "measure": measure.key, "n": len(entry["seeds"])}
        found = (entry.get(key, 0.0) for key in ("n", "mean", "patient_se"))
        needed = seeds_to_tell(entry.get("sd", math.inf), measure.smallest, *found)
        about |= {"verdict": how, "needed": needed}
        if fallen:
            whole = _difference(results, measure, arms, answers or {}, n_boot, fallen)
            about["whole"] = {name: whole.get(name) for name in ("n", "mean", "low", "high")}
            low, high = whole.get("low", math.nan), whole.get("high", math.nan)
            holds = {"supported": low > 0, "reversed": high < 0}
            holds["not supported"] = high < measure.smallest
            holds["no difference that matters"] = max(-low, high) < measure.smallest
            about["verdict"] = how if holds.get(how, True) else "cannot tell"
        verdicts.append(about)
    ours, theirs = (results["arms"][arm]["seeds"] for arm in arms)
    about = dict(zip(("treatment", "reference"), arms, strict=True)) | {"purpose": purpose}
    about |= {"seeds": [seed for seed in ours if seed in theirs], "collapsed": fallen}
    return about | {"verdicts": verdicts, "measures": list(entries.values())}


def compare_all(results: Results, answers: ByArm | None = None, n_boot: int = 300) -> list[dict]:
    """`compare` for each of `COMPARISONS` whose arms are both there."""
    there = [c for c in COMPARISONS if {*c[:2]} <= results["arms"].keys()]
    options = {"answers": answers, "n_boot": n_boot}
    return [compare(results, *pair, purpose=purpose, **options) for *pair, purpose in there]
