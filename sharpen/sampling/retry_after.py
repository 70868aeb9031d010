"""How long a server asks to wait: `Retry-After` of RFC 9110, and OpenAI's milliseconds."""

import email.utils
import time
from collections.abc import Mapping
from email.message import Message


def retry_after_s(headers: Mapping[str, str] | Message, now: float | None = None) -> float | None:
    """Seconds that the headers of an answer ask to wait; None where they do not say.

    Args:
        headers: Of the answer; names in any case as `http.client` has them.
        now: Seconds since the epoch, for a date; default: this moment.

    Example:
        >>> retry_after_s({"Retry-After": "2"})
        2.0
        >>> retry_after_s({"Retry-After": "Thu, 01 Jan 1970 00:01:00 GMT"}, now=50.0)
        10.0
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("Retry-After") or headers.get("retry-after")
    if text is None:
        return None
    seconds = _number(text)
    if seconds is not None:
        return seconds
    try:
        then = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
    return max(0.0, then - (time.time() if now is None else now))


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None
