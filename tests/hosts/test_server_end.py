"""How the server ends, as a process: everybody inside is told, and the log holds no traceback."""

import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse

import pytest

from helpers.serving import SECONDS, serving
from helpers.tiny import tiny

BODY = {"prompt": [1, 2], "completions": [[3]]}
# requests wait for company longer than anything here
LONG = ("--wait-ms", "1000000")


@pytest.fixture
def model(tmp_path):
    tiny().save_pretrained(tmp_path)
    return tmp_path


def refused(answer):
    status, body, headers = answer
    assert (status, body["error"]["code"]) == (503, "shutting_down")
    assert headers["Retry-After"] == "1"
    assert headers["Content-Type"] == "application/json"


def told(server):
    """The log of a server that ends by itself."""
    log = server.process.communicate(timeout=SECONDS)[1]
    assert server.process.returncode == 0, log
    assert "Traceback" not in log
    return log


def draining(server):
    server.process.send_signal(signal.SIGTERM)
    while server.ask("/health")[0] == 200:
        pass


def test_a_second_signal_refuses_what_waits(model):
    with serving(model, *LONG) as server, ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(server.ask, "/score", BODY) for _ in range(4)]
        while server.metrics()["sharpen_queue_prompts"] < 4:
            pass
        draining(server)
        assert not any(answer.done() for answer in waiting)
        server.process.send_signal(signal.SIGTERM)
        for answer in waiting:
            refused(answer.result())
        assert "4 requests were not answered before a second signal" in told(server)


def test_what_is_not_answered_in_time_is_refused(model):
    with serving(model, *LONG, "--drain-seconds", "0.2") as server, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(server.ask, "/score", BODY) for _ in range(2)]
        while server.metrics()["sharpen_queue_prompts"] < 2:
            pass
        server.process.send_signal(signal.SIGTERM)
        for answer in waiting:
            refused(answer.result())
        assert "2 requests were not answered within 0.2 s" in told(server)


def test_a_body_that_is_not_whole_is_refused_at_the_signal(model):
    content = json.dumps(BODY).encode()
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    with serving(model) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as client:
            client.sendall(head.encode() + content[:9])
            while server.metrics()["sharpen_inside_bytes"] < 9:
                pass
            server.process.send_signal(signal.SIGTERM)
            # its own time is up after a minute, which would say 408
            answer = HTTPResponse(client)
            answer.begin()
            refused((answer.status, json.loads(answer.read()), answer.headers))
            assert answer.headers["Connection"] == "close"
        # nobody waited for it
        assert "were not answered" not in told(server)


def test_a_third_signal_ends_what_two_cannot(model):
    """A client that does not take its answer holds the server for a while, and no longer."""
    stats = ["topk", "topk_id"]
    body = {"prompt": [1], "completions": [[3] * 60] * 400, "token_stats": stats}
    content = json.dumps(body).encode()
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    with serving(model) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(head.encode() + content)
        # what has been sent of it is small beside the 11 MB that it is
        until = time.monotonic() + SECONDS
        while server.metrics()["sharpen_inside_bytes"] < 2**23:
            assert time.monotonic() < until, "a whole answer was taken for sent at once"
        draining(server)
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGTERM)
        log = server.process.communicate(timeout=SECONDS)[1]
    assert server.process.returncode in (-signal.SIGINT, -signal.SIGTERM)
    assert "Traceback" not in log
