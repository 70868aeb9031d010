"""The routes as a FastAPI application; FastAPI is imported when one is made."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sharpen.errors import SharpenError
from sharpen_kernels import TokenStats

from .bodies import decoded, encoded
from .completions import read_completions
from .dialect import Asked, Desk
from .gate import App, Gate
from .jobs import Job
from .metrics import Metrics
from .micro_batcher import MicroBatcher
from .optional import needed
from .refusal import RefusedError, refusal_of
from .reward_hosts import read_evaluation, read_get_reward
from .score import read_score

logger = logging.getLogger(__name__)

BODY_SECONDS = 60  # chosen

Read = Callable[[object], Asked]


@dataclass(frozen=True)
class Service:
    """What the routes share."""

    desk: Desk
    batcher: MicroBatcher
    metrics: Metrics
    key: str | None = None


def routes_of(desk: Desk) -> dict[str, Read]:
    """The dialect of each route that scores."""
    return {
        "/score": partial(read_score, desk=desk),
        "/v1/completions": lambda body: read_completions(body, desk, int(time.time())),
        "/get_reward": partial(read_get_reward, desk=desk),
        "/v1/score/evaluation": partial(read_evaluation, desk=desk),
    }


def build(service: Service) -> tuple[App, Gate]:
    """The application, and the door that stands before it.

    Raises:
        InputError: If FastAPI is not installed.
    """
    fastapi = needed("fastapi")
    app = fastapi.FastAPI(title="sharpen", docs_url=None, redoc_url=None)
    reads = routes_of(service.desk)
    for path, read in reads.items():
        _post(app, path, partial(_answer, service=service, read=read))
    model = {"id": service.desk.name, "object": "model", "owned_by": "sharpen"}
    models = {"object": "list", "data": [model | {"created": int(time.time())}]}
    _get(app, "/v1/models", lambda: encoded(models))
    _get(app, "/metrics", service.metrics.text)
    gate = Gate(service.key, service.metrics, [*reads, "/v1/models", "/metrics", "/health"])
    _get(app, "/health", lambda: encoded({"status": _health(service, gate)}))

    # a path or method that is not there, in the same shape as every refusal
    async def missing(_: Any, error: Any) -> Any:
        refusal = RefusedError(error.status_code, f"{error.detail}.", code="no_such_route")
        return _refused(refusal)

    app.add_exception_handler(needed("starlette.exceptions").HTTPException, missing)
    return gate.around(app), gate


def _health(service: Service, gate: Gate) -> str:
    if not service.batcher.is_alive:
        raise RefusedError(503, "the scorer has ended.", code="not_alive")
    if gate.is_draining:
        raise RefusedError(503, "the server is shutting down.", code="shutting_down")
    return "ok"


# requests and responses are classes of a package that type checks do without
async def _answer(request: Any, *, service: Service, read: Read) -> Any:
    try:
        body = await asyncio.wait_for(_read_body(request, service), BODY_SECONDS)
        asked = read(decoded(body, request.headers.get("content-type", "")))
        results = await _scored(request, service, asked.jobs)
        return _response(*encoded(asked.answer(results), request.headers.get("accept", "")))
    except asyncio.TimeoutError:
        message = f"the body must come within {BODY_SECONDS} s."
        return _refused(RefusedError(408, message, code="too_slow"))
    except needed("starlette.requests").ClientDisconnect:
        service.metrics.abandoned()
        return _refused(RefusedError(499, "the client went away.", code="abandoned"))
    # the error of one request is told to its client alone
    except Exception as error:
        if not isinstance(error, SharpenError):
            logger.exception("a request failed")
        return _refused(refusal_of(error))


async def _read_body(request: Any, service: Service) -> bytes:
    limits = service.desk.limits
    said = request.headers.get("content-length", "")
    limits.check_bytes(int(said) if said.isdecimal() else 0)
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        limits.check_bytes(size)
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


def _response(body: bytes, kind: str, status: int = 200, headers: Any = None) -> Any:
    response = needed("starlette.responses").Response
    return response(body, status_code=status, headers=headers, media_type=kind)


def _refused(refusal: RefusedError) -> Any:
    return _response(*encoded(refusal.body), status=refusal.status, headers=refusal.headers)


def _get(app: Any, path: str, made: Callable[[], tuple[bytes, str]]) -> None:
    async def endpoint() -> Any:
        try:
            return _response(*made())
        except RefusedError as refusal:
            return _refused(refusal)

    app.add_api_route(path, endpoint, methods=["GET"], response_model=None)


def _post(app: Any, path: str, answer: Callable[[Any], Awaitable[Any]]) -> None:
    async def endpoint(request: Any) -> Any:
        return await answer(request)

    # FastAPI reads from the annotation that it is to hand over the request itself
    endpoint.__annotations__ = {"request": needed("fastapi").Request}
    content = {"application/json": {"schema": {"type": "object"}}}
    extra = {"requestBody": {"required": True, "content": content}}
    app.add_api_route(path, endpoint, methods=["POST"], response_model=None, openapi_extra=extra)
