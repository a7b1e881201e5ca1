"""The first cell of every notebook: it finds or fetches the project, and on Colab installs what is
absent and touches nothing else."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest

from lib.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def code(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


BOOTSTRAP = code(NOTEBOOKS[0])[0]


def test_it_is_the_same_short_cell_in_all():
    assert {code(path)[0] for path in NOTEBOOKS} == {BOOTSTRAP}
    assert len(BOOTSTRAP.splitlines()) <= 8
    assert f'"{REPOSITORY}"' in BOOTSTRAP


DRIVER = """
import importlib.metadata, json, sys
hidden, real = set(json.loads(sys.argv[1])), importlib.metadata.distributions
importlib.metadata.distributions = lambda: [d for d in real() if d.name.lower() not in hidden]
if sys.argv[3] == "colab":
    import google.colab
for _ in range(2):
    exec(open(sys.argv[2], encoding="utf-8").read(), {})
import lib.paths
print(lib.paths.ROOT)
"""
PIP = """
import json, sys
with open({log!r}, "a", encoding="utf-8") as log:
    print(json.dumps(sys.argv[1:]), file=log)
"""


@pytest.fixture
def run(tmp_path):
    """Run the cell twice in a Python of its own and a folder that is empty; what it printed, and
    what it asked of pip, which here only writes it down. The repository is on this disk."""
    if shutil.which("git") is None:
        pytest.skip("no git here")
    origin, modules, content = (tmp_path / name for name in ("origin", "modules", "content"))
    content.mkdir()
    log, cell = tmp_path / "pip.log", tmp_path / "cell.py"
    cell.write_text(BOOTSTRAP, encoding="utf-8")
    for name, text in (("google.colab", ""), ("pip", PIP.format(log=str(log)))):
        package = modules.joinpath(*name.split("."))
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "lib", origin / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_all.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, origin)
    (origin / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "00_download.ipynb", origin / "notebooks")
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    for words in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "-m", "all"]):
        subprocess.run(["git", *words], cwd=origin, check=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "CXR_"))}
    clean |= {"PYTHONPATH": str(modules), "GIT_CONFIG_GLOBAL": os.devnull}
    clean |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{origin.as_uri()}.insteadOf"}
    clean |= {"GIT_CONFIG_VALUE_0": REPOSITORY}

    def call(hidden=(), where="colab", folder=content, driver=DRIVER):
        words = [sys.executable, "-c", driver, json.dumps(sorted(hidden)), str(cell), where]
        done = subprocess.run(words, cwd=folder, env=clean, capture_output=True, text=True)
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        return done, [json.loads(line) for line in lines]

    return call


def test_with_all_packages_it_only_fetches_the_project_and_in_it_nothing(run, tmp_path):
    done, calls = run()
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).samefile(tmp_path / "content" / "companion")
    assert [path.name for path in (tmp_path / "content").iterdir()] == ["companion"]
    (inner := tmp_path / "origin" / "notebooks" / "folder").mkdir()
    done, calls = run(folder=inner)
    assert Path(done.stdout.strip()).samefile(tmp_path / "origin"), done.stderr
    assert (calls, list(inner.iterdir())) == ([], [])


def test_on_colab_it_asks_for_what_is_absent_and_holds_numpy_and_torch(run):
    done, calls = run(hidden={"scikit-image", "bokeh", "jupyterlab", "papermill"})
    assert done.returncode == 0, done.stderr
    held = [f"{name}=={version(name)}" for name in ("numpy", "torch", "torchvision")]
    assert calls[0] == ["install", "--quiet", "bokeh", "scikit-image", *held]
    assert run(hidden={"bokeh"}, where="elsewhere")[1] == calls, "only on Colab"


BEFORE = """
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in (
    open(sys.argv[2], encoding="utf-8").read(),
    "%cd -q companion/notebooks",
    "%run 00_download.ipynb",
):
    shell.run_cell(cell).raise_error()
"""


@pytest.mark.slow
def test_a_notebook_can_be_run_before_another_one(run, tmp_path):
    """Colab gives each notebook a machine of its own: docs/FAQ.md says how files come there."""
    done, calls = run(driver=BEFORE)
    assert done.returncode == 0, done.stderr
    raw = tmp_path / "content" / "companion" / "data" / "raw" / "phantom-smoke"
    assert (raw / "source.json").exists()
    assert calls == []
