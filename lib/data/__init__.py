"""X-rays in: obtain a source, read any NIH-like folder, and write the three files that everything
else reads.

``fetch`` fills ``data/raw/<dataset>``, ``preprocess`` turns it into ``images.npy``,
``metadata.csv`` and ``manifest.json``, and ``load_images`` (training, which must see no label) and
``load`` (evaluation) read them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import joblib
import numpy as np
import pandas as pd
import PIL
from PIL import Image
from tqdm import tqdm

from lib import __version__, paths
from lib.data import chestmnist, decode, phantom, tables
from lib.data import sources as download
from lib.data.tables import COLUMNS, EXTRA_COLUMNS, FINDINGS, compare_with_published, read_boxes
from lib.data.tables import METADATA_NAMES as _METADATA_NAMES

ATTRIBUTION = (
    "Chest X-rays: NIH Clinical Center, the data provider. X. Wang et al., ChestX-ray8: Hospital-scale Chest X-ray Database and Benchmarks "
    "on Weakly-Supervised Classification and Localization of Common Thorax Diseases, CVPR 2017, pp. 3462-3471. "
    "Download: https://nihcc.app.box.com/v/ChestXray-NIHCC. Not for clinical use."
)
PHANTOM_ATTRIBUTION = "Synthetic radiographs drawn by lib.phantom of this project; they show no patient. Not for clinical use."
FOLDER_ATTRIBUTION = "Images of the user's own folder, under their own terms. Not for clinical use."

__all__ = [
    "ATTRIBUTION",
    "COLUMNS",
    "EXTRA_COLUMNS",
    "FINDINGS",
    "compare_with_published",
    "count_patients",
    "fetch",
    "finding_matrix",
    "label_combinations",
    "load",
    "load_images",
    "patient_groups",
    "preprocess",
    "read_boxes",
    "read_metadata",
]

# Mean gray level of 64 x 64 pixels below or above which an image shows no chest, and standard
# deviation below which it shows nothing. The darkest of 1,617 radiographs of NIH has a mean of 49,
# the brightest of 203, and the flattest a deviation of 27.
DARK, BRIGHT, CONSTANT = 16.0, 239.0, 2.0

_FORMAT = 3  # raise it when the same input would give other files: finished and half-finished work is then redone
_CHUNK = 256  # images between two savings of the work


# --------------------------------------------------------------------------------------------------


def fetch(
    source: str | os.PathLike,
    raw_dir: str | os.PathLike,
    n_phantoms: int = 256,
    seed: int = 0,
    csv: str | os.PathLike | None = None,
    *,
    orientation: str = "upright",
) -> dict[str, Any]:
    """Put a source of X-rays into place for `preprocess`.

    Parameters
    ----------
    source : str or path
        ``"phantom"``: draw phantoms and write them in Kaggle's own layout, so that they pass
        through the reader that real X-rays pass through. ``"kaggle"``, ``"kaggle-sample"``,
        ``"chestmnist"``, ``"chestmnist:FILE.npz"`` and ``"nih:PATH"``: see
        `lib.data.sources.obtain`. Otherwise a folder with images, which stays where it is: only a
        note of it is written.
    raw_dir : path
        Folder of this source, usually ``paths.raw_dir(dataset)``.
    n_phantoms, seed : int
        Number of phantoms and their seed. Phantoms that are there already with the same number and
        seed are kept.
    csv : path, optional
        Table of a folder of one's own, if it is not the only one; see `preprocess`.
    orientation : {"upright", "any"}
        How phantoms hang, see `lib.data.phantom.make_phantoms`.

    Returns
    -------
    dict
        For display: kind, images, csv, folder and attribution, for what was obtained also origin
        and verified; no path of this machine.

    Raises
    ------
    DownloadError
        What was to be downloaded did not arrive.
    ValueError
        `source` is no folder or has no images, or `raw_dir` holds something that is not ours to
        replace.
    """
    raw_dir = Path(raw_dir)
    if source == "phantom":
        note = _fetch_phantoms(raw_dir, int(n_phantoms), int(seed), orientation)
        return _shown(note, raw_dir, _METADATA_NAMES[0])
    if download.is_named(source):
        note = download.obtain(str(source), raw_dir)
        paths.save_json(raw_dir / "source.json", note)
        return _shown(note, Path(note["path"]), note["csv"]) | {
            key: note[key] for key in ("origin", "verified")
        }
    folder = Path(source).expanduser()
    files = _walk(folder)
    images, _ = _find_images(folder, files)
    table = _table(folder, files, csv)
    note = {"kind": _kind(images), "path": str(folder.resolve()), "images": len(images)}
    paths.save_json(raw_dir / "source.json", note)
    return _shown(note, folder, table.name if table else None)


def _shown(note: dict[str, Any], folder: Path, table: str | None) -> dict[str, Any]:
    """A note on a source as it may stand in a notebook."""
    kind = note["kind"]
    return {
        "kind": kind,
        "images": note["images"],
        "csv": table,
        "folder": paths.show(folder),
        "attribution": _attribution(kind),
    }


def _fetch_phantoms(raw_dir: Path, n: int, seed: int, orientation: str) -> dict[str, Any]:
    # The generator is part of the identity: phantoms of an older version of it are drawn again.
    generator = hashlib.sha256(Path(phantom.__file__).read_bytes()).hexdigest()
    note = {"kind": "phantom", "images": n, "seed": seed, "generator": generator}
    note |= {} if orientation == "upright" else {"orientation": orientation}
    if _read_source(raw_dir) != note:
        with paths.alone(raw_dir, raw_dir.with_name(f".{raw_dir.name}.lock")):
            if _read_source(raw_dir) != note:  # somebody else may have drawn them meanwhile
                _draw_phantoms(raw_dir, note, orientation)
    return note


def _draw_phantoms(raw_dir: Path, note: dict[str, Any], orientation: str) -> None:
    there = (_read_source(raw_dir) or {}).get("kind")
    if (
        raw_dir.exists()
        and there != "phantom"
        and {path.name for path in raw_dir.iterdir()} - {"source.json"}
    ):
        raise ValueError(
            f"{paths.show(raw_dir)} holds files which are not phantoms: move them away, or choose another dataset name"
        )

    images, table = phantom.make_phantoms(note["images"], note["seed"], orientation)
    # Built beside its place and moved there when whole; what a killed run left behind goes first.
    building, old = (raw_dir.with_name(f".{raw_dir.name}.{end}") for end in ("partial", "old"))
    with _naming_disk_errors(raw_dir):
        for leftover in (building, old):
            shutil.rmtree(leftover, ignore_errors=True)
        for place, (image_id, image) in enumerate(zip(table["image_id"], images, strict=True)):
            file = (
                building / f"images_{place // 10_000 + 1:03d}" / "images" / image_id
            )  # 10,000 a folder, as on Kaggle
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
        with open(building / _METADATA_NAMES[0], "w", encoding="utf-8", newline="\n") as handle:
            _kaggle_table(table, images.shape[1:]).to_csv(handle, index=False, lineterminator="\n")
        paths.save_json(building / "source.json", note)
        if raw_dir.exists():
            os.replace(raw_dir, old)
        os.replace(building, raw_dir)
        shutil.rmtree(old, ignore_errors=True)


def _kaggle_table(table: pd.DataFrame, shape: tuple[int, int]) -> pd.DataFrame:
    """Phantoms under Kaggle's header; its unquoted ``OriginalImage[Width,Height]`` is two columns
    to every reader.
    """
    columns = {
        "Image Index": table["image_id"],
        "Finding Labels": table["findings"],
        "Follow-up #": table.groupby("patient_id").cumcount(),
        "Patient ID": table["patient_id"],
        "Patient Age": table["age"],
        "Patient Gender": table["sex"],
        "View Position": table["view_position"],
        "OriginalImage[Width": shape[1],
        "Height]": shape[0],
        "OriginalImagePixelSpacing[x": "",
        "y]": "",
    }
    return pd.DataFrame(columns | {name: table[name] for name in EXTRA_COLUMNS})


@contextmanager
def _naming_disk_errors(path: Path) -> Iterator[None]:
    """What `paths.atomic_write` says of a full or unwritable disk, for writing that cannot go
    through it.
    """
    try:
        yield
    except OSError as error:
        hint = "free some space, or choose another folder with CXR_DATA_DIR"
        raise OSError(
            error.errno, f"could not write {path}: {error.strerror or error}; {hint}"
        ) from error


def _read_source(folder: Path) -> dict[str, Any] | None:
    """The note that `fetch` left in `folder`, if it is one of ours."""
    note = folder / "source.json"
    if not note.is_file():
        return None
    content = paths.load_json(note)
    return (
        content
        if isinstance(content, dict)
        and content.get("kind") in ("phantom", "nih", "folder", "chestmnist")
        else None
    )


def _kind(images: dict[str, str]) -> str:
    """``"nih"`` if more than half of the images are named as NIH names them, else ``"folder"``: it
    decides whose attribution is given.
    """
    named = sum(tables.NIH_NAME.fullmatch(image_id) is not None for image_id in images)
    return "nih" if 2 * named > len(images) else "folder"


def _attribution(kind: str) -> str:
    if kind == "chestmnist":
        return chestmnist.ATTRIBUTION + ATTRIBUTION
    return {"phantom": PHANTOM_ATTRIBUTION, "nih": ATTRIBUTION}.get(kind, FOLDER_ATTRIBUTION)


# --------------------------------------------------------------------------------------------------


def _walk(folder: Path) -> list[str]:
    """Relative paths (``/``) of all files in `folder`, sorted, without hidden ones, macOS resource
    forks and linked folders.
    """
    if not folder.exists():
        raise ValueError(
            f"there is no folder {folder}: give --data phantom, or --data PATH of a folder with X-rays"
        )
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is a file, not a folder: unpack it if it is an archive, and give the folder"
        )

    def refuse(error: OSError) -> None:
        raise ValueError(
            f"cannot list {error.filename}: {error.strerror}; make it readable or move it away"
        )

    found = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        prefix = (Path(root).relative_to(folder) / "_").as_posix()[:-1]
        found += [prefix + name for name in names if not name.startswith(".")]
    return sorted(found)


def _find_images(folder: Path, files: list[str]) -> tuple[dict[str, str], list[str]]:
    """Images by image_id in order of image_id, and the files left out because another one has their
    name.

    image_id is the file name. NIH's names are identities: of two files with the same one the first
    is taken. Of other names that stand in several folders (``patient1/frontal.png``,
    ``patient2/frontal.png``) image_id is the relative path. Raises ValueError if there is no image,
    or if NIH's names repeat so much that they cannot be identities."""
    found = [file for file in files if _may_be_image(folder, file)]
    if not found:
        kinds = Counter(PurePosixPath(file).suffix.lower() or "no extension" for file in files)
        common = ", ".join(f"{n} {tables.printable(kind)}" for kind, n in kinds.most_common(4))
        held = f"holds no .png, .jpg or .jpeg but {common}" if files else "is empty"
        raise ValueError(
            f"no images in {folder}: it {held}; give a folder with X-rays, or --data phantom"
        )
    several = Counter(file.rpartition("/")[2] for file in found)
    images: dict[str, str] = {}
    repeated = []
    for file in found:
        name = file.rpartition("/")[2]
        image_id = tables.printable(
            file if several[name] > 1 and not tables.NIH_NAME.fullmatch(name) else name
        )
        if image_id in images:
            repeated.append(file)
        else:
            images[image_id] = file
    if len(repeated) > len(images):
        raise ValueError(
            f"only {len(images)} different file names among {len(images) + len(repeated)} images in {folder} "
            f"(for example {tables.printable(repeated[0])}): NIH's names tell images apart; give the folder with each image once"
        )
    return dict(sorted(images.items())), repeated


def _may_be_image(folder: Path, file: str) -> bool:
    """By its extension; a file without one, or named by a DICOM number (``1.2.840.10``), by DICOM's
    mark in it.
    """
    if tables.IMAGE_SUFFIX.search(file):
        return True
    name = file.rpartition("/")[2]
    plain = "." not in name or name.rpartition(".")[2].isdecimal()
    return plain and name != "DICOMDIR" and decode.is_dicom(folder / file)


def _table(folder: Path, files: list[str], chosen: str | os.PathLike | None) -> Path | None:
    """The table that was chosen, by a path from `folder` or from here, else the one that
    `tables.find_metadata` finds.
    """
    if not chosen:
        return tables.find_metadata(folder, files)
    inside = folder / Path(chosen).expanduser()
    path = inside if inside.is_file() else Path(chosen).expanduser()
    if not path.is_file():
        raise ValueError(
            f"--csv {os.fspath(chosen)!r}: there is no such file here or in the folder of the images"
        )
    return path


# --------------------------------------------------------------------------------------------------


def read_metadata(folder: str | os.PathLike) -> pd.DataFrame | None:
    """Read the table that describes the X-rays in a folder.

    Understands NIH's files of 2017 and 2020, that of Kaggle's sample, and any single CSV with an
    image column and ``Finding Labels``, in any order of columns: empty or surplus columns, blank
    cells, ages such as ``060Y`` and ``007M``, sex or gender, names in any case.

    Parameters
    ----------
    folder : path
        Folder with the X-rays; it is searched with all folders below it.

    Returns
    -------
    DataFrame or None
        One row an image: image_id (file name), patient_id (text, leading zeros of numbers removed),
        findings (joined by ``|``, empty where unlabelled), view_position and sex (empty where
        unknown), age (float, completed years, NaN where unknown or over 120), and side, angle,
        mirrored where the table has them. None if the folder has no such table.

    Raises
    ------
    ValueError
        The table has no image column or no ``Finding Labels``, or is not CSV text in UTF-8.
    """
    folder = Path(folder)
    table = tables.find_metadata(folder, _walk(folder))
    return None if table is None else tables.typed(tables.read_table(table)[0])


# --------------------------------------------------------------------------------------------------


def preprocess(
    source_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    size: int = 64,
    resume: bool = True,
    split_seed: int = 0,
    test_share: float = 0.2,
    max_broken: float = 0.01,
    workers: int | None = None,
    fit: str = "pad",
    drop_outliers: bool = False,
    csv: str | os.PathLike | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> dict[str, Any]:
    """Write ``images.npy``, ``metadata.csv`` and ``manifest.json`` from a folder of X-rays.

    Every readable PNG, JPEG and DICOM below the folder becomes one row, in order of file name.
    Images are made 8-bit gray and averaged over the area of each new pixel: exact in integers, so
    the same bytes come out on every machine, with any number of workers, interrupted or not, and
    averaging commutes with quarter turns and mirrors (no other filter of Pillow's does at 1024 ->
    64). Images without a row in the table are kept with empty findings and counted; rows without an
    image are only counted, since Kaggle's table always lists all 112,120. The full ChestX-ray14 is
    held against its published numbers.

    Work is saved every 256 images and goes on from there when called again. If all is done already
    for the same files and options, the manifest is returned at once.

    Parameters
    ----------
    source_dir : path
        What `fetch` filled, or any folder of images.
    out_dir : path
        Usually ``paths.dataset_dir(dataset)``.
    size : int
        Height and width of the images written.
    resume : bool
        False: do all the work again.
    split_seed : int
        Seed of the patient-wise split; not used where NIH's ``train_val_list.txt`` and
        ``test_list.txt`` are there.
    test_share : float
        Share of images in the test part, 0 <= test_share < 1; whole patients only, so it is met as
        nearly as they allow.
    max_broken : float
        Largest share of unreadable files that is only listed in the manifest.
    workers : int, optional
        Threads that decode (Pillow and zlib release the interpreter lock); all cores this process
        may use if None.
    fit : str
        For images that are not square, ``"pad"``: on a black square, all of the image and its
        proportions are kept; ``"crop"``: the square in the middle; ``"stretch"``. They are counted
        and warned of. NIH's are square.
    drop_outliers : bool
        Leave out images that are too dark, too bright or constant, which are otherwise only counted
        and listed.
    csv : path, optional
        Table to read instead of the one that is found, in `source_dir` or elsewhere.
    image_column, label_column : str, optional
        Columns of that table with images and labels, where they are not named as NIH's; labels are
        separated by ``|``, ``;`` or ``,``.

    Returns
    -------
    dict
        The manifest: source, counts, sha256 of both files, what was dropped and why, outliers,
        verification, attribution, versions.

    Raises
    ------
    ValueError
        No images, more than `max_broken` of them unreadable or none readable, a table without
        ``Finding Labels``, a bad option.
    OSError
        `out_dir` not writable or disk full; no file is left half-written. `lib.paths.BusyError` if
        another process is at work in it.
    """
    if size < 1 or not 0 <= test_share < 1 or not 0 <= max_broken <= 1:
        raise ValueError(
            f"need size >= 1, 0 <= test_share < 1, 0 <= max_broken <= 1, not {size=}, {test_share=}, {max_broken=}"
        )
    if fit not in decode.FITS:
        raise ValueError(f"fit is {fit!r}; valid: {', '.join(decode.FITS)}")
    out_dir, source_dir = Path(out_dir), Path(source_dir)
    note = _read_source(source_dir) or {}
    if note.get("kind") == "chestmnist":
        with paths.alone(out_dir):
            return chestmnist.preprocess(Path(note["path"]), out_dir, size, resume)
    folder = Path(note.get("path", source_dir))
    files = _walk(folder)
    images, repeated = _find_images(folder, files)
    table = _table(folder, files, csv)
    if (image_column or label_column) and table is None:
        raise ValueError(
            f"a column is named ({image_column or label_column!r}), but there is no CSV: name it with --csv"
        )
    lists = tables.read_lists(folder, files)
    kind = note.get("kind") or _kind(images)

    options = {
        "size": size,
        "split_seed": split_seed,
        "test_share": test_share,
        "max_broken": max_broken,
        "fit": fit,
    }
    options |= {
        "drop_outliers": bool(drop_outliers),
        "image_column": image_column or "",
        "label_column": label_column or "",
    }
    identity = [
        _FORMAT,
        _CHUNK,
        options,
        kind,
        repeated,
        sorted(lists.items()),
        _sha256(table) if table else None,
    ]
    identity += [[file, *_stat(folder / file)] for file in images.values()]
    identity.append(
        decode.dicom_reader()
        if any(not tables.RASTER_SUFFIX.search(file) for file in images.values())
        else None
    )
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    if resume and (manifest := _finished(out_dir, fingerprint)):
        return manifest

    with paths.alone(out_dir):
        if resume and (
            manifest := _finished(out_dir, fingerprint)
        ):  # by somebody else, a moment ago
            return manifest
        metadata, odd = (
            tables.read_table(table, image_column, label_column) if table else (None, {})
        )
        partial = out_dir / f".partial-{fingerprint[:16]}"
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)
        records = _decode_all(
            folder, list(images.values()), partial, size, fit, max_broken, workers
        )
        read = {
            image_id: record
            for image_id, record in zip(images, records, strict=True)
            if not record["reason"]
        }
        outliers = {
            image_id: reason
            for image_id, record in read.items()
            if (reason := _outlier(record["mean"], record["deviation"]))
        }
        kept = {
            image_id: record
            for image_id, record in read.items()
            if not (drop_outliers and image_id in outliers)
        }
        if not kept:
            raise ValueError(
                f"all {len(read)} images of {folder} are too dark, too bright or constant: look at them, or keep outliers"
            )
        frame, matching = tables.join(
            {image_id: images[image_id] for image_id in kept}, metadata, list(kept.values())
        )
        parts, split = tables.split_patients(frame, lists, split_seed, test_share)
        frame.insert(COLUMNS.index("split"), "split", parts)
        with paths.atomic_write(partial / "images.npy") as handle:
            np.lib.format.write_array_header_1_0(
                handle, {"descr": "|u1", "fortran_order": False, "shape": (len(kept), size, size)}
            )
            ids = iter(read)
            for chunk in sorted(partial.glob("[0-9]*.npy")):
                for image in np.load(chunk, allow_pickle=False):
                    if next(ids) in kept:
                        handle.write(image.tobytes())
        with paths.atomic_write(partial / "metadata.csv", "w") as handle:
            frame.to_csv(handle, index=False, lineterminator="\n")

        dropped = {
            images[image_id]: record["reason"]
            for image_id, record in zip(images, records, strict=True)
            if record["reason"]
        }
        dropped |= (
            {images[image_id]: reason for image_id, reason in outliers.items()}
            if drop_outliers
            else {}
        )
        dropped |= dict.fromkeys(repeated, "another image has the same file name")
        others = Counter(
            PurePosixPath(file).suffix.lower() or "no extension"
            for file in set(files) - set(images.values()) - set(repeated)
        )
        manifest = {
            "format": _FORMAT,
            "source": {"kind": kind, "csv": table.name if table else None}
            | {key: note[key] for key in ("seed", "orientation") if key in note},
            "images": len(kept),
            "size": size,
            "patients": frame["patient_id"].nunique(),
            "split": split,
            "findings": dict(
                Counter("|".join(filter(None, frame["findings"])).split("|")).most_common()
            )
            if any(frame["findings"])
            else {},
            "verification": tables.verify_full_set(kind, files, list(read), metadata),
            "files": {
                name: {"bytes": _stat(partial / name)[0], "sha256": _sha256(partial / name)}
                for name in ("images.npy", "metadata.csv")
            },
            "dropped": [
                {"file": tables.printable(file), "reason": reason}
                for file, reason in dropped.items()
            ],
            "other_files": {tables.printable(suffix): n for suffix, n in sorted(others.items())},
            "outliers": {
                name: sum(reason.startswith(name) for reason in outliers.values())
                for name in ("too dark", "too bright", "constant")
            }
            | {
                "dropped": bool(drop_outliers),
                "images": [
                    {"image_id": name, "reason": reason} for name, reason in outliers.items()
                ],
            },
            "image_modes": dict(Counter(record["mode"] for record in kept.values()).most_common()),
            "fit": fit,
            "not_square": sum(record["width"] != record["height"] for record in kept.values()),
            "enlarged": sum(
                min(record["width"], record["height"]) < size for record in kept.values()
            ),
            **matching,
            **odd,
            "attribution": _attribution(kind),
            "versions": {"python": platform.python_version(), "lib": __version__}
            | {package.__name__: package.__version__ for package in (np, pd, PIL)},
            "fingerprint": fingerprint,
        }
        paths.save_json(partial / "manifest.json", manifest)
        with _naming_disk_errors(out_dir):
            # The manifest vouches for the other two: an older one goes first, the new one comes
            # last.
            (out_dir / "manifest.json").unlink(missing_ok=True)
            for name in ("images.npy", "metadata.csv", "manifest.json"):
                os.replace(partial / name, out_dir / name)
        for old in out_dir.glob(".partial-*"):
            shutil.rmtree(old, ignore_errors=True)
        _warn(manifest, len(repeated))
        return paths.load_json(out_dir / "manifest.json")


def _warn(manifest: dict[str, Any], n_repeated: int) -> None:
    """What a user must not overlook, at the line that called `preprocess`."""
    done = {"pad": "padded with black", "crop": "cropped", "stretch": "stretched"}[manifest["fit"]]
    shape = f"{manifest['size']} x {manifest['size']}"
    if n := manifest["not_square"]:
        warnings.warn(
            f"{n} of {manifest['images']} images are not square and were {done} to {shape}",
            stacklevel=3,
        )
    if n_repeated:
        warnings.warn(
            f"{n_repeated} images were left out because another one has their file name; see manifest.json",
            stacklevel=3,
        )
    if differences := manifest["verification"].get("differences"):
        warnings.warn(
            f"this is not ChestX-ray14 as published: {'; '.join(differences)}", stacklevel=3
        )


def _outlier(mean: float, deviation: float) -> str:
    """Why an image of gray levels 0..255 shows no chest, or nothing."""
    if deviation < CONSTANT:
        return f"constant (standard deviation {deviation:.1f} of 255)"
    if mean < DARK or mean > BRIGHT:
        return f"too {'dark' if mean < DARK else 'bright'} (mean {mean:.1f} of 255)"
    return ""


def _stat(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError:
        return [-1, -1]
    return [status.st_size, status.st_mtime_ns]


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _finished(out_dir: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest in `out_dir` if it is of this work and the files are as long as it says."""
    path = out_dir / "manifest.json"
    manifest = paths.load_json(path) if path.is_file() else {}
    whole = manifest.get("fingerprint") == fingerprint and all(
        _stat(out_dir / n)[0] == f["bytes"] for n, f in manifest["files"].items()
    )
    return manifest if whole else None


def _decode_all(
    folder: Path,
    files: list[str],
    partial: Path,
    size: int,
    fit: str,
    max_broken: float,
    workers: int | None,
) -> list[dict[str, Any]]:
    """Decode `files` into chunks in `partial` unless they are there: ``<k>.npy``, and ``<k>.json``
    with a record of each file.
    """
    paths.save_json(
        partial / "plan.json", {"files": len(files)}
    )  # an unwritable folder shows here, not after the work
    records: list[dict[str, Any]] = []
    broken: list[str] = []
    root = folder.resolve()
    bar = tqdm(total=len(files), desc="preprocess", unit="image", mininterval=0.5)
    with bar, decode.strict(), ThreadPoolExecutor(workers or joblib.cpu_count()) as pool:
        for start in range(0, len(files), _CHUNK):
            part = files[start : start + _CHUNK]
            name = partial / f"{start // _CHUNK:06d}"
            done = _read_chunk(name, size)
            if len(done) != len(part):
                results = list(
                    pool.map(lambda file: _measured(folder / file, size, fit, root), part)
                )
                done = [record for _, record in results]
                pixels = [image for image, record in results if not record["reason"]]
                paths.save_npy(
                    name.with_suffix(".npy"),
                    np.stack(pixels) if pixels else np.empty((0, size, size), np.uint8),
                )
                paths.save_json(name.with_suffix(".json"), done)
            records += done
            broken += [
                f"{tables.printable(file)}: {record['reason']}"
                for file, record in zip(part, done, strict=True)
                if record["reason"]
            ]
            bar.update(len(part))
            if len(broken) > max_broken * len(files) or len(broken) == len(files):
                shutil.rmtree(
                    partial, ignore_errors=True
                )  # what is mended next may look the same from outside
                seen = (
                    f"{len(broken)} of the first {len(records)} of {len(files)} images in {folder}"
                )
                raise ValueError(
                    f"{seen} cannot be read ({'; '.join(broken[:3])}): replace or remove them, or raise {max_broken=}"
                )
    return records


def _measured(
    path: Path, size: int, fit: str, root: Path
) -> tuple[np.ndarray | None, dict[str, Any]]:
    pixels, record = decode.decode(path, size, fit, root)
    if pixels is not None:
        record |= {
            "mean": round(float(pixels.mean()), 3),
            "deviation": round(float(pixels.std()), 3),
        }
    return pixels, record


def _read_chunk(name: Path, size: int) -> list[dict[str, Any]]:
    """Records of a chunk that is whole, else none."""
    try:
        records = paths.load_json(name.with_suffix(".json"))
        pixels = np.load(name.with_suffix(".npy"), allow_pickle=False)
    except (OSError, ValueError):
        return []
    return (
        records
        if pixels.shape == (sum(not record["reason"] for record in records), size, size)
        else []
    )


# --------------------------------------------------------------------------------------------------


def load_images(out_dir: str | os.PathLike, verify: bool = False) -> np.ndarray:
    """Open ``images.npy``, and no other file: training must not see labels.

    Parameters
    ----------
    out_dir : path
        Where `preprocess` wrote.
    verify : bool
        Compare the file's SHA-256 with the manifest (this opens ``manifest.json``).

    Returns
    -------
    memmap, shape (N, H, H), uint8, 0..255
        Read-only, in the order of ``metadata.csv``.

    Raises
    ------
    ValueError
        The file is missing, is no such array, or is not the one that the manifest vouches for.
    """
    path = _written(out_dir, "images.npy", verify)
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{paths.show(path)} is not a .npy array ({error}): delete it and run 01_preprocess again"
        ) from error
    if (
        images.dtype != np.uint8
        or images.ndim != 3
        or images.shape[1] != images.shape[2]
        or not len(images)
    ):
        raise ValueError(
            f"{paths.show(path)} must be uint8 (N, 64, 64), not {images.dtype} {images.shape}: run 01_preprocess again"
        )
    return images


def load(out_dir: str | os.PathLike, verify: bool = False) -> tuple[np.ndarray, pd.DataFrame]:
    """Open the images with what is known of them.

    Parameters
    ----------
    out_dir : path
        Where `preprocess` wrote.
    verify : bool
        Compare the SHA-256 of both files with the manifest.

    Returns
    -------
    images : memmap, shape (N, H, H), uint8
        See `load_images`.
    metadata : DataFrame, N rows
        image_id, patient_id, findings, view_position, sex, split: text, empty where unknown, never
        NaN. age: float64, years, NaN where unknown. For phantoms also side (text), angle (float64)
        and mirrored (bool).

    Raises
    ------
    ValueError
        A file is missing or not what `preprocess` wrote, or the two have different lengths.
    """
    images = load_images(out_dir, verify)
    path = _written(out_dir, "metadata.csv", verify)
    try:
        metadata = pd.read_csv(path, dtype=str, na_filter=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{paths.show(path)} is not a CSV ({error}): run 01_preprocess again"
        ) from error
    missing = [name for name in COLUMNS if name not in metadata]
    if missing or len(metadata) != len(images):
        fault = (
            f"has no column {', '.join(missing)}"
            if missing
            else f"has {len(metadata)} rows for {len(images)} images"
        )
        raise ValueError(f"{paths.show(path)} {fault}: run 01_preprocess again")
    return images, tables.typed(metadata)


def _written(out_dir: str | os.PathLike, name: str, verify: bool) -> Path:
    path = Path(out_dir) / name
    if not path.is_file():
        raise ValueError(f"there is no {paths.show(path)}: run 01_preprocess first")
    if verify:
        manifest = Path(out_dir) / "manifest.json"
        if not manifest.is_file():
            raise ValueError(
                f"there is no {paths.show(manifest)}, so preprocessing did not finish: run 01_preprocess again"
            )
        if _sha256(path) != paths.load_json(manifest)["files"][name]["sha256"]:
            raise ValueError(
                f"{paths.show(path)} is not the file that the manifest was written for: run 01_preprocess again"
            )
    return path


def patient_groups(metadata: pd.DataFrame) -> np.ndarray:
    """Which images belong together, (N,) of str: the patient, or, where that is unknown, each image
    by itself.
    """
    patients = metadata["patient_id"].fillna("").astype(str).to_numpy()
    return np.where(patients == "", [f"image {i}" for i in range(len(patients))], patients)


def count_patients(metadata: pd.DataFrame) -> int:
    """Number of known patients; 0 if the source names none."""
    return metadata["patient_id"][metadata["patient_id"].fillna("") != ""].nunique()


def finding_matrix(findings: Iterable[str]) -> np.ndarray:
    """Which of the 14 `FINDINGS` each image has.

    Parameters
    ----------
    findings : sequence of N str
        Findings joined by ``|``; "No Finding", unknown names and empty text set nothing.

    Returns
    -------
    ndarray, shape (N, 14), bool
    """
    place = {name: column for column, name in enumerate(FINDINGS)}
    texts = list(findings)
    matrix = np.zeros((len(texts), len(FINDINGS)), bool)
    for row, text in enumerate(texts):
        matrix[row, [place[name] for name in text.split("|") if name in place]] = True
    return matrix


def label_combinations(findings: Iterable[str]) -> np.ndarray:
    """Class of each image if every distinct findings text is a class of its own, as in the
    published evaluation.

    Parameters
    ----------
    findings : sequence of N str
        Findings joined by ``|``.

    Returns
    -------
    ndarray, shape (N,), int64
        0..C-1 in the alphabetical order of the texts; -1 for empty text, which is no label.
    """
    texts = list(findings)
    codes = {text: code for code, text in enumerate(sorted(set(texts) - {""}))} | {"": -1}
    return np.array([codes[text] for text in texts], dtype=np.int64)
