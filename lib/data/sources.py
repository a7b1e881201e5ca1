"""Where real X-rays come from: Kaggle, ChestMNIST-64 on Zenodo, or the archives that NIH hands out."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

from lib import paths
from lib.data import archives, chestmnist, kaggle_nih
from lib.data.http import DownloadError, Remote, RemoteFile, fetch_file, need_space, size_text

__all__ = ["KEYWORDS", "DownloadError", "is_named", "obtain"]

KEYWORDS = ("kaggle", "kaggle-sample", "chestmnist", "nih")
_WHOLE = ".whole.json"  # in a folder that was filled to the end
_LISTED = ".listed.json"  # what NIH's archives hold
_IMAGE = re.compile(r"\.(png|jpe?g)$", re.IGNORECASE)
_TABLE = re.compile(r"Data_Entry_2017.*\.csv", re.IGNORECASE)
_BESIDE = re.compile(
    r"(Data_Entry_2017|BBox_List_2017).*\.csv|(train_val_list|test_list)\.txt", re.IGNORECASE
)
_BUFFER = 2**20  # bytes of an archive on a server that are read ahead
_SPARE = 2**28  # left free for what else a run writes


def is_named(source: str | os.PathLike) -> bool:
    """Whether `source` is one of `obtain`'s words and not a plain path."""
    return (
        re.fullmatch(r"kaggle|kaggle-sample|chestmnist(:.+)?|nih:.+", str(source), re.DOTALL)
        is not None
    )


def obtain(source: str, raw_dir: Path) -> dict[str, Any]:
    """Bring X-rays here, and say what came and what was verified. What is here already is not
    fetched again.

    Parameters
    ----------
    source : str
        ``"kaggle"`` (112,120 images), ``"kaggle-sample"`` (5,606), ``"chestmnist"``,
        ``"chestmnist:FILE.npz"``, or ``"nih:PATH"`` of the folder with NIH's ``images_001.tar.gz``
        and so on, or what was unpacked from them, beside ``Data_Entry_2017*.csv``.
    raw_dir : Path
        Folder of the data set. Downloads go beside it, under a name of their own: every preset uses
        the same.

    Returns
    -------
    dict
        ``kind`` (``"nih"`` or ``"chestmnist"``), ``path`` where the X-rays lie, ``images``,
        ``csv``, ``origin``, and ``verified``, a sentence on what was compared with what.

    Raises
    ------
    DownloadError
        No credentials, space, connection or permission, or an archive that is damaged or refused:
        one line that says what to do.
    ValueError
        A file or folder that is not what its name promises.
    OSError
        A folder cannot be written or the disk is full; what has arrived is kept.
    """
    word, _, place = str(source).partition(":")
    raw_dir = Path(raw_dir)
    if word in kaggle_nih.SETS:
        kaggle_set = kaggle_nih.SETS[word]
        return _from_kaggle(kaggle_set, raw_dir.with_name(f"{kaggle_set.owner}-{kaggle_set.name}"))
    if word == "chestmnist":
        return _chestmnist(
            Path(place).expanduser() if place else None, raw_dir.with_name("medmnist")
        )
    if word == "nih" and place:
        folder = Path(place).expanduser().resolve()
        return _from_nih(
            folder, raw_dir.with_name(f"nih-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}")
        )
    raise ValueError(
        f"{source!r} is not a source: {', '.join(KEYWORDS[:3])}, chestmnist:FILE.npz or nih:PATH"
    )


# --------------------------------------------------------------------------------------------------


def _from_kaggle(kaggle_set: kaggle_nih.KaggleSet, store: Path) -> dict[str, Any]:
    note, held = _noted(store)
    if note is None or any((store / name).exists() for name in note["unpacked"]):
        with paths.alone(store):
            note, held = _noted(store)  # somebody else may have filled it meanwhile
            if note is None:
                remote = kaggle_nih.remote(kaggle_set)
                try:
                    note = _take_zip(remote, store, kaggle_set.label)
                finally:
                    remote.close()
                held = _contents(store)
                note |= held
                paths.save_json(store / _WHOLE, note)
            for name in note["unpacked"]:  # archives of which all is unpacked, verified and noted
                (store / name).unlink(missing_ok=True)
    if held["images"] != kaggle_set.images:
        warnings.warn(
            f"{kaggle_set.label} brought {held['images']:,} images and not {kaggle_set.images:,}",
            stacklevel=3,
        )
    return {
        "kind": "nih",
        "path": str(store.resolve()),
        "images": held["images"],
        "csv": held["csv"],
        "origin": f"{kaggle_set.label} from Kaggle",
        "verified": f"{note['members']:,} files: length and CRC-32 of each as the archive states them",
    }


def _noted(store: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The note in a folder that was filled to the end and still is, else None, and what the folder
    holds.
    """
    held = _contents(store)
    note = paths.load_json(store / _WHOLE) if (store / _WHOLE).is_file() else None
    if note and (
        held["files"] < note["files"] or held["bytes"] < note["bytes"]
    ):  # a file of the user's beside them does no harm
        note = None
    return note, held


def _take_zip(remote: Remote, store: Path, label: str) -> dict[str, Any]:
    """Unpack a zip from a server into `store`, member by member; only if the server sends no parts
    is the archive kept meanwhile.
    """
    remote.probe()
    archive = store / ".archive.zip"
    if remote.ranged and not archive.exists():
        opened = io.BufferedReader(RemoteFile(remote), _BUFFER)
    else:
        if not archive.exists():
            what = f"{label}, whose server sends no parts, so that archive and images must lie here at once,"
            need_space(store, 2 * (remote.size or 0) + _SPARE, what)
            fetch_file(remote, archive)
        opened = open(archive, "rb")  # noqa: SIM115 - closed in the with that follows
    with opened:
        try:
            plan = archives.read_plan(opened, store, label)
            need_space(store, plan.bytes_needed + _SPARE, f"{label} ({len(plan.todo):,} files)")

            def again() -> None:
                remote.close()
                opened.seek(
                    0, io.SEEK_END
                )  # a buffered reader keeps what it holds for any other seek

            archives.unpack(plan, again)
        except archives.ArchiveError:
            archive.unlink(missing_ok=True)  # of no use: the next call asks for it anew
            raise
    members = plan.done + len(plan.todo)
    copies = plan.copies
    zips = [
        name
        for name in plan.archive.namelist()
        if name.endswith(archives.NESTED) and (store / name).is_file()
    ]
    for name in zips:  # the sample was published as a zip within a zip
        with open(store / name, "rb") as nested:
            plan = archives.read_plan(nested, (store / name).parent, name)
            need_space(store, plan.bytes_needed + _SPARE, f"{name} ({len(plan.todo):,} files)")
            archives.unpack(plan)
        members, copies = members + plan.done + len(plan.todo), copies + plan.copies
    return {"members": members, "copies_left_out": copies, "unpacked": [archive.name, *zips]}


def _contents(store: Path) -> dict[str, Any]:
    """Number and bytes of the files in a folder, of different images among them, and the name of
    the table.
    """
    files, n_bytes, images, tables = 0, 0, set(), []
    for base, folders, names in os.walk(store):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or name == "source.json" or name.endswith(archives.NESTED):
                continue
            files, n_bytes = files + 1, n_bytes + os.stat(os.path.join(base, name)).st_size
            if _IMAGE.search(name):
                images.add(name)
            elif _TABLE.fullmatch(name) or name == "sample_labels.csv":
                tables.append(name)
    return {
        "files": files,
        "bytes": n_bytes,
        "images": len(images),
        "csv": min(tables, default=None),
    }


# --------------------------------------------------------------------------------------------------


def _chestmnist(given: Path | None, store: Path) -> dict[str, Any]:
    path = given or store / chestmnist.NAME
    if given is None and not path.is_file():
        with paths.alone(store):
            if not path.is_file():  # somebody else may have fetched it meanwhile
                _fetch_chestmnist(path)
    facts = chestmnist.check(path)
    note = {
        "kind": "chestmnist",
        "path": str(path.resolve()),
        "images": sum(facts["counts"].values()),
        "csv": None,
        "md5": facts["md5"],
    }
    if facts["published"]:
        origin = f"{chestmnist.NAME}, Zenodo record {chestmnist.RECORD}"
        return note | {
            "origin": origin,
            "verified": "length and MD5 as published, form and range of the arrays",
        }
    return note | {
        "origin": f"{path.name}, not the published file",
        "verified": "form and range of the arrays; the MD5 is another one",
    }


def _fetch_chestmnist(path: Path) -> None:
    remote = Remote(
        chestmnist.request, f"{chestmnist.NAME} from Zenodo", {404: f"see {chestmnist.PAGE}"}
    )
    try:
        fetch_file(remote, path, chestmnist.BYTES, chestmnist.MD5)
    finally:
        remote.close()


# --------------------------------------------------------------------------------------------------


def _from_nih(folder: Path, store: Path) -> dict[str, Any]:
    """NIH's own files: used where they lie if they are unpacked, else unpacked into `store`."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder: give the one with images_001.tar.gz to images_012.tar.gz and Data_Entry_2017*.csv"
        )
    files = sorted(
        Path(base, name)
        for base, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".")
    )
    tables = [file for file in files if _TABLE.fullmatch(file.name)]
    if not tables:
        raise ValueError(
            f"there is no Data_Entry_2017*.csv in {folder}: download it from https://nihcc.app.box.com/v/ChestXray-NIHCC and put it "
            "beside the archives"
        )
    here = {(file.name, file.stat().st_size): file for file in files}
    images = {name for name, _ in here if _IMAGE.search(name)}
    tars = {name: file for file in files if (name := archives.tar_folder(file))}
    if len(tars) < sum(archives.tar_folder(file) is not None for file in files):
        raise ValueError(f"{folder} holds two archives of one name: leave one of each")
    if not images and not tars:
        raise ValueError(
            f"{folder} holds neither images nor images_001.tar.gz to images_012.tar.gz"
        )
    origin = "NIH's own files"
    note = {
        "kind": "nih",
        "path": str(folder),
        "images": len(images),
        "csv": tables[0].name,
        "origin": origin,
        "verified": f"name and length of each file in {len(tars)} archives"
        if tars
        else "nothing yet: the files are read where they lie",
    }
    if not tars:
        return note
    with paths.alone(store):
        members = _members(tars, store) if images else {name: {} for name in tars}
        lacking = {name: sorted(set(members[name].items()) - set(here)) for name in tars}
        if images and not any(lacking.values()):
            return note
        begun = {name: gone for name, gone in lacking.items() if 0 < len(gone) < len(members[name])}
        if begun:
            name, gone = min(begun.items())
            warnings.warn(
                f"{tars[name].name} is unpacked in part only: {len(gone):,} of its {len(members[name]):,} files are not in "
                f"{paths.show(folder)} or have another length ({gone[0][0]}); {len(begun)} such archive(s) are unpacked anew, elsewhere",
                stacklevel=3,
            )
        whole = {
            name: [here[member] for member in members[name].items()]
            for name in tars
            if members[name] and not lacking[name]
        }
        _fill(tars, whole, store)
        for file in (file for file in here.values() if _BESIDE.fullmatch(file.name)):
            with paths.atomic_write(store / file.name) as copy, open(file, "rb") as original:
                shutil.copyfileobj(original, copy)
        held = _contents(store)
    if len(tars) != 12:
        warnings.warn(
            f"{len(tars)} of NIH's 12 archives are in {paths.show(folder)}; the others' images will be missing",
            stacklevel=3,
        )
    checked = "the checksum of each archive" + (
        ", the length of each file that was unpacked before" if whole else ""
    )
    return note | {
        "path": str(store.resolve()),
        "images": held["images"],
        "csv": held["csv"],
        "origin": f"{origin}, {len(tars)} archives unpacked",
        "verified": f"{checked}; {size_text(held['bytes'])} in all",
    }


def _members(tars: dict[str, Path], store: Path) -> dict[str, dict[str, int]]:
    """Length of each file in each archive by its name. To know it an archive must be read to its
    end, so it is noted in `store`.
    """
    noted = store / _LISTED
    known = paths.load_json(noted) if noted.is_file() else {}
    states = {name: [file.stat().st_size, file.stat().st_mtime_ns] for name, file in tars.items()}
    for name, file in tars.items():
        if known.get(name, {}).get("state") != states[name]:
            known[name] = {"state": states[name], "members": archives.list_tar(file)}
            paths.save_json(noted, known)
    return {
        name: {
            member: n for member, n in known[name]["members"].items() if not member.startswith(".")
        }
        for name in tars
    }


def _fill(tars: dict[str, Path], whole: dict[str, list[Path]], store: Path) -> None:
    """A folder in `store` for each archive: by hard links to what is unpacked elsewhere, where the
    disk allows that, else unpacked.
    """
    todo = {name: file for name, file in tars.items() if not (store / name).is_dir()}
    for name in [name for name in todo if name in whole and _linked(whole[name], store / name)]:
        del todo[name]
    need = sum(file.stat().st_size for file in todo.values())
    need_space(
        store, need + need // 20 + _SPARE, f"unpacking {len(todo)} archives"
    )  # PNG is packed already: out is what was in
    for name, file in todo.items():
        archives.unpack_tar(file, store / name)


def _linked(files: list[Path], target: Path) -> bool:
    """Whether `target` now has a hard link to each of `files`."""
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        (staging / "images").mkdir(parents=True)
        for file in files:
            os.link(file, staging / "images" / file.name)
        os.replace(staging, target)
        return True
    except OSError:  # another disk, or a file system without links
        shutil.rmtree(staging, ignore_errors=True)
        return False
