"""What `pip install "sharpen[serve]"` brings, imported where it is needed and not before.

What the server says no with: a status, one line, and OpenAI's shape of an error.

The fields of a request, read strictly: a wrong type is told by name, an unknown one refused.

How much one request may ask for, and how much may wait.

Bodies of requests and answers: JSON, msgpack, npz.

An answer is a JSON object of plain values and numpy arrays. JSON has them as lists, with null for
what it has no number for (NaN, infinity); msgpack as {"dtype", "shape", "data"}, little endian; npz
has the arrays alone, under the keys that lead to them joined by a dot.
"""

import importlib
import io
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from sharpen.errors import InputError, SharpenError


# a package that type checks do without
def needed(module: str) -> Any:
    """The module.

    Raises:
        InputError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"`sharpen serve` needs {module}, which cannot be imported ({error}); "
            'pip install "sharpen[serve]".'
        ) from error


# characters; a refusal that quotes its request must not be as large
LONGEST = 1000
TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class RefusedError(SharpenError):
    """A request that is not answered.

    Attributes:
        status: The HTTP status.
        message: One line, shortened if it is very long: name, wanted, got, fix.
        param: The field at fault, or None.
        code: A word for programs.
        retry_after: Whole seconds after which the same request may succeed, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str = "invalid_request",
        retry_after: int | None = None,
    ):
        message = _shortened(message, LONGEST)
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = None if param is None else _shortened(param, 100)
        self.code = code
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """What goes beside the body."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        # of a body that came too slowly more may follow, of a server that ends nothing
        if self.status in (408, 503):
            headers["Connection"] = "close"
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read an error."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


def shutting_down() -> RefusedError:
    """What everybody is told who is not answered any more; another server may be there soon."""
    return RefusedError(503, "the server is shutting down.", code="shutting_down", retry_after=1)


def refusal_of(error: Exception) -> RefusedError:
    """What a client is told of an error that came out of scoring or of reading its request."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, SharpenError):
        return RefusedError(422, " ".join(str(error).split()), code="invalid_input")
    reason = " ".join(str(error).split())[:200]
    if "out of memory" in reason.lower() or isinstance(error, MemoryError):
        message = "the request alone needs more memory than the device has; send fewer tokens."
        return RefusedError(413, message, code="out_of_memory")
    return RefusedError(
        500, f"scoring failed ({type(error).__name__}: {reason}).", code="scoring_failed"
    )


def _shortened(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 3] + "..."


Body = dict[str, Any]


def wrong(field: str, wanted: str, got: object, fix: str = "") -> RefusedError:
    """The refusal of a field's value."""
    shown = (
        repr(got) if isinstance(got, (str, int, float, bool, type(None))) else type(got).__name__
    )
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    end = f"; {fix}." if fix else "."
    return RefusedError(
        422, f"`{field}` must be {wanted}, got {shown}{end}", param=field, code="bad_field"
    )


def as_object(body: object, known: Collection[str] | None = None) -> Body:
    """The body as an object that has none but the known fields.

    Raises:
        RefusedError: 422 if it is another thing, or has a field that nobody would read.
    """
    if not isinstance(body, dict):
        raise RefusedError(
            422, f"the body must be an object, got {type(body).__name__}.", code="bad_body"
        )
    unknown = [str(key) for key in body if known is not None and key not in known]
    if unknown:
        wanted = ", ".join(sorted(known or ()))
        raise RefusedError(
            422,
            f"unknown field `{unknown[0]}`; known: {wanted}.",
            param=unknown[0],
            code="bad_field",
        )
    return body


def boolean(body: Body, field: str, default: bool) -> bool:
    """One of true and false."""
    value = body.get(field, default)
    if not isinstance(value, bool):
        raise wrong(field, "true or false", value)
    return value


def whole(body: Body, field: str, default: int | None, bounds: tuple[int, int]) -> int | None:
    """A whole number within bounds, both included; null is the default."""
    value = body.get(field)
    if value is None:
        return default
    low, high = bounds
    if type(value) is not int or not low <= value <= high:
        raise wrong(field, f"a whole number from {low} to {high}", value)
    return value


def texts(body: Body, field: str) -> list[str]:
    """A list of texts that can be written as UTF-8."""
    values = body.get(field)
    if not isinstance(values, list):
        raise wrong(field, "a list of texts", values)
    return [text(value, f"{field}[{i}]") for i, value in enumerate(values)]


def text(value: object, field: str) -> str:
    """A text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise wrong(field, "text", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RefusedError(
            422,
            f"`{field}` must be valid Unicode, got half of a surrogate pair at character "
            f"{error.start}; encode the text again.",
            param=field,
            code="bad_field",
        ) from error
    return value


def chosen(body: Body, field: str, default: list[str], known: Collection[str]) -> list[str]:
    """Some of the known names, each once."""
    values = body.get(field, default)
    if not isinstance(values, list):
        raise wrong(field, "a list of names", values)
    for value in values:
        if not isinstance(value, str) or value not in known:
            raise wrong(field, f"of {', '.join(known)}", value)
    return list(dict.fromkeys(values))


# requests of the largest size that may be inside together; chosen
N_INSIDE = 32
# far more than tokens of text have; chosen, so that no text of the context is refused by its size
CHARS_PER_TOKEN = 256


@dataclass(frozen=True)
class ServerLimits:
    """Bounds of a request and of the queue; the defaults were chosen, not measured.

    Attributes:
        max_request_bytes: Body of a request.
        max_request_tokens: Tokens of all prompts and completions of a request.
        max_n: Completions, or prompts, of a request.
        max_queue: Prompts with their completions that may wait; a request that would make them
            more is told to come back, unless none waits.
    """

    max_request_bytes: int = 8 * 2**20
    max_request_tokens: int = 262_144
    max_n: int = 512
    max_queue: int = 1024

    def __post_init__(self) -> None:
        """Refuse a limit that nothing could keep to.

        Raises:
            InputError: If one is below 1.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise InputError(f"`{field.name}` must be at least 1, got {value}.")

    def max_chars(self, context: int | None) -> int:
        """Characters that a text may have to be tokenised at all.

        Args:
            context: Tokens that the model can read; None if it has no limit.
        """
        n_tokens = self.max_request_tokens if context is None else context
        return CHARS_PER_TOKEN * min(n_tokens, self.max_request_tokens)

    def check_bytes(self, n_bytes: int) -> None:
        """Refuse a body that is too large; `n_bytes` may be what has come of it so far.

        Raises:
            RefusedError: 413.
        """
        if n_bytes > self.max_request_bytes:
            raise RefusedError(
                413,
                f"a request must be at most {self.max_request_bytes} bytes, got {n_bytes} or more; "
                "send several, or start the server with a larger `--max-request-bytes`.",
                code="request_too_large",
            )

    def check_inside(self, n_bytes: int) -> None:
        """Refuse a body that would make the bytes inside too many.

        Raises:
            RefusedError: 429.
        """
        most = N_INSIDE * self.max_request_bytes
        if n_bytes > most:
            raise RefusedError(
                429,
                f"requests inside hold more than {most} bytes already, {N_INSIDE} times "
                "`--max-request-bytes`; send it again later.",
                code="too_many_bytes",
                retry_after=1,
            )

    def check_n(self, field: str, n: int) -> None:
        """Refuse too many completions or prompts.

        Raises:
            RefusedError: 422.
        """
        if n > self.max_n:
            raise RefusedError(
                422,
                f"`{field}` must hold at most {self.max_n}, got {n}; send several requests, or "
                "start the server with a larger `--max-n`.",
                param=field,
                code="too_many",
            )

    def check_tokens(self, n_tokens: int) -> None:
        """Refuse too many tokens.

        Raises:
            RefusedError: 413.
        """
        if n_tokens > self.max_request_tokens:
            raise RefusedError(
                413,
                f"a request must have at most {self.max_request_tokens} tokens, prompts and "
                f"completions together, got {n_tokens}; send several, or start the server with a "
                "larger `--max-request-tokens`.",
                code="too_many_tokens",
            )


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
