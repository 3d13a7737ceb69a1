"""The body of an HTTP answer becomes a file; a download that was cut goes on where it stopped."""

import logging
from pathlib import Path

import requests

from deepfake_core.errors import DownloadError
from deepfake_core.storage.files import require_space
from deepfake_core.storage.progress import Progress, watch_progress

log = logging.getLogger(__name__)

CHUNK = 1 << 20
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
        DownloadError: if another number of bytes came than was announced; they are deleted.
        DiskError: if it does not fit on the disk.
    """
    total = int(response.headers.get("Content-Length") or 0)
    etag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    marker = partial.with_name(f"{partial.name}.etag")
    partial.parent.mkdir(parents=True, exist_ok=True)
    if not (etag and marker.exists() and marker.read_text() == etag and _count(partial) <= total):
        partial.unlink(missing_ok=True)
    require_space(partial.parent, total - _count(partial), what, "set `data.data_dir` to another disk")
    marker.write_text(etag)
    log.info("%s: downloading %s, %.1f MB", what, partial.stem, total / 1e6)
    with watch_progress(lambda: _count(partial), total, on_progress):
        try:
            _write_rest(response, partial, etag, total)
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as exc:
            if not _count(partial):
                raise
            log.info("%s: cut after %.1f MB (%s), going on", what, _count(partial) / 1e6, type(exc).__name__)
            _write_rest(response, partial, etag, total)
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


def _write_rest(response: requests.Response, partial: Path, etag: str, total: int) -> None:
    """Append what is missing; an answer that is an error, or the whole object, is never appended."""
    arrived = _count(partial)
    if arrived and arrived == total:
        response.close()
        return
    if arrived:
        response.close()
        asked = {"Range": f"bytes={arrived}-", "If-Range": etag, "Accept-Encoding": "identity"}
        response = requests.get(response.url, headers=asked, stream=True, timeout=TIMEOUT)
        response.raise_for_status()
    with response, partial.open("ab" if response.status_code == requests.codes.partial_content else "wb") as file:
        for chunk in response.iter_content(CHUNK):
            file.write(chunk)
