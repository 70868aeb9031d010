"""The server: who may ask, what happens to a request, and how the process ends.

    AdmissionMiddleware  the key, shutdown, bytes in flight, metrics
    build                routes: body -> jobs -> micro-batcher -> answer
    serve                the socket, signals, the end

Bodies are parsed and answers written by one thread beside the event loop, the only one that uses
the tokenizer: a request that takes long takes nothing from `/health`, from bodies that arrive, or
from the scorer.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sharpen.errors import InputError, SharpenError
from sharpen_kernels import TokenStats

from .batcher import Job, MicroBatcher
from .bodies import decoded, encoded
from .errors import HTTPError, http_error_of, shutting_down
from .metrics import Metrics
from .routes import (
    CompletionsRequest,
    EvaluationRequest,
    GetRewardRequest,
    RequestModel,
    ScoreRequest,
    read_completions,
    read_evaluation,
    read_get_reward,
    read_score,
)
from .state import ParsedRequest, ServerLimits, ServerState

logger = logging.getLogger(__name__)

KEY_VARIABLE = "SHARPEN_API_KEY"
# what a load balancer asks, without a key and also while the server shuts down
OPEN = ("/health",)
BODY_SECONDS = 60  # for a body to arrive; chosen
SEND_BYTES = 2**18  # of an answer that are sent at a time; chosen
BACKLOG = 2048
TICK_SECONDS = 0.02
# for bodies that are parsed and answers that are sent when the queue is dropped
LAST_SECONDS = 20.0
GRACE_SECONDS = 5  # for clients that do not take their answers even then
KEEP_ALIVE_SECONDS = 75  # longer than clients keep a connection, so that they close it

# the usage of a request in its ASGI scope
USAGE = "sharpen.usage"
Read = Callable[[object, ServerState], ParsedRequest]
T = TypeVar("T")

# each route that scores: how its body is read, and what it is
ROUTES: dict[str, tuple[Read, type[RequestModel]]] = {
    "/score": (read_score, ScoreRequest),
    "/v1/completions": (read_completions, CompletionsRequest),
    "/get_reward": (read_get_reward, GetRewardRequest),
    "/v1/score/evaluation": (read_evaluation, EvaluationRequest),
}


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
    """Reject a request whose header does not hold the key (401), in constant time."""
    if key is None:
        return
    scheme, _, given = authorization.partition(b" ")
    # both are compared whole, also where the scheme is wrong
    is_same = hmac.compare_digest(given.strip(), key.encode())
    if scheme.lower() != b"bearer" or not is_same:
        raise HTTPError(
            401,
            "`Authorization` must be `Bearer KEY` with the server's key, got "
            f"{'another one' if authorization else 'none'}.",
            code="invalid_api_key",
        )


@dataclass(frozen=True)
class Service:
    """What the routes share."""

    state: ServerState
    batcher: MicroBatcher[TokenStats]
    metrics: Metrics
    key: str | None = None
    # one thread, as tokenizers change when they are used
    bodies: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "sharpen-bodies")
    )

    async def beside(self, act: Callable[[], T]) -> T:
        """What `act` returns, from the thread of bodies and answers."""
        return await asyncio.get_running_loop().run_in_executor(self.bodies, act)


class InFlight:
    """Requests that are accepted and not answered, and their bytes; used from one event loop.

    Attributes:
        n_requests: How many.
        n_bytes: Of their bodies, and of answers that are being sent.
    """

    def __init__(self, limits: ServerLimits):
        self.n_requests = 0
        self.n_bytes = 0
        self.limits = limits

    def enter(self) -> "RequestUsage":
        """One more request, until its `leave`."""
        self.n_requests += 1
        return RequestUsage(self)


class RequestUsage:
    """The bytes that one request holds."""

    def __init__(self, all_of_them: InFlight):
        self._all = all_of_them
        self._n_bytes = 0

    def check(self, n_more: int) -> None:
        """Reject a body that has `n_more` bytes yet to come: 413 for its own size, 429 for all."""
        self._all.limits.check_bytes(self._n_bytes + n_more)
        self._all.limits.check_bytes_in_flight(self._all.n_bytes + n_more)

    def receive(self, n_bytes: int) -> None:
        """Count a part of the body, or reject it as `check` does."""
        self.check(n_bytes)
        self.send(n_bytes)

    def send(self, n_bytes: int) -> None:
        """Count a part of the answer; what is computed already is never rejected."""
        self._n_bytes += n_bytes
        self._all.n_bytes += n_bytes

    def leave(self) -> None:
        """The request is answered."""
        self._all.n_requests -= 1
        self._all.n_bytes -= self._n_bytes


class AdmissionMiddleware:
    """The first to see a request: it counts it, or rejects it before its body is read.

    Attributes:
        in_flight: Requests that were accepted and are not answered yet.
        is_draining: True rejects new requests with 503.
        is_dropping: Whether what was accepted is to be rejected as well.
        closing: Set a moment after `is_draining`: bodies that are not whole by then never will be.
    """

    def __init__(self, app: ASGIApp, service: Service):
        self.in_flight = InFlight(service.state.limits)
        self.is_draining = False
        self.is_dropping = False
        self.closing = asyncio.Event()
        self._app = app
        self._service = service
        # a client cannot make labels
        self._labels = {*ROUTES, "/v1/models", "/metrics", *OPEN}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.monotonic()
        route = scope["path"] if scope["path"] in self._labels else "other"
        status = 0
        usage: RequestUsage | None = None

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            if usage is not None:
                usage.send(len(message.get("body", b"")))
            for part in _message_parts(message):
                await send(part)

        try:
            if scope["path"] not in OPEN:
                check_key(self._service.key, dict(scope["headers"]).get(b"authorization", b""))
                if self.is_draining:
                    raise shutting_down()
            usage = scope[USAGE] = self.in_flight.enter()
            await self._app(scope, receive, counted)
        except HTTPError as error:
            await _send_error(error, scope, receive, counted)
        except asyncio.CancelledError:
            # the server ends, and has waited for this one long enough
            logger.warning("a request to %s is cut off at the end", route)
            if not status:
                await _send_error(shutting_down(), scope, receive, counted)
        finally:
            if usage is not None:
                usage.leave()
            self._service.metrics.request(route, status, time.monotonic() - begun)


def _message_parts(message: Message) -> Iterator[Message]:
    """A message of an answer as several, so that the client's pace is felt between them.

    uvicorn waits before it sends, not after: a whole answer would be taken for sent at once.
    """
    body = message.get("body", b"")
    ends = range(SEND_BYTES, len(body), SEND_BYTES)
    for end in ends:
        yield {**message, "body": body[end - SEND_BYTES : end], "more_body": True}
    yield {**message, "body": body[ends[-1] :]} if ends else message


async def _send_error(error: HTTPError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error; the connection ends, as the body may not have been read."""
    response = error_response(error)
    response.headers["Connection"] = "close"
    await response(scope, receive, send)


def error_response(error: HTTPError) -> Response:
    """An error as a response."""
    body, kind = encoded(error.body)
    return Response(body, status_code=error.status, headers=error.headers, media_type=kind)


def build(service: Service) -> AdmissionMiddleware:
    """The application, inside the middleware that admits requests."""
    app = FastAPI(title="sharpen", redoc_url=None)
    admission = AdmissionMiddleware(app, service)
    in_flight, watch = admission.in_flight, service.metrics.watch
    watch("queue_prompts", "Prompts that wait for the scorer.", lambda: service.batcher.n_waiting)
    text = "Requests not answered yet, this one too."
    watch("requests_inside", text, lambda: in_flight.n_requests)
    text = "Bytes of their bodies, and of answers sent."
    watch("inside_bytes", text, lambda: in_flight.n_bytes)

    for path in ROUTES:
        _add_post(app, path, service, admission)
    served = {"id": service.state.name, "object": "model", "owned_by": "sharpen"}
    models = {"object": "list", "data": [served | {"created": int(time.time())}]}

    @app.get("/v1/models", response_model=None)
    async def list_models() -> dict[str, Any]:
        return models

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        body, kind = service.metrics.text()
        return Response(body, media_type=kind)

    @app.get("/health", response_model=None)
    async def health() -> Response | dict[str, str]:
        # a server that was told to end says so; its scorer ends too
        if admission.is_draining:
            return error_response(shutting_down())
        if not service.batcher.is_alive:
            return error_response(HTTPError(503, "the scorer has ended.", code="not_alive"))
        return {"status": "ok"}

    # a path or method that is not there, in the same shape as every error
    @app.exception_handler(HTTPException)
    async def missing(_: Request, error: HTTPException) -> Response:
        found = HTTPError(error.status_code, f"{error.detail}.", code="no_such_route")
        return error_response(found)

    return admission


def _add_post(app: FastAPI, path: str, service: Service, admission: AdmissionMiddleware) -> None:
    read, model = ROUTES[path]

    # FastAPI would parse the body in the event loop: it is told the schema alone
    async def endpoint(request: Request) -> Response:
        return await answer(request, service, admission, read)

    content = {"application/json": {"schema": model.model_json_schema()}}
    extra = {"requestBody": {"required": True, "content": content}}
    app.add_api_route(path, endpoint, methods=["POST"], response_model=None, openapi_extra=extra)


async def answer(
    request: Request, service: Service, admission: AdmissionMiddleware, read: Read
) -> Response:
    """The response to a request, which may be an error."""
    try:
        body = await _body(request, admission)
        content_type = request.headers.get("content-type", "")

        def parsed() -> ParsedRequest:
            # many may wait for this thread when the end comes
            if service.batcher.is_closing:
                raise shutting_down()
            return read(decoded(body, content_type), service.state)

        asked = await service.beside(parsed)
        results = await _scored(request, service, asked.jobs)
        accept = request.headers.get("accept", "")
        content, kind = await service.beside(lambda: encoded(asked.answer(results), accept))
        return Response(content, media_type=kind)
    except ClientDisconnect:
        service.metrics.abandoned()
        return error_response(HTTPError(499, "the client went away.", code="abandoned"))
    # the error of one request goes to its client alone
    except Exception as error:
        if not isinstance(error, SharpenError):
            logger.exception("a request failed")
        return error_response(http_error_of(error))


async def _body(request: Request, admission: AdmissionMiddleware) -> bytes:
    """The whole body; 408 if it does not arrive, 503 if the server shuts down before it has."""
    usage: RequestUsage = request.scope[USAGE]
    announced = request.headers.get("content-length", "")
    usage.check(int(announced) if announced.isdecimal() else 0)

    async def parts() -> bytes:
        received = []
        async for part in request.stream():
            usage.receive(len(part))
            received.append(part)
        return b"".join(received)

    reading = asyncio.ensure_future(parts())
    closing = asyncio.ensure_future(admission.closing.wait())
    try:
        either = {reading, closing}
        await asyncio.wait(either, timeout=BODY_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if reading.done():
            return reading.result()
        if closing.done():
            raise shutting_down()
        raise HTTPError(408, f"the body must come within {BODY_SECONDS} s.", code="too_slow")
    finally:
        reading.cancel()
        closing.cancel()


async def _scored(request: Request, service: Service, jobs: Sequence[Job]) -> list[TokenStats]:
    """The statistics of each job; what nobody waits for any more leaves the queue."""
    pending = service.batcher.submit(jobs)
    result = asyncio.wrap_future(pending.future)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        return result.result()
    finally:
        gone.cancel()
        if not result.done():
            service.batcher.abandon(pending)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
    """
    admission = build(service)
    config = uvicorn.Config(
        admission,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = DrainingServer(config, admission)

    async def run() -> None:
        ending = asyncio.ensure_future(_drain(server, service, admission, drain_seconds))
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


class DrainingServer(uvicorn.Server):
    """uvicorn closes its port at a signal; this one answers 503 until all is answered."""

    def __init__(self, config: uvicorn.Config, admission: AdmissionMiddleware):
        super().__init__(config)
        self._admission = admission

    def handle_exit(self, sig: int, frame: Any) -> None:
        """First signal: accept nothing more. Second: drop what waits. Third: end."""
        if self._admission.is_dropping:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._admission.is_dropping = self._admission.is_draining
        self._admission.is_draining = True


async def _drain(
    server: DrainingServer, service: Service, admission: AdmissionMiddleware, seconds: float
) -> None:
    """End the server when it was told to and everything accepted is answered."""
    await _until(lambda: admission.is_draining)
    admission.closing.set()
    in_flight = admission.in_flight
    logger.info("shutting down: %d requests to answer", in_flight.n_requests)
    await _until(lambda: not in_flight.n_requests or admission.is_dropping, seconds)
    if in_flight.n_requests:
        why = "before a second signal" if admission.is_dropping else f"within {seconds:g} s"
        logger.warning("%d requests were not answered %s", in_flight.n_requests, why)
        # in a thread: the call that runs cannot be interrupted, and others must hear of theirs
        await asyncio.to_thread(service.batcher.close, drop=True)
        await _until(lambda: not in_flight.n_requests, LAST_SECONDS)
    server.should_exit = True


async def _until(is_so: Callable[[], bool], seconds: float = float("inf")) -> None:
    until = time.monotonic() + seconds
    while not is_so() and time.monotonic() < until:
        await asyncio.sleep(TICK_SECONDS)
