"""Where MLflow is, and whether it answers."""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlflow
from mlflow.store.entities import PagedList
from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

from deepfake_core.errors import ServiceError
from deepfake_core.redaction import REMOVED

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"


def connect() -> mlflow.MlflowClient:
    """Return a client of the tracking server, which is asked once whether it is there.

    Raises:
        ServiceError: if it can't be reached; within seconds, without MLflow's long retries.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_TRACKING_URI
    mlflow.set_tracking_uri(uri)
    with set_environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT="10"):
        try:
            if uri.startswith(("postgresql", "mysql")):
                _check_database(uri)
            client = mlflow.MlflowClient()
            client.search_experiments(max_results=1)
        except (ModuleNotFoundError, UnsupportedModelRegistryStoreURIException) as exc:
            raise ServiceError(
                f"A database as tracking store needs the package mlflow, not only mlflow-skinny. Received: {uri}. Set "
                "MLFLOW_TRACKING_URI to a tracking server's http address, or install deepfake-retraining[train]."
            ) from exc
        except Exception as exc:
            raise ServiceError(
                f"MLflow must answer at the tracking URI. Received: {uri}, which failed "
                f"({type(exc).__name__}: {_hide_password(uri, str(exc)).splitlines()[0][:300]}). Start the server, or "
                "correct MLFLOW_TRACKING_URI. In a password, write @ as %40, / as %2F and : as %3A."
            ) from exc
    return client


def _hide_password(uri: str, text: str) -> str:
    """Remove each part of the address's password: drivers take what follows an @ in it for the host, and name it."""
    password = uri.partition("://")[2].rpartition("@")[0].partition(":")[2]
    for part in filter(None, re.split("[:@/?#]", password)):
        text = re.sub(rf"(?<!\w){re.escape(part)}(?!\w)", REMOVED, text)
    return text


def _check_database(uri: str) -> None:
    """Connect once: MLflow would try a database that is gone for 100 s."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": 10})
    engine.connect().close()
    engine.dispose()


def use_root_logger() -> None:
    """Leave the lines of the loggers that MLflow gives a handler of its own to the root logger's handlers."""
    for name in ("mlflow", "alembic", "huey", "sqlalchemy.engine"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True


@contextmanager
def set_environment(**values: str) -> Iterator[None]:
    """Set environment variables for the body, and put them back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def list_all(search: Callable[..., PagedList], **arguments: Any) -> list[Any]:
    """Return what all pages of a search hold."""
    page = search(**arguments)
    found = list(page)
    while page.token:
        page = search(**arguments, page_token=page.token)
        found += page
    return found
