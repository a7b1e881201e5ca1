"""Archives unpacked without harm: nothing outside the folder, no links, no doubles, no bombs, and
no member taken before it is verified.
"""

from __future__ import annotations

import gzip
import itertools
import os
import re
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from tqdm import tqdm

from lib.data.http import DownloadError, naming_disk_errors

MAX_MEMBERS = 300_000  # NIH's set has 112,120 images
MAX_MEMBER_BYTES = 2**28  # the largest of NIH's images has 1 MB, its table 8 MB
MAX_BYTES = 10**11  # NIH's set has 45 GB
NESTED = ".zip"
_BLOCK = 2**18
_FORBIDDEN = re.compile(
    r'[\x00-\x1f\x7f<>:"|?*\\]'
)  # what Windows forbids is forbidden everywhere: ":" hides streams and drives
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    UnicodeDecodeError,
    struct.error,
)
_DAMAGED_TAR = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError)


class ArchiveError(DownloadError):
    """An archive that is refused or damaged; the message names the member and the reason."""


def fault_of_name(name: str) -> str:
    """Why a member of this name is refused; empty if it is not."""
    if not name or len(name) > 400:
        return "has no usable name"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "has an absolute name"
    parts = name.removesuffix("/").split("/")
    if ".." in parts:
        return "leads out of the folder"
    if (
        any(part in ("", ".") for part in parts)
        or _FORBIDDEN.search(name)
        or not name.isprintable()
    ):
        return "has a name that not every system can write"
    if any(part.endswith((" ", ".")) or _DEVICES.fullmatch(part) for part in parts):
        return "has a name that not every system can write"
    return ""


def _key(name: str) -> str:
    """Names that are one file on some system: case and accents do not tell them apart on macOS and
    Windows.
    """
    return unicodedata.normalize("NFC", name).casefold()


class _Names:
    """The names seen so far in an archive, to refuse the second of a kind and a file that is a
    folder, too.
    """

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def fault(self, name: str, folder: bool) -> str:
        key = _key(name.removesuffix("/"))
        above = {str(parent) for parent in PurePosixPath(key).parents} - {"."}
        if above & self._files or (key in self._files) or (not folder and key in self._folders):
            return "is there twice"
        self._folders |= above
        (self._folders if folder else self._files).add(key)
        return ""


def check_zip(archive: zipfile.ZipFile, label: str) -> list[zipfile.ZipInfo]:
    """The files of a zip in the order in which they lie in it; ArchiveError names the first member
    that must not be unpacked.
    """
    names, files, total = _Names(), [], 0
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        raise ArchiveError(
            f"{label} is refused: it claims {len(infos):,} members; nothing was unpacked"
        )
    for info in infos:
        mode = info.external_attr >> 16
        kind = stat.S_IFMT(mode)
        # orig_filename is what stands in the archive: ZipInfo cuts a name at a NUL and turns
        # backslashes on Windows
        fault = fault_of_name(info.orig_filename) or names.fault(info.filename, info.is_dir())
        if kind == stat.S_IFLNK:
            fault = "is a link"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR) or (kind == stat.S_IFDIR) > info.is_dir():
            fault = fault or "is neither a file nor a folder"
        elif info.flag_bits & 0x41:
            fault = fault or "is encrypted"
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            fault = fault or f"is packed by method {info.compress_type}"
        elif info.file_size > (
            MAX_BYTES if info.filename.lower().endswith(NESTED) else MAX_MEMBER_BYTES
        ):
            fault = fault or f"is too large ({info.file_size:,} bytes)"
        elif info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
            fault = fault or "has two lengths"
        if fault:
            raise ArchiveError(
                f"{label} is refused: its member {info.orig_filename[:80]!r} {fault}; nothing was unpacked"
            )
        total += info.file_size
        if not info.is_dir():
            files.append(info)
    if total > MAX_BYTES:
        raise ArchiveError(
            f"{label} is refused: it would unpack to {total:,} bytes; nothing was unpacked"
        )
    files.sort(key=lambda info: info.header_offset)
    for info, following in itertools.pairwise(files):
        if (
            info.header_offset + info.compress_size > following.header_offset
        ):  # one deflated block claimed many times is a bomb
            raise ArchiveError(
                f"{label} is refused: its members {info.filename[:80]!r} and {following.filename[:80]!r} overlap"
            )
    return files


@dataclass
class ZipPlan:
    """What is still to be taken from a zip. `read_plan` makes it, `unpack` carries it out.

    Attributes
    ----------
    todo : list of ZipInfo
        In their order in the archive, so that a stream is read forwards.
    done : int
        Files there already, their CRC-32 checked.
    copies : int
        Files left out because another member has the same last name, length and CRC-32.
    """

    archive: zipfile.ZipFile
    label: str
    target: Path
    todo: list[zipfile.ZipInfo]
    done: int
    copies: int

    @property
    def bytes_needed(self) -> int:
        """Disk that `todo` takes, with what a file system rounds up."""
        return sum(info.file_size + 4096 for info in self.todo)

    @property
    def bytes_to_read(self) -> int:
        """Bytes of the archive that hold `todo`."""
        return sum(info.compress_size for info in self.todo)


def read_plan(opened: BinaryIO, target: Path, label: str) -> ZipPlan:
    """Check a zip as a whole and compare it with what is in `target`; nothing is written.

    Parameters
    ----------
    opened : seekable binary file
        The archive, here or on a server (`lib.data.http.RemoteFile`).
    target : Path
        Folder to unpack to.
    label : str
        What the archive is, for messages.

    Raises
    ------
    ArchiveError
        Not a whole zip, or one with a member that must not be unpacked.
    """
    try:
        archive = zipfile.ZipFile(opened)
        infos = check_zip(archive, label)
    except _DAMAGED as error:
        raise ArchiveError(f"{label} is not a whole zip archive ({error})") from None
    seen: set[tuple[str, int, int]] = set()
    wanted = []
    for info in sorted(infos, key=lambda info: (info.filename.count("/"), info.header_offset)):
        identity = (PurePosixPath(info.filename).name, info.file_size, info.CRC)
        if identity not in seen:  # Kaggle's sample holds every image in two folders
            wanted.append(info)
        seen.add(identity)
    wanted.sort(key=lambda info: info.header_offset)
    there = [
        info
        for info in wanted
        if (target / info.filename).is_file()
        and (target / info.filename).stat().st_size == info.file_size
    ]
    whole: set[int] = set()
    if there:  # a power cut can leave a file of the right length that holds zeros
        with tqdm(
            total=sum(info.file_size for info in there),
            desc="check",
            unit="B",
            unit_scale=True,
            mininterval=0.5,
        ) as bar:
            for info in there:
                if _crc(target / info.filename) == info.CRC:
                    whole.add(info.header_offset)
                bar.update(info.file_size)
    todo = [info for info in wanted if info.header_offset not in whole]
    return ZipPlan(archive, label, target, todo, len(whole), len(infos) - len(wanted))


def _crc(path: Path) -> int:
    value = 0
    with open(path, "rb") as handle:
        while block := handle.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def unpack(plan: ZipPlan, again: Callable[[], None] = lambda: None) -> None:
    """Unpack what `plan` names. Each file gets its name only when its length and CRC-32 are the
    archive's.

    Parameters
    ----------
    again : callable
        Called before a damaged member is read a second time, say to drop a connection.

    Raises
    ------
    ArchiveError
        A member is damaged, twice.
    DownloadError
        The folder holds something in the place of a member that is no file.
    OSError
        The folder cannot be written or the disk is full. What was unpacked before stays.
    """
    with tqdm(
        total=plan.bytes_to_read, desc=plan.label, unit="B", unit_scale=True, mininterval=0.5
    ) as bar:
        for info in plan.todo:
            place = _place(plan.target, info.filename)
            for attempt in range(2):
                try:
                    with plan.archive.open(info) as member:
                        _write(member, place, info.file_size)
                    break
                except _DAMAGED as error:
                    fault = str(error)
                if attempt:
                    raise ArchiveError(
                        f"{plan.label}: its member {info.filename[:80]!r} is damaged, twice ({fault}); try again later"
                    )
                again()
            bar.update(info.compress_size)


def _place(target: Path, name: str) -> Path:
    """Where a member goes; DownloadError if a link in the folder would carry it elsewhere or
    something else is there.
    """
    place = target / name
    if not place.parent.resolve().is_relative_to(target.resolve()):
        raise DownloadError(f"{place.parent} is a link out of {target}: remove the link")
    if place.is_symlink() or (place.exists() and not place.is_file()):
        raise DownloadError(
            f"{place} is not a file, and one of that name is to be written there: move it away"
        )
    with naming_disk_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _write(source: IO[bytes], place: Path, size: int) -> None:
    """Copy exactly `size` bytes; `source` raises at its end if their checksum is wrong."""
    part = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        with naming_disk_errors(place), open(part, "wb") as handle:
            length = 0
            while block := source.read(_BLOCK):
                handle.write(block)
                length += len(block)
        if length != size:
            raise EOFError(f"{length:,} bytes, not {size:,}")
        with naming_disk_errors(place):
            os.replace(part, place)
    finally:
        with suppress(OSError):  # what went wrong before matters more
            part.unlink(missing_ok=True)


def tar_folder(path: Path) -> str | None:
    """``images_001`` for ``images_001.tar.gz``, None if it is not named as NIH names its archives."""
    named = re.fullmatch(r"(images_\d{2,3})\.(tar\.gz|tgz)", path.name, re.IGNORECASE)
    return named[1].lower() if named else None


def list_tar(path: Path) -> dict[str, int]:
    """Length of each file in a ``.tar.gz`` by its last name. All of the archive is read for that;
    ArchiveError if it is damaged.
    """
    found = {}
    try:
        with (
            open(path, "rb") as raw,
            gzip.open(raw) as opened,
            tarfile.open(fileobj=opened, mode="r|") as tar,
        ):
            with tqdm(
                total=path.stat().st_size,
                desc=f"list {path.name}",
                unit="B",
                unit_scale=True,
                mininterval=0.5,
            ) as bar:
                for member in tar:
                    if member.isreg():
                        found[PurePosixPath(member.name).name] = member.size
                    bar.update(raw.tell() - bar.n)
            _to_the_end(opened)
    except _DAMAGED_TAR as error:
        raise ArchiveError(_damaged(path, error)) from None
    return found


def _to_the_end(opened: gzip.GzipFile) -> None:
    """The checksum of gzip stands at its very end."""
    while opened.read(_BLOCK):
        pass


def unpack_tar(path: Path, target: Path) -> int:
    """Unpack a ``.tar.gz`` into a new folder that appears only when all of it is verified; return
    the number of files.

    Raises
    ------
    ArchiveError
        Damaged or cut off, or with a member that must not be unpacked: nothing of it is left
        behind.
    OSError
        The archive cannot be read, the folder cannot be written, or the disk is full.
    """
    staging = target.with_name(f".{target.name}.partial")
    names, count, total = _Names(), 0, 0
    try:
        shutil.rmtree(staging, ignore_errors=True)
        with (
            open(path, "rb") as raw,
            gzip.open(raw) as opened,
            tarfile.open(fileobj=opened, mode="r|") as tar,
        ):
            with tqdm(
                total=path.stat().st_size,
                desc=path.name,
                unit="B",
                unit_scale=True,
                mininterval=0.5,
            ) as bar:
                for member in tar:
                    name = member.name.removeprefix("./")
                    if member.isdir() and name in ("", "."):
                        continue
                    count, total = count + 1, total + member.size
                    fault = fault_of_name(name) or names.fault(name, member.isdir())
                    if member.issym() or member.islnk():
                        fault = "is a link"
                    elif not (member.isreg() or member.isdir()) or member.issparse():
                        fault = "is neither a file nor a folder"
                    elif member.size > MAX_MEMBER_BYTES or total > MAX_BYTES or count > MAX_MEMBERS:
                        fault = fault or f"is too large ({member.size:,} bytes, {total:,} in all)"
                    if fault:
                        raise ArchiveError(
                            f"{path.name} is refused: its member {name[:80]!r} {fault}; nothing of it was unpacked"
                        )
                    if member.isreg():
                        _write(tar.extractfile(member), _place(staging, name), member.size)
                    bar.update(raw.tell() - bar.n)
                _to_the_end(opened)
        if not staging.is_dir():
            raise ArchiveError(f"{path.name} holds no files: download it again")
        with naming_disk_errors(target):
            os.replace(staging, target)
        return count
    except _DAMAGED_TAR as error:
        raise ArchiveError(_damaged(path, error)) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _damaged(path: Path, error: BaseException) -> str:
    return f"{path.name} is damaged or cut off ({error}): download it again"
