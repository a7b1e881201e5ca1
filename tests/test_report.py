"""Captions of figures that several notebooks draw, in one summary.md."""

import re

import pytest

from lib import data
from lib.paths import ROOT
from lib.study import report
from tests.test_bootstrap import code

LABEL = "synthetic phantom, 72 images"


@pytest.fixture
def summary(tmp_path):
    return tmp_path / "figures" / "summary.md"


def add(path, notebook, figures, seeds=(0, 1), command="./run_all.sh"):
    report.save_captions(path, notebook, figures, LABEL, seeds, command, data.PHANTOM_ATTRIBUTION)
    return path.read_text(encoding="utf-8")


def test_captions_stand_once_however_often_they_are_written(summary):
    report.save_summary(summary, "# Summary: x\n\n## Figures\n\n**fig1** One.\n")
    add(summary, "07_explore", {"fig10_atlas": "Old atlas."})
    once = add(summary, "06_claims", {"fig5_claims": "Old.", "fig6_controls": "Controls."})
    assert add(summary, "06_claims", {"fig5_claims": "Old.", "fig6_controls": "Controls."}) == once
    text = add(
        summary, "06_claims", {"fig5_claims": "New."}, seeds=[0, 3], command="./run_all.sh --study"
    )
    assert text.startswith("# Summary: x\n\n## Figures\n\n**fig1** One.\n")
    assert re.findall(r"^\*\*(\w+)\*\* (\w+)", text, re.MULTILINE) == [
        ("fig1", "One"),
        ("fig5_claims", "New"),
        ("fig10_atlas", "Old"),
    ]
    assert f"**fig5_claims** New. Dataset: {LABEL}." in text
    assert "Seeds 0, 3. Made by `./run_all.sh --study`." in text
    assert "Controls" not in text
    assert "\n\n\n" not in text


def test_a_new_summary_keeps_the_captions_of_the_others(summary):
    report.save_summary(summary, "# Summary: old\n")
    add(summary, "06_claims", {"fig5_claims": "Differences."})
    report.save_summary(summary, "# Summary: new\n")
    text = summary.read_text(encoding="utf-8")
    assert text.startswith(
        "# Summary: new\n\n<!-- figures of 06_claims -->\n## Figures of 06_claims\n"
    )
    assert "old" not in text
    assert text == add(summary, "06_claims", {"fig5_claims": "Differences."})


def test_without_a_summary_there_are_captions_and_the_attribution(summary):
    """A study draws figures 5 to 9 alone."""
    text = add(summary, "06_claims", {"fig5_claims": "Differences."})
    assert text.startswith(
        f"# Figures: {LABEL}\n\n{data.PHANTOM_ATTRIBUTION}\n\n<!-- figures of 06_claims -->\n"
    )
    report.save_summary(summary, "# Summary: x\n")
    assert data.PHANTOM_ATTRIBUTION not in summary.read_text(encoding="utf-8")
    assert "**fig5_claims**" in summary.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["", "06 claims", "a -->"])
def test_a_section_needs_a_name_that_can_be_found_again(summary, name):
    with pytest.raises(ValueError, match="cannot name a section"):
        add(summary, name, {"fig": "Caption."})
    assert not summary.exists()


def test_every_notebook_that_keeps_figures_adds_its_captions():
    """05 writes the summary; whoever else saves a figure must tell its caption under its own name."""
    keeping = {path.stem: "\n".join(code(path)) for path in (ROOT / "notebooks").glob("*.ipynb")}
    keeping = {name: source for name, source in keeping.items() if "style.save(" in source}
    assert set(keeping) >= {"05_figures", "06_claims", "07_explore"}
    for name, source in keeping.items():
        wanted = (
            'report.save_summary(out / "summary.md"'
            if name == "05_figures"
            else f'report.save_captions(out / "summary.md", "{name}", captions'
        )
        assert wanted in source, name
