"""Every status of HTTP that is an error, at each place of a download: the real client, and Kaggle on loopback."""

from http import HTTPStatus
from pathlib import Path

import numpy as np
import pytest

from deepfake_core.config import Source
from deepfake_core.data.download import CHUNK
from deepfake_core.data.kaggle import fetch_archive
from deepfake_core.errors import CredentialsError, DownloadError, SourceError
from deepfake_core.storage.store import open_store
from tests.builders import faces, write_zip
from tests.kaggle_server import KaggleServer

pytestmark = pytest.mark.sweep

SOURCE = Source(name="owner/some-faces")
STATUSES = [*(int(status) for status in HTTPStatus if status >= 400), 419, 499, 520, 524, 599]
OF_THE_API = {401: CredentialsError, 403: SourceError, 404: SourceError}
"""What a person has to act on; all else may heal."""


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    noise = {"real/noise.bin": np.random.default_rng(1).bytes(2 * CHUNK)}
    return write_zip(tmp_path_factory.mktemp("content") / "a.zip", faces(2) | noise).read_bytes()


@pytest.fixture
def kaggle(kaggle, content):
    kaggle.add(SOURCE.name, content)
    return kaggle


def fail(data_dir: Path, status: int, error: type[Exception], kept: bytes) -> None:
    """Assert how a download fails, and that what came before is kept."""
    with pytest.raises(error, match=rf"\b{status}\b.* Run again|\({status}\)"):
        fetch_archive(SOURCE, open_store(data_dir))
    partial = data_dir / "archives" / "owner" / "some-faces" / "1.zip.partial"
    assert (partial.read_bytes() if partial.exists() else b"") == kept


def finish(data_dir: Path, kaggle: KaggleServer, content: bytes, asked: str) -> None:
    """Assert that the next download succeeds, by which range it asks for, and that it leaves nothing else."""
    fetched = fetch_archive(SOURCE, open_store(data_dir))
    assert fetched.path.read_bytes() == content
    assert kaggle.downloads[-1][1] == asked
    assert {path.name for path in fetched.path.parent.iterdir()} == {"1.zip", "1.json"}


@pytest.mark.parametrize("before", [0, 1], ids=["is asked for", "is to be sent"])
@pytest.mark.parametrize("status", STATUSES)
def test_of_the_api(kaggle, tmp_path, content, status, before):
    kaggle.statuses = [0] * before + [status]
    fail(tmp_path / "data", status, OF_THE_API.get(status, DownloadError), kept=b"")
    finish(tmp_path / "data", kaggle, content, asked="")


@pytest.mark.parametrize("status", STATUSES)
def test_of_the_storage_at_the_start(kaggle, tmp_path, content, status):
    kaggle.storage_statuses = [status]
    fail(tmp_path / "data", status, DownloadError, kept=b"")
    finish(tmp_path / "data", kaggle, content, asked="")


@pytest.mark.parametrize("status", STATUSES)
def test_of_the_storage_in_the_middle_and_when_the_next_download_resumes(kaggle, tmp_path, content, status):
    kaggle.cuts = [CHUNK + CHUNK // 2]
    kaggle.storage_statuses = [0, status]
    fail(tmp_path / "data", status, DownloadError, kept=content[:CHUNK])
    for place in ([status], [0, status]):  # before it is known what there is, and then for the rest
        kaggle.storage_statuses = place
        fail(tmp_path / "data", status, DownloadError, kept=content[:CHUNK])
    for place in ([status], [0, status]):
        kaggle.statuses = place
        fail(tmp_path / "data", status, OF_THE_API.get(status, DownloadError), kept=content[:CHUNK])
    finish(tmp_path / "data", kaggle, content, asked=f"bytes={CHUNK}-")
