"""Several processes by the launcher: bad input is named, a process that dies ends the job at once,
and the run goes on.
"""

import dataclasses
import json
import os
import signal
import sys
import time

import numpy as np
import pytest

from lib import train
from lib.deepcluster import RunMismatchError, TrainConfig
from lib.paths import save_json
from lib.train import launch, main, read_config
from tests.test_deepcluster import SMALL, bytes_of, pictures

LONG = TrainConfig(
    "alexnet", 4, 3, 8, 40, width=(8, 16, 16, 16, 16, 64), kmeans_engine="torch", device="cpu"
)


@pytest.fixture
def images(tmp_path):
    np.save(tmp_path / "images.npy", pictures(200))
    return np.load(tmp_path / "images.npy", mmap_mode="r")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_process_that_dies_ends_the_job_and_the_run_goes_on(images, tmp_path, monkeypatch):
    """Rank 1 is killed with -9 once the first epoch is written; then the same call ends the run."""
    run_dir = tmp_path / "run"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os, signal, threading, time\n"
        "def watch():\n"
        f"    while not os.path.exists({str(run_dir / 'metrics.csv')!r}):\n"
        "        time.sleep(0.02)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if os.environ.get('RANK') == '1':\n"
        "    threading.Thread(target=watch, daemon=True).start()\n"
    )
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "site"))
        begin = time.monotonic()
        with pytest.raises(
            RuntimeError,
            match=r"(?s)training with 2 processes failed .*goes on from the last epoch\n.*Signal 9 \(SIGKILL\)",
        ):
            launch(images, LONG, run_dir, nproc=2, timeout=60)
        assert (
            time.monotonic() - begin < 50
        )  # less than the timeout: nobody waited for the dead one
    done = len((run_dir / "metrics.csv").read_text().splitlines()) - 1
    assert 1 <= done < LONG.epochs
    run = launch(images, LONG, run_dir, nproc=2, timeout=60)
    assert len(run.metrics) == LONG.epochs
    assert run.features.shape == (200, 64)
    one = launch(images, LONG, tmp_path / "one")
    np.testing.assert_allclose(run.metrics.loss[:2], one.metrics.loss[:2], atol=1e-3)


def test_error_of_a_process_is_shown(images, tmp_path):
    launch(images, dataclasses.replace(LONG, epochs=1), tmp_path / "run")
    with pytest.raises(
        RuntimeError,
        match=r"(?s)Traceback .*RunMismatchError: .* holds another run \(lr 0\.001, now 0\.01\)",
    ):
        launch(images, dataclasses.replace(LONG, lr=0.01), tmp_path / "run", nproc=2)


def test_one_process_is_fit(images, tmp_path):
    run = launch(images[:40], SMALL, tmp_path / "run")
    save_json(tmp_path / "config.json", dataclasses.asdict(SMALL))
    np.save(tmp_path / "forty.npy", images[:40])
    main([str(tmp_path / "config.json"), str(tmp_path / "forty.npy"), str(tmp_path / "again")])
    assert bytes_of(tmp_path / "again") == bytes_of(run.path)
    with pytest.raises(RunMismatchError, match="lr"):
        launch(images[:40], dataclasses.replace(SMALL, lr=0.1), run.path)


def test_bad_calls_are_named(images, tmp_path):
    with pytest.raises(ValueError, match="nproc must be at least 1, got 0"):
        launch(images, SMALL, tmp_path / "run", nproc=0)
    for part in (np.array(images), images[:100]):
        with pytest.raises(ValueError, match="give the memory map"):
            launch(part, SMALL, tmp_path / "run", nproc=2)
    with pytest.raises(
        FileNotFoundError, match=r"images\.npy is not there: run notebook 01_preprocess"
    ):
        main(
            [
                str(tmp_path / "config.json"),
                str(tmp_path / "nowhere" / "images.npy"),
                str(tmp_path / "run"),
            ]
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not a JSON file"),
        ("[]", "config.json must hold an object"),
        ('{"lr": 0.1}', "backbone has no default"),
        (
            '{"backbone": "p4m", "n_cluster": 5}',
            r"unknown setting 'n_cluster' \(did you mean n_clusters\?\)",
        ),
        ('{"backbone": "p4m", "lr": -1}', "config.json: lr must be above 0"),
        ('{"backbone": "p4m", "epochs": "three"}', "config.json: "),
    ],
)
def test_bad_config_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "config.json")


def test_config_survives_json(tmp_path):
    save_json(tmp_path / "config.json", dataclasses.asdict(LONG))
    assert read_config(tmp_path / "config.json") == LONG
    assert json.loads((tmp_path / "config.json").read_text())["width"] == list(LONG.width)


@pytest.mark.parametrize(
    ("system", "libuv", "ending"),
    [("linux", None, "SIGTERM"), ("darwin", None, "SIGTERM"), ("win32", "0", "CTRL_BREAK_EVENT")],
)
def test_on_every_system_the_launcher_is_started_and_ended_its_way(
    monkeypatch, system, libuv, ending
):
    for name in ("USE_LIBUV", "PYTHONUTF8"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(signal, "CTRL_BREAK_EVENT", "break", raising=False)
    environment = train._environment(2)
    assert environment.get("USE_LIBUV") == libuv
    assert environment["PYTHONUTF8"] == "1"
    assert train._end_signal() == getattr(signal, ending)


def test_what_the_launcher_says_is_read_whatever_its_bytes_are(capsys):
    code = "import sys; sys.stdout.buffer.write('caf\u00e9 \u2588 '.encode() + b'\\xff\\n'); sys.exit(3)"
    status, tail = train._run(
        [sys.executable, "-c", code], {**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (status, tail) == (3, "caf\u00e9 \u2588 \ufffd\n")
    assert tail in capsys.readouterr().err
