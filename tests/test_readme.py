"""What README and the published pages say is what is there."""

import re

import pytest

from lib import claims, evaluate, paths, report
from lib.run import USAGE, find_notebooks

README = (paths.ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(p for p in [*paths.ROOT.glob("*.md"), *(paths.ROOT / "data").glob("**/README.md")] if "runs" not in p.parts)


def test_result_at_a_glance_is_the_committed_result():
    table = report.glance(paths.load_json(paths.ROOT / "figures" / "phantom" / "results.json"))
    assert f"<!-- glance -->\n{table}\n<!-- /glance -->" in README


def test_claims_at_a_glance_are_the_committed_claims():
    stored = [paths.load_json(paths.ROOT / "figures" / name / "claims.json") for name in ("nih-sample-study", "phantom")]
    assert all(list(claims.validate(result)) == [] for result in stored)
    assert f"<!-- claims -->\n{claims.glance(stored)}\n<!-- /claims -->" in README


def test_committed_tables_are_the_committed_result():
    folder = paths.ROOT / "figures" / "phantom"
    results = paths.load_json(folder / "results.json")
    assert list(evaluate.validate(results)) == []
    published = paths.load_json(paths.ROOT / "data" / "published" / "numbers.json")
    text = report.linear_probe_markdown(report.linear_probe_table(results, published), results["dataset_label"])
    assert (folder / "table1_linear_probe.md").read_text(encoding="utf-8") == text
    assert text in (folder / "summary.md").read_text(encoding="utf-8")


def test_every_notebook_is_listed():
    assert re.findall(r"^\| \[(\w+)\]\(notebooks/\1\.ipynb\)", README, re.MULTILINE)[: len(find_notebooks())] == [
        p.stem for p in find_notebooks()
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(paths.ROOT).as_posix())
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_options_named_are_options():
    named = set(re.findall(r"`(--[a-z]+)", README)) | set(re.findall(r"run_all\.sh (--[a-z]+)", README))
    assert len(named) >= 6
    assert not {option for option in named if option not in USAGE}


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "MODEL_CARD.md",
        "data/README.md",
        "data/manifests/README.md",
        "figures/phantom/summary.md",
        "figures/nih-sample-study/claims.md",
    ],
)
def test_attribution_and_warning_stand_where_they_must(page):
    text = (paths.ROOT / page).read_text(encoding="utf-8")
    assert re.search("not for clinical use", text, re.IGNORECASE)
    if "phantom" not in page:
        assert "NIH Clinical Center" in text
        assert "https://nihcc.app.box.com/v/ChestXray-NIHCC" in text


def test_the_layers_of_the_example_do_what_it_says():
    torch = pytest.importorskip("torch")
    code = re.search(r"```python\n(from lib\.gconv.*?)```", README, re.DOTALL).group(1)
    images = torch.rand(2, 1, 16, 16)
    scope = {"images": images}
    exec(code, scope)
    assert scope["features"].shape == (2, 32)
    scope["images"] = torch.rot90(images.flip(3), 1, (2, 3))
    moved = scope["group_max_pool"](scope["norm"](scope["conv"](scope["pool"](scope["lift"](scope["images"]))))).mean((2, 3))
    torch.testing.assert_close(moved, scope["features"], rtol=1e-4, atol=1e-5)


def test_the_lines_for_a_finished_run_work(tmp_path):
    np = pytest.importorskip("numpy")
    from lib.deepcluster import TrainConfig, fit

    images = np.random.default_rng(0).integers(0, 256, (24, 64, 64), dtype=np.uint8)
    fit(images, TrainConfig("p4m", n_clusters=3, pca_dim=4, epochs=0, width=(2, 2, 4), device="cpu"), tmp_path / "run", progress=False)
    code = re.search(r"```python\n(from lib import reuse.*?)```", README, re.DOTALL).group(1)
    scope = {"images": images}
    exec(code.replace("data/runs/phantom/p4m/seed0", (tmp_path / "run").as_posix()), scope)
    assert len(scope["assignments"]) == len(scope["embedding"]) == 24
