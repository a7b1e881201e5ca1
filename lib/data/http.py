"""Files over HTTP: retried, resumed after a cut, checked; and archives, unpacked file by file.

`urllib3.Retry` repeats a request that finds no connection or a busy server. If a body stops
halfway, `RemoteFile` asks for the rest of it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import requests
from requests.adapters import HTTPAdapter, Retry
from tqdm import tqdm

TRIES = 7  # in a row that bring nothing
TIMEOUT = (20, 90)  # seconds to connect, and between two bytes
READ_AHEAD = 2**24  # bytes of a zip per request: 45 GB take 2,700 requests, not one per image
_BLOCK = 2**18
_HINT = (
    "free some space, or choose another folder with CXR_DATA_DIR; what has arrived is kept, and "
    "the same command goes on from there"
)
_CUT = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


class DownloadError(RuntimeError):
    """Something did not arrive; the message is one line that says why and what to do."""


def need_space(folder: Path, n_bytes: int, what: str) -> None:
    """Raise DownloadError unless `n_bytes` are free where `folder` is or will be."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < n_bytes:
        raise DownloadError(
            f"{what} needs {tqdm.format_sizeof(n_bytes, 'B')} in {folder}, and only "
            f"{tqdm.format_sizeof(free, 'B')} are free: {_HINT}"
        )


@contextmanager
def naming_disk_errors(path: Path) -> Iterator[None]:
    """An OSError of the block names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's: requests' errors are OSErrors, too
            raise
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"could not write {path}: {reason}; {_HINT}") from error


class _Adapter(HTTPAdapter):
    """An adapter that waits for no answer forever."""

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        options["timeout"] = options.get("timeout") or TIMEOUT
        return super().send(request, **options)


def patient(session: requests.Session) -> requests.Session:
    """Make a session repeat its requests while a server is busy or gone for a moment."""
    retry = Retry(
        total=TRIES,
        status_forcelist=(408, 429, 500, 502, 503, 504),
        allowed_methods=None,  # any method: Kaggle's API is asked by POST
        backoff_factor=1,  # waits of 0, 2, 4, 8, ... seconds
        respect_retry_after_header=True,
        raise_on_status=False,
    )
    for scheme in ("https://", "http://"):
        session.mount(scheme, _Adapter(max_retries=retry))
    return session


class RemoteFile(io.RawIOBase):
    """A file on a server that `zipfile` can read. Wrap it in a `BufferedReader` of `READ_AHEAD`.

    Parameters
    ----------
    address : callable
        Returns the URL. It is called again when the server refuses, since signed URLs expire.
    name : str
        What it is, for messages.

    Raises
    ------
    DownloadError
        No connection, a refusal, or (from `read`) a server that sends no parts of a file.
    """

    def __init__(self, address: Callable[[], str], name: str) -> None:
        self._address, self._name, self._place = address, name, 0
        self._link = patient(requests.Session())
        self._url = address()
        with self._open(0) as answer:
            self._in_parts = answer.status_code == 206
            self.size = int(answer.headers.get("Content-Length", 0))

    def _open(self, begin: int, end: int | None = None) -> requests.Response:
        """An answer with the bytes from `begin` on, or all; its body is not read yet."""
        wanted = f"bytes={begin}-{'' if end is None else end - 1}"
        headers = {"Range": wanted, "Accept-Encoding": "identity"}
        for _ in range(2):
            try:
                answer = self._link.get(self._url, headers=headers, stream=True)
            except requests.RequestException as error:  # its text may hold a signed address
                fault = f"no connection ({type(error).__name__})"
                break
            if answer.status_code in (200, 206):
                return answer
            answer.close()
            fault = f"the server answers {answer.status_code}"
            self._url = self._address()
        raise DownloadError(f"{self._name}: {fault}; give the same command again later")

    def blocks(self, begin: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from `begin` to `end`; after a cut, ask for the rest."""
        failures = 0
        while begin < end and failures < TRIES:
            start = begin
            with suppress(*_CUT), self._open(begin, end) as answer:
                skip = begin if answer.status_code == 200 else 0  # all of it and not the part
                for block in answer.iter_content(_BLOCK):
                    part, skip = block[skip:], max(0, skip - len(block))
                    begin += len(part)
                    yield part
            failures = failures + 1 if begin == start else 1
            if begin < end:
                time.sleep(2.0 ** (failures - 1))
        if begin < end:
            raise DownloadError(f"{self._name}: cut {TRIES} times at byte {begin:,}; try later")

    def readinto(self, buffer: memoryview) -> int:
        if not self._in_parts:
            raise DownloadError(f"{self._name}: the server sends no parts of the file")
        data = b"".join(self.blocks(self._place, min(self._place + len(buffer), self.size)))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self.size)[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def close(self) -> None:
        self._link.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def download(url: str, path: Path, md5: str) -> Path:
    """Bring a file here, and go on from what an earlier call left.

    What arrives goes to ``<name>.part`` beside `path`. It gets its name when the MD5 is right.

    Raises
    ------
    DownloadError
        No connection, a refusal, or other bytes than they should be, which are thrown away.
    OSError
        The folder cannot be written or the disk is full; what has arrived is kept.
    """
    part = path.with_name(f"{path.name}.part")
    with naming_disk_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file, RemoteFile(lambda: url, path.name) as remote:
            begin = file.tell()
            need_space(part.parent, remote.size - begin, path.name)
            bar = tqdm(total=remote.size, initial=begin, desc=path.name, unit="B", unit_scale=True)
            with bar:
                for block in remote.blocks(begin, remote.size):
                    file.write(block)
                    bar.update(len(block))
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found == md5:
            return part.replace(path)
        part.unlink()
    raise DownloadError(f"{path.name} arrived damaged (MD5 {found}, not {md5}): try again")


def unzip(opened: BinaryIO, target: Path, name: str) -> int:
    """Unpack a zip. A file gets its place when its length and CRC-32 are right.

    Files that are there with the right length and CRC-32 are not read again. Of files with the same
    last name, length and CRC-32 one is taken: Kaggle's sample holds every image twice.

    Parameters
    ----------
    opened : seekable binary file
        The archive, here or on a server.
    target : Path
    name : str
        Of the archive, for messages.

    Returns
    -------
    int
        Number of files.

    Raises
    ------
    DownloadError
        It is damaged or no zip, or there is too little space.
    OSError
        The folder cannot be written or the disk is full.
    """
    staging = target / ".part"
    try:
        with zipfile.ZipFile(opened) as archive, naming_disk_errors(target):
            files = [info for info in archive.infolist() if not info.is_dir()]
            files.sort(key=lambda info: -info.filename.count("/"))  # of doubles the last one stays
            wanted = {(Path(f.filename).name, f.file_size, f.CRC): f for f in files}
            todo = [f for f in wanted.values() if not _is_whole(target / f.filename, f)]
            todo.sort(key=lambda info: info.header_offset)  # so that it is read forwards
            total = sum(info.file_size for info in todo)
            need_space(target, total, name)
            with tqdm(total=total, desc=name, unit="B", unit_scale=True) as bar:
                for info in todo:
                    # extract never leaves its folder, and raises if the CRC-32 is another one
                    file = Path(archive.extract(info, staging))
                    place = target / file.relative_to(staging)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    file.replace(place)
                    bar.update(info.file_size)
            return len(wanted)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DownloadError(f"{name} is a damaged zip ({error}): try again") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_whole(path: Path, info: zipfile.ZipInfo) -> bool:
    if not path.is_file() or path.stat().st_size != info.file_size:
        return False
    crc = 0
    with open(path, "rb") as handle:
        while block := handle.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc == info.CRC


def untar(path: Path, target: Path) -> None:
    """Unpack a ``.tar.gz``; files that are there already with the right length are skipped.

    Raises
    ------
    DownloadError
        It is damaged or cut off, or tarfile's ``data`` filter refuses a member.
    OSError
        The folder cannot be written or the disk is full.
    """

    def missing(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        place = Path(folder, member.name)
        there = place.is_file() and place.stat().st_size == member.size
        return None if there else tarfile.data_filter(member, folder)

    try:
        with naming_disk_errors(target), tarfile.open(path) as archive:
            archive.extractall(target, tqdm(archive, path.name, unit="file"), filter=missing)
            while archive.fileobj.read(_BLOCK):  # gzip compares its checksum at the end
                pass
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        fault = f"{path.name} is damaged or cut off ({error}): download it again"
        raise DownloadError(fault) from None
