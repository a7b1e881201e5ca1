"""The controls that train on labels which know nothing of the images."""

import dataclasses
import json

import numpy as np
import pytest

import lib.deepcluster
from lib.deepcluster import TrainConfig, fit, labels_to_train_on
from lib.runs import load_run
from tests.test_deepcluster import SMALL, pictures


@pytest.fixture
def trained_on(monkeypatch):
    """The pseudo-labels that each epoch was trained on."""
    seen = []
    train = lib.deepcluster.train_epoch

    def spy(model, optimizers, images, pseudo_labels, *rest):
        seen.append(np.array(pseudo_labels))
        return train(model, optimizers, images, pseudo_labels, *rest)

    monkeypatch.setattr(lib.deepcluster, "train_epoch", spy)
    return seen


def test_clusters_are_trained_on_unless_asked_otherwise(tmp_path, trained_on):
    run = fit(pictures(), SMALL, tmp_path / "run", progress=False)
    assert np.array_equal(trained_on, run.assignments)


def test_index_is_the_same_for_all_images_whatever_they_show(tmp_path, trained_on):
    run = fit(
        pictures(),
        dataclasses.replace(SMALL, pseudo_labels="index"),
        tmp_path / "run",
        progress=False,
    )
    assert all(np.array_equal(labels, np.arange(40) % SMALL.n_clusters) for labels in trained_on)
    # what is recorded is the clustering
    assert not np.array_equal(run.assignments[0], trained_on[0])
    assert load_run(run.path).config.pseudo_labels == "index"


def test_shuffled_keeps_one_shuffle_of_the_first_clusters_also_when_resumed(tmp_path, trained_on):
    config = dataclasses.replace(SMALL, pseudo_labels="shuffled", epochs=3)
    whole = fit(pictures(), config, tmp_path / "whole", progress=False)
    first = trained_on[0]
    assert np.array_equal(np.bincount(first), np.bincount(whole.assignments[0]))
    assert not np.array_equal(first, whole.assignments[0])
    assert all(np.array_equal(labels, first) for labels in trained_on)
    fit(pictures(), dataclasses.replace(config, epochs=1), tmp_path / "parts", progress=False)
    resumed = fit(pictures(), config, tmp_path / "parts", progress=False)
    assert all(np.array_equal(labels, first) for labels in trained_on)
    assert np.array_equal(resumed.features, whole.features)
    other = labels_to_train_on(
        whole.assignments[0], whole.assignments[:0], dataclasses.replace(config, seed=1)
    )
    assert not np.array_equal(other, first)


def test_runs_from_before_the_setting_are_read_and_go_on(tmp_path):
    run = fit(pictures(), SMALL, tmp_path / "run", progress=False)
    path = run.path / "config.json"
    stored = json.loads(path.read_text())
    del stored["pseudo_labels"]
    path.write_text(json.dumps(stored))
    assert load_run(run.path).config == SMALL
    assert (
        len(fit(pictures(), dataclasses.replace(SMALL, epochs=3), run.path, progress=False).metrics)
        == 3
    )


def test_a_misspelt_setting_is_named():
    with pytest.raises(ValueError, match="one of clusters, index, shuffled, got 'random'"):
        TrainConfig("p4m", pseudo_labels="random")
