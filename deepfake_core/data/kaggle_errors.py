"""What Kaggle's client raises, as errors that say what a person can do, and without what is secret."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from deepfake_core.config import Source
from deepfake_core.data.credentials import CREDENTIALS_HELP
from deepfake_core.errors import ConfigurationError, CredentialsError, DeepfakeError, DownloadError, SourceError

log = logging.getLogger(__name__)

T = TypeVar("T")

API = "api.kaggle.com"
MAX_WAITS = 3
MAX_WAIT_SECONDS = 600
"""How often, and how long each time, Kaggle may ask to wait (Retry-After) before the download fails."""


def ask_kaggle(source: Source, ask: Callable[[], T]) -> T:
    """Call `ask`, and again after a time for which Kaggle asks; translate what it raises.

    Causes are cut off: they hold signed addresses and credentials, which logs would show.
    """
    waits = 0
    while True:
        try:
            return ask()
        except requests.HTTPError as exc:
            seconds = _read_retry_after(exc.response)
            if seconds is None or seconds > MAX_WAIT_SECONDS or waits == MAX_WAITS:
                raise _explain_status(exc, source, seconds) from None
            log.info("%s: Kaggle answered %s and asks to wait %.0f s", source.name, exc.response.status_code, seconds)
        except requests.RequestException as exc:
            raise _explain_connection(exc, source) from None
        except (DeepfakeError, OSError) as exc:
            if "TLS CA certificate bundle" in str(exc):
                raise ConfigurationError(
                    f"REQUESTS_CA_BUNDLE must name a PEM file that exists. Received: {exc}. Correct or unset it."
                ) from None
            raise  # the disk's
        except Exception as exc:  # noqa: BLE001 - the client passes on whatever an odd answer does to it
            raise DownloadError(
                f"Kaggle's client must understand Kaggle's answer about {source.name}. Received: {type(exc).__name__} "
                f"({exc}). Run again later; if it stays, install the version of kaggle that pyproject.toml names."
            ) from None
        waits += 1
        time.sleep(seconds)


def _read_retry_after(response: requests.Response | None) -> float | None:
    """Return the seconds that an answer asks to wait; None if it doesn't ask."""
    if response is None or response.status_code not in (429, 503) or "Retry-After" not in response.headers:
        return None
    try:
        return Retry().parse_retry_after(response.headers["Retry-After"])
    except InvalidHeader:
        return None


def _explain_status(exc: requests.HTTPError, source: Source, seconds: float | None) -> DeepfakeError:
    later = f"in {seconds / 60:.0f} minutes, as it asks" if seconds else "later"
    status = exc.response.status_code if exc.response is not None else None
    if exc.response is not None and urlsplit(exc.response.url).hostname != API:
        return DownloadError(
            f"Kaggle's storage answered {status} for {source.name}; what has arrived is kept. Run again {later}."
        )
    if status == 401:
        return CredentialsError(f"Kaggle refused the credentials (401) for {source.name}. {CREDENTIALS_HELP}")
    if status == 403:
        return SourceError(
            f"Kaggle does not let this account read {source.name} (403). Open "
            f"https://www.kaggle.com/datasets/{source.name} while logged in and accept its terms, "
            "or use another account's token."
        )
    if status == 404:
        version = f" in version {source.version}" if source.version else ""
        return SourceError(f"Kaggle knows no data set {source.name}{version} (404). Correct `data.sources`.")
    return DownloadError(f"Kaggle answered {status} for {source.name}; what has arrived is kept. Run again {later}.")


def _explain_connection(exc: requests.RequestException, source: Source) -> DeepfakeError:
    if "CERTIFICATE_VERIFY_FAILED" in str(exc):
        return ConfigurationError(
            f"The certificate of Kaggle, or of a proxy before it, must be one that this machine trusts. Received for "
            f"{source.name}: {exc}. Set REQUESTS_CA_BUNDLE to the PEM file of the authority that issued it."
        )
    return DownloadError(
        f"The connection to Kaggle failed for {source.name} ({type(exc).__name__}: {exc}); what has arrived "
        "is kept. Check the network or HTTPS_PROXY and run again: the download continues from there."
    )
