"""Clients of a server that cost little themselves: bodies made before, sockets kept open."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def serving(model: Path, *flags: str, threads: int) -> Iterator[int]:
    """The port of `sharpen serve` of a model in a process of its own."""
    command = [sys.executable, "-m", "sharpen", "serve", "--model", str(model), "--port", "0"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [*command, *flags], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server did not start: {' '.join(command)}")
        yield int(line.rpartition(":")[2])
    finally:
        process.terminate()
        process.communicate()


def request(path: str, body: dict[str, Any]) -> bytes:
    """A request as it goes over the wire."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def answers(port: int, requests: Sequence[bytes], n_clients: int) -> list[Any]:
    """Of all requests, in order; each client sends its next as soon as one is answered.

    Raises:
        RuntimeError: If one is refused.
    """
    return [json.loads(body) for body in asyncio.run(_all(port, requests, n_clients))]


async def _all(port: int, requests: Sequence[bytes], n_clients: int) -> list[bytes]:
    found: list[bytes] = [b""] * len(requests)
    left = iter(range(len(requests)))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        for i in left:
            writer.write(requests[i])
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            found[i] = await reader.readexactly(length)
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"{head.decode()}{found[i].decode()}")
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(client() for _ in range(n_clients)))
    return found
