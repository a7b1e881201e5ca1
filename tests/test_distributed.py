"""Two processes compute what one computes; one that waits in vain gives up."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import lib
from lib.parallel import ALONE, World, join, share_layers
from lib.runs import load_model, load_run

ROOT = Path(lib.__file__).parent.parent
forks = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """The folder that tests.workers fills: everything once in one process and once in two."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "tests.workers", "ranks", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return folder


@forks
def test_batch_norm_and_dropout_see_the_whole_batch(computed):
    one, two = (np.load(computed / f"layers{size}.npz") for size in (1, 2))
    assert set(one) == set(two)
    assert len([name for name in one if name.startswith(("2d", "group"))]) == 16
    for name in one:
        if name != "assignments":
            np.testing.assert_allclose(two[name], one[name], rtol=1e-10, atol=1e-10, err_msg=name)
    assert 0 < (one["dropout 0"] == 0).mean() < 1
    assert not np.array_equal(one["dropout 0"], one["dropout 1"])


@forks
def test_same_features_same_clusters(computed):
    one, first, last = (
        np.load(computed / name)["assignments"]
        for name in ("layers1.npz", "layers2.npz", "last2.npz")
    )
    assert len(np.unique(one)) == 6
    np.testing.assert_array_equal(first, one)
    np.testing.assert_array_equal(last, one)


@forks
@pytest.mark.parametrize("arm", ["alexnet", "p4m"])
def test_training_metrics_for_an_equal_global_batch(computed, arm):
    one, two = (load_run(computed / f"{arm}{size}" / "run") for size in (1, 2))
    columns = [
        "nmi_prev",
        "ami_prev",
        "loss",
        "clusters_used",
        "largest_cluster",
        "perplexity",
        "lr",
    ]
    pd.testing.assert_frame_equal(
        two.metrics[columns], one.metrics[columns], rtol=0, atol=1e-3, check_dtype=False
    )
    np.testing.assert_array_equal(two.assignments, one.assignments)
    assert one.metrics.loss.nunique() == 2  # it moved
    assert two.features.shape == one.features.shape
    assert set(load_model(two).state_dict()) == set(
        load_model(one).state_dict()
    )  # a checkpoint fits any number of processes


@forks
def test_one_that_waits_in_vain_gives_up(computed):
    assert (computed / "timeout.txt").read_text()
    assert 1 < float((computed / "waited.txt").read_text()) < 25


@forks
def test_processes_that_see_different_files_are_told(computed):
    for rank in range(2):
        assert (
            "do not agree on their number ([0, 1])" in (computed / f"unequal{rank}.txt").read_text()
        )


def test_shares_are_all_rows_once():
    for n in (0, 1, 5, 64):
        for size in (1, 2, 3, 8):
            rows = [i for rank in range(size) for i in range(n)[World(rank, size).share(n)]]
            assert rows == list(range(n))
            lengths = [len(range(n)[World(rank, size).share(n)]) for rank in range(size)]
            assert max(lengths) - min(lengths) <= 1


def test_alone_nothing_is_exchanged():
    values = torch.tensor([1.0, 2.0])
    assert ALONE.main
    assert ALONE.sum(values) is values
    assert ALONE.all_rows(values, 2) is values
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))
    assert [type(m) for m in share_layers(model, ALONE)] == [nn.BatchNorm1d, nn.Dropout]
    ALONE.barrier()
    ALONE.check_equal(3, "anything")


def test_alone_without_a_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # as a batch system may set it, without the rest
    with join("cpu") as world:
        assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
