"""The first cell of every notebook: on a machine that has neither the project nor all packages it
gets both, and touches nothing else.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lib.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
HELD = {"numpy", "torch", "torchvision"}
KERNEL = {"ipython", "ipykernel", "jupyter-client", "jupyterlab"}  # a notebook that runs has them
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements):
    return {canonicalize_name(Requirement(line).name) for line in requirements}


DECLARED = names(PROJECT["dependencies"])
OPTIONAL = {name for group in PROJECT["optional-dependencies"].values() for name in names(group)}
DISTRIBUTIONS = {
    module: {canonicalize_name(name) for name in found}
    for module, found in packages_distributions().items()
}


def code(path):
    return [
        cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"
    ]


BOOTSTRAP = code(NOTEBOOKS[0])[0]


def needed():
    """NEEDED of the cell, which holds nothing but literals: modules and the packages that bring
    them.
    """
    found = {}
    for node in ast.parse(BOOTSTRAP).body:
        if isinstance(node, ast.Assign | ast.AugAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if target.id == "NEEDED":
                found |= ast.literal_eval(node.value)
    return found


def imported(tree):
    """All modules that a syntax tree imports, at its top or in a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield node.module
            yield from (f"lib.{alias.name}" for alias in node.names if node.module == "lib")


def third_party(sources):
    """Top-level modules, neither of Python nor of lib, that sources import, and all of lib that
    they reach.
    """
    waiting, seen, found = [ast.parse(source) for source in sources], set(), set()
    while waiting:
        for module in imported(waiting.pop()):
            top, _, rest = module.partition(".")
            file = ROOT / "lib" / f"{rest.split('.')[0]}.py"
            if top == "lib":
                if rest and file not in seen and file.exists():
                    seen.add(file)
                    waiting.append(ast.parse(file.read_text(encoding="utf-8")))
            elif top not in sys.stdlib_module_names:
                found.add(top)
    return found


def test_the_walk_reaches_what_lib_reaches():
    assert third_party(["from lib import kaggle_nih"]) >= {
        "kaggle",
        "requests",
        "tqdm",
    }  # in a function, at the top, one module further
    assert third_party(["import json, numpy.linalg"]) == {"numpy"}


def test_it_names_every_package_that_notebooks_and_lib_import_and_no_other():
    used = set().union(*(third_party(code(path)[1:]) for path in NOTEBOOKS))
    unknown = sorted(used - set(DISTRIBUTIONS) - {"pydicom", "igraph"})
    assert not unknown, (
        f"{unknown} are not installed here: nobody can say which package brings them"
    )
    wanted = {module: DISTRIBUTIONS[module] & DECLARED for module in used & set(DISTRIBUTIONS)}
    wanted = {
        module: packages
        for module, packages in wanted.items()
        if packages and not packages & (HELD | KERNEL)
    }
    assert {module: canonicalize_name(package) for module, package in needed().items()} == {
        module: next(iter(packages)) for module, packages in wanted.items()
    }


def test_what_it_does_not_name_comes_with_what_it_does():
    """joblib comes with scikit-learn, urllib3 with requests; what DICOM and graphs want says so
    itself where it is missing.
    """
    brought, waiting = set(), {*map(canonicalize_name, needed().values()), *HELD, *KERNEL}
    while waiting - brought:
        name = next(iter(waiting - brought))
        brought.add(name)
        lines = [Requirement(line) for line in requires(name) or []]
        waiting |= {
            canonicalize_name(r.name)
            for r in lines
            if r.marker is None or r.marker.evaluate({"extra": ""})
        }
    for module in set().union(*(third_party(code(path)[1:]) for path in NOTEBOOKS)):
        packages = DISTRIBUTIONS.get(module, {module})
        assert packages & (brought | OPTIONAL), (
            f"nothing that the first cell installs brings {module}"
        )


def test_pip_is_never_given_numpy_or_torch():
    assert needed()
    assert not {canonicalize_name(package) for package in needed().values()} & (HELD | KERNEL)


DRIVER = """
import importlib.util, json, sys
import google.colab
hidden, real = set(json.loads(sys.argv[1])), importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in hidden else real(name, package)
source = open(sys.argv[2], encoding="utf-8").read()
for _ in range(int(sys.argv[3])):
    exec(source, {})
import lib.paths
print(lib.paths.ROOT)
"""
PIP = """
import json, sys
from pathlib import Path
held = Path(sys.argv[sys.argv.index("--constraint") + 1]).read_text(encoding="utf-8").split()
with open({log!r}, "a", encoding="utf-8") as log:
    print(json.dumps([sys.argv[1:], held]), file=log)
"""


@pytest.fixture
def colab(tmp_path):
    """Runs the cell in a Python of its own, in an empty folder, with ``google.colab``, a pip that
    only writes down what it is asked for,
    and the repository of the project on this disk."""
    if shutil.which("git") is None:
        pytest.skip("no git here")
    origin, modules, content, log = (
        tmp_path / name for name in ("origin", "modules", "content", "pip.log")
    )
    content.mkdir()
    (modules / "google" / "colab").mkdir(parents=True)
    (modules / "google" / "colab" / "__init__.py").touch()
    (modules / "pip").mkdir()
    (modules / "pip" / "__init__.py").touch()
    (modules / "pip" / "__main__.py").write_text(PIP.format(log=str(log)), encoding="utf-8")
    shutil.copytree(ROOT / "lib", origin / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    (origin / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "00_download.ipynb", origin / "notebooks")
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    for words in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "-m", "all"]):
        subprocess.run(["git", *words], cwd=origin, check=True)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "CXR_"))
    }
    environment |= {
        "PYTHONPATH": str(modules),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
    }
    environment["GIT_CONFIG_KEY_0"] = f"url.{origin.as_uri()}.insteadOf"
    environment["GIT_CONFIG_VALUE_0"] = PROJECT["urls"]["Repository"]
    cell = tmp_path / "cell.py"
    cell.write_text(BOOTSTRAP, encoding="utf-8")

    def run(hidden=(), times=1, folder=content, driver=DRIVER):
        command = [sys.executable, "-c", driver, json.dumps(sorted(hidden)), str(cell), str(times)]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8"
        )
        calls = (
            [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
            if log.exists()
            else []
        )
        return done, calls

    return run


def test_with_all_packages_it_only_fetches_the_project(colab, tmp_path):
    done, calls = colab()
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).samefile(tmp_path / "content" / "companion")
    assert calls == []


def test_it_can_be_run_again(colab, tmp_path):
    """In the same folder, also from another notebook that %run calls there."""
    done, _ = colab(times=2)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "content").iterdir()] == ["companion"]


BEFORE = """
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in (open(sys.argv[2], encoding="utf-8").read(), "%cd -q companion/notebooks", "%run 00_download.ipynb"):
    shell.run_cell(cell).raise_error()
"""


def test_a_notebook_can_be_run_before_another_one(colab, tmp_path):
    """Colab gives each notebook a machine of its own: FAQ.md says how the files that it reads come
    there.
    """
    done, calls = colab(driver=BEFORE)
    assert done.returncode == 0, done.stderr
    assert "phantom: 256 images" in done.stdout
    assert (
        tmp_path / "content" / "companion" / "data" / "raw" / "phantom-smoke" / "source.json"
    ).exists()
    assert calls == []


def test_it_asks_for_what_is_missing_and_holds_numpy_and_torch(colab):
    done, calls = colab(hidden={"skimage", "bokeh", "yaml"})
    assert done.returncode == 0, done.stderr
    ((arguments, held),) = calls
    assert arguments[:3] == ["install", "--quiet", "--constraint"]
    assert arguments[4:] == ["bokeh", "scikit-image", "pyyaml"]
    assert sorted(held) == sorted(f"{name}=={version(name)}" for name in HELD)


def test_in_the_project_it_fetches_nothing(colab, tmp_path):
    (tmp_path / "clone" / "notebooks").mkdir(parents=True)
    shutil.copytree(
        ROOT / "lib", tmp_path / "clone" / "lib", ignore=shutil.ignore_patterns("__pycache__")
    )
    done, calls = colab(folder=tmp_path / "clone" / "notebooks")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).samefile(tmp_path / "clone")
    assert calls == []
    assert list((tmp_path / "clone" / "notebooks").iterdir()) == []


def test_without_a_network_it_says_what_it_could_not_fetch(colab, tmp_path):
    shutil.rmtree(tmp_path / "origin")
    done, _ = colab()
    assert done.returncode != 0
    assert "git" in done.stderr
    assert "clone" in done.stderr
