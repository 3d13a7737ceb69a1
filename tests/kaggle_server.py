"""Kaggle, on loopback: an HTTPS proxy that answers as its API and as the storage host it redirects to.

The unmodified client is sent here by HTTPS_PROXY, and trusts it by REQUESTS_CA_BUNDLE. Nothing is passed on:
any other host gets a 502.
"""

import base64
import contextlib
import json
import re
import socket
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self, TypeVar

import trustme

from deepfake_core.config import KAGGLE_SOURCES
from tests.builders import write_zip

API, STORAGE = "api.kaggle.com", "storage.googleapis.com"
CHUNK = 1 << 16

T = TypeVar("T")

# To be absent where `environment` is set. Empty is not enough: the client takes an empty name and key for a
# login, and an empty https_proxy hides HTTPS_PROXY. KAGGLE_TOKEN and KAGGLE_API_ENVIRONMENT would win as well.
HIDDEN = (
    "KAGGLE_USERNAME",
    "KAGGLE_KEY",
    "KAGGLE_TOKEN",
    "KAGGLE_API_ENVIRONMENT",
    "KAGGLE_KERNEL_RUN_TYPE",
    "https_proxy",
    "no_proxy",
)


@dataclass(frozen=True)
class Dataset:
    """What Kaggle tells of a data set, and the archive of each of its versions."""

    licence: str = "CC0-1.0"
    private: bool = False
    versions: dict[int, Path] = field(default_factory=dict)


@dataclass
class KaggleServer:
    """Serve data sets as Kaggle does.

    Attributes:
        folder: where the certificate authority's PEM and the archives given as bytes are written; also the
            client's home, so that it finds no credentials of the person who runs the tests.
        requests: what was asked, as (method, path, Range header or "").
        cuts: per coming download, after how many bytes of the body the connection is cut.
        statuses: HTTP statuses to answer the coming API calls with, instead of the truth; 0 is the truth.
            Logging in is not among them.
        storage_statuses: the same for the coming downloads, such as [0, 503, 503] to fail a resume.
        retry_after: the header of that name in the answers that `statuses` and `storage_statuses` ask for.
        answers: status, headers and body to answer the coming downloads with; None is the truth.
        storage: the host to which downloads are redirected; any but the usual one can't be reached.
        signature: what signs the addresses of downloads; a secret.
    """

    folder: Path
    token: str = "KGAT_right"
    datasets: dict[str, Dataset] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    storage_statuses: list[int] = field(default_factory=list)
    retry_after: str = ""
    answers: list[tuple[int, dict[str, str], bytes] | None] = field(default_factory=list)
    storage: str = STORAGE
    signature: str = "9f3c5ecre7a1"

    def add(
        self, slug: str, content: Path | bytes, version: int = 1, licence: str = "CC0-1.0", private: bool = False
    ) -> None:
        """Add a version of a data set; earlier ones stay, and the highest is the current one."""
        if isinstance(content, bytes):
            path = self.folder / "archives" / slug / f"{version}.zip"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            content = path
        known = self.datasets.get(slug, Dataset())
        self.datasets[slug] = Dataset(licence, private, {**known.versions, version: content})

    def add_the_three(self, images: Mapping[str, bytes], others: Mapping[str, bytes]) -> None:
        """Add the three data sets, laid out as Kaggle serves them: one picture three times, and the 140k set's.

        Args:
            images, others: bytes by name, such as real/1.jpg, of the first two and of the last.
        """
        places = ("real_and_fake_face", "real_and_fake_face_detection/real_and_fake_face")
        twice = {f"{place}/training_{name}": data for place in places for name, data in images.items()}
        portraits = {f"real_vs_fake/real-vs-fake/train/{name}": data for name, data in others.items()}
        rows = [f"{i},p,i,{int('/real/' in name)},s,{name[26:]}" for i, name in enumerate(portraits)]
        portraits["train.csv"] = "\n".join([",original_path,id,label,label_str,path", *rows]).encode()
        for source, content in zip(KAGGLE_SOURCES, (twice, images, portraits), strict=True):
            path = write_zip(self.folder / "archives" / f"{source.short_name}.zip", content)
            self.add(source.name, path)

    @property
    def accepted(self) -> tuple[str, str]:
        """The Authorization headers of the access token and of the older user name and key."""
        return f"Bearer {self.token}", "Basic " + base64.b64encode(f"tester:{self.token}".encode()).decode()

    @property
    def downloads(self) -> list[tuple[str, str]]:
        """The storage requests: path and Range header."""
        return [(path, asked) for method, path, asked in self.requests if method == "GET"]

    @property
    def environment(self) -> dict[str, str]:
        """The variables to set, for this process or another; those in HIDDEN must be absent."""
        return {
            "HTTPS_PROXY": f"http://127.0.0.1:{self._server.server_port}",
            "NO_PROXY": "localhost,127.0.0.1",
            "REQUESTS_CA_BUNDLE": str(self.folder / "ca.pem"),
            "KAGGLE_API_TOKEN": self.token,
            "KAGGLE_CONFIG_DIR": str(self.folder),  # where kaggle.json is sought; read once, on import
            "HOME": str(self.folder),  # ~/.kaggle holds access_token and credentials.json whatever KAGGLE_CONFIG_DIR is
        }

    def __enter__(self) -> Self:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.folder / "ca.pem")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(API, STORAGE).configure_cert(context)
        self._server = _Server(("127.0.0.1", 0), _make_proxy(self, context))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._thread.join()
        for tunnel in tuple(self._server.tunnels):
            _cut(tunnel)
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close waits for them

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.tunnels: set[socket.socket] = set()


def _cut(connection: socket.socket) -> None:
    """Close both ways at once, without TLS's goodbye."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _take(coming: list[T]) -> T | None:
    try:
        return coming.pop(0)  # atomic: several downloads may ask at once
    except IndexError:
        return None


def _make_proxy(kaggle: KaggleServer, context: ssl.SSLContext) -> type[BaseHTTPRequestHandler]:
    class Proxy(BaseHTTPRequestHandler):
        timeout = 10
        server: _Server

        def do_CONNECT(self) -> None:
            self.close_connection = True
            if self.path not in (f"{API}:443", f"{STORAGE}:443"):
                self.send_error(502, "only Kaggle is here")
                return
            self.send_response(200, "Connection established")
            self.end_headers()
            with contextlib.suppress(OSError), context.wrap_socket(self.connection, server_side=True) as tunnel:
                self.server.tunnels.add(tunnel)
                try:
                    _make_kaggle(kaggle, self.path.removesuffix(":443"))(tunnel, self.client_address, self.server)
                finally:
                    self.server.tunnels.discard(tunnel)

        def log_message(self, *args: object) -> None:
            pass

    return Proxy


def _make_kaggle(kaggle: KaggleServer, host: str) -> type[BaseHTTPRequestHandler]:
    class Kaggle(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits 40 ms for the header to be acknowledged

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            kaggle.requests.append(("POST", self.path, ""))
            if host != API:
                self.answer(405, {"code": 405, "message": "storage takes no POST"})
            elif self.path == "/v1/security.OAuthService/IntrospectToken":
                known = body["token"] == kaggle.token
                self.answer(200, {"active": known, "username": "tester"} if known else {"active": False})
            elif self.headers["Authorization"] not in kaggle.accepted:
                self.answer(401, {"code": 401, "message": "Unauthenticated"})
            elif status := _take(kaggle.statuses):
                self.fail(status)
            else:
                self.answer_about(f"{body['ownerSlug']}/{body['datasetSlug']}", body.get("datasetVersionNumber"))

        def answer_about(self, slug: str, version: int | None) -> None:
            dataset = kaggle.datasets.get(slug, Dataset())
            current = max(dataset.versions, default=0)
            version = version or current
            if dataset.private:
                self.answer(403, {"code": 403, "message": "Permission 'datasets.get' was denied"})
            elif version not in dataset.versions:
                self.answer(404, {"code": 404, "message": f"no {slug}"})
            elif self.path == "/v1/datasets.DatasetApiService/GetDataset":
                size = dataset.versions[current].stat().st_size
                truth = {"currentVersionNumber": current, "licenseName": dataset.licence, "totalBytes": size}
                self.answer(200, {"ref": slug, **truth})
            elif self.path == "/v1/datasets.DatasetApiService/DownloadDataset":
                signed = f"X-Goog-Expires=259200&X-Goog-Signature={kaggle.signature}"
                self.answer(
                    302, {}, Location=f"https://{kaggle.storage}/kaggle-data-sets/{slug}/{version}.zip?{signed}"
                )
            else:
                self.answer(404, {"code": 404, "message": f"no method {self.path}"})

        def fail(self, status: int) -> None:
            asked = {"Retry-After": kaggle.retry_after} if kaggle.retry_after else {}
            self.answer(status, {"code": status, "message": "as the test asked"}, **asked)

        def answer(self, status: int, content: dict, **headers: str) -> None:
            self.send_bytes(status, {**headers, "Content-Type": "application/json"}, json.dumps(content).encode())

        def send_bytes(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            asked = self.headers.get("Range", "")
            path, _, query = self.path.partition("?")
            kaggle.requests.append(("GET", path, asked))
            found = re.fullmatch(r"/kaggle-data-sets/(.+)/(\d+)\.zip", path)
            file = found and kaggle.datasets.get(found[1], Dataset()).versions.get(int(found[2]))
            if status := _take(kaggle.storage_statuses):
                self.fail(status)
            elif answer := _take(kaggle.answers):
                self.send_bytes(*answer)
            elif host != STORAGE or not file:
                self.answer(404, {"error": "no such object"})
            elif not query.endswith(kaggle.signature):
                self.answer(403, {"error": "not signed"})
            else:
                self.send(file, asked)

        def send(self, path: Path, asked: str) -> None:
            stat = path.stat()
            size, changed = stat.st_size, formatdate(stat.st_mtime, usegmt=True)
            etag = f'"{size:x}-{stat.st_mtime_ns:x}"'
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
            if span and self.headers.get("If-Range", etag) not in (etag, changed):
                span = None
            start, stop = (int(span[1]), min(int(span[2] or size) + 1, size)) if span else (0, size)
            if span and start >= stop:
                self.answer(416, {"error": "no such range"}, **{"Content-Range": f"bytes */{size}"})
                return
            self.send_response(206 if span else 200)
            if span:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.send_header("Content-Length", str(stop - start))
            self.send_header("Content-Type", "application/zip")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", etag)
            self.send_header("Last-Modified", changed)
            self.end_headers()
            cut = _take(kaggle.cuts)
            left = stop - start if cut is None else min(cut, stop - start)
            with path.open("rb") as file:
                file.seek(start)
                while left and (chunk := file.read(min(CHUNK, left))):
                    self.wfile.write(chunk)
                    left -= len(chunk)
            if cut is not None:
                _cut(self.connection)
                self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    return Kaggle
