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
from tests import readme_commands
from tests.bench import beyond_measures
from tests.test_bootstrap import NOTEBOOKS, code

ROOT, FIGURES = paths.ROOT, paths.ROOT / "figures"
README = (ROOT / "README.md").read_text(encoding="utf-8")
FAQ = (ROOT / "docs" / "FAQ.md").read_text(encoding="utf-8")
FOLDERS = [ROOT.glob("*.md"), (ROOT / "docs").glob("*.md"), (ROOT / "data").glob("*/README.md")]
PAGES = sorted(page for folder in FOLDERS for page in folder)
OF_STUDY = paths.load_json(FIGURES / "nih-sample-study" / "claims.json")["arms"]


def mean(arm, measure):
    return f"{OF_STUDY[arm]['measures'][measure]['mean']:.3f}"


def test_result_at_a_glance_is_the_committed_result():
    table = report.glance(paths.load_json(FIGURES / "phantom" / "results.json"))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"<!-- glance -->\n{table}\n<!-- /glance -->" in page


def test_what_we_found_is_the_published_study():
    text = verdicts.findings(paths.load_json(FIGURES / "nih-9k" / "results.json"))
    assert f"<!-- study -->\n{text}\n<!-- /study -->" in README


def test_tables_of_the_small_experiments_are_the_committed_numbers():
    page = (ROOT / "docs" / "beyond.md").read_text(encoding="utf-8")
    runs, again = (pd.read_csv(FIGURES / "beyond" / f"{name}.csv") for name in ("runs", "again"))
    for question in beyond_measures.QUESTIONS:
        assert beyond_measures.tables(runs, question) in page
    assert beyond_measures.again(again) in page
    assert beyond_measures.cost() in page


def test_readme_is_short_and_begins_with_a_picture():
    assert len(README.split()) <= 1200
    assert any(line.startswith("![") for line in README.splitlines()[:15])


def test_numbers_in_the_prose_are_the_committed_ones():
    text = " ".join(FAQ.split())
    nmi = {
        arm: mean(arm, "nmi_final") for arm in OF_STUDY if "nmi_final" in OF_STUDY[arm]["measures"]
    }
    assert f"ends at {nmi['alexnet']} for AlexNet and {nmi['p4m']} for P4M" in text
    assert f"still ends at {nmi['alexnet-index']} and {nmi['p4m-index']}" in text
    auroc = {arm: mean(arm, "auroc_macro") for arm in ("pixels", "alexnet", "p4m")}
    assert f"{auroc['pixels']}, against {auroc['alexnet']} for AlexNet and {auroc['p4m']}" in text
    assert auroc["pixels"] > max(auroc["alexnet"], auroc["p4m"]), "the question lost its ground"
    bench = (FIGURES / "bench" / "paper_scale_cpu.md").read_text(encoding="utf-8")
    cost = re.search(r"GFLOP an image.* \| ([\d.]+) and [\d.]+ \| ([\d.]+) and", bench)
    assert f"one image costs {cost[2]} GFLOP in the dense count, with AlexNet {cost[1]}" in text
    table = (FIGURES / "bench" / "notebook_memory.md").read_text(encoding="utf-8")
    peaks = [float(peak) for peak in re.findall(r"^\| \w+ \| (\d\.\d\d) \|", table, re.MULTILINE)]
    assert f"one of them took was {max(peaks):.2f} GB" in text


def test_every_notebook_and_every_room_is_listed():
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
    for name in ("run", "study", "reuse"):  # the help of run names the other commands
        with pytest.raises(SystemExit):
            parse([name, "--help"])
        known |= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    pages = README + "".join(
        page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")
    )
    named = set(re.findall(r"(?:`|run_all\.sh )(--[a-z-]+)", pages))
    assert len(named) >= 12
    assert named <= known


NIH = (
    "README.md",
    "docs/MODEL_CARD.md",
    "docs/data.md",
    "docs/beyond.md",
    "data/README.md",
    "data/manifests/README.md",
)
NIH += ("figures/nih-sample-study/claims.md",)
DRAWN = ("figures/phantom/summary.md", "figures/phantom-study/claims.md")


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


def test_every_command_is_run_or_says_why_not():
    pages = [page.read_text(encoding="utf-8") for page in readme_commands.PAGES]
    found = {command for page in pages for command in readme_commands.shown(page)}
    assert found == set(readme_commands.COMMANDS)
    run = [how for how in readme_commands.COMMANDS.values() if readme_commands.NOT not in how]
    assert len(run) >= 8


def test_commands_are_found_where_a_page_shows_them():
    text = "Call `./run_all.sh --data X`, not `run`.\n\n    python -m a \\\n        --b   # why\n"
    text += "    other thing\n\n```python\nimport c\n```\n"
    assert readme_commands.shown(text) == ["python -m a --b", "./run_all.sh --data X"]
