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
  code: () => lab.panel().content.widgets.filter(cell => cell.model.type === 'code'),
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
    for name in ("notebooks", "lib", "data/published"):
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


class Notebook:
    """A notebook that is open in JupyterLab."""

    def __init__(self, server, browser, name):
        url, token, project = server
        self.file, self.requests = project / "notebooks" / f"{name}.ipynb", []
        self.page = browser.new_page(viewport={"width": 1360, "height": 1600})
        self.page.set_default_timeout(120_000)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"{url}lab/tree/notebooks/{name}.ipynb?token={token}&reset")
        self.page.wait_for_function("window.jupyterapp && jupyterapp.restored.then(() => true)")
        self.page.evaluate(f"() => {{ {HELP} }}")
        self.page.wait_for_function("lab.idle()")
        self.page.evaluate("jupyterapp.shell.activateById(lab.panel().id)")

    def run(self, command, minutes=5):
        """Run a command of a menu, press the button of the dialog that asks, and wait for the
        command and for the kernel."""
        self.page.evaluate("command => lab.start(command)", command)
        if command == "notebook:restart-run-all":
            self.page.click(".jp-Dialog .jp-mod-accept")
        done = "lab.ran !== undefined && lab.idle()"
        self.page.wait_for_function(done, timeout=60_000 * minutes)
        return self.page.evaluate("lab.ran")

    def errors(self):
        """Of all outputs: the page itself holds only those of cells in view."""
        outputs = self.page.evaluate("lab.code().flatMap(cell => cell.model.outputs.toJSON())")
        return [output["ename"] for output in outputs if output["output_type"] == "error"]

    def save(self):
        """Save it, close it, and read the file: no widget is kept, and nothing came from afar."""
        self.run("docmanager:save")
        text = self.file.read_text(encoding="utf-8")
        assert "widgets" not in json.loads(text)["metadata"]
        assert "widget-view" not in text
        assert not list(filter(FAR.match, self.requests)), "it fetches from elsewhere"
        self.close()
        return json.loads(text)["cells"]

    def close(self):
        if folder := os.environ.get("CXR_LAB_PICTURES"):
            self.page.screenshot(path=Path(folder) / f"{self.file.stem}.png")
        self.page.evaluate("lab.panel().sessionContext.shutdown()")
        self.page.close()


@pytest.mark.parametrize("name", NAMES)
def test_restart_and_run_all(server, browser, name):
    """They build on each other, so their order is that of the names."""
    notebook = Notebook(server, browser, name)
    assert notebook.page.locator(".jp-Dialog").count() == 0, "a notebook asks on opening"
    assert notebook.run("notebook:restart-run-all") is True
    assert notebook.errors() == []
    saved = notebook.save()
    before = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert [c["source"] for c in saved] == [c["source"] for c in before["cells"]]
    codes = [cell for cell in saved if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in codes] == list(range(1, len(codes) + 1))
    assert codes[-1]["outputs"], "the last cell says what was written"
