"""Who may ask: anyone on this machine, or those who hold the key."""

import hmac
import ipaddress
import os
from collections.abc import Mapping

from sharpen.errors import InputError

from .refusal import RefusedError

KEY_VARIABLE = "SHARPEN_API_KEY"


def api_key(host: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key of the environment; None asks for none, which this machine alone can reach.

    Raises:
        InputError: If other machines could reach the server and there is no key, or it is one that
            no header can hold.

    Example:
        >>> api_key("127.0.0.1", {})
        >>> api_key("0.0.0.0", {"SHARPEN_API_KEY": "secret"})
        'secret'
    """
    key = environment.get(KEY_VARIABLE)
    if key is not None and (not key or not key.isascii() or key != key.strip()):
        raise InputError(
            f"the environment variable {KEY_VARIABLE} must hold a key in ASCII without spaces "
            "around it; set another one, or unset it."
        )
    if key is None and not is_loopback(host):
        raise InputError(
            f"`host` {host!r} can be reached from other machines, which needs a key; set the "
            f"environment variable {KEY_VARIABLE}, or use 127.0.0.1."
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether nothing but this machine can reach `host`; a name is not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_key(key: str | None, authorization: bytes) -> None:
    """Refuse a request whose header does not hold the key; the time it takes tells nothing of it.

    Raises:
        RefusedError: 401.
    """
    if key is None:
        return
    scheme, _, given = authorization.partition(b" ")
    # both are compared whole, also where the scheme is wrong
    is_same = hmac.compare_digest(given.strip(), key.encode())
    if scheme.lower() != b"bearer" or not is_same:
        raise RefusedError(
            401,
            "`Authorization` must be `Bearer KEY` with the server's key, got "
            f"{'another one' if authorization else 'none'}.",
            code="invalid_api_key",
        )
