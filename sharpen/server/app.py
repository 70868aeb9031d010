"""The routes as a FastAPI application; FastAPI is imported when one is made."""

import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from .answering import Read, Service, answer, refused, response
from .bodies import encoded
from .completions import read_completions
from .dialect import Desk
from .gate import App, Gate
from .inside import Inside
from .optional import needed
from .refusal import RefusedError, shutting_down
from .reward_hosts import read_evaluation, read_get_reward
from .score import read_score


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
    inside = Inside(service.desk.limits)
    service.metrics.watch_inside(inside)
    paths = [*reads, "/v1/models", "/metrics", "/health"]
    gate = Gate(service.key, service.metrics, paths, inside)
    for path, read in reads.items():
        _post(app, path, partial(answer, service=service, gate=gate, read=read))
    model = {"id": service.desk.name, "object": "model", "owned_by": "sharpen"}
    models = {"object": "list", "data": [model | {"created": int(time.time())}]}
    _get(app, "/v1/models", lambda: encoded(models))
    _get(app, "/metrics", service.metrics.text)
    _get(app, "/health", lambda: encoded({"status": _health(service, gate)}))

    # a path or method that is not there, in the same shape as every refusal
    async def missing(_: Any, error: Any) -> Any:
        refusal = RefusedError(error.status_code, f"{error.detail}.", code="no_such_route")
        return refused(refusal)

    app.add_exception_handler(needed("starlette.exceptions").HTTPException, missing)
    return gate.around(app), gate


def _health(service: Service, gate: Gate) -> str:
    # that it ends by being told to comes first: the scorer does too
    if gate.is_draining:
        raise shutting_down()
    if not service.batcher.is_alive:
        raise RefusedError(503, "the scorer has ended.", code="not_alive")
    return "ok"


def _get(app: Any, path: str, made: Callable[[], tuple[bytes, str]]) -> None:
    async def endpoint() -> Any:
        try:
            return response(*made())
        except RefusedError as refusal:
            return refused(refusal)

    app.add_api_route(path, endpoint, methods=["GET"], response_model=None)


def _post(app: Any, path: str, answered: Callable[[Any], Awaitable[Any]]) -> None:
    async def endpoint(request: Any) -> Any:
        return await answered(request)

    # FastAPI reads from the annotation that it is to hand over the request itself
    endpoint.__annotations__ = {"request": needed("fastapi").Request}
    content = {"application/json": {"schema": {"type": "object"}}}
    extra = {"requestBody": {"required": True, "content": content}}
    app.add_api_route(path, endpoint, methods=["POST"], response_model=None, openapi_extra=extra)
