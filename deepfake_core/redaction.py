"""Remove secrets from text: errors and log records pass through here before anyone sees them."""

import logging
import os
import re
import traceback
from typing import Any
from urllib.parse import quote

REMOVED = "[removed]"
MIN_SECRET_CHARACTERS = 8
"""Characters that a value of the environment must have to be searched for: shorter ones are in many words."""

SECRET_NAMES = re.compile(
    r"(TOKEN|KEY|KEY_ID|SECRET|PASSWORD|PASSWD|_PASS|_PAT|AUTH_STRING|CONNECTION_STRING)$", re.IGNORECASE
)
QUOTE = r"""\\?['"]"""
SECRET_FORMS = (
    # User name and password of an address, up to the last @; in "host:80/user@host" there is no password.
    (re.compile(r"(://)(?:[^\s/@:]*:(?!\d+[/?#])\S*|[^\s/?#@'\"]+)@"), rf"\1{REMOVED}@"),
    (re.compile(r"\?[^\s?\"]*=[^\s\"]*"), f"?{REMOVED}"),  # the query of an address, perhaps signed
    (re.compile(r"\b((?:Bearer|Basic)(?:\s|%20)+)[^\s'\",]{16,}", re.IGNORECASE), rf"\1{REMOVED}"),
    (re.compile(r"\bKGAT(?:_|%5F)[\w.-]+"), REMOVED),  # Kaggle's tokens
    (
        re.compile(
            rf"({QUOTE}\w*(?:key|token|secret|password){QUOTE}\s*:\s*){QUOTE}[^'\"\\]{{8,}}(?:{QUOTE})?", re.IGNORECASE
        ),
        rf"\1{REMOVED}",
    ),
)


def redact(text: str) -> str:
    """Return the text without what is secret by its form, or as a value of the environment whose name says so."""
    for name, value in os.environ.items():
        secret = value.strip()
        if len(secret) < MIN_SECRET_CHARACTERS or not SECRET_NAMES.search(name):
            continue
        for written in (secret, quote(secret, safe="")):
            if written in text and not os.path.exists(secret):  # noqa: PTH110 - any text
                text = text.replace(written, REMOVED)
    for form, shown in SECRET_FORMS:
        text = form.sub(shown, text)
    return text


class RedactedRecord(logging.LogRecord):
    """A log record whose message and traceback hold no secrets."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.exc_info and self.exc_info[0]:
            self.exc_text = redact("".join(traceback.format_exception(*self.exc_info)).rstrip("\n"))

    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return redact(super().getMessage())


def redact_logs() -> None:
    """Make every log record of this process a redacted one, whoever logs it and whichever handler shows it."""
    logging.setLogRecordFactory(RedactedRecord)
