"""The fields of a request, read strictly: a wrong type is told by name, an unknown one refused."""

from collections.abc import Collection
from typing import Any

from .refusal import RefusedError

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
