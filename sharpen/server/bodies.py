"""Bodies of requests and answers: JSON and msgpack.

An answer is a mapping of plain values, numpy arrays, and iterators, which are written as lists.
JSON has null for what it has no number for (NaN, infinity); msgpack has an array as
{"dtype", "shape", "data"}, little endian.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sharpen.errors import require

from .errors import HTTPError

JSON = "application/json"
MSGPACK = ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack")
# entries of a list that are written at a time: no other thread runs meanwhile; chosen, some
# milliseconds where each entry is twenty log-probs
PIECE = 512


def decoded(body: bytes, content_type: str) -> Any:
    """The value in a body; 415 if its type is no JSON or msgpack, 400 if its content."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind in MSGPACK:
        load, name = _load_msgpack, "msgpack"
    elif kind == JSON or kind.endswith("+json"):
        load, name = _load_json, "JSON in UTF-8"
    else:
        raise HTTPError(
            415,
            f"`Content-Type` must be {JSON} or {MSGPACK[0]}, got {kind or 'none'!r}.",
            code="unsupported_media_type",
        )
    try:
        return load(body)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        message = f"the body must be {name}, got {reason}."
        raise HTTPError(400, message, code="bad_body") from error


def encoded(answer: Mapping[str, Any], accept: str = "") -> tuple[bytes, str]:
    """An answer as the client accepts it, and its content type; JSON unless asked otherwise.

    Example:
        >>> encoded({"x": np.float32([0.5, float("nan")]), "of": {"y": None}})
        (b'{"x":[0.5,null],"of":{"y":null}}', 'application/json')
    """
    wanted = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    for kind in MSGPACK:
        if kind in wanted:
            return _msgpack().packb(answer, default=_msgpack_value), kind
    return b"".join(piece.encode() for piece in json_pieces(answer)), JSON


def json_pieces(value: Any) -> Iterator[str]:
    """JSON of `value` in pieces of `PIECE` entries of a list."""
    if isinstance(value, Mapping):
        for i, (key, inner) in enumerate(value.items()):
            yield f"{',' if i else '{'}{_dumped(key)}:"
            yield from json_pieces(inner)
        yield "}" if value else "{}"
    elif isinstance(value, Iterator):
        separator = "["
        for inner in value:
            yield separator
            yield from json_pieces(inner)
            separator = ","
        yield "]" if separator == "," else "[]"
    elif isinstance(value, (list, np.ndarray)) and len(value) > PIECE:
        for start in range(0, len(value), PIECE):
            yield f"{',' if start else '['}{_dumped(value[start : start + PIECE])[1:-1]}"
        yield "]"
    else:
        yield _dumped(value)


def _dumped(value: Any) -> str:
    return json.dumps(value, default=_numbers, allow_nan=False, separators=(",", ":"))


def _numbers(array: np.ndarray) -> list[Any]:
    """An array as nested lists, None for NaN and infinities; fp32 keeps its exact value."""
    if array.dtype.kind != "f" or bool(np.isfinite(array).all()):
        return array.tolist()
    objects = array.astype(object)
    objects[~np.isfinite(array)] = None
    return objects.tolist()


def _load_json(body: bytes) -> Any:
    return json.loads(body.decode("utf-8-sig"))


def _load_msgpack(body: bytes) -> Any:
    msgpack = _msgpack()
    try:
        return msgpack.unpackb(body)
    # its own errors are not all ValueErrors
    except msgpack.UnpackException as error:
        raise ValueError(str(error)) from error


def _msgpack() -> Any:
    how = 'pip install "sharpen[serve]"'
    return require("msgpack", f"msgpack bodies need msgpack ({{error}}); {how}.")


def _msgpack_value(value: Any) -> Any:
    if isinstance(value, Iterator):
        return list(value)
    little = value.astype(value.dtype.newbyteorder("<"), copy=False)
    return {"dtype": little.dtype.str, "shape": list(value.shape), "data": little.tobytes()}
