"""Every form in which users post images to `mlflow models serve`: judged, or an answer that says what to send."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
import requests

from deepfake_core.detector import Detector
from deepfake_core.registry import detectors, runs
from tests.builders import FORMER, NAME, ROOT, copy_former, draw_image, encode, free_port, jpeg, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.sweep]

IMAGES = [jpeg(3), encode(draw_image(4), "PNG")]
TEXTS = [base64.b64encode(data).decode() for data in IMAGES]
FORMS = {
    "dataframe_split": {"dataframe_split": {"columns": ["image"], "data": [[text] for text in TEXTS]}},
    "dataframe_records": {"dataframe_records": [{"image": text} for text in TEXTS]},
    "a column more": {"dataframe_records": [{"image": text, "id": 7} for text in TEXTS]},
    "inputs, a column": {"inputs": {"image": TEXTS}},
    "inputs, records": {"inputs": [{"image": text} for text in TEXTS]},
    "inputs, a list": {"inputs": TEXTS},
    "instances, a column": {"instances": {"image": TEXTS}},
    "instances, records": {"instances": [{"image": text} for text in TEXTS]},
    "instances, a list": {"instances": TEXTS},
    "data URLs": {
        "inputs": [f"data:image/{kind};base64,{text}" for kind, text in zip(("jpeg", "png"), TEXTS, strict=True)]
    },
    "a data URL with parameters": {"inputs": [f"data:image/jpeg;name=a.jpg;base64,{text}" for text in TEXTS]},
    "data URLs in capitals": {"inputs": [f"DATA:image/jpeg;BASE64,{text}" for text in TEXTS]},
    "a data URL with a comma": {"inputs": [f'data:image/jpeg;name="a,b.jpg";base64,{text}' for text in TEXTS]},
    "a data URL, percent-encoded": {"inputs": [f"data:image/jpeg;base64,{quote(text, safe='')}" for text in TEXTS]},
    "URL-safe base64": {"inputs": [base64.urlsafe_b64encode(data).decode() for data in IMAGES]},
    "base64 in lines": {"inputs": [base64.encodebytes(data).decode() for data in IMAGES]},
    "base64 without its end": {"inputs": [text.rstrip("=") for text in TEXTS]},
}
NO_IMAGES = {
    "a path": "/etc/hostname",
    "an address": "http://127.0.0.1/face.jpg",
    "nothing": None,
    "no text": "",
    "words": "a face",
    "a structure": {"b64": TEXTS[0]},
}


@pytest.fixture(scope="module")
def address(put_mlflow, tmp_path_factory):
    """Serve a version with MLflow; return where it takes images."""
    folder = tmp_path_factory.mktemp("served")
    copy_former(folder / "detector")
    file = folder / "detector" / "detector.json"
    bounds = {"lower": 0.0, "upper": 1.0, "max_error": 0.05}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bounds": bounds, "limits": {}}))
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        put_mlflow(patch, folder)
        with runs.open_run("cnn") as run_id:
            version = detectors.register_detector(run_id, folder / "detector", NAME, jpeg(1), {})
        command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", f"models:/{NAME}/{version}"]
        command += ["--env-manager", "local", "--port", str(port)]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        with (folder / "serve.log").open("w") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            wait_until(lambda: "startup complete" in (folder / "serve.log").read_text())
            yield f"http://127.0.0.1:{port}/invocations"
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def check_judged(answer: requests.Response, images: list[bytes]) -> None:
    assert answer.status_code == 200, answer.text
    for row, expected in zip(answer.json()["predictions"], Detector(FORMER).predict(images), strict=True):
        assert row["error"] is None
        assert row["label"] == expected.label
        assert row["fake_probability"] == pytest.approx(expected.fake_probability)


@pytest.mark.parametrize("form", FORMS)
def test_images_are_judged_in_every_form(address, form):
    check_judged(requests.post(address, json=FORMS[form]), IMAGES)


def test_a_threshold_may_be_given_and_what_is_not_sure_says_why(address):
    body = {"inputs": TEXTS, "params": {"threshold": 0.0}}
    for row in requests.post(address, json=body).json()["predictions"]:
        assert (row["label"], row["threshold"]) == ("fake", 0.0)
        assert row["sure"] is False
        assert "must be above 1.00 to be sure" in row["reason"]
    refused = requests.post(address, json={"inputs": TEXTS, "params": {"threshold": 7}})
    assert refused.status_code == 400
    assert "threshold must be a number from 0 to 1" in refused.text


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_images_are_judged_as_csv(address, end):
    table = end.join(["image", *TEXTS, ""])
    check_judged(requests.post(address, data=table, headers={"Content-Type": "text/csv"}), IMAGES)


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_is_no_image_is_said_and_harms_no_other(address, kind):
    answer = requests.post(address, json={"dataframe_records": [{"image": NO_IMAGES[kind]}, {"image": TEXTS[0]}]})
    assert answer.status_code == 200, answer.text
    refused, judged = answer.json()["predictions"]
    assert re.match("must be (an image as bytes, base64 or a base64|a JPEG, PNG or WebP image)", refused["error"])
    assert refused["label"] is None
    assert judged["label"] in ("real", "fake")


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        ('{"dataframe_records": [{"img": "aGVsbG8="}]}', "application/json", "missing inputs ['image']"),
        ('{"inputs": {"img": ["aGVsbG8="]}}', "application/json", "missing inputs ['image']"),
        ('{"dataframe_records": []}', "application/json", "missing inputs ['image']"),
        ('["aGVsbG8="]', "application/json", "exactly one of the input fields"),
        ('{"image": "aGVsbG8="}', "application/json", "exactly one of the input fields"),
        (IMAGES[0], "image/jpeg", "only supports the following content types"),
    ],
)
def test_what_mlflow_refuses_says_what_to_send(address, body, kind, says):
    answer = requests.post(address, data=body, headers={"Content-Type": kind})
    assert 400 <= answer.status_code < 500
    assert says in answer.text


def test_the_examples_of_the_page_work(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("face.jpg").write_bytes(IMAGES[0])
    page = (ROOT / "docs" / "how-to" / "use-the-model.md").read_text()
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "/invocations" in block)
    ran: dict = {}
    exec(block.replace("http://127.0.0.1:5001/invocations", address), ran)
    assert len(ran["answers"]) == 8
    for answer in ran["answers"]:
        check_judged(answer, IMAGES[:1])
