"""The door of the server, before any route: key, shutdown, body, counting.

An ASGI application around another one; `bodies` and routes never see a request that is refused
here.
"""

import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from .access import check_key
from .bodies import encoded
from .metrics import Metrics
from .refusal import RefusedError

# as the ASGI specification types them
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# what a load balancer asks, without a key and also while the server shuts down
OPEN = ("/health",)


class Gate:
    """Lets requests in.

    Attributes:
        is_draining: True refuses new requests with 503.
        n_inside: Requests that were let in and are not answered yet.
    """

    def __init__(self, key: str | None, metrics: Metrics, routes: Collection[str]):
        self.is_draining = False
        self.n_inside = 0
        self._key = key
        self._metrics = metrics
        self._routes = frozenset(routes)

    def around(self, app: App) -> App:
        """`app` behind this door."""

        async def gated(scope: Message, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            begun = time.monotonic()
            # a client cannot make labels
            route = scope["path"] if scope["path"] in self._routes else "other"
            status = 0

            async def counted(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                self._check(scope)
            except RefusedError as refusal:
                await refuse(refusal, counted)
            else:
                self.n_inside += 1
                try:
                    await app(scope, receive, counted)
                finally:
                    self.n_inside -= 1
            finally:
                self._metrics.request(route, status, time.monotonic() - begun)

        return gated

    def _check(self, scope: Message) -> None:
        if scope["path"] in OPEN:
            return
        headers = dict(scope["headers"])
        check_key(self._key, headers.get(b"authorization", b""))
        if self.is_draining:
            raise RefusedError(
                503, "the server is shutting down.", code="shutting_down", retry_after=1
            )


async def refuse(refusal: RefusedError, send: Send) -> None:
    """Answer with a refusal; the connection ends, as its body may not have been read."""
    body, kind = encoded(refusal.body)
    headers = {"content-type": kind, "content-length": str(len(body)), "connection": "close"}
    headers |= refusal.headers
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
