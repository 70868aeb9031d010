"""The door of the server, before any route: key, shutdown, body, counting.

An ASGI application around another one; `bodies` and routes never see a request that is refused
here.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping
from typing import Any

from .access import check_key
from .bodies import encoded
from .inside import Held, Inside
from .metrics import Metrics
from .refusal import RefusedError, shutting_down

logger = logging.getLogger(__name__)

# as the ASGI specification types them
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# what a load balancer asks, without a key and also while the server shuts down
OPEN = ("/health",)
# of an answer that are sent at a time; chosen
SEND_BYTES = 2**18
# where a request finds what it holds
HELD = "sharpen.held"


class Gate:
    """Lets requests in.

    Attributes:
        is_draining: True refuses new requests with 503.
        is_dropping: Whether what was let in is to be refused as well.
        closing: Set a moment after `is_draining`: bodies that are not whole by then never will be.
        inside: Requests that were let in and are not answered yet.
    """

    def __init__(self, key: str | None, metrics: Metrics, routes: Collection[str], inside: Inside):
        self.is_draining = False
        self.is_dropping = False
        self.closing = asyncio.Event()
        self.inside = inside
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
            held: Held | None = None

            async def counted(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                if held is not None:
                    held.send(len(message.get("body", b"")))
                for part in _parts(message):
                    await send(part)

            try:
                self._check(scope)
                held = scope[HELD] = self.inside.enter()
                await app(scope, receive, counted)
            except RefusedError as refusal:
                await refuse(refusal, counted)
            except asyncio.CancelledError:
                # the server ends, and has waited for this one long enough
                logger.warning("a request to %s is cut off at the end", route)
                if not status:
                    await refuse(shutting_down(), counted)
            finally:
                if held is not None:
                    held.leave()
                self._metrics.request(route, status, time.monotonic() - begun)

        return gated

    def _check(self, scope: Message) -> None:
        if scope["path"] in OPEN:
            return
        headers = dict(scope["headers"])
        check_key(self._key, headers.get(b"authorization", b""))
        if self.is_draining:
            raise shutting_down()


def _parts(message: Message) -> Iterator[Message]:
    """A message of an answer as several, so that the client's pace is felt between them.

    uvicorn waits before it sends, not after: a whole answer would be taken for sent at once.
    """
    body = message.get("body", b"")
    ends = range(SEND_BYTES, len(body), SEND_BYTES)
    for end in ends:
        yield {**message, "body": body[end - SEND_BYTES : end], "more_body": True}
    yield {**message, "body": body[ends[-1] :]} if ends else message


async def refuse(refusal: RefusedError, send: Send) -> None:
    """Answer with a refusal; the connection ends, as its body may not have been read."""
    body, kind = encoded(refusal.body)
    headers = {"content-type": kind, "content-length": str(len(body)), "connection": "close"}
    headers |= {name.lower(): value for name, value in refusal.headers.items()}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
