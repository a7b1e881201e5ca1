"""A server on 127.0.0.1 for tests of downloads: it sends ranges, and fails as it is told."""

import io
import json
import re
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SIGNATURE = "SIGNEDsignature"


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
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if path.name[0] != "." and path.name != "source.json"
    }


class Server:
    """Serves `files`.

    Attributes
    ----------
    files : dict
        Content by path.
    faults : list
        What the next GETs do instead: (status, headers), or a number of bytes after which the
        answer breaks off. None lets one pass.
    refusals : list
        Statuses of the next calls of Kaggle's API; None lets one pass.
    ranges : bool
        Whether a part of a file is sent if asked for.
    log : list
        (method, path, headers) of each request.
    """

    def __init__(self):
        self.files, self.faults, self.refusals, self.log = {}, [], [], []
        self.ranges, self.token = True, None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                server.log.append(("GET", self.path, dict(self.headers)))
                server.get(self)

            def do_POST(self):
                server.log.append(("POST", self.path, dict(self.headers)))
                server.post(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.storage = f"http://localhost:{port}"  # another host: credentials must not follow there
        options = {"poll_interval": 0.01}
        threading.Thread(target=self.http.serve_forever, kwargs=options, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def paths(self, method="GET"):
        return [path for name, path, _ in self.log if name == method]

    def answer(self, handler, status, headers=None, body=b"", length=None):
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        try:
            handler.wfile.write(body)
        except OSError:  # who asked has gone
            handler.close_connection = True

    def get(self, handler):
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, tuple):
            return self.answer(handler, *fault)
        content = self.files.get(handler.path.partition("?")[0])
        if content is None:
            return self.answer(handler, 404)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        begin, end, status = 0, len(content), 200
        if asked and self.ranges:
            begin, status = int(asked[1]), 206
            end = min(end, int(asked[2]) + 1) if asked[2] else end
            if begin >= len(content):
                return self.answer(handler, 416)
        headers = {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}
        body = content[begin:end]
        if fault is not None:
            handler.close_connection = True
        return self.answer(handler, status, headers, body[:fault], len(body))

    def post(self, handler):
        """Kaggle's API: is a token valid, and where is a data set?"""
        asked = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        kind = {"Content-Type": "application/json"}
        if handler.path.endswith("/IntrospectToken"):
            known = asked["token"] == self.token
            answer = {"active": known, "username": "tester" if known else ""}
            return self.answer(handler, 200, kind, json.dumps(answer).encode())
        if refusal := self.refusals.pop(0) if self.refusals else None:
            sent = {"code": refusal, "message": f"you sent {handler.headers['Authorization']}"}
            return self.answer(handler, refusal, kind, json.dumps(sent).encode())
        place = f"{self.storage}/{asked['ownerSlug']}/{asked['datasetSlug']}?X={SIGNATURE}"
        return self.answer(handler, 302, {"Location": place})
