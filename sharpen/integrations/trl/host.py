"""TRL itself, imported when it is needed."""

import importlib
import sys
from typing import Any

from sharpen.errors import InputError

INSTALL = 'pip install "sharpen[trl]"'
# of TRL 1.15 and 1.16, as their metadata say; sharpen itself runs on 3.10
PYTHON = (3, 11)


# a module of a package that may not be there
def host(name: str = "trl") -> Any:
    """The module `name` of TRL.

    Raises:
        InputError: If TRL is not there, or older than 1.15, or cannot be: it needs Python 3.11.
    """
    if sys.version_info < PYTHON:
        here = ".".join(map(str, sys.version_info[:2]))
        raise InputError(
            f"TRL must be 1.15 or later, which needs Python 3.11 or later, got Python {here}; make "
            f"an environment of 3.11 and {INSTALL}."
        )
    try:
        trainer = importlib.import_module("trl.trainer")
        found = importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"TRL must be installed, got {error}; {INSTALL}.") from error
    if not hasattr(trainer, "add_fused_lm_head"):
        version = importlib.import_module("trl").__version__
        raise InputError(f"TRL must be 1.15 or later, got {version}; {INSTALL}.")
    return found


# a class of a package that may not be there
def trainer_class(name: str) -> Any:
    """TRL's trainer `name`; where TRL is not there, a class that says so when it is called."""
    try:
        return getattr(host(), name)
    except InputError as error:
        message = str(error)

    class Missing:
        # as the trainer
        def __init__(self, *args: Any, **kwargs: Any):
            raise InputError(message)

    return Missing
