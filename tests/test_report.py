"""Text says what numbers say, collapse is told, several notebooks share one page of captions."""

import copy
import math
import re

import numpy as np
import pytest

from lib.study import claims, report, verdicts
from tests.test_claims import as_results, simulated_study

LABEL, ATTRIBUTION = "synthetic phantom, 72 images", "Drawn. Not for clinical use."


@pytest.fixture
def summary(tmp_path):
    return tmp_path / "figures" / "summary.md"


def add(path, notebook, figures, seeds=(0, 1), command="./run_all.sh"):
    report.save_captions(path, notebook, figures, LABEL, seeds, command, ATTRIBUTION)
    return path.read_text(encoding="utf-8")


def test_captions_stand_once_however_often_they_are_written(summary):
    report.save_summary(summary, "# Summary: x\n\n## Figures\n\n**fig1** One.\n")
    add(summary, "07_explore", {"fig10_atlas": "Old atlas."})
    two = {"fig5_claims": "Old.", "fig6_controls": "Controls."}
    assert add(summary, "06_claims", two) == add(summary, "06_claims", two)
    text = add(summary, "06_claims", {"fig5_claims": "New."}, [0, 3], "./run_all.sh --study")
    assert text.startswith("# Summary: x\n\n## Figures\n\n**fig1** One.\n")
    found = re.findall(r"^\*\*(\w+)\*\* (\w+)", text, re.MULTILINE)
    assert found == [("fig1", "One"), ("fig5_claims", "New"), ("fig10_atlas", "Old")]
    assert f"**fig5_claims** New. Dataset: {LABEL}." in text
    assert "Seeds 0, 3. Made by `./run_all.sh --study`." in text
    assert "Controls" not in text
    assert "\n\n\n" not in text


def test_a_new_summary_keeps_the_captions_of_the_others(summary):
    text = add(summary, "06_claims", {"fig5_claims": "Differences."})
    begin = "<!-- figures of 06_claims -->\n## Figures of 06_claims\n"
    assert text.startswith(f"# Figures: {LABEL}\n\n{ATTRIBUTION}\n\n{begin}")
    for title in ("old", "new"):
        report.save_summary(summary, f"# Summary: {title}\n")
        text = summary.read_text(encoding="utf-8")
        assert text.startswith(f"# Summary: {title}\n\n{begin}")
        assert "**fig5_claims**" in text
        assert ATTRIBUTION not in text
    assert "old" not in text
    assert text == add(summary, "06_claims", {"fig5_claims": "Differences."})


def page_comparison(n_seeds, effects=None):
    """Results of P4M and AlexNet, compared."""
    found = simulated_study(np.random.default_rng(3), n_seeds, effects)
    found["arms"] = {"p4m": found["arms"]["a"], "alexnet": found["arms"]["b"]}
    return found | {"comparisons": claims.compare_all(found)}


@pytest.fixture(scope="module")
def compared():
    """P4M is better in one claim; one AlexNet of eight collapsed; no labels."""
    found = page_comparison(8, {"ami_free": 30})
    about = {"backbone": "p4m", "rotation": False, "pseudo_labels": "clusters"}
    about |= {"parameters": 10, "feature_dim": 4, "flops": 1000, "title": "P4M"}
    for entry in found["arms"].values():
        entry |= about
        for run in entry["seeds"].values():
            run["values"] |= {"largest_cluster": 0.1, "perplexity": 15.0, "clusters_used": 20}
            run["values"] |= {"auroc_macro": "fewer than 2 classes"}
    found["arms"]["alexnet"]["seeds"]["1"]["values"]["largest_cluster"] = 0.8
    return found | {"comparisons": claims.compare_all(found)}


@pytest.fixture
def results(compared):
    return copy.deepcopy(compared)


def rows_of(text, first):
    return [line for line in text.splitlines() if line.startswith(f"| {first}")]


def test_numbers_spans_and_cells_of_a_table():
    shown = [report.number(x) for x in (0.1234, -1.234, 12.34, 123.4, None, math.inf)]
    assert shown == ["0.123", "-1.23", "12.3", "123", "–", "–"]
    assert report.span(0.1, 0.25) == "0.100 to 0.250"
    assert report.span(math.nan, math.nan) == report.span(None, None) == "–"
    text = report.table(["a", "b"], [["1", "x|y"], ["2", ""]], figures=True)
    assert {line.count("|") for line in text.splitlines()} == {3}
    assert text.splitlines()[1] == "|---|---:|"


def test_collapse_is_marked_and_no_interval_is_given_over_a_mixture(results):
    whole, mixed = (report.cell(results, arm, "ami_free") for arm in ("p4m", "alexnet"))
    assert re.fullmatch(r"\d\.\d\d \(\d\.\d\d to \d\.\d\d\)", whole)
    assert re.fullmatch(r"\d\.\d{3} † \(1 of 8 collapsed\)", mixed)
    text = report.occupancy_table(results)
    assert "10.0% to 80.0%" in text
    assert "seed 1 †" in text
    for page in (text, verdicts.verdict_table(results), verdicts.verdict_matrix(results)):
        assert report.COLLAPSED in page
    for run in results["arms"]["alexnet"]["seeds"].values():
        run["values"]["largest_cluster"] = 0.9
    assert "to" in report.cell(results, "alexnet", "ami_free")  # all collapsed: no mixture


def test_what_has_no_number_says_why(results):
    assert report.cell(results, "p4m", "auroc_macro") == "not defined: fewer than 2 classes"
    assert report.cell(results, "p4m", "nothing") == "–"
    (row,) = rows_of(verdicts.verdict_table(results), "Better transferability")
    assert "**not defined: fewer than 2 classes**" in row
    text = report.measure_table(results, {"auroc_macro": "AUROC"})
    assert text == "not defined: fewer than 2 classes"


def test_verdicts_are_the_numbers(results):
    (row,) = rows_of(verdicts.verdict_table(results), "No augmentation")
    entry = next(e for e in results["comparisons"][0]["measures"] if e["measure"] == "ami_free")
    for number in ("treatment", "reference", "mean"):
        assert report.number(entry[number]) in row
    assert "**supported †**" in row
    assert verdicts.MEANING["supported"] in row


def test_few_seeds_cannot_tell_and_the_number_that_would_is_said():
    found = page_comparison(1)
    count = verdicts.verdict_table(found).count("cannot tell at n = 1; at least 8 seeds")
    assert count == len(claims.CLAIMS)
    assert " to " not in report.cell(found, "p4m", "ami_free")


def test_pages_hold_the_warning_and_what_is_missing(results):
    results["missing"] = ["p4: no finished run"]
    pages = verdicts.claims_pages(results, "make it")
    for text in pages.values():
        assert "Not for clinical use" in text
        assert "`make it`" in text
    text = "".join(pages.values())
    assert "p4: no finished run" in text
    assert all(word in text.lower() for word in claims.VERDICTS)
    lines = rows_of(text, "**silhouette of the clusters")
    assert " to " in lines[0].split("|")[-2], "also without the seeds that collapsed"


def test_findings_are_a_line_per_claim_and_what_the_controls_add(results):
    results["arms"]["cnn_params"] = results["arms"]["alexnet"]
    results["comparisons"] = claims.compare_all(results)
    text = verdicts.findings(results)
    assert max(map(len, text.splitlines())) <= 100
    lines = [f"- **{line}" for line in " ".join(text.split()).split("- **")[1:]]
    assert all(lines[i].startswith(f"- **{c.title}: ") for i, c in enumerate(claims.CLAIMS))
    entry = results["comparisons"][0]["measures"][0]
    assert f"difference {entry['mean']:.3f} (" in lines[0]
    assert "AlexNet 1 of 8" in lines[-1]
    assert any("P4M's parameters" in line and "supported" in line for line in lines)


def test_whether_a_verdict_hangs_on_the_loop(results):
    assert verdicts.regimes(results) == ""
    arms = results["arms"]
    for ours, theirs, wanted in (("p4m", "alexnet", "same direction"), ("alexnet", "p4m", "round")):
        arms["p4m-described"], arms["alexnet-described"] = arms[ours], arms[theirs]
        results["comparisons"] = claims.compare_all(results)
        text = verdicts.regimes(results)
        assert wanted in rows_of(text, "No augmentation required")[0]
        assert "an interval holds 0" in rows_of(text, "Improved stability")[0]
        assert text in verdicts.claims_pages(results, "make it")["claims.md"]
    arms["p4m-rotation"] = arms["p4m"]
    text = verdicts.findings(results)
    assert "- **The loop as the page describes it**" in text
    assert f"P4M rotated {report.cell(results, 'p4m', 'ami_free', False)}" in " ".join(text.split())


def test_nothing_to_compare_and_labels_of_data_sets():
    found = as_results({"alexnet": {0: {"silhouette": 0.1}}}) | {"comparisons": []}
    for text in (verdicts.verdict_table(found), verdicts.verdict_matrix(found)):
        assert "compared" in text
    assert report.dataset_label("phantom", 2000) == "synthetic phantom, 2,000 images"
    assert report.dataset_label("digits", 1797).startswith("handwritten digits")
    assert report.dataset_label("folder", 1) == "own images, 1 images"
