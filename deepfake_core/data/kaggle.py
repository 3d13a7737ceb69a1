"""Sources become verified archives on this disk: downloaded from Kaggle, fetched from the store, or local.

The one module that imports kaggle.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests

from deepfake_core.config import Source
from deepfake_core.data.archive import Archive, open_local, verify_zip
from deepfake_core.errors import ArchiveError, CredentialsError, DownloadError, SourceError
from deepfake_core.storage.files import hash_file, require_space, translate_disk_errors, write_json
from deepfake_core.storage.progress import Progress, watch_progress
from deepfake_core.storage.store import Store

log = logging.getLogger(__name__)

CREDENTIALS_HELP = (
    "Create a token at https://www.kaggle.com/settings (API, Create New Token) and set KAGGLE_API_TOKEN, "
    "or KAGGLE_USERNAME and KAGGLE_KEY, or save it as ~/.kaggle/kaggle.json, or as Prefect's Secret block "
    "kaggle-api-token. "
    "`make demo` and local zips or folders need no credentials."
)

PROVENANCE = tuple(field.name for field in fields(Archive) if field.name not in ("source", "path"))
"""What the JSON file beside a downloaded zip holds."""


def fetch_archive(source: Source, store: Store, on_progress: Progress | None = None) -> Archive:
    """Return the source's archive, verified; download it if Kaggle has a version that is not here yet.

    Where the store is at a URL, a version that another machine has shared is fetched from there instead.

    Raises:
        CredentialsError, SourceError, ArchiveError, DiskError: a person has to act.
        DownloadError: the network failed; what has arrived is kept, and another call continues from there.
    """
    if source.is_local:
        return open_local(source)
    if source.version and (here := _find_version(source, store, source.version, on_progress)):
        return here
    with _translate_kaggle_errors(source), translate_disk_errors(store.archives(source.name)):
        api = _log_in()
        with api.build_kaggle_client() as kaggle:
            dataset = _describe_dataset(kaggle, source)
            version = source.version or dataset.current_version_number
            if here := _find_version(source, store, version, on_progress):
                return here
            response = _ask_for_zip(kaggle, source, version)
            partial = _find_zip(source, store, version).with_suffix(".zip.partial")
            _download_zip(api, kaggle.http_client(), response, source, partial, on_progress)
    return _keep_zip(partial, source, version, dataset.license_name or None)


def share_archive(archive: Archive, store: Store, on_progress: Progress | None = None) -> None:
    """Publish a downloaded archive where the store is at a URL, unless it is there. Local sources are not shared.

    Its provenance is written last: without it, the zip doesn't count.
    """
    if archive.source.is_local or not store.url:
        return
    provenance = archive.path.with_suffix(".json")
    if store.read(provenance) is None:
        store.publish(archive.path, on_progress=on_progress)
        store.publish(provenance)
        log.info("%s: version %d is published at %s", archive.source.name, archive.version, store.url)


def find_new_version(source: Source, store: Store) -> int | None:
    """Return the version that Kaggle has of a source and the store has not; None if there is none.

    Only the version is asked for. A local source, or one whose version is fixed, never has a new one.

    Raises:
        CredentialsError, SourceError: a person has to act.
        DownloadError: the network failed.
    """
    if source.is_local or source.version:
        return None
    with _translate_kaggle_errors(source), _log_in().build_kaggle_client() as kaggle:
        version = int(_describe_dataset(kaggle, source).current_version_number)
    if store.url:
        return None if store.read(_find_zip(source, store, version).with_suffix(".json")) else version
    return None if _read_download(source, store, version) else version


def _find_zip(source: Source, store: Store, version: int) -> Path:
    return store.archives(source.name) / f"{version}.zip"


def _find_version(source: Source, store: Store, version: int, on_progress: Progress | None) -> Archive | None:
    """Return a version that is on this disk, or that is shared, which is then fetched; None of another."""
    if here := _read_download(source, store, version):
        return here
    path = _find_zip(source, store, version)
    marker = path.with_suffix(".json")
    content = store.read(marker) if store.url else None
    if content is None:
        return None
    try:
        provenance = json.loads(content)
        if set(provenance) != set(PROVENANCE):
            raise ValueError(f"it holds {sorted(provenance)}")
    except (ValueError, TypeError) as exc:
        raise ArchiveError(
            f"{store.address_of(marker)} must hold {', '.join(PROVENANCE)}. Received: {content[:80]!r} ({exc}). "
            "Delete it: the next download publishes it again."
        ) from exc
    store.fetch(path, provenance["sha256"], marker, on_progress)
    try:
        verify_zip(path)
    except ArchiveError:
        path.unlink()
        raise
    write_json(marker, provenance)
    log.info("%s: version %d was fetched from %s", source.name, version, store.url)
    return _read_download(source, store, version)


def _read_download(source: Source, store: Store, version: int) -> Archive | None:
    path = _find_zip(source, store, version)
    provenance = path.with_suffix(".json")
    if not (path.exists() and provenance.exists()):
        return None
    log.info("%s: version %d is on disk already, nothing to download", source.name, version)
    return Archive(source, path, **json.loads(provenance.read_text()))


# Kaggle's client


def _log_in() -> Any:
    from kaggle.api.kaggle_api_extended import KaggleApi
    from kagglesdk import get_access_token_from_env

    api = KaggleApi()
    try:
        api.authenticate()
    except SystemExit as exc:  # how the client reports that it found no credentials, or an expired token
        token, place = get_access_token_from_env()
        found = f"the token in {place} is refused: wrong, revoked or expired" if token else "none were found"
        raise CredentialsError(f"Kaggle needs credentials, and {found}. {CREDENTIALS_HELP}") from exc
    return api


def _describe_dataset(kaggle: Any, source: Source) -> Any:
    from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest

    request = ApiGetDatasetRequest()
    request.owner_slug, request.dataset_slug = source.name.split("/")
    return kaggle.datasets.dataset_api_client.get_dataset(request)


def _ask_for_zip(kaggle: Any, source: Source, version: int) -> Any:
    """Return the response whose body is a version's zip; nothing of the body is read yet."""
    from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest

    request = ApiDownloadDatasetRequest()
    request.owner_slug, request.dataset_slug = source.name.split("/")
    request.dataset_version_number = version
    return kaggle.datasets.dataset_api_client.download_dataset(request)


def _download_zip(
    api: Any, client: Any, response: Any, source: Source, partial: Path, on_progress: Progress | None
) -> None:
    """Write the body to `partial`, after what an earlier call left there."""
    total = int(response.headers.get("Content-Length") or 0)
    partial.parent.mkdir(parents=True, exist_ok=True)
    arrived = partial.stat().st_size if partial.exists() else 0
    require_space(partial.parent, total - arrived, source.name, "set `data.data_dir` to another disk")
    log.info("%s: downloading %s, %.1f MB", source.name, partial.stem, total / 1e6)
    with watch_progress(lambda: partial.stat().st_size if partial.exists() else 0, total, on_progress):
        try:
            # One retry at once; the task that calls this decides on further ones and their delays.
            api.download_file(response, str(partial), client, quiet=True, resume=True, max_retries=1)
        except ValueError as exc:  # it checks no status when it resumes, and wrote an error's body instead
            partial.unlink(missing_ok=True)
            partial.with_name(f"{partial.name}.kaggle-partial").unlink(missing_ok=True)
            raise DownloadError(
                f"Kaggle's storage must send the rest of {source.name} when a download is resumed. Received: "
                f"something else ({exc}). What had arrived was deleted; run again to download it from the start."
            ) from exc


def _keep_zip(partial: Path, source: Source, version: int, licence: str | None) -> Archive:
    """Verify a finished download, write its provenance and give it its name."""
    try:
        verify_zip(partial)
    except ArchiveError as exc:
        partial.unlink()
        raise ArchiveError(f"{source.name}: {exc} It was deleted; run again to download it from the start.") from exc
    archive = Archive(
        source=source,
        path=partial.with_suffix(""),
        sha256=hash_file(partial),
        bytes=partial.stat().st_size,
        version=version,
        licence=licence,
        downloaded_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_json(archive.path.with_suffix(".json"), {name: getattr(archive, name) for name in PROVENANCE})
    partial.replace(archive.path)
    log.info("%s: version %d is on disk and verified, %.1f MB", source.name, version, archive.bytes / 1e6)
    return archive


@contextlib.contextmanager
def _translate_kaggle_errors(source: Source) -> Iterator[None]:
    try:
        yield
    except requests.HTTPError as exc:
        status = exc.response.status_code if exc.response is not None else None
        if status == 401:
            raise CredentialsError(
                f"Kaggle refused the credentials (401) for {source.name}. {CREDENTIALS_HELP}"
            ) from exc
        if status == 403:
            raise SourceError(
                f"Kaggle does not let this account read {source.name} (403). Open "
                f"https://www.kaggle.com/datasets/{source.name} while logged in and accept its terms, "
                "or use another account's token."
            ) from exc
        if status == 404:
            version = f" in version {source.version}" if source.version else ""
            raise SourceError(
                f"Kaggle knows no data set {source.name}{version} (404). Correct `data.sources`."
            ) from exc
        raise DownloadError(
            f"Kaggle answered {status or exc} for {source.name}; what has arrived is kept. Run again later."
        ) from exc
    except requests.RequestException as exc:
        raise DownloadError(
            f"The connection to Kaggle failed for {source.name} ({type(exc).__name__}: {exc}); what has arrived "
            "is kept. Check the network or HTTPS_PROXY and run again: the download continues from there."
        ) from exc
