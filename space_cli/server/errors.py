"""Errors in OpenAI's format; they reveal nothing about the machine."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pydantic import ValidationError
from starlette.responses import JSONResponse

from space_cli.errors import ContextFull, UsageProblem, first_invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger("space.serve")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """A response that is an error.

    Args:
        status: of HTTP.
        message: for a person.
        code: for a program.
        param: the field it is about.
        headers: to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    @property
    def body(self) -> dict[str, object]:
        """The body that OpenAI's clients read."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return it as a response."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def api_error(error: BaseException) -> ApiError:
    """Return the error as a client sees it; further details go to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        # the parts of a union are named by their types: nothing that a client sent
        found = first_invalid(error)
        message = f"{found.field or 'the body'}: {found.reason}"
        return ApiError(400, message, param=found.field or None, code="invalid_value")
    if isinstance(error, UsageProblem):
        code = "context_length_exceeded" if isinstance(error, ContextFull) else "invalid_value"
        return ApiError(400, str(error), code=code)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ApiError(503, "the machine is out of memory for this request", code="out_of_memory")
    log.error("a request failed: %s", type(error).__name__, exc_info=error)
    return ApiError(500, "the server failed; its log says more", code="internal_error")


def overloaded(status: int, message: str, code: str) -> ApiError:
    """Return an error after which a client may try again."""
    return ApiError(status, message, code=code, headers={"Retry-After": "1"})
