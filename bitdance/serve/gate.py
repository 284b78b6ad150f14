"""What every request passes first: the API key, the origin, and the counters."""

import hmac
import time
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitdance.serve.answers import error_answer
from bitdance.serve.errors import ApiError
from bitdance.serve.metrics import Metrics

GUARDED = ("/v1", "/metrics")  # the page, the documentation and /health hold no secrets


class Gate:
    """An ASGI app around another. `api_key`: what clients must send as `Authorization: Bearer KEY`. `origins`: pages that may
    call; by default those of this server alone, for any page of the web can reach a port of the machine that shows it."""

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None, origins: Collection[str]) -> None:
        self.app, self.metrics, self.origins = app, metrics, origins
        self._key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refused = self._refusal(scope) if scope["path"].startswith(GUARDED) else None
        try:
            await (self.app if refused is None else error_answer(refused))(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - start)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and origin.partition("://")[2] != headers.get("host"):
            return ApiError(403, "pages of another origin may not call this server (--cors ORIGIN allows one)", None, "origin")
        if self._key is not None and not hmac.compare_digest(headers.get("authorization", "").encode(), self._key):
            return ApiError(401, "wrong or missing API key; send Authorization: Bearer KEY", None, "invalid_api_key")
        return None
