"""The verdict rule finds what was planted and calls nothing that was not."""

import math

import numpy as np
import pytest
from scipy import stats

from lib.study import claims
from lib.study.arms import ARMS
from lib.study.claims import CLAIMS, MEASURE, MEASURES, compare, verdict
from lib.study.inference import detectable, holm, paired, seeds_to_tell

PRIMARY = [m for m in MEASURES if m.primary]
# what two arms score on each deciding measure, and how far seeds differ: as in the plan's pilot
TYPICAL = {"settled_ami": (6, 1.1), "spread_ami": (0.02, 0.008), "map_silhouette": (0.1, 0.05)}
TYPICAL |= {"auroc_macro": (0.58, 0.009), "ami_free": (0.35, 0.05)}
PLAIN = {key: mean for key, (mean, _) in TYPICAL.items()}
CALLED = {"supported", "reversed"}
N_SEEDS = 10  # of the plan


def simulated_study(rng, n_seeds, effects=None, noise=stats.norm):
    """Values of two arms; `effects` in standard deviations of the paired differences, positive
    speaks for the claim."""
    effects, values = effects or {}, {"a": {}, "b": {}}
    for seed in range(n_seeds):
        values["a"][seed], values["b"][seed] = {}, {}
        for measure in PRIMARY:
            mean, sd = TYPICAL[measure.key]
            a, b = mean + sd * noise.rvs(size=2, random_state=rng)
            sign = 1 if measure.higher_is_better else -1
            a += sign * effects.get(measure.key, 0) * sd * math.sqrt(2)
            if measure.resolution:
                a, b = (max(2, round(x)) for x in (a, b))
            values["a"][seed][measure.key], values["b"][seed][measure.key] = float(a), float(b)
    return as_results(values)


def as_results(values):
    """Numbers by arm and seed as they are in results.json."""
    entries = {}
    for arm, seeds in values.items():
        runs = {str(seed): {"values": of, "details": {}} for seed, of in seeds.items()}
        entries[arm] = {"title": arm, "kind": "arm", "seeds": runs}
    about = {"label": "test pictures, 10 images", "labels": ["Mass"], "patients": 5, "n_test": 2}
    found = {"dataset": about | {"attribution": "None."}, "arms": entries, "missing": []}
    return found | {"settings": {"n_clusters": 20, "epochs": 3}}


def verdicts(values):
    return {v["claim"]: v["verdict"] for v in compare(values, "a", "b")["verdicts"]}


def many(n, *args, **more):
    """Verdicts of n studies."""
    return [verdicts(simulated_study(*args, **more)) for _ in range(n)]


@pytest.mark.slow
def test_a_planted_null_is_not_called():
    """2,000 studies of the planned size without any difference: one in which any claim is called
    supported or reversed is a false positive, of at most 6 %."""
    rng, tails = np.random.default_rng(11), (stats.norm, stats.t(3))  # the latter: long ones
    studies = [s for noise in tails for s in many(1000, rng, N_SEEDS, noise=noise)]
    assert np.mean([not CALLED.isdisjoint(study.values()) for study in studies]) <= 0.06


@pytest.mark.slow
def test_a_planted_effect_is_found_with_the_stated_power():
    """An effect of the size that `detectable` states is found in about 80 % of studies, an opposite
    one is called reversed, and claims without an effect are still not called."""
    rng, size = np.random.default_rng(12), detectable(N_SEEDS)
    effects = {"ami_free": size, "map_silhouette": -size}
    found = many(300, rng, N_SEEDS, effects)
    assert 0.7 < np.mean([f["invariance"] == "supported" for f in found]) < 0.95
    assert 0.7 < np.mean([f["structure"] == "reversed" for f in found]) < 0.95
    without = [{f[c] for c in ("convergence", "stability", "transfer")} for f in found]
    assert np.mean([not CALLED.isdisjoint(called) for called in without]) <= 0.06


@pytest.mark.slow
def test_twice_the_smallest_difference_is_found_at_the_planned_size():
    sds = {key: sd * math.sqrt(2) for key, (_, sd) in TYPICAL.items()}
    effects = {key: 2 * MEASURE[key].smallest / sd for key, sd in sds.items()}
    found = many(300, np.random.default_rng(13), N_SEEDS, effects)
    assert np.mean([v == "supported" for f in found for v in f.values()]) >= 0.8


def test_an_arm_that_is_better_by_construction_is_supported_on_all_claims():
    rng, seeds = np.random.default_rng(0), range(8)
    better = dict(zip(TYPICAL, (-8, -0.2, 0.5, 0.3, 0.5), strict=True))
    ours = [{k: PLAIN[k] + d * rng.normal(1, 0.01) for k, d in better.items()} for _ in seeds]
    arms = {"a": dict(enumerate(ours)), "b": dict.fromkeys(seeds, PLAIN)}
    assert set(verdicts(as_results(arms)).values()) == {"supported"}
    swapped = as_results({"a": arms["b"], "b": arms["a"]})
    assert set(verdicts(swapped).values()) == {"reversed"}
    fewer = as_results({arm: {s: of[s] for s in seeds[:7]} for arm, of in arms.items()})
    assert set(verdicts(fewer).values()) == {"cannot tell"}


def test_a_verdict_that_hangs_on_collapsed_runs_is_not_given():
    plain = PLAIN | {"perplexity": 19.0, "largest_cluster": 0.1}
    rng, ours = np.random.default_rng(0), {}
    for seed in range(10):
        lost = 0.0 if seed < 5 else 0.4  # the reference keeps no cluster where it has collapsed
        ours[seed] = plain | {"ami_free": 0.35 + lost + rng.normal(0, 0.01)}
    theirs = {seed: plain | {"perplexity": 19.0 if seed < 5 else 2.0} for seed in range(10)}
    found = compare(as_results({"a": ours, "b": theirs}), "a", "b")
    assert found["collapsed"] == ["5", "6", "7", "8", "9"]
    decided = {v["claim"]: v for v in found["verdicts"]}["invariance"]
    assert decided["whole"]["n"] == 5
    assert decided["verdict"] == "cannot tell"


@pytest.mark.parametrize(
    ("numbers", "wanted"),  # n, mean, low, high, corrected p; 0.1 would matter
    [
        *(((8, 0.5, 0.3, 0.7, 0.01), "supported"), ((8, -0.5, -0.7, -0.3, 0.01), "reversed")),
        *(((8, 0.5, 0.3, 0.7, 0.06), "cannot tell"), ((7, 0.5, 0.3, 0.7, 0.01), "cannot tell")),
        ((8, 0.5, 0.3, 0.7, math.nan), "cannot tell"),
        ((8, -0.1, -0.25, 0.05, 0.2), "not supported"),
        ((8, 0.0, -0.05, 0.05, 0.9), "no difference that matters"),
        ((8, 0.05, 0.03, 0.07, 0.001), "no difference that matters"),
    ],
)
def test_verdict_rule(numbers, wanted):
    assert verdict(*numbers, smallest=0.1) == wanted
    assert wanted in claims.VERDICTS
    assert wanted in claims.rule().lower()


def test_seeds_that_would_tell():
    assert detectable(3) > detectable(5) > detectable(10) > 0.8
    assert math.isnan(detectable(2))
    assert seeds_to_tell(0.0, 1.0) == 8
    enough = seeds_to_tell(1.0, 0.5)
    assert detectable(int(enough)) <= 0.5 < detectable(int(enough) - 1)
    assert seeds_to_tell(100.0, 0.5) == math.inf
    assert seeds_to_tell(100.0, 0.5, n=5, mean=300.0) == 8  # clear already, but n is too few
    told = [seeds_to_tell(1.0, 1.0, n=10, mean=mean) for mean in (0.0, 0.6, 0.95)]
    assert told[0] == 11 < told[2] < told[1]  # alike, between the two, found
    assert seeds_to_tell(1.0, 1.0, n=10, mean=0.6, extra_se=0.5) == math.inf


def test_paired_is_the_paired_t_test():
    a, b = np.random.default_rng(0).normal(size=(2, 6))
    found, known = paired(a - b), stats.ttest_rel(a, b)
    assert found["p"] == pytest.approx(known.pvalue)
    assert (found["low"], found["high"]) == pytest.approx(known.confidence_interval(0.95))
    assert found["sd"] == pytest.approx((a - b).std(ddof=1))
    flips = stats.permutation_test((a - b,), np.mean, permutation_type="samples")
    assert found["sign_flip_p"] == pytest.approx(flips.pvalue)
    # the least that five seeds can reach
    assert paired([0.1, 0.2, 0.3, 0.4, 0.5])["sign_flip_p"] == 2 / 2**5


def test_paired_with_patients_is_wider_and_with_equal_whole_numbers_is_not_certain():
    plain, wide = paired([0.1, 0.12, 0.11]), paired([0.1, 0.12, 0.11], extra_se=0.05)
    assert wide["high"] - wide["low"] > plain["high"] - plain["low"]
    assert wide["p"] > plain["p"]
    assert paired([1, 1, 1], resolution=1)["p"] > 0.05
    same = paired([0.0, 0.0, 0.0])
    assert (same["p"], same["low"], same["high"]) == (1.0, 0.0, 0.0)
    assert math.isnan(paired([0.25, 0.25, 0.25])["p"])  # no spread and no resolution


def test_holm_against_the_definition():
    assert holm([0.01, 0.04, 0.03, 0.005, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.5])
    assert holm([0.01, math.nan]) == pytest.approx([0.02, math.nan], nan_ok=True)


def planted_answers(rng, quality, patients):
    """Answers of three seeds' probes of 14 labels on 120 images."""
    n, truth = len(patients), rng.random((len(patients), 14)) < 0.3
    common = {"truth": truth, "test": np.arange(n), "labelled_test": np.arange(n)}
    common |= {"test_patients": patients, "labelled_test_patients": patients}

    def seed():
        right = {name: rng.random(n) < 0.5 for name in ("combinations", "clusters")}
        return common | right | {"findings": quality * truth + rng.normal(size=(n, 14))}

    return [seed() for _ in range(3)]


def test_patients_widen_the_interval_of_the_probe():
    rng, each, few = np.random.default_rng(0), np.arange(120), np.arange(120) // 20
    a, b = (planted_answers(rng, 1.0, each) for _ in range(2))
    alone = claims.patient_se(a, b, MEASURE["auroc_macro"])
    assert 0 < alone < 0.1
    # patients of 20 images with answers that hang together
    right = np.repeat(rng.random(6) < 0.5, 20)
    for answers in a:
        answers["combinations"] = right
    apart = claims.patient_se(a, b, MEASURE["probe_combinations"])
    for answers in (*a, *b):
        answers["labelled_test_patients"] = few
    assert claims.patient_se(a, b, MEASURE["probe_combinations"]) > 2 * apart
    assert claims.patient_se([{}], [{}], MEASURE["auroc_macro"]) == 0.0
    assert claims.patient_se(a, b, MEASURE["silhouette"]) == 0.0
    for answers in b:
        answers["labelled_test"] = answers["labelled_test"][::-1]
    with pytest.raises(ValueError, match="different images"):
        claims.patient_se(a, b, MEASURE["auroc_macro"])


def test_a_seed_without_a_number_is_left_out_of_both_arms():
    results = simulated_study(np.random.default_rng(3), 4)
    results["arms"]["a"]["seeds"]["0"]["values"]["map_silhouette"] = "one cluster"
    results["arms"]["b"]["seeds"]["2"]["values"]["map_silhouette"] = None
    entries = {e["measure"]: e for e in compare(results, "a", "b")["measures"]}
    assert entries["map_silhouette"]["seeds"] == ["1", "3"]
    assert entries["davies_bouldin"]["seeds"] == []
    assert claims.reason(results, "a", "map_silhouette") == "one cluster"
    assert claims.reason(results, "b", "map_silhouette") == ""


def test_collapse_is_told_by_the_largest_cluster_and_the_perplexity():
    sizes = {0: (0.08, 18.0), 1: (0.64, 12.0), 2: (0.4, 9.9), 3: (0.5, 10.0)}
    values = {s: {"largest_cluster": a, "perplexity": p} for s, (a, p) in sizes.items()}
    assert claims.collapsed(as_results({"a": values}), "a") == ["1", "2"]
    assert claims.collapsed(as_results({"a": {0: {"largest_cluster": 0.2}}}), "a") == []


def test_overview_is_what_figures_draw():
    results = simulated_study(np.random.default_rng(3), 4)
    results["comparisons"] = [compare(results, "a", "b")]
    found = claims.overview(results)
    assert [claim["key"] for claim in found["claims"]] == [claim.key for claim in CLAIMS]
    entry = found["arms"]["a"]["measures"]["ami_free"]
    assert entry["mean"] == pytest.approx(np.mean(list(entry["by_seed"].values())))
    assert entry["low"] < entry["mean"] < entry["high"]
    assert found["arms"]["a"]["seeds"] == ["0", "1", "2", "3"]


def test_every_claim_has_one_measure_that_decides_and_comparisons_are_of_arms_that_are_there():
    assert [m.claim for m in PRIMARY] == [claim.key for claim in CLAIMS]
    assert len(MEASURE) == len(MEASURES)
    assert all(m.smallest > 0 for m in MEASURES)
    assert all({a, b} <= set(ARMS) for a, b, _ in claims.COMPARISONS)
    results = simulated_study(np.random.default_rng(3), 3)
    results["arms"] = {"p4m": results["arms"]["a"], "p4": results["arms"]["b"]}
    found = claims.compare_all(results)
    assert [(c["treatment"], c["reference"]) for c in found] == [("p4m", "p4")]


def test_mean_curves_leave_out_what_has_no_value():
    results = as_results({"a": {0: {}, 1: {}}, "b": {0: {}}})
    for run, value in zip(results["arms"]["a"]["seeds"].values(), (1, 3), strict=True):
        run["details"] = {"c": {"x": [value, None]}}
    (curve,) = claims.mean_curves(results, "c", "x").values()
    assert curve == pytest.approx([2, math.nan], nan_ok=True)
