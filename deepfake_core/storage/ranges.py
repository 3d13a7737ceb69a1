"""An object at a URL that is read by range, never whole."""

import io
from typing import Any

from deepfake_core.errors import ArchiveError
from deepfake_core.storage.store import open_filesystem
from deepfake_core.storage.store_errors import translate_errors


class RangeFile(io.RawIOBase):
    """A file for libraries that seek; each `readinto` is a request. `read_range` is safe from several threads at once.

    Attributes:
        url: of the object.
        size: in bytes, when it was opened.

    Raises:
        ConfigurationError, CredentialsError, DownloadError: from every method that asks the store, if it refuses or
            can't be reached.
        ArchiveError: from the same, if the object is not there.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._files, self._path = open_filesystem(url)
        self._position = 0
        self.size = int(self._ask("info")["size"])

    def __str__(self) -> str:
        return self.url

    def read_range(self, start: int, size: int) -> bytes:
        """Return `size` bytes from `start` on, fewer where the object ends, in one request."""
        stop = min(start + size, self.size)
        return self._ask("cat_file", start=start, end=stop) if start < stop else b""

    def _ask(self, method: str, **options: int) -> Any:
        try:
            with translate_errors(self.url):
                return getattr(self._files, method)(self._path, **options)
        except FileNotFoundError as exc:
            raise ArchiveError(f"{self.url} must be there as long as it is read. Received: nothing.") from exc

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self.read_range(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
