"""Who may ask: anyone on this machine, or those who hold the key.

The door of the server, before any route: key, shutdown, body, counting.

An ASGI application around another one; `bodies` and routes never see a request that is refused
here.

One request: its body, what it asks, the scores, the answer.

Bodies are read and answers written in one thread beside the event loop, the only one that uses the
tokenizer: what takes long for one request takes nothing from `/health`, from bodies that come or
from the scorer.

The server as a process: its socket, its signals, and an end that answers what it accepted.

The routes as a FastAPI application; FastAPI is imported when one is made.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import os
import signal
import socket
import time
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from sharpen.errors import InputError, SharpenError
from sharpen_kernels import TokenStats

from .batcher import Job, MicroBatcher
from .completions import read_completions
from .dialect import Asked, Desk
from .metrics import Held, Inside, Metrics
from .rewards import read_evaluation, read_get_reward, read_score
from .schemas import RefusedError, decoded, encoded, needed, refusal_of, shutting_down

KEY_VARIABLE = "SHARPEN_API_KEY"


def api_key(host: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key of the environment; None asks for none, which this machine alone can reach.

    Raises:
        InputError: If other machines could reach the server and there is no key, or it is one that
            no header can hold.

    Example:
        >>> api_key("127.0.0.1", {})
        >>> api_key("0.0.0.0", {"SHARPEN_API_KEY": "secret"})
        'secret'
    """
    key = environment.get(KEY_VARIABLE)
    if key is not None and (not key or not key.isascii() or key != key.strip()):
        raise InputError(
            f"the environment variable {KEY_VARIABLE} must hold a key in ASCII without spaces "
            "around it; set another one, or unset it."
        )
    if key is None and not is_loopback(host):
        raise InputError(
            f"`host` {host!r} can be reached from other machines, which needs a key; set the "
            f"environment variable {KEY_VARIABLE}, or use 127.0.0.1."
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether nothing but this machine can reach `host`; a name is not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_key(key: str | None, authorization: bytes) -> None:
    """Refuse a request whose header does not hold the key; the time it takes tells nothing of it.

    Raises:
        RefusedError: 401.
    """
    if key is None:
        return
    scheme, _, given = authorization.partition(b" ")
    # both are compared whole, also where the scheme is wrong
    is_same = hmac.compare_digest(given.strip(), key.encode())
    if scheme.lower() != b"bearer" or not is_same:
        raise RefusedError(
            401,
            "`Authorization` must be `Bearer KEY` with the server's key, got "
            f"{'another one' if authorization else 'none'}.",
            code="invalid_api_key",
        )


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
                for part in _message_parts(message):
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


def _message_parts(message: Message) -> Iterator[Message]:
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


BACKLOG = 2048
TICK_SECONDS = 0.02
LAST_SECONDS = 20.0  # for bodies that are read and answers that are sent when the queue is dropped
GRACE_SECONDS = 5  # for clients that do not take their answers even then
KEEP_ALIVE_SECONDS = 75  # longer than clients keep a connection, so that they close it


def bound(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        InputError: If the address cannot be had.
    """
    try:
        kind = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(kind, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"`host` and `port` must be an address that is free on this machine, got {host}:{port} "
            f"({error}); choose another port, or 0 for any."
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL that reaches a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(service: Service, listener: socket.socket, *, drain_seconds: float = 60.0) -> None:
    """Answer requests until SIGTERM or SIGINT, then those accepted, then return.

    New requests, and those whose bodies are not whole, get 503 from the signal on. What is not
    answered `drain_seconds` later, or at a second signal, gets it too, but for what the scorer
    reads at that moment. A third signal ends the process at once.

    Raises:
        InputError: If FastAPI or uvicorn is not installed.
    """
    uvicorn = needed("uvicorn")
    app, gate = build(service)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, lifespan="off",
        timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=GRACE_SECONDS,
    )  # fmt: skip
    server = _server(uvicorn, config, gate)

    async def run() -> None:
        ending = asyncio.ensure_future(_drain(server, service, gate, drain_seconds))
        await server.serve(sockets=[listener])
        ending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ending

    service.batcher.start()
    try:
        asyncio.run(run())
    finally:
        service.bodies.shutdown(wait=False, cancel_futures=True)
        service.batcher.close(drop=True)


# a class of a package that type checks do without
def _server(uvicorn: Any, config: Any, gate: Gate) -> Any:
    class Draining(uvicorn.Server):
        """uvicorn closes its port at a signal; this one answers 503 until all is answered."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            """First signal: let nobody in. Second: drop what waits. Third: end."""
            if gate.is_dropping:
                signal.signal(sig, signal.SIG_DFL)
                signal.raise_signal(sig)
            gate.is_dropping = gate.is_draining
            gate.is_draining = True

    return Draining(config)


async def _drain(server: Any, service: Service, gate: Gate, seconds: float) -> None:
    """End the server when it is told to and everything let in is answered."""
    while not gate.is_draining:
        await asyncio.sleep(TICK_SECONDS)
    gate.closing.set()
    inside = gate.inside
    logger.info("shutting down: %d requests to answer", inside.n_requests)
    await _until(lambda: not inside.n_requests or gate.is_dropping, seconds)
    if inside.n_requests:
        why = "before a second signal" if gate.is_dropping else f"within {seconds:g} s"
        logger.warning("%d requests were not answered %s", inside.n_requests, why)
        # in a thread: the call that runs cannot be interrupted, and others must hear of theirs
        await asyncio.to_thread(service.batcher.close, drop=True)
        await _until(lambda: not inside.n_requests, LAST_SECONDS)
    server.should_exit = True


async def _until(is_so: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not is_so() and time.monotonic() < until:
        await asyncio.sleep(TICK_SECONDS)


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
