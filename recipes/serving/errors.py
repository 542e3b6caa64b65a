"""Errors in the shape of OpenAI's API, so that its clients raise their own exceptions."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serving.engine import (
    BackendFailed,
    DeadlineExceeded,
    EngineError,
    QueueFull,
    SearchFailed,
    ShuttingDown,
    UnsupportedSetting,
)
from serving.protocol import ID_TAG, PASSAGE_TAG, RetrievalBody

logger = logging.getLogger("cosup.serving")

# of each kind of error: status, and OpenAI's `type` and `code`
_ENGINE_ERRORS: dict[type[EngineError], tuple[int, str, str | None]] = {
    UnsupportedSetting: (400, "invalid_request_error", None),
    QueueFull: (429, "rate_limit_error", "rate_limit_exceeded"),
    ShuttingDown: (503, "server_error", "shutting_down"),
    DeadlineExceeded: (504, "server_error", "timeout"),
    SearchFailed: (502, "server_error", "search_failed"),
    BackendFailed: (502, "server_error", "backend_failed"),
}
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
CLIENT_LEFT = 499  # nobody gets this status, but the metrics show it
SHUTDOWN_RETRY_AFTER = 10  # seconds, until another server has taken over


class ApiError(HTTPException):
    """
    An error for the client.

    Args:
        status (`int`): the HTTP status.
        message (`str`): what is wrong, where, and what was expected.
        param (`str`, *optional*): the field of the body.
        code (`str`, *optional*): a short name of the error for programs.
        type (`str`, *optional*): OpenAI's kind of error; defaults to the status's.
        headers (`dict`, *optional*): of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param
        self.code = code
        self.type = type or _type_of(status)

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        message = self.detail.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no character
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the response."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def _type_of(status: int) -> str:
    if status in _TYPES:
        return _TYPES[status]
    return "server_error" if status >= 500 else "invalid_request_error"


def from_engine(error: EngineError) -> ApiError:
    """Return what a client gets for an error of the engine; one that begins with a field of `retrieval` names it."""
    status, type, code = 500, "server_error", None
    for kind, answer in _ENGINE_ERRORS.items():
        if isinstance(error, kind):
            status, type, code = answer
    headers = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, ShuttingDown):
        headers["Retry-After"] = str(SHUTDOWN_RETRY_AFTER)
    if isinstance(error, DeadlineExceeded):
        headers["X-Should-Retry"] = "false"  # OpenAI's client would ask again, and wait as long
    param = None
    if isinstance(error, UnsupportedSetting):
        name = str(error).split(maxsplit=1)[0].rstrip(":")
        if name in RetrievalBody.model_fields:
            param = f"retrieval.{name}"
    return ApiError(status, str(error), param, code, type, headers)


def from_validation(error: RequestValidationError) -> ApiError:
    """Return what a client gets for the first problem of a body."""
    problem = error.errors()[0]
    names = [part for part in problem["loc"] if part not in ("body", PASSAGE_TAG, ID_TAG)]
    if problem["type"] == "json_invalid":
        return ApiError(400, f"The body is no JSON: {problem['ctx']['error']} at character {names[0]}.")
    field = _path(names)
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {field}", field, "unknown_parameter")
    if problem["type"] == "missing":
        return ApiError(400, f"You must provide a {field or 'body'} parameter.", field or None, "missing_parameter")
    value = problem["input"]
    if problem["type"] in ("too_short", "string_too_short"):  # pydantic speaks of items after validation
        expected = "a text" if isinstance(value, str) else "at least one entry"
        return ApiError(400, f"{field} is empty, expected {expected}.", field)
    if problem["type"] in ("too_long", "string_too_long"):
        unit = "characters" if isinstance(value, str) else "entries"
        most = problem["ctx"]["max_length"]
        return ApiError(400, f"{field} has {len(value):,} {unit}, expected at most {most:,}.", field)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):  # pydantic speaks of Python
        message = "Input should be a JSON object"
    if isinstance(value, str | int | float) and str(value).strip():
        message += f", found {str(value)[:80]!r}"
    if not field:
        return ApiError(400, f"The body: {message}.")
    return ApiError(400, f"{field}: {message}.", field)


def _path(names: list[str | int]) -> str:
    """Return where a value stands in a body, such as `messages[0].content`."""
    path = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names)
    return path.removeprefix(".").encode("utf-8", "backslashreplace").decode()


def internal_error() -> ApiError:
    """Return what a client gets for a fault of the server; log the fault."""
    logger.exception("A request failed.")
    return ApiError(500, "The server made an error; its log says more.")


def add_error_handlers(app: FastAPI) -> None:
    """Let the errors that the routes expect reach the client in OpenAI's shape."""

    async def engine_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, EngineError)
        return from_engine(error).response()

    async def validation_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return from_validation(error).response()

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if not isinstance(error, ApiError):
            message = str(error.detail)
            if error.status_code == 404:
                message = f"Unknown request URL: {request.method} {request.url.path}."
            elif error.status_code == 400 and error.__cause__ is not None:
                message = f"The body could not be read as JSON in UTF-8: {error.__cause__}."
            error = ApiError(error.status_code, message, headers=dict(error.headers or {}))
        return error.response()

    async def disconnected(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_LEFT)

    app.add_exception_handler(EngineError, engine_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientDisconnect, disconnected)
