"""What `sharpen` raises on purpose: one tree, each leaf also a builtin."""


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
