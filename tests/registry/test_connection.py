"""Where MLflow can't be reached: what is said, and how soon."""

import pytest

from deepfake_core.errors import ServiceError
from deepfake_core.registry.connection import connect

SECRET = "5ecre7f0a1b2c3d4"


@pytest.mark.slow
@pytest.mark.parametrize(
    "uri",
    [
        f"postgresql://me:{SECRET}@127.0.0.1:1/mlflow",
        f"postgresql://me:p@{SECRET}@127.0.0.1:1/mlflow",
        f"postgresql://me:p/{SECRET}@127.0.0.1:1/mlflow",
        f"http://me:p@{SECRET}@127.0.0.1:1",
    ],
)
def test_an_mlflow_that_is_gone_is_asked_once_and_no_password_is_shown(uri, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ServiceError, match="must answer at the tracking URI") as raised:
        connect()
    assert SECRET not in str(raised.value)
    assert "%40" in str(raised.value)
    assert not [record for record in caplog.records if "SQLAlchemy" in record.getMessage()]  # MLflow's ten tries
