"""What takes long for one request takes nothing from the others: the application without HTTP."""

import asyncio
import contextlib
import json
import threading
from dataclasses import replace

import pytest

from helpers.server_desk import desk
from sharpen.scoring.scores import Scores
from sharpen.server.app import Service, build
from sharpen.server.batcher import MicroBatcher
from sharpen.server.metrics import Metrics
from sharpen.server.state import N_INSIDE
from sharpen.server.text import Texts
from sharpen_kernels import TokenStats

SECONDS = 20.0  # nothing waits for it unless it is broken


class Held:
    """A tokenizer, and a stage of answers, that wait until they are let go."""

    def __init__(self):
        self.begun, self.let_go = threading.Event(), threading.Event()
        self.threads = set()

    def wait(self):
        self.threads.add(threading.current_thread().name)
        self.begun.set()
        assert self.let_go.wait(SECONDS), "nobody was answered meanwhile"

    def encode(self, text, add_special_tokens=True):
        self.wait()
        return [1] * len(text)

    def decode(self, ids, **options):
        self.wait()
        return "x" * len(ids)


def score(prompts, completions, *, stats):
    import torch

    lengths = [[len(ids) for ids in group] for group in completions]
    total = sum(map(sum, lengths))
    table = torch.full((total, 20), -1.0)
    found = TokenStats(torch.full((total,), -1.0), topk=table, topk_id=table.long().abs())
    return Scores.of(found, lengths)


async def asked(app, path, body=None, parts=()):
    """Status and body; `parts` are more of the body, as they come."""
    content = b"" if body is None else json.dumps(body).encode()
    coming = [content, *parts]
    sent = []

    async def receive():
        if not coming:
            await asyncio.Event().wait()
        part = coming.pop(0)
        part = await part if asyncio.isfuture(part) else part
        return {"type": "http.request", "body": part, "more_body": bool(coming)}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET" if body is None else "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "http_version": "1.1",
        "headers": [(b"content-type", b"application/json")],
        "scheme": "http",
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "asgi": {"version": "3.0"},
    }
    await app(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in sent[1:]))


@contextlib.contextmanager
def application(texts, **limits):
    metrics = Metrics()
    with MicroBatcher(score, wait_seconds=0.0) as batcher:
        service = Service(replace(desk(**limits), texts=texts), batcher, metrics)
        admission = build(service)
        yield admission, admission, service
        service.bodies.shutdown()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/score", {"prompt": "abc", "completions": ["d"]}),
        # the tokenizer names the tokens of its answer
        ("/v1/completions", {"prompt": [[1, 2]], "echo": True, "max_tokens": 0, "logprobs": 1}),
    ],
    ids=["a body that is read", "an answer that is written"],
)
def test_health_answers_while_a_large_request_is_worked_on(path, body):
    tokenizer = Held()

    async def run(app):
        large = asyncio.ensure_future(asked(app, path, body))
        while not tokenizer.begun.is_set():
            await asyncio.sleep(0)
        health = await asked(app, "/health")
        # ids alone need no tokenizer, but wait for their turn in the one thread
        small = asyncio.ensure_future(asked(app, "/score", {"prompt": [1], "completions": [[2]]}))
        again = await asked(app, "/health")
        assert not large.done()
        assert not small.done()
        tokenizer.let_go.set()
        return health, again, await large, await small

    with application(Texts(tokenizer)) as (app, *_):
        found = asyncio.run(run(app))
    assert [status for status, _ in found] == [200] * 4
    assert found[3][1]["rewards"]["logprob"] == [-1.0]
    assert tokenizer.threads == {"sharpen-bodies_0"}


def test_bodies_inside_are_bounded_together():
    """Of bodies that are on their way and of those that are worked on."""
    size = 100

    async def run(app, gate):
        rest = [asyncio.get_running_loop().create_future() for _ in range(N_INSIDE)]
        body = {"prompt": [1], "completions": [[2]]}
        padded = [
            asyncio.ensure_future(asked(app, "/score", body, [b" " * 50, end])) for end in rest
        ]
        while gate.in_flight.n_bytes < N_INSIDE * 80:
            await asyncio.sleep(0)
        assert gate.in_flight.n_requests == N_INSIDE
        held = gate.in_flight.n_bytes
        # all of them together may have so many bytes, but no more
        fits = N_INSIDE * size - held
        status, said = await asked(app, "/score", "x" * size)
        assert (status, said["error"]["code"]) == (413, "request_too_large")
        late = []
        while fits > 0:
            n = min(fits, size - 3)
            end = asyncio.get_running_loop().create_future()
            late.append((end, asyncio.ensure_future(asked(app, "/score", "y" * (n - 2), [end]))))
            await asyncio.sleep(0)
            fits -= n
        while gate.in_flight.n_bytes < N_INSIDE * size:
            await asyncio.sleep(0)
        status, said = await asked(app, "/score", body)
        assert (status, said["error"]["code"]) == (429, "too_many_bytes")
        for end in [*rest, *(end for end, _ in late)]:
            end.set_result(b"")
        answers = await asyncio.gather(*padded)
        await asyncio.gather(*(task for _, task in late))
        return answers, await asked(app, "/score", body)

    with application(Texts(None), max_request_bytes=size) as (app, gate, _):
        answers, after = asyncio.run(run(app, gate))
        assert [status for status, _ in answers] == [200] * N_INSIDE
        assert after[0] == 200
        assert (gate.in_flight.n_requests, gate.in_flight.n_bytes) == (0, 0)


def test_a_body_that_waits_for_the_thread_is_refused_once_the_queue_is_dropped():
    tokenizer = Held()

    async def run(app, service):
        body = {"prompt": "abc", "completions": ["d"]}
        first = asyncio.ensure_future(asked(app, "/score", body))
        while not tokenizer.begun.is_set():
            await asyncio.sleep(0)
        waits = asyncio.ensure_future(asked(app, "/score", {"prompt": "\ud800", "completions": 3}))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(service.batcher.close, drop=True)
        tokenizer.let_go.set()
        return await first, await waits

    with application(Texts(tokenizer)) as (app, _, service):
        found = asyncio.run(run(app, service))
    assert [status for status, _ in found] == [503, 503]
    assert {body["error"]["code"] for _, body in found} == {"shutting_down"}
