"""Use a finished run again, without training: embed and assign other images, and say whether they
are like what the run has seen.

``load`` reads a run's own folder, or the folder that ``export`` writes for others: weights as
safetensors, settings as JSON, embeddings and assignments as Parquet. ``python -m lib.explore.reuse
--data PATH --reuse RUN`` does it for a folder of X-rays."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import safetensors
import safetensors.torch
import torch
from scipy import stats

from lib import __version__, data, paths
from lib.features import PCAWhiten, extract
from lib.models import IMAGE_SIZE, Backbone, build
from lib.run import UsageError, checked_source, dataset_name
from lib.runs import Run, fingerprint, load_model, load_run
from lib.study import markdown, report

FORMAT = 1
WEIGHTS, CONFIG, ASSIGNMENTS, EMBEDDINGS = (
    "model.safetensors",
    "config.json",
    "assignments.parquet",
    "embeddings.parquet",
)
NOTICE = "Not for clinical use."
LEVEL = 0.01  # a share of far images is called higher than the run's own if chance gives as high a one less often than this
MANY = 0.2  # share of far images from which on they are called unlike the run's; new phantoms of the same kind had 5 %, noise 100 %
QUANTILE = 0.995  # of the run's own images; two measures are held against it, so about 1 % of them are far in one or the other


@dataclass(frozen=True)
class Novelty:
    """How far images lie from what a run has seen.

    The network is the judge: what it has learnt to overlook, or is too small to see, is not far.
    Many far images are a warning; few are no proof that images are of the same kind.

    Attributes
    ----------
    distance : ndarray, shape (M,), float32
        To the image's own centroid in the clustered space, whose points have length 1: 0 to 2.
    spread : ndarray, shape (M,), float32
        Root mean square of the whitened components before they are scaled to length 1: about 1 for
        the images that were clustered. The clustered space does not know it, so that an image far
        off the run's may still lie near a centroid.
    far : ndarray, shape (M,), bool
        Images of which one or the other exceeds the 99.5 % quantile of the run's own images.
    share : float
        Of the images that are far.
    expected : float
        The same of the run's own images. A network fits the images that it was trained on, so that
        others of the same kind may have a somewhat higher share.
    p : float
        Probability of at least as many far images if each is far with probability `expected`
        (binomial, one-sided).
    """

    distance: np.ndarray
    spread: np.ndarray
    far: np.ndarray
    share: float
    expected: float
    p: float

    @property
    def sentence(self) -> str:
        """What the numbers say."""
        n, m = int(self.far.sum()), len(self.far)
        seen = f"{n:,} of {m:,} images ({self.share:.1%}) lie farther off than 99.5 % of the run's own images in one of two measures; "
        seen += f"of those {self.expected:.1%} do."
        if self.p >= LEVEL:
            return f"{seen} As far as this network sees, that is no more than chance may give (p = {self.p:.2g})."
        if self.share < MANY:
            return f"{seen} That is more than chance gives (p = {self.p:.2g}), as it may be for images that no network was trained on."
        return f"{seen} These images are unlike what the run has seen: their clusters say little."


@dataclass(frozen=True)
class Model:
    """A finished run's network, whitening and clusters.

    Attributes
    ----------
    name : str
        Such as ``"phantom/p4m/seed0"``.
    config : dict
        What the run says of itself: backbone, n_clusters, width, seed and the rest of its settings.
    network : Backbone
        In evaluation mode.
    whiten : PCAWhiten
    centroids : ndarray, shape (K, d)
    sizes : ndarray, shape (K,), int
        Images of the run in each cluster.
    limits : dict of str to float
        ``distance``, ``spread``, ``expected``: see `Novelty`.
    device : str
    """

    name: str
    config: dict[str, Any]
    network: Backbone
    whiten: PCAWhiten
    centroids: np.ndarray
    sizes: np.ndarray
    limits: dict[str, float]
    device: str = "cpu"

    def features(self, images: np.ndarray) -> np.ndarray:
        """Features of the network, before PCA: uint8 (M, 64, 64) -> float32 (M, D).

        Raises
        ------
        ValueError
            Another size or type, NaN, or no image; the message quotes what was given.
        """
        return extract(self.network, checked_images(images), device=self.device)

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Images as points of the clustered space: uint8 (M, 64, 64) -> float32 (M, d), each of
        length 1. Errors: see `features`.
        """
        return _unit(self._whitened(images))

    def assign(self, images: np.ndarray) -> np.ndarray:
        """The cluster of each image, the nearest of the run's centroids: uint8 (M, 64, 64) -> int64
        (M,). Errors: see `features`.
        """
        return _nearest(self.embed(images), self.centroids)[0]

    def novelty(self, images: np.ndarray) -> Novelty:
        """How far images lie from what the run has seen: uint8 (M, 64, 64) -> `Novelty`. Errors:
        see `features`.
        """
        return self.look(images)[2]

    def look(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, Novelty]:
        """``embed``, ``assign`` and ``novelty`` in one pass through the network."""
        whitened = self._whitened(images)
        embedding = _unit(whitened)
        assignments, distance = _nearest(embedding, self.centroids)
        spread = _spread(whitened)
        far = (distance > self.limits["distance"]) | (spread > self.limits["spread"])
        expected = self.limits["expected"]
        p = float(stats.binom.sf(far.sum() - 1, len(far), expected))
        return (
            embedding,
            assignments,
            Novelty(distance, spread, far, float(far.mean()), expected, p),
        )

    def _whitened(self, images: np.ndarray) -> np.ndarray:
        return self.whiten.transform(self.features(images))


def checked_images(images: Any) -> np.ndarray:
    """`images` if they are uint8 of shape (M, 64, 64), M >= 1.

    Raises
    ------
    ValueError
        They are not; the message quotes type, shape and value, and says what to do.
    """
    array = images if isinstance(images, np.ndarray) else np.asarray(images)
    wanted = f"images must be uint8 of shape (M, {IMAGE_SIZE}, {IMAGE_SIZE}), gray levels 0 to 255"
    if array.dtype.kind == "f" and array.size and not np.isfinite(array).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(
            f"{wanted}: the value at {place} is {array[place]}; find out where it comes from before you round"
        )
    if array.dtype != np.uint8:
        span = (
            f" from {array.min():g} to {array.max():g}"
            if array.size and array.dtype.kind in "iuf"
            else ""
        )
        raise ValueError(
            f"{wanted}, got {array.dtype}{span}: scale to 0..255, round, and convert with .astype(numpy.uint8)"
        )
    if array.shape == (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"{wanted}, got one image of shape {array.shape}: give images[None]")
    if array.ndim != 3 or array.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"{wanted}, got shape {array.shape}: lib.data.preprocess makes {IMAGE_SIZE} x {IMAGE_SIZE} from files"
        )
    if not len(array):
        raise ValueError(f"{wanted}, got shape {array.shape}, which is no image")
    return array


def _unit(whitened: np.ndarray) -> np.ndarray:
    return (whitened / np.maximum(np.linalg.norm(whitened, axis=1, keepdims=True), 1e-12)).astype(
        np.float32
    )


def _spread(whitened: np.ndarray) -> np.ndarray:
    return np.sqrt((whitened.astype(np.float64) ** 2).mean(axis=1)).astype(np.float32)


def _nearest(embedding: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid (M,), as `lib.runs.assign` finds it, and the distance to it (M,)."""
    place = np.argmin((centroids**2).sum(1) - 2 * embedding @ centroids.T, axis=1)
    return place, np.linalg.norm(embedding - centroids[place], axis=1).astype(np.float32)


def _whiten(mean: np.ndarray, components: np.ndarray, variance: np.ndarray) -> PCAWhiten:
    whiten = PCAWhiten(len(components), l2=False)
    whiten.mean_, whiten.components_, whiten.explained_variance_ = mean, components, variance
    return whiten


def load(run_dir: Path | str, device: str = "cpu") -> Model:
    """Read a finished run, or what `export` made of one.

    Parameters
    ----------
    run_dir : path
        ``data/runs/<dataset>/<arm>/seed<k>``, or a folder that `export` wrote.
    device : str
        Where images are embedded.

    Returns
    -------
    Model

    Raises
    ------
    FileNotFoundError
        There is neither; the message names what is missing.
    ValueError
        A damaged file; the message names it.
    """
    run_dir = Path(run_dir)
    return (
        _load_exported(run_dir, device)
        if (run_dir / WEIGHTS).exists()
        else _load_trained(load_run(run_dir), device)
    )


def _load_trained(run: Run, device: str) -> Model:
    with np.load(run.path / "clustering.npz") as clustering:
        arrays = {
            name: clustering[name]
            for name in ("mean", "components", "explained_variance", "centroids")
        }
    whiten = _whiten(arrays["mean"], arrays["components"], arrays["explained_variance"])
    centroids = arrays["centroids"]
    whitened = whiten.transform(np.asarray(run.features))
    embedding, spread = _unit(whitened), _spread(whitened)
    distance = np.linalg.norm(embedding - centroids[run.final_assignments], axis=1)
    limits = {
        "distance": float(np.quantile(distance, QUANTILE)),
        "spread": float(np.quantile(spread, QUANTILE)),
    }
    # run's own images, counted by the same rule as others; not 0, or one far image among a thousand
    # would be a wonder
    far = (distance > limits["distance"]) | (spread > limits["spread"])
    limits["expected"] = float((far.sum() + 1) / (len(far) + 2))
    sizes = np.bincount(run.final_assignments, minlength=len(centroids))
    name = "/".join(run.path.absolute().parts[-3:])
    config = paths.load_json(run.path / "config.json")
    return Model(name, config, load_model(run, device), whiten, centroids, sizes, limits, device)


def _load_exported(folder: Path, device: str) -> Model:
    config = paths.load_json(folder / CONFIG) if (folder / CONFIG).exists() else None
    if config is None:
        raise FileNotFoundError(
            f"{paths.show(folder)} holds {WEIGHTS} but no {CONFIG}: copy the whole folder that export wrote"
        )
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{paths.show(folder / CONFIG)} is of format {config.get('format')!r}, this code reads {FORMAT}: export again"
        )
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        state = {
            name.removeprefix("network."): value
            for name, value in tensors.items()
            if name.startswith("network.")
        }
        rest = {
            name: tensors[name].numpy()
            for name in ("mean", "components", "explained_variance", "centroids", "sizes")
        }
        settings = config["settings"]
        network = build(
            settings["backbone"], settings["n_clusters"], settings["width"], settings["seed"]
        )
        network.load_state_dict(state)
    except (safetensors.SafetensorError, KeyError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{paths.show(folder / WEIGHTS)} is damaged or not of this project ({reason}): export the run again"
        ) from error
    whiten = _whiten(rest["mean"], rest["components"], rest["explained_variance"])
    network = network.to(device).eval()
    return Model(
        config["run"],
        settings,
        network,
        whiten,
        rest["centroids"],
        rest["sizes"],
        config["novelty"],
        device,
    )


def export(
    run_dir: Path | str, out_dir: Path | str, dataset_dir: Path | str | None = None
) -> list[Path]:
    """Write a finished run for use elsewhere; no pixel, label or patient goes with it.

    Parameters
    ----------
    run_dir : path
        ``data/runs/<dataset>/<arm>/seed<k>``.
    out_dir : path
        Gets ``model.safetensors`` (network, PCA, centroids), ``config.json``,
        ``assignments.parquet`` (image_id, cluster, distance) and ``embeddings.parquet`` (image_id,
        embedding), with attribution and "Not for clinical use" in each.
    dataset_dir : path, optional
        Folder of images.npy, metadata.csv and manifest.json; ``data/<dataset>`` if None.

    Returns
    -------
    list of Path

    Raises
    ------
    FileNotFoundError
        No finished run.
    ValueError
        The images of the dataset are not those that the run clustered, so that their ids are not
        its ids.
    """
    run = load_run(run_dir)
    model = _load_trained(run, "cpu")
    out_dir, dataset = Path(out_dir), run.path.absolute().parent.parent.name
    if out_dir.resolve() == run.path.resolve():
        raise ValueError(f"{paths.show(out_dir)} is the run itself: export to another folder")
    folder = Path(dataset_dir) if dataset_dir is not None else paths.dataset_dir(dataset)
    images, metadata = data.load(folder)
    if fingerprint(images) != model.config["data"]["sha256"]:
        raise ValueError(
            f"{paths.show(folder)} holds other images than {paths.show(run.path)} clustered: name their folder"
        )
    manifest = paths.load_json(folder / "manifest.json")
    label = report.dataset_label(manifest["source"]["kind"], len(images))
    notes = {
        "attribution": manifest["attribution"],
        "notice": NOTICE,
        "dataset": label,
        "run": model.name,
    }

    tensors = {
        f"network.{name}": value.contiguous() for name, value in model.network.state_dict().items()
    }
    whiten = model.whiten
    arrays = {
        "mean": whiten.mean_,
        "components": whiten.components_,
        "explained_variance": whiten.explained_variance_,
    }
    arrays |= {"centroids": model.centroids, "sizes": model.sizes}
    tensors |= {
        name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()
    }
    config = {
        "format": FORMAT,
        **notes,
        "settings": {key: value for key, value in model.config.items() if key != "device"},
        "images": {
            "dtype": "uint8",
            "shape": [IMAGE_SIZE, IMAGE_SIZE],
            "network_input": "x / 127.5 - 1",
        },
        "novelty": model.limits,
        "sizes": model.sizes,
        "versions": {"lib": __version__, "torch": str(torch.__version__)},
    }
    embedding = _unit(whiten.transform(np.asarray(run.features)))
    distance = np.linalg.norm(embedding - model.centroids[run.final_assignments], axis=1)
    ids = pyarrow.array(metadata["image_id"].tolist(), pyarrow.string())
    assignments = {
        "image_id": ids,
        "cluster": pyarrow.array(run.final_assignments, pyarrow.int32()),
        "distance": pyarrow.array(distance, pyarrow.float32()),
    }
    vectors = pyarrow.FixedSizeListArray.from_arrays(
        pyarrow.array(embedding.ravel(), pyarrow.float32()), embedding.shape[1]
    )
    with paths.atomic_write(out_dir / ASSIGNMENTS) as handle:
        _write_parquet(assignments, notes, handle)
    with paths.atomic_write(out_dir / EMBEDDINGS) as handle:
        _write_parquet({"image_id": ids, "embedding": vectors}, notes, handle)
    paths.save_json(out_dir / CONFIG, config)
    with paths.atomic_write(
        out_dir / WEIGHTS
    ) as handle:  # last: its presence says that the folder is whole
        handle.write(safetensors.torch.save(tensors, metadata=notes))
    return [out_dir / name for name in (WEIGHTS, CONFIG, ASSIGNMENTS, EMBEDDINGS)]


def _write_parquet(columns: dict[str, pyarrow.Array], notes: dict[str, str], handle: Any) -> None:
    table = pyarrow.table(columns).replace_schema_metadata(notes)
    pyarrow.parquet.write_table(table, handle, compression="zstd")


def assign_folder(
    source: Path | str, model: Model, out_dir: Path | str, command: str = "", **reading: Any
) -> tuple[pd.DataFrame, Novelty, str]:
    """Assign a folder of X-rays to the clusters of a finished run.

    Parameters
    ----------
    source : path
        Any folder that `lib.data.preprocess` reads.
    model : Model
    out_dir : path
        Gets the preprocessed images in ``images/``, ``assignments.csv``, ``assignments.parquet``
        and ``summary.md``.
    command : str
        Stands in summary.md.
    **reading
        Options of `lib.data.preprocess`: fit, drop_outliers, csv, image_column, label_column.

    Returns
    -------
    table : DataFrame
        ``image_id, cluster, distance, spread, far``, one row an image.
    novelty : Novelty
    text : str
        What summary.md holds.

    Raises
    ------
    ValueError
        What `lib.data.preprocess` raises for folders that it cannot read.
    """
    out_dir = Path(out_dir)
    manifest = data.preprocess(source, out_dir / "images", **reading)
    images, metadata = data.load(out_dir / "images")
    _, assignments, novelty = model.look(images)
    columns = {
        "image_id": metadata["image_id"],
        "cluster": assignments,
        "distance": novelty.distance,
        "spread": novelty.spread,
    }
    table = pd.DataFrame(columns | {"far": novelty.far})
    notes = {"attribution": manifest["attribution"], "notice": NOTICE, "run": model.name}
    with paths.atomic_write(out_dir / "assignments.csv", "w") as handle:
        table.to_csv(handle, index=False, float_format="%.6g", lineterminator="\n")
    with paths.atomic_write(out_dir / ASSIGNMENTS) as handle:
        typed = {"image_id": pyarrow.array(table["image_id"].tolist(), pyarrow.string())}
        _write_parquet(
            typed | {name: pyarrow.array(table[name].to_numpy()) for name in list(table)[1:]},
            notes,
            handle,
        )
    text = folder_summary(table, novelty, model, manifest, command)
    with paths.atomic_write(out_dir / "summary.md", "w") as handle:
        handle.write(text)
    return table, novelty, text


def folder_summary(
    table: pd.DataFrame, novelty: Novelty, model: Model, manifest: dict[str, Any], command: str = ""
) -> str:
    """Markdown of `assign_folder`: what was found, in how many images, beside the run's own
    clusters.
    """
    counts = np.bincount(table["cluster"], minlength=len(model.sizes))
    far = np.bincount(table["cluster"], weights=table["far"], minlength=len(model.sizes)).astype(
        int
    )
    rows = [
        [
            str(cluster),
            f"{n:,}",
            f"{n / counts.sum():.1%}",
            f"{far[cluster]:,}",
            f"{size:,}",
            f"{size / model.sizes.sum():.1%}",
        ]
        for cluster in np.argsort(-counts, kind="stable")
        for n, size in [(counts[cluster], model.sizes[cluster])]
    ]
    header = ["cluster", "images", "share", "of these far", "in the run", "share"]
    blocks = [
        f"# {len(table):,} images in the clusters of {model.name}",
        f"No network was trained: each image has the nearest centroid of the finished run.{f' Made by `{command}`.' if command else ''}",
        novelty.sentence,
        markdown.table(header, rows, figures=True),
        f"{manifest['attribution']}"
        if NOTICE in manifest["attribution"]
        else f"{manifest['attribution']} {NOTICE}",
    ]
    return "\n\n".join(blocks) + "\n"


# --------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def find_run(given: str, folder: Path) -> Path:
    """The folder of a run from its path, or from ``<dataset>/<arm>/seed<k>``; UsageError naming
    what is there if it is neither.
    """
    for place in (folder / Path(given).expanduser(), paths.data_root() / "runs" / given):
        if place.is_dir():
            return place
    root = paths.data_root() / "runs"
    there = sorted(
        path.parent.relative_to(root).as_posix() for path in root.glob("*/*/seed*/clustering.npz")
    )
    raise UsageError(
        f"--reuse {given!r} is no run; finished runs: {', '.join(there[:12]) or 'none is there'}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 if something failed, 2 for a bad
    option.
    """
    caller = Path(os.environ.get("CXR_CALLED_FROM") or Path.cwd())
    parser = _Parser(
        prog="python -m lib.explore.reuse",
        description="Use a finished run again, without training.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--reuse",
        metavar="RUN",
        required=True,
        help="its folder, or dataset/arm/seed0; or a folder of --export",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data", metavar="PATH", help="assign this folder of X-rays to the run's clusters"
    )
    what.add_argument(
        "--export",
        metavar="DIR",
        help="write weights, settings, embeddings and assignments to this folder",
    )
    parser.add_argument("--csv", help="table of your folder, if it is not the only one")
    parser.add_argument("--image-column", help="its column with the images' file names")
    parser.add_argument("--label-column", help="its column with the labels")
    parser.add_argument(
        "--fit",
        default="pad",
        choices=("pad", "crop", "stretch"),
        help="images that are not square (default: pad)",
    )
    parser.add_argument(
        "--drop-outliers",
        action="store_true",
        help="leave out images that are too dark, too bright or constant",
    )
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda", "mps"), help="default: cpu"
    )
    try:
        given = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
        run_dir = find_run(given.reuse, caller)
        if given.export is not None:
            for path in export(run_dir, caller / Path(given.export).expanduser()):
                print(path)
            return 0
        source = checked_source(given.data, caller)
        if not os.path.isabs(source):
            raise UsageError(
                f"--reuse reads a folder of X-rays, not --data {given.data}: give its path"
            )
        model = load(run_dir, given.device)
        name = dataset_name(source, "quick")
        out = paths.runs_dir(name) / "reuse" / re.sub(r"[^\w.-]+", "-", model.name)
        csv = None if given.csv is None else caller / Path(given.csv).expanduser()
        command = f"./run_all.sh --data PATH/{Path(source).name} --reuse {model.name}"
        reading = {"fit": given.fit, "drop_outliers": given.drop_outliers, "csv": csv}
        reading |= {"image_column": given.image_column, "label_column": given.label_column}
        print(assign_folder(source, model, out, command, **reading)[2])
        print(f"Written to {out}: assignments.csv, {ASSIGNMENTS}, summary.md")
        return 0
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
