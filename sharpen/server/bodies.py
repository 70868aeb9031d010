"""Bodies of requests and answers: JSON, msgpack, npz.

An answer is a JSON object of plain values and numpy arrays. JSON has them as lists, with null for
what it has no number for (NaN, infinity); msgpack as {"dtype", "shape", "data"}, little endian; npz
has the arrays alone, under the keys that lead to them joined by a dot.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .optional import needed
from .refusal import RefusedError

JSON = "application/json"
MSGPACK = ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack")
NPZ = ("application/x-npz", "application/npz")

# entries of a list that are written at a time; chosen: some milliseconds where each is twenty
# log-probs
PIECE = 512


class Made(Sequence[Any]):
    """A list of which each entry is made when it is read: one at a time is in memory."""

    def __init__(self, n: int, make: Callable[[int], Any]):
        self._n = n
        self._make = make

    def __len__(self) -> int:
        return self._n

    # as a sequence has it: an index, or a slice
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(self._n)[index]]
        return self._make(range(self._n)[index])


def decoded(body: bytes, content_type: str) -> Any:
    """The value in a body.

    Raises:
        RefusedError: 415 if it is neither JSON nor msgpack by its type, 400 if not by its content.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind in MSGPACK:
        load, name = _load_msgpack, "msgpack"
    elif kind == JSON or kind.endswith("+json"):
        load, name = _load_json, "JSON in UTF-8"
    else:
        raise RefusedError(
            415,
            f"`Content-Type` must be {JSON} or {MSGPACK[0]}, got {kind or 'none'!r}.",
            code="unsupported_media_type",
        )
    try:
        return load(body)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RefusedError(
            400, f"the body must be {name}, got {reason}.", code="bad_body"
        ) from error


def encoded(answer: Mapping[str, Any], accept: str = "") -> tuple[bytes, str]:
    """An answer as the client accepts it, and its content type; JSON unless asked otherwise.

    Example:
        >>> encoded({"x": np.float32([0.5, float("nan")]), "of": {"y": None}})
        (b'{"x":[0.5,null],"of":{"y":null}}', 'application/json')
    """
    wanted = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    for kind in MSGPACK:
        if kind in wanted:
            return needed("msgpack").packb(answer, default=_as_map), kind
    for kind in NPZ:
        if kind in wanted:
            buffer = io.BytesIO()
            # an array is no option of savez
            arrays: dict[str, Any] = dict(_arrays(answer))
            np.savez(buffer, **arrays)
            return buffer.getvalue(), kind
    return b"".join(piece.encode() for piece in _json_pieces(answer)), JSON


def numbers(array: Any) -> list[Any]:
    """An array as nested lists, None for NaN and infinities; fp32 keeps its exact value."""
    if array.dtype.kind != "f" or bool(np.isfinite(array).all()):
        return array.tolist()
    objects = array.astype(object)
    objects[~np.isfinite(array)] = None
    return objects.tolist()


def _json_pieces(value: Any) -> Iterator[str]:
    """JSON in pieces: while one is written, no other thread of the process runs."""
    if isinstance(value, Mapping):
        for i, (key, inner) in enumerate(value.items()):
            yield f"{',' if i else '{'}{_dumped(key)}:"
            yield from _json_pieces(inner)
        yield "}" if value else "{}"
    elif isinstance(value, Made):
        for i, inner in enumerate(value):
            yield "," if i else "["
            yield from _json_pieces(inner)
        yield "]" if value else "[]"
    elif isinstance(value, (list, np.ndarray)) and len(value) > PIECE:
        for start in range(0, len(value), PIECE):
            yield f"{',' if start else '['}{_dumped(value[start : start + PIECE])[1:-1]}"
        yield "]"
    else:
        yield _dumped(value)


def _dumped(value: Any) -> str:
    return json.dumps(value, default=numbers, allow_nan=False, separators=(",", ":"))


def _load_json(body: bytes) -> Any:
    return json.loads(body.decode("utf-8-sig"))


def _load_msgpack(body: bytes) -> Any:
    msgpack = needed("msgpack")
    try:
        return msgpack.unpackb(body)
    # its own errors are not all ValueErrors
    except msgpack.UnpackException as error:
        raise ValueError(str(error)) from error


# of an array or of a list that is made as it is read
def _as_map(array: Any) -> Any:
    if isinstance(array, Made):
        return list(array)
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return {"dtype": little.dtype.str, "shape": list(array.shape), "data": little.tobytes()}


def _arrays(answer: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, value in answer.items():
        if isinstance(value, np.ndarray):
            yield prefix + key, value
        elif isinstance(value, Mapping):
            yield from _arrays(value, f"{prefix}{key}.")
