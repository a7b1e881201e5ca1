"""The arms are what they say, and the state of their runs is told."""

import dataclasses
import re

import numpy as np
import pytest

from lib import paths
from lib.deepcluster import fit
from lib.models import BACKBONES
from lib.notebooks import read_preset
from lib.study import arms
from lib.study.arms import ARMS, GROUPS, choose_arms, finished, state, train_config

SMOKE = read_preset("smoke")
TINY = SMOKE | {"alexnet_width": [4, 4, 4, 4, 4, 8], "p4m_width": [1, 2, 4], "n_clusters": 4}
TINY |= {"pca_dim": 4, "epochs": 2, "batch_size": 32}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_arms_are_matched_but_for_what_they_change():
    reference = train_config("p4m", SMOKE, 3)
    for arm in GROUPS["all"]:
        config = train_config(arm, SMOKE, 3)
        changed = {name for name, _ in ARMS[arm].changes}
        for name in set(arms.MATCHED) - changed - {"data"} | {"seed"}:
            assert getattr(config, name) == getattr(reference, name), (arm, name)
        assert config.epochs == (0 if arm.endswith("-untrained") else SMOKE["epochs"])
        wanted = next((k for k in ("index", "shuffled") if arm.endswith(k)), "clusters")
        assert config.pseudo_labels == wanted
        turned = arm.endswith("-rotation") or (arm.startswith("alexnet") and arm != "alexnet-plain")
        assert config.rotation_degrees == (SMOKE["rotation_degrees"] if turned else 0)
    named = (*GROUPS["arms"], *GROUPS["beyond"])
    assert {ARMS[arm].backbone for arm in named} == set(BACKBONES)


def test_each_arm_has_a_look_of_its_own():
    assert len({arm.title for arm in ARMS.values()}) == len(ARMS)
    assert len({arm.colour for arm in ARMS.values()}) == len(ARMS)
    assert all(re.fullmatch("#[0-9A-F]{6}", arm.colour) for arm in ARMS.values())


@pytest.mark.parametrize(
    ("ending", "change"),
    [
        ("linear", {"head": "linear"}),
        ("running", {"bn_statistics": "running"}),
        ("untrained", {"epochs": 0}),
    ],
)
def test_variants_and_untrained_arms_change_one_thing(ending, change):
    main = {ARMS[arm].backbone for arm in GROUPS["arms"]}
    for backbone in main if ending == "untrained" else ("alexnet", "p4m"):
        plain = train_config(backbone, SMOKE, 0)
        changed = train_config(f"{backbone}-{ending}", SMOKE, 0)
        assert changed == dataclasses.replace(plain, **change)


def test_published_arms_follow_the_published_code():
    p4m, alexnet = (train_config(arm, SMOKE, 0) for arm in ("p4m-published", "alexnet-published"))
    assert (p4m.pseudo_labels, p4m.pca_dim, p4m.weight_decay) == ("index", 128, 1e-4)
    assert (alexnet.pca_dim, alexnet.weight_decay) == (64, 1e-5)
    assert {(c.head, c.bn_statistics) for c in (p4m, alexnet)} == {("linear", "running")}


def test_choose_arms():
    assert choose_arms("p4m,alexnet") == ["alexnet", "p4m"]
    assert choose_arms("published,p4m") == ["p4m", "alexnet-published", "p4m-published"]
    assert choose_arms("all") == list(GROUPS["all"])
    for bad in ("resnet", "", "pixels", "p4m,"):
        with pytest.raises(ValueError, match="choose from alexnet, p4m"):
            choose_arms(bad)
    for bad in ("p5", "random"):
        with pytest.raises(ValueError, match="is unknown"):
            train_config(bad, SMOKE, 0)


def test_cost_counts_the_definition():
    found = arms.cost("alexnet", 4, (2, 3, 3, 3, 3, 5))
    assert found["feature_dim"] == 5
    assert found["flops"] > 0
    assert arms.cost("p4m", 4, (2, 2, 2))["flops"] > arms.cost("p4", 4, (2, 2, 2))["flops"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_DATA_DIR", str(tmp_path))


def train(arm, seed=0, **changes):
    """A run on 32 pictures; returns its folder."""
    images = np.random.default_rng(0).integers(0, 256, (32, 64, 64), dtype=np.uint8)
    config = dataclasses.replace(train_config(arm, TINY, seed, "cpu"), **changes)
    return fit(images, config, paths.run_dir("tiny", arm, seed), progress=False).path


def test_every_setting_of_a_preset_reaches_the_runs_of_a_study():
    given = {"clusterer": "graph", "head": "linear", "bn_statistics": "running"}
    config = dataclasses.asdict(train_config("p4m", TINY | given, 0))
    assert given.items() <= config.items()


def test_states_and_what_is_missing():
    for arm, seed in (("p4m", 0), ("p4m", 1), ("p4m-untrained", 0)):
        train(arm, seed)
    config = train_config("p4m", TINY, 0)
    assert state("tiny", "p4m", config) == "done"
    assert state("tiny", "p4m", dataclasses.replace(config, epochs=9)) == "epoch 2 of 9"
    assert state("tiny", "p4m", dataclasses.replace(config, lr=1.0)) == "other settings"
    log = arms.log_path("tiny", "p4", 1)
    log.parent.mkdir(parents=True)
    log.write_text("some line\nerror: out of luck\n\n")
    table = arms.status("tiny", TINY, ["p4m", "p4"], [0, 1])
    assert table.loc["p4m"].tolist() == ["done", "done"]
    assert table.loc["p4"].tolist() == ["missing", "failed: out of luck"]
    found = arms.missing_runs("tiny", TINY, ["p4m", "p4m-untrained", "p4"], [0, 1])
    assert found == [("p4", 0), ("p4m-untrained", 1), ("p4", 1)]


def test_runs_that_are_not_matched_are_left_out_and_named():
    for arm, seed in (("p4m", 0), ("p4m", 1), ("p4m-untrained", 0), ("p4m-linear", 0)):
        train(arm, seed)
    train("p4", epochs=1, pca_dim=3)
    for seed, text in {4: '{"epochs": 3}', 5: "{"}.items():
        broken = paths.run_dir("tiny", "p4", seed) / "config.json"
        broken.parent.mkdir(parents=True)
        broken.write_text(text)
    found, left_out = finished("tiny")
    assert set(found) == {"p4m", "p4m-untrained", "p4m-linear"}
    assert list(found["p4m"]) == [0, 1]
    assert left_out == [
        "p4 seed 4: not finished",
        "p4 seed 5: not finished",
        "p4 seed 0: other pca_dim, epochs than p4m seed 0",
    ]
    assert state("tiny", "p4", train_config("p4", TINY, 4)) == "other settings"  # or none
    with pytest.raises(FileNotFoundError, match="no finished run"):
        finished("nothing")


def test_a_study_without_the_two_main_arms_is_compared_with_what_it_has():
    run = train("cnn_flops-untrained", 2)
    assert finished("tiny") == ({"cnn_flops-untrained": {2: run}}, [])
