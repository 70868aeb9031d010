"""What an endpoint is told to be: its URL, its key, and how patient to be with it."""

import urllib.parse
from dataclasses import dataclass

from sharpen.errors import InputError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Patience:
    """How long to wait, and for what.

    Attributes:
        timeout_s: For one answer, from the first byte sent to the last one read.
        tries: Times a request is sent in all.
        max_wait_s: Longest pause between two tries; a server that asks for a longer one is given
            up on.
        per_minute: Requests begun in a minute, tries included; None for no limit.
    """

    timeout_s: float = 600.0
    tries: int = 8
    max_wait_s: float = 120.0
    per_minute: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            InputError: If a number is not positive.
        """
        rules = [
            ("timeout", self.timeout_s > 0, self.timeout_s),
            ("tries", self.tries >= 1, self.tries),
            ("max_wait", self.max_wait_s > 0, self.max_wait_s),
            ("per_minute", self.per_minute is None or self.per_minute > 0, self.per_minute),
        ]
        for name, holds, got in rules:
            if not holds:
                raise InputError(f"`{name}` of an endpoint must be positive, got {got}.")


def check_url(url: str) -> str:
    """The host of an endpoint's URL.

    Raises:
        InputError: If it is not an http(s) URL, or holds a user, a password or a query, which may
            be secrets and would be written down with the settings of the run.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urllib.parse.urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host or any(c.isspace() for c in url):
        raise InputError("`endpoint` must be an http:// or https:// URL, such as http://HOST/v1.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InputError(
            "`endpoint` must be a URL without user, password, query or fragment; a key belongs "
            "into the environment variable that `--endpoint-key-env` names."
        )
    return host


def check_key(url: str, key: str | None) -> None:
    """Refuse a key that cannot be a header, or that would travel in the clear.

    Raises:
        InputError: If so; the message does not hold it.
    """
    if key is None:
        return
    if not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise InputError("the key of `endpoint` must be printable ASCII without spaces around it.")
    if not url.startswith("https://") and check_url(url) not in LOOPBACK:
        raise InputError(
            f"`endpoint` {url!r} must be https:// when a key is sent: the key would travel in the "
            "clear."
        )
