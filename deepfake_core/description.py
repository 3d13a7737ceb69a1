"""What `detector.json` says of a model, and what it may say.

This file is also copied into every registered model, so it imports nothing else of the project but `input_gate`.
"""

import json
from math import inf, sqrt
from pathlib import Path
from typing import Any

from .input_gate import MEASURES

DESCRIPTION = "detector.json"
CLASS_NAMES = ("real", "fake")
"""A label is the position here: fake is 1, the positive class, everywhere."""

MAX_IMAGE_SIZE = 1024
"""Of the network's input, in pixels a side: a batch of such images takes 800 MB."""

MAX_TEMPERATURE = 100.0


class InvalidModelError(ValueError):
    """A model whose `detector.json` is out of range, or does not describe its network."""


def read_description(file: Path) -> dict[str, Any]:
    """Read what `detector.json` says, with a temperature of 1 if it says none.

    Raises:
        InvalidModelError: if it is no JSON object, or a value is missing or out of range.
    """
    try:
        description = {"temperature": 1.0, **json.loads(file.read_text())}
    except (ValueError, TypeError) as exc:
        raise InvalidModelError(f"{DESCRIPTION} must be a JSON object. Received: {file} ({exc}).") from exc
    size, names = description.get("image_size"), description.get("class_names")
    require(type(size) is int and 1 <= size <= MAX_IMAGE_SIZE, f"image_size must be 1 to {MAX_IMAGE_SIZE}", size)
    for name, greatest in (("threshold", 1.0), ("temperature", MAX_TEMPERATURE)):
        value = description.get(name)
        require(_is_number(value, greatest), f"{name} must be a number from 0 to {greatest:g}", value)
    bounds, limits = description.get("bounds"), description.get("limits")  # since there are sure verdicts
    if bounds is not None:
        require(
            isinstance(bounds, dict) and all(_is_number(bounds.get(name)) for name in ("lower", "upper", "max_error")),
            "bounds must be lower, upper and max_error, each from 0 to 1",
            bounds,
        )
        require(
            isinstance(limits, dict)
            and set(limits) <= set(MEASURES)
            and all(_is_number(limit, inf) for limit in limits.values()),
            f"limits must be numbers from 0 up, by {', '.join(MEASURES)}",
            limits,
        )
    rates = description.get("rates")
    parts = rates.get("parts") if isinstance(rates, dict) else None
    met = isinstance(parts, list) and bool(parts) and all(map(_is_part, parts))
    require(rates is None or met, "rates must have parts: name, reals, fakes, and a table of thresholds", rates)
    require(description["temperature"] > 0, "temperature must be above 0", description["temperature"])
    require(names == list(CLASS_NAMES), f"class_names must be {list(CLASS_NAMES)}", names)
    return description


def _is_number(value: object, greatest: float = 1) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value <= greatest  # type: ignore[operator] # NaN is not


def _is_part(part: object) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("name"), str) or not isinstance(part.get("table"), list):
        return False
    counted = all(type(part.get(name)) is int and part[name] >= 0 for name in ("reals", "fakes"))
    rows = [isinstance(row, list) and len(row) == 3 and all(map(_is_number, row)) for row in part["table"]]
    return counted and bool(rows) and all(rows)


def require(met: bool, rule: str, received: object) -> None:
    """Raise an InvalidModelError that says the rule and what was received, unless it is met."""
    if not met:
        raise InvalidModelError(f"{rule}. Received: {received!r}. Pull the model again, or use another version.")


def describe_rates(description: dict[str, Any], threshold: float) -> str:
    """Return what a threshold meant on the test images, overall and for each source; empty if the model does not say.

    The model holds rates at some thresholds. Those of the next lower one are returned, and which one it is.
    The intervals are of 95 %, by Wilson, Journal of the American Statistical Association 22, 1927.
    """
    rates = description.get("rates")
    if not rates:
        return ""
    texts: list[str] = []
    at = ""
    for part in rates["parts"]:
        near = max((row for row in part["table"] if row[0] <= threshold), default=None)
        if near is None:
            continue
        if not texts and near[0] < threshold:
            at = f", with fake from {near[0]:g} up"
        alarms, found = (
            _show_of_100(rate, part[images]) for rate, images in zip(near[1:], ("reals", "fakes"), strict=True)
        )
        texts.append(
            f"{part['name']}: {alarms} and {found}"
            if part["name"]
            else f"of 100 real ones about {alarms} were called fake, and of 100 fakes about {found} were found"
        )
    return f"On {'drawn ' if rates.get('drawn') else ''}test images{at}, {'; '.join(texts)}." if texts else ""


def _show_of_100(rate: float, images: int) -> str:
    if not images:
        return "an unknown number"
    square = 1.96**2 / images
    middle, half = (rate + square / 2) / (1 + square), sqrt(rate * (1 - rate) * square + square**2 / 4) / (1 + square)
    return f"{100 * rate:.0f} ({100 * (middle - half):.0f} to {100 * (middle + half):.0f})"
