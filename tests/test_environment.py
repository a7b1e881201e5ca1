"""pyproject.toml, environment.yml and requirements.lock name the packages that are imported, and a
clean clone can be imported."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions, packages_distributions

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from lib.paths import ROOT
from tests.test_bootstrap import NOTEBOOKS, code

CONDA_NAMES = {"pytorch": "torch"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
DIRECT = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"] + EXTRAS)}


def read_lock():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def locked_versions():
    """Name -> version; AttributeError on anything but name==version."""
    exact = {r.name: re.fullmatch(r"==([^,]+)", str(r.specifier)) for r in read_lock()}
    return {canonicalize_name(name): Version(found.group(1)) for name, found in exact.items()}


def read_conda():
    """Requirements of environment.yml, under the names that pip uses."""
    lines = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    pip = next(entry["pip"] for entry in lines if isinstance(entry, dict))
    conda = [re.sub(r"(?<![<>=!])=(?!=)", "==", line) for line in lines if isinstance(line, str)]
    found = map(Requirement, conda + [line for line in pip if not line.startswith("-")])
    return {canonicalize_name(CONDA_NAMES.get(r.name, r.name)): r for r in found}


def imported(source):
    """Top-level modules that a text imports, at its top or in a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_what_is_imported_is_declared():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "lib").rglob("*.py")]
    cells = [cell for path in NOTEBOOKS for cell in code(path)]
    sources += [re.sub(r"^\s*[%!].*$", "", cell, flags=re.MULTILINE) for cell in cells]
    modules = {module for source in sources for module in imported(source)}
    modules -= {*sys.stdlib_module_names, "lib", "IPython", "pydicom", "kagglesdk", "triton"}
    there = packages_distributions()
    assert not modules - set(there), "nobody can say which package brings them"
    packages = {module: set(map(canonicalize_name, there[module])) for module in modules}
    assert [module for module in modules if not packages[module] & set(DIRECT)] == []
    assert len(modules) > 15


def test_lock_has_exact_versions_once_and_meets_every_bound_of_pyproject():
    names, versions = [canonicalize_name(r.name) for r in read_lock()], locked_versions()
    assert len(names) == len(set(names)) > len(DIRECT)
    local = [name for name, version in versions.items() if version.local]
    assert not local, "a build such as +cpu is the user's choice"
    assert set(DIRECT) <= set(versions)
    bounds = {name: r.specifier for name, r in DIRECT.items()}
    unmet = [n for n, b in bounds.items() if not b.contains(versions[n], prereleases=True)]
    assert not unmet


def test_the_lock_of_hashes_has_the_versions_of_the_lock_and_a_hash_for_each():
    text = (ROOT / "requirements.hashes.lock").read_text(encoding="utf-8")
    entries = re.findall(r"^([\w.-]+)==([^ \n]+)(.*(?:\n +--hash=.*)+)", text, re.MULTILINE)
    found = {canonicalize_name(name): Version(version) for name, version, _ in entries}
    assert len(found) == len(re.findall(r"^[\w.-]+==", text, re.MULTILINE)), "one without a hash"
    assert found.items() >= locked_versions().items()
    files = re.findall("--hash=(.*?)(?: |$)", text, re.MULTILINE)
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", file) for file in files)
    assert "://" not in text


def test_conda_takes_what_is_promised_up_to_what_is_locked():
    bounds = {name: r.specifier for name, r in read_conda().items() if name != "pip"}
    assert str(bounds.pop("python")) == PROJECT["requires-python"].replace(">=", "==")
    assert set(bounds) == set(DIRECT)
    for name, version in locked_versions().items():
        if name in bounds and str(bounds[name]) != f"=={version}":  # by pip
            assert bounds[name] == DIRECT[name].specifier & SpecifierSet(f"<={version}")
    assert "defaults" not in yaml.safe_load((ROOT / "environment.yml").read_text())["channels"]
    # the package groupy is a chat client, and no group convolution
    assert "groupy" not in {*DIRECT, *locked_versions()}


def test_lock_is_closed():
    """What a locked package needs here is locked, except the libraries of a CUDA build of torch."""
    lock = [r for r in read_lock() if r.marker is None or r.marker.evaluate()]
    wanted, needs = {canonicalize_name(r.name) for r in lock}, set()
    for distribution in distributions():
        if canonicalize_name(distribution.metadata["Name"]) in wanted - {"torch"}:
            required = map(Requirement, distribution.requires or [])
            kept = [r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
            needs |= {canonicalize_name(r.name) for r in kept}
    assert len(needs) > len(DIRECT)
    assert needs - wanted <= {"setuptools", "pip"}


def git(*words):
    """What a git command says of this checkout; skips where there is none."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True)
    except OSError:
        pytest.skip("no git here")
    if done.returncode == 128:
        pytest.skip("not in a git checkout")
    return done


def test_git_swallows_no_file_of_lib():
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "lib").stdout
    files = [path for path in (ROOT / "lib").rglob("*.*") if path.suffix in (".py", ".c", ".html")]
    assert {path.relative_to(ROOT).as_posix() for path in files} <= {*listed.decode().split("\0")}


def test_git_ignores_what_is_computed():
    names = ["data/phantom/images.npy", "data/raw/x", "figures/x/fig1_nmi.png", ".venv/bin/python"]
    names += ["figures/phantom/explorer.html", "figures/x/explorer.html"]  # with every X-ray shown
    for name in names:
        assert git("check-ignore", "--no-index", "--quiet", name).returncode == 0, name
