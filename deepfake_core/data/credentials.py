"""Kaggle's credentials, checked before the client uses them: it would print what it can't send."""

import json
import os
import re
import unicodedata
from pathlib import Path

from deepfake_core.errors import CredentialsError

CREDENTIALS_HELP = (
    "Create a token at https://www.kaggle.com/settings (API, Create New Token) and set KAGGLE_API_TOKEN, "
    "or KAGGLE_USERNAME and KAGGLE_KEY, or save it as ~/.kaggle/kaggle.json, or as Prefect's Secret block "
    "kaggle-api-token. "
    "`make demo` and local zips or folders need no credentials."
)
VARIABLES = ("KAGGLE_API_TOKEN", "KAGGLE_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY")
MAX_CHARACTERS = 255
"""Of a credential: the client asks whether a token is the name of a file, which fails for longer ones."""


def clean_variables() -> None:
    """Strip and check the environment's credentials, where they are; an empty one counts as absent.

    Raises:
        CredentialsError: if one can't be a credential. The message doesn't show it.
    """
    for name in VARIABLES:
        given = os.environ.get(name, "")
        value = given.strip()
        if value and not os.path.isfile(value):  # noqa: PTH113 - takes any text
            check(value, name)
        if not value:
            os.environ.pop(name, None)
        elif value != given:  # other threads read it meanwhile
            os.environ[name] = value


def check_file(path: Path) -> dict[str, str]:
    """Return the user name and key of a kaggle.json, stripped; nothing if it holds none.

    Raises:
        CredentialsError: if it is damaged, or one of both can't be a credential. The message doesn't show them.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        if not content.keys() & {"username", "key"}:  # it holds other settings
            return {}
        return {name: check(content[name].strip(), f"`{name}` in {path}") for name in ("username", "key")}
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise CredentialsError(
            f'{path} must hold {{"username": "...", "key": "..."}}. Received: a damaged file ({type(exc).__name__}). '
            f"Download it again, or delete it. {CREDENTIALS_HELP}"
        ) from None


def check(value: str, place: str) -> str:
    """Return a credential if it may be one.

    Raises:
        CredentialsError: it says which character is wrong, and shows nothing else of it.
    """
    wrong = re.search(r"[^A-Za-z0-9._~+/=-]", value)
    if not wrong and 0 < len(value) <= MAX_CHARACTERS:
        return value
    found = ""
    if wrong:
        found = f", of which number {wrong.start() + 1} is {unicodedata.name(wrong[0], f'U+{ord(wrong[0]):04X}')}"
    raise CredentialsError(
        f"Kaggle's credentials must be 1 to {MAX_CHARACTERS} ASCII letters, digits and ._~+/=- without white space or "
        f"quotes. Received in {place}: {len(value)} characters{found}. Copy it again. {CREDENTIALS_HELP}"
    )
