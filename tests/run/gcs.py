"""An object store in memory that answers as Google's does: fsspec, and over HTTP TensorStore, which writes states.

Objects have generations, which conditions of a request name: a writer must not overwrite what it has not seen.
"""

import json
import os
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """gs:// in memory. It counts how often each object is written, which an object store limits and charges."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs, writes = {}, [""], []
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).replace("gs://", "/", 1))

    def _open(self, path, mode="rb", **kwargs):
        assert "a" not in mode and "+" not in mode, "objects can't be extended"
        if "w" in mode:
            self.writes.append(path)
        return super()._open(path, mode=mode, **kwargs)


class _Handler(BaseHTTPRequestHandler):
    """The part of the JSON API of Google Cloud Storage that TensorStore uses."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _asked(self) -> tuple[str, str, dict[str, str]]:
        """(bucket, object, query)."""
        url = urllib.parse.urlsplit(self.path)
        bucket, _, name = url.path.split("/b/", 1)[1].partition("/o")
        query = dict(urllib.parse.parse_qsl(url.query))
        return bucket, urllib.parse.unquote(name.removeprefix("/")) or query.get("name", ""), query

    def _answer(self, code: int, body: bytes = b"", **headers: Any) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    @staticmethod
    def _generation(path: str) -> int:
        """0 where there is no object."""
        file = Bucket.store.get(path)
        return 0 if file is None else int(file.modified.timestamp() * 1e6)

    def _refused(self, path: str, query: dict[str, str]) -> bool:
        """Whether a condition of the request doesn't hold; then it is answered."""
        now = self._generation(path)
        if int(query.get("ifGenerationMatch", now)) != now:
            self._answer(412)
        elif "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now:
            self._answer(304)
        else:
            return False
        return True

    def _about(self, bucket: str, name: str) -> dict[str, str]:
        path = f"/{bucket}/{name}"
        size, generation = len(Bucket.store[path].getvalue()), self._generation(path)
        return {"bucket": bucket, "name": name, "size": str(size), "generation": str(generation)}

    def do_GET(self) -> None:
        bucket, name, query = self._asked()
        path = f"/{bucket}/{name}"
        if not name:
            start = f"/{bucket}/{query.get('prefix', '')}"
            names = [p.removeprefix(f"/{bucket}/") for p in sorted(Bucket.store) if p.startswith(start)]
            self._json({"kind": "storage#objects", "items": [self._about(bucket, n) for n in names]})
        elif path not in Bucket.store:
            self._answer(404)
        elif not self._refused(path, query):
            if query.get("alt") != "media":
                self._json(self._about(bucket, name))
                return
            content, generation = Bucket.store[path].getvalue(), self._generation(path)
            code, about = 200, {"x_goog_generation": generation}
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                whole, begin = len(content), int(first) if first else len(content) - int(last)
                end = min(int(last), whole - 1) if first and last else whole - 1
                code, content = 206, content[begin : end + 1]
                about["Content_Range"] = f"bytes {begin}-{end}/{whole}"
            self._answer(code, content, **about)

    def do_POST(self) -> None:
        bucket, name, query = self._asked()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._refused(f"/{bucket}/{name}", query):
            Bucket().pipe_file(f"/{bucket}/{name}", content)
            self._json(self._about(bucket, name))

    def do_DELETE(self) -> None:
        bucket, name, query = self._asked()
        path = f"/{bucket}/{name}"
        if path not in Bucket.store:
            self._answer(404)
        elif not self._refused(path, query):
            del Bucket.store[path]
            self._answer(204)


def serve() -> str:
    """Starts the server of this process, once, and tells TensorStore of it. Returns its address."""
    if not _SERVER:
        _SERVER.append(ThreadingHTTPServer(("127.0.0.1", 0), _Handler))
        threading.Thread(target=_SERVER[0].serve_forever, daemon=True).start()
        os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://127.0.0.1:{_SERVER[0].server_port}"
        os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "nobody"
    return os.environ["TENSORSTORE_GCS_HTTP_URL"]


_SERVER: list[ThreadingHTTPServer] = []
