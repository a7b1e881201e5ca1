"""The house in docs and its rules: imports run one way, and files and functions stay short."""

import ast
import os
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from lib.paths import ROOT

CORE = ("groups", "gconv", "models", "images", "features", "kmeans", "deepcluster", "runs")
CORE += ("metrics",)
SUPPORT = ("paths", "parallel", "notebooks", "__main__")
CORE_LIMIT, SUPPORT_LIMIT = 1722, 1120
# what a part of lib may import; a part is a file at the top, or a folder
MAY = {
    "__init__": set(),
    "paths": set(),
    "groups": set(),
    "notebooks": {"paths"},
    "parallel": {"paths"},
    "fast": {"groups"},
    "gconv": {"groups", "fast"},
    "beyond": {"groups", "gconv"},
    "models": {"groups", "gconv", "beyond"},
    "images": set(),
    "features": {"images", "parallel"},
    "kmeans": {"parallel", "beyond"},
    "metrics": {"kmeans"},
    "data": {"paths"},
}
MAY["runs"] = {*MAY, "groups"} - {"data", "notebooks"}
MAY["deepcluster"] = MAY["runs"] | {"runs"}
MAY["study"] = MAY["deepcluster"] | {"deepcluster", "data"}
MAY["plots"] = {"paths", "study", "metrics", "images"}
MAY["explore"] = MAY["study"] | {"study", "plots"}
MAY["__main__"] = set(MAY)
DRAWINGS = {"pipeline", "explorer_page"}  # two drawings may take more than 80 lines
LONG = {"data/phantom.py"}


def read_lib(root=ROOT):
    """Name below lib/ -> syntax tree and number of lines."""
    found = {}
    for path in sorted((root / "lib").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found[path.relative_to(root / "lib").as_posix()] = ast.parse(text), text.count("\n")
    return found


def part(name):
    return name.split("/")[0].removesuffix(".py")


def targets(tree, lib):
    """Files that a file imports, at its top or in a function; of a folder, the file that is named
    or else the folder's ``__init__.py``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [[alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [[f"{node.module}.{alias.name}", node.module] for alias in node.names]
        else:
            continue
        for names in modules:
            paths = [name[4:].replace(".", "/") for name in names if name.startswith("lib.")]
            files = [file for path in paths for file in (f"{path}.py", f"{path}/__init__.py")]
            yield from [file for file in files if file in lib][:1]


def forbidden_imports(lib):
    """``file imports part`` for each arrow against the order; own folder and own part are free."""
    for name, (tree, _) in lib.items():
        allowed = MAY.get(part(name), set()) | {part(name)}
        others = map(part, targets(tree, lib))
        yield from (f"{name} imports {other}" for other in others if other not in allowed)


def circle(lib):
    """Files that import each other, in a ring; empty if none do."""
    arrows = {name: set(targets(tree, lib)) - {name} for name, (tree, _) in lib.items()}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def long_functions(lib, most=80):
    for name, (tree, _) in lib.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name in DRAWINGS:
                continue
            if node.end_lineno - node.lineno + 1 > most:
                yield f"{name}: {node.name}"


def long_files(lib, most=450):
    return [f"{name}: {n}" for name, (_, n) in lib.items() if n > most and name not in LONG]


LIB = read_lib()


def test_imports_run_one_way():
    assert {part(name) for name in LIB} <= set(MAY), "a new room: say what it may import"
    assert list(forbidden_imports(LIB)) == []


def test_there_are_no_circles():
    assert circle(LIB) == []


def test_the_core_is_read_in_one_sitting():
    for names, limit in ((CORE, CORE_LIMIT), (SUPPORT, SUPPORT_LIMIT)):
        assert sum(LIB[f"{name}.py"][1] for name in names) <= limit


def test_files_and_functions_are_short():
    assert list(long_functions(LIB)) == []
    assert long_files(LIB) == []


def test_the_checks_find_what_they_look_for(tmp_path):
    inside = "def f():\n    from lib.study import b"
    texts = {"data/__init__.py": "", "data/nih.py": "", "runs.py": "x = 1\n" * 451}
    texts |= {"deepcluster.py": "from lib import data", "features.py": "import lib.data.nih"}
    texts |= {"study/a.py": inside, "study/b.py": "from lib.study import a"}
    texts |= {"study/c.py": "import lib.study.a", "models.py": "def g():\n" + "    x = 1\n" * 80}
    for name, text in texts.items():
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(text)
    lib = read_lib(tmp_path)
    labels = ["deepcluster.py imports data", "features.py imports data"]
    assert sorted(forbidden_imports(lib)) == labels, "training could see a label"
    assert set(circle(lib)) == {"study/a.py", "study/b.py"}
    assert list(long_functions(lib)) == ["models.py: g"]
    assert long_files(lib) == ["runs.py: 451"]


@pytest.mark.slow
def test_without_any_wing_the_core_still_trains(tmp_path):
    wings = [path.parent.name for path in (ROOT / "lib").glob("*/__init__.py")]
    ignored = shutil.ignore_patterns("__pycache__", *wings)
    shutil.copytree(ROOT / "lib", tmp_path / "lib", ignore=ignored)
    (tmp_path / "tests").mkdir()
    for name in ("__init__", "test_deepcluster", "test_models"):
        shutil.copy(ROOT / "tests" / f"{name}.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    some = "run_folder or classes_that_are_there or same_seed or test_models"
    some = f"({some}) and not None"  # the paper's widths take long
    command = [sys.executable, "-m", "pytest", "-q", "-k", some, "tests"]
    path = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
