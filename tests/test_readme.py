"""What README, docs/ and the published pages say is what is there."""

import ast
import re

import numpy as np
import pandas as pd
import pytest
import torch

from lib import paths
from lib.__main__ import parse
from lib.deepcluster import TrainConfig, fit
from lib.notebooks import find_notebooks
from lib.study import report, verdicts
from lib.study.inference import paired
from tests import beyond_measures, readme_commands
from tests.test_bootstrap import NOTEBOOKS, code

ROOT, FIGURES = paths.ROOT, paths.ROOT / "figures"
README = (ROOT / "README.md").read_text(encoding="utf-8")
FAQ = (ROOT / "docs" / "FAQ.md").read_text(encoding="utf-8")
FOLDERS = [ROOT.glob("*.md"), (ROOT / "docs").glob("*.md"), (ROOT / "data").glob("*/README.md")]
PAGES = sorted(page for folder in FOLDERS for page in folder)
RESULTS = paths.load_json(FIGURES / "nih-9k" / "results.json")
OF_STUDY = RESULTS["arms"]


def mean(arm, measure):
    found = [seed["values"][measure] for seed in OF_STUDY[arm]["seeds"].values()]
    return f"{np.mean(found):.3f}"


def test_results_in_the_pages_are_the_committed_ones():
    table = report.glance(paths.load_json(FIGURES / "phantom" / "results.json"))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"<!-- glance -->\n{table}\n<!-- /glance -->" in page
    text = verdicts.findings(RESULTS)
    assert f"<!-- study -->\n{text}\n<!-- /study -->" in README


def test_tables_of_the_small_experiments_are_the_committed_numbers():
    page = (ROOT / "docs" / "beyond.md").read_text(encoding="utf-8")
    runs, again = (pd.read_csv(FIGURES / "beyond" / f"{name}.csv") for name in ("runs", "again"))
    for question in beyond_measures.QUESTIONS:
        assert beyond_measures.tables(runs, question) in page
    assert beyond_measures.again(again) in page
    assert beyond_measures.cost() in page


def test_numbers_in_the_prose_are_the_committed_ones():
    text = " ".join(FAQ.split())
    pair = "alexnet", "p4m"
    nmi, ami = ({arm: mean(arm, name) for arm in pair} for name in ("nmi_final", "ami_final"))
    assert f"ends at {nmi['alexnet']} for AlexNet and {nmi['p4m']} for P4M" in text
    assert f"order still score {mean('p4m', 'nmi_chance')}" in text
    assert f"ends at {ami['alexnet']} and {ami['p4m']}" in text
    untrained = "alexnet-untrained", "p4m-untrained"
    auroc = {arm: mean(arm, "auroc_macro") for arm in ("pixels", "alexnet", "p4m", *untrained)}
    assert f"{auroc['pixels']} for the 4,096 pixels themselves" in text
    assert f"{auroc['alexnet']} for AlexNet and {auroc['p4m']} for P4M on NIH's" in text
    own = [mean(arm, "auroc_macro_own") for arm in ("pixels", *pair)]
    assert "images, and {}, {} and {} on our own split".format(*own) in text
    assert f"sex and age alone {mean('metadata', 'auroc_macro')}" in text
    assert f"reach {auroc['alexnet-untrained']} and {auroc['p4m-untrained']}" in text
    bench = (FIGURES / "bench" / "paper_scale_cpu.md").read_text(encoding="utf-8")
    cost = re.search(r"GFLOP an image.* \| ([\d.]+) and [\d.]+ \| ([\d.]+) and", bench)
    assert f"one image costs {cost[2]} GFLOP in the dense count, with AlexNet {cost[1]}" in text
    table = (FIGURES / "bench" / "notebook_memory.md").read_text(encoding="utf-8")
    peaks = [float(peak) for peak in re.findall(r"^\| \w+ \| (\d\.\d\d) \|", table, re.MULTILINE)]
    assert f"one of them took was {max(peaks):.2f} GB" in text


def test_readme_is_short_and_lists_every_notebook_and_every_room():
    assert len(README.split()) <= 1200
    assert any(line.startswith("![") for line in README.splitlines()[:15]), "a picture first"
    listed = re.findall(r"^\| \[(\w+)\]\(notebooks/\1\.ipynb\)", README, re.MULTILINE)
    assert listed == [path.stem for path in find_notebooks()] + ["equivariance"]
    rooms = [path.parent.name for path in (ROOT / "lib").glob("*/__init__.py")]
    assert len(rooms) == 6
    for page in (README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        assert all(f"{room}/" in page for room in rooms)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    prose = [line for line in text.splitlines() if not re.match(r"\||\[?!\[", line)]
    assert [line for line in prose if len(line) > 100] == []


def test_options_named_are_options(capsys):
    known = set()
    for name in ("run", "study", "reuse", "train"):  # the help of run names the other commands
        with pytest.raises(SystemExit):
            parse([name, "--help"])
        known |= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
    named = set(re.findall(r"(?:`|run_all\.sh )(--[a-z-]+)", "".join([README, *pages])))
    assert len(named) >= 12
    assert named <= known


def test_the_table_of_the_papers_widths_has_the_committed_numbers():
    runs = paths.load_json(FIGURES / "nih-9k" / "paper_widths.json")["runs"]
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split("paper's widths")[-1]
    keys = "loss_final", "settled_ami", "spread_ami", "map_silhouette", "ami_free", "auroc_macro"
    rows = re.findall(r"^\|(?! arm| difference|---)(.*)\|$", page, re.MULTILINE)
    assert [*runs][:3] == ["alexnet", "p4m", "cnn_params"]
    for (arm, seeds), row in zip(runs.items(), rows[: len(runs)], strict=True):
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[1] == str(len(seeds))
        for key, cell in zip(keys, cells[2:], strict=True):
            values = [run["values"][key] for run in seeds.values()]
            known = not any(isinstance(value, str) for value in values)
            assert cell == (f"{np.mean(values):.3f} ({mean(arm, key)})" if known else "–")
    for other, row in zip(("alexnet", "cnn_params"), rows[len(runs) :], strict=True):
        for key, cell in zip(keys, row.split("|")[2:], strict=True):
            pairs = zip(runs["p4m"].values(), runs[other].values(), strict=True)
            found = paired([a["values"][key] - b["values"][key] for a, b in pairs])
            assert cell.strip() == "{mean:.3f} ({low:.3f} to {high:.3f})".format(**found)


def test_the_augmentation_turned_round_has_the_committed_numbers():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    page = page.split("<!-- turned -->")[1].split("## Trained")[0]
    for rows, *arms in (("AlexNet", "alexnet-plain", "alexnet"), ("P4M", "p4m", "p4m-rotation")):
        assert f"| {rows} | " + " | ".join(map(turned, arms)) + " |" in page
    assert " | ".join(map(turned, ("cnn_params", "cnn_params-rotation"))) in page
    pair = ("p4m", "cnn_params-rotation")
    (found,) = (c for c in RESULTS["comparisons"] if (c["treatment"], c["reference"]) == pair)
    (entry,) = (e for e in found["measures"] if e["measure"] == "ami_free")
    assert "{mean:.3f} ({low:.3f} to {high:.3f}). So".format(**entry) in " ".join(page.split())


def test_labels_that_know_nothing_and_p4_have_the_committed_numbers():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows = page.split("<!-- labels -->")[1].split("<!-- /labels -->")[0].strip().splitlines()[2:]
    ends = ("", "-index", "-shuffled", "-untrained")
    for row, arm in zip(rows, [a + end for a in ("p4m", "alexnet") for end in ends], strict=True):
        cells = [str(len(RESULTS["arms"][arm]["seeds"]))]
        for key in ("loss_final", "nmi_final", "auroc_macro"):
            cell = report.cell(RESULTS, arm, key)
            cells.append("–" if cell.startswith("not defined") else cell)
        assert row.endswith(f"| {' | '.join(cells)} |")
    (found,) = (c for c in RESULTS["comparisons"] if c["reference"] == "p4")
    page = " ".join(page.split("## Without the mirror")[1].split())
    for entry in found["measures"]:
        if entry["measure"] in ("settled_ami", "auroc_macro", "ami_free"):
            span = report.span(entry["low"], entry["high"])
            assert f"{report.number(entry['mean'])} ({span})" in page


def turned(arm):
    return f"{report.cell(RESULTS, arm, 'ami_free')}, {len(RESULTS['arms'][arm]['seeds'])} seeds"


NIH = ("README.md", "docs/MODEL_CARD.md", "docs/data.md", "docs/beyond.md", "data/README.md")
NIH += ("data/manifests/README.md", "figures/nih-9k/claims.md")
NIH += ("figures/nih-9k/claims_appendix.md",)
DRAWN = ("figures/phantom/summary.md", "figures/phantom/claims.md")


@pytest.mark.parametrize("page", [*NIH, *DRAWN])
def test_attribution_and_warning_are_where_they_must_be(page):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert re.search("not for clinical use", text, re.IGNORECASE)
    if page in NIH:
        assert "NIH Clinical Center" in text
        assert "https://nihcc.app.box.com/v/ChestXray-NIHCC" in text


def test_the_layers_of_the_example_do_what_it_says():
    page = (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    images = torch.rand(2, 1, 16, 16)
    first, second = {"images": images}, {}
    exec(lines, first)
    assert first["features"].shape == (2, 32)
    moved = torch.rot90(images.flip(3), 1, (2, 3))
    exec(lines.split("\n\n")[1].splitlines()[-2], first | {"images": moved}, second)
    same = first["group_max_pool"](second["y"]).mean((2, 3))
    torch.testing.assert_close(same, first["features"], rtol=1e-4, atol=1e-5)


def test_the_lines_for_a_finished_run_work(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (24, 64, 64), dtype=np.uint8)
    small = {"n_clusters": 3, "pca_dim": 4, "epochs": 0, "width": (2, 2, 4), "device": "cpu"}
    fit(images, TrainConfig("p4m", **small), tmp_path / "run", progress=False)
    page = (ROOT / "docs" / "reuse.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(from lib\.explore.*?)```", page, re.DOTALL).group(1)
    scope = {"images": images}
    exec(lines.replace("data/runs/phantom/p4m/seed0", (tmp_path / "run").as_posix()), scope)
    assert len(scope["assignments"]) == len(scope["embedding"]) == 24


def test_every_error_text_of_the_faq_is_one_that_the_code_has():
    """Dots in a quoted text are values that the code puts in."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "lib").rglob("*.py")]
    sources += ["\n".join(code(path)) for path in NOTEBOOKS]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    there = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    there += [(ROOT / "run_all.sh").read_text(encoding="utf-8")]
    quoted = re.findall(r"^\| `([^`]+)` \|", FAQ, re.MULTILINE)
    assert len(quoted) >= 15
    pieces = [piece.strip() for text in quoted for piece in text.split("...")]
    absent = [p for p in pieces if len(p) > 3 and not any(p in known for known in there)]
    assert absent == []


def test_every_command_is_found_and_is_run_or_says_why_not():
    text = "Call `./run_all.sh --data X`, not `run`.\n\n    python -m a \\\n        --b   # why\n"
    text += "    other thing\n\n```python\nimport c\n```\n"
    assert readme_commands.shown(text) == ["python -m a --b", "./run_all.sh --data X"]
    pages = [page.read_text(encoding="utf-8") for page in readme_commands.PAGES]
    found = {command for page in pages for command in readme_commands.shown(page)}
    assert found == set(readme_commands.COMMANDS)
    named = {name for page in pages for name in re.findall(r"python tests/(bench/\w+\.py)", page)}
    assert len(named) > 5
    assert all((ROOT / "tests" / name).exists() for name in named)
    run = [how for how in readme_commands.COMMANDS.values() if readme_commands.NOT not in how]
    assert len(run) >= 8
