"""The arms of the study: what each is, how it is named and drawn, and how far its runs are."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib import paths
from lib.models import IMAGE_SIZE, build
from lib.runs import TrainConfig, is_complete


@dataclass(frozen=True)
class Arm:
    """One arm of the study: how it is drawn in all figures, and what differs from the preset.

    `backbone` is a key of ``lib.models.BACKBONES``, empty for a baseline. With `rotation` the arm
    trains on images turned by the preset's ``rotation_degrees``; `untrained` is no epoch. `kind` is
    arm, variant, control, published (follows the published code and need not match the others),
    beyond (what the page leaves for later), grouped (the same, but `lib.deepcluster.fit` needs
    groups, which a study does not give) or baseline. `changes` are other fields of ``TrainConfig``.
    """

    title: str
    colour: str
    marker: str
    backbone: str = ""
    rotation: bool = False
    pseudo_labels: str = "clusters"
    untrained: bool = False
    kind: str = "arm"
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def line(self) -> dict[str, str]:
        """The look of its lines, for matplotlib."""
        return {"color": self.colour, "marker": self.marker}

    @property
    def heading(self) -> str:
        """The title on two lines, for a narrow panel."""
        return self.title.replace(", ", "\n", 1)


# Okabe and Ito's colours (2008), a hue per backbone; what is derived is lighter or darker
# fmt: off
_MAIN = {
    "alexnet": Arm("AlexNet, rotation augmentation", "#0072B2", "o", "alexnet", True),
    "p4m": Arm("P4M, no augmentation", "#D55E00", "s", "p4m"),
    "alexnet-plain": Arm("AlexNet, no augmentation", "#56B4E9", "v", "alexnet"),
    "p4m-rotation": Arm("P4M, rotation augmentation", "#8C3D00", "D", "p4m", True),
    "p4": Arm("P4, no augmentation", "#CC79A7", "^", "p4"),
    "cnn_params": Arm("plain CNN, P4M's parameters", "#009E73", "P", "cnn_params"),
    "cnn_params-rotation":
        Arm("plain CNN, P4M's parameters, rotation", "#00523C", "X", "cnn_params", True),
    "cnn_flops": Arm("plain CNN, P4M's FLOPs", "#E69F00", "<", "cnn_flops"),
    "cnn_flops-rotation":
        Arm("plain CNN, P4M's FLOPs, rotation", "#8A6000", ">", "cnn_flops", True),
}


def _like(
    main: str, words: str, colour: str, kind: str = "control", changes: Any = (), **differs: Any
) -> Arm:
    """An arm that is like another but for `differs`, and for `changes` of ``TrainConfig``."""
    title = re.sub(", (rotation|no) augmentation$", "", _MAIN[main].title) + f", {words}"
    changes = tuple(dict(changes).items())
    return replace(_MAIN[main], title=title, colour=colour, kind=kind, changes=changes, **differs)


_LINEAR, _RUNNING = {"head": "linear"}, {"bn_statistics": "running"}
ARMS: dict[str, Arm] = _MAIN | {
    "alexnet-linear": _like("alexnet", "linear head", "#3C5A99", "variant", _LINEAR),
    "p4m-linear": _like("p4m", "linear head", "#B5381D", "variant", _LINEAR),
    "alexnet-running": _like("alexnet", "running statistics", "#4A86B8", "variant", _RUNNING),
    "p4m-running": _like("p4m", "running statistics", "#E07B45", "variant", _RUNNING),
    "alexnet-described":
        _like("alexnet", "as described", "#27408B", "variant", _LINEAR | _RUNNING),
    "p4m-described": _like("p4m", "as described", "#A0301A", "variant", _LINEAR | _RUNNING),
    "alexnet-untrained": _like("alexnet", "untrained", "#7FB8D8", untrained=True),
    "p4m-untrained": _like("p4m", "untrained", "#EAAE7F", untrained=True),
    "p4-untrained": _like("p4", "untrained", "#E5BCD3", untrained=True),
    "cnn_params-untrained": _like("cnn_params", "untrained", "#7FCEB9", untrained=True),
    "cnn_flops-untrained": _like("cnn_flops", "untrained", "#F2CF7F", untrained=True),
    "alexnet-index": _like("alexnet", "labels index mod K", "#4D9CC9", pseudo_labels="index"),
    "p4m-index": _like("p4m", "labels index mod K", "#E28E4D", pseudo_labels="index"),
    "alexnet-shuffled": _like("alexnet", "shuffled labels", "#99C6E0", pseudo_labels="shuffled"),
    "p4m-shuffled": _like("p4m", "shuffled labels", "#EEBF99", pseudo_labels="shuffled"),
    # the document on deviations says what of the published code these follow, and what not
    "alexnet-published": _like(
        "alexnet", "after the published code", "#00446B", "published",
        {"pca_dim": 64, "weight_decay": 1e-5, **_LINEAR, **_RUNNING}, pseudo_labels="shuffled"),
    "p4m-published": _like(
        "p4m", "after the published code", "#803800", "published",
        {"pca_dim": 128, "weight_decay": 1e-4, **_LINEAR, **_RUNNING}, pseudo_labels="index"),
    "p4m-centroids":
        _like("p4m", "centroids as weights", "#1B7837", "beyond", {"head": "centroids"}),
    "p4m-sinkhorn": _like("p4m", "balanced cells", "#762A83", "beyond", {"clusterer": "sinkhorn"}),
    "p4m-committee":
        _like("p4m", "consensus of five K-means", "#2166AC", "beyond", {"clusterer": "consensus"}),
    "p4m-vote":
        _like("p4m", "vote of three epochs", "#B2182B", "beyond", pseudo_labels="consensus"),
    "p4m-minibatch": _like("p4m", "mini-batch", "#5AAE61", "beyond", {"clusterer": "minibatch"}),
    "p4m-hierarchical":
        _like("p4m", "hierarchical", "#9970AB", "beyond", {"clusterer": "hierarchical"}),
    "p4m-graph": _like("p4m", "graph of neighbours", "#4393C3", "beyond", {"clusterer": "graph"}),
    "p4_params": Arm("P4, P4M's parameters", "#C51B7D", "^", "p4_params", kind="beyond"),
    "mirror": Arm("mirror alone, P4M's parameters", "#01665E", "d", "mirror", kind="beyond"),
    "p4m-given": _like("p4m", "labels given", "#8C510A", "grouped", pseudo_labels="given"),
    "p4m-refined":
        _like("p4m", "labels given at the start", "#BF812D", "grouped", pseudo_labels="refined"),
    "p4m-patients":
        _like("p4m", "a patient's films alike", "#35978F", "grouped", pseudo_labels="patients"),
    "pixels": Arm("raw pixels, PCA", "#000000", "*", kind="baseline"),
    "metadata": Arm("view, sex and age, no image", "#5E4FA2", "p", kind="baseline"),
    "gaussian": Arm("Gaussian points, no image", "#BBBBBB", "1", kind="baseline"),
    "random": Arm("random assignments", "#999999", ".", kind="baseline"),
    "given": Arm("given embeddings", "#332288", "h", kind="baseline"),
    "guess": Arm("guess: how frequent each finding is", "#767676", "d", kind="baseline"),
}
# fmt: on
_KINDS = {"arms": "arm", "variants": "variant", "controls": "control", "published": "published"}
_KINDS |= {"beyond": "beyond"}
UNTRAINABLE = ("baseline", "grouped")  # kinds of arms that a study cannot train
GROUPS = {"all": tuple(n for n, a in ARMS.items() if a.kind in ("arm", "variant", "control"))} | {
    group: tuple(name for name, arm in ARMS.items() if arm.kind == kind)
    for group, kind in _KINDS.items()
}
PRESET = ("epochs", "n_clusters", "pca_dim", "batch_size", "lr", "weight_decay")
PRESET += ("clusterer", "head", "bn_statistics")
MATCHED = (*PRESET[1:], "data")  # what runs must agree in to be compared, but for an arm's changes


def _unknown(name: str) -> ValueError:
    names = [n for n, arm in ARMS.items() if arm.kind not in UNTRAINABLE]
    names = ", ".join([*names, *GROUPS])
    return ValueError(f"arm {name!r} is unknown; choose from {names}")


def choose_arms(names: str) -> list[str]:
    """``"p4m,published"`` -> arms in the order of `ARMS`; ValueError for an unknown one."""
    chosen: set[str] = set()
    for name in names.split(","):
        if name not in GROUPS and (name not in ARMS or ARMS[name].kind in UNTRAINABLE):
            raise _unknown(name)
        chosen |= set(GROUPS.get(name, (name,)))
    return [name for name in ARMS if name in chosen]


def train_config(
    arm: str, preset: Mapping[str, Any], seed: int, device: str | None = None
) -> TrainConfig:
    """Settings of an arm: those of a preset (see ``notebooks/params/``), with what `ARMS` changes.

    ValueError for an unknown arm, or a value that ``TrainConfig`` refuses."""
    if arm not in ARMS or not ARMS[arm].backbone:
        raise _unknown(arm)
    chosen = ARMS[arm]
    width = "alexnet_width" if chosen.backbone == "alexnet" else "p4m_width"
    settings = {name: preset[name] for name in PRESET}
    settings |= {"backbone": chosen.backbone, "width": tuple(preset[width]), "seed": seed}
    settings |= {"epochs": 0} if chosen.untrained else {}
    settings["rotation_degrees"] = float(preset["rotation_degrees"]) if chosen.rotation else 0.0
    settings["pseudo_labels"] = chosen.pseudo_labels
    settings["device"] = device or preset.get("device", "auto")
    return TrainConfig(**(settings | dict(chosen.changes)))


def cost(backbone: str, n_clusters: int, width: Sequence[int] | None = None) -> dict[str, int]:
    """What a network costs: ``parameters`` without the top layer, ``feature_dim`` D and ``flops``.

    FLOPs are those of the features of one image, forward, two per multiplication and addition
    (PyTorch's ``FlopCounterMode``), and on every device those of dense group convolutions."""
    model = build(backbone, n_clusters, width).eval()
    for module in model.modules():
        if hasattr(module, "algorithm"):  # of a group convolution
            module.algorithm = "dense"
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.features(torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE))
    found = {"parameters": sum(p.numel() for p in model.body_parameters())}
    return found | {"feature_dim": model.feature_dim, "flops": int(counter.get_total_flops())}


def log_path(dataset: str, arm: str, seed: int) -> Path:
    """Where the process that trains a run writes its output."""
    return paths.runs_dir(dataset) / "logs" / f"{arm}-seed{seed}.log"


def state(dataset: str, arm: str, config: TrainConfig) -> str:
    """A run is ``done``, ``epoch 3 of 10``, ``other settings``, ``failed: <why>``, ``missing``."""
    folder = paths.run_dir(dataset, arm, config.seed)
    begun = (folder / "config.json").exists()
    if begun:
        stored = paths.load_json(folder / "config.json")
        wanted = dataclasses.asdict(config) | {"width": list(config.width or ())}
        if any(stored.get(k) != v for k, v in wanted.items() if k not in ("device", "epochs")):
            return "other settings"
        if is_complete(folder, config):
            return "done"
    log = log_path(dataset, arm, config.seed)
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    last = said.rstrip().rsplit("\n", 1)[-1]
    if last.startswith("error: "):
        return f"failed: {last.removeprefix('error: ')}"
    if begun and (folder / "metrics.csv").exists():
        return f"epoch {len(pd.read_csv(folder / 'metrics.csv'))} of {config.epochs}"
    return "missing"


def status(
    dataset: str, preset: Mapping[str, Any], arms: Sequence[str], seeds: Sequence[int]
) -> pd.DataFrame:
    """`state` of every run of a study: one row per arm, one column per seed."""
    configs = {(arm, s): train_config(arm, preset, s) for s in seeds for arm in arms}
    states = {run: state(dataset, run[0], config) for run, config in configs.items()}
    return pd.Series(states).unstack(sort=False)


def missing_runs(
    dataset: str, preset: Mapping[str, Any], arms: Sequence[str], seeds: Sequence[int]
) -> list[tuple[str, int]]:
    """Arm and seed of each run that is not done, seed by seed: a stopped study can be compared."""
    table = status(dataset, preset, arms, seeds)
    return [(arm, seed) for seed in table for arm in table.index if table.at[arm, seed] != "done"]


def _complete(folder: Path) -> dict[str, Any] | None:
    """Settings of a finished run; None if it is not finished or a file is broken."""
    try:
        config = paths.load_json(folder / "config.json")
        done = is_kept(folder) or is_complete(folder, SimpleNamespace(epochs=config["epochs"]))
        return config if done else None
    except (OSError, ValueError, KeyError):
        return None


def kept_dir(dataset: str) -> Path:
    """``figures/<dataset>/runs``: settings and numbers of runs, without networks and features."""
    return paths.figures_dir(dataset) / "runs"


def is_kept(folder: Path) -> bool:
    """Whether only the settings and numbers of a run are in its folder."""
    return folder.is_relative_to(paths.figures_root()) and (folder / "measures.json").exists()


def config_of(folder: Path) -> TrainConfig:
    """Settings of a run."""
    stored = paths.load_json(folder / "config.json")
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    return TrainConfig(**{name: stored[name] for name in names if name in stored})


def finished(dataset: str) -> tuple[dict[str, dict[int, Path]], list[str]]:
    """The finished or kept runs of a dataset that can be compared (arm -> seed -> folder, in the
    order of `ARMS`), and one line per run that is left out, with the reason.

    Runs are compared with the first finished one of P4M or AlexNet, or of any arm if these have
    none. They must agree in `MATCHED`, and in the number of epochs unless they are untrained; all
    but AlexNets must agree in width, and so must AlexNets. Published arms need not agree.
    FileNotFoundError if no run is finished."""
    roots, left_out = (paths.runs_dir(dataset), kept_dir(dataset)), []
    stored: dict[tuple[str, int], tuple[Path, dict[str, Any]]] = {}
    for arm in ARMS:
        files = (file for root in roots for file in (root / arm).glob("seed*/config.json"))
        found = [(int(f.parent.name[4:]), f.parent) for f in files if f.parent.name[4:].isdecimal()]
        for seed, folder in sorted(found, key=lambda pair: pair[0]):
            if (arm, seed) not in stored and (config := _complete(folder)):
                stored[arm, seed] = folder, config
        absent = sorted({seed for seed, _ in found if (arm, seed) not in stored})
        left_out += [f"{arm} seed {seed}: not finished" for seed in absent]
    if not stored:
        where = paths.show(roots[0])
        raise FileNotFoundError(f"{where} holds no finished run: run 02_train_alexnet first")
    first = min(stored, key=lambda run: ("p4m", "alexnet", *ARMS).index(run[0]))
    fixed, widths, runs = stored[first][1], {}, {}
    for (arm, seed), (folder, config) in stored.items():
        known = ARMS[arm]
        compared = [n for n in MATCHED if n not in dict(known.changes)]
        compared += [] if known.untrained else ["epochs"]
        differ = [n for n in compared if config.get(n) != fixed.get(n)]
        if config["width"] != widths.setdefault(known.backbone == "alexnet", config["width"]):
            differ.append("width")
        if differ and known.kind != "published":
            than = f"{first[0]} seed {first[1]}"
            left_out.append(f"{arm} seed {seed}: other {', '.join(differ)} than {than}")
        else:
            runs.setdefault(arm, {})[seed] = folder
    return runs, left_out
