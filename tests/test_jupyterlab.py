"""In the real JupyterLab, in a real browser, as a reader has it: open a notebook, Restart Kernel and Run All Cells, interrupt, go on.

All cells of all notebooks run in the notebook tests of ``./run_all.sh --test`` already, without a browser. So here the suite opens the
first ones only, which is what a browser can break: opening, dialogs, progress, drawing, saving. ``CXR_LAB=all`` opens every notebook
(about three minutes), and ``CXR_LAB_PICTURES=FOLDER`` keeps screenshots of each from top to end.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib.paths import ROOT
from lib.run import find_notebooks
from tests import browser, lab

reason = lab.missing()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

ALL = [path.stem for path in find_notebooks()] + ["equivariance"]
NAMES = ALL if os.environ.get("CXR_LAB") == "all" else ALL[:3]
FAR = re.compile(r"https?://(?!127\.0\.0\.1[:/])")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    with lab.Server(lab.copy_project(folder / "project"), folder / "home") as running:
        yield running


@pytest.fixture
def page():
    with browser.Browser(1360, 1600) as window:
        yield window


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    named = os.environ.get("CXR_LAB_PICTURES")
    return Path(named) if named else tmp_path_factory.mktemp("pictures")


@pytest.mark.parametrize("name", NAMES)
def test_restart_and_run_all(server, page, pictures, name):
    """They build on each other, so their order is that of the names."""
    notebook = lab.Notebook(server, page, name)
    assert notebook.ready_without_dialog, notebook.dialog()
    assert notebook.restart_and_run_all() is True
    assert notebook.errors() == []
    counts = notebook.counts()
    assert counts == list(range(1, len(counts) + 1))
    assert not notebook.dialog()
    notebook.pictures(pictures)
    saved = notebook.save()
    assert "widgets" not in saved["metadata"]
    assert "widget-view" not in json.dumps(saved)
    sources = [[cell["source"] for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]] for file in files(notebook)]
    assert sources[0] == sources[1], "running and saving changed a cell's source"
    cells = [cell for cell in saved["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == counts
    assert cells[-1]["outputs"], "the last cell says what was written"
    # besides the badges of its first cell, a notebook fetches nothing
    assert {url for url in page.requests if FAR.match(url) and not url.endswith(".svg")} == set()
    notebook.close()


def files(notebook):
    return [notebook.path, ROOT / "notebooks" / notebook.path.name]
