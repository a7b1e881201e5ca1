"""The command line: options, which notebooks run again, errors in one line, and run_all.sh."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock, patch

import nbformat
import numpy as np
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import lib.__main__ as command
from lib import notebooks, parallel, paths
from lib.data import sources
from lib.kmeans import CLUSTERERS
from lib.notebooks import RunError, UsageError, read_preset
from lib.paths import ROOT
from lib.study import arms

posix = pytest.mark.skipif(os.name == "nt", reason="run_all.sh needs bash, and signals are POSIX's")

COMMON = 'dataset = "phantom-smoke"\nsource = "phantom"\nrestart = False\n'
TRAIN = COMMON + "lr = 1e-3\nseeds = [0]\ndevice = 'auto'"
WRITE = "from lib import paths\npaths.save_json(paths.{}(dataset) / '{}', {})"
IMAGES = WRITE.format("dataset_dir", "images.json", "[n, source]")


def write_notebook(path, parameters, *cells):
    tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [new_markdown_cell("# Title"), tagged, *map(new_code_cell, cells)]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder, with a space in its path, of three tiny notebooks and three presets."""
    root = tmp_path / "my project"
    folder = root / "notebooks"
    (folder / "params").mkdir(parents=True)
    for preset, n in (("smoke", 1), ("quick", 2), ("paper", 3)):
        text = f"n: {n}\nlr: 1.0e-3\nseeds: [0]\ndevice: cpu\n"
        (folder / "params" / f"{preset}.yaml").write_text(text)
    write_notebook(folder / "00_get.ipynb", COMMON + "n = 1", IMAGES)
    write = WRITE.format("runs_dir", "run.json", "[lr, seeds, device, restart]")
    write_notebook(folder / "01_train.ipynb", TRAIN, write)
    write = WRITE.format("figures_dir", "fig0.json", "1")
    write_notebook(folder / "02_draw.ipynb", COMMON, write)
    for module in (command, notebooks):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setenv("CXR_DATA_DIR", str(root / "data"))
    monkeypatch.setenv("CXR_FIGURES_DIR", str(root / "figures"))
    monkeypatch.chdir(tmp_path)
    return root


@pytest.fixture
def executed(monkeypatch):
    """Runs notebooks in this process, without kernels; the list of those that were run."""
    done = []

    def execute(notebook, copy, parameters, kernel):
        scope = {}
        for cell in nbformat.read(notebook, as_version=4).cells[1:]:
            exec(cell.source, scope)
            scope |= parameters
        notes = {"papermill": {"parameters": parameters, "exception": None}}
        copy.write_text(json.dumps({"cells": [], "metadata": notes}))
        done.append(notebook.stem[:2])

    monkeypatch.setattr(notebooks, "start_kernel", Mock)
    monkeypatch.setattr(notebooks, "execute", execute)
    return done


def run_again(executed, *arguments):
    """Numbers of the notebooks that a call runs."""
    executed.clear()
    command.run(command.parse(arguments))
    return list(executed)


# --- options


def test_options_of_a_folder_and_how_results_show_them(project, tmp_path):
    (tmp_path / "NIH Sample").mkdir()
    (tmp_path / "NIH Sample" / "labels.csv").touch()
    own = ["--data", "NIH Sample", "--csv", "labels.csv", "--label-column", "my dx"]
    options = command.parse(["--preset", "smoke", "--seeds", "0,7", "--from", "1", *own])
    assert (options.data, options.dataset) == (str(tmp_path / "NIH Sample"), "nih-sample-smoke")
    assert (options.seeds, options.start) == ([0, 7], "01")
    assert options.csv == str(tmp_path / "NIH Sample" / "labels.csv")
    shown = command.command_line(options)
    assert str(tmp_path) not in shown
    for part in ("--seeds 0,7", "--data PATH/NIH Sample", "--csv labels.csv", "'my dx'"):
        assert part in shown
    (tmp_path / "labels.csv").touch()  # the caller's own folder comes first
    assert command.parse(own).csv == str(tmp_path / "labels.csv")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--test -k data --help", {"command": "test", "arguments": ["-k", "data", "--help"]}),
        ("--preset smoke --study", {"command": "study", "dataset": "phantom-smoke"}),
        ("--data . --reuse a/p4m/seed0", {"command": "reuse", "run": "a/p4m/seed0"}),
    ],
)
def test_other_commands(project, words, expected):
    options = vars(command.parse(words.split()))
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "what", "valid"),
    [
        *(("--prest quick", "--prest", ""), ("--preset big", "'big'", "paper")),
        *(("--from 7", "'07'", "02"), ("--seeds 0;1", "'0;1'", "0,1,2")),
        *(("--seeds 1,1", "'1,1'", "different"), ("--nproc 0", "--nproc 0", "from 1")),
        *(("--data nowhere", "'nowhere'", "kaggle"), ("--data nih:", "'nih:'", "nih:PATH")),
        ("--data chestmnist:notebooks", "'chestmnist:notebooks'", "FILE.npz"),
        *(("--csv x.csv", "--csv", "--data PATH"), ("--data . --csv x.csv", "'x.csv'", "")),
        *(("--study --jobs 0", "--jobs 0", "from 1"), ("--reuse x", "--export", "")),
        ("--reuse x --data phantom", "phantom", "folder"),
    ],
)
def test_a_bad_option_ends_in_one_line(project, words, what, valid, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(words.split())
    out, error = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert re.fullmatch(f".*{re.escape(what)}.*\n", error)
    assert valid in error


@pytest.mark.parametrize(
    ("source", "preset", "name"),
    [
        *(("phantom", "quick", "phantom"), ("digits-turned", "smoke", "digits-turned-smoke")),
        *(("/x/NIH Sample (1)", "quick", "nih-sample-1"), ("/x/胸部", "quick", "images")),
        *(("/x/runs", "quick", "my-runs"), ("/x/kaggle", "quick", "my-kaggle")),  # they are taken
        *(("/x/" + "a" * 200, "paper", "a" * 48 + "-paper"), ("nih:/x/CXR8", "quick", "cxr8")),
        ("chestmnist:/x/chestmnist_64.npz", "quick", "chestmnist_64"),
    ],
)
def test_dataset_name(source, preset, name):
    assert command.dataset_name(source, preset) == paths.check_name(name)


def test_options_need_no_package_and_know_the_words_of_lib():
    assert set(command.SOURCES) == set(sources.WORDS)
    assert set(command.CLUSTERERS) == set(CLUSTERERS)
    code = "import sys; from lib.__main__ import main; sys.exit(main(['run', '--help']))"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, check=True, capture_output=True)


# --- parameters


@pytest.mark.parametrize(
    ("text", "what"),
    [
        *(("n_clusters: 2", "valid: dataset, device, lr"), ("seed: [0]", "valid: seeds$")),
        *(("lr: 1e-3", "write 1.0e-3"), ("seeds: 0", r"not like \[0\]")),
        *(("restart: 1", "not like False"), ("- n", "name: value")),
    ],
)
def test_bad_presets(project, text, what):
    (project / "notebooks" / "params" / "quick.yaml").write_text(text)
    with pytest.raises(UsageError, match=f"^notebooks/params/quick.yaml.*{what}"):
        read_preset("quick")


def test_presets_and_options_reach_the_notebooks(project, executed):
    words = ["--preset", "paper", "--seeds", "3,4", "--device", "auto"]
    assert run_again(executed, *words) == ["00", "01", "02"]
    assert paths.load_json(paths.dataset_dir("phantom-paper") / "images.json") == [3, "phantom"]
    run = paths.load_json(paths.runs_dir("phantom-paper") / "run.json")
    assert run == [1e-3, [3, 4], "auto", False]


# --- what is run again


def test_a_second_call_runs_nothing(project, executed, capsys):
    with pytest.raises(UsageError, match="00_get"):
        run_again(executed, "--from", "01")
    assert run_again(executed) == ["00", "01", "02"]
    table = paths.figures_dir("phantom") / "table1_linear_probe.md"
    table.write_text("| probe | 0.5 |")
    assert run_again(executed) == []
    out = capsys.readouterr().out
    assert "already done" in out
    assert "| probe | 0.5 |" in out
    assert run_again(executed, "--preset", "smoke") == ["00", "01", "02"]
    assert run_again(executed) == [], "presets keep to themselves"
    assert run_again(executed, "--from", "1") == ["01", "02"]
    with pytest.raises(UsageError, match="01_train"):
        run_again(executed, "--from", "02", "--seeds", "9")


def test_what_changes_results_runs_the_notebooks_again(project, executed):
    run_again(executed)
    assert run_again(executed, "--seeds", "0,1")
    assert run_again(executed)
    path = project / "notebooks" / "01_train.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source, notebook.cells[1].execution_count = "# Another title", 7
    nbformat.write(notebook, path)
    assert run_again(executed) == [], "prose and counts are no results"
    notebook.cells[2].source += "\nx = 1"
    nbformat.write(notebook, path)
    assert run_again(executed)
    (project / "lib").mkdir()
    (project / "lib" / "new.py").touch()
    assert run_again(executed)
    (paths.figures_dir("phantom") / "fig0.json").unlink()
    assert run_again(executed)
    assert run_again(executed, "--restart")
    assert run_again(executed) == []


def test_from_05_on_two_run_at_a_time_and_a_failure_ends_both(project, capsys):
    at_work, stopped = threading.Barrier(2, timeout=60), threading.Event()

    def execute(notebook, *_):
        at_work.wait()
        if notebook.stem == "06_b":
            raise RunError("no images")
        assert stopped.wait(60)

    for name in ("05_a", "06_b", "07_c"):
        write_notebook(project / "notebooks" / f"{name}.ipynb", COMMON)
    stubs = {"execute": execute, "start_kernel": lambda: Mock(interrupt_kernel=stopped.set)}
    two = notebooks.Notebooks({"dataset": "x", "source": "x", "restart": False})
    with patch.multiple(notebooks, FORKS=True, **stubs), patch("joblib.cpu_count", lambda: 2):
        with pytest.raises(RunError, match="no images"):
            two.run(notebooks.find_notebooks("05"))
    assert capsys.readouterr().out == "[2/3] 06_b ... failed\n"


def test_added_images_are_noticed_and_another_folder_is_refused(project, executed, tmp_path):
    for folder in ("one/scans", "two/scans"):
        (tmp_path / folder).mkdir(parents=True)
    assert run_again(executed, "--data", "one/scans")
    (tmp_path / "one/scans/a.png").touch()
    assert run_again(executed, "--data", "one/scans")
    assert run_again(executed, "--data", "one/scans") == []
    with pytest.raises(UsageError, match=r"one.scans"):
        run_again(executed, "--data", "two/scans")
    assert run_again(executed, "--data", "two/scans", "--restart")


def test_downloads_come_before_the_first_notebook(project, executed, monkeypatch):
    monkeypatch.setattr(sources, "fetch", Mock(side_effect=ValueError("no credentials")))
    own = COMMON + "n_phantoms = 2\ndata_seed = 0"
    write_notebook(project / "notebooks" / "00_get.ipynb", own)
    (project / "notebooks" / "params" / "quick.yaml").write_text("n_phantoms: 2\ndata_seed: 0\n")
    for source in ("kaggle", "kaggle-sample", "chestmnist", "nih:."):
        with pytest.raises(RunError, match=r"^no credentials$"):
            run_again(executed, "--data", source)
        assert executed == []
    for source in ("digits", str(project)):
        assert run_again(executed, "--data", source), "it needs no download"


def test_a_folder_that_cannot_be_written(project, executed, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CXR_DATA_DIR", str(tmp_path / "file" / "data"))
    shutil.copy(ROOT / "pyproject.toml", project)
    assert command.main([]) == 1
    assert re.fullmatch(r"error: .*file.*\n", capsys.readouterr().err)


def test_missing_packages_are_named(project, monkeypatch, capsys):
    text = '[project]\ndependencies = ["numpy>=999", "pyyaml>=1", "no-such-package"]\n'
    text += 'optional-dependencies = {test = ["pytest>=999"]}\n'
    (project / "pyproject.toml").write_text(text)
    assert notebooks.missing_packages() == ["numpy>=999", "no-such-package"]
    assert notebooks.missing_packages(True)[-1] == "pytest>=999"
    assert command.main(["--check"]) == command.main([]) == 3
    assert all("numpy>=999" in text for text in capsys.readouterr())
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)  # a bare Python
    assert len(notebooks.missing_packages()) == 3
    monkeypatch.setattr(notebooks, "missing_packages", Mock(side_effect=KeyboardInterrupt))
    assert command.main(["--check"]) == 130
    assert "the same command" in capsys.readouterr().err


# --- the other commands


def test_a_study_trains_what_is_missing_and_compares(executed, monkeypatch, tmp_path, capsys):
    started = {}

    def run_processes(jobs, at_once, log_of, on_end):
        started.update(jobs)
        for name in jobs:
            on_end(name, RuntimeError() if "alexnet" in name else None)

    monkeypatch.setenv("CXR_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("CXR_FIGURES_DIR", str(tmp_path / "figures"))
    monkeypatch.setattr(notebooks, "execute", lambda path, *_: executed.append(path.stem[:2]))
    monkeypatch.setattr(arms, "missing_runs", lambda *_: [("p4m", 1), ("alexnet", 0)])
    monkeypatch.setattr(parallel, "run_processes", run_processes)
    options = ["--study", "--preset", "smoke", "--jobs", "2", "--seeds", "0,1"]
    with pytest.raises(RunError, match=r"1 of 2 runs failed: alexnet seed 0"):
        command.study(command.parse(options))
    assert sorted(executed) == ["00", "01", "04", "05", "06"]
    given = command.parse(started["p4m seed 1"][3:])
    assert paths.load_json(given.config)["seed"] == 1
    assert Path(given.run_dir) == paths.run_dir("phantom-smoke", "p4m", 1)
    assert Path(given.images).name == "images.npy"
    assert "alexnet seed 0: failed" in capsys.readouterr().out
    executed.clear()
    command.study(command.parse([*options, "--status"]))
    assert executed == []
    assert "p4m" in capsys.readouterr().out
    with pytest.raises(UsageError, match="resnet"):
        command.study(command.parse(["--study", "--arms", "resnet"]))


def test_train_trains_one_run_or_says_why_not(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    settings = {"backbone": "p4m", "n_clusters": 3, "pca_dim": 4, "epochs": 0, "device": "cpu"}
    paths.save_json(tmp_path / "config.json", settings | {"width": [2, 2, 4]})
    images = np.random.default_rng(0).integers(0, 256, (24, 64, 64), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    words = ["train", "--images", "images.npy", "--run-dir", "run", "--config", "config.json"]
    command.train(command.parse(words))
    assert np.load(tmp_path / "run" / "features.npy").shape == (24, 4)
    for backbone, width in (("p4m", [1, 2, 4]), ("alexnet", [2] * 6)):
        some = {"pseudo_labels": "given", "epochs": 1, "backbone": backbone, "width": width}
        paths.save_json(tmp_path / "config.json", settings | some)
        np.save(tmp_path / "labels.npy", np.arange(24) % 3)
        command.train(command.parse([*words, "--run-dir", backbone, "--labels", "labels.npy"]))
        assert "groups" in paths.load_json(tmp_path / backbone / "config.json")
    np.save(tmp_path / "labels.npy", np.arange(24))
    capfd.readouterr()
    assert command.main([*words, "--labels", "labels.npy"]) == 1
    assert re.fullmatch(r"error: .*labels.npy has 3 for image 3.*\n", capfd.readouterr().err)
    paths.save_json(tmp_path / "config.json", settings | {"lrr": 1})
    with pytest.raises(RunError, match=r"lrr.*config\.json"):
        command.train(command.parse(words))


def test_a_run_to_be_reused_must_be_there(monkeypatch, tmp_path):
    monkeypatch.setenv("CXR_DATA_DIR", str(tmp_path))
    there = tmp_path / "runs" / "phantom" / "p4m" / "seed0"
    there.mkdir(parents=True)
    (there / "clustering.npz").touch()
    with pytest.raises(UsageError, match="phantom/p4m/seed0"):
        command.reuse(command.parse(["--reuse", "phantom/p4m/seed9", "--export", "x"]))


@pytest.mark.slow
def test_tests_end_in_one_line_of_totals(project, capfd):
    (project / "ruff.toml").write_text('extend-exclude = ["notebooks"]')
    (project / "tests").mkdir()
    test = project / "tests" / "test_x.py"
    test.write_text("def test_x():\n    pass\n\n\ndef test_y():\n    pass\n")
    command.test(command.parse(["--test", "-k", "test_y"]))
    assert capfd.readouterr().out.splitlines()[-1] == "3 passed, 0 failed, 0 skipped"
    test.write_text("import os\ndef test_x():\n    assert False\n")
    for path in notebooks.find_notebooks("01"):
        path.unlink()
    write_notebook(project / "notebooks" / "00_get.ipynb", COMMON, "1 / 0")
    with pytest.raises(SystemExit):
        command.test(command.parse(["--test"]))
    # two checks of ruff, a test and a cell; the cell with the parameters passes
    assert capfd.readouterr().out.splitlines()[-1] == "1 passed, 4 failed, 0 skipped"


# --- in earnest: run_all.sh, papermill, kernels


@pytest.fixture
def checkout(project):
    """The project with lib, run_all.sh and the lock."""
    shutil.copytree(ROOT / "lib", project / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_all.sh", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, project / name)
    return project


def shell(script, *arguments, cwd=None, **environment):
    """Call a run_all.sh."""
    named = {"PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH"}
    clean = {name: value for name, value in os.environ.items() if name not in named}
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    return subprocess.run(["bash", script, *arguments], cwd=cwd, env=clean | environment, **options)


@posix
@pytest.mark.slow
def test_notebooks_run_in_earnest(checkout, tmp_path):
    (tmp_path / "x rays ü").mkdir()
    inline = "import os\nassert 'inline' in os.environ['MPLBACKEND']"
    write_notebook(checkout / "notebooks" / "00_get.ipynb", COMMON + "n = 1", IMAGES, inline)
    where = {"cwd": tmp_path, "PYTHON": sys.executable, "CXR_DATA_DIR": "kept here"}
    words = (checkout / "run_all.sh", "--preset", "smoke", "--data", "x rays ü")
    odd = {"MPLBACKEND": "no-such-backend", "PYTHONWARNINGS": "error"}  # which end a kernel
    done = shell(*words, **odd, **where)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\[1/3\] 00_get \.\.\. done in \d+ s\n\[2/3\] 01_train", done.stdout)
    data = tmp_path / "kept here"
    found = paths.load_json(data / "x-rays-smoke" / "images.json")
    assert found == [1, str(tmp_path / "x rays ü")]
    copy = data / "runs" / "x-rays-smoke" / "notebooks" / "01_train.ipynb"
    assert nbformat.read(copy, as_version=4).cells[-1].execution_count
    assert "already done" in shell(*words, **where).stdout


@pytest.fixture
def beside(checkout):
    """Start run_all.sh with presets `smoke`, `quick`, ... beside each other, their n is 1, 2, ...:
    one kernel each to wait for, that of the first notebook."""
    for path in notebooks.find_notebooks("01"):
        path.unlink()
    # ignored in what a shell starts in the background, and then in all that this starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    calls, environment = [], os.environ | {"PYTHON": sys.executable}
    options = {"env": environment, "text": True, "stdout": subprocess.PIPE}

    def start(many, *cells):
        write_notebook(checkout / "notebooks" / "00_get.ipynb", TRAIN + "\nn = 1", *cells)
        for preset in ("smoke", "quick", "paper")[:many]:
            words = ["bash", checkout / "run_all.sh", "--preset", preset]
            calls.append(subprocess.Popen(words, stderr=subprocess.PIPE, **options))
        return calls

    yield start
    for call in calls:
        call.kill()
        call.communicate()


@posix
@pytest.mark.slow
def test_a_failing_notebook_ends_in_a_few_lines(beside):
    deep = "import os\ndef deep():\n    raise ValueError('no images')"
    calls = beside(2, deep, "os._exit(1) if n == 2 else deep()")
    for call, what in zip(calls, (r"In \[\d\]: .*no images", "the kernel died"), strict=True):
        out, error = call.communicate(timeout=120)
        assert call.returncode == 1
        assert "[1/1] 00_get ... failed" in out
        assert re.search(f"^error: 00_get: {what}", error, re.MULTILINE)
        assert error.count("\n") <= 4


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def is_alive(pid):
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@posix
@pytest.mark.slow
def test_nothing_runs_on_when_it_is_ended(checkout, beside):
    code = "import os, time\nfrom pathlib import Path\n"
    calls = beside(3, code + "Path(f'pid{n}').write_text(str(os.getpid()))\ntime.sleep(300)")
    ends = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}
    for n, (call, (by, status)) in enumerate(zip(calls, ends.items(), strict=True), 1):
        pid = checkout / "notebooks" / f"pid{n}"
        wait_until(lambda pid=pid: pid.exists() and pid.read_text())
        call.send_signal(getattr(signal, by))
        error = call.communicate(timeout=60)[1]
        assert call.returncode == status
        assert ("interrupted" in error) is (by == "SIGINT")
        assert "Traceback" not in error
        wait_until(lambda pid=pid: not is_alive(int(pid.read_text())))


# --- run_all.sh on the way to an environment; a stand-in for Python makes and fills .venv at once

STAND_IN = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") [ -z "${BROKEN:-}" ] ;;
    "-m lib") if [ "$3" != --check ]; then echo "handed over: ${*:3}"; else
        REAL -m lib "${@:3}" >/dev/null || exit $?; exit "${LACKS-3}"; fi ;;
    "-c "*version_info*) [ -z "${OLD:-}" ] ;;
    "-c "*ensurepip*) [ -z "${NO_VENV:-}" ] ;;
    *) exit 7 ;;
esac
"""


@pytest.fixture
def bare(checkout, tmp_path):
    """Call run_all.sh, through a link, where Python is a stand-in without packages: status, output,
    error, calls."""
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    for name in ("python3", *(f"python3.{n}" for n in (11, 12, 13, 14)), "python", "mine"):
        (programs / name).write_text(STAND_IN.replace("REAL", f"'{sys.executable}'"))
        (programs / name).chmod(0o755)
    path = {"CALLS": str(calls), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    (tmp_path / "link").symlink_to(checkout / "run_all.sh")

    def call(*arguments, **environment):
        calls.write_text("")
        done = shell(tmp_path / "link", *arguments, **path, **environment)
        return done.returncode, done.stdout, done.stderr, calls.read_text()

    return call


@posix
def test_dot_venv_is_made_once(bare, checkout, tmp_path):
    _, out, error, calls = bare("--preset", "smoke", VIRTUAL_ENV=str(tmp_path))  # it lacks packages
    assert out.splitlines()[-1] == "handed over: --preset smoke", error
    for call in ("-m venv .venv", "-r requirements.lock", "--no-deps -e ."):
        assert call in calls
    _, out, _, calls = bare("--preset", "smoke", LACKS="0")
    assert out == "handed over: --preset smoke\n"
    assert "pip" not in calls
    with open(checkout / "requirements.lock", "a") as handle:
        handle.write("# newer\n")
    calls = bare(LACKS="0")[3]
    assert "pip install" in calls
    assert "-m venv" not in calls
    assert "pip install" not in bare(LACKS="0")[3]


@posix
def test_an_install_that_broke_off_is_not_taken_for_whole(bare, checkout):
    status, _, error, _ = bare(BROKEN="1")
    assert (status, error.count("\n")) == (1, 1)
    (checkout / ".venv" / "half").touch()
    assert "-m venv" in bare(LACKS="0")[3], "even if all packages seem to be there"
    assert not (checkout / ".venv" / "half").exists()
    (checkout / ".venv" / ".incomplete").write_text(str(os.getpid()))
    assert "another run_all.sh" in bare()[2]


@posix
@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON", "by hand"])
def test_an_environment_that_has_what_is_needed_is_used(bare, checkout, tmp_path, variable):
    environment = {variable: "mine" if variable == "PYTHON" else str(tmp_path)}
    if variable == "by hand":
        (checkout / ".venv" / "bin").mkdir(parents=True)
        shutil.copy(tmp_path / "bin" / "python3", checkout / ".venv" / "bin" / "python")
    _, out, _, calls = bare("--restart", LACKS="0", **environment)
    assert out == "handed over: --restart\n"
    assert "pip" not in calls
    assert (checkout / ".venv").exists() is (variable == "by hand")


@posix
@pytest.mark.parametrize(
    ("words", "environment", "status", "what"),
    [
        ("", {"PYTHON": "nosuchpython"}, 1, "PYTHON"),
        ("", {"PYTHON": "mine", "OLD": "1"}, 1, "3.11"),
        *(("", {"OLD": "1"}, 1, "3.11"), ("", {"NO_VENV": "1"}, 1, "venv")),
        *(("--preset qick", {}, 2, "qick"), ("-x", {}, 2, "-x")),
    ],
)
def test_an_error_costs_no_install(bare, checkout, words, environment, status, what):
    found, _, error, calls = bare(*words.split(), **environment)
    assert (found, error.count("\n")) == (status, 1)
    assert what in error
    assert "pip" not in calls.replace("ensurepip", "")
    assert not (checkout / ".venv").exists()
