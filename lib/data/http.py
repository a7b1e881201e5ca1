"""Files over HTTP that arrive whole or not at all: resumed after a cut, retried with patience,
checked, and every failure one line.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import requests
import urllib3
from tqdm import tqdm

TRIES = 7  # attempts in a row that bring nothing; one byte that arrives starts the count anew
LONGEST_WAIT = 120.0  # seconds; a server that asks for more is left alone, and the reader told
TIMEOUT = (20, 90)  # seconds to connect, and between two bytes
_BLOCK = 2**18
_NEAR = 2**18  # a gap that is read over rather than asked around
_LOST = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    urllib3.exceptions.HTTPError,
)


class DownloadError(RuntimeError):
    """What was asked for did not arrive; the message is one line that says why and what to do, and
    holds no credential.
    """


def size_text(n_bytes: float) -> str:
    """``401.6 MB``, ``42.0 GB``: decimal units, as shops and servers count."""
    for unit in ("bytes", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


def need_space(folder: Path, n_bytes: int, what: str) -> None:
    """Raise DownloadError unless `n_bytes` are free where `folder` is or will be."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < n_bytes:
        raise DownloadError(
            f"{what} needs {size_text(n_bytes)} in {folder}, and {size_text(free)} are free: "
            "free some space, or choose another folder with CXR_DATA_DIR"
        )


@contextmanager
def naming_disk_errors(path: Path) -> Iterator[None]:
    """An OSError of the block names `path` and says what to do, as `paths.atomic_write` does for
    files that go through it.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not of the system: gzip's way to say that a file is damaged
            raise
        hint = "free some space, or choose another folder with CXR_DATA_DIR"
        kept = (
            "; what has arrived is kept, and the same command goes on from there"
            if error.errno == errno.ENOSPC
            else ""
        )
        raise OSError(
            error.errno, f"could not write {path}: {error.strerror or error}; {hint}{kept}"
        ) from error


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait (RFC 9110, section 10.2.3: a number or a date), None if it
    does not say.
    """
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", text):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def status_of(error: requests.HTTPError) -> int:
    """HTTP status of an error; Kaggle's client also raises for a JSON body that holds a code of its
    own.
    """
    response = error.response
    if response is None:
        return 0
    if response.status_code < 400:
        with suppress(ValueError, TypeError, AttributeError, requests.RequestException):
            return int(response.json().get("code", response.status_code))
    return response.status_code


def declared_md5(headers: Mapping[str, str]) -> str | None:
    """MD5 (hexadecimal) that a server states: Google's ``X-Goog-Hash``, ``Content-MD5``, or
    Zenodo's ``ETag: "md5:..."``.
    """
    google = re.search(r"md5=([A-Za-z0-9+/]{22}==)", headers.get("X-Goog-Hash", ""))
    encoded = google[1] if google else headers.get("Content-MD5", "").strip()
    if re.fullmatch(r"[A-Za-z0-9+/]{22}==", encoded):
        return base64.b64decode(encoded).hex()
    plain = re.search(
        r"(?:^|md5:)([0-9a-f]{32})\b", f"{encoded.lower()} {headers.get('ETag', '').lower()}"
    )
    return plain[1] if plain else None


class Remote:
    """A file on a server, read from any byte on, through cuts, redirects, expiring addresses and a
    server that is busy.

    Parameters
    ----------
    resolve : callable
        Returns the prepared request that yields the file; it may ask an API for a signed address.
        It is called again when an address that worked is refused, since such addresses expire. It
        may raise what requests raises, or DownloadError.
    name : str
        What it is, for messages: ``"nih-chest-xrays/data from Kaggle"``.
    hints : dict, optional
        What to do about an HTTP status.

    Attributes
    ----------
    size : int or None
        Bytes of the whole file, once connected.
    ranged : bool or None
        Whether the server sends parts, once connected.
    md5 : str or None
        As the server states it, once connected.
    """

    def __init__(
        self,
        resolve: Callable[[], requests.PreparedRequest],
        name: str,
        hints: Mapping[int, str] | None = None,
    ) -> None:
        self.name, self.hints = name, dict(hints or {})
        self.size: int | None = None
        self.ranged: bool | None = None
        self.md5: str | None = None
        self._resolve = resolve
        self._request: requests.PreparedRequest | None = None
        self._identity: str | None = None
        self._response: requests.Response | None = None
        self._position = 0  # of the open response
        self._failures = 0

    def probe(self) -> Remote:
        """Connect, so that `size`, `ranged` and `md5` are known; raises DownloadError."""
        self._patiently(lambda: self._go_to(0), 0)
        return self

    def read(self, position: int, n: int) -> bytes:
        """Up to `n` bytes from `position` on, at least one but at the end; raises DownloadError
        once patience is at an end.
        """
        if n <= 0 or (self.size is not None and position >= self.size):
            return b""
        return self._patiently(lambda: self._read_once(position, n), position)

    def close(self) -> None:
        """Drop the connection; the next `read` makes a new one."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def _patiently(self, action: Callable[[], Any], position: int) -> Any:
        while True:
            try:
                return action()
            except requests.HTTPError as error:
                wait = self._after_status(status_of(error), error.response)
            except requests.exceptions.SSLError as error:
                wait = f"{self.name}: no safe connection ({_reason(error)}); check the clock and the certificates of this machine"
            except _LOST as error:
                wait = self._after_failure(
                    f"lost the connection ({_reason(error)})", None, position
                )
            except (
                requests.RequestException
            ) as error:  # a malformed address, too many redirects: waiting mends nothing
                wait = f"{self.name}: the server's answer cannot be followed ({type(error).__name__}); try again later"
            except OSError as error:  # of the socket; what requests raises was caught above
                wait = self._after_failure(
                    f"lost the connection ({_reason(error)})", None, position
                )
            # Out here no exception is being handled, so none that holds a request with its
            # credentials hangs on ours.
            self.close()
            if isinstance(wait, str):
                raise DownloadError(wait)
            if wait:
                _sleep(wait)

    def _after_status(self, status: int, response: requests.Response | None) -> float | str:
        """Seconds to wait, or the last word."""
        if response is not None:
            response.close()
        if self._request is not None and status in (400, 401, 403, 404, 410):
            self._request = None  # an address that worked has expired
            return 0.0
        self._request = None
        asked = retry_after(response.headers) if response is not None else None
        if status in (408, 429) or status >= 500:
            what = "limits how often it may be asked" if status == 429 else "is in trouble"
            return self._after_failure(f"the server {what} ({status})", asked, None)
        said = {
            401: "the server refuses the credentials",
            403: "the server does not allow it",
            404: "the server does not have it",
            416: "the file on the server is shorter than what is here",
        }
        hint = self.hints.get(status, "see whether the address opens in a browser")
        return f"{self.name}: {said.get(status, 'the server refuses')} ({status}); {hint}"

    def _after_failure(self, reason: str, asked: float | None, position: int | None) -> float | str:
        """Seconds to wait, or the last word."""
        self._failures += 1
        again = (
            "the same command goes on from there" if position else "the same command tries again"
        )
        where = (
            f" at byte {position:,}{f' of {self.size:,}' if self.size else ''}" if position else ""
        )
        if asked is not None and asked > LONGEST_WAIT:
            return f"{self.name}: {reason} and asks to wait {asked / 60:.0f} minutes; {again} then"
        if self._failures >= TRIES:
            return f"{self.name}: {reason}{where}, {self._failures} times in a row; check the network, then {again}"
        backoff = min(2.0 ** (self._failures - 1), 60.0) * random.uniform(
            0.75, 1.25
        )  # spread, lest all clients come back at once
        return max(asked or 0.0, backoff)

    def _read_once(self, position: int, n: int) -> bytes:
        self._go_to(position)
        raw = self._response.raw
        # read1 hands over what has arrived before a cut; read would wait for all of n and lose it
        data = (
            raw.read1(n, decode_content=False)
            if hasattr(raw, "read1")
            else raw.read(min(n, 4096), decode_content=False)
        )
        self._position += len(data)
        if data:
            self._failures = 0
        else:
            self.close()
            if self.size is None:
                self.size = position  # no length was stated, and the server ended properly
            elif position < self.size:
                raise requests.ConnectionError("closed early")
        return data

    def _go_to(self, position: int) -> None:
        gap = position - self._position
        if self._response is None or not 0 <= gap <= _NEAR:
            self.close()
            self._connect(position)
        while self._position < position:
            data = self._response.raw.read(
                min(_BLOCK, position - self._position), decode_content=False
            )
            if not data:
                raise requests.ConnectionError("closed early")
            self._position += len(data)

    def _connect(self, position: int) -> None:
        request = self._resolve() if self._request is None else self._request
        asking = request.copy()
        asking.headers["Range"] = f"bytes={position}-"
        asking.headers["Accept-Encoding"] = "identity"
        with requests.Session() as session:
            settings = session.merge_environment_settings(asking.url, {}, True, None, None)
            response = session.send(asking, timeout=TIMEOUT, allow_redirects=True, **settings)
        self._response = response
        if response.status_code == 206:
            part = re.fullmatch(
                r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", "").strip()
            )
            if not part or int(part[1]) != position:
                raise requests.ConnectionError("another part than the one asked for")
            size, begin = int(part[3]), position
        elif (
            response.status_code == 200
        ):  # the whole file, though a part was asked for: read up to where we are
            length = response.headers.get("Content-Length", "")
            size, begin = int(length) if length.isdigit() else None, 0
        else:
            response.raise_for_status()
            raise requests.ConnectionError(f"status {response.status_code}")
        self._request, self._position = request, begin
        self._check_same(size, response)

    def _check_same(self, size: int | None, response: requests.Response) -> None:
        identity = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if self.ranged is None:
            self.ranged, self.size, self._identity = response.status_code == 206, size, identity
            self.md5 = declared_md5(response.headers)
        elif (identity and self._identity and identity != self._identity) or (
            size and self.size and size != self.size
        ):
            self.close()
            raise DownloadError(
                f"{self.name}: the file on the server changed while it was read; the same command starts with the new one"
            )


class RemoteFile(io.RawIOBase):
    """A `Remote` as a seekable file, so that `zipfile` can read an archive that is not here. Wrap
    it in `io.BufferedReader`.
    """

    def __init__(self, remote: Remote) -> None:
        super().__init__()
        self._remote, self._place = remote, 0
        if remote.size is None:
            raise DownloadError(f"{remote.name}: the server does not say how long the file is")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = (
            offset
            + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._remote.size}[whence]
        )
        if place < 0:
            raise OSError(errno.EINVAL, "seek before the start")
        self._place = place
        return place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = self._remote.read(self._place, len(buffer))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def fetch_file(remote: Remote, path: Path, size: int | None = None, md5: str | None = None) -> Path:
    """Bring a file here, going on from what an earlier call left.

    What arrives goes to ``<name>.part`` beside `path`, which gets its name only when length and MD5
    are right. A part that turns out wrong is thrown away and fetched once more from the start.

    Parameters
    ----------
    remote : Remote
    path : Path
    size, md5 : optional
        What it must have; else what the server states.

    Raises
    ------
    DownloadError
        No space, no connection, a refusal, or other bytes than they should be.
    OSError
        The folder cannot be written or the disk is full.
    """
    part = path.with_name(path.name + ".part")
    with naming_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
        with open(part, "ab"):
            pass  # an unwritable folder shows here
    remote.probe()
    size, md5 = size or remote.size, md5 or remote.md5
    if size and remote.size and remote.size != size:
        remote.close()
        raise DownloadError(
            f"{remote.name}: the server offers {remote.size:,} bytes and the file has {size:,}; see whether the address is still right"
        )
    if size:
        need_space(path.parent, size - have, path.name)
    fault = ""
    for _ in range(2):
        _append(remote, part, size)
        length = part.stat().st_size
        with open(part, "rb") as handle:
            found = hashlib.file_digest(handle, "md5").hexdigest() if md5 else None
        fault = (
            f"{length:,} bytes, not {size:,}"
            if size and length != size
            else f"MD5 {found}, not {md5}"
            if found != md5
            else ""
        )
        if not fault:
            with naming_disk_errors(path):
                part.replace(path)
            remote.close()
            return path
        part.unlink()
        remote.close()
    raise DownloadError(
        f"{remote.name}: what arrived is damaged, twice ({fault}), and was thrown away; try again later"
    )


def _append(remote: Remote, part: Path, size: int | None) -> None:
    with naming_disk_errors(part), open(part, "ab") as handle:
        have = handle.tell()
        if size and have > size:
            handle.truncate(0)
            have = 0
        with tqdm(
            total=size, initial=have, desc=part.stem, unit="B", unit_scale=True, mininterval=0.5
        ) as bar:
            while True:
                data = remote.read(have, _BLOCK)
                if not data:
                    return
                handle.write(data)
                have += len(data)
                bar.update(len(data))


def _reason(error: BaseException) -> str:
    """A short reason without addresses: a signed one is as good as a credential."""
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        return "no answer in time"
    inner = error
    while True:  # requests wraps urllib3's error, which wraps the system's
        wrapped = (*getattr(inner, "args", ()), getattr(inner, "reason", None), inner.__cause__)
        deeper = next((item for item in wrapped if isinstance(item, BaseException)), None)
        if deeper is None:
            break
        inner = deeper
    if (
        isinstance(inner, OSError)
        and inner.strerror
        and not isinstance(inner, requests.RequestException)
    ):
        return inner.strerror
    names = {"IncompleteRead": "cut off", "RemoteDisconnected": "the server hung up"}
    return names.get(type(inner).__name__) or (
        str(inner) if type(inner) is requests.ConnectionError else type(inner).__name__
    )


def _sleep(seconds: float) -> None:
    time.sleep(seconds)
