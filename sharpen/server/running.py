"""The server as a process: its socket, its signals, and an end that answers what it accepted."""

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from sharpen.errors import InputError

from .answering import Service
from .app import build
from .gate import Gate
from .optional import needed

logger = logging.getLogger(__name__)

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
