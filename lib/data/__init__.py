"""The three files that everything else reads: ``images.npy``, ``metadata.csv``, ``manifest.json``.

`lib.data.preprocess` makes them of X-rays from `lib.data.sources`. This module writes and reads
them: `load_images` is for training, which must see no label, and `load` for evaluation."""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import PIL

from lib import __version__, paths
from lib.data import nih


def load_images(dataset_dir: str | os.PathLike, verify: bool = False) -> np.ndarray:
    """Open ``images.npy``, and no other file: training must not see labels.

    Returns a read-only memmap, uint8 (N, 64, 64), in the order of ``metadata.csv``; ValueError if
    the file is missing, is no such array, or, with `verify`, has not the SHA-256 of the manifest.
    """
    path = _written(dataset_dir, "images.npy", verify)
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{paths.show(path)} is no array ({error}): run 01_preprocess") from error
    if images.dtype != np.uint8 or images.shape[1:] != (64, 64) or not len(images):
        found = f"{images.dtype} {images.shape}"
        raise ValueError(f"{paths.show(path)} is {found}, not uint8 (N, 64, 64): run 01_preprocess")
    return images


def load(dataset_dir: str | os.PathLike, verify: bool = False) -> tuple[np.ndarray, pd.DataFrame]:
    """Open the images with what is known of them; arguments and errors as of `load_images`.

    Returns the images, uint8 (N, 64, 64), and a DataFrame of N rows. image_id, patient_id,
    findings, view_position, sex and split are text, empty if unknown, never NaN; age is float64,
    years, NaN if unknown; further columns (of phantoms) are bool, float64 or text."""
    images = load_images(dataset_dir, verify)
    return images, load_metadata(dataset_dir, len(images), verify)


def load_metadata(dataset_dir: str | os.PathLike, n: int, verify: bool = False) -> pd.DataFrame:
    """What is known of each of `n` images, see `load`."""
    path = _written(dataset_dir, "metadata.csv", verify)
    try:
        metadata = pd.read_csv(path, dtype=str, na_filter=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{paths.show(path)} is no CSV ({error}): run 01_preprocess") from error
    missing = [name for name in nih.COLUMNS if name not in metadata]
    if missing or len(metadata) != n:
        lacks = f"has no column {', '.join(missing)}" if missing else f"has {len(metadata)} rows"
        raise ValueError(f"{paths.show(path)} {lacks} ({n} images): run 01_preprocess")
    for name in metadata.columns.difference(nih.COLUMNS).union(["age"]):
        numbers = pd.to_numeric(metadata[name], errors="coerce").astype("float64")
        if metadata[name].isin(["True", "False"]).all():
            metadata[name] = metadata[name] == "True"
        elif name == "age" or numbers.notna().all():
            metadata[name] = numbers
    return metadata


def _written(dataset_dir: str | os.PathLike, name: str, verify: bool) -> Path:
    """Path of a file that `save` wrote; ValueError if it is absent or changed."""
    path, manifest = Path(dataset_dir) / name, Path(dataset_dir) / "manifest.json"
    for file in (path, manifest)[: 1 + verify]:
        if not file.is_file():
            raise ValueError(f"there is no {paths.show(file)}: run 01_preprocess")
    if verify and sha256(path) != paths.load_json(manifest)["files"][name]["sha256"]:
        raise ValueError(f"{paths.show(path)} is not the file of its manifest: run 01_preprocess")
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def finished(dataset_dir: Path, fingerprint: str) -> dict | None:
    """The manifest, if it has this fingerprint and its files have their lengths."""
    path = dataset_dir / "manifest.json"
    manifest = paths.load_json(path) if path.is_file() else {}
    files = {dataset_dir / name: file["bytes"] for name, file in manifest.get("files", {}).items()}
    whole = all(file.is_file() and file.stat().st_size == n for file, n in files.items())
    return manifest if whole and manifest.get("fingerprint") == fingerprint else None


def save(work_dir: Path, manifest: dict, metadata, images: Iterable, name="images.npy") -> dict:
    """Write the three files into the parent of `work_dir`, which is removed; return the manifest,
    to which `manifest` is added. `images`, uint8 (64, 64), are in the order of `metadata`; an array
    of another `name` is written as it is. OSError if the disk is full; none is left half-written.
    """
    with paths.atomic_write(work_dir / "metadata.csv", "w") as handle:
        metadata.to_csv(handle, index=False, lineterminator="\n")
    if isinstance(images, np.ndarray):
        paths.save_npy(work_dir / name, images)
    else:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(metadata), 64, 64)}
        with paths.atomic_write(work_dir / name) as handle:
            np.lib.format.write_array_header_1_0(handle, header)
            handle.writelines(image.tobytes() for image in images)
    labels = Counter(label for text in metadata["findings"] for label in text.split("|") if label)
    common = {"images": len(metadata), "size": 64, "patients": count_patients(metadata)}
    common["findings"] = dict(labels.most_common())
    common["versions"] = {"lib": __version__, "numpy": np.__version__, "pillow": PIL.__version__}
    files = (work_dir / file for file in (name, "metadata.csv"))
    common["files"] = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}
    paths.save_json(work_dir / "manifest.json", common | manifest)
    # The manifest vouches for the other two: an older one goes first, the new one comes last.
    out_dir = work_dir.parent
    (out_dir / "manifest.json").unlink(missing_ok=True)
    for file in (*common["files"], "manifest.json"):
        os.replace(work_dir / file, out_dir / file)
    for old in out_dir.glob(".partial-*"):
        shutil.rmtree(old, ignore_errors=True)
    return paths.load_json(out_dir / "manifest.json")


def patient_groups(metadata: pd.DataFrame) -> np.ndarray:
    """Which images belong together, (N,) of str: the patient, or the image alone if unknown."""
    patients = metadata["patient_id"].fillna("").astype(str).to_numpy()
    return np.where(patients == "", [f"image {i}" for i in range(len(patients))], patients)


def count_patients(metadata: pd.DataFrame) -> int:
    """Number of known patients. An image whose patient_id is its image_id has an unknown one."""
    known = metadata["patient_id"].fillna("")
    return known[(known != "") & (known != metadata["image_id"])].nunique()


def label_set(metadata: pd.DataFrame) -> tuple[str, ...]:
    """Labels that occur, sorted, without "No Finding"."""
    return tuple(sorted(set("|".join(metadata["findings"]).split("|")) - {"", nih.NO_FINDING}))


def finding_matrix(findings: Iterable[str], names: Sequence[str]) -> np.ndarray:
    """Which of F `names` each of N texts has, labels joined by ``|``: (N, F) bool."""
    has = [set(text.split("|")) for text in findings]
    matrix = [[name in labels for name in names] for labels in has]
    return np.array(matrix, bool).reshape(len(has), len(names))


def label_combinations(findings: Iterable[str]) -> np.ndarray:
    """Class of each image, (N,) int64, if every distinct text is a class, as in the published
    evaluation: 0..C-1 in the alphabetical order of the texts; -1 for empty text, which is no label.
    """
    texts = pd.Series(list(findings), dtype=object)
    return pd.factorize(texts.mask(texts == ""), sort=True)[0].astype(np.int64)
