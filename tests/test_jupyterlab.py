"""In the real JupyterLab, in a real browser: open a notebook, run it, save it.

All cells of all notebooks run in ``./run_all.sh --test`` already. So only the first one is opened
here, for what a browser can break: opening, dialogs, progress, drawing, saving.
``CXR_LAB=all`` opens every notebook, and ``CXR_LAB_PICTURES=FOLDER`` keeps a picture of each."""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

from lib.notebooks import find_notebooks
from lib.paths import ROOT

pytestmark = pytest.mark.slow

ALL = [path.stem for path in find_notebooks()] + ["equivariance"]
NAMES = ALL if os.environ.get("CXR_LAB") == "all" else ALL[:1]
FAR = re.compile(r"https?://(?!127\.0\.0\.1[:/]).*(?<!\.svg)$")  # badges are SVG
QUIET = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}

HELP = """window.lab = {
  panel: () => [...jupyterapp.shell.widgets('main')]
    .find(w => w.sessionContext && w.content && w.content.widgets),
  idle: () => {
    const ready = lab.panel() && lab.panel().context.isReady;
    const session = ready && lab.panel().sessionContext.session;
    return !!(session && session.kernel && session.kernel.status === 'idle');
  },
  start: (command) => {
    const end = (value) => () => { lab.ran = value; };
    lab.ran = undefined;
    jupyterapp.commands.execute(command).then(end(true), end(false));
  },
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """JupyterLab with a copy of the project: its address, its token and the copy's folder."""
    home = tmp_path_factory.mktemp("lab")
    project, token = home / "project", secrets.token_hex(16)
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("notebooks", "lib", "data/published", "figures/beyond"):
        shutil.copytree(ROOT / name, project / name, ignore=ignored)
    for name in ("run_all.sh", "pyproject.toml"):  # by which a notebook knows its project
        shutil.copy(ROOT / name, project)
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(QUIET))
    hidden = {"MPLBACKEND", "PYTHONPATH", "PYTHONWARNINGS"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"JUPYTER_TOKEN": token, "JUPYTER_PREFER_ENV_PATH": "1"}
    environment |= {"JUPYTER_RUNTIME_DIR": str(home), "IPYTHONDIR": str(home / "ipython")}
    environment |= {f"CXR_{name.upper()}_DIR": str(project / name) for name in ("data", "figures")}
    for name in ("JUPYTERLAB_SETTINGS", "JUPYTERLAB_WORKSPACES", "JUPYTER_CONFIG"):
        environment[f"{name}_DIR"] = str(home / name.split("_")[1].lower())
    words = [sys.executable, "-m", "jupyterlab", "--no-browser", "--expose-app-in-browser"]
    words += ["--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--ServerApp.root_dir={project}"]
    words += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with open(home / "log", "w") as log:
        process = subprocess.Popen(words, cwd=project, env=environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 120
        while True:
            assert process.poll() is None, (home / "log").read_text()[-2000:]
            assert time.monotonic() < end, "JupyterLab did not start"
            time.sleep(0.2)
            with contextlib.suppress(OSError, ValueError, StopIteration):
                url = json.loads(next(home.glob("jpserver-*.json")).read_text())["url"]
                urlopen(f"{url}api/status?token={token}", timeout=5).close()
                break
        yield url, token, project
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def opened(server, browser, request):
    """A notebook that is open in JupyterLab: its page, its file, and what it has asked for."""
    (url, token, project), name, asked = server, request.param, []
    page = browser.new_page(viewport={"width": 1360, "height": 1600})
    page.set_default_timeout(120_000)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{url}lab/tree/notebooks/{name}.ipynb?token={token}&reset")
    page.wait_for_function("window.jupyterapp && jupyterapp.restored.then(() => true)")
    page.evaluate(f"() => {{ {HELP} }}")
    page.wait_for_function("lab.idle()")
    page.evaluate("jupyterapp.shell.activateById(lab.panel().id)")
    yield page, project / "notebooks" / f"{name}.ipynb", asked
    if folder := os.environ.get("CXR_LAB_PICTURES"):
        page.screenshot(path=Path(folder) / f"{name}.png")
    page.evaluate("lab.panel().sessionContext.shutdown()")
    page.close()


@pytest.mark.parametrize("opened", NAMES, indirect=True)
def test_restart_and_run_all_and_save(opened):
    """They build on each other, so their order is that of the names."""
    page, file, asked = opened
    before = json.loads((ROOT / "notebooks" / file.name).read_text(encoding="utf-8"))
    assert page.locator(".jp-Dialog").count() == 0, "a notebook asks on opening"
    for command in ("notebook:restart-run-all", "docmanager:save"):
        page.evaluate("command => lab.start(command)", command)
        if "restart" in command:
            page.click(".jp-Dialog .jp-mod-accept")
        page.wait_for_function("lab.ran !== undefined && lab.idle()", timeout=300_000)
        assert page.evaluate("lab.ran") is True
    saved = json.loads(text := file.read_text(encoding="utf-8"))
    assert "widgets" not in saved["metadata"]
    assert "widget-view" not in text
    assert not list(filter(FAR.match, asked)), "it fetches from elsewhere"
    assert [c["source"] for c in saved["cells"]] == [c["source"] for c in before["cells"]]
    codes = [cell for cell in saved["cells"] if cell["cell_type"] == "code"]
    assert not [o for cell in codes for o in cell["outputs"] if o["output_type"] == "error"]
    assert [cell["execution_count"] for cell in codes] == list(range(1, len(codes) + 1))
    assert codes[-1]["outputs"], "the last cell says what was written"
