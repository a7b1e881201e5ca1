"""What can be said of the notebooks without running them: form, length, saved outputs, and their
agreement with the presets."""

import ast
import getpass
import re
import tomllib
from pathlib import Path

import nbformat
import pytest

from lib.notebooks import find_notebooks, read_parameters, read_preset
from lib.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PRESETS = ["paper", "quick", "smoke", "study", "xrays", "xrays-wide"]
MACHINE_PATH = re.compile(
    r"(?<![\w.:/~>-])/(?:home|Users|root|work|tmp|opt|mnt|var|usr|content|private)/"
    r"|\b[A-Za-z]:\\{1,2}\w|file://"
)
SECRET = re.compile(
    r"gh[pousr]_\w{20,}|github_pat_\w+|hf_\w{20,}|AKIA[0-9A-Z]{16}|KGAT_\w+|-----BEGIN|"
    r"(?i:kaggle_key|api_?key|token|password|secret)[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9+/_-]{12,}"
)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def parse(cell):
    """The cell's syntax tree, without the lines that are IPython's."""
    return ast.parse(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.MULTILINE))


def nodes(path, *kinds):
    trees = [parse(cell) for cell in code_cells(path)[1:]]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]


def imported(path):
    found = nodes(path, ast.Import, ast.ImportFrom)
    return {alias.asname or alias.name.split(".")[0] for node in found for alias in node.names}


def strings(value, key=""):
    """All text in saved outputs, except encoded images."""
    if isinstance(value, str) and not key.startswith(("image/png", "image/jpeg")):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from strings(item, name)


def test_they_are_numbered_without_a_gap_and_define_no_function_twice():
    numbers = [int(path.name[:2]) for path in find_notebooks()]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= 6
    owners = {}
    for path in NOTEBOOKS:
        for node in nodes(path, ast.FunctionDef):
            owners.setdefault(node.name, set()).add(path.name)
    assert {name: paths for name, paths in owners.items() if len(paths) > 1} == {}


@each_notebook
def test_is_valid_and_begins_with_title_question_and_badges(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "papermill" not in notebook.metadata, "this is an executed copy"
    header = notebook.cells[0].source
    number = path.name[:2] if path.name[:2].isdigit() else ""
    assert re.match(rf"# {number}\b", header)
    assert "?**" in header, "the header asks the one question that the notebook answers"
    assert all(word in header for word in ("Reads:", "Writes:", "Takes:"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name = project["urls"]["Repository"].removeprefix("https://github.com/")
    colab, binder = "https://colab.research.google.com/github", "https://mybinder.org/v2/gh"
    assert f"({colab}/{name}/blob/main/notebooks/{path.name})" in header
    assert f"({binder}/{name}/main?urlpath=lab/tree/notebooks/{path.name})" in header


@each_notebook
def test_is_short_has_parameters_and_checks_its_results(path):
    tags = [cell.metadata.get("tags", []) for cell in code_cells(path)]
    assert [i for i, tag in enumerate(tags) if "parameters" in tag] == [2]
    assert "dataset" in read_parameters(path)  # literals, or it raises
    for cell in code_cells(path):
        assert len(list(filter(str.strip, cell.source.splitlines()))) <= 25
    assert path.stat().st_size <= 500_000
    assert not nodes(path, ast.ClassDef), "classes belong in lib"
    assert nodes(path, ast.Assert)
    assert imported(path) - {node.id for node in nodes(path, ast.Name)} == set(), "not used"
    assert not set(read_parameters(path)) & imported(path), "a parameter takes its place"


@pytest.mark.parametrize("name", ["02_train_alexnet", "03_train_p4m"])
def test_training_opens_no_label(name):
    cells = code_cells(ROOT / "notebooks" / f"{name}.ipynb")[1:]
    source = "\n".join(cell.source for cell in cells)
    assert "data.load_images(" in source
    assert not re.search(r"data\.load\(|metadata|manifest|findings|read_metadata", source)


@each_notebook
def test_was_run_from_top_to_bottom_and_saved_with_outputs(path):
    cells = code_cells(path)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "Restart Kernel and Run All Cells, then save"
    kinds = {kind for cell in cells for output in cell.outputs for kind in output.get("data", {})}
    assert kinds & {"image/png", "image/svg+xml"}, "no figure is saved in it"
    for cell in cells:  # one that ends in a name shows it: without an output it was not run
        last = parse(cell).body[-1:]
        if last and isinstance(last[0], ast.Expr) and isinstance(last[0].value, ast.Name):
            assert cell.outputs, cell.source


@each_notebook
def test_outputs_hold_no_error_no_warning_and_no_widget(path):
    assert "widgets" not in read(path).metadata, "a frozen progress bar: use tqdm, not tqdm.auto"
    for output in (output for cell in code_cells(path) for output in cell.outputs):
        assert output.output_type != "error", output.get("ename")
        text = output.get("text", "") if output.get("name") == "stderr" else ""
        assert not re.search("Warning|Traceback", text), text
        assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
        assert "columns]" not in output.get("data", {}).get("text/plain", ""), "columns left out"


@each_notebook
def test_says_nothing_of_the_machine_it_ran_on(path):
    assert MACHINE_PATH.search("saved to " + "/".join(["", "home", "ann", "x.png"]))
    assert not MACHINE_PATH.search("https://example.org/home/x and figures/usr/")
    assert SECRET.search('api_key = "0123456789abcdef"')
    private, user = {str(ROOT), str(Path.home())} - {"/", "/root"}, getpass.getuser()
    private |= {user} if len(user) > 4 and user not in {"runner", "admin", "jovyan"} else set()
    words = [rf"(?<!\w){re.escape(word)}(?!\w)" for word in private]
    for cell in read(path).cells:
        for text in [cell.source, *strings(cell.get("outputs", []))]:
            found = [re.search(pattern, text) for pattern in (MACHINE_PATH, SECRET, *words)]
            assert not any(found), found


def test_presets_have_the_same_keys_and_that_of_the_paper_is_the_papers():
    assert sorted(p.stem for p in (ROOT / "notebooks" / "params").glob("*.yaml")) == PRESETS
    keys = [set(read_preset(name)) for name in PRESETS]  # raises for one that no notebook has
    assert all(each == keys[0] for each in keys)
    paper = read_preset("paper")
    published = {"n_clusters": 200, "pca_dim": 64, "epochs": 20, "batch_size": 256, "lr": 1e-3}
    published |= {"weight_decay": 1e-4, "p4m_width": [64, 128, 256]}
    assert published.items() <= paper.items()
    assert len(paper["seeds"]) >= 3


@each_notebook
def test_defaults_are_the_smoke_preset(path):
    """The tests run notebooks as they are saved, without papermill."""
    smoke, defaults = read_preset("smoke"), read_parameters(path)
    shared = set(defaults) & set(smoke)
    assert shared
    assert {name: defaults[name] for name in shared} == {name: smoke[name] for name in shared}
