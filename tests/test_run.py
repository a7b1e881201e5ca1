"""The command line: arguments, parameters, what is run again and what is not, errors in one line,
and the way to an environment.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lib import paths, run
from lib.paths import ROOT
from lib.run import (
    Options,
    RunError,
    UsageError,
    dataset_name,
    parse_args,
    read_parameters,
    read_preset,
)

posix = pytest.mark.skipif(os.name == "nt", reason="run_all.sh needs bash, and signals are POSIX's")

COMMON = 'dataset = "phantom-smoke"\nsource = "phantom"\nrestart = False\n'
WRITE = "from lib import paths\npaths.save_json(paths.{}(dataset) / '{}', {})"
TABLE = "out = paths.figures_dir(dataset)\n(out / 'table1_linear_probe.md').write_text('| probe | 0.5 |')\n(out / 'fig1.svg').write_text('')"


def write_notebook(path, parameters, *cells):
    tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(
        new_notebook(
            cells=[new_markdown_cell("# Title"), tagged, *map(new_code_cell, cells)],
            metadata=metadata,
        ),
        path,
    )


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with three tiny notebooks and the presets' names, its data beside it; the path has a
    space.
    """
    root = tmp_path / "my project"
    (root / "notebooks" / "params").mkdir(parents=True)
    for preset, n in (("smoke", 1), ("quick", 2), ("paper", 3)):
        (root / "notebooks" / "params" / f"{preset}.yaml").write_text(
            f"n: {n}\nlr: 1.0e-3\nseeds: [0]\ndevice: cpu\n"
        )
    write_notebook(
        root / "notebooks" / "00_get.ipynb",
        COMMON + "n = 1",
        WRITE.format("dataset_dir", "images.json", "[n, source]"),
    )
    write_notebook(
        root / "notebooks" / "01_train.ipynb",
        COMMON + "lr = 1e-3\nseeds = [0]\ndevice = 'auto'",
        WRITE.format("runs_dir", "run.json", "[lr, seeds, device, restart]")
        + "\n(paths.runs_dir(dataset) / 'w.pt').write_text('')",
    )
    write_notebook(
        root / "notebooks" / "02_draw.ipynb",
        COMMON,
        WRITE.format("figures_dir", "fig0.json", "1") + "\n" + TABLE,
    )
    monkeypatch.setenv("CXR_DATA_DIR", str(root / "data"))
    monkeypatch.setenv("CXR_FIGURES_DIR", str(root / "figures"))
    monkeypatch.chdir(tmp_path)
    return root


@pytest.fixture
def executed(monkeypatch):
    """Stands for papermill: runs a notebook's cells in this process; returns the list of the
    notebooks that were run.
    """
    done = []

    def call(command, log, environment):
        notebook, overrides = Path(command[3]), json.loads(command[command.index("-y") + 1])
        preset = dict(
            re.findall(r"(\w+): (.+)", Path(command[command.index("-f") + 1]).read_text())
        )
        log.write_text("")
        done.append(notebook.stem)
        scope = {}
        for cell in nbformat.read(notebook, as_version=4).cells[1:]:
            exec(cell.source, scope)
            if "parameters" in cell.metadata.get("tags", []):
                scope |= {
                    name: json.loads(value)
                    for name, value in preset.items()
                    if value[0] in "0123456789["
                } | overrides
        return 0

    monkeypatch.setattr(run, "_call", call)
    return done


def run_again(project, executed, *arguments):
    """Names of the notebooks that a call runs, by number."""
    executed.clear()
    run.run(parse_args(arguments, project), project)
    return [name[:2] for name in executed]


# --- arguments


def test_defaults(project):
    assert parse_args([], project) == Options(
        "quick", "phantom", "phantom", None, None, None, False
    )


def test_all_options(project, tmp_path):
    (tmp_path / "NIH Sample").mkdir()
    arguments = [
        "--preset",
        "smoke",
        "--data",
        "NIH Sample",
        "--seeds",
        "0,7",
        "--device",
        "cpu",
        "--from",
        "1",
        "--restart",
    ]
    options = parse_args(arguments, project, tmp_path)
    assert options == Options(
        "smoke", str(tmp_path / "NIH Sample"), "nih-sample-smoke", (0, 7), "cpu", "01", True
    )
    assert parse_args(["--nproc", "4"], project) == Options(nproc=4)


def test_what_follows_test_is_pytests(project):
    assert parse_args(["--test"], project).test == ()
    assert parse_args(["--test", "-k", "data", "--help"], project).test == ("-k", "data", "--help")


def test_what_follows_study_is_the_studys(project):
    assert parse_args(["--study", "--jobs", "2", "--seeds", "0"], project).study == (
        "--jobs",
        "2",
        "--seeds",
        "0",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--prest", "quick"],
            r"unknown option --prest; valid: --preset, --data, --seeds, --device, --nproc, --from, --csv, --image-column, --label-column, "
            r"--fit, --drop-outliers, --restart, --test, --study, --help",
        ),
        (["quick"], "unknown option quick; valid"),
        (["--preset", "big"], "unknown --preset 'big'; valid: paper, quick, smoke"),
        (["--preset"], "--preset"),
        (["--device", "tpu"], "unknown --device 'tpu'; valid: auto, cpu, cuda"),
        (["--from", "7"], "unknown --from '07'; valid: 00, 01, 02"),
        (["--seeds", "0;1"], "--seeds '0;1' is not a list"),
        (["--seeds", "-1"], "--seeds"),
        (["--seeds", "1,1"], "names a seed twice"),
        (["--nproc", "0"], "--nproc '0' is not a number of processes"),
        (["--nproc", "two"], "--nproc 'two'"),
        (
            ["--data", "nowhere"],
            "--data 'nowhere' is not there; valid: phantom, chestmnist, kaggle,",
        ),
        (["--data", ""], "--data '' is not there"),
        (["--data", __file__], "is not a folder"),
        (["--preset", "smoke", "--test"], "--test takes no other option"),
    ],
)
def test_bad_arguments_end_in_one_line_that_names_the_valid_ones(
    project, arguments, message, monkeypatch, capsys
):
    monkeypatch.setattr(run.parse_args, "__defaults__", (project, None))
    assert run.main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert re.search(re.escape(message), error), error


@pytest.mark.parametrize(
    ("source", "preset", "name"),
    [
        ("phantom", "quick", "phantom"),
        ("phantom", "paper", "phantom-paper"),
        ("/x/NIH Sample (1)", "quick", "nih-sample-1"),
        ("/x/nih-sample", "smoke", "nih-sample-smoke"),
        ("/x/runs", "quick", "my-runs"),  # data/runs is taken
        ("/x/phantom", "quick", "my-phantom"),
        ("/x/胸部", "quick", "images"),
        ("/", "quick", "images"),
        ("/x/" + "a" * 200, "paper", "a" * 48 + "-paper"),
        ("kaggle", "quick", "kaggle"),
        ("kaggle-sample", "paper", "kaggle-sample-paper"),
        ("/x/kaggle", "quick", "my-kaggle"),
        ("nih:/x/CXR8", "quick", "cxr8"),
        ("chestmnist:/x/chestmnist_64.npz", "quick", "chestmnist_64"),
        ("chestmnist:/x/chestmnist.npz", "quick", "my-chestmnist"),
    ],
)
def test_dataset_name(source, preset, name):
    assert dataset_name(source, preset) == paths.check_name(name)


@pytest.mark.parametrize(
    ("given", "source", "command"),
    [
        ("kaggle", "kaggle", "--data kaggle"),
        ("kaggle-sample", "kaggle-sample", "--data kaggle-sample"),
        ("chestmnist", "chestmnist", "--data chestmnist"),
        ("chestmnist:own.npz", "chestmnist:{0}/own.npz", "--data chestmnist:PATH/own.npz"),
        ("own.npz", "chestmnist:{0}/own.npz", "--data chestmnist:PATH/own.npz"),
        ("nih:box", "nih:{0}/box", "--data nih:PATH/box"),
        ("./kaggle", "{0}/kaggle", "--data PATH/kaggle"),
    ],
)
def test_sources_by_word_and_by_path(given, source, command, tmp_path):
    (tmp_path / "own.npz").touch()
    (tmp_path / "kaggle").mkdir()
    (tmp_path / "box").mkdir()
    options = parse_args(["--data", given], folder=tmp_path)
    expected = source.format(tmp_path)
    assert os.path.normpath(options.source) == os.path.normpath(expected)
    assert command in run._command(options)
    assert str(tmp_path) not in run._command(options)
    assert (run._source_state(options.source) is None) == (str(tmp_path) not in expected)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("nih:", "not there"),
        ("nih:nowhere", "not there"),
        ("nih:own.npz", "not a folder"),
        ("chestmnist:nowhere.npz", "not there"),
        ("chestmnist:", "not there"),
        ("chestmnist:box", "not a file"),
        ("Kaggle", "not there"),
        ("", "not there"),
    ],
)
def test_a_source_that_is_not_there(given, reason, tmp_path):
    (tmp_path / "own.npz").touch()
    (tmp_path / "box").mkdir()
    with pytest.raises(
        UsageError,
        match=f"^--data '{given}' is {reason}; valid: phantom, chestmnist, kaggle, kaggle-sample, ",
    ):
        parse_args(["--data", given], folder=tmp_path)


def test_what_is_downloaded_comes_before_the_first_notebook(monkeypatch):
    from lib.data import sources as download

    asked = []

    def obtain(source, raw_dir):
        asked.append((source, raw_dir))
        raise download.DownloadError("no credentials")

    monkeypatch.setattr(download, "obtain", obtain)
    for source in ("phantom", "/x/images"):
        run._obtain(run.Options(source=source, dataset="x"))
    assert asked == []
    for source in ("kaggle", "kaggle-sample", "chestmnist", "nih:/x", "chestmnist:/x.npz"):
        with pytest.raises(RunError, match=r"^no credentials$"):
            run._obtain(run.Options(source=source, dataset="x"))
        assert asked[-1] == (source, paths.raw_dir("x"))


def test_help_names_every_option_and_preset(capsys):
    assert run.main(["--help"]) == 0
    text = capsys.readouterr().out
    with pytest.raises(UsageError) as error:
        parse_args(["--no-such-option"])
    options = re.findall(r"--[a-z-]+", str(error.value).split("valid:")[1])
    assert len(options) == 15
    assert all(f"\n  {option} " in text for option in options)
    presets = [path.stem for path in (ROOT / "notebooks" / "params").glob("*.yaml")]
    assert set(re.search(r"--preset (\S+)", text).group(1).split("|")) == set(presets)


# --- parameters


def test_reads_parameters_of_a_notebook(project):
    assert read_parameters(project / "notebooks" / "00_get.ipynb") == {
        "dataset": "phantom-smoke",
        "source": "phantom",
        "restart": False,
        "n": 1,
    }


@pytest.mark.parametrize(
    "code", ["n = 1 + len('a')", "import os", "a = b = 1", "a, b = 1, 2", "for i in [1]: n = i"]
)
def test_parameters_must_be_literals(project, code):
    write_notebook(project / "notebooks" / "00_get.ipynb", "n = 1\n" + code)
    with pytest.raises(RunError, match=r"00_get.ipynb, parameters, line 2: only `name = literal`"):
        read_parameters(project / "notebooks" / "00_get.ipynb")


def test_one_cell_of_parameters(project):
    path = project / "notebooks" / "00_get.ipynb"
    cells = [new_code_cell("n = 1", metadata={"tags": ["parameters"]}) for _ in range(2)]
    nbformat.write(new_notebook(cells=cells), path)
    with pytest.raises(RunError, match="has 2 cells tagged"):
        read_parameters(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "n_clusters: 2",
            r"quick.yaml: unknown parameter 'n_clusters'; valid: dataset, device, lr, n, restart, seeds, source$",
        ),
        ("seed: [0]", r"unknown parameter 'seed' \(did you mean seeds\?\)"),
        (
            "lr: 1e-3",
            r"lr is '1e-3', which is no number like 0.001; YAML takes 1e-3 for text, write 1.0e-3",
        ),
        ("seeds: 0", r"seeds is 0, which is no list like \[0\]"),
        ("restart: 1", "restart is 1, which is no true or false"),
        ("n:", "n is None, which is no number"),
        ("- n", "is not a list of `name: value` lines"),
        ("n: [", "is not YAML"),
    ],
)
def test_bad_presets(project, text, message):
    preset = project / "notebooks" / "params" / "quick.yaml"
    preset.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        read_preset(preset, run.find_notebooks(project))
    assert "\n" not in str(error.value)


def test_presets_and_options_reach_the_notebooks(project, executed):
    assert run_again(
        project, executed, "--preset", "paper", "--seeds", "3,4", "--device", "auto"
    ) == ["00", "01", "02"]
    assert paths.load_json(paths.dataset_dir("phantom-paper") / "images.json") == [3, "phantom"]
    assert paths.load_json(paths.runs_dir("phantom-paper") / "run.json") == [
        1e-3,
        [3, 4],
        "auto",
        False,
    ]


def test_the_command_in_the_results_hides_the_callers_path(project, tmp_path):
    (tmp_path / "x rays").mkdir()
    options = parse_args(["--data", str(tmp_path / "x rays"), "--seeds", "0,1"], project)
    assert run._command(options) == "./run_all.sh --preset quick --data PATH/x rays --seeds 0,1"


# --- what is run again


def test_a_second_call_runs_nothing(project, executed, capsys):
    assert run_again(project, executed) == ["00", "01", "02"]
    capsys.readouterr()
    assert run_again(project, executed) == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == [
        "[1/3] 00_get ... already done",
        "[2/3] 01_train ... already done",
        "[3/3] 02_draw ... already done",
    ]
    assert "| probe | 0.5 |" in lines
    assert lines[-1].strip() == "table1_linear_probe.md"
    assert "  fig1.svg" in lines


def test_presets_keep_to_themselves(project, executed):
    run_again(project, executed)
    assert run_again(project, executed, "--preset", "smoke") == ["00", "01", "02"]
    assert run_again(project, executed) == []


def test_a_parameter_runs_the_notebooks_that_have_it_and_those_after(project, executed):
    run_again(project, executed)
    assert run_again(project, executed, "--seeds", "0,1") == ["01", "02"]
    assert run_again(project, executed, "--seeds", "0,1") == []


def test_code_counts_and_prose_does_not(project, executed):
    run_again(project, executed)
    path = project / "notebooks" / "01_train.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source, notebook.cells[1].execution_count = "# Another title", 7
    nbformat.write(notebook, path)
    assert run_again(project, executed) == []
    notebook.cells[2].source += "\nx = 1"
    nbformat.write(notebook, path)
    assert run_again(project, executed) == ["01", "02"]


def test_a_change_in_lib_runs_everything(project, executed, monkeypatch, tmp_path):
    run_again(project, executed)
    shutil.copytree(ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run_again(project, executed) == []
    with open(tmp_path / "lib" / "paths.py", "a") as handle:
        handle.write("# changed\n")
    assert run_again(project, executed) == ["00", "01", "02"]


def test_what_was_deleted_is_made_again_but_for_checkpoints(project, executed):
    run_again(project, executed)
    (paths.runs_dir("phantom") / "w.pt").unlink()
    assert run_again(project, executed) == []
    (paths.figures_dir("phantom") / "fig0.json").unlink()
    assert run_again(project, executed) == ["02"]
    (paths.runs_dir("phantom") / "run.json").unlink()
    assert run_again(project, executed) == ["01", "02"]


def test_from(project, executed):
    run_again(project, executed)
    assert run_again(project, executed, "--from", "1") == ["01", "02"]
    write_notebook(project / "notebooks" / "00_get.ipynb", COMMON + "n = 1", "x = 1")
    assert run_again(project, executed, "--from", "02") == [
        "02"
    ]  # earlier results are taken as they are
    assert run_again(project, executed) == ["00", "01", "02"]


def test_from_needs_the_earlier_ones(project, executed):
    with pytest.raises(
        UsageError, match="--from 01: 00_get is not done for phantom with these parameters"
    ):
        run_again(project, executed, "--from", "01")
    run_again(project, executed)
    with pytest.raises(UsageError, match="--from 02: 01_train is not done"):
        run_again(project, executed, "--from", "02", "--seeds", "9")


def test_restart_runs_everything_and_tells_the_notebooks(project, executed):
    run_again(project, executed)
    assert run_again(project, executed, "--restart") == ["00", "01", "02"]
    assert paths.load_json(paths.runs_dir("phantom") / "run.json")[-1] is True
    assert run_again(project, executed) == []


def test_after_a_failure_the_rest_is_run(project, executed, monkeypatch):
    run_again(project, executed)
    works = run._call
    monkeypatch.setattr(
        run,
        "_call",
        lambda command, *rest: 1 if "01_train" in command[3] else works(command, *rest),
    )
    with pytest.raises(RunError, match="01_train: "):
        run_again(project, executed, "--from", "01")
    monkeypatch.setattr(run, "_call", works)
    assert run_again(project, executed) == ["01", "02"]


def test_what_follows_a_changed_notebook_is_run_even_after_an_interruption(
    project, executed, monkeypatch
):
    run_again(project, executed)
    works = paths.save_json

    def interrupt(path, value):
        works(path, value)
        if path.name == "01_train.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(paths, "save_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_again(project, executed, "--seeds", "5")
    monkeypatch.setattr(paths, "save_json", works)
    assert run_again(project, executed, "--seeds", "5") == ["02"]


def test_new_images_are_noticed_and_other_folders_refused(project, executed, tmp_path):
    for folder in ("one/scans", "two/scans"):
        (tmp_path / folder).mkdir(parents=True)
    assert run_again(project, executed, "--data", "one/scans") == ["00", "01", "02"]
    assert run_again(project, executed, "--data", "one/scans") == []
    (tmp_path / "one/scans/a.png").write_bytes(b"x")
    assert run_again(project, executed, "--data", "one/scans") == ["00", "01", "02"]
    with pytest.raises(
        UsageError,
        match=r"data/runs/scans holds the results of .*one.scans; rename your folder, or .* --restart",
    ):
        run_again(project, executed, "--data", "two/scans")
    assert run_again(project, executed, "--data", "two/scans", "--restart") == ["00", "01", "02"]


# --- what can go wrong


def test_no_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    with pytest.raises(
        RunError, match=r"the Jupyter kernel python3 is not installed.*-m pip install ipykernel"
    ) as error:
        run.check_kernel()
    assert "\n" not in str(error.value)


def test_a_kernel_of_another_python(monkeypatch, tmp_path):
    run.check_kernel()
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps(
            {"argv": [str(tmp_path / "gone" / "python")], "display_name": "x", "language": "python"}
        )
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    with pytest.raises(RunError, match=r"starts .*gone.python, not this Python"):
        run.check_kernel()


def test_a_folder_that_cannot_be_written(project, executed, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CXR_DATA_DIR", str(tmp_path / "file" / "data"))
    with pytest.raises(
        RunError, match=r"cannot write to .*file.data.*; choose other folders with CXR_DATA_DIR"
    ) as error:
        run_again(project, executed)
    assert "\n" not in str(error.value)
    assert executed == []


def test_missing_packages_are_named(monkeypatch, tmp_path):
    assert run.missing_packages(test=True) == []
    text = '[project]\ndependencies = ["numpy>=999", "pyyaml>=1", "no-such-package"]\noptional-dependencies = {test = ["pytest>=999"]}\n'
    (tmp_path / "pyproject.toml").write_text(text)
    assert run.missing_packages(root=tmp_path) == ["numpy>=999", "no-such-package"]
    assert run.missing_packages(True, tmp_path) == ["numpy>=999", "no-such-package", "pytest>=999"]
    monkeypatch.setitem(
        sys.modules, "packaging.requirements", None
    )  # a bare Python: everything is missing
    assert len(run.missing_packages(root=tmp_path)) == 3


def test_last_error_is_short(tmp_path):
    error = {
        "output_type": "error",
        "ename": "ValueError",
        "evalue": "\x1b[31mfirst\x1b[0m\nsecond\nthird\nfourth",
        "traceback": ["x"] * 200,
    }
    cell = {
        "cell_type": "code",
        "execution_count": 4,
        "metadata": {},
        "source": "",
        "outputs": [error],
    }
    copy, log = tmp_path / "a.ipynb", tmp_path / "a.log"
    copy.write_text(json.dumps({"cells": [cell]}))
    assert run.last_error(copy, log) == "In [4]: ValueError: first\n  second\n  third"
    log.write_text("...\nnbclient.exceptions.DeadKernelError: Kernel died\n")
    assert run.last_error(copy, log).startswith("the kernel died")
    log.write_text("one\ntwo\n\nthree\nfour\n")
    assert run.last_error(tmp_path / "none.ipynb", log) == "two\n  three\n  four"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (41, "41 s"), (754, "12 min 34 s"), (7500, "2 h 5 min")],
)
def test_duration(seconds, text):
    assert run._duration(seconds) == text


# --- in earnest: run_all.sh, papermill, kernels


def shell(folder, *arguments, cwd=None, **environment):
    """Call run_all.sh of `folder`."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in {"PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH"}
    }
    command = ["bash", str(folder / "run_all.sh"), *arguments]
    return subprocess.run(
        command,
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=100,
    )


@pytest.fixture
def checkout(project):
    """The project with this lib, run_all.sh and lock."""
    shutil.copytree(ROOT / "lib", project / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_all.sh", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, project / name)
    return project


@posix
def test_notebooks_run_in_earnest(checkout, tmp_path):
    (tmp_path / "x rays ü").mkdir()
    inline = "import os\nassert 'inline' in os.environ['MPLBACKEND']"
    write_notebook(
        checkout / "notebooks" / "00_get.ipynb",
        COMMON + "n = 1",
        WRITE.format("dataset_dir", "images.json", "[n, source]"),
        inline,
    )
    arguments = {
        "cwd": tmp_path,
        "PYTHON": sys.executable,
        "CXR_DATA_DIR": "kept here",
        "MPLBACKEND": "no-such-backend",
    }
    done = shell(checkout, "--preset", "smoke", "--data", "x rays ü", **arguments)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"\[1/3\] 00_get \.\.\. done in \d+ s\n\[2/3\] 01_train \.\.\. done in", done.stdout
    )
    assert done.stdout.rstrip().endswith("table1_linear_probe.md")
    data = tmp_path / "kept here"
    assert json.loads((data / "x-rays-smoke" / "images.json").read_text()) == [
        1,
        str(tmp_path / "x rays ü"),
    ]
    copy = nbformat.read(
        data / "runs" / "x-rays-smoke" / "notebooks" / "01_train.ipynb", as_version=4
    )
    assert copy.cells[-1].execution_count
    begin = time.monotonic()
    assert (
        shell(checkout, "--preset", "smoke", "--data", "x rays ü", **arguments).stdout.count(
            "already done"
        )
        == 3
    )
    assert time.monotonic() - begin < 5


@posix
def test_a_failing_notebook_ends_in_a_few_lines(checkout):
    write_notebook(
        checkout / "notebooks" / "00_get.ipynb",
        COMMON + "n = 1",
        "def deep():\n    raise ValueError('no images in it')",
        "deep()",
    )
    done = shell(checkout, PYTHON=sys.executable)
    assert done.returncode == 1
    assert "[1/3] 00_get ... failed after" in done.stdout
    assert re.fullmatch(
        r"error: 00_get: In \[\d\]: ValueError: no images in it\n  log: .*00_get.log\n", done.stderr
    )


@posix
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_runs_on_when_it_is_ended(checkout, by):
    if by == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells a child that its parent was killed")
    write_notebook(
        checkout / "notebooks" / "00_get.ipynb",
        COMMON + "n = 1",
        "import os, time\nfrom pathlib import Path\nPath('pid').write_text(str(os.getpid()))\ntime.sleep(60)",
    )
    # a background job of a script ignores SIGINT, and so would all that it starts
    ignoring = None if by == signal.SIGINT else lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": ignoring}
    process = subprocess.Popen(
        ["bash", str(checkout / "run_all.sh")], env=os.environ | {"PYTHON": sys.executable}, **pipes
    )
    try:
        pid = checkout / "notebooks" / "pid"
        wait_until(lambda: pid.exists() and pid.read_text(), 40)
        process.send_signal(by)
        error = process.communicate(timeout=25)[1]
    finally:
        process.kill()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[by]
    if by == signal.SIGINT:
        assert error.decode().strip() == "interrupted; the same command goes on where it stopped"
    wait_until(lambda: not is_alive(int(pid.read_text())), 10)


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def test_tests_give_one_total(project, capfd):
    (project / "tests").mkdir()
    (project / "ruff.toml").write_text('extend-exclude = ["notebooks"]')
    (project / "tests" / "test_x.py").write_text(
        "def test_x():\n    pass\n\n\ndef test_y():\n    pass\n"
    )
    for name in ("01_train", "02_draw"):
        (project / "notebooks" / f"{name}.ipynb").unlink()
    assert run.run_tests(["-k", "test_y"], root=project) is True
    assert re.fullmatch(
        r"All passed: 1 tests, notebooks left out, 0 skipped, in \d+ s",
        capfd.readouterr().out.splitlines()[-1],
    )
    (project / "tests" / "test_x.py").write_text("import os\ndef test_x():\n    assert False\n")
    cells = (WRITE.format("dataset_dir", "images.json", "1"), "1 / 0")
    write_notebook(project / "notebooks" / "00_get.ipynb", COMMON, *cells)
    assert run.run_tests(root=project) is False
    last = capfd.readouterr().out.splitlines()[-1]
    assert re.match(
        r"FAILED: ruff check \(status 1\), ruff format \(status 1\), 1 tests, 1 cells; of 1 tests, 3 notebook cells",
        last,
    )
    assert not (project / "data").exists(), "notebooks under test write to a fresh folder"


# --- run_all.sh on the way to an environment; a stand-in for Python makes and fills .venv at once

STAND_IN = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") [ -z "${BROKEN:-}" ] ;;
    "-m lib.run") echo "handed over: ${*:3}" ;;
    "-c "*missing_packages*) echo "${LACKS-torch>=2.9}" ;;
    "-c "*version_info\\ \\>=*) echo "${NEW-True}" ;;
    "-c "*ensurepip*) [ -z "${NO_VENV:-}" ] ;;
    *) exec "%s" "$@" ;;
esac
"""


@pytest.fixture
def bare(checkout, tmp_path):
    """Call run_all.sh where Python is a stand-in without packages; returns the result and what the
    stand-in was called with.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in (
        "python3",
        "python3.11",
        "python3.12",
        "python3.13",
        "python3.14",
        "python",
        "mine",
    ):
        (programs / name).write_text(STAND_IN % sys.executable)
        (programs / name).chmod(0o755)

    def call(*arguments, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = {
            "CALLS": str(calls),
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        } | environment
        return shell(checkout, *arguments, **environment), calls.read_text()

    return call


@posix
def test_help_needs_no_python_and_is_that_of_lib_run(checkout):
    begin = time.monotonic()
    done = shell(checkout, "--preset", "smoke", "--help", PATH="/usr/bin:/bin", PYTHON="")
    assert time.monotonic() - begin < 0.5
    assert (done.returncode, done.stdout, done.stderr) == (0, run.USAGE, "")


@posix
def test_dot_venv_is_made_once(bare, checkout):
    done, calls = bare("--preset", "smoke")
    assert done.stdout.splitlines()[-1] == "handed over: --preset smoke", done.stderr
    assert "making .venv from requirements.lock" in done.stdout
    assert "-m pip install --quiet --disable-pip-version-check -r requirements.lock" in calls
    assert "--no-deps -e ." in calls
    done, calls = bare("--preset", "smoke")
    assert done.stdout == "handed over: --preset smoke\n"
    assert "pip" not in calls
    with open(checkout / "requirements.lock", "a") as handle:
        handle.write("# newer\n")
    done, calls = bare()
    assert "pip install" in calls
    assert "-m venv" not in calls
    assert "pip install" not in bare()[1]


@posix
def test_an_install_that_broke_off_is_not_taken_for_whole(bare, checkout):
    done, calls = bare(BROKEN="1")
    assert done.returncode == 1
    assert done.stderr == "error: the install broke off; the same command tries again\n"
    (checkout / ".venv" / "half").write_text("")
    done, calls = bare(LACKS="")  # even if all packages seem to be there
    assert done.returncode == 0, done.stderr
    assert "-m venv" in calls
    assert not (checkout / ".venv" / "half").exists()


@posix
def test_two_installs_do_not_meet(bare, checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".incomplete").write_text(str(os.getpid()))
    done, _ = bare()
    assert done.returncode == 1
    assert f"another run_all.sh is making .venv (process {os.getpid()})" in done.stderr


@posix
def test_a_dot_venv_made_by_hand_is_used_if_it_is_complete_and_never_deleted(
    bare, checkout, tmp_path
):
    (checkout / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(tmp_path / "bin" / "python3", checkout / ".venv" / "bin" / "python")
    (checkout / ".venv" / "own").write_text("")
    done, calls = bare(LACKS="")
    assert done.stdout == "handed over: \n"
    assert "pip" not in calls
    assert "-m pip install" in bare()[1]
    assert (checkout / ".venv" / "own").exists()


@posix
def test_the_active_environment_is_used_if_it_has_what_is_needed(bare, checkout, tmp_path):
    (tmp_path / "env" / "bin").mkdir(parents=True)
    shutil.copy(tmp_path / "bin" / "python3", tmp_path / "env" / "bin" / "python")
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        done, _ = bare("--test", LACKS="", **{variable: str(tmp_path / "env")})
        assert done.stdout == "handed over: --test\n"
    assert not (checkout / ".venv").exists()
    done, _ = bare(CONDA_PREFIX=str(tmp_path / "env"))
    assert "env/bin/python lacks torch>=2.9: making .venv" in done.stdout
    assert done.stdout.endswith("handed over: \n")


@posix
def test_python_is_what_the_caller_names(bare, tmp_path):
    assert bare("--restart", PYTHON="mine", LACKS="")[0].stdout == "handed over: --restart\n"
    assert bare(PYTHON="nosuchpython")[0].stderr == "error: PYTHON=nosuchpython is not a program\n"
    done = bare(PYTHON="mine", NEW="False")[0]
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: PYTHON=mine is not Python 3.11 or newer \(it says: 3\.\d+\)\n", done.stderr
    )
    assert "bin/mine lacks torch>=2.9: making .venv" in bare(PYTHON="mine")[0].stdout


@posix
def test_a_python_too_old_or_without_venv(bare, checkout):
    done, _ = bare(NEW="False")
    assert done.returncode == 1
    assert re.match(
        r"error: Python 3.11 or newer is needed, and python3 here is 3\.\d+; ", done.stderr
    )
    done, _ = bare(NO_VENV="1")
    assert done.returncode == 1
    assert "lacks venv or ensurepip" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()


@posix
def test_a_mistyped_option_costs_no_install(bare, checkout):
    for arguments, message in (
        (["--preset", "qick"], "valid: paper, quick, smoke"),
        (["--from", "77"], "valid: 00, 01, 02"),
        (["-x"], "valid: --preset"),
    ):
        done, calls = bare(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert "pip" not in calls
    assert not (checkout / ".venv").exists()


@posix
def test_run_all_works_through_a_link(bare, checkout, tmp_path):
    (tmp_path / "link").symlink_to(checkout / "run_all.sh")
    done = subprocess.run(
        ["bash", str(tmp_path / "link"), "--preset", "none"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert done.returncode == 2
    assert "valid: paper, quick, smoke" in done.stderr


# --- a folder of one's own


def test_options_of_a_folder_reach_the_notebooks(project, tmp_path):
    folder = tmp_path / "xrays"
    folder.mkdir()
    (folder / "labels.csv").write_text("scan,dx\n")
    arguments = [
        "--data",
        "xrays",
        "--csv",
        "labels.csv",
        "--image-column",
        "scan",
        "--label-column",
        "my dx",
        "--fit",
        "crop",
    ]
    options = parse_args([*arguments, "--drop-outliers"], project, tmp_path)
    assert (options.csv, options.image_column, options.label_column) == (
        str(folder / "labels.csv"),
        "scan",
        "my dx",
    )
    assert (options.fit, options.drop_outliers) == ("crop", True)
    shown = "--csv labels.csv --image-column scan --label-column 'my dx' --fit crop --drop-outliers"
    assert run._command(options) == f"./run_all.sh --preset quick --data PATH/xrays {shown}"
    state = run._source_state(options.source, options.csv)
    (tmp_path / "labels.csv").write_text("scan,dx\na,b\n")
    options = parse_args(arguments, project, tmp_path)  # the caller's own folder comes first
    assert options.csv == str(tmp_path / "labels.csv")
    assert run._source_state(options.source, options.csv) != state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fit", "squeeze"], "unknown --fit 'squeeze'; valid: pad, crop, stretch"),
        (["--csv", "nowhere.csv", "--data", "."], "--csv 'nowhere.csv' is no file here"),
        (
            ["--label-column", "dx"],
            "--label-column describes a folder of X-rays: name it with --data PATH",
        ),
    ],
)
def test_options_of_a_folder_that_cannot_be_met(arguments, message, project, tmp_path):
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_args(arguments, project, tmp_path)


def test_logs_are_written_in_the_encoding_in_which_they_are_read(monkeypatch, tmp_path):
    monkeypatch.delenv("PYTHONUTF8", raising=False)
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    code = "import sys; assert sys.flags.utf8_mode; print('100%|\u2588| caf\u00e9')"
    assert run._call([sys.executable, "-c", code], tmp_path / "log", run._environment()) == 0
    assert (tmp_path / "log").read_text(encoding="utf-8") == "100%|\u2588| caf\u00e9\n"
