"""The benchmarks are no timed tests, but what they import is there."""

import importlib.util
import sys

import pytest

from lib import paths

SCRIPTS = sorted((paths.ROOT / "tests" / "bench").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_script_can_be_imported(script, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # they put the project first
    spec = importlib.util.spec_from_file_location(f"bench_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.main)
    assert module.__doc__
