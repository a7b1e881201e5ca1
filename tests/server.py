"""A server on 127.0.0.1 for tests of downloads: it sends ranges, and fails as it is told."""

import io
import json
import re
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

SIGNATURE = "SIGNEDsignature"
# a connection that the server cuts is collected whenever Python gets to it
cuts = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
)


def make_folder(folder, files):
    """A folder of `files`, content by name."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def packed(files, compression=zipfile.ZIP_DEFLATED):
    """A zip of `files`, content by name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def make_tar(path, files):
    """A ``.tar.gz`` of `files`, content by name."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def visible(folder):
    """Content of all files in `folder` but hidden ones and notes."""
    files = [p for p in folder.rglob("[!.]*") if p.is_file() and p.name != "source.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Server:
    """Serves `files` (content by path), and notes method, path and headers in `log`.

    `faults` are what the next GETs do instead: nothing (None), (status, headers), or a number of
    bytes after which the answer breaks off. `refusals` are the next answers of Kaggle's API."""

    def __init__(self):
        self.files, self.faults, self.refusals, self.log = {}, [], [], []
        self.token, server = None, self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                server.log.append((self.command, self.path, dict(self.headers)))
                (server.get if self.command == "GET" else server.post)(self)

            do_POST = do_GET

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.storage = f"http://localhost:{port}"  # another host: credentials must not follow there
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, handler, status, headers=None, body=b"", length=None):
        handler.send_response(status)
        length = len(body) if length is None else length
        for name, value in ((headers or {}) | {"Content-Length": str(length)}).items():
            handler.send_header(name, value)
        handler.end_headers()
        try:
            handler.wfile.write(body)
        except OSError:  # who asked has gone
            handler.close_connection = True

    def get(self, handler):
        fault = self.faults.pop(0) if self.faults else None
        content = self.files.get(handler.path.partition("?")[0])
        if isinstance(fault, tuple) or content is None:
            return self.answer(handler, *(fault if isinstance(fault, tuple) else (404,)))
        asked = handler.headers.get("Range", "bytes=0-")
        begin, end = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
        body = content[int(begin) : int(end) + 1 if end else None]
        handler.close_connection = fault is not None
        headers = {"Content-Range": f"bytes {begin}-{int(begin) + len(body) - 1}/{len(content)}"}
        return self.answer(handler, 206, headers, body[:fault], len(body))

    def post(self, handler):
        """Kaggle's API: is a token valid, and where is a data set?"""
        asked = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        kind = {"Content-Type": "application/json"}
        if handler.path.endswith("/IntrospectToken"):
            known = asked["token"] == self.token
            answer = {"active": known, "username": "tester" if known else ""}
            return self.answer(handler, 200, kind, json.dumps(answer).encode())
        if self.refusals:
            refusal = self.refusals.pop(0)
            sent = {"code": refusal, "message": f"you sent {handler.headers['Authorization']}"}
            return self.answer(handler, refusal, kind, json.dumps(sent).encode())
        place = f"{self.storage}/{asked['ownerSlug']}/{asked['datasetSlug']}?X={SIGNATURE}"
        return self.answer(handler, 302, {"Location": place})
