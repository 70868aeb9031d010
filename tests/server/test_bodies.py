import json

import numpy as np
import pytest

from sharpen.server.bodies import PIECE, decoded, encoded, json_pieces
from sharpen.server.errors import HTTPError


@pytest.mark.parametrize(
    ("body", "kind", "status", "told"),
    [
        (b"{", "application/json", 400, "must be JSON in UTF-8"),
        (b"\xff{}", "application/json", 400, "must be JSON in UTF-8, got 'utf-8' codec"),
        (b"[" * 100_000, "application/json", 400, "must be JSON in UTF-8"),
        (b"9" * 5000, "application/json", 400, "must be JSON in UTF-8"),
        (b"{}", "text/plain", 415, "`Content-Type` must be application/json"),
        (b"{}", "", 415, "got 'none'"),
    ],
)
def test_bodies_that_are_not_what_they_say(body, kind, status, told):
    with pytest.raises(HTTPError) as refused:
        decoded(body, kind)
    assert refused.value.status == status
    assert told in refused.value.message


def test_json_by_any_of_its_names():
    for kind in ("application/json", "Application/JSON; charset=utf-8", "application/x+json"):
        assert decoded(b'\xef\xbb\xbf{"a": "\xc3\xa4"}', kind) == {"a": "\u00e4"}


def test_json_numbers_are_exact_and_holes_are_null():
    values = np.float32([-18.377656936645508, np.nan, np.inf, 0.1])
    body, kind = encoded({"x": values, "y": {"z": np.int64([[1, 2]])}})
    found = json.loads(body)
    assert kind == "application/json"
    assert found["x"][1:3] == [None, None]
    assert np.array_equal(np.float32([found["x"][0], found["x"][3]]), values[[0, 3]])
    assert found["y"] == {"z": [[1, 2]]}


ODD = {"a": "\ud800\u2028", "b": {}, "c": [], "d": None, "e": True, "": {"": [1, {"x": []}]}}


@pytest.mark.parametrize(
    "answer",
    [
        {},
        ODD,
        {"deep": [{"x": [1, 2], "y": None}, {"x": [], "y": ODD}], "flat": [{"x": 1.5}, None]},
        {"long": list(range(PIECE * 2 + 1)), "even": [None] * PIECE, "one": ["x"] * (PIECE + 1)},
        {"many": [{"t": [{"a": -0.5}] * (PIECE + 3)}] * 3},
    ],
)
def test_json_in_pieces_is_json(answer):
    assert encoded(answer)[0].decode() == json.dumps(answer, separators=(",", ":"))


def test_long_arrays_keep_their_rows():
    table = np.arange(PIECE * 3 * 2, dtype=np.float32).reshape(-1, 2)
    table[PIECE, 1] = np.nan
    body = encoded({"x": table, "none": table[:0], "flat": table[:, 0]})[0]
    found = json.loads(body)
    assert found["x"][PIECE] == [table[PIECE, 0], None]
    assert found["flat"] == table[:, 0].tolist()
    assert found["none"] == []
    # in pieces, so that others run between them
    assert max(map(len, json_pieces({"x": table}))) < len(body) / 4


def test_what_is_made_as_it_is_read_is_a_list_in_every_form():
    msgpack = pytest.importorskip("msgpack")

    def make(i):
        made.append(i)
        return {"i": i, "x": list(range(PIECE + i))}

    def answer():
        return {"choices": map(make, range(3)), "none": iter([])}

    made = []
    want = {"choices": [{"i": i, "x": list(range(PIECE + i))} for i in range(3)], "none": []}
    pieces = json_pieces(answer())
    assert made == []
    assert json.loads("".join(pieces)) == want
    assert made == [0, 1, 2]
    assert json.loads(encoded(answer())[0]) == want
    assert msgpack.unpackb(encoded(answer(), "application/msgpack")[0]) == want
