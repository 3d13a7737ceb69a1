"""What the page's server refuses before Gradio sees it: other sites' requests, large bodies, addresses to fetch."""

import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

MAX_JSON_BYTES = 1_000_000
"""A request other than an upload names uploaded files and holds no picture."""

HOSTS = ("127.0.0.1", "localhost")

CALL = re.compile(r".*/(?:api|call|call/v2|run)/([^/]+)/?")
"""The path of a call; the function's name is the last part."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class RequestGuard:
    """ASGI middleware before Gradio's application.

    Another site's page in the user's browser may send requests to loopback, under a name of its own that it has
    pointed there (DNS rebinding) or under loopback's: both are refused by their Host and Origin headers.

    Args:
        port: that the page is served on.
        max_upload_bytes: of the body of an upload.
        functions: Gradio's numbers of the functions that may be called, each with its name.
    """

    def __init__(self, app: Any, port: int, max_upload_bytes: int, functions: Mapping[int, str]) -> None:
        self._app, self._max_upload_bytes, self._functions = app, max_upload_bytes, functions
        self._hosts = {f"{host}:{port}" for host in HOSTS}
        self._origins = {f"http://{host}" for host in self._hosts}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_and_close(message: Message) -> None:
            if message.get("status", 200) >= 400:  # else the server would go on reading the body
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            await self._app(scope, await self._check(scope, receive), send_and_close)
        except HTTPException as exc:
            await JSONResponse({"detail": exc.detail}, exc.status_code)(scope, receive, send_and_close)

    async def _check(self, scope: Message, receive: Receive) -> Receive:
        """Return what to read the request's body from.

        Raises:
            HTTPException: if the request is refused.
        """
        headers = Headers(scope=scope)
        if headers.get("host") not in self._hosts:
            raise HTTPException(403, f"The host must be one of {', '.join(sorted(self._hosts))}.")
        if headers.get("origin", min(self._origins)) not in self._origins:
            raise HTTPException(403, "Another site's pages may not use this one.")
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        limited = limit_body(receive, headers, self._max_upload_bytes if is_upload else MAX_JSON_BYTES)
        if scope["method"] != "POST" or is_upload:
            return limited
        body = await read_body(limited)
        self._check_call(body, scope["path"])
        return replay_body(body, receive)

    def _check_call(self, body: bytes, path: str) -> None:
        try:
            call = json.loads(body or b"{}")
        except (ValueError, RecursionError) as exc:
            raise HTTPException(400, "The body must be JSON.") from exc
        if not isinstance(call, dict):
            raise HTTPException(400, "The body must be a JSON object.")
        function = call.get("fn_index")
        if function is not None and (not isinstance(function, int) or function not in self._functions):
            raise HTTPException(404, f"fn_index must be one of {sorted(self._functions)}. Received: {function!r}.")
        name = CALL.fullmatch(path)
        if function is None and name and name[1] not in self._functions.values():
            raise HTTPException(404, f"There is no such function. Received: {name[1]!r}.")
        data = call.get("data")
        if isinstance(data, list):  # such as a note: Gradio opens only what an object names
            call["data"] = [one for one in data if not isinstance(one, str)]
        for text in list_strings(call):
            if "://" in text and not text.startswith(tuple(f"{origin}/" for origin in self._origins)):
                raise HTTPException(400, "A request may not name an address: upload the file instead.")


def limit_body(receive: Receive, headers: Headers, max_bytes: int) -> Receive:
    """Return `receive` that refuses a body of more than `max_bytes`, by its declared length or while it arrives."""
    refusal = HTTPException(413, f"The request may hold {max_bytes:,} bytes at most.")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > max_bytes:
        raise refusal
    arrived = 0

    async def limited() -> Message:
        nonlocal arrived
        message = await receive()
        arrived += len(message.get("body", b""))
        if arrived > max_bytes:
            raise refusal
        return message

    return limited


async def read_body(receive: Receive) -> bytes:
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def replay_body(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that has been read, and then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def list_strings(value: object) -> Iterator[str]:
    """Yield every string in a JSON value."""
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            pending += one.values()
        elif isinstance(one, list):
            pending += one
