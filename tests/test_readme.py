"""What README and the published pages say is what is there."""

import ast
import re

import pytest

from lib import paths
from lib.run import USAGE, find_notebooks
from lib.study import claims, evaluate, report
from tests import readme_commands
from tests.test_bootstrap import code

README = (paths.ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    p
    for p in [*paths.ROOT.glob("*.md"), *(paths.ROOT / "data").glob("**/README.md")]
    if "runs" not in p.parts
)


def test_result_at_a_glance_is_the_committed_result():
    table = report.glance(paths.load_json(paths.ROOT / "figures" / "phantom" / "results.json"))
    assert f"<!-- glance -->\n{table}\n<!-- /glance -->" in README


def test_claims_at_a_glance_are_the_committed_claims():
    stored = [
        paths.load_json(paths.ROOT / "figures" / name / "claims.json")
        for name in ("nih-sample-study", "phantom-study")
    ]
    assert all(list(claims.validate(result)) == [] for result in stored)
    assert f"<!-- claims -->\n{claims.glance(stored)}\n<!-- /claims -->" in README


def test_what_is_said_of_steadiness_is_the_committed_result():
    arms = paths.load_json(paths.ROOT / "figures" / "nih-sample-study" / "claims.json")["arms"]
    p4m, alexnet, index = (
        f"{arms[arm]['measures']['nmi_sd']['mean']:.3f}" for arm in ("p4m", "alexnet", "p4m-index")
    )
    said = f"standard deviation that is {p4m} for P4M and {alexnet} for AlexNet on the real X-rays is {index} for P4M trained on the"
    assert said in " ".join(README.split())


def test_committed_tables_are_the_committed_result():
    folder = paths.ROOT / "figures" / "phantom"
    results = paths.load_json(folder / "results.json")
    assert list(evaluate.validate(results)) == []
    published = paths.load_json(paths.ROOT / "data" / "published" / "numbers.json")
    text = report.linear_probe_markdown(
        report.linear_probe_table(results, published), results["dataset_label"]
    )
    assert (folder / "table1_linear_probe.md").read_text(encoding="utf-8") == text
    assert text in (folder / "summary.md").read_text(encoding="utf-8")


def test_every_notebook_is_listed():
    assert re.findall(r"^\| \[(\w+)\]\(notebooks/\1\.ipynb\)", README, re.MULTILINE)[
        : len(find_notebooks())
    ] == [p.stem for p in find_notebooks()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(paths.ROOT).as_posix())
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_options_named_are_options():
    named = set(re.findall(r"`(--[a-z]+)", README)) | set(
        re.findall(r"run_all\.sh (--[a-z]+)", README)
    )
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
        "figures/phantom-study/claims.md",
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
    moved = scope["group_max_pool"](
        scope["norm"](scope["conv"](scope["pool"](scope["lift"](scope["images"]))))
    ).mean((2, 3))
    torch.testing.assert_close(moved, scope["features"], rtol=1e-4, atol=1e-5)


def test_the_lines_for_a_finished_run_work(tmp_path):
    np = pytest.importorskip("numpy")
    from lib.deepcluster import TrainConfig, fit

    images = np.random.default_rng(0).integers(0, 256, (24, 64, 64), dtype=np.uint8)
    fit(
        images,
        TrainConfig("p4m", n_clusters=3, pca_dim=4, epochs=0, width=(2, 2, 4), device="cpu"),
        tmp_path / "run",
        progress=False,
    )
    code = re.search(r"```python\n(from lib import reuse.*?)```", README, re.DOTALL).group(1)
    scope = {"images": images}
    exec(code.replace("data/runs/phantom/p4m/seed0", (tmp_path / "run").as_posix()), scope)
    assert len(scope["assignments"]) == len(scope["embedding"]) == 24


FAQ = (paths.ROOT / "FAQ.md").read_text(encoding="utf-8")


def texts_of_the_code():
    """Every piece of text in lib and the notebooks' code, without the values that are put in, and
    run_all.sh as it is.
    """
    sources = [
        path.read_text(encoding="utf-8") for path in sorted((paths.ROOT / "lib").glob("*.py"))
    ]
    sources += [
        "\n".join(code(path)) for path in sorted((paths.ROOT / "notebooks").glob("*.ipynb"))
    ]
    pieces = [
        node.value
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant)
    ]
    return [piece for piece in pieces if isinstance(piece, str)] + [
        (paths.ROOT / "run_all.sh").read_text(encoding="utf-8")
    ]


def test_every_error_text_of_the_faq_is_one_that_the_code_has():
    quoted = re.findall(r"^\| `([^`]+)` \|", FAQ, re.MULTILINE)
    assert len(quoted) >= 20
    there = texts_of_the_code()
    for text in quoted:
        pieces = [piece.strip() for piece in text.split("...") if len(piece.strip()) > 3]
        assert any(len(piece) >= 10 for piece in pieces), f"{text!r} is too short to be found by"
        for piece in pieces:
            assert any(piece in known for known in there), f"no message holds {piece!r}"


def test_numbers_of_the_faq_are_the_committed_ones():
    arms = paths.load_json(paths.ROOT / "figures" / "nih-sample-study" / "claims.json")["arms"]

    def mean(arm, measure):
        return f"{arms[arm]['measures'][measure]['mean']:.3f}"

    nmi = {arm: mean(arm, "nmi_final") for arm in ("alexnet", "p4m", "alexnet-index", "p4m-index")}
    auroc = {
        arm: mean(arm, "auroc_macro")
        for arm in ("pixels", "alexnet", "p4m", "alexnet-untrained", "p4m-untrained")
    }
    text = " ".join(FAQ.split())
    assert f"ends at {nmi['alexnet']} for AlexNet and {nmi['p4m']} for P4M" in text
    assert f"still ends at {nmi['alexnet-index']} and {nmi['p4m-index']}" in text
    assert (
        f"mean AUROC {auroc['pixels']}, against {auroc['alexnet']} for AlexNet and {auroc['p4m']} for P4M"
        in text
    )
    assert (
        f"and {auroc['alexnet-untrained']} and {auroc['p4m-untrained']} for the same networks untrained"
        in text
    )
    assert float(auroc["pixels"]) > max(float(auroc["alexnet"]), float(auroc["p4m"])), (
        "the question no longer has its ground"
    )
    bench = (paths.ROOT / "figures" / "bench" / "paper_scale_cpu.md").read_text(encoding="utf-8")
    alexnet, p4m = re.search(
        r"GFLOP an image.* \| ([\d.]+) and [\d.]+ \| ([\d.]+) and", bench
    ).groups()
    assert f"one image costs {p4m} GFLOP in the dense count, with AlexNet {alexnet}" in text
    table = (paths.ROOT / "figures" / "bench" / "notebook_memory.md").read_text(encoding="utf-8")
    peaks = [float(peak) for peak in re.findall(r"^\| \w+ \| (\d\.\d\d) \|", table, re.MULTILINE)]
    assert len(peaks) == len(list((paths.ROOT / "notebooks").glob("*.ipynb")))
    assert f"one of them took was {max(peaks):.2f} GB" in text
    assert max(peaks) < 1


def test_every_command_is_run_or_says_why_not():
    pages = [(paths.ROOT / page).read_text(encoding="utf-8") for page in readme_commands.PAGES]
    found = [command for page in pages for command in readme_commands.shown(page)]
    assert len(found) > 20
    assert set(found) == set(readme_commands.COMMANDS), (
        "tests/readme_commands.py and the pages name different commands"
    )
    assert (
        sum(isinstance(how, readme_commands.Run) for how in readme_commands.COMMANDS.values()) >= 8
    )


def test_commands_are_found_where_a_page_shows_them():
    text = (
        "Call `./run_all.sh --data X`, not `run`.\n\n    python -m a   # why\n    other thing\n\n"
    )
    text += "```\npip install b\n```\n\n```python\nimport c\n```\n"
    assert readme_commands.shown(text) == ["python -m a", "pip install b", "./run_all.sh --data X"]
