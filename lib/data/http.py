"""Files over HTTP: retried, resumed after a cut, checked; and archives, unpacked file by file.

`urllib3.Retry` repeats a request that finds no connection or a busy server, and `RemoteFile` one
that breaks off. Errors are DownloadError, or OSError of the disk; what has arrived is kept."""

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
from typing import BinaryIO

import requests
from requests.adapters import HTTPAdapter, Retry
from tqdm import tqdm

TRIES = 7  # in a row that bring nothing
BUSY = (408, 429, 500, 502, 503, 504)  # answers after which a request is repeated
TIMEOUT = (20, 90)  # seconds to connect, and between two bytes
READ_AHEAD = 2**24  # bytes of a zip per request: 45 GB take 2,700 requests, not one per image
_BLOCK = 2**18
_HINT = "free some space, or choose another folder with CXR_DATA_DIR; what has arrived is kept, "
_HINT += "and the same command goes on from there"
_CUT = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


class DownloadError(RuntimeError):
    """Something did not arrive; the message is one line that says why and what to do."""


def need_space(folder: Path, n_bytes: int, what: str) -> None:
    """Raise DownloadError unless `n_bytes` are free where `folder` is or will be."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < n_bytes:
        needed, left = (tqdm.format_sizeof(number, "B") for number in (n_bytes, free))
        raise DownloadError(f"{what} needs {needed} in {folder}, only {left} are free: {_HINT}")


@contextmanager
def naming_disk_errors(path: Path) -> Iterator[None]:
    """An OSError of the block names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's: requests' errors are OSErrors, too
            raise
        raise OSError(error.errno, f"could not write {path}: {error.strerror}; {_HINT}") from error


class _Adapter(HTTPAdapter):
    """An adapter that waits for no answer forever."""

    def send(self, request: requests.PreparedRequest, **options) -> requests.Response:
        return super().send(request, **options | {"timeout": options.get("timeout") or TIMEOUT})


def patient(session: requests.Session) -> requests.Session:
    """Make a session repeat its requests while a server is busy or gone for a moment."""
    # Any method, since Kaggle's API is asked by POST; waits of 0, 2, 4, ... s, or of Retry-After.
    how = {"status_forcelist": BUSY, "allowed_methods": None, "raise_on_status": False}
    retry = Retry(TRIES, backoff_factor=1, **how)
    for scheme in ("https://", "http://"):
        session.mount(scheme, _Adapter(max_retries=retry))
    return session


class RemoteFile(io.RawIOBase):
    """A file on a server that `zipfile` can read. Wrap it in a `BufferedReader` of `READ_AHEAD`.

    `address` returns the URL. It is called again when the server refuses, since signed URLs expire.
    `name` is for messages. DownloadError if there is no connection or the server refuses."""

    def __init__(self, address: Callable[[], str], name: str) -> None:
        self._address, self._name, self._place = address, name, 0
        self._link = patient(requests.Session())
        self._url = address()
        with self._open(0) as answer:
            self.size = int(answer.headers.get("Content-Length", 0))

    def _open(self, begin: int, end: int | None = None) -> requests.Response:
        """An answer with the bytes from `begin` on; its body is not read yet."""
        wanted = f"bytes={begin}-{'' if end is None else end - 1}"
        headers = {"Range": wanted, "Accept-Encoding": "identity"}
        for _ in range(2):
            try:
                answer = self._link.get(self._url, headers=headers, stream=True)
            except requests.RequestException as error:  # its text may hold a signed address
                fault = f"no connection ({type(error).__name__})"
                break
            if answer.status_code == 206:
                return answer
            answer.close()
            fault = f"the server answers {answer.status_code}, not with a part of the file"
            self._url = self._address()
        raise DownloadError(f"{self._name}: {fault}; give the same command again later")

    def readinto(self, buffer: memoryview) -> int:
        """Read up to a cut. If nothing has come, ask again."""
        wanted = min(len(buffer), self.size - self._place)
        if wanted <= 0:
            return 0
        for failures in range(TRIES):
            done = 0
            time.sleep(2.0**failures - 1)
            with suppress(*_CUT), self._open(self._place, self._place + wanted) as answer:
                for block in answer.iter_content(_BLOCK):
                    buffer[done : done + len(block)] = block
                    done += len(block)
            if done:
                self._place += done
                return done
        raise DownloadError(f"{self._name}: cut {TRIES} times at {self._place:,} B; try later")

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self.size)[whence]
        return self._place

    def close(self) -> None:
        self._link.close()
        super().close()

    def readable(self) -> bool:
        return True

    seekable = readable


def download(url: str, path: Path, md5: str) -> Path:
    """Bring a file here, and go on from what an earlier call left in ``<name>.part`` beside `path`.
    It gets its name if the MD5 is right, and is thrown away otherwise."""
    part = path.with_name(f"{path.name}.part")
    with naming_disk_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file, RemoteFile(lambda: url, path.name) as remote:
            begin = file.tell()
            need_space(part.parent, remote.size - begin, path.name)
            remote.seek(begin)
            about = {"desc": path.name, "unit": "B", "unit_scale": True}
            with tqdm(total=remote.size, initial=begin, **about) as bar:
                while block := remote.read(READ_AHEAD):
                    file.write(block)
                    bar.update(len(block))
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found == md5:
            return part.replace(path)
        part.unlink()
    raise DownloadError(f"{path.name} arrived damaged (MD5 {found}, not {md5}): try again")


def unzip(opened: BinaryIO, target: Path, name: str) -> int:
    """Unpack a zip, here or on a server; return its number of files. `name` is for messages.

    A file gets its place if its length and CRC-32 are right. Files that are there with their length
    are not unpacked again. Of files with the same last name, length and CRC-32 one is taken, since
    Kaggle's sample holds every image twice."""
    staging = target / ".part"
    try:
        with zipfile.ZipFile(opened) as archive, naming_disk_errors(target):
            files = [info for info in archive.infolist() if not info.is_dir()]
            files.sort(key=lambda info: -info.filename.count("/"))  # of doubles the last one stays
            wanted = {(Path(f.filename).name, f.file_size, f.CRC): f for f in files}
            sizes = {file: file.stat().st_size for file in target.rglob("*") if file.is_file()}
            todo = [f for f in wanted.values() if sizes.get(target / f.filename) != f.file_size]
            total = sum(info.file_size for info in todo)
            need_space(target, total, name)
            with tqdm(total=total, desc=name, unit="B", unit_scale=True) as bar:
                for info in sorted(todo, key=lambda info: info.header_offset):  # read forwards
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


def untar(path: Path, target: Path) -> None:
    """Unpack a ``.tar.gz``; tarfile's filter refuses members that would leave the folder."""
    try:
        with naming_disk_errors(target), tarfile.open(path) as archive:
            archive.extractall(target, tqdm(archive, path.name, unit="file"), filter="data")
            while archive.fileobj.read(_BLOCK):  # gzip compares its checksum at the end
                pass
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        fault = f"{path.name} is damaged or cut off ({error}): download it again"
        raise DownloadError(fault) from None
