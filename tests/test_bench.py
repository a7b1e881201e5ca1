"""The benchmarks are no timed tests, but what they import is there, and the one for a GPU runs."""

import importlib.util
import json
import sys

import pytest

from lib import parallel, paths

FOLDER = paths.ROOT / "tests" / "bench"
SCRIPTS = sorted(set(FOLDER.glob("*.py")) - {FOLDER / "project.py"})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_script_can_be_imported(script, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])  # as when it is called
    spec = importlib.util.spec_from_file_location(f"bench_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.main)
    assert module.__doc__


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_without_one(tmp_path):
    command = [sys.executable, str(FOLDER / "gpu.py"), "--tiny", "--device", "cpu"]
    command += ["--out", str(tmp_path)]
    # a backend that compiles nothing; many minutes, for a busy machine
    parallel.run_process([*command, "--backend", "eager", "--minutes", "60"])
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert len({row["part"] for row in rows}) == 5
    assert not [row for row in rows if row["what"] in ("the rest", "left out")]
    table = (tmp_path / "gpu.md").read_text()
    assert all(row["result"] in table for row in rows)
