"""A folder of X-rays to ``images.npy``, ``metadata.csv`` and ``manifest.json``."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import PIL
from tqdm import tqdm

from lib import __version__, paths
from lib.data import chestmnist, count_patients, decode, nih, sha256, sources, tables

# Mean gray level below or above which a 64x64 image shows no chest, and standard deviation below
# which it shows nothing. The darkest of 1,617 radiographs of NIH has a mean of 49, the brightest of
# 203, and the flattest a deviation of 27.
DARK, BRIGHT, CONSTANT = 16.0, 239.0, 2.0
FORMAT = 4  # raise it when the same input would give other files
CHUNK = 256  # images between two savings of the work
DECODERS = ("pydicom", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "python-gdcm")


@dataclass(frozen=True)
class Source:
    """A folder of X-rays and what lies in it."""

    folder: Path
    note: dict[str, Any]  # of `lib.data.sources.fetch`, or empty
    files: list[str]  # relative paths (``/``) of all files, sorted
    images: dict[str, str]  # relative path of each image by image_id, in order of image_id
    repeated: list[str]  # images left out because another one has their name
    table: Path | None
    lists: dict[str, str]  # NIH's split: image_id -> train or test

    @property
    def kind(self) -> str:
        """phantom, digits, nih or folder. NIH's are known by their names."""
        named = sum(nih.NIH_NAME.fullmatch(image_id) is not None for image_id in self.images)
        return self.note.get("kind") or ("nih" if 2 * named > len(self.images) else "folder")


def preprocess(
    source_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    split_seed: int = 0,
    fit: str = "pad",
    drop_outliers: bool = False,
    max_broken: float = 0.01,
    csv: str | os.PathLike | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> dict[str, Any]:
    """Write ``images.npy``, ``metadata.csv`` and ``manifest.json`` from a folder of X-rays.

    Every readable PNG, JPEG and DICOM below the folder becomes one row, in order of image_id.
    Images without a row in the table are kept with empty findings. Work is saved every 256 images
    and goes on from there when called again. If all is done for the same files and options, the
    manifest is returned at once.

    Parameters
    ----------
    source_dir : path
        What `lib.data.sources.fetch` filled, any folder of images, or an ``.npz`` of ChestMNIST.
    out_dir : path
        Usually ``paths.dataset_dir(dataset)``.
    split_seed : int
        Of the patient-wise split; not used if NIH's lists of both parts are in the folder.
    fit : {"pad", "crop", "stretch"}
        For images that are not square, see `lib.data.decode.decode`.
    drop_outliers : bool
        Leave out images that are too dark, too bright or constant; else they are only listed.
    max_broken : float
        Largest share of unreadable images that is only listed in the manifest, 0 to 1.
    csv : path, optional
        Table to read instead of the one that is found, in the folder or elsewhere.
    image_column, label_column : str, optional
        Columns of the table, see `lib.data.tables.read_table`.

    Returns
    -------
    dict
        The manifest: source, counts, sha256 of both files, what was dropped and why, attribution.

    Raises
    ------
    ValueError
        No images, more than `max_broken` of them unreadable, a table without labels or of other
        images, a bad option.
    OSError
        `out_dir` not writable, or disk full; no file is left half-written. `lib.paths.BusyError` if
        another process is at work in it.
    """
    if not 0 <= max_broken <= 1:
        raise ValueError(f"max_broken is {max_broken}, not a share from 0 to 1")
    if fit not in decode.FITS:
        raise ValueError(f"fit is {fit!r}; valid: {', '.join(decode.FITS)}")
    out_dir, note = Path(out_dir), sources.read_source(Path(source_dir)) or {}
    folder = Path(note.get("path", source_dir))
    if folder.suffix.lower() == ".npz":
        with paths.alone(out_dir):
            return chestmnist.preprocess(folder, out_dir)
    source = look(folder, note, csv, image_column)
    if source.table is None and (column := image_column or label_column):
        raise ValueError(f"a column is named ({column!r}), but there is no table: give --csv")
    options = [split_seed, fit, bool(drop_outliers), image_column, label_column]
    fingerprint = _fingerprint(source, options)
    if manifest := _finished(out_dir, fingerprint):
        return manifest
    with paths.alone(out_dir):
        table, found, facts = _table_rows(source, image_column, label_column)
        partial = out_dir / f".partial-{fingerprint[:16]}"
        records = _decode_all(source, partial, fit, max_broken)
        read = {name: record for name, record in records.items() if not record["reason"]}
        outliers = {name: why for name, record in read.items() if (why := _outlier(record))}
        kept = [name for name in read if not (drop_outliers and name in outliers)]
        if not kept:
            raise ValueError(f"no image of {folder} shows a chest: look at them, or keep outliers")
        frame = tables.join(kept, [read[name] for name in kept], table, found)
        one_patient = len(frame) > 1 and frame["patient_id"].nunique() == 1
        if one_patient:
            frame["patient_id"] = frame["image_id"]
        parts, split = tables.split_patients(frame, source.lists, split_seed)
        split["method"] = "drawn by image: one patient" if one_patient else split["method"]
        frame.insert(nih.COLUMNS.index("split"), "split", parts)
        _write_images(partial, read, set(kept))
        with paths.atomic_write(partial / "metadata.csv", "w") as handle:
            frame.to_csv(handle, index=False, lineterminator="\n")
        manifest = {
            **_facts(source, frame, records, outliers, drop_outliers),
            **facts,
            "split": split,
            "fit": fit,
            "files": {
                name: {"bytes": (partial / name).stat().st_size, "sha256": sha256(partial / name)}
                for name in ("images.npy", "metadata.csv")
            },
            "verification": nih.verify(list(read), table)
            if source.kind == "nih"
            else {"checked": False, "why": "not a folder of NIH's files"},
            "fingerprint": fingerprint,
        }
        paths.save_json(partial / "manifest.json", manifest)
        # The manifest vouches for the other two: an older one goes first, the new one comes last.
        (out_dir / "manifest.json").unlink(missing_ok=True)
        for name in ("images.npy", "metadata.csv", "manifest.json"):
            os.replace(partial / name, out_dir / name)
        for old in out_dir.glob(".partial-*"):
            shutil.rmtree(old, ignore_errors=True)
        _warn(manifest, one_patient, len(source.repeated))
        return paths.load_json(out_dir / "manifest.json")


# ------------------------------------------------------------------------------- what is there


def look(
    folder: Path, note: dict[str, Any], csv: str | os.PathLike | None, image_column: str | None
) -> Source:
    """Find images, table and lists in a folder and below it.

    image_id is the file name. Of NIH's names, which are identities, a repeated one is left out; of
    other names that occur in several folders (``patient1/frontal.png``, ``patient2/frontal.png``)
    image_id is the relative path. ValueError if there is no folder, image or chosen table.
    """
    if not folder.is_dir():
        what = "is a file, not a folder: unpack it" if folder.exists() else "is not there"
        raise ValueError(f"{folder} {what}; give a folder with X-rays, or --data phantom")
    files = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        prefix = Path(root).relative_to(folder)
        files += [(prefix / name).as_posix() for name in names if not name.startswith(".")]
    files.sort()
    candidates = [file for file in files if _may_be_image(folder, file)]
    if not candidates:
        kinds = _suffixes(files).most_common(4)
        held = ", ".join(f"{n} {suffix}" for suffix, n in kinds) or "no file"
        raise ValueError(f"no images in {folder}: it holds {held}; give a folder with X-rays")
    several = Counter(PurePosixPath(file).name for file in candidates)
    images: dict[str, str] = {}
    repeated = []
    for file in candidates:
        name = PurePosixPath(file).name
        own = several[name] == 1 or nih.NIH_NAME.fullmatch(name)
        image_id = tables.printable(name if own else file)
        repeated += [file] if image_id in images else []
        images.setdefault(image_id, file)
    if csv:
        inside = folder / Path(csv).expanduser()
        table = inside if inside.is_file() else Path(csv).expanduser()
        if not table.is_file():
            raise ValueError(f"--csv {os.fspath(csv)!r}: no such file here or in {folder}")
    else:
        table = tables.find_metadata(folder, files, image_column)
    images = dict(sorted(images.items()))
    return Source(folder, note, files, images, repeated, table, tables.read_lists(folder, files))


def _may_be_image(folder: Path, file: str) -> bool:
    """By its extension; without one, or if a DICOM number is the name, by the first bytes."""
    name = PurePosixPath(file).name
    plain = "." not in name or name.rpartition(".")[2].isdecimal()
    dicom = plain and name != "DICOMDIR" and decode.is_dicom(folder / file)
    return bool(tables.IMAGE_SUFFIX.search(file)) or dicom


def _suffixes(files: Iterable[str]) -> Counter[str]:
    suffixes = (PurePosixPath(file).suffix.lower() or "no extension" for file in files)
    return Counter(map(tables.printable, suffixes))


def _fingerprint(source: Source, options: list) -> str:
    """SHA-256 of all that decides the result: the same work is not done twice."""
    state: list = [
        FORMAT,
        CHUNK,
        options,
        source.kind,
        source.repeated,
        sorted(source.lists.items()),
    ]
    if source.table:
        state += [source.table.name, sha256(source.table)]
    for file in source.images.values():
        path = source.folder / file
        status = path.stat() if path.exists() else None
        state.append([file, status and [status.st_size, status.st_mtime_ns]])
    if not all(tables.RASTER_SUFFIX.search(file) for file in source.images.values()):
        for package in importlib.metadata.distributions():
            if package.name in DECODERS:
                state.append([package.name, package.version])
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _finished(out_dir: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest in `out_dir` if it is of this work and the files are as long as it says."""
    path = out_dir / "manifest.json"
    manifest = paths.load_json(path) if path.is_file() else {}
    whole = manifest.get("fingerprint") == fingerprint and all(
        (out_dir / name).is_file() and (out_dir / name).stat().st_size == file["bytes"]
        for name, file in manifest["files"].items()
    )
    return manifest if whole else None


def _table_rows(
    source: Source, image_column: str | None, label_column: str | None
) -> tuple[pd.DataFrame | None, dict[str, list[int]], dict[str, Any]]:
    """The table, its rows of each image, and counts for the manifest."""
    if source.table is None:
        counts = ("csv_rows", "csv_rows_without_image", "images_without_csv_row")
        return None, {}, dict.fromkeys(counts, 0) | {"images_without_csv_row": len(source.images)}
    drawn = source.kind in ("phantom", "digits")
    table, facts = tables.read_table(source.table, image_column, label_column, drawn)
    found, ways = tables.match(source.images, table["path"])
    tables.check_match(source.table.name, source.images, table["path"], found)
    used = sum(map(len, found.values()))
    return (
        table,
        found,
        {
            "csv_rows": len(table),
            "csv_rows_joined": used - len(found),
            "csv_rows_without_image": len(table) - used,
            "images_without_csv_row": len(source.images) - len(found),
            "images_matched": dict(ways),
            **facts,
        },
    )


# ------------------------------------------------------------------------------------- the work


def _decode_all(
    source: Source, partial: Path, fit: str, max_broken: float
) -> dict[str, dict[str, Any]]:
    """Decode all images into chunks ``<k>.npz`` in `partial` unless they are there."""
    records: dict[str, dict[str, Any]] = {}
    names = list(source.images)
    partial.mkdir(parents=True, exist_ok=True)
    with (
        tqdm(total=len(names), desc="preprocess", unit="image", mininterval=0.5) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # a decoder's warning is no error if the pixels are whole
        for start in range(0, len(names), CHUNK):
            part = names[start : start + CHUNK]
            chunk = partial / f"{start // CHUNK:06d}.npz"
            if not chunk.is_file():
                files = [source.folder / source.images[name] for name in part]
                results = list(pool.map(lambda file: decode.decode(file, fit=fit), files))
                pixels = [image for image, record in results if not record["reason"]]
                done = [
                    record if image is None else record | _brightness(image)
                    for image, record in results
                ]
                with paths.atomic_write(chunk) as handle:
                    shape = (len(pixels), decode.SIZE, decode.SIZE)
                    stack = np.array(pixels, np.uint8).reshape(shape)
                    np.savez(handle, pixels=stack, records=json.dumps(done))
            with np.load(chunk, allow_pickle=False) as saved:
                records |= zip(part, json.loads(str(saved["records"])), strict=True)
            bar.update(len(part))
            try:
                _check_broken(source, records, max_broken)
            except ValueError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return records


def _check_broken(source: Source, records: dict[str, dict[str, Any]], max_broken: float) -> None:
    """ValueError if too many of the images seen so far are broken, or if all files have none."""
    empty = sum(not record["image"] for record in records.values())
    broken = {n: r["reason"] for n, r in records.items() if r["reason"] and r["image"]}
    total, seen = len(source.images) - empty, len(records) - empty
    if not total:
        raise ValueError(f"no images in {source.folder}: {empty} DICOM files that hold none")
    if len(broken) <= max_broken * total and len(broken) < total:
        return
    first = "; ".join(f"{source.images[n]}: {reason}" for n, reason in list(broken.items())[:3])
    allow = f", or allow them with --max-broken {math.ceil(20 * len(broken) / seen) / 20:g}"
    raise ValueError(
        f"{len(broken)} of {seen} images in {source.folder} cannot be read "
        f"({tables.printable(first)}): replace or remove them{allow if len(broken) < total else ''}"
    )


def _brightness(image: np.ndarray) -> dict[str, float]:
    return {"mean": round(float(image.mean()), 3), "deviation": round(float(image.std()), 3)}


def _outlier(record: dict[str, Any]) -> str:
    """Why an image shows no chest, or nothing; empty if it may show one."""
    if record["deviation"] < CONSTANT:
        return f"constant (standard deviation {record['deviation']:.1f} of 255)"
    if DARK <= record["mean"] <= BRIGHT:
        return ""
    return f"too {'dark' if record['mean'] < DARK else 'bright'} (mean {record['mean']:.1f} of 255)"


def _write_images(partial: Path, read: Iterable[str], kept: set[str]) -> None:
    """``images.npy`` from the chunks, one after the other; `read` are the images in them."""
    names = iter(read)
    with paths.atomic_write(partial / "images.npy") as handle:
        shape = (len(kept), decode.SIZE, decode.SIZE)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(handle, header)
        for chunk in sorted(partial.glob("*.npz")):
            with np.load(chunk, allow_pickle=False) as saved:
                for image in saved["pixels"]:
                    if next(names) in kept:
                        handle.write(image.tobytes())


def _facts(
    source: Source,
    frame: pd.DataFrame,
    records: dict[str, dict[str, Any]],
    outliers: dict[str, str],
    drop_outliers: bool,
) -> dict[str, Any]:
    """What the manifest says of the images."""
    kept = [records[name] for name in frame["image_id"]]
    broken = {n: r["reason"] for n, r in records.items() if r["reason"] and r["image"]}
    broken |= outliers if drop_outliers else {}
    dropped = {source.images[name]: reason for name, reason in broken.items()}
    dropped |= dict.fromkeys(source.repeated, "another image has the same file name")
    others = {source.images[n]: r["reason"] for n, r in records.items() if not r["image"]}
    rest = set(source.files) - set(source.images.values()) - set(source.repeated)
    labels = Counter(name for text in frame["findings"] for name in text.split("|") if name)
    names = ("too dark", "too bright", "constant")
    return {
        "format": FORMAT,
        "source": {"kind": source.kind, "csv": source.table.name if source.table else None}
        | {key: source.note[key] for key in ("seed", "orientation") if key in source.note},
        "images": len(frame),
        "size": decode.SIZE,
        "patients": count_patients(frame),
        "findings": dict(labels.most_common()),
        "dropped": _listed(dropped),
        "not_images": _listed(others),
        "other_files": dict(sorted(_suffixes(rest).items())),
        "outliers": {
            **{name: sum(why.startswith(name) for why in outliers.values()) for name in names},
            "dropped": bool(drop_outliers),
            "images": [{"image_id": n, "reason": reason} for n, reason in outliers.items()],
        },
        "image_modes": dict(Counter(record["mode"] for record in kept).most_common()),
        "gray_scales": dict(Counter(record["scale"] for record in kept).most_common()),
        "not_square": sum(record["width"] != record["height"] for record in kept),
        "enlarged": sum(min(r["width"], r["height"]) < decode.SIZE for r in kept),
        "attribution": sources.ATTRIBUTIONS[source.kind],
        "versions": {"python": platform.python_version(), "lib": __version__}
        | {package.__name__: package.__version__ for package in (np, pd, PIL)},
    }


def _listed(reasons: dict[str, str]) -> list[dict[str, str]]:
    return [{"file": tables.printable(file), "reason": why} for file, why in reasons.items()]


def _warn(manifest: dict[str, Any], one_patient: bool, n_repeated: int) -> None:
    """What a user must not overlook, at the line that called `preprocess`."""
    done = {"pad": "padded with black", "crop": "cropped", "stretch": "stretched"}[manifest["fit"]]
    n, both = manifest["not_square"], manifest["split"]["patients_on_both_sides"]
    differences = "; ".join(manifest["verification"].get("differences", []))
    for said, text in (
        (n, f"{n} of {manifest['images']} images are not square and were {done}"),
        (n_repeated, f"{n_repeated} images were left out: another one has their file name"),
        (one_patient, "one patient is named for all images: each counts as a patient of its own"),
        (both, f"{both} patients are in both of NIH's lists: probes will look too good"),
        (differences, f"this is not ChestX-ray14 as published: {differences}"),
    ):
        if said:
            warnings.warn(text, stacklevel=3)
