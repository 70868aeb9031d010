"""What `sharpen` raises on purpose: one tree, each leaf also a builtin; the checks that raise it.

`require` imports an optional package or says how to install it, `check_value` checks one argument,
`check_fields` the fields of a configuration.
"""

import importlib
from typing import Any


class SharpenError(Exception):
    """Anything that a user of sharpen may want to catch."""


class InputError(SharpenError, ValueError):
    """Bad input: the message says name, wanted, got and fix, in one line."""


class RecordError(InputError):
    """A bad record in a file: the message begins with `FILE:LINE:`."""


class RunError(SharpenError, RuntimeError):
    """A run directory that cannot be used: made with other settings, or in use."""


class TrainingError(SharpenError, ArithmeticError):
    """Weights that training has spoilt: NaN or infinity."""


class ServiceError(SharpenError, ConnectionError):
    """A server that cannot be reached, refuses, or does not answer what it was asked."""


# the module of a package that type checks do without
def require(module: str, message: str) -> Any:
    """The module `module`, imported now.

    Args:
        module: Its dotted name.
        message: What to say where it cannot be imported: what needs it, and how to install it.
            `{error}` in it stands for the reason.

    Raises:
        InputError: `message`.

    Example:
        >>> require("json", "unused").loads("[1]")
        [1]
        >>> require("no_such_package", "It must be there, got {error}.")
        Traceback (most recent call last):
            ...
        sharpen.errors.InputError: It must be there, got No module named 'no_such_package'.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(message.format(error=error)) from error


def check_value(name: str, value: object, holds: bool, wanted: str) -> None:
    """Reject the argument `name` unless `holds`.

    Raises:
        InputError: Name, what was wanted, what came.

    Example:
        >>> check_value("n", 0, 0 >= 1, "at least 1")
        Traceback (most recent call last):
            ...
        sharpen.errors.InputError: `n` must be at least 1, got 0.
    """
    if not holds:
        raise InputError(f"`{name}` must be {wanted}, got {value}.")


def check_fields(settings: object, rules: list[tuple[str, bool, str]]) -> None:
    """Reject `settings` at the first rule that does not hold.

    Args:
        settings: Has a field of each name in `rules`.
        rules: (name of a field, whether its value is one that is accepted, what is wanted).

    Raises:
        InputError: Name of the field, what was wanted, its value.
    """
    for name, holds, wanted in rules:
        check_value(name, getattr(settings, name), holds, wanted)
