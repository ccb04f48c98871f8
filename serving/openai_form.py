"""Errors in the form of OpenAI's API, on the routes that speak it.

    {"error": {"message": "size: ...", "type": "invalid_request_error", "param": "size",
               "code": "invalid_request"}}

Its clients go by the status: 401, 403, 404, 408, 429 and 5xx are as everywhere, and what is wrong
with a field is 400 there. They try 408, 429 and 5xx again, after `Retry-After`.
"""

from __future__ import annotations

from typing import Any, Final

PATHS: Final = ("/v1/images/generations", "/v1/models")
"""Routes that answer in this form."""

_CODES: Final = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


def error_form(
    status: int, code: str, message: str, field: str | None
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Status and body for one of our errors."""
    if status == 422:
        status = 400
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = "model_not_found" if (status, field) == (404, "model") else _CODES.get(status, code)
    return status, {
        "error": {
            "message": message,
            "type": "requests" if status == 429 else kind,
            "param": field,
            "code": code,
        }
    }
