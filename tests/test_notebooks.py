"""What can be told of the notebooks without running them: form, length, saved outputs, and their
agreement with the presets.
"""

import ast
import getpass
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

from lib.paths import ROOT
from lib.run import find_notebooks, read_parameters, read_preset

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PRESETS = sorted((ROOT / "notebooks" / "params").glob("*.yaml"))
MACHINE_PATH = re.compile(
    r"(?<![\w.:/~>-])/(?:home|Users|root|work|tmp|opt|mnt|var|usr|content|private)/|\b[A-Za-z]:\\{1,2}\w|file://"
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
    return ast.parse(
        "\n".join(
            "" if line.lstrip().startswith(("%", "!")) else line
            for line in cell.source.splitlines()
        )
    )


def strings(value):
    """All text in saved outputs, except encoded images."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not str(key).startswith(("image/png", "image/jpeg")):
                yield from strings(item)


def test_there_are_notebooks_numbered_without_a_gap():
    numbers = [int(path.name[:2]) for path in find_notebooks()]
    assert len(numbers) >= 6
    assert numbers == list(range(len(numbers)))


@each_notebook
def test_is_valid_and_has_the_kernel_that_everyone_has(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "papermill" not in notebook.metadata, "an executed copy lies over the source"
    assert "widgets" not in notebook.metadata, "a frozen progress bar: use tqdm, not tqdm.auto"


@each_notebook
def test_begins_with_title_badges_bootstrap_and_imports(path):
    cells = read(path).cells
    assert cells[0].cell_type == "markdown"
    number = path.name[:2] if path.name[:2].isdigit() else ""
    assert re.match(rf"# {number}\b", cells[0].source), (
        "the title starts with the notebook's number, if it has one"
    )
    assert "?**" in cells[0].source, "the header asks the one question that the notebook answers"
    assert all(word in cells[0].source for word in ("Reads:", "Writes:", "Takes:"))
    tagged = [
        i
        for i, cell in enumerate(code_cells(path))
        if "parameters" in cell.metadata.get("tags", [])
    ]
    assert tagged == [2], "bootstrap, imports, parameters"


@each_notebook
def test_badges_open_this_notebook_of_this_repository(path):
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "urls"
    ]["Repository"].rstrip("/")
    owner_and_name = repository.removeprefix("https://github.com/")
    header = read(path).cells[0].source
    assert (
        f"(https://colab.research.google.com/github/{owner_and_name}/blob/main/notebooks/{path.name})"
        in header
    )
    assert (
        f"(https://mybinder.org/v2/gh/{owner_and_name}/main?urlpath=lab/tree/notebooks/{path.name})"
        in header
    )
    assert f'"{repository}"' in code_cells(path)[0].source, (
        "the bootstrap cell clones another repository"
    )


def test_bootstrap_is_the_same_in_all():
    assert len({code_cells(path)[0].source for path in NOTEBOOKS}) == 1


@each_notebook
def test_parameters_are_literals(path):
    assert "dataset" in read_parameters(path)  # raises on anything but `name = literal`


@each_notebook
def test_is_short(path):
    cells = code_cells(path)
    lines = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in cells]
    assert len(cells) <= 25
    assert max(lines) <= 40
    assert sum(lines) <= 150
    assert path.stat().st_size <= 300_000


@each_notebook
def test_defines_no_class(path):
    defined = [
        node.name
        for cell in code_cells(path)
        for node in ast.walk(parse(cell))
        if isinstance(node, ast.ClassDef)
    ]
    assert not defined, "classes belong in lib"


def test_no_function_is_defined_in_two():
    """What is used twice moves to lib."""
    owners = {}
    for path in NOTEBOOKS:
        for cell in code_cells(path):
            for node in ast.walk(parse(cell)):
                if isinstance(node, ast.FunctionDef):
                    owners.setdefault(node.name, set()).add(path.name)
    assert {name: paths for name, paths in owners.items() if len(paths) > 1} == {}


@each_notebook
def test_imports_nothing_that_it_does_not_use(path):
    trees = [parse(cell) for cell in code_cells(path)[1:]]
    imported = {
        a.asname or a.name.split(".")[0]
        for t in trees
        for n in ast.walk(t)
        if isinstance(n, ast.Import | ast.ImportFrom)
        for a in n.names
    }
    used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert imported - used == set()


@pytest.mark.parametrize(
    "path", [p for p in NOTEBOOKS if "_train_" in p.name], ids=lambda path: path.stem
)
def test_training_opens_no_label(path):
    """For unsupervised clustering the labels are removed: what training reads is images.npy."""
    source = "\n".join(cell.source for cell in code_cells(path)[1:])
    assert "data.load_images(" in source
    assert not re.search(r"data\.load\(|metadata|manifest|findings|read_metadata", source)


@each_notebook
def test_checks_its_results(path):
    assert any(
        isinstance(node, ast.Assert) for cell in code_cells(path) for node in ast.walk(parse(cell))
    )


@each_notebook
def test_was_run_from_top_to_bottom_and_saved_with_outputs(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), (
        "Restart Kernel and Run All Cells, then save"
    )
    kinds = {kind for cell in cells for output in cell.outputs for kind in output.get("data", {})}
    assert kinds & {"image/png", "image/svg+xml"}, "no figure is saved in it"
    for number, cell in enumerate(cells, 1):
        last = parse(cell).body[
            -1:
        ]  # a cell that ends in a name shows it: nothing saved means it was not run
        if last and isinstance(last[0], ast.Expr) and isinstance(last[0].value, ast.Name):
            assert cell.outputs, f"cell {number} has no output"


@each_notebook
def test_outputs_hold_no_error_no_warning_and_no_widget(path):
    for number, cell in enumerate(code_cells(path), 1):
        for output in cell.outputs:
            assert output.output_type != "error", f"cell {number}: {output.get('ename')}"
            text = output.get("text", "") if output.get("name") == "stderr" else ""
            assert "Warning" not in text, f"cell {number}: {text}"
            assert "Traceback" not in text, f"cell {number}: {text}"
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), (
                f"cell {number}: a frozen widget"
            )


@each_notebook
def test_tells_nothing_of_the_machine_it_ran_on(path):
    private = {str(ROOT), str(Path.home())} - {"/", "/root"}
    user = getpass.getuser()
    private |= {user} if len(user) > 4 and user not in {"runner", "admin", "jovyan"} else set()
    for number, cell in enumerate(read(path).cells):
        for text in [cell.source, *strings(cell.get("outputs", []))]:
            found = [
                match.group()
                for pattern in (MACHINE_PATH, SECRET)
                for match in [pattern.search(text)]
                if match
            ]
            found += [
                word for word in private if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)
            ]
            assert not found, f"cell {number} holds {found}"


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (MACHINE_PATH, "saved to " + "/".join(["", "home", "ann", "x.png"]), True),
        (MACHINE_PATH, "('" + "/".join(["", "Users", "ann", "x"]) + "')", True),
        (MACHINE_PATH, "\\\\".join(["C:", "Users", "ann"]), True),
        (MACHINE_PATH, "data/runs/phantom and figures/usr/", False),
        (MACHINE_PATH, "https://example.org/home/x", False),
        (SECRET, 'api_key = "0123456789abcdef"', True),
        (SECRET, "tokens are words", False),
    ],
)
def test_the_patterns_find_what_they_should(pattern, text, expected):
    assert bool(pattern.search(text)) is expected


def test_presets_have_the_same_keys_and_only_those_of_the_notebooks():
    assert [path.stem for path in PRESETS] == ["paper", "quick", "smoke", "study"]
    values = {path.stem: read_preset(path, find_notebooks()) for path in PRESETS}
    assert (
        set(values["paper"]) == set(values["quick"]) == set(values["smoke"]) == set(values["study"])
    )


@each_notebook
def test_no_parameter_takes_the_place_of_an_import(path):
    """Papermill puts every parameter of a preset into every notebook, also those that it does not
    have.
    """
    injected = {name for notebook in find_notebooks() for name in read_parameters(notebook)}
    imported = {
        alias.asname or alias.name.split(".")[0]
        for cell in code_cells(path)
        for node in ast.walk(parse(cell))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported
    assert not injected & imported


@each_notebook
def test_defaults_are_the_smoke_preset(path):
    """The tests run notebooks as they are saved, without papermill."""
    smoke = yaml.safe_load(
        (ROOT / "notebooks" / "params" / "smoke.yaml").read_text(encoding="utf-8")
    )
    defaults = read_parameters(path)
    shared = set(defaults) & set(smoke)
    assert shared
    assert {name: defaults[name] for name in shared} == {name: smoke[name] for name in shared}


def test_paper_preset_is_the_papers():
    paper = yaml.safe_load(
        (ROOT / "notebooks" / "params" / "paper.yaml").read_text(encoding="utf-8")
    )
    published = {
        "n_clusters": 200,
        "pca_dim": 64,
        "epochs": 20,
        "batch_size": 256,
        "lr": 1e-3,
        "weight_decay": 1e-4,
        "p4m_width": [64, 128, 256],
    }
    assert {name: paper[name] for name in published} == published
    assert len(paper["seeds"]) >= 3
