"""What messages, logs and alerts must not hold."""

import io
import logging
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.server.utilities.user_templates import render_user_template_sync, validate_user_template

from deepfake_core.errors import DownloadError
from deepfake_core.redaction import RedactedRecord, redact
from deployments.alerts import MESSAGE

SECRET = "5ecre7f0a1b2c3d4"
TEXTS = {
    f"https://storage.invalid/a.zip?X-Goog-Expires=9&X-Goog-Signature={SECRET}": "https://storage.invalid/a.zip?[removed]",
    f"exceeded with url: /a.zip?sig={SECRET} (Caused by": "exceeded with url: /a.zip?[removed] (Caused by",
    f"/a.zip?disposition=filename=a(1).zip&X-Goog-Signature={SECRET} (Caused": "/a.zip?[removed] (Caused",
    f"/a.zip?filename=o'neil<b>.zip&X-Goog-Signature={SECRET}": "/a.zip?[removed]",
    f"http://user:ab/{SECRET}@proxy:8080 failed": "http://[removed]@proxy:8080 failed",
    f"http://user:p@{SECRET}@proxy:8080": "http://[removed]@proxy:8080",
    f"Bearer%20{SECRET}": "Bearer%20[removed]",
    f"KGAT_ab-c.{SECRET}": "[removed]",
    f'{{"access_token": "{SECRET}"}}': '{"access_token": [removed]}',
    f'{{\\"token\\": \\"{SECRET}\\"}}': '{\\"token\\": [removed]}',
    f"postgresql://me:{SECRET}@db:5432/mlflow": "postgresql://[removed]@db:5432/mlflow",
    f"header value: 'Bearer KGAT_{SECRET}\\n'": "header value: 'Bearer [removed]'",
    f"Authorization: basic {SECRET}==": "Authorization: basic [removed]",
    f"the token “KGAT_{SECRET}”": "the token “[removed]”",
    f'{{"username": "me", "key": "{SECRET}"}}': '{"username": "me", "key": [removed]}',
}


@pytest.mark.parametrize("text", TEXTS)
def test_secrets_are_known_by_their_form(text):
    assert redact(text) == TEXTS[text]
    assert str(DownloadError(text)) == TEXTS[text]
    assert str(pickle.loads(pickle.dumps(DownloadError(text)))) == TEXTS[text]  # noqa: S301 - as Prefect does


@pytest.mark.parametrize(
    "text",
    [
        "The store needs credentials. Received for s3://bucket/deepfake: none.",
        "Is it there? Set REQUESTS_CA_BUNDLE=/etc/ssl/ca.pem and run again.",
        '{"username": "NAME", "key": "KEY"} is what kaggle.json holds; http://localhost:5000/#/models/a@production',
        "basic authentication; key='data-set'; user@host; models:/deepfake-detector@production",
    ],
)
def test_other_text_stays(text):
    assert redact(text) == text


@pytest.mark.parametrize(
    "name", ["KAGGLE_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "GITHUB_PAT", "kaggle_key"]
)
def test_secrets_of_the_environment_are_removed_whatever_their_form(monkeypatch, name):
    monkeypatch.setenv(name, f"{SECRET}\n")
    assert redact(f"refused {SECRET}, twice: {SECRET}!") == "refused [removed], twice: [removed]!"
    monkeypatch.setenv(name, f"/{SECRET}+/=")
    assert redact(f"refused /{SECRET}+/=, in an address %2F{SECRET}%2B%2F%3D") == (
        "refused [removed], in an address [removed]"
    )
    monkeypatch.setenv(name, "short")
    assert redact("a short word") == "a short word"


@given(st.text(st.characters(codec="utf-8")))
def test_what_is_redacted_stays_as_it_is_when_redacted_again(text):
    assert redact(redact(text)) == redact(text)


def test_log_records_hold_no_secrets_whoever_logs_them(monkeypatch):
    monkeypatch.setattr(logging, "_logRecordFactory", RedactedRecord)
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logger = logging.getLogger("another.library")
    logger.addHandler(handler)
    try:
        logger.warning("GET %s", f"/a?sig={SECRET}")
        try:
            raise ValueError(f"Bearer {SECRET}") from OSError(f"/b?sig={SECRET}")
        except ValueError:
            logger.exception("failed with %d", 1)
    finally:
        logger.removeHandler(handler)
    assert SECRET not in written.getvalue()
    assert "GET /a?[removed]" in written.getvalue()
    assert "failed with 1\nOSError: /b?[removed]" in written.getvalue()
    assert "ValueError: Bearer [removed]" in written.getvalue()


@pytest.mark.parametrize("text", [text for text in TEXTS if re.search(r"KGAT_|[?]|://", text)])
def test_alerts_leave_out_words_that_look_like_secrets(text):
    validate_user_template(MESSAGE)
    shown = render_user_template_sync(MESSAGE, {"flow_run": {"state": {"message": f"before {text} after"}}})
    assert SECRET not in shown
    assert shown.startswith("before ")
    assert shown.rstrip().endswith(" after")
