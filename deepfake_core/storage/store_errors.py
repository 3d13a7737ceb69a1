"""What a store's filesystem raises, as errors that say what to do."""

import contextlib
import os
from collections.abc import Iterator
from errno import EINVAL

from deepfake_core.errors import ConfigurationError, CredentialsError, DownloadError
from deepfake_core.storage.files import find_disk_failure

CREDENTIALS_HELP = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; they need to list, read, write and delete there."
)


@contextlib.contextmanager
def translate_errors(url: str) -> Iterator[None]:
    """Raise errors that say what a person can do instead.

    An absent object stays a FileNotFoundError, and a failure of a disk here an OSError.

    Causes are cut off: they may hold signed addresses, which logs would show.

    Raises:
        ConfigurationError, CredentialsError, DownloadError
    """
    try:
        yield
    except FileNotFoundError as exc:
        if "NoSuchBucket" not in str(exc.__cause__):
            raise
        raise ConfigurationError(
            f"The bucket of a URL must exist. Received: {url}{name_endpoint()} ({exc}). Create the bucket, or correct "
            "the URL or AWS_ENDPOINT_URL."
        ) from None
    except PermissionError as exc:
        if find_disk_failure(exc):
            raise
        raise CredentialsError(
            f"The store must let this account in. {url}{name_endpoint()} refused it ({exc}). {CREDENTIALS_HELP}"
        ) from None
    except _list_failures() as exc:
        if find_disk_failure(exc):
            raise
        kind = type(exc).__name__
        if "Credential" in kind or "Profile" in kind:
            raise CredentialsError(
                f"The store needs credentials. Received for {url}: {exc}. {CREDENTIALS_HELP}"
            ) from None
        if (isinstance(exc, OSError) and exc.errno == EINVAL) or "Validation" in kind:
            raise ConfigurationError(
                f"The store must understand the request. {url}{name_endpoint()} answered: {exc}. "
                "Correct the URL, AWS_ENDPOINT_URL or AWS_DEFAULT_REGION."
            ) from None
        raise DownloadError(
            f"The store must answer. {url}{name_endpoint()} failed ({kind}: {exc}). Check the network and "
            "AWS_ENDPOINT_URL, and run again: what was published stays."
        ) from None


def name_endpoint() -> str:
    """Name the endpoint that the environment sets: the same bucket name at another endpoint is another bucket."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return f" at {endpoint}" if endpoint else ""


def _list_failures() -> tuple[type[Exception], ...]:
    """Return what filesystems raise when a store fails; s3fs lets some of its libraries' errors through."""
    try:
        from aiohttp import ClientError
        from botocore.exceptions import BotoCoreError
    except ImportError:
        return (OSError,)
    return OSError, BotoCoreError, ClientError
