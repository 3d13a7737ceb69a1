"""The body of an HTTP answer becomes a file; a download that was cut goes on where it stopped."""

import logging
from pathlib import Path

import requests

from deepfake_core.errors import DownloadError
from deepfake_core.storage.files import require_space
from deepfake_core.storage.progress import Progress, watch_progress

log = logging.getLogger(__name__)

CHUNK = 1 << 14
"""Bytes written at a time. A cut loses a chunk that is not whole, so it is one record of TLS."""

TIMEOUT = 300
"""Seconds without a byte, until the rest of a download counts as cut."""


def download(response: requests.Response, partial: Path, what: str, on_progress: Progress | None = None) -> None:
    """Write the body to `partial`, after what an earlier call left there of the same object (by its ETag).

    A body that is cut is asked for again once, from where it was cut.

    Args:
        response: its body is not read yet.
        what: subject of messages, such as `owner/faces`.

    Raises:
        requests.RequestException: if the rest can't be had; what has arrived is kept.
        DownloadError: if another number of bytes came than was announced; they are deleted. Or if something else than
            the rest came, such as a login page; what has arrived is kept.
        DiskError: if it does not fit on the disk.
    """
    total = int(response.headers.get("Content-Length") or 0)
    etag = _read_etag(response)
    marker = partial.with_name(f"{partial.name}.etag")
    partial.parent.mkdir(parents=True, exist_ok=True)
    if not etag and marker.exists() and marker.read_text():
        response.close()
        raise _refuse(response, what)
    if not (etag and marker.exists() and marker.read_text() == etag and _count(partial) <= total):
        partial.unlink(missing_ok=True)
    require_space(partial.parent, total - _count(partial), what, "set `data.data_dir` to another disk")
    marker.write_text(etag)
    log.info("%s: downloading %s, %.1f MB", what, partial.stem, total / 1e6)
    with watch_progress(lambda: _count(partial), total, on_progress):
        try:
            _write_rest(response, partial, etag, total, what)
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as exc:
            if not _count(partial):
                raise
            log.info("%s: cut after %.1f MB (%s), going on", what, _count(partial) / 1e6, type(exc).__name__)
            _write_rest(response, partial, etag, total, what)
    marker.unlink()
    if total and _count(partial) != total:
        received = _count(partial)
        partial.unlink()
        raise DownloadError(
            f"A download must have the size that was announced, {total:,} bytes for {what}. Received: {received:,}. "
            "They were deleted; run again to download it from the start."
        )


def _count(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _read_etag(response: requests.Response) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def _write_rest(response: requests.Response, partial: Path, etag: str, total: int, what: str) -> None:
    """Append what is missing; only the whole object takes the place of what has arrived."""
    arrived, mode = _count(partial), "wb"
    if arrived and arrived == total:
        response.close()
        return
    if arrived:
        response.close()
        asked = {"Range": f"bytes={arrived}-", "If-Range": etag, "Accept-Encoding": "identity"}
        response = requests.get(response.url, headers=asked, stream=True, timeout=TIMEOUT)
        response.raise_for_status()
        mode = _choose_mode(response, f"bytes {arrived}-" + (f"{total - 1}/" if total else ""), etag, total)
    with response:
        if not mode:
            raise _refuse(response, what)
        with partial.open(mode) as file:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)


def _choose_mode(response: requests.Response, span: str, etag: str, total: int) -> str:
    """Return how to open the file for an answer: "ab" for the rest, "wb" for the whole object; empty for any other."""
    if response.status_code == requests.codes.partial_content:
        return "ab" if response.headers.get("Content-Range", "").startswith(span) else ""
    is_whole = response.headers.get("Content-Length") == str(total) and _read_etag(response) == etag
    return "wb" if response.status_code == requests.codes.ok and is_whole else ""


def _refuse(response: requests.Response, what: str) -> DownloadError:
    names = ("Content-Type", "Content-Length", "Content-Range")
    shown = ", ".join(f"{name} {response.headers[name]}" for name in names if name in response.headers)
    return DownloadError(
        f"The answer to a download that goes on must be its rest. Received for {what}: status {response.status_code}, "
        f"{shown or 'no length'}. What has arrived is kept. Run again where no proxy or login page answers."
    )
