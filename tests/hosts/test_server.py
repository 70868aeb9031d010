"""The server over loopback: what it answers, what it refuses, and how it ends."""

import json
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
import torch

from helpers.server_desk import PROMPT, RIGHT, WRONG
from helpers.serving import serving
from helpers.shipped import broken_model
from helpers.tiny import CONTEXT, V, tiny
from sharpen.scoring import Scorer

GROUP = {"prompt": PROMPT, "completions": [WRONG, RIGHT]}


@pytest.fixture(scope="module")
def shipped():
    with serving("game24") as server:
        yield server


@pytest.fixture(scope="module")
def offline():
    return Scorer("game24", device="cpu")


def test_scores_are_the_bits_of_the_scorer(shipped, offline):
    body = GROUP | {"rewards": ["logprob", "self_certainty"], "token_stats": ["logprob", "topk_id"]}
    found = shipped.post("/score", body)
    want = offline.score_text(
        [PROMPT], [[WRONG, RIGHT]], stats=("logprob", "self_certainty", "topk_id")
    )
    for name in ("logprob", "self_certainty"):
        assert torch.equal(torch.tensor(found["rewards"][name]), want.reward(name))
    assert torch.equal(torch.tensor(found["token_stats"]["logprob"]), want.tokens.logprob)
    assert found["token_stats"]["topk_id"] == want.tokens.topk_id.tolist()
    assert found["offsets"] == want.offsets.tolist()


def test_arrays_come_in_binary_where_asked(shipped, offline):
    want = offline.score_text([PROMPT], [[WRONG, RIGHT]]).tokens.logprob.numpy()
    body = GROUP | {"token_stats": ["logprob"]}
    _, packed, headers = shipped.ask("/score", body, Accept="application/msgpack")
    assert headers.get_content_type() == "application/msgpack"
    found = msgpack.unpackb(packed)
    array = found["token_stats"]["logprob"]
    assert np.array_equal(np.frombuffer(array["data"], array["dtype"]), want)
    assert found["errors"] == [None, None]
    # and goes in binary as well
    packed = msgpack.packb(body)
    _, again, _ = shipped.ask("/score", raw=packed, Content_Type="application/msgpack")
    assert np.array_equal(np.float32(again["token_stats"]["logprob"]), want)


def test_a_model_says_its_name_and_that_it_lives(shipped):
    assert shipped.ask("/health")[:2] == (200, {"status": "ok"})
    (model,) = shipped.ask("/v1/models")[1]["data"]
    assert model["id"] == "game24"
    assert "/score" in shipped.ask("/openapi.json")[1]["paths"]


@pytest.mark.parametrize(
    ("path", "asked", "status", "told"),
    [
        ("/score", {"raw": b"{"}, 400, "must be JSON"),
        ("/score", {"raw": b'{"prompt": "\xff"}'}, 400, "must be JSON in UTF-8"),
        ("/score", {"raw": b"{}", "Content_Type": "text/plain"}, 415, "`Content-Type` must be"),
        ("/score", {"raw": b"\xc1", "Content_Type": "application/msgpack"}, 400, "must be msgpack"),
        ("/score", {"body": GROUP | {"completions": [[214]]}}, 422, "completions[0]: token ids"),
        ("/score", {"body": {"prompt": "\ud800", "completions": []}}, 422, "surrogate"),
        ("/v1/completions", {"body": {"prompt": "x"}}, 422, "`max_tokens` must be 0 or 1"),
        ("/v1/completions", {"body": {"prompt": "x", "model": "y"}}, 404, "`model` must be"),
        ("/get_reward", {"body": {"query": ["x"]}}, 422, "`prompts` must be a list of texts"),
        ("/v1/score/evaluation", {"body": {}}, 422, "`messages` must be a list of texts"),
        ("/nothing", {}, 404, "Not Found"),
        ("/score", {}, 405, "Method Not Allowed"),
    ],
)
def test_refusals_have_the_shape_that_openai_clients_read(shipped, path, asked, status, told):
    got, body, _ = shipped.ask(path, **asked)
    assert got == status
    assert told in body["error"]["message"]
    assert body["error"].keys() == {"message", "type", "param", "code"}


def test_64_clients_and_a_poisoned_one(tmp_path):
    """Completions of a few prompts, one a request; NaN in one that asks for the number 13."""
    offline = Scorer(broken_model(tmp_path), device="cpu")
    poisoned = {"prompt": PROMPT, "completions": ["8 + 13 = 21"]}
    bad_ids = {"prompt": [1, 2], "completions": [[1, 999_999]]}
    prompts = [f"Numbers: {i} 4 6 8 Target: 24\n" for i in (1, 2, 3, 4)]
    good = [
        {"prompt": prompts[i % 4], "completions": [f"8 - {i // 8} = {8 - i // 8} left: 6"]}
        for i in range(64)
    ]
    alone = [
        offline.score_text([b["prompt"]], [b["completions"]]).reward("logprob").item() for b in good
    ]
    with serving(tmp_path, "--wait-ms", "50") as server:
        asked = [*good[:32], poisoned, bad_ids, *good[32:]]
        with ThreadPoolExecutor(len(asked)) as pool:
            found = list(pool.map(lambda body: server.ask("/score", body)[:2], asked))
        told = found.pop(33)
        poison = found.pop(32)
        seen = server.metrics()
    assert told[0] == 422
    assert (
        "completions[0]: token ids must be in [0, 214), got 999999" in told[1]["error"]["message"]
    )
    assert poison[0] == 200
    assert poison[1]["rewards"]["logprob"] == [None]
    assert "log-prob of token 2 is nan: NaN in the weights" in poison[1]["errors"][0]
    assert [status for status, _ in found] == [200] * 64
    assert [body["errors"] for _, body in found] == [[None]] * 64
    got = [body["rewards"]["logprob"][0] for _, body in found]
    # the model's own fp32 noise: its products choose their order by the size of a batch
    assert got == pytest.approx(alone, abs=2e-5)
    assert seen["sharpen_batch_jobs_sum"] == 65
    assert seen["sharpen_batch_jobs_count"] < 40
    # the prompt of each batch was read once for all of its requests
    assert seen["sharpen_batch_prompts_sum"] < 50
    assert seen['sharpen_requests_total{route="/score",status="200"}'] == 65
    assert seen['sharpen_requests_total{route="/score",status="422"}'] == 1


def test_limits_and_a_full_queue_are_told(tmp_path):
    tiny().save_pretrained(tmp_path)
    flags = ("--max-request-bytes", "600", "--max-n", "3", "--max-request-tokens", "40")
    with serving(tmp_path, *flags, "--max-queue", "2", "--wait-ms", "300") as server:
        body = {"prompt": [1, 2], "completions": [[3]]}
        status, found, _ = server.ask("/score", body | {"completions": [[3]] * 4})
        assert (status, found["error"]["code"]) == (422, "too_many")
        status, found, _ = server.ask("/score", body | {"completions": [[3] * 20] * 3})
        assert (status, found["error"]["code"]) == (413, "too_many_tokens")
        status, found, _ = server.ask("/score", raw=b" " * 601)
        assert (status, found["error"]["code"]) == (413, "request_too_large")
        # without saying how much will come
        status, found, _ = server.ask("/score", raw=iter([b" " * 400] * 2))
        assert (status, found["error"]["code"]) == (413, "request_too_large")
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda _: server.ask("/score", body), range(12)))
        refused = [answer for answer in found if answer[0] != 200]
        assert 0 < len(refused) < 12
        for status, said, headers in refused:
            assert (status, said["error"]["code"]) == (429, "queue_full")
            assert 1 <= int(headers["Retry-After"]) <= 60
        values = [answer[1]["rewards"]["logprob"][0] for answer in found if answer[0] == 200]
        want = Scorer(tiny()).score([[1, 2]], [[[3]]]).reward("logprob").item()
        assert values == pytest.approx([want] * len(values), abs=1e-5)
        assert server.ask("/score", body | {"prompt": [V]})[0] == 422
        assert server.ask("/score", body | {"prompt": [1] * (CONTEXT + 1)})[0] == 422


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_answers_what_was_accepted_and_refuses_the_rest(tmp_path, how):
    tiny().save_pretrained(tmp_path)
    # requests wait long for company, so that they are in the queue when the signal comes
    with serving(tmp_path, "--wait-ms", "1500") as server:
        body = {"prompt": [1, 2], "completions": [[3]]}
        with ThreadPoolExecutor(8) as pool:
            waiting = [pool.submit(server.ask, "/score", body) for _ in range(8)]
            while server.metrics()["sharpen_queue_prompts"] < 8:
                pass
            server.process.send_signal(how)
            late = server.ask("/health")
            while late[0] == 200:
                late = server.ask("/health")
            refused = server.ask("/score", body)
            assert [w.result()[0] for w in waiting] == [200] * 8
        assert late[:2] == (503, late[1])
        assert refused[0] == 503
        assert refused[1]["error"]["code"] == "shutting_down"
        assert refused[2]["Retry-After"] == "1"
        told = server.process.communicate(timeout=60)[1]
    assert server.process.returncode == 0, told
    assert "8 requests to answer" in told


def test_clients_that_go_away_cost_no_forward(tmp_path):
    tiny().save_pretrained(tmp_path)
    content = json.dumps({"prompt": [1, 2], "completions": [[3]]}).encode()
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    with serving(tmp_path, "--wait-ms", "60000") as server:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(head.encode() + content)
                while not server.metrics()["sharpen_queue_prompts"]:
                    pass
            while server.metrics()["sharpen_queue_prompts"]:
                pass
        while (seen := server.metrics())["sharpen_abandoned_total"] < 3:
            pass
    assert seen["sharpen_batch_jobs_count"] == 0


def test_a_key_is_asked_for_everywhere_but_for_health(tmp_path):
    tiny().save_pretrained(tmp_path)
    with serving(tmp_path, "--host", "0.0.0.0", SHARPEN_API_KEY="secret") as server:
        assert server.ask("/health")[0] == 200
        for path in ("/metrics", "/v1/models", "/openapi.json", "/nothing"):
            assert server.ask(path)[0] == 401
        body = {"prompt": [1, 2], "completions": [[3]]}
        status, found, headers = server.ask("/score", body, Authorization="Bearer secre")
        assert (status, found["error"]["code"]) == (401, "invalid_api_key")
        assert headers["WWW-Authenticate"] == "Bearer"
        assert server.ask("/score", body, Authorization="Bearer secret")[0] == 200
        assert "secret" not in server.end()[1]
