"""An object store in memory that answers as Google's does: fsspec in this process; over HTTP TensorStore, which writes
states, and gcsfs, by which other processes read and write files.

Objects have generations, which conditions of a request name: a writer must not overwrite what it has not seen.
"""

import email
import email.policy
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Mapping
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

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

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

    def _list(self, bucket: str, query: Mapping[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        names = [path.removeprefix(f"/{bucket}/") for path in sorted(Bucket.store) if path.startswith(f"/{bucket}/")]
        names = [name for name in names if name.startswith(prefix)]
        folders = {}
        if delimiter:
            ends = {name: name.find(delimiter, len(prefix)) for name in names}
            folders = {name[: end + 1]: None for name, end in ends.items() if end >= 0}
            names = [name for name in names if ends[name] < 0]
        items = [self._about(bucket, name) for name in names]
        self._json({"kind": "storage#objects", "items": items, "prefixes": [*folders]})

    def do_GET(self) -> None:
        bucket, name, query = self._asked()
        path = f"/{bucket}/{name}"
        if not name and not urllib.parse.urlsplit(self.path).path.endswith("/o"):
            self._json({"kind": "storage#bucket", "name": bucket})
        elif not name:
            self._list(bucket, query)
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
        content = self._body()
        if self.path.startswith("/batch/"):
            self._batch(content)
            return
        bucket, name, query = self._asked()
        if query.get("uploadType") == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\n\n".encode()
            about, media = email.message_from_bytes(head + content, policy=email.policy.HTTP).iter_parts()
            name, content = json.loads(about.get_payload())["name"], media.get_payload(decode=True)
        elif query.get("uploadType") == "resumable":
            where = f"http://{self.headers['Host']}/upload/storage/v1/b/{bucket}/o?uploadType=part&{query_of(name)}"
            self._answer(200, Location=where)
            return
        elif query.get("uploadType") == "part":
            began = _parts.setdefault(f"/{bucket}/{name}", bytearray())
            began += content
            if not self.headers["Content-Range"].endswith(f"/{len(began)}"):
                self._answer(308, Range=f"bytes=0-{len(began) - 1}")
                return
            content = bytes(_parts.pop(f"/{bucket}/{name}"))
        if not self._refused(f"/{bucket}/{name}", query):
            Bucket().pipe_file(f"/{bucket}/{name}", content)
            self._json(self._about(bucket, name))

    def _batch(self, content: bytes) -> None:
        """Several removals at once, as a message of several parts."""
        answers = []
        for bucket, name in re.findall(rb"DELETE /storage/v1/b/([^/]+)/o/(\S+) HTTP", content):
            path = f"/{bucket.decode()}/{urllib.parse.unquote(name.decode().partition('?')[0])}"
            code = 404 if Bucket.store.pop(path, None) is None else 204
            answers.append(f"--batch\nContent-Type: application/http\n\nHTTP/1.1 {code} done\n\n")
        self._answer(200, "".join([*answers, "--batch--"]).encode(), Content_Type="multipart/mixed; boundary=batch")

    def do_DELETE(self) -> None:
        bucket, name, query = self._asked()
        path = f"/{bucket}/{name}"
        if path not in Bucket.store:
            self._answer(404)
        elif not self._refused(path, query):
            del Bucket.store[path]
            self._answer(204)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up, as gcsfs does on what it asked twice, are none."""


_parts: dict[str, bytearray] = {}  # of uploads in several requests


def query_of(name: str) -> str:
    return urllib.parse.urlencode({"name": name})


def serve() -> str:
    """Starts the server of this process, once, and tells TensorStore of it. Returns its address."""
    if not _SERVER:
        _SERVER.append(_Server(("127.0.0.1", 0), _Handler))
        threading.Thread(target=_SERVER[0].serve_forever, daemon=True).start()
        os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://127.0.0.1:{_SERVER[0].server_port}"
        os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "nobody"
    return os.environ["TENSORSTORE_GCS_HTTP_URL"]


def for_other_processes() -> dict[str, str]:
    """The environment in which gcsfs and TensorStore of another process find the server of this one."""
    address = serve()
    names = ("TENSORSTORE_GCS_HTTP_URL", "GOOGLE_AUTH_TOKEN_FOR_TESTING")
    plain = {"STORAGE_EMULATOR_HOST": address, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    return {
        **{name: os.environ[name] for name in names},
        **plain,
        "FSSPEC_GS_TOKEN": "anon",
        "FSSPEC_GCS_TOKEN": "anon",
    }


_SERVER: list[_Server] = []
