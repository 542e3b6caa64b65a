"""What stands before the routes: the key, the size of a body, and faults of the server."""

import asyncio
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ApiError, internal_error

BODY_TIMEOUT = 60  # seconds that a client may take for the next bytes of its body
PROTECTED = "/v1/"


class KeyGuard:
    """
    Refuses requests to the API that bring none of the keys; without keys all may pass.

    Args:
        keys (`Sequence[str]`): compared in a time that does not depend on how much of them is right.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.keys and scope["path"].startswith(PROTECTED):
            error = self._error(scope)
            if error is not None:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _error(self, scope: Scope) -> ApiError | None:
        headers = {"WWW-Authenticate": "Bearer"}
        credentials = Headers(scope=scope).get("authorization")
        if credentials is None:
            message = "You didn't provide an API key: send it in the header Authorization: Bearer KEY."
            return ApiError(401, message, code="missing_api_key", headers=headers)
        scheme, _, key = credentials.partition(" ")
        given = key.encode("latin-1").strip(b" \t")  # bytes: a byte of UTF-8 may look like white space of Latin-1
        is_right = False
        for expected in self.keys:
            is_right |= hmac.compare_digest(given, expected)
        if scheme.lower() == "bearer" and is_right:
            return None
        return ApiError(401, "Incorrect API key provided.", code="invalid_api_key", headers=headers)


class BodyGuard:
    """
    Refuses bodies that are too large, with or without a Content-Length, or that do not come.

    Args:
        max_bytes (`int`): the most bytes of a body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:19]) > self.max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        num_bytes = 0
        is_complete = False

        async def receive_some() -> Message:
            nonlocal num_bytes, is_complete
            if is_complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), BODY_TIMEOUT)
            except asyncio.TimeoutError:
                raise ApiError(408, f"The body did not come within {BODY_TIMEOUT} seconds.") from None
            is_complete = message["type"] != "http.request" or not message.get("more_body", False)
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise self._too_large()
            return message

        await self.app(scope, receive_some, send)

    def _too_large(self) -> ApiError:
        # the rest of the body is not read, so that no other request can follow on this connection
        message = f"The body is larger than {self.max_bytes:,} bytes, the most for this server."
        return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})


class FaultGuard:
    """
    Answers a request that meets a fault of the server with 500.

    Starlette would also raise the error again, and uvicorn then break the connection, perhaps under the next request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_started
            has_started = has_started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception:
            error = internal_error()
            if has_started:  # the client sees the response break off
                raise
            await error.response()(scope, receive, send)
