"""In the real JupyterLab, in a real browser, as a reader has it: open a notebook, Restart Kernel
and Run All Cells, interrupt, go on.

All cells of all notebooks run in the notebook tests of ``./run_all.sh --test`` already, without a
browser. So here the suite opens the first ones only, which is what a browser can break: opening,
dialogs, progress, drawing, saving. ``CXR_LAB=all`` opens every notebook (about five minutes on two
cores), and ``CXR_LAB_PICTURES=FOLDER`` keeps screenshots of each from top to end."""

import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib import data, paths
from lib.deepcluster import TrainConfig, fit
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
    assert len(notebook.pictures(pictures)) >= 2
    assert notebook.wide == set(), "a table or figure does not fit its column"
    saved = notebook.save()
    assert "widgets" not in saved["metadata"]
    assert "widget-view" not in json.dumps(saved)
    before = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert [cell["source"] for cell in saved["cells"]] == [
        cell["source"] for cell in before["cells"]
    ]
    cells = [cell for cell in saved["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == counts
    assert cells[-1]["outputs"], "the last cell says what was written"
    # besides the badges of its first cell, a notebook fetches nothing
    assert {url for url in page.requests if FAR.match(url) and not url.endswith(".svg")} == set()
    notebook.close()


EPOCHS = 20  # long enough to see it move and to stop it, on a fast machine too
DATASET = "phantom-stopped"


def stoppable(project):
    """A copy of 02_train_alexnet that trains for some more epochs on 256 phantoms of its own; its
    name.
    """
    data.fetch("phantom", paths.raw_dir(DATASET), 256, 0)
    data.preprocess(paths.raw_dir(DATASET), paths.dataset_dir(DATASET))
    notebook = json.loads(
        (ROOT / "notebooks" / "02_train_alexnet.ipynb").read_text(encoding="utf-8")
    )
    (cell,) = [
        cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])
    ]
    source, n = re.subn(
        r"^epochs = 2\b", f"epochs = {EPOCHS}", "".join(cell["source"]), flags=re.MULTILINE
    )
    cell["source"], m = re.subn(
        r'^dataset = "phantom-smoke"', f'dataset = "{DATASET}"', source, flags=re.MULTILINE
    )
    assert (n, m) == (1, 1)
    for cell in notebook["cells"]:
        cell.get("outputs", []).clear()
    (project / "notebooks" / "stopped.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    return "stopped"


def numbers(run_dir):
    """Metrics of the epochs that are done, none if there is no file yet."""
    file = run_dir / "metrics.csv"
    return pd.read_csv(file) if file.exists() else pd.DataFrame()


def test_interrupted_training_goes_on_where_it_stopped(
    server, page, pictures, monkeypatch, tmp_path
):
    monkeypatch.setenv("CXR_DATA_DIR", str(server.project / "data"))
    notebook = lab.Notebook(server, page, stoppable(server.project))
    run_dir = paths.run_dir(DATASET, "alexnet", 0)
    notebook.command("notebook:restart-run-all", accept=True)
    seen, end = set(), time.monotonic() + 120
    while (
        len(numbers(run_dir)) < 3 or len(seen) < 2
    ):  # the page shows a little later what the file has
        assert time.monotonic() < end, (
            f"{len(numbers(run_dir))} epochs are done, and the progress bar has shown {seen} %"
        )
        seen |= set(re.findall(r"(\d+)%\|", notebook.shown()))
    notebook.command("notebook:interrupt-kernel")
    notebook.finish(60)
    (error,) = notebook.errors()
    assert "KeyboardInterrupt" in error
    stopped = numbers(run_dir)
    assert 3 <= len(stopped) < EPOCHS
    notebook.pictures(pictures / "interrupted")

    notebook.command("notebook:run-all-cells")  # in the same kernel, as one does
    notebook.finish(120)
    assert notebook.errors() == []
    final = numbers(run_dir)
    assert len(final) == EPOCHS
    pd.testing.assert_frame_equal(
        final.iloc[: len(stopped)], stopped
    )  # with their seconds: these epochs were not trained again
    images, stored = (
        data.load_images(paths.dataset_dir(DATASET)),
        paths.load_json(run_dir / "config.json"),
    )
    config = TrainConfig(
        **{
            name: value
            for name, value in stored.items()
            if name in TrainConfig.__dataclass_fields__
        }
    )
    unbroken = fit(images, config, tmp_path / "unbroken", progress=False)
    timed = [name for name in final if name.startswith("seconds")]
    pd.testing.assert_frame_equal(
        final.drop(columns=timed), unbroken.metrics.drop(columns=timed), check_exact=True
    )
    assert (np.load(run_dir / "assignments.npy") == unbroken.assignments).all()
    (line,) = [line for line in notebook.shown().splitlines() if "%|" in line]
    assert "100%|" in line
    assert f"{EPOCHS}/{EPOCHS}" in line
    assert "widget" not in json.dumps(notebook.save())
    notebook.close()
