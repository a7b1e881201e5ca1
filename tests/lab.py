"""JupyterLab on this machine, and what a reader does in it: open a notebook, restart and run all,
interrupt, save, look.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from urllib.request import urlopen

from lib.paths import ROOT
from tests import browser

# The same shades as a reader's first start, but nothing that asks a server elsewhere: no news, no
# look for updates.
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    }
}


def missing():
    """Why there can be no test in a browser, or None."""
    for module, name in (("jupyterlab", "JupyterLab"), ("websocket", "websocket-client")):
        if find_spec(module) is None:
            return f"{name} is not installed"
    return None if browser.find() else "no Chromium here; name one with CHROMIUM"


def copy_project(folder):
    """A project that may be written to: notebooks, lib and the published numbers. Returns its
    folder.
    """
    for name in ("notebooks", "lib", "data/published"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    return folder


class Server:
    """The real JupyterLab on 127.0.0.1, with a free port, a token, and settings of its own; kernels
    write below `project`.
    """

    def __init__(self, project, home):
        self.token, self.project = secrets.token_hex(16), project
        settings = home / "settings"
        for plugin, values in SETTINGS.items():
            package, name = plugin.split(":")
            file = settings / package / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values), encoding="utf-8")
        self.runtime = home / "runtime"
        environment = {
            **os.environ,
            "JUPYTER_TOKEN": self.token,
            "JUPYTER_PREFER_ENV_PATH": "1",
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        environment |= {
            "CXR_DATA_DIR": str(project / "data"),
            "CXR_FIGURES_DIR": str(project / "figures"),
        }
        environment |= {
            "JUPYTERLAB_SETTINGS_DIR": str(settings),
            "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        }
        environment |= {
            "JUPYTER_RUNTIME_DIR": str(self.runtime),
            "JUPYTER_CONFIG_DIR": str(home / "config"),
            "IPYTHONDIR": str(home / "ipython"),
        }
        environment.pop("MPLBACKEND", None)  # pytest's; the kernel draws inline
        environment.pop(
            "PYTHONPATH", None
        )  # the copy's lib must be found by the notebooks themselves
        environment.pop("PYTHONWARNINGS", None)
        root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        command = [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--expose-app-in-browser",
            "--ServerApp.ip=127.0.0.1",
            *root,
        ]
        command += ["--ServerApp.port=0", f"--ServerApp.root_dir={project}"]
        self.log = home / "server.log"
        with open(self.log, "w", encoding="utf-8") as handle:
            self._process = subprocess.Popen(
                command,
                cwd=project,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
            )
        try:
            self.url = self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._process.poll() is None:
            for file in self.runtime.glob("jpserver-*.json"):
                try:
                    url = json.loads(file.read_text(encoding="utf-8"))["url"]
                    with urlopen(f"{url}api/status?token={self.token}", timeout=5):
                        return url
                except (OSError, ValueError):
                    continue
            time.sleep(0.1)
        tail = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"JupyterLab did not start within {seconds} s: {tail}")

    def close(self):
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


HELP = """window.lab = {
  panel: () => [...jupyterapp.shell.widgets('main')].find(w => w.sessionContext && w.content && w.content.widgets),
  code: () => lab.panel().content.widgets.filter(cell => cell.model.type === 'code'),
  kernel: () => { const s = lab.panel() && lab.panel().sessionContext.session; return s && s.kernel ? s.kernel.status : 'none'; },
  counts: () => lab.code().map(cell => cell.model.executionCount),
  outputs: () => lab.code().map(cell => cell.model.outputs.toJSON()),
  start: (command) => {
    lab.ran = undefined;
    jupyterapp.commands.execute(command).then(v => { lab.ran = [v]; }, e => { lab.ran = [String(e)]; });
  },
  wide: () => lab.code().flatMap((cell, i) => [...cell.node.querySelectorAll('.jp-OutputArea-output')]
    .filter(e => e.scrollWidth > e.clientWidth + 2).map(e => [i + 1, e.scrollWidth - e.clientWidth])),
}"""


class Notebook:
    """A notebook that is open in JupyterLab, in a window of its own."""

    def __init__(self, server, page, name):
        self.page, self.path = page, server.project / "notebooks" / f"{name}.ipynb"
        page.open(f"{server.url}lab/tree/notebooks/{name}.ipynb?token={server.token}&reset")
        page.wait("!!window.jupyterapp && jupyterapp.restored.then(() => true)", 60)
        page.evaluate(f"void ({HELP})")
        page.wait("!!lab.panel() && lab.panel().context.isReady && lab.kernel() === 'idle'", 60)
        page.evaluate("void jupyterapp.shell.activateById(lab.panel().id)")
        # a file as it came is not trusted; nothing of what the notebooks keep may need it
        self.ready_without_dialog = not self.dialog()
        self.wide = set()  # code cells, by number, and how many pixels their output is too wide

    def dialog(self):
        return self.page.evaluate(
            "(document.querySelector('.jp-Dialog') || {innerText: ''}).innerText"
        )

    def command(self, name, accept=False):
        """Start a command of JupyterLab, as its menu does; with `accept`, press the button of the
        dialog that asks.
        """
        self.page.evaluate(f"lab.start({json.dumps(name)})")
        text = ""
        if accept:
            self.page.wait("!!document.querySelector('.jp-Dialog .jp-mod-accept')", 10)
            text = self.dialog()
            self.page.click(".jp-Dialog .jp-mod-accept")
        return text

    def finish(self, seconds):
        """Wait until the command that was started has ended and the kernel has nothing to do; the
        answer of the command.
        """
        self.page.wait("lab.ran !== undefined && lab.kernel() === 'idle'", seconds)
        return self.page.evaluate("lab.ran[0]")

    def restart_and_run_all(self, seconds=300):
        """Kernel menu, Restart Kernel and Run All Cells, to the last cell."""
        self.command("notebook:restart-run-all", accept=True)
        return self.finish(seconds)

    def counts(self):
        return self.page.evaluate("lab.counts()")

    def outputs(self):
        """The outputs of each code cell, as they stand in the notebook now."""
        return self.page.evaluate("lab.outputs()")

    def shown(self):
        """The text of all outputs as the page shows them, where a line that returns to its start
        has overwritten itself.
        """
        return self.page.evaluate(
            "lab.code().map(cell => cell.outputArea.node.innerText).join('\\n')"
        )

    def errors(self):
        return [
            f"cell {i}: {o['ename']}: {o['evalue']}"
            for i, cell in enumerate(self.outputs(), 1)
            for o in cell
            if o["output_type"] == "error"
        ]

    def save(self):
        self.command("docmanager:save")
        self.finish(20)
        return json.loads(self.path.read_text(encoding="utf-8"))

    def pictures(self, folder, most=12):
        """Screenshots of the notebook from its top to its end, in `folder`; their paths. `wide`
        gets what is wider than its place.
        """
        folder.mkdir(parents=True, exist_ok=True)
        box = "lab.panel().content.node.querySelector('.jp-WindowedPanel-outer')"
        paths = []
        for number in range(most):
            self.page.evaluate(f"void ({box}.scrollTop = {number} * ({box}.clientHeight - 40))")
            time.sleep(0.4)  # cells out of sight are drawn when they come in
            paths.append(folder / f"{self.path.stem}_{number + 1:02d}.png")
            self.page.screenshot(paths[-1])
            self.wide |= {tuple(found) for found in self.page.evaluate("lab.wide()")}
            # one can scroll on below the last cell
            if self.page.evaluate(
                f"lab.panel().content.widgets.at(-1).node.getBoundingClientRect().bottom <= {box}.getBoundingClientRect().bottom"
            ):
                break
        return paths

    def close(self):
        """End the kernel and leave the page, without its question about unsaved changes."""
        self.page.evaluate("lab.panel().sessionContext.shutdown().then(() => true)")
        self.page.open("about:blank")
