"""What a client is told when something is wrong: OpenAI's error object, with the headers that its clients obey."""

import re
from typing import Any

_NAMED = re.compile(r"(?:request: )?([a-z_]{1,40}) = ")


class ApiError(Exception):
    """An answer other than 200. `retry`: whether the same request may succeed later, None where that is left to the client, which
    tries 408, 409, 429 and 5xx again. `after`: seconds until then."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry: bool | None = None,
        after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry, self.after = status, message, param, code, retry, after

    @property
    def type(self) -> str:
        """The family of the error, by OpenAI's names."""
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Whether and when to try again."""
        found = {} if self.retry is None else {"x-should-retry": str(self.retry).lower()}
        if self.after is not None:
            found["retry-after"] = str(self.after)
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found


def bad_request(error: Exception | str, param: str | None = None, code: str | None = None) -> ApiError:
    """400 in the words of the library, which name the value and what is allowed."""
    message = str(error)
    named = _NAMED.match(message)
    return ApiError(400, message.removeprefix("request: "), param or (named[1] if named else None), code)


def queue_full(waiting: int, after: int) -> ApiError:
    """429: the queue is full."""
    return ApiError(429, f"{waiting} requests wait already; try again in about {after} s", None, "queue_full", True, after)


def stopping() -> ApiError:
    """503: the server is being stopped, and what waits is not begun."""
    return ApiError(503, "the server is stopping; try again when it is back", None, "stopping", True, 5)


def timed_out(seconds: float) -> ApiError:
    """408: no picture within the time limit. The same request would take as long again, so clients are told not to repeat it."""
    return ApiError(408, f"not finished within {seconds:g} s, the time limit of this server", None, "time_limit", False)


def cancelled() -> ApiError:
    """409: someone ended the job (DELETE /v1/jobs/ID)."""
    return ApiError(409, "the job was cancelled", None, "cancelled", False)


def failed() -> ApiError:
    """500: the server's own log says why, a stranger is not told."""
    return ApiError(500, "the picture could not be made; the server's log says why", None, "failed", False)
