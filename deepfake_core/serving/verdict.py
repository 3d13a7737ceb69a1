"""A verdict: whether one face, or a whole image, is real or fake."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from PIL import Image

from deepfake_core.input_gate import ImageQuality


@dataclass(frozen=True)
class Clip:
    """How a face did over a clip.

    Attributes:
        frames: how many were scored.
        low: 10th percentile of their probabilities; likewise `high`, the 90th.
        first_second: when the face was first seen, from the first frame on; likewise `last_second`.
        frames_seen: how many frames of the clip were decoded.
        frames_asked: how many were to be.
    """

    frames: int
    low: float
    high: float
    first_second: float
    last_second: float
    frames_seen: int
    frames_asked: int


@dataclass(frozen=True)
class Observed:
    """What is known of a judged face besides the verdict, for `deepfake_core.monitoring`; shown nowhere.

    Attributes:
        version: that judged, as name/number; empty for a model from a folder.
        width: of the upright image, in pixels; likewise `height`.
        shadow_version: that ran beside it; None if there is none.
        shadow_probability: P(fake) by that version; likewise `shadow_fake`, whether it calls the face fake.
    """

    quality: ImageQuality
    version: str
    width: int
    height: int
    shadow_version: str | None = None
    shadow_probability: float | None = None
    shadow_fake: bool | None = None


@dataclass(frozen=True)
class Verdict:
    """The verdict on one face or a whole image, or why there is none.

    Attributes:
        image: the file's path, or another name.
        face: 1 for the largest; None where the whole image was judged, or nothing.
        box: left, top, right and bottom, in pixels of the upright image, of what was scored.
        label: `real` or `fake`; None where `error` says why there is none.
        fake_probability: 0 to 1; of a clip, from the trimmed mean of its frames' logits.
        sure: whether the label keeps the model's stated error; None where there is no label, or the model does not say.
        reason: why it is not sure.
        unreadable: True if the image could not be read, as opposed to showing no face.
        clip: None for an image.
        warning: what of a clip was not seen, though there is a verdict; None if nothing.
        observed: of an image that has a label; None for a clip. It is no column.
    """

    image: str
    face: int | None
    box: tuple[int, int, int, int] | None
    label: str | None
    fake_probability: float | None
    threshold: float
    sure: bool | None = None
    reason: str | None = None
    error: str | None = None
    unreadable: bool = False
    clip: Clip | None = None
    warning: str | None = None
    observed: Observed | None = None

    @classmethod
    def refuse(
        cls, image: str, threshold: float, error: str, *, unreadable: bool = False, warning: str | None = None
    ) -> "Verdict":
        """Return that there is no verdict, and why."""
        return cls(
            image,
            face=None,
            box=None,
            label=None,
            fake_probability=None,
            threshold=threshold,
            error=error,
            unreadable=unreadable,
            warning=warning,
        )

    @property
    def outcome(self) -> str:
        """`real`, `fake`, `no face` or `unreadable`."""
        return "unreadable" if self.unreadable else self.label or "no face"

    def as_row(self) -> dict[str, Any]:
        """Return it as plain values by `VERDICT_COLUMNS`; those of a clip for a clip alone."""
        row = asdict(self)
        clip, _ = row.pop("clip"), row.pop("observed")
        return row | (clip or {})

    def describe(self) -> str:
        """Return it as a line, such as `face 1: fake, P(fake) = 0.93`."""
        warning = f"; {self.warning}" if self.warning else ""
        if self.fake_probability is None:
            return f"{self.error}{warning}"
        face = f"face {self.face}: " if self.face else ""
        spread = f" ({self.clip.low:.2f} to {self.clip.high:.2f} over {self.clip.frames} frames)" if self.clip else ""
        unsure = f"; not sure: {self.reason}" if self.reason else ""
        return f"{face}{self.label}, P(fake) = {self.fake_probability:.2f}{spread}{unsure}{warning}"


VERDICT_COLUMNS = tuple(one.name for one in (*fields(Verdict), *fields(Clip)) if one.name not in ("clip", "observed"))


@dataclass(frozen=True)
class Judged:
    """An image or a clip with its verdicts, at least one.

    Attributes:
        picture: explains the verdicts; None if it was not asked for.
        sha256: of an image's bytes, in hex; empty where they could not be read, and for a clip.
        timelines: of a clip: for each verdict, the seconds at which the face was seen, and its scores.
    """

    name: str
    verdicts: list[Verdict]
    picture: Image.Image | None = None
    sha256: str = ""
    timelines: list[tuple[list[float], list[float]]] = field(default_factory=list)
