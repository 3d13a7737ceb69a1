"""Confirmed reports, judged again by the version in production and by the challenger beside it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from deepfake_core.data.confirmed import cut_face
from deepfake_core.errors import ArchiveError
from deepfake_core.feedback.reports import open_feedback
from deepfake_core.redaction import redact
from deepfake_core.registry.aliases import find_challenger
from deepfake_core.registry.versions import ModelVersion
from deepfake_core.serving.load_versions import load_version

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reported:
    """On how many confirmed images each version is wrong, by its number: production's first.

    Attributes:
        failure: why they could not be judged; empty if they were.
    """

    images: int = 0
    wrong: Mapping[str, int] = field(default_factory=dict)
    failure: str = ""

    def describe(self) -> list[str]:
        """Return it as a sentence; nothing without images."""
        if self.failure:
            return [f"the confirmed reports were not judged: {self.failure}"]
        if not self.images:
            return []
        found = ", ".join(f"version {number} is wrong on {wrong}" for number, wrong in self.wrong.items())
        return [f"of {self.images} confirmed reports, {found}; a version may have learned from some of them"]

    def flatten(self, name: str) -> dict[str, float]:
        """Return the metrics by their names in MLflow."""
        wrong = {f"reported/{name}/{number}/wrong": float(count) for number, count in self.wrong.items()}
        return {"reported/images": float(self.images)} | wrong if self.images else {}


def judge_reported(address: str, production: ModelVersion) -> Reported:
    """Judge each confirmed image with production and, if there is one, the challenger.

    What fails here is said in the result, and drift is reported all the same.

    Args:
        address: folder or URL that keeps reports; empty: none.
    """
    try:
        return _judge(address, production)
    except Exception as exc:
        log.exception("the confirmed reports can't be judged")
        return Reported(failure=redact(str(exc)))


def _judge(address: str, production: ModelVersion) -> Reported:
    found = open_feedback(address).list_confirmed() if address else []
    if not found:
        return Reported()
    numbers = [production.version, find_challenger(production.name)]
    detectors = {number: load_version(production.name, number) for number in dict.fromkeys(numbers) if number}
    images, wrong = 0, dict.fromkeys(detectors, 0)
    for report in found:
        try:
            face, _ = cut_face(report.read(), report.box)
        except ArchiveError as exc:
            log.warning("a confirmed report is left out: %s", exc)
            continue
        images += 1
        for number, detector in detectors.items():
            wrong[number] += detector.predict([face])[0].label != report.label
    return Reported(images, wrong)
