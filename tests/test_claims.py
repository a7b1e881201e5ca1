"""The verdict rule finds what was planted and calls nothing that was not; claims.json fits its
schema, and text says what numbers say.
"""

import copy
import json
import math
import re

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from lib import metrics
from lib.paths import load_json, save_json
from lib.study import claims
from lib.study.claims import CLAIMS, MEASURES, compare, detectable, holm, paired, verdict

PRIMARY = [m for m in MEASURES if m.primary]
# what two arms score on each deciding measure, and how far seeds differ: as on phantoms with the
# quick preset
TYPICAL = {
    "converged_nmi": (6, 1.5),
    "nmi_sd": (0.02, 0.006),
    "silhouette": (0.10, 0.02),
    "auroc_macro": (0.58, 0.02),
    "kept_free": (0.4, 0.06),
}


def simulated_study(rng, n_seeds, effects=None, noise=stats.norm):
    """Values of two arms; `effects` in standard deviations of the paired differences, positive
    speaks for the claim.
    """
    effects = effects or {}
    values = {"a": {}, "b": {}}
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
    return values


def verdicts(values):
    return {v["claim"]: v["verdict"] for v in compare(values, "a", "b")["verdicts"]}


def test_a_planted_null_is_not_called():
    """Studies without any difference: one in which any claim is called supported or reversed is a
    false positive, of at most 5 %.

    200 studies would leave a standard error of 1.5 % on the rate, so 600 of each kind are
    simulated: the rate of all is held to 5 %, and that of each kind to what chance allows above it.
    """
    rng, called = np.random.default_rng(11), {}
    for name, noise in {
        "normal": stats.norm,
        "long tails": stats.t(3),
        "skewed": stats.lognorm(1),
    }.items():
        for n_seeds in (3, 5):
            studies = (
                verdicts(simulated_study(rng, n_seeds, noise=noise)).values() for _ in range(600)
            )
            called[name, n_seeds] = sum(
                any(v in ("supported", "reversed") for v in study) for study in studies
            )
    assert sum(called.values()) / (600 * len(called)) <= 0.05, called
    assert all(
        stats.binomtest(count, 600, 0.05, alternative="greater").pvalue > 0.01
        for count in called.values()
    ), called


@pytest.mark.parametrize("n_seeds", [3, 5])
def test_a_planted_effect_is_found_with_the_stated_power(n_seeds):
    """An effect of the size that `detectable` states is found in about 80 % of 200 studies, an
    opposite one is called reversed, and the
    claims without an effect are still not called."""
    rng = np.random.default_rng(12)
    size = detectable(n_seeds)
    found = [
        verdicts(simulated_study(rng, n_seeds, {"kept_free": size, "silhouette": -size}))
        for _ in range(200)
    ]
    assert 0.7 < np.mean([f["invariance"] == "supported" for f in found]) < 0.95
    assert 0.7 < np.mean([f["structure"] == "reversed" for f in found]) < 0.95
    false = [
        any(f[c] in ("supported", "reversed") for c in ("convergence", "stability", "transfer"))
        for f in found
    ]
    assert np.mean(false) <= 0.05


def test_an_arm_that_is_better_by_construction_is_supported_on_all_claims():
    rng = np.random.default_rng(0)
    values = simulated_study(rng, 5)
    better = {
        "converged_nmi": -8,
        "nmi_sd": -0.2,
        "silhouette": 0.5,
        "auroc_macro": 0.3,
        "kept_free": 0.5,
    }
    values["a"] = {
        seed: {key: v + better[key] for key, v in numbers.items()}
        for seed, numbers in values["b"].items()
    }
    for numbers in values["a"].values():
        for key in better:
            numbers[key] += 0.01 * abs(better[key]) * rng.normal()
    assert set(verdicts(values).values()) == {"supported"}
    swapped = {"a": values["b"], "b": values["a"]}
    assert set(verdicts(swapped).values()) == {"reversed"}


def test_few_seeds_decide_nothing():
    values = simulated_study(np.random.default_rng(0), 2, {"kept_free": 50})
    assert set(verdicts(values).values()) == {"undecided"}
    one = simulated_study(np.random.default_rng(0), 1)
    entry = compare(one, "a", "b")
    assert {v["verdict"] for v in entry["verdicts"]} == {"undecided"}
    assert math.isnan(entry["detectable_g"])


def test_verdict_rule():
    assert verdict(5, 0.5, 0.3, 0.7, 0.01, 0.1) == "supported"
    assert verdict(5, -0.5, -0.7, -0.3, 0.01, 0.1) == "reversed"
    assert verdict(5, 0.5, 0.3, 0.7, 0.06, 0.1) == "undecided"
    assert verdict(5, 0.0, -0.05, 0.05, 0.9, 0.1) == "not supported"
    assert (
        verdict(5, 0.05, 0.03, 0.07, 0.001, 0.1) == "not supported"
    )  # there, but too small to matter
    assert verdict(5, -0.05, -0.07, -0.03, 0.001, 0.1) == "not supported"
    assert verdict(2, 0.5, 0.3, 0.7, 0.01, 0.1) == "undecided"
    assert verdict(5, 0.5, 0.3, 0.7, math.nan, 0.1) == "undecided"
    for word in ("Supported", "Reversed", "Not supported", "Undecided"):
        assert word in claims.rule()


def test_paired_is_the_paired_t_test():
    a, b = np.random.default_rng(0).normal(size=(2, 6))
    found, known = paired(a - b), stats.ttest_rel(a, b)
    assert found["p"] == pytest.approx(known.pvalue)
    assert (found["low"], found["high"]) == pytest.approx(known.confidence_interval(0.95))
    assert found["hedges_g"] == pytest.approx((a - b).mean() / (a - b).std(ddof=1) * (1 - 3 / 19))
    flips = stats.permutation_test(
        (a - b,), np.mean, permutation_type="samples", alternative="two-sided", n_resamples=np.inf
    )
    assert found["sign_flip_p"] == pytest.approx(flips.pvalue)
    assert (
        paired([0.1, 0.2, 0.3, 0.4, 0.5])["sign_flip_p"] == 2 / 2**5
    )  # the least that five seeds can reach


def test_paired_with_patients_is_wider_and_with_equal_whole_numbers_is_not_certain():
    plain, wide = paired([0.1, 0.12, 0.11]), paired([0.1, 0.12, 0.11], extra_se=0.05)
    assert wide["high"] - wide["low"] > plain["high"] - plain["low"]
    assert wide["p"] > plain["p"]
    assert paired([1, 1, 1], resolution=1)["p"] > 0.05
    same = paired([0.0, 0.0, 0.0])
    assert (same["p"], same["low"], same["high"]) == (1.0, 0.0, 0.0)
    assert math.isnan(
        paired([0.25, 0.25, 0.25])["p"]
    )  # no spread and no resolution: nothing to test with
    for bad in ([], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="at least one seed, all finite"):
            paired(bad)


def test_holm_against_the_definition():
    assert holm([0.01, 0.04, 0.03, 0.005, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.5])
    adjusted = holm([0.01, math.nan])
    assert adjusted[0] == pytest.approx(0.02)
    assert math.isnan(adjusted[1])


def test_detectable_falls_with_seeds():
    assert math.isnan(paired([0.1, 0.2])["hedges_g"])
    assert detectable(3) > detectable(5) > detectable(10) > 0.8
    assert math.isnan(detectable(2))


def planted_scores(rng, n, quality):
    targets = rng.random((n, 14)) < 0.3
    rows = np.arange(n)
    return targets, {
        seed: {
            "test": rows,
            "labelled_test": rows,
            "findings": quality * targets + rng.normal(size=(n, 14)),
            "combinations": rng.random(n) < 0.5,
            "clusters": rng.random(n) < 0.5,
        }
        for seed in range(3)
    }


def test_patients_widen_the_interval_of_the_probe():
    rng = np.random.default_rng(0)
    n = 120
    targets, a = planted_scores(rng, n, 1.0)
    _, b = planted_scores(rng, n, 1.0)
    measure = next(m for m in MEASURES if m.key == "auroc_macro")
    each, few = np.arange(n), np.arange(n) // 20
    alone = claims.patient_se(list(a.values()), list(b.values()), measure, targets, each)
    assert 0 < alone < 0.1
    # patients of 20 images with answers that hang together
    right = {s: {**v, "combinations": np.repeat(rng.random(6) < 0.5, 20)} for s, v in a.items()}
    combos = next(m for m in MEASURES if m.key == "probe_combinations")
    together = [
        claims.patient_se(list(right.values()), list(b.values()), combos, targets, who)
        for who in (each, few)
    ]
    assert together[1] > 2 * together[0]
    assert claims.patient_se([{}], [{}], measure, targets, each) == 0.0
    other = [{**v, "labelled_test": v["labelled_test"][::-1]} for v in b.values()]
    with pytest.raises(ValueError, match="different images"):
        claims.patient_se(list(a.values()), other, measure, targets, each)


HEAD = {
    "dataset": "x",
    "dataset_label": "test pictures, 10 images",
    "attribution": "None.",
    "n_images": 10,
    "n_patients": 5,
    "n_test": 2,
    "n_clusters": 4,
    "epochs": 3,
}


def entry(arm):
    return {
        "title": f"arm {arm}",
        "kind": "arm",
        "backbone": arm,
        "rotation": False,
        "pseudo_labels": "clusters",
        "parameters": 10,
        "feature_dim": 4,
        "flops": 1000,
    }


@pytest.fixture
def result():
    values = simulated_study(np.random.default_rng(3), 4, {"kept_free": 30})
    values = {"p4m": values["a"], "alexnet": values["b"]}
    values["p4m"][0]["silhouette"] = None
    return claims.assemble(
        HEAD, {arm: entry(arm) for arm in values}, values, {"angles": [0]}, ["p4: no finished run"]
    )


def test_assembled_claims_fit_the_schema_also_as_json(result, tmp_path):
    assert list(claims.validate(result)) == []
    save_json(tmp_path / "claims.json", result)
    stored = load_json(tmp_path / "claims.json")
    assert list(claims.validate(stored)) == []
    assert json.loads((tmp_path / "claims.json").read_text()) == stored
    assert stored["notice"] == "Not for clinical use."
    silhouette = next(
        e for e in stored["comparisons"][0]["measures"] if e["measure"] == "silhouette"
    )
    assert silhouette["seeds"] == [1, 2, 3]  # a seed without a number is left out, in both arms


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: r.pop("rule"), "claims.rule is missing"),
        (lambda r: r.update(more=1), "claims.more is unknown"),
        (lambda r: r.update(n_images="ten"), "claims.n_images is 'ten', not a whole number"),
        (lambda r: r.update(n_images=True), "claims.n_images is True, not a whole number"),
        (
            lambda r: r["comparisons"][0]["verdicts"][0].update(verdict="proven"),
            "verdict is 'proven', not one of supported",
        ),
        (
            lambda r: r["comparisons"][0]["measures"][0].update(mean=math.nan),
            r"measures\[0\].mean is nan, not a number",
        ),
        (lambda r: r["arms"]["p4m"].update(rotation=0), "rotation is 0, not a true or false"),
        (lambda r: r.update(missing="none"), "claims.missing is str, not a list"),
    ],
)
def test_what_does_not_fit_is_named(result, change, problem):
    broken = copy.deepcopy(result)
    change(broken)
    found = list(claims.validate(broken))
    assert len(found) == 1
    assert re.search(problem, found[0])


def test_rocs_are_means_over_seeds_beside_a_guess_of_the_same_findings():
    rng = np.random.default_rng(0)
    targets = rng.random((500, 3)) < [0.5, 0.2, 0.05]
    train, test = np.arange(300), np.arange(300, 500)

    def answers(strength):
        log_odds = rng.normal(size=(200, 3)) + strength * targets[test]
        log_odds[:, 2] = np.nan  # too rare for the probe: the guess is not asked either
        return {"labelled_test": test, "findings": log_odds}

    scores = {"p4m": {0: answers(1), 1: answers(3)}, "alexnet": {0: {}}}
    grid = np.linspace(0, 1, 2001)
    found = claims.rocs(scores, ("alexnet", "p4m", "p4"), targets, train, grid)
    assert list(found) == ["p4m", "guess"]

    def area(log_odds):
        return metrics.multilabel_scores(log_odds, targets[test])["auroc_micro"][0]

    expected = np.mean([area(expit(given["findings"])) for given in scores["p4m"].values()])
    assert np.trapezoid(found["p4m"]["micro"], grid) == pytest.approx(expected, abs=2e-3)
    guess = np.where([False, False, True], np.nan, metrics.prevalence_guess(targets, train, test))
    assert np.trapezoid(found["guess"]["micro"], grid) == pytest.approx(area(guess), abs=2e-3)
    np.testing.assert_allclose(found["guess"]["macro"], grid)
    assert claims.rocs({}, ("p4m",), targets, train, grid) == {}


def test_networks_trained_on_turned_phantoms_have_a_table_of_their_own(result):
    assert claims.turned_table(result) == ""
    assert "hung in any orientation" not in claims.markdown(result)
    result["details"]["trained_on_turned_images"] = {
        "p4m": claims.over_seeds({0: {"kept_free": 0.25}, 1: {"kept_free": 0.35}})
    }
    row = f"| {result['arms']['p4m']['title']} | – | 0.300 | – | – | – | 2 |"
    assert row in claims.turned_table(result)
    assert row in claims.markdown(result)


def test_arms_with_fewer_seeds_are_counted(result):
    assert claims.fewer_seeds(result) == []
    arms = len(result["arms"])
    result["arms"]["alexnet"]["seeds"] = [1]
    assert claims.fewer_seeds(result) == [
        f"Of the {arms} arms and controls 1 has the seed 1 alone."
    ]
    assert f"Of the {arms} arms and controls 1 has the seed 1 alone." in claims.markdown(result)


def test_text_says_what_the_numbers_say(result):
    text = claims.markdown(result, "make it")
    assert "**supported**" in claims.verdict_table(result)
    assert "Not for clinical use." in text
    assert "test pictures, 10 images" in text
    assert "p4: no finished run" in text
    assert "nan" not in text
    row = next(
        line
        for line in claims.verdict_table(result).splitlines()
        if line.startswith("| No augmentation")
    )
    found = next(e for e in result["comparisons"][0]["measures"] if e["measure"] == "kept_free")
    for number in ("treatment", "reference", "mean"):
        assert f"{found[number]:.3f}" in row
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) >= 3
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    sentence = next(s for s in claims.sentences(result) if s.startswith("No augmentation"))
    assert "the claim holds here" in sentence
    assert "n = 4 seeds" in sentence


def test_one_seed_is_said_to_be_undecided():
    values = simulated_study(np.random.default_rng(3), 1)
    result = claims.assemble(
        HEAD,
        {arm: entry(arm) for arm in ("p4m", "alexnet")},
        {"p4m": values["a"], "alexnet": values["b"]},
        {},
        [],
    )
    assert claims.verdict_table(result).count("undecided at n = 1") == len(CLAIMS)
    assert all("fewer than 3 seeds decide nothing" in s for s in claims.sentences(result))
    assert "nan" not in claims.markdown(result)


def test_without_two_arms_there_is_no_verdict():
    values = simulated_study(np.random.default_rng(3), 3)
    result = claims.assemble(HEAD, {"p4m": entry("p4m")}, {"p4m": values["a"]}, {}, [])
    assert claims.verdict_table(result) == "No two arms can be compared yet."
    assert claims.sentences(result) == []


def test_each_claim_has_one_deciding_measure_and_comparisons_name_arms():
    from lib.study.arms import ARMS

    assert [m.claim for m in PRIMARY] == [c.key for c in CLAIMS]
    assert len({m.key for m in MEASURES}) == len(MEASURES)
    assert claims.COMPARISONS[0][:2] == ("p4m", "alexnet")
    assert {arm for a, b, _ in claims.COMPARISONS for arm in (a, b)} <= set(ARMS)


def test_measure_table_and_mean_curves():
    values = simulated_study(np.random.default_rng(3), 3)
    result = claims.assemble(HEAD, {"p4m": entry("p4m")}, {"p4m": values["a"]}, {}, [])
    table = claims.measure_table(result, {"kept_free": "kept", "absent": "none"})
    assert f"{np.mean([v['kept_free'] for v in values['a'].values()]):.3f} (" in table
    assert "–" in table
    details = {"a": {0: {"c": {"x": [1.0, None]}}, 1: {"c": {"x": [3.0, None]}}}, "b": {0: {}}}
    assert claims.mean_curves(details, "c") == {"a": {"x": [2.0, None]}}
