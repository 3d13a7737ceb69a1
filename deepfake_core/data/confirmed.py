"""Confirmed reports become a local source: the face of each image, as serving cuts it out."""

import io
import logging

from PIL import JpegImagePlugin

from deepfake_core.config import Source
from deepfake_core.data.dataset import SUFFIXES
from deepfake_core.decoding import decode_image, open_header
from deepfake_core.feedback.records import Confirmed
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

    Raises:
        ConfigurationError: if something else, or another project's feedback, is at the address.
        ArchiveError, CredentialsError, DiskError, DownloadError: if it can't be read, or not be written here.
    """
    folder = store.confirmed()
    own = store.address_of(store.feedback())
    found = [] if address == NONE else open_feedback(own if address == AUTO else address).list_confirmed()
    stems = {folder / report.label / report.sha256: report for report in found}
    with translate_disk_errors(folder):
        kept = set()
        for file in (path for path in folder.rglob("*") if path.is_file()):
            if file.with_suffix("") in stems and file.suffix in SUFFIXES.values():
                kept.add(file.with_suffix(""))
            else:
                file.unlink()
    for stem, report in stems.items():
        if stem not in kept:
            data, suffix = cut_face(report)
            with write_beside(stem.with_suffix(suffix)) as beside:
                beside.write_bytes(data)
    if stems:
        log.info("%d confirmed reports, %d of them new here", len(stems), len(stems) - len(kept))
    return (Source(name=str(folder)),) if stems else ()


def cut_face(report: Confirmed) -> tuple[bytes, str]:
    """Return the part of a reported image that was judged, as a file's bytes and suffix.

    The whole image keeps its bytes. Of a JPEG, a part is encoded with the same tables, so that it does not stand out by
    them; of any other, without loss.
    """
    data = report.read()
    image = decode_image(data)
    whole = (0, 0, *image.size)
    left, top, right, bottom = report.box or whole
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
