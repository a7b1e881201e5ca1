"""Running the notebooks: packages, presets and parameters, kernels, and whether all is done.

The top imports the standard library alone, as `lib.__main__` does."""

import ast
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Mapping, Sequence
from concurrent import futures
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGE = ["ipykernel.kernelapp", "lib.plots.training", "lib.study.measure", "torch._dynamo"]
# it talks through a socket in TMPDIR, whose path may have 107 characters
CAN_FORK = sys.platform == "linux" and len(os.environ.get("TMPDIR", "")) < 70
FORKS = multiprocessing.get_context("forkserver") if CAN_FORK else None


class UsageError(Exception):
    """What was asked for cannot be done; one line."""


class RunError(Exception):
    """Something failed on the way; a few lines."""


def find_notebooks(first: str = "00", last: str = "99") -> list[Path]:
    """The numbered notebooks in their order, from one number to another."""
    paths = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    return [path for path in paths if first <= path.name[:2] <= last]


def read_parameters(notebook: Path) -> dict:
    """Names and defaults of a notebook's parameters: ``name = literal`` in its tagged cell."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    (cell,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    lines = ast.parse("".join(cell["source"])).body
    return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


def read_preset(name: str) -> dict:
    """A preset's parameters; UsageError for a name or a kind of value that no notebook has."""
    import yaml

    file = f"notebooks/params/{name}.yaml"
    values = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise UsageError(f"{file} holds no `name: value` lines")
    valid = {k: v for notebook in find_notebooks() for k, v in read_parameters(notebook).items()}
    for key, value in values.items():
        if key not in valid:
            near = get_close_matches(str(key), valid, 1) or sorted(valid)
            raise UsageError(f"{file}: unknown parameter {key!r}; valid: {', '.join(near)}")
        if any(isinstance(value, t) != isinstance(valid[key], t) for t in (str, list, bool)):
            hint = " (YAML reads 1e-3 as text: write 1.0e-3)" * isinstance(value, str)
            raise UsageError(f"{file}: {key} is {value!r}, not like {valid[key]!r}{hint}")
    return values


class Notebooks:
    """The notebooks, run with `parameters`, of which each is given those it has.

    Copies and logs go to ``data/runs/<dataset>/notebooks``. ``done.json`` lies beside them: a
    digest of all that the results depend on, `inputs` among it, and the files that were made."""

    def __init__(self, parameters: Mapping, inputs: Sequence[Path] = ()) -> None:
        from lib import paths

        self.parameters, self.inputs = parameters, inputs
        folders = (paths.dataset_dir, paths.runs_dir, paths.figures_dir)
        self.folders = [folder(parameters["dataset"]) for folder in folders]
        self.copies = self.folders[1] / "notebooks"
        file = self.copies / "done.json"
        self.done = paths.load_json(file) if file.exists() else {}
        other = self.done.get("source", parameters["source"])
        if other != parameters["source"] and not parameters["restart"]:
            what = f"{paths.show(self.folders[1])} holds the results of {other}"
            raise UsageError(f"{what}: rename your folder, or replace them with --restart")

    def own(self, notebook: Path) -> dict:
        """The parameters that a notebook has."""
        known = read_parameters(notebook)
        return {name: value for name, value in self.parameters.items() if name in known}

    def digest(self) -> str:
        """Digest of parameters, code and the user's files: by number, size and newest change."""
        how = ("restart", "nproc", "jobs")  # these change no result
        facts = [(name, value) for name, value in self.parameters.items() if name not in how]
        for path in find_notebooks():
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            facts += [cell["source"] for cell in cells if cell["cell_type"] == "code"]
        code = [p for p in (ROOT / "lib").rglob("*") if p.suffix in {".py", ".c", ".html"}]
        facts += [path.read_text(encoding="utf-8") for path in sorted(code)]
        found = [file for path in self.inputs for file in (path, *path.rglob("*"))]
        states = [file.lstat() for file in found]
        newest = max((state.st_mtime_ns for state in states), default=0)
        facts += [len(states), sum(state.st_size for state in states), newest]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def are_done(self) -> bool:
        """Whether nothing has changed since all was done, and no result is missing."""
        there = all(map(os.path.exists, self.done.get("files", [])))
        return there and self.done.get("digest") == self.digest()

    def remember(self) -> None:
        """Write down that all is done, and which files may not be deleted from now on."""
        from lib import paths

        passing = {".pt", ".tmp", ".lock", ".log", ".ipynb"}
        found = [path for folder in self.folders for path in folder.rglob("*.*")]
        files = [str(path) for path in found if path.suffix not in passing]
        entry = {"source": self.parameters["source"], "digest": self.digest(), "files": files}
        paths.save_json(self.copies / "done.json", entry)

    def check_done(self, notebook: Path) -> None:
        """UsageError unless a notebook was run to its end with these parameters."""
        copy = self.copies / notebook.name
        notes = json.loads(copy.read_text(encoding="utf-8"))["metadata"] if copy.exists() else {}
        stored = notes.get("papermill", {"exception": True})
        own = {name: value for name, value in self.own(notebook).items() if name != "restart"}
        if stored["exception"] or stored["parameters"] | own != stored["parameters"]:
            raise UsageError(f"{notebook.stem} is not done with these parameters: leave --from out")

    def run(self, notebooks: Sequence[Path]) -> None:
        """Run notebooks and print a line for each; RunError if one fails. From 05 on none reads
        what another has made: on two cores and Linux, two of these run at a time."""
        from joblib import cpu_count

        for folder in (*self.folders, self.copies):
            folder.mkdir(parents=True, exist_ok=True)
        paired, jobs, following = FORKS and cpu_count() > 1, {}, start_kernel()
        with futures.ThreadPoolExecutor(2) as pool:
            try:
                for left, notebook in zip(range(len(notebooks))[::-1], notebooks, strict=True):
                    line = f"[{len(notebooks) - left}/{len(notebooks)}] {notebook.stem} ... "
                    beside = paired and notebook.name > "05"
                    if not beside:
                        print(line, end="", flush=True)
                    files = notebook, self.copies / notebook.name
                    job = pool.submit(execute, *files, self.own(notebook), following)
                    jobs[job] = following, line * beside, time.monotonic()
                    following = start_kernel() if left else None  # nobody has to wait for it
                    while len(jobs) > bool(left and beside):
                        for job in futures.wait(jobs, 0.5, futures.FIRST_COMPLETED).done:
                            kernel, line, begin = jobs.pop(job)
                            kernel.shutdown_kernel(now=True)
                            took = f"done in {time.monotonic() - begin:.0f} s"
                            print(f"{line}{'failed' if job.exception() else took}", flush=True)
                            job.result()
            finally:  # interrupted, or one has failed: time to leave their files in order
                kernels = [kernel for kernel, *_ in jobs.values()]
                for kernel in kernels:
                    kernel.interrupt_kernel()
                futures.wait(jobs, 10)
                for kernel in filter(None, (*kernels, following)):
                    kernel.shutdown_kernel(now=True)


def requirements(test: bool = False) -> list[str]:
    """The packages that pyproject.toml names; with `test`, those of the tests, too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["dependencies"] + test * project["optional-dependencies"]["test"]


def missing_packages(test: bool = False) -> list[str]:
    """The `requirements` that this Python does not meet."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return requirements(test)
    has = {d.name.lower().replace("_", "-"): d.version for d in metadata.distributions()}
    wanted = {line: Requirement(line) for line in requirements(test)}
    met = {n: r.specifier.contains(has[r.name], True) for n, r in wanted.items() if r.name in has}
    return [line for line in wanted if not met.get(line)]


def install_missing() -> None:
    """On Colab, install what the notebooks import and is absent; all else keeps its version."""
    if "google.colab" not in sys.modules:
        return
    there = {d.name.lower().replace("_", "-"): d.version for d in metadata.distributions()}
    runners = {"ipykernel", "jupyter-client", "jupyterlab", "nbclient", "papermill"}
    wanted = {re.match(r"[\w-]+", line)[0] for line in requirements()} - runners
    if wanted - set(there):
        held = [f"{name}=={there[name]}" for name in ("numpy", "torch", "torchvision")]
        pip = [sys.executable, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *sorted(wanted - set(there)), *held], check=True)
        importlib.invalidate_caches()


def prepare_environment(folder: Path) -> None:
    """Set what notebooks, runs and tests inherit; paths given to us are relative to `folder`."""
    import joblib

    for name in ("CXR_DATA_DIR", "CXR_FIGURES_DIR"):
        if os.environ.get(name):  # notebooks run in another folder
            os.environ[name] = os.path.abspath(folder / Path(os.environ[name]).expanduser())
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {"PYTHONPATH": os.pathsep.join(path), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    os.environ.setdefault("PYTHONHASHSEED", "0")
    os.environ.setdefault("PYTHONUTF8", "1")  # for logs, on Windows
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as a kernel draws
    # not "error": a package's warning would end a kernel, which leaves semaphores when it is killed
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # who waits soon lets others have the core
    if joblib.cpu_count() < (os.cpu_count() or 1):  # OpenMP does not see a container's limit
        os.environ.setdefault("OMP_NUM_THREADS", str(joblib.cpu_count()))


def serve_kernel(arguments: Sequence[str]) -> None:
    """Be a Jupyter kernel: the child of a process that has imported what is `LARGE`."""
    from ipykernel.kernelapp import IPKernelApp

    os.setsid()  # Ctrl-C is for us; a kernel and what it starts are interrupted together
    os.chdir(ROOT / "notebooks")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    us = multiprocessing.parent_process()
    threading.Thread(target=lambda: us.join() or os._exit(1), daemon=True).start()
    IPKernelApp.launch_instance(arguments, parent_handle=1)  # it watches no parent itself


def start_kernel():
    """Start a Jupyter kernel of this Python. On Linux it is forked, which saves five seconds."""
    if FORKS:
        FORKS.set_forkserver_preload(LARGE)
        multiprocessing.forkserver.ensure_running()  # it imports while we do
    import papermill  # noqa: F401
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import KernelManager
    from jupyter_client.provisioning import LocalProvisioner

    class Forking(LocalProvisioner):
        async def launch_kernel(self, cmd: list[str], **_) -> dict:
            process = FORKS.Process(target=serve_kernel, args=(cmd[cmd.index("-f") :],))
            process.start()
            # what a subprocess.Popen has besides; signals go to the group, or there is none
            process.stdin = process.stdout = process.stderr = None
            process.poll, process.wait = lambda: process.exitcode, process.join
            process.send_signal = lambda number: process.kill()
            self.process, self.pid, self.pgid = process, process.pid, process.pid
            return self.connection_info

    this_python = KernelSpecManager(kernel_dirs=[])  # no "python3" that the user has installed
    client = "jupyter_client.asynchronous.AsyncKernelClient"  # papermill's
    kernel = KernelManager(kernel_spec_manager=this_python, client_class=client)
    if FORKS:
        kernel.provisioner = Forking(kernel_spec=kernel.kernel_spec, parent=kernel)
    kernel.start_kernel(cwd=ROOT / "notebooks", stderr=subprocess.DEVNULL)
    return kernel


def execute(notebook: Path, copy: Path, parameters: Mapping, kernel) -> None:
    """Run a notebook in a kernel; RunError with the cell and its error. Not in the main thread,
    where papermill would take Ctrl-C for itself."""
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    copy.unlink(missing_ok=True)
    log = copy.with_suffix(".log")
    try:
        with open(log, "w", encoding="utf-8") as handle:
            options = {"kernel_name": "python3", "km": kernel, "start_timeout": 300}
            options |= {"stdout_file": handle, "stderr_file": handle, "progress_bar": False}
            execute_notebook(str(notebook), str(copy), dict(parameters), **options)
        return
    except PapermillExecutionError as error:
        lines = f"{error.ename}: {error.evalue}".strip().splitlines()[:3]
        said = f"In [{error.exec_count}]: " + "\n  ".join(lines)
    except RuntimeError:  # while it ran, or at its start
        said = "the kernel died; most often it was out of memory: try a smaller preset"
    raise RunError(f"{notebook.stem}: {said}\n  cells: {copy}\n  log: {log}")
