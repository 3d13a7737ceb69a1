"""What is kept of a report on a wrong verdict and of a decision about it. What is read back is not trusted."""

import re
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Literal, Self, TypeVar, get_args

from pydantic import AwareDatetime, BeforeValidator, Field, ValidationError, model_validator

from deepfake_core.config import Parameters
from deepfake_core.errors import ConfigurationError

Label = Literal["real", "fake"]
Status = Literal["unreviewed", "confirmed", "rejected"]
STATUSES: tuple[str, ...] = get_args(Status)

RECORD = re.compile(r"(?:report|decision)-(?P<time>20\d{6}T\d{12}Z)-[0-9a-f]{8}\.json")
TIME_FORMAT = "%Y%m%dT%H%M%S%fZ"

MAX_TEXT_CHARACTERS = 1000
"""Characters of a note, or of why something was decided."""

MAX_NAME_CHARACTERS = 200
"""Characters of who decided, or of a version."""

MAX_RECORD_BYTES = 20_000
"""A report or a decision takes less, even if each character of its text is escaped."""


def _clean(text: object) -> object:
    """Replace what a terminal or a page would not show as a character; line breaks too."""
    return "".join(one if one.isprintable() else " " for one in text).strip() if isinstance(text, str) else text


Text = Annotated[str, Field(max_length=MAX_TEXT_CHARACTERS), BeforeValidator(_clean)]
Name = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS), BeforeValidator(_clean)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Pixel = Annotated[int, Field(ge=0, le=2**31)]


class GivenVerdict(Parameters):
    """The verdict that is said to be wrong: of an image with several faces, that on the likeliest fake."""

    label: Label | None = Field(description="None where no face was found.")
    probability: Probability | None = Field(description="P(fake).")
    sure: bool | None
    version: Name = Field(description="The model that gave it, such as `deepfake-detector version 3`.")
    box: tuple[Pixel, Pixel, Pixel, Pixel] | None = Field(
        default=None, description="Left, top, right and bottom, in pixels of the upright image, of what was judged."
    )
    faces: int = Field(default=0, ge=0, description="How many were found; 0 also where the whole image was judged.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.box and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise ValueError(f"a box must have an area. Received: {self.box}")
        return self

    def describe(self) -> str:
        """Return it as a line, such as `fake, P(fake) = 0.93, by deepfake-detector version 3`."""
        if self.label is None or self.probability is None:
            return f"no face was found, by {self.version}"
        of = f", the likeliest fake of {self.faces} faces" if self.faces > 1 else ""
        unsure = ", not sure" if self.sure is False else ""
        return f"{self.label}, P(fake) = {self.probability:.2f}{unsure}{of}, by {self.version}"


class Record(Parameters):
    """What is kept in a file of its own."""

    time: AwareDatetime


class Report(Record):
    """What one sender said. Nothing is kept about the sender."""

    verdict: GivenVerdict
    label: Label = Field(description="What the image is, says the sender.")
    note: Text = ""


class Decision(Record):
    """What a person decided about an image that was reported."""

    decision: Literal["confirmed", "rejected", "withdrawn"]
    label: Label | None = Field(default=None, description="What a confirmed image is.")
    by: Name
    why: Text = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.decision == "confirmed") != (self.label is not None):
            raise ValueError(f"a confirmed image alone has a label. Received: {self.decision}, {self.label}")
        return self


T = TypeVar("T", Report, Decision)


@dataclass(frozen=True)
class FeedbackEntry:
    """An image that was reported.

    Attributes:
        sha256: of its bytes, in hex.
        size: in bytes; 0 if the image is not kept any more.
        reports: those that can be read, oldest first.
        decisions: oldest first; the newest counts. One that can't be read counts as withdrawn.
        count: of reports, with those that can't be read.
        problems: what can't be read, and why.
    """

    sha256: str
    size: int
    reports: tuple[Report, ...]
    decisions: tuple[Decision, ...]
    count: int
    problems: tuple[str, ...]

    @property
    def status(self) -> Status:
        newest = self.decisions[-1].decision if self.decisions else "withdrawn"
        return "unreviewed" if newest == "withdrawn" else newest

    @property
    def label(self) -> Label | None:
        """What a confirmed image is; None of any other."""
        return self.decisions[-1].label if self.decisions else None

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """Where the face is that was judged, by the first report."""
        return self.reports[0].verdict.box if self.reports else None

    @property
    def counted(self) -> str:
        """The count in words, such as `2 reports`."""
        return f"{self.count} report{'' if self.count == 1 else 's'}"

    @property
    def first_time(self) -> datetime:
        """When it was reported first, as far as that can be read."""
        records: tuple[Record, ...] = (*self.reports, *self.decisions)
        return min((one.time for one in records), default=datetime.now(UTC))

    @property
    def claimed(self) -> list[Label]:
        """What the senders say it is: one label, unless they disagree."""
        return sorted({report.label for report in self.reports})


@dataclass(frozen=True)
class Confirmed:
    """A confirmed report, for the training of the next model.

    Attributes:
        sha256: of the image's bytes, in hex.
        label: `real` or `fake`.
        size: in bytes.
        box: left, top, right and bottom, in pixels of the upright image, of the face that was judged. None where the
            whole image was, or no face was found.
        read: returns the image's bytes, whose SHA-256 is compared. Raises ArchiveError if they differ or are gone.
    """

    sha256: str
    label: Label
    size: int
    box: tuple[int, int, int, int] | None
    read: Callable[[], bytes]


def make_record(kind: type[T], **values: object) -> T:
    """Return a report or a decision.

    Raises:
        ConfigurationError: for an unknown label or a text that is too long.
    """
    if values["label"] is not None and values["label"] not in get_args(Label):
        raise ConfigurationError(f"A label must be real or fake. Received: {str(values['label'])[:100]!r}.")
    try:
        return kind.model_validate(values)
    except ValidationError as exc:
        problem = exc.errors()[0]
        most, given = problem.get("ctx", {}).get("max_length"), problem["input"]
        raise ConfigurationError(
            f"`{problem['loc'][0]}` may hold {most:,} characters at most. Received: {len(given):,}. Shorten it."
        ) from exc


def name_record(record: Record) -> str:
    """Return the name of a record's file: names in order are records in order."""
    return f"{type(record).__name__.lower()}-{record.time.strftime(TIME_FORMAT)}-{uuid.uuid4().hex[:8]}.json"


def parse_time(name: str) -> datetime | None:
    """Return the time that the name of a record's file states; None of any other file."""
    if match := RECORD.fullmatch(name):
        with suppress(ValueError):  # such as the 32nd of a month
            return datetime.strptime(match["time"], TIME_FORMAT).replace(tzinfo=UTC)
    return None


def is_decision(name: str) -> bool:
    """Return whether a file holds a decision, or a part of one that is being written; it may be named with folders."""
    return name.rpartition("/")[2].lstrip(".").startswith("decision")


def make_entry(sha256: str, size: int, records: Mapping[str, bytes | None]) -> FeedbackEntry:
    """Return what the files of an image say.

    Args:
        size: the image's, in bytes; 0 if it is gone.
        records: JSON by the names of the files; None of one that is gone, empty or too large.
    """
    reports: list[Report] = []
    decisions: list[Decision] = []
    problems: list[str] = []
    for name, content in sorted(records.items()):
        try:
            if is_decision(name):
                decisions.append(_read_record(Decision, name, content))
            else:
                reports.append(_read_record(Report, name, content))
        except ValueError as exc:
            problems.append(f"{name} can't be read: {exc}")
            if is_decision(name):
                time = parse_time(name) or datetime.now(UTC)
                decisions.append(Decision(decision="withdrawn", by="", why="it can't be read", time=time))
    count = sum(name.startswith("report") for name in records)
    if count and not size:
        problems.append("the image is gone or empty")
    return FeedbackEntry(sha256, size, tuple(reports), tuple(decisions), count, tuple(problems))


def _read_record(kind: type[T], name: str, content: bytes | None) -> T:
    if content is None:
        raise ValueError(f"it is gone, empty, or has more than {MAX_RECORD_BYTES:,} bytes")
    try:
        record = kind.model_validate_json(content)
    except ValidationError as exc:
        problem = exc.errors()[0]
        raise ValueError(f"{'.'.join(map(str, problem['loc'])) or 'it'}: {problem['msg']}"[:300]) from exc
    if record.time != parse_time(name):
        raise ValueError("its time is not that of its name")
    return record
