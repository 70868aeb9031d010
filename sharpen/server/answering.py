"""One request: its body, what it asks, the scores, the answer.

Bodies are read and answers written in one thread beside the event loop, the only one that uses the
tokenizer: what takes long for one request takes nothing from `/health`, from bodies that come or
from the scorer.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sharpen.errors import SharpenError
from sharpen_kernels import TokenStats

from .bodies import decoded, encoded
from .dialect import Asked, Desk
from .gate import HELD, Gate
from .inside import Held
from .jobs import Job
from .metrics import Metrics
from .micro_batcher import MicroBatcher
from .optional import needed
from .refusal import RefusedError, refusal_of, shutting_down

logger = logging.getLogger(__name__)

BODY_SECONDS = 60  # chosen

Read = Callable[[object], Asked]
T = TypeVar("T")


def one_thread() -> ThreadPoolExecutor:
    """Of bodies and answers; one, as tokenizers change when they are used."""
    return ThreadPoolExecutor(1, "sharpen-bodies")


@dataclass(frozen=True)
class Service:
    """What the routes share."""

    desk: Desk
    batcher: MicroBatcher
    metrics: Metrics
    key: str | None = None
    bodies: ThreadPoolExecutor = field(default_factory=one_thread)


# requests and responses are classes of a package that type checks do without
async def answer(request: Any, *, service: Service, gate: Gate, read: Read) -> Any:
    """The response to a request, which may be a refusal."""
    try:
        asked = await _asked(request, service, gate, read)
        results = await _scored(request, service, asked.jobs)
        accept = request.headers.get("accept", "")
        made = await _beside(service, lambda: encoded(asked.answer(results), accept))
        return response(*made)
    except needed("starlette.requests").ClientDisconnect:
        service.metrics.abandoned()
        return refused(RefusedError(499, "the client went away.", code="abandoned"))
    # the error of one request is told to its client alone
    except Exception as error:
        if not isinstance(error, SharpenError):
            logger.exception("a request failed")
        return refused(refusal_of(error))


def response(body: bytes, kind: str, status: int = 200, headers: Any = None) -> Any:
    """A response of Starlette."""
    made = needed("starlette.responses").Response
    return made(body, status_code=status, headers=headers, media_type=kind)


def refused(refusal: RefusedError) -> Any:
    """A refusal as a response of Starlette."""
    return response(*encoded(refusal.body), status=refusal.status, headers=refusal.headers)


async def _asked(request: Any, service: Service, gate: Gate, read: Read) -> Asked:
    body = await _body(request, gate)
    kind = request.headers.get("content-type", "")

    def asked() -> Asked:
        # many may wait for this thread when the end comes
        if service.batcher.is_closing:
            raise shutting_down()
        return read(decoded(body, kind))

    return await _beside(service, asked)


async def _beside(service: Service, act: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(service.bodies, act)


async def _body(request: Any, gate: Gate) -> bytes:
    """The whole body.

    Raises:
        RefusedError: 408 if it does not come, 503 if the server shuts down before it has, and as
            `Held.receive`.
    """
    held: Held = request.scope[HELD]
    said = request.headers.get("content-length", "")
    held.check(int(said) if said.isdecimal() else 0)
    reading = asyncio.ensure_future(_parts(request, held))
    closing = asyncio.ensure_future(gate.closing.wait())
    try:
        either = {reading, closing}
        await asyncio.wait(either, timeout=BODY_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if reading.done():
            return reading.result()
        if closing.done():
            raise shutting_down()
        message = f"the body must come within {BODY_SECONDS} s."
        raise RefusedError(408, message, code="too_slow")
    finally:
        reading.cancel()
        closing.cancel()


async def _parts(request: Any, held: Held) -> bytes:
    parts = []
    async for part in request.stream():
        held.receive(len(part))
        parts.append(part)
    return b"".join(parts)


async def _scored(request: Any, service: Service, jobs: Sequence[Job]) -> Sequence[TokenStats]:
    """The statistics of each job; what nobody waits for any more leaves the queue."""
    ticket = service.batcher.submit(jobs)
    result = asyncio.wrap_future(ticket.future)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise needed("starlette.requests").ClientDisconnect
        return result.result()
    finally:
        gone.cancel()
        if not result.done():
            service.batcher.abandon(ticket)


async def _gone(request: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
