"""The arms are what they say, a failed run stops no other, what is missing is told, and a study
ends in numbers that can be compared.
"""

import dataclasses
import json
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import yaml

from lib import data, paths
from lib.deepcluster import fit
from lib.models import BACKBONES, cost
from lib.plots import claims as plots_claims
from lib.study import arms as study
from lib.study import claims
from lib.study import measure as measures
from lib.study.arms import ARMS, GROUPS, choose_arms, fan_out, finished, state, train_config

SMOKE = yaml.safe_load(
    (paths.ROOT / "notebooks" / "params" / "smoke.yaml").read_text(encoding="utf-8")
)
TINY = {
    **SMOKE,
    "alexnet_width": [4, 4, 4, 4, 4, 8],
    "p4m_width": [1, 2, 4],
    "n_clusters": 4,
    "pca_dim": 4,
    "n_phantoms": 64,
    "epochs": 3,
}
EFFORT = measures.Effort(
    n_turned=16, n_moved=40, n_map=40, perplexities=(5,), map_seeds=(0,), n_neighbors=5
)


def test_arms_are_matched_but_for_what_their_name_says():
    fields = (
        "n_clusters",
        "pca_dim",
        "batch_size",
        "lr",
        "weight_decay",
        "reset_top_layer",
        "uniform_sampling",
        "seed",
    )
    reference = train_config("p4m", SMOKE, 3)
    for arm in GROUPS["all"]:
        config = train_config(arm, SMOKE, 3)
        assert all(getattr(config, name) == getattr(reference, name) for name in fields)
        assert config.epochs == (0 if arm.endswith("-untrained") else SMOKE["epochs"])
        assert config.pseudo_labels == next(
            (k for k in ("index", "shuffled") if arm.endswith(k)), "clusters"
        )
        turned = arm.endswith("-rotation") or (arm.startswith("alexnet") and arm != "alexnet-plain")
        assert config.rotation_degrees == (SMOKE["rotation_degrees"] if turned else 0)
        assert ARMS[arm].title
    assert {ARMS[arm].backbone for arm in GROUPS["arms"]} == set(BACKBONES)


def test_preset_arms_are_those_that_the_notebooks_train():
    """02 and 03 make `alexnet` and `p4m`, 04 the untrained ones: the study must not call them other
    runs.
    """
    for arm, rotation in (("alexnet", SMOKE["rotation_degrees"]), ("p4m", 0.0)):
        config = train_config(arm, SMOKE, 0)
        assert config.rotation_degrees == rotation
        assert train_config(f"{arm}-untrained", SMOKE, 0) == dataclasses.replace(config, epochs=0)


def test_published_arms_follow_the_published_code():
    p4m, alexnet = (train_config(arm, SMOKE, 0) for arm in ("p4m-published", "alexnet-published"))
    assert (p4m.pseudo_labels, p4m.pca_dim, p4m.weight_decay, p4m.rotation_degrees) == (
        "index",
        128,
        1e-4,
        0,
    )
    assert (alexnet.pca_dim, alexnet.weight_decay) == (64, 1e-5)
    text = (paths.ROOT / "DEVIATIONS.md").read_text(encoding="utf-8")
    assert all(f"`{arm}`" in text for arm in GROUPS["published"])


def test_choose_arms():
    assert choose_arms("p4m,alexnet") == ["alexnet", "p4m"]
    assert choose_arms("published,p4m") == ["p4m", "alexnet-published", "p4m-published"]
    assert len(choose_arms("all")) == len(GROUPS["arms"]) + len(GROUPS["controls"])
    for bad in ("resnet", "", ","):
        with pytest.raises(ValueError, match="choose from alexnet, p4m"):
            choose_arms(bad)
    with pytest.raises(ValueError, match="'p5' is unknown"):
        train_config("p5", SMOKE, 0)


def test_one_failure_stops_no_other_and_no_more_run_than_asked(tmp_path):
    program = "import sys, time, pathlib; pathlib.Path(sys.argv[1]).touch(); time.sleep(0.3); pathlib.Path(sys.argv[1]).unlink(); "
    commands = {
        name: (
            [sys.executable, "-c", program + ending, str(tmp_path / f"{name}.runs")],
            tmp_path / "logs" / f"{name}.log",
        )
        for name, ending in (
            ("a", "print('fine')"),
            ("b", "sys.exit('error: broken')"),
            ("c", "print('fine')"),
        )
    }
    most, ended = [], []

    def on_end(name, status, seconds):
        ended.append((name, status))
        most.append(len(list(tmp_path.glob("*.runs"))))

    assert fan_out(commands, 2, {}, on_end) == ["b"]
    assert sorted(name for name, _ in ended) == ["a", "b", "c"]
    assert max(most) <= 1  # beside the one that has just ended
    assert (tmp_path / "logs" / "b.log").read_text().strip() == "error: broken"


def test_nothing_runs_on_when_it_is_left(tmp_path):
    commands = {
        "quick": ([sys.executable, "-c", ""], tmp_path / "quick.log"),
        "slow": ([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "slow.log"),
    }
    started = []
    popen = subprocess.Popen

    def spy(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    def leave(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", spy)
        with pytest.raises(KeyboardInterrupt):
            fan_out(commands, 2, {}, leave)
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A study of five arms on 64 phantoms, two seeds."""
    folder = tmp_path_factory.mktemp("study")
    patch = pytest.MonkeyPatch()
    patch.setenv("CXR_DATA_DIR", str(folder / "data"))
    patch.setenv("CXR_FIGURES_DIR", str(folder / "figures"))
    study.prepare("tiny", "phantom", TINY["n_phantoms"], 0)
    images, metadata = data.load(paths.dataset_dir("tiny"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # such small networks collapse
        for arm in ("alexnet", "p4m", "p4m-untrained", "p4m-index", "cnn_params"):
            for seed in (0, 1):
                fit(
                    images,
                    train_config(arm, TINY, seed, "cpu"),
                    paths.run_dir("tiny", arm, seed),
                    progress=False,
                )
    yield images, metadata
    patch.undo()


def test_states(ran):
    config = train_config("p4m", TINY, 0)
    assert state("tiny", "p4m", config) == "done"
    assert state("tiny", "p4", train_config("p4", TINY, 0)) == "missing"
    assert state("tiny", "p4m", dataclasses.replace(config, epochs=9)) == "epoch 3 of 9"
    assert state("tiny", "p4m", dataclasses.replace(config, lr=1.0)) == "other settings"
    log = study.log_path("tiny", "p4", 1)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("some line\nerror: ValueError: out of luck\n")
    assert state("tiny", "p4", train_config("p4", TINY, 1)) == "failed: ValueError: out of luck"
    table = study.status_markdown(study.status("tiny", TINY, ["p4m", "p4"], [0, 1]))
    assert table.splitlines()[2:] == [
        "| p4m | done | done |",
        "| p4 | missing | failed: ValueError: out of luck |",
    ]
    log.unlink()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_runs_that_are_not_matched_are_left_out_and_named(ran):
    images, _ = ran
    folder = paths.run_dir("tiny", "p4", 0)
    fit(
        images,
        dataclasses.replace(train_config("p4", TINY, 0, "cpu"), epochs=1, pca_dim=3),
        folder,
        progress=False,
    )
    (paths.run_dir("tiny", "p4", 5)).mkdir(parents=True)
    (paths.run_dir("tiny", "p4", 5) / "config.json").write_text(json.dumps({"epochs": 3}))
    found, left_out = finished("tiny")
    assert "p4" not in found
    assert left_out == [
        "p4 seed 5: not finished",
        "p4 seed 0: other pca_dim, epochs than p4m seed0",
    ]
    assert set(found) == {"alexnet", "p4m", "p4m-untrained", "p4m-index", "cnn_params"}
    with pytest.raises(FileNotFoundError, match="02_train_alexnet and 03_train_p4m"):
        finished("nothing")


@pytest.mark.filterwarnings("ignore")
def test_from_runs_to_claims_and_figures(ran):
    images, metadata = ran
    found = study.gather("tiny", images, metadata, jobs=1, effort=EFFORT)
    assert set(found.values) == {
        "alexnet",
        "p4m",
        "p4m-untrained",
        "p4m-index",
        "cnn_params",
        "pixels",
        "random",
    }
    assert all(set(by_seed) == {0, 1} for by_seed in found.values.values())
    p4m, index, pixels, chance = (
        found.values[arm][0] for arm in ("p4m", "p4m-index", "pixels", "random")
    )
    # what must hold by construction
    assert p4m["kept_lattice"] == 1
    assert p4m["distance_lattice"] < 1e-3
    assert p4m["tells_mirrored"] == p4m["tells_upside_down"] == 0.5
    assert found.values["alexnet"][0]["kept_lattice"] < 1
    assert "nmi_sd" not in pixels
    assert "auroc_macro" in pixels
    assert "auroc_macro" not in chance
    assert abs(chance["ami_final"]) < 0.1
    assert p4m["auroc_macro_prevalence"] == 0.5
    assert p4m["auroc_micro_prevalence"] > 0.5
    assert 2 <= index["converged_nmi"] <= 4
    assert found.arms["p4m"]["parameters"] == cost("p4m", 4, (1, 2, 4))["parameters"]
    assert found.arms["p4m-index"]["pseudo_labels"] == "index"
    assert found.arms["p4m-untrained"]["pseudo_labels"] == "nothing"
    assert any(line.startswith("cnn_flops: no finished run") for line in found.missing)
    # what was measured is kept: reading it again computes nothing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "_measure", None)
        again = study.gather("tiny", images, metadata, jobs=1, effort=EFFORT)
    assert again.values == found.values
    head = {
        "dataset": "tiny",
        "dataset_label": "synthetic phantom, 64 images",
        "attribution": "None.",
        "n_images": 64,
        "n_patients": 20,
    }
    head |= {"n_test": 12, "n_clusters": 4, "epochs": 3}
    targets, patients = data.finding_matrix(metadata["findings"]), metadata["patient_id"].to_numpy()
    result = claims.assemble(
        head,
        found.arms,
        found.values,
        {},
        found.missing,
        found.scores,
        targets,
        patients,
        n_boot=20,
    )
    pairs = [(c["treatment"], c["reference"]) for c in result["comparisons"]]
    assert pairs == [
        ("p4m", "alexnet"),
        ("p4m", "cnn_params"),
        ("p4m", "p4m-untrained"),
        ("p4m", "p4m-index"),
    ]
    assert {v["verdict"] for c in result["comparisons"] for v in c["verdicts"]} == {"undecided"}
    auroc = next(e for e in result["comparisons"][0]["measures"] if e["measure"] == "auroc_macro")
    assert auroc["patient_se"] > 0
    assert plots_claims.forest(result).axes
    assert study.trained_on_turned("tiny") == {}


def test_turned_phantoms_are_the_same_scenes(ran):
    images, metadata = ran
    turned = measures.turned_phantoms("tiny", images)
    assert turned.shape == images.shape
    assert not np.array_equal(turned, images)
    again = images.copy()
    again[0] = 0
    assert measures.turned_phantoms("tiny", again) is None
    study.prepare("tiny-any", "phantom", 64, 0, "any")
    hung, table = data.load(paths.dataset_dir("tiny-any"))
    assert np.array_equal(hung, turned)
    assert (table["angle"] > 0).any()
    assert (table["image_id"] == metadata["image_id"]).all()
    assert measures.turned_phantoms("tiny-any", hung) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "big"], "unknown --preset 'big'; valid: paper, quick, smoke, study"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--seeds", "0,0"], "is not a list of different whole numbers"),
        (["--seeds", "a"], "--seeds 'a' is not a list"),
        (["--arms", "p5"], "arm 'p5' is unknown; choose from alexnet, p4m"),
        (["--dataset", "a/b"], "cannot name a dataset"),
        (["--data", "nowhere"], "--data 'nowhere' is not there; valid: phantom, chestmnist"),
        (["--data", "tests", "--orientation", "any"], "--orientation any is for phantoms"),
        (["--jbos", "2"], "--jbos"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(paths.ROOT)
    assert study.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_claims_name_the_command_and_no_path(tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "my films").mkdir()
    given = study._arguments(
        ["--data", str(tmp_path / "my films"), "--seeds", "0,2", "--jobs", "2"]
    )
    command, _ = study._claims_command(given, paths.ROOT / "notebooks" / "params" / "quick.yaml")
    told = json.loads(command[command.index("-y") + 1])
    assert told == {
        "dataset": "my-films",
        "jobs": 2,
        "command": "./run_all.sh --study --preset quick --data PATH/my films --seeds 0,2",
    }
    assert (paths.ROOT / "notebooks" / "06_claims.ipynb").exists()


def test_the_command_trains_what_is_missing_and_tells_failures(tmp_path, monkeypatch, capsys):
    """In earnest, with the smoke preset: one run that works beside one that cannot, then a second
    call.
    """
    monkeypatch.setenv("CXR_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("CXR_FIGURES_DIR", str(tmp_path / "figures"))
    path = paths.run_dir("phantom-smoke", "p4-untrained", 0) / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"backbone": "p4", "lr": 5}))
    options = ["--preset", "smoke", "--seeds", "0", "--no-claims", "--device", "cpu"]
    assert study.main([*options, "--jobs", "2", "--arms", "p4m-untrained,p4-untrained"]) == 1
    told = capsys.readouterr().out
    assert "phantom-smoke, preset smoke: 2 runs, 0 done; 2 at a time" in told
    assert "| p4m-untrained | done |" in told
    assert (
        "p4-untrained seed 0 failed, see data/runs/phantom-smoke/logs/p4-untrained-seed0.log"
        in told
    )
    assert (
        study.log_path("phantom-smoke", "p4-untrained", 0)
        .read_text()
        .splitlines()[-1]
        .startswith("error: RunMismatchError:")
    )
    assert (paths.run_dir("phantom-smoke", "p4m-untrained", 0) / measures.NAME).exists()
    assert study.main([*options, "--arms", "p4m-untrained"]) == 0
    assert "1 runs, 1 done" in capsys.readouterr().out
    assert study.main([*options, "--arms", "p4m-untrained,p4-untrained", "--status"]) == 0
    assert "| p4-untrained | other settings |" in capsys.readouterr().out


def test_manifest_lists_image_ids_and_names_the_provider():
    folder = paths.ROOT / "data" / "manifests"
    header, *names = (folder / "nih-sample.csv").read_text(encoding="utf-8").splitlines()
    assert header == "image_id"
    assert len(names) == 1617
    assert names == sorted(set(names))
    assert all(re.fullmatch(r"\d{8}_\d{3}\.png", name) for name in names)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert all(
        part in text
        for part in (
            "NIH Clinical Center",
            "https://nihcc.app.box.com/v/ChestXray-NIHCC",
            "Not for clinical use",
            "1,617",
        )
    )


@pytest.mark.parametrize(
    ("hub", "container", "jobs"),
    [
        ("", "max\n", 4),
        ("2147483648", "max\n", 1),  # Binder
        ("", "3221225472\n", 2),
        ("", "1073741824\n", 1),
        ("", "64000000000\n", 4),
    ],
)
def test_no_more_processes_than_memory_for_them(monkeypatch, tmp_path, hub, container, jobs):
    monkeypatch.setenv("MEM_LIMIT", hub)
    (tmp_path / "memory.max").write_text(container, encoding="ascii")
    assert study.affordable_jobs(4, [str(tmp_path / "memory.max")]) == jobs
