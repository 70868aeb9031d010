"""Bytes of all requests together: bounded, and given back."""

import pytest

from sharpen.server.app import InFlight
from sharpen.server.errors import HTTPError
from sharpen.server.state import ServerLimits


def test_what_a_request_held_is_given_back():
    inside = InFlight(ServerLimits(max_request_bytes=100))
    first, second = inside.enter(), inside.enter()
    first.receive(60)
    first.receive(30)
    second.receive(10)
    first.send(500)
    assert (inside.n_requests, inside.n_bytes) == (2, 600)
    first.leave()
    assert (inside.n_requests, inside.n_bytes) == (1, 10)
    second.leave()
    assert (inside.n_requests, inside.n_bytes) == (0, 0)


def test_a_body_that_is_too_large_is_refused_and_not_counted():
    inside = InFlight(ServerLimits(max_request_bytes=100))
    held = inside.enter()
    held.receive(90)
    for refused in (held.receive, lambda n: held.check(90 + n)):
        with pytest.raises(HTTPError) as told:
            refused(11)
        assert told.value.status == 413
    assert inside.n_bytes == 90


def test_all_together_are_bounded():
    inside = InFlight(ServerLimits(max_request_bytes=100))
    others = [inside.enter() for _ in range(32)]
    for other in others:
        other.receive(100)
    with pytest.raises(HTTPError) as told:
        inside.enter().receive(1)
    assert told.value.status == 429
    others[0].leave()
    inside.enter().receive(1)
