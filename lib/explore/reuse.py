"""Use a finished run again, without training: embed and assign other images, and say whether they
are like those that the run has seen.

`load` reads a run's own folder, or the folder that `export` writes for others: weights as
safetensors, settings as JSON, embeddings and assignments as Parquet."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as tensors_as_bytes
from scipy import stats
from sklearn.preprocessing import normalize

from lib import __version__, data
from lib.data.preprocess import preprocess
from lib.features import PCAWhiten, extract
from lib.kmeans import nearest
from lib.models import IMAGE_SIZE, Backbone, build
from lib.paths import atomic_write, dataset_dir, load_json, save_json, show
from lib.runs import WHITENING, fingerprint, load_model, load_run, whitening
from lib.study.report import dataset_label

WEIGHTS, CONFIG = "model.safetensors", "config.json"
ASSIGNMENTS, EMBEDDINGS = "assignments.parquet", "embeddings.parquet"
NETWORK = ("backbone", "n_clusters", "width", "seed", "head")  # the settings that build it
NOTICE = "Not for clinical use."
LEVEL = 0.01  # of p, below which chance does not explain the far images
MANY = 0.2  # share of far images that makes them unlike; new phantoms had 5 %, noise 100 %
QUANTILE = 0.995  # of the run's own images, in each of two measures: about 1 % of them are far


@dataclass(frozen=True)
class Novelty:
    """How far images (M,) lie from those that a run has seen, as the network sees it. Many far
    images are a warning; few are no proof that images are of the same kind."""

    distance: np.ndarray  # to the image's own centroid in the clustered space, 0 to 2
    spread: np.ndarray  # root mean square of the whitened components; the run's own: about 1
    far: np.ndarray  # whether one of both exceeds the 99.5 % quantile of the run's own images
    share: float  # of far images
    expected: float  # share, from the run's own images
    p: float  # chance of at least as many far images

    @property
    def sentence(self) -> str:
        """What the numbers say."""
        n, m = int(self.far.sum()), len(self.far)
        seen = f"{n:,} of {m:,} images look unusual to this network,"
        seen += f" {self.expected * m:.1f} by chance (p = {self.p:.2g})."
        if self.p >= LEVEL:
            return f"{seen} That is no more than chance gives."
        if self.share < MANY:
            return f"{seen} That is more than chance gives, as is usual for new images."
        return f"{seen} These images are unlike what the run has seen: their clusters say little."


@dataclass(frozen=True)
class Model:
    """A finished run. Images are uint8 (M, 64, 64); others raise a ValueError that quotes them."""

    name: str
    config: dict  # its settings
    network: Backbone
    whiten: PCAWhiten  # without scaling to length 1
    centroids: np.ndarray  # (K, d)
    sizes: np.ndarray  # (K,), its images in each cluster
    limits: dict[str, float]  # see `Novelty`

    def features(self, images: np.ndarray) -> np.ndarray:
        """Features of the network before PCA, float32 (M, D)."""
        device = next(self.network.parameters()).device
        return extract(self.network, _checked(images), device=device)

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Points of the clustered space, float32 (M, d), each of length 1."""
        return self.look(images)[0]

    def assign(self, images: np.ndarray) -> np.ndarray:
        """The nearest of the run's centroids, int64 (M,)."""
        return self.look(images)[1]

    def novelty(self, images: np.ndarray) -> Novelty:
        """How far the images lie from those that the run has seen."""
        return self.look(images)[2]

    def look(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, Novelty]:
        """``embed``, ``assign`` and ``novelty`` in one pass through the network."""
        whitened = self.whiten.transform(self.features(images))
        embedding = normalize(whitened)
        assignments = nearest(embedding, self.centroids)
        distance, spread = _measures(whitened, self.centroids[assignments])
        far = (distance > self.limits["distance"]) | (spread > self.limits["spread"])
        expected = self.limits["expected"]
        p = float(stats.binom.sf(far.sum() - 1, len(far), expected))  # one-sided
        novelty = Novelty(distance, spread, far, float(far.mean()), expected, p)
        return embedding, assignments, novelty


def _measures(whitened: np.ndarray, own_centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``distance`` and ``spread`` of `Novelty`."""
    whitened = whitened.astype(np.float64)
    distance = np.linalg.norm(normalize(whitened) - own_centroids, axis=1)
    return distance, np.sqrt((whitened**2).mean(axis=1))


def _checked(images) -> np.ndarray:
    """`images` if they are uint8 (M, 64, 64), M >= 1; else a ValueError that quotes them."""
    array = np.asarray(images)
    if array.dtype == np.uint8 and array.shape[1:] == (IMAGE_SIZE, IMAGE_SIZE) and len(array):
        return array
    most = f" up to {array.max()}" if array.size and array.dtype.kind in "iuf" else ""
    wanted = f"images must be uint8 (M, {IMAGE_SIZE}, {IMAGE_SIZE}), 0 to 255"
    help_ = "scale and round to 0..255, .astype(numpy.uint8); images[None] makes a stack of one"
    raise ValueError(f"{wanted}, got {array.dtype} {array.shape}{most}: {help_}")


def load(run_dir: Path | str, device: str = "cpu") -> Model:
    """Read a finished run, ``data/runs/<dataset>/<arm>/seed<k>``, or what `export` made of one.
    FileNotFoundError or ValueError, which names the file, if there is neither or one is damaged."""
    run_dir = Path(run_dir)
    if (run_dir / WEIGHTS).exists():
        return _load_exported(run_dir, device)
    run = load_run(run_dir)
    with np.load(run.path / "clustering.npz") as stored:
        # not scaled to length 1: `spread` measures the length
        whiten, centroids = whitening(stored, l2=False), stored["centroids"]
    own = centroids[run.final_assignments]
    distance, spread = _measures(whiten.transform(np.asarray(run.features)), own)
    limits = {"distance": np.quantile(distance, QUANTILE), "spread": np.quantile(spread, QUANTILE)}
    far = (distance > limits["distance"]) | (spread > limits["spread"])
    limits["expected"] = (far.sum() + 1) / (len(far) + 2)  # smoothed: never 0
    name = "/".join(run.path.absolute().parts[-3:])
    config, network = load_json(run.path / CONFIG), load_model(run, device)
    sizes = np.bincount(run.final_assignments, minlength=len(centroids))
    return Model(name, config, network, whiten, centroids, sizes, limits)


def _load_exported(folder: Path, device: str) -> Model:
    try:
        config, tensors = load_json(folder / CONFIG), load_file(folder / WEIGHTS)
        arrays = {name: tensors.pop(name).numpy() for name in WHITENING}
        whiten = whitening(arrays, l2=False)
        centroids, sizes = (tensors.pop(name).numpy() for name in ("centroids", "sizes"))
        network = build(*(config["settings"][name] for name in NETWORK))
        network.load_state_dict({k.removeprefix("network."): v for k, v in tensors.items()})
        rest = (network.to(device).eval(), whiten, centroids, sizes, config["novelty"])
        return Model(config["run"], config["settings"], *rest)
    except (SafetensorError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        text = f"{show(folder)} holds no export that this code reads ({reason}): export again"
        raise ValueError(text) from error


def export(run_dir: Path | str, out_dir: Path | str, folder: Path | str | None = None) -> list:
    """Write a finished run for use elsewhere; no pixel, label or patient goes with it.

    `out_dir` gets ``model.safetensors`` (network, PCA, centroids), ``config.json``,
    ``assignments.parquet`` (image_id, cluster, distance) and ``embeddings.parquet`` (image_id,
    embedding), each with attribution and notice. `folder` holds the images that the run clustered,
    ``data/<dataset>`` if None. ValueError if it holds others, FileNotFoundError without a run."""
    run, model, out = load_run(run_dir), load(run_dir), Path(out_dir)
    if out.resolve() == run.path.resolve():
        raise ValueError(f"{show(out)} is the run itself: export to another folder")
    folder = Path(folder or dataset_dir(run.path.absolute().parts[-3]))
    images, metadata = data.load(folder)
    if fingerprint(images) != model.config["data"]["sha256"]:
        text = f"{show(folder)} holds other images than {show(run.path)} clustered"
        raise ValueError(f"{text}: name their folder")
    manifest = load_json(folder / "manifest.json")
    notes = {"attribution": manifest["attribution"], "notice": NOTICE, "run": model.name}
    notes["dataset"] = dataset_label(manifest["source"]["kind"], len(images))
    settings = {key: value for key, value in model.config.items() if key != "device"}
    versions = {"lib": __version__, "torch": str(torch.__version__)}
    pixels = f"uint8 ({IMAGE_SIZE}, {IMAGE_SIZE}); the network's input is x / 127.5 - 1"
    config = notes | {"settings": settings, "images": pixels}
    config |= {"novelty": model.limits, "versions": versions}
    whitened = model.whiten.transform(np.asarray(run.features))
    distance, _ = _measures(whitened, model.centroids[run.final_assignments])
    ids = metadata[["image_id"]]
    table = ids.assign(cluster=run.final_assignments, distance=distance)
    _write_parquet(out / ASSIGNMENTS, table, notes)
    _write_parquet(out / EMBEDDINGS, ids.assign(embedding=list(normalize(whitened))), notes)
    save_json(out / CONFIG, config)
    arrays = {name: getattr(model.whiten, f"{name}_") for name in WHITENING}
    arrays |= {"centroids": model.centroids, "sizes": model.sizes}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    tensors |= {f"network.{k}": v.contiguous() for k, v in model.network.state_dict().items()}
    with atomic_write(out / WEIGHTS) as handle:  # last: the folder is then whole
        handle.write(tensors_as_bytes(tensors, metadata=notes))
    return [out / name for name in (WEIGHTS, CONFIG, ASSIGNMENTS, EMBEDDINGS)]


def _write_parquet(path: Path, table: pd.DataFrame, notes: dict[str, str]) -> None:
    columns = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(notes)
    with atomic_write(path) as handle:
        pyarrow.parquet.write_table(columns, handle, compression="zstd")


def assign_folder(source, model: Model, out_dir: Path | str, command="", **reading) -> tuple:
    """Assign a folder of X-rays, `source`, to the clusters of a finished run.

    `out_dir` gets the preprocessed images in ``images/``, ``assignments.csv`` and ``.parquet``, and
    ``summary.md``, which names `command`. `reading` are options of `lib.data.preprocess`, whose
    errors may be raised. Returns the table, ``image_id, cluster, distance, spread, far``, one row
    per image; the `Novelty`; and the text of summary.md."""
    out = Path(out_dir)
    manifest = preprocess(source, out / "images", **reading)
    images, metadata = data.load(out / "images")
    _, assignments, novelty = model.look(images)
    found = {name: getattr(novelty, name) for name in ("distance", "spread", "far")}
    table = metadata[["image_id"]].assign(cluster=assignments, **found)
    notes = {"attribution": manifest["attribution"], "notice": NOTICE, "run": model.name}
    _write_parquet(out / ASSIGNMENTS, table, notes)
    text = _summary(table, novelty, model, manifest["attribution"], command)
    csv = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    for name, content in (("assignments.csv", csv), ("summary.md", text)):
        with atomic_write(out / name, "w") as handle:
            handle.write(content)
    return table, novelty, text


def _summary(table: pd.DataFrame, novelty: Novelty, model: Model, attribution, command) -> str:
    """Markdown of `assign_folder`: the images in each cluster, beside those of the run."""
    k, of_run = len(model.sizes), model.sizes / model.sizes.sum()
    here = table.groupby("cluster")["far"].agg(["size", "sum"]).reindex(range(k), fill_value=0)
    rows = ["| cluster | images | share | of these far | share in the run |", "|---" * 5 + "|"]
    rows += [
        f"| {cluster} | {n:,} | {n / len(table):.1%} | {far:,} | {of_run[cluster]:.1%} |"
        for cluster, n, far in here.sort_values("size", ascending=False, kind="stable").itertuples()
    ]
    made = f" Made by `{command}`." if command else ""
    parts = [f"# {len(table):,} images in the clusters of {model.name}"]
    parts += [f"No network was trained: each image has the run's nearest centroid.{made}"]
    notice = f"{attribution.removesuffix(NOTICE).rstrip()} {NOTICE}\n"
    return "\n\n".join([*parts, novelty.sentence, "\n".join(rows), notice])
