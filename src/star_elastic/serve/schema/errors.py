"""Errors in the shape that OpenAI's clients read."""

from typing import Any


class BadRequest(ValueError):
    """The request cannot be answered as it stands.

    `param` is the path of the field ("messages[0].content"), None if it is the body as a whole;
    `status` the HTTP status.
    """

    def __init__(
        self, message: str, param: str | None = None, code: str = "invalid_value", status: int = 400
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    def body(self) -> dict[str, Any]:
        """What the client is sent."""
        return error_body(self.message, "invalid_request_error", self.param, self.code)


class FieldError(ValueError):
    """Two fields that cannot stand together, reported at the one to change."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """`{"error": {...}}`; `kind` is OpenAI's `type`, e.g. "rate_limit_error"."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def shown(value: object) -> str:
    """A value as an error quotes it: short, whatever was sent, and in one line."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'an array'} of {len(value)}"
    if isinstance(value, str):
        return repr(value[:80])
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)[:80]
