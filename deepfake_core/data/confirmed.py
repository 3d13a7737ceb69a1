"""Confirmed reports become a local source: the face of each image, as serving cuts it out, and the image it is from."""

import io
import logging
from collections.abc import Collection
from pathlib import PurePosixPath

import pandas as pd
from PIL import JpegImagePlugin

from deepfake_core.config import FEEDBACK, Source
from deepfake_core.data.dataset import SUFFIXES
from deepfake_core.data.reported_images import WHOLE
from deepfake_core.decoding import decode_image, open_header
from deepfake_core.errors import ArchiveError
from deepfake_core.feedback.reports import open_feedback
from deepfake_core.storage.files import translate_disk_errors, write_beside
from deepfake_core.storage.store import Store

log = logging.getLogger(__name__)

AUTO, NONE = "auto", "none"


def fetch_confirmed(address: str, store: Store) -> tuple[Source, ...]:
    """Bring the confirmed reports to a folder of this disk, and remove what is confirmed no more.

    Args:
        address: `data.feedback`.

    Returns:
        The folder as a source whose images are named by the SHA-256 that was sent; none without confirmed reports.
        Where a part of an image was judged, the whole is beside it, below `WHOLE`.

    Raises:
        ConfigurationError: if something else, or another project's feedback, is at the address.
        ArchiveError, CredentialsError, DiskError, DownloadError: if it can't be read, or not be written here.
    """
    folder = store.confirmed()
    own = store.address_of(store.feedback())
    feedback = None if address == NONE else open_feedback(own if address == AUTO else address)
    reports = feedback.list_confirmed() if feedback else []
    wanted = {report: [folder / report.label / report.sha256] for report in reports}
    for report in (one for one in reports if one.box):
        wanted[report].append(folder / WHOLE / report.label / report.sha256)
    stems = {stem for some in wanted.values() for stem in some}
    with translate_disk_errors(folder):
        kept = set()
        for file in (path for path in folder.rglob("*") if path.is_file()):
            if file.with_suffix("") in stems and file.suffix in SUFFIXES.values():
                kept.add(file.with_suffix(""))
            else:
                file.unlink()
        _remove_indexes(store, {report.sha256 for report in reports})
    gone = set()
    missing = [report for report, some in wanted.items() if not kept.issuperset(some)]
    for report in missing:
        try:
            image = report.read()
        except ArchiveError:
            if feedback and report.sha256 in {one.sha256 for one in feedback.list_confirmed()}:
                raise
            gone.add(report)  # forgotten, or confirmed no more, since it was listed
            continue
        for stem, box in zip(wanted[report], (report.box, None), strict=False):
            data, suffix = cut_face(image, box)
            with write_beside(stem.with_suffix(suffix)) as beside:
                beside.write_bytes(data)
    count = len(reports) - len(gone)
    if count:
        log.info("%d confirmed reports, %d of them new here", count, len(missing) - len(gone))
    return (Source(name=str(folder)),) if count else ()


def _remove_indexes(store: Store, confirmed: Collection[str]) -> None:
    """Remove the indexes that hold thumbnails of images that are confirmed no more."""
    for path in store.indexes().glob(f"{FEEDBACK}-v*.parquet"):
        members = pd.read_parquet(path, columns=["member"])["member"]
        if not {PurePosixPath(member).stem for member in members} <= set(confirmed):
            path.unlink()


def cut_face(data: bytes, box: tuple[int, int, int, int] | None) -> tuple[bytes, str]:
    """Return the part of a reported image that was judged, as a file's bytes and suffix.

    The whole image keeps its bytes. Of a JPEG, a part is encoded with the same tables, so that it does not stand out by
    them; of any other, without loss.

    Args:
        data: the image's file.
        box: left, top, right and bottom, in pixels of the upright image; None for the whole image.
    """
    image = decode_image(data)
    whole = (0, 0, *image.size)
    left, top, right, bottom = box or whole
    part = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    if part == whole or part[0] >= part[2] or part[1] >= part[3]:
        return data, SUFFIXES[str(image.format)]
    buffer = io.BytesIO()
    if image.format != "JPEG":
        image.crop(part).save(buffer, "PNG")
        return buffer.getvalue(), SUFFIXES["PNG"]
    tables = list(image.quantization.values())  # type: ignore[attr-defined] # as `decode_image` keeps them
    options = {"qtables": tables} if max(map(max, tables)) < 256 else {"quality": 95}  # larger ones are not encoded
    image.crop(part).save(buffer, "JPEG", subsampling=JpegImagePlugin.get_sampling(open_header(data)), **options)
    return buffer.getvalue(), SUFFIXES["JPEG"]
