"""One endpoint: what is tried again and how long it waits; what is told at once; the key."""

import json
import logging
import threading

import pytest

from helpers.completions_server import serving
from sharpen.errors import InputError, SharpenError
from sharpen.sampling import endpoint
from sharpen.sampling.endpoint import EndpointClient, EndpointError, Patience, retry_after_s

BODY = {"model": "m", "n": 2, "seed": 5}
KEY = "sk-secret-0123456789"


@pytest.fixture
def waits(monkeypatch):
    """Every wait between tries, not slept."""
    slept = []
    # a turn that comes at once is no wait
    monkeypatch.setattr(endpoint, "sleep", lambda s: slept.append(s) if s else None)
    return slept


def quick(url, **patience):
    return EndpointClient(url, patience=Patience(**{"timeout_s": 5.0, **patience}))


@pytest.mark.parametrize(
    "fault", [500, 502, 503, 429, 408, "cut", "chunk", "html", "drop"], ids=str
)
def test_what_may_pass_is_tried_again(fault, waits):
    with serving() as (url, server):
        server.script = [fault, fault]
        answer = quick(url).post("/completions", BODY)
    assert [len(server.asked), len(answer["choices"])] == [3, 2]
    between = [s for s in waits if s > 0]
    assert len(between) == 2
    # U(0.5, 1) of 1 s, then of 2 s
    assert 0.5 <= between[0] <= 1.0 <= between[1] <= 2.0


def test_waits_double_up_to_the_longest_and_then_it_is_told(waits):
    with serving() as (url, server):
        server.script = [503] * 9
        with pytest.raises(EndpointError) as told:
            quick(url, tries=6, max_wait_s=4.0).post("/completions", BODY)
    assert len(server.asked) == 6
    for wait, longest in zip([s for s in waits if s > 0], [1, 2, 4, 4, 4], strict=True):
        assert longest / 2 <= wait <= longest
    assert "HTTP 503 (as told, scripted); given up after 6 tries" in str(told.value)
    assert isinstance(told.value, (SharpenError, ConnectionError))


def test_jitter_differs_between_clients(waits):
    with serving() as (url, server):
        for _ in range(4):
            server.script = [500]
            quick(url).post("/completions", BODY)
    assert len({s for s in waits if s > 0}) == 4


def test_retry_after_is_a_floor_for_every_thread(waits):
    with serving() as (url, server):
        server.script = [(429, {"Retry-After": "7"})]
        client = quick(url)
        client.post("/completions", BODY)
        assert 7.0 <= waits[0] <= 7.1
        waits.clear()
        # the clock did not move: another request of this client waits for the same moment
        client.post("/completions", BODY)
        assert [6.0 < s <= 7.0 for s in waits if s > 0] == [True]


def test_a_server_that_asks_for_too_long_is_given_up_on(waits):
    with serving() as (url, server):
        server.script = [(429, {"Retry-After": "3600"})]
        with pytest.raises(EndpointError, match="asks to wait 3600 s, longer than 120 s"):
            quick(url).post("/completions", BODY)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "Retry-After": "9"}, 0.25),
        ({"Retry-After": "Thu, 01 Jan 1970 00:01:00 GMT"}, 10.0),
        ({"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "nan"}, None),
        ({}, None),
    ],
)
def test_every_way_to_say_when(headers, seconds):
    assert retry_after_s(headers, now=50.0) == seconds


@pytest.mark.parametrize(
    ("fault", "message", "of_request"),
    [
        (401, "HTTP 401 (as told, scripted); check the key in the environment", False),
        (403, "check what the key may do", False),
        (404, "check the URL (it ends where /completions begins)", False),
        (400, "HTTP 400 (as told, scripted)", True),
        (422, "HTTP 422", True),
        ((302, {"Location": "http://127.0.0.1:9/"}), "give the URL that it redirects to", False),
        (
            (429, {"told": {"error": {"message": "no money", "code": "insufficient_quota"}}}),
            "HTTP 429 (no money, insufficient_quota)",
            False,
        ),
        ("list", "must answer with a JSON object, got list", False),
    ],
    ids=str,
)
def test_what_will_not_pass_is_told_at_once(fault, message, of_request, waits):
    with serving() as (url, server):
        server.script = [fault]
        with pytest.raises(EndpointError) as told:
            quick(url).post("/completions", BODY)
    assert message in str(told.value)
    assert "\n" not in str(told.value)
    assert told.value.of_request == of_request
    assert len(server.asked) == 1
    assert not [s for s in waits if s > 0]


@pytest.mark.parametrize(
    ("fault", "message"),
    [("cut", "the answer was cut short"), ("chunk", "cut short"), ("html", "is not whole JSON")],
)
def test_why_an_answer_is_no_answer_is_told(fault, message):
    with serving() as (url, server):
        server.script = [fault]
        with pytest.raises(EndpointError, match=message):
            quick(url, tries=1).post("/completions", BODY)


def test_no_server_is_told(waits):
    with serving() as (url, _):
        pass
    with pytest.raises(EndpointError, match=r"no connection \(.*refused.*given up after 2 tries"):
        quick(url, tries=2).post("/completions", BODY)


def test_a_trickle_ends_at_the_deadline():
    with serving() as (url, server):
        server.script = ["slow"]
        with pytest.raises(EndpointError, match=r"no answer in 0\.2 s"):
            quick(url, timeout_s=0.2, tries=1).post("/completions", BODY)


def test_requests_begin_no_faster_than_the_rate():
    with serving() as (url, server):
        client = quick(url, per_minute=1200.0)
        threads = [
            threading.Thread(target=client.post, args=("/completions", BODY)) for _ in range(6)
        ]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert len(server.times) == 6
    # five gaps of 50 ms
    assert max(server.times) - min(server.times) >= 0.2


def test_the_key_is_in_one_header_and_nowhere_else(waits, caplog):
    told = {"error": {"message": f"Incorrect key {KEY} provided"}}
    with serving() as (url, server), caplog.at_level(logging.DEBUG):
        server.script = [(503, {"told": dict(told)}), (401, {"told": dict(told)})]
        client = EndpointClient(url, key=KEY)
        with pytest.raises(EndpointError) as error:
            client.post("/completions", BODY)
    assert [h["Authorization"] for h in server.headers] == [f"Bearer {KEY}"] * 2
    assert "Incorrect key *** provided" in str(error.value)
    assert KEY not in str(error.value) + caplog.text + repr(client) + json.dumps(server.asked)


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        ("ftp://host/v1", None, "must be an http:// or https:// URL"),
        ("host/v1", None, "must be an http:// or https:// URL"),
        ("http://[::1/v1", None, "must be an http:// or https:// URL"),
        ("http://host:port/v1", None, "must be an http:// or https:// URL"),
        ("https://user:pass@host/v1", None, "without user, password, query or fragment"),
        ("https://host/v1?api-key=abc", None, "without user, password, query or fragment"),
        ("http://example.com/v1", KEY, "must be https:// when a key is sent"),
        ("https://example.com/v1", "a\nb", "printable ASCII"),
        ("https://example.com/v1", "", "printable ASCII"),
    ],
)
def test_bad_urls_and_keys_are_refused(url, key, message):
    with pytest.raises(InputError) as told:
        EndpointClient(url, key=key)
    assert message in str(told.value)
    for secret in ("pass", "abc", KEY):
        assert secret not in str(told.value).replace("password", "")


@pytest.mark.parametrize("name", ["timeout_s", "tries", "max_wait_s", "per_minute"])
def test_impatience_is_refused(name):
    with pytest.raises(InputError, match="must be positive, got 0"):
        Patience(**{name: 0 if name == "tries" else 0.0})
