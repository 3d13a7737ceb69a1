"""Kaggle, on loopback: an HTTPS proxy that answers as its API and as the storage host it redirects to.

The unmodified client is sent here by HTTPS_PROXY, and trusts it by REQUESTS_CA_BUNDLE.
"""

import base64
import json
import socket
import ssl
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import trustme

API, STORAGE = "api.kaggle.com", "storage.googleapis.com"


@dataclass
class KaggleServer:
    """Serve data sets as Kaggle does.

    Attributes:
        folder: where the certificate authority's PEM is written.
        requests: what was asked, as (method, path, Range header or "").
        cuts: per coming download, after how many bytes the connection is cut.
        statuses: HTTP statuses to answer the coming API calls with, instead of the truth.
    """

    folder: Path
    token: str = "KGAT_right"
    datasets: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)

    def add(self, slug: str, content: bytes, version: int = 1) -> None:
        self.datasets.setdefault(slug, {})[version] = content

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
        return {
            "HTTPS_PROXY": f"http://127.0.0.1:{self._server.server_port}",
            "NO_PROXY": "localhost,127.0.0.1",
            "REQUESTS_CA_BUNDLE": str(self.folder / "ca.pem"),
            "KAGGLE_API_TOKEN": self.token,
            "KAGGLE_CONFIG_DIR": str(self.folder),
        }

    def __enter__(self) -> Self:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.folder / "ca.pem")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(API, STORAGE).configure_cert(context)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _make_proxy(self, context))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _make_proxy(kaggle: KaggleServer, context: ssl.SSLContext) -> type[BaseHTTPRequestHandler]:
    class Proxy(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            if self.path.split(":")[0] not in (API, STORAGE):
                self.send_error(502, "only Kaggle is here")
                return
            self.send_response(200, "Connection established")
            self.end_headers()
            with context.wrap_socket(self.connection, server_side=True) as tunnel:
                _make_kaggle(kaggle)(tunnel, self.client_address, self.server)
            self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    return Proxy


def _make_kaggle(kaggle: KaggleServer) -> type[BaseHTTPRequestHandler]:
    class Kaggle(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            kaggle.requests.append(("POST", self.path, ""))
            if self.path == "/v1/security.OAuthService/IntrospectToken":
                known = body["token"] == kaggle.token
                self.answer(200, {"active": known, "username": "tester"} if known else {"active": False})
                return
            if self.headers["Authorization"] not in kaggle.accepted:
                self.answer(401, {"code": 401, "message": "Unauthenticated"})
                return
            if kaggle.statuses:
                status = kaggle.statuses.pop(0)
                self.answer(status, {"code": status, "message": "as the test asked"})
                return
            slug = f"{body['ownerSlug']}/{body['datasetSlug']}"
            versions = kaggle.datasets.get(slug, {})
            version = body.get("datasetVersionNumber") or max(versions, default=0)
            if version not in versions:
                self.answer(404, {"code": 404, "message": f"no {slug}"})
            elif self.path == "/v1/datasets.DatasetApiService/GetDataset":
                size = len(versions[version])
                self.answer(200, {"currentVersionNumber": max(versions), "licenseName": "CC0-1.0", "totalBytes": size})
            elif self.path == "/v1/datasets.DatasetApiService/DownloadDataset":
                self.answer(302, {}, Location=f"https://{STORAGE}/kaggle-data-sets/{slug}/{version}.zip")
            else:
                self.answer(404, {"code": 404, "message": f"no method {self.path}"})

        def answer(self, status: int, content: dict, **headers: str) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Type": "application/json", "Content-Length": len(body)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            asked = self.headers.get("Range", "")
            kaggle.requests.append(("GET", self.path, asked))
            *_, owner, name, file = self.path.split("/")
            content = kaggle.datasets[f"{owner}/{name}"][int(file.removesuffix(".zip"))]
            etag = f'"{hash(content)}"'
            resumes = asked and self.headers.get("If-Range", etag) == etag
            start = int(asked.removeprefix("bytes=").rstrip("-")) if resumes else 0
            self.send_response(206 if resumes else 200)
            if resumes:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("Content-Type", "application/zip")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", etag)
            self.end_headers()
            if kaggle.cuts:
                self.wfile.write(content[start:][: kaggle.cuts.pop(0)])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            else:
                self.wfile.write(content[start:])

        def log_message(self, *args: object) -> None:
            pass

    return Kaggle
