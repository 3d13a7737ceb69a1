"""Sources become verified archives on this disk: downloaded from Kaggle, fetched from the store, or local.

The one module that imports kaggle.
"""

import json
import logging
import os
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deepfake_core.config import Source
from deepfake_core.data.archive import Archive
from deepfake_core.data.credentials import CREDENTIALS_HELP, check, check_file, clean_variables
from deepfake_core.data.download import download
from deepfake_core.data.kaggle_errors import ask_kaggle
from deepfake_core.data.local import hash_zip, open_local
from deepfake_core.errors import ArchiveError, CredentialsError, SourceError
from deepfake_core.storage.files import translate_disk_errors, write_json
from deepfake_core.storage.progress import Progress
from deepfake_core.storage.store import Store

log = logging.getLogger(__name__)

PROVENANCE = tuple(field.name for field in fields(Archive) if field.name not in ("source", "path", "modified"))
"""What the JSON file beside a downloaded zip holds."""


def fetch_archive(source: Source, store: Store, on_progress: Progress | None = None) -> Archive:
    """Return the source's archive, verified; download it if Kaggle has a version that is not here yet.

    Where the store is at a URL, a version that another machine has shared is fetched from there instead.

    Raises:
        CredentialsError, SourceError, ArchiveError, DiskError: a person has to act.
        DownloadError: the network failed; what has arrived is kept, and another call continues from there.
    """
    with translate_disk_errors(store.archives(source.name)):
        if source.is_local:
            return open_local(source, store)
        if source.version and (here := _find_version(source, store, source.version, on_progress)):
            return here

    def fetch() -> Archive:
        with translate_disk_errors(store.archives(source.name)), _log_in().build_kaggle_client() as kaggle:
            dataset = _describe_dataset(kaggle, source)
            version = source.version or dataset.current_version_number
            if here := _find_version(source, store, version, on_progress):
                return here
            partial = _find_zip(source, store, version).with_suffix(".zip.partial")
            download(_ask_for_zip(kaggle, source, version), partial, source.name, on_progress)
        return _keep_zip(partial, source, store, version, dataset.license_name or None)

    return ask_kaggle(source, fetch)


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

    def find() -> int:
        with _log_in().build_kaggle_client() as kaggle:
            return _describe_dataset(kaggle, source).current_version_number

    version = ask_kaggle(source, find)
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
        hash_zip(path, store)
    except ArchiveError:
        path.unlink()
        raise
    write_json(marker, provenance)
    log.info("%s: version %d was fetched from %s", source.name, version, store.url)
    return _read_download(source, store, version)


def _read_download(source: Source, store: Store, version: int) -> Archive | None:
    """Return a version that is on this disk as it was downloaded; None if it is not, or has changed since."""
    path = _find_zip(source, store, version)
    provenance = path.with_suffix(".json")
    if not (path.exists() and provenance.exists()):
        return None
    try:
        archive = Archive(source, path, **json.loads(provenance.read_text()))
        state = (archive.sha256, archive.bytes, archive.version)
        is_whole = state == (hash_zip(path, store), path.stat().st_size, version)
    except (ValueError, TypeError, RecursionError, ArchiveError):
        is_whole = False
    if not is_whole:
        log.warning("%s: version %d has changed on this disk, it is fetched again", source.name, version)
        return None
    log.info("%s: version %d is on disk already, nothing to download", source.name, version)
    return archive


# Kaggle's client


def _log_in() -> Any:
    """Return Kaggle's client, logged in with credentials that are checked before: importing it logs in already."""
    from kagglesdk import get_access_token_from_env

    clean_variables()
    try:
        token, place = get_access_token_from_env()
    except UnicodeDecodeError:
        raise CredentialsError(
            f"A file of Kaggle's token must be ASCII text. Received: another encoding. {CREDENTIALS_HELP}"
        ) from None
    if token:
        check(token, place)
    from kaggle.api.kaggle_api_extended import KaggleApi

    api = KaggleApi()
    has_login = token or os.environ.keys() >= {"KAGGLE_USERNAME", "KAGGLE_KEY"}
    login = {} if has_login else check_file(Path(api.config))
    try:
        api.authenticate()
    except SystemExit:  # how the client reports that it found no credentials, or an expired token
        found = f"the token in {place} is refused: wrong, revoked or expired" if token else "none were found"
        raise CredentialsError(f"Kaggle needs credentials, and {found}. {CREDENTIALS_HELP}") from None
    api.config_values |= login  # stripped
    return api


def _describe_dataset(kaggle: Any, source: Source) -> Any:
    from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest

    request = ApiGetDatasetRequest()
    request.owner_slug, request.dataset_slug = source.name.split("/")
    dataset = kaggle.datasets.dataset_api_client.get_dataset(request)
    if dataset.current_version_number < 1:
        raise SourceError(
            f"The version of a data set must be a positive number. Received from Kaggle for {source.name}: "
            f"{dataset.current_version_number}. Open https://www.kaggle.com/datasets/{source.name} to see whether it "
            "has a version, or set the source's `version`."
        )
    return dataset


def _ask_for_zip(kaggle: Any, source: Source, version: int) -> Any:
    """Return the response whose body is a version's zip; nothing of the body is read yet."""
    from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest

    request = ApiDownloadDatasetRequest()
    request.owner_slug, request.dataset_slug = source.name.split("/")
    request.dataset_version_number = version
    return kaggle.datasets.dataset_api_client.download_dataset(request)


def _keep_zip(partial: Path, source: Source, store: Store, version: int, licence: str | None) -> Archive:
    """Give a finished download its name, verify it, and write its provenance: without it, the zip doesn't count."""
    path = partial.replace(partial.with_suffix(""))
    try:
        digest = hash_zip(path, store)
    except ArchiveError as exc:
        path.unlink()
        raise ArchiveError(f"{source.name}: {exc} It was deleted; run again to download it from the start.") from exc
    archive = Archive(
        source=source,
        path=path,
        sha256=digest,
        bytes=path.stat().st_size,
        version=version,
        licence=licence,
        downloaded_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_json(path.with_suffix(".json"), {name: getattr(archive, name) for name in PROVENANCE})
    log.info("%s: version %d is on disk and verified, %.1f MB", source.name, version, archive.bytes / 1e6)
    return archive
