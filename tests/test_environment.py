"""pyproject.toml, environment.yml and requirements.lock name the same packages, and a clean clone
can be imported.
"""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from lib.paths import ROOT

CONDA_NAMES = {"pytorch": "torch", "python-igraph": "igraph", "python-isal": "isal"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT = {
    canonicalize_name(r.name): r
    for r in map(
        Requirement,
        PROJECT["dependencies"]
        + [d for ds in PROJECT["optional-dependencies"].values() for d in ds],
    )
}


def read_lock():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def locked_versions():
    return {
        canonicalize_name(r.name): Version(re.fullmatch(r"==([^,]+)", str(r.specifier)).group(1))
        for r in read_lock()
    }


def read_conda():
    """Conda and pip requirements of environment.yml, under the names that pip uses."""
    lines = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    pip = [
        line
        for entry in lines
        if isinstance(entry, dict)
        for line in entry["pip"]
        if not line.startswith("-")
    ]
    conda = [re.sub(r"(?<![<>=!])=(?!=)", "==", line) for line in lines if isinstance(line, str)]
    found = {}
    for requirement in map(Requirement, conda + pip):
        found[canonicalize_name(CONDA_NAMES.get(requirement.name, requirement.name))] = requirement
    return found


def test_lock_has_exact_versions_once():
    names = [canonicalize_name(r.name) for r in read_lock()]
    assert len(names) == len(set(names)) > len(DIRECT)
    versions = locked_versions()  # fails on anything but name==version
    assert all(version.local is None for version in versions.values()), (
        "a build such as +cpu is the user's choice"
    )


def test_lock_meets_every_bound_of_pyproject():
    versions = locked_versions()
    unmet = [
        str(r)
        for name, r in DIRECT.items()
        if name not in versions or not r.specifier.contains(versions[name], prereleases=True)
    ]
    assert not unmet, f"requirements.lock does not meet {unmet}"


def test_conda_names_the_packages_of_pyproject_with_the_same_bounds():
    conda = read_conda()
    assert set(conda) - {"python", "pip"} == set(DIRECT)
    different = {
        name: (str(conda[name].specifier), str(r.specifier))
        for name, r in DIRECT.items()
        if conda[name].specifier != r.specifier
    }
    assert not different, f"environment.yml and pyproject.toml differ in {different}"


def test_python_of_conda_is_the_oldest_that_pyproject_allows():
    assert PROJECT["requires-python"] == ">=3.11"
    assert str(read_conda()["python"].specifier) == "==3.11"
    channels = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["channels"]
    assert channels[0] == "conda-forge"
    assert "defaults" not in channels


@pytest.mark.parametrize("name", ["pyproject.toml", "environment.yml", "requirements.lock"])
def test_the_other_groupy_is_nowhere(name):
    """PyPI's groupy is a chat client, and no group convolution."""
    assert "groupy" not in (ROOT / name).read_text(encoding="utf-8").lower()


def test_dot_venv_has_the_locked_versions():
    if os.path.normcase(sys.prefix) != os.path.normcase(ROOT / ".venv"):
        pytest.skip("this is not the project's .venv")
    installed = {canonicalize_name(d.metadata["Name"]): Version(d.version) for d in distributions()}
    wanted = [
        canonicalize_name(r.name) for r in read_lock() if r.marker is None or r.marker.evaluate()
    ]
    versions = locked_versions()
    different = [
        f"{n}: {installed.get(n)}, not {versions[n]}"
        for n in wanted
        if n not in installed or Version(installed[n].public) != versions[n]
    ]
    assert not different, f"{different}; remove .venv and call ./run_all.sh"


def test_lock_is_closed():
    """Whatever a locked package needs on this machine is locked too, but for the libraries that
    come with a CUDA build of torch.
    """
    wanted = {
        canonicalize_name(r.name) for r in read_lock() if r.marker is None or r.marker.evaluate()
    }
    needs = set()
    for distribution in distributions():
        if canonicalize_name(distribution.metadata["Name"]) in wanted - {"torch"}:
            required = map(Requirement, distribution.requires or [])
            needs |= {
                canonicalize_name(r.name)
                for r in required
                if r.marker is None or r.marker.evaluate({"extra": ""})
            }
    assert len(needs) > len(DIRECT)
    assert needs - wanted <= {"setuptools", "pip"}


def test_clean_clone_imports_lib(tmp_path):
    """What git knows, and nothing else, is enough: .gitignore must not swallow lib/."""
    listing = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    try:
        names = subprocess.run(listing, check=True, capture_output=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not in a git checkout")
    for name in filter(None, names):
        if name.startswith("lib/") and (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    modules = sorted(
        f"lib.{path.stem}" for path in (ROOT / "lib").glob("*.py") if path.stem != "__init__"
    )
    assert len(modules) > 5
    code = f"import sys; sys.path.insert(0, '.'); import {', '.join(modules)}; print(lib.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert os.path.realpath(done.stdout.strip()) == os.path.realpath(
        tmp_path / "lib" / "__init__.py"
    )


@pytest.mark.parametrize(
    "name",
    [
        "data/phantom/images.npy",
        "data/raw/x",
        "figures/phantom-smoke/fig1_nmi.png",
        ".venv/bin/python",
    ],
)
def test_git_ignores_what_is_computed(name):
    try:
        status = subprocess.run(
            ["git", "-C", str(ROOT), "check-ignore", "--no-index", "--quiet", name],
            stderr=subprocess.DEVNULL,
        ).returncode
    except OSError:
        status = 128
    if status == 128:
        pytest.skip("not in a git checkout")
    assert status == 0, f"{name} is not ignored"
