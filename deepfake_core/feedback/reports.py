"""The folder or URL that keeps reports on wrong verdicts.

    feedback.json                          marker: the format, and the project that it belongs to
    <SHA-256>/image                        the bytes as they were sent
    <SHA-256>/report-<time>-<id>.json      one for each time that the image was sent
    <SHA-256>/decision-<time>-<id>.json    the newest counts

Files are only added, each whole under a new name: several writers need no lock. Nothing says who sent an image.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from deepfake_core.decoding import MAX_BYTES, UnreadableImageError, open_image
from deepfake_core.errors import ArchiveError, ConfigurationError, DiskError
from deepfake_core.feedback.records import (
    MAX_RECORD_BYTES,
    Confirmed,
    Decision,
    FeedbackEntry,
    GivenVerdict,
    Record,
    Report,
    is_decision,
    make_entry,
    make_record,
    name_record,
    parse_time,
)
from deepfake_core.storage.objects import Objects, open_objects

MARKER, IMAGE = "feedback.json", "image"
PROJECT = "deepfake-retraining"
MARK = json.dumps({"format": 1, "project": PROJECT}).encode()
SHA256 = re.compile(r"[0-9a-f]{64}")
MIN_PREFIX = 8

MAX_TOTAL_BYTES = 10_000_000_000
"""Of everything that is kept."""

MAX_MEASURE_AGE_SECONDS = 60
"""How long a sum of bytes is used, with what this process added, before all is listed again."""


class Feedback:
    """Reports on wrong verdicts, and decisions about them. `open_feedback` makes one; `address` is where they are."""

    def __init__(self, objects: Objects) -> None:
        self._objects, self.address = objects, objects.address
        self._adding = threading.Lock()  # threads of a process write to temporary files of the same names
        self._measured, self._total = -float(MAX_MEASURE_AGE_SECONDS), 0

    def create(self) -> None:
        """Write the marker, if it is not there: what follows can be written too.

        Raises:
            DiskError: if the disk is full, or the folder can't be written.
        """
        if self._objects.read(MARKER, MAX_RECORD_BYTES) is None:
            self._objects.write(MARKER, MARK)

    def add(self, image: bytes, verdict: GivenVerdict, label: str, note: str = "") -> FeedbackEntry:
        """Keep a report. The same image again adds to its count. A rejected image that was removed is not kept again.

        Args:
            label: `real` or `fake`, says the sender.
            note: at most 1,000 characters.

        Raises:
            UnreadableImageError: if the image can't be decoded, or has too many bytes.
            ConfigurationError: for an unknown label or a note that is too long.
            DiskError: if the disk is full, or all that is kept would be more than `MAX_TOTAL_BYTES`.
        """
        report = make_record(Report, verdict=verdict, label=label, note=note, time=datetime.now(UTC))
        if len(image) > MAX_BYTES:
            raise UnreadableImageError("too_large", f"may hold {MAX_BYTES:,} bytes at most")
        with open_image(image):
            sha256 = hashlib.sha256(image).hexdigest()
        with self._adding:
            self.create()
            entry = self._read(sha256)
            if entry and entry.status == "rejected" and not entry.size:
                return entry
            is_new = entry is None or entry.size != len(image)
            self._require_room(is_new * len(image) + MAX_RECORD_BYTES)
            if is_new:
                self._objects.write(f"{sha256}/{IMAGE}", image)
            self._write(sha256, report)
        return self.read(sha256)

    def list_entries(self, status: str | None = None) -> list[FeedbackEntry]:
        """Return the images that were reported, in the order of their SHA-256; of one status, or all."""
        found = self._read_entries(self._objects.scan())
        return [entry for entry in found if status is None or entry.status == status]

    def list_confirmed(self) -> list[Confirmed]:
        """Return the confirmed images, in the order of their SHA-256."""
        return [
            Confirmed(entry.sha256, entry.label, entry.size, entry.box, partial(self.read_image, entry.sha256))
            for entry in self.list_entries("confirmed")
            if entry.label and entry.size
        ]

    def find(self, sha256: str) -> str:
        """Return the whole SHA-256 of a reported image whose first 8 or more characters are given.

        Raises:
            ConfigurationError: if it is none, or no image or several have it.
        """
        given = sha256.lower()
        if not re.fullmatch(rf"[0-9a-f]{{{MIN_PREFIX},64}}", given):
            raise ConfigurationError(
                f"An image is named by its SHA-256, or the first {MIN_PREFIX} or more of its characters. Received: "
                f"{sha256[:100]!r}. `deepfake feedback list` shows them."
            )
        if SHA256.fullmatch(given):
            return given
        found = [name for name in self._objects.list_names() if SHA256.fullmatch(name) and name.startswith(given)]
        if len(found) != 1:
            raise ConfigurationError(
                f"A SHA-256 must be one image's in {self.address}. Received: {given}, which {len(found)} have."
            )
        return found[0]

    def read(self, sha256: str) -> FeedbackEntry:
        """Return what is kept of an image.

        Raises:
            ConfigurationError: if nothing is.
        """
        entry = self._read(self.find(sha256))
        if entry is None:
            raise ConfigurationError(
                f"There must be a report of the image. Received: {sha256}, of which {self.address} holds nothing."
            )
        return entry

    def read_image(self, sha256: str) -> bytes:
        """Return an image's bytes.

        Raises:
            ArchiveError: if they are gone, or are not those that were sent.
        """
        found = self.find(sha256)
        data = self._objects.read(f"{found}/{IMAGE}", MAX_BYTES)
        if data is None or hashlib.sha256(data).hexdigest() != found:
            received = "nothing" if data is None else f"{len(data):,} bytes with another SHA-256"
            raise ArchiveError(
                f"An image must be as it was sent. Received: {received} at {self.address}/{found}/{IMAGE}. "
                f"`deepfake feedback forget {found[:12]}` removes it; it can be sent again."
            )
        return data

    def confirm(self, sha256: str, label: str, by: str, why: str = "") -> FeedbackEntry:
        """Decide that an image is `real` or `fake`: it may be trained on.

        Raises:
            ConfigurationError: for an unknown label, or an image that nobody reported.
            ArchiveError: if the image is gone, or not as it was sent.
        """
        self.read_image(sha256)
        return self._decide(sha256, "confirmed", by, why, label)

    def reject(self, sha256: str, by: str, why: str = "") -> FeedbackEntry:
        """Decide that nothing is to be learned from an image."""
        return self._decide(sha256, "rejected", by, why)

    def withdraw(self, sha256: str, by: str, why: str = "") -> FeedbackEntry:
        """Take the last decision back: the image is unreviewed again."""
        return self._decide(sha256, "withdrawn", by, why)

    def forget(self, sha256: str) -> str:
        """Remove an image, its reports and decisions for good; return its SHA-256."""
        found = self.find(sha256)
        if not self._remove(found):
            self.read(found)  # says that there is nothing
        self._objects.remove_below(found)
        return found

    def expire(self, sha256: str) -> bool:
        """Remove a rejected image and its reports, not its decisions; return False if it is rejected no more."""
        found = self.find(sha256)
        if (entry := self._read(found)) and entry.status != "rejected":
            return False
        self._remove(found, keep_decisions=True)
        return True

    def _remove(self, sha256: str, keep_decisions: bool = False) -> int:
        """Remove an image's files, also half-written ones, the newest decision last; return how many were there."""
        names = sorted(self._objects.scan(sha256), key=lambda name: (is_decision(name), name))
        for name in names:
            if not (keep_decisions and is_decision(name)):
                self._objects.remove(name)
        return len(names)

    def _decide(self, sha256: str, decision: str, by: str, why: str, label: str | None = None) -> FeedbackEntry:
        entry = self.read(sha256)
        if decision == "withdrawn" and entry.status == "unreviewed":
            raise ConfigurationError(f"Only a decision can be withdrawn. Received: {entry.sha256}, which has none.")
        now = datetime.now(UTC)
        if entry.decisions:  # the clocks of machines differ
            now = max(now, entry.decisions[-1].time + timedelta(microseconds=1))
        self._write(entry.sha256, make_record(Decision, decision=decision, label=label, by=by, why=why, time=now))
        return self.read(entry.sha256)

    def _write(self, sha256: str, record: Record) -> None:
        self._objects.write(f"{sha256}/{name_record(record)}", record.model_dump_json().encode())

    def _require_room(self, needed: int) -> None:
        if time.monotonic() - self._measured > MAX_MEASURE_AGE_SECONDS:
            self._total = sum(self._objects.scan().values())
            self._measured = time.monotonic()
        if self._total + needed > MAX_TOTAL_BYTES:
            raise DiskError(
                f"Feedback may hold {MAX_TOTAL_BYTES / 1e9:g} GB in all. Received: {needed:,} bytes more than the "
                f"{self._total:,} in {self.address}. Review what is there: `deepfake gc` removes what was rejected."
            )
        self._total += needed

    def _read(self, sha256: str) -> FeedbackEntry | None:
        return next(iter(self._read_entries(self._objects.scan(sha256))), None)

    def _read_entries(self, sizes: Mapping[str, int]) -> list[FeedbackEntry]:
        """Return what files that were found say; those of other names don't count."""
        images, records, found = dict[str, int](), dict[str, int](), dict[str, dict[str, bytes | None]]()
        for name, size in sizes.items():
            sha256, _, file = name.partition("/")
            if SHA256.fullmatch(sha256) and (file == IMAGE or parse_time(file)):
                found[sha256] = {}
                (images if file == IMAGE else records)[name] = size
        for name, content in self._objects.read_all(records, MAX_RECORD_BYTES).items():
            sha256, _, file = name.partition("/")
            found[sha256][file] = content
        return [make_entry(sha256, images.get(f"{sha256}/{IMAGE}", 0), found[sha256]) for sha256 in sorted(found)]


def open_feedback(address: str | Path) -> Feedback:
    """Return the feedback that a folder or a URL keeps, or is to keep: nothing is written yet.

    Raises:
        ConfigurationError: if it holds other things, or another project's feedback.
        ConfigurationError, CredentialsError, DownloadError: if a store refuses it or can't be reached.
    """
    objects = open_objects(address)
    rule = f"Feedback must be in a new folder, or in one that {PROJECT} keeps it in. Received: {objects.address}"
    marker = objects.read(MARKER, MAX_RECORD_BYTES)
    if marker is None:
        if names := objects.list_names():
            raise ConfigurationError(f"{rule}, which holds {', '.join(names[:3])} and no {MARKER}. Name another.")
        return Feedback(objects)
    if marker != MARK:
        raise ConfigurationError(f"{rule}, whose {MARKER} is {marker[:200]!r} instead of {MARK!r}. Name another.")
    return Feedback(objects)
