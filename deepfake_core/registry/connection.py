"""Where MLflow is, and whether it answers."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlflow
from mlflow.store.entities import PagedList
from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

from deepfake_core.errors import ServiceError

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
                f"({type(exc).__name__}: {str(exc).splitlines()[0][:300]}). Start the server, or correct "
                "MLFLOW_TRACKING_URI."
            ) from exc
    return client


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
