"""What `pip install "sharpen[serve]"` brings, imported where it is needed and not before."""

import importlib
from typing import Any

from sharpen.errors import InputError


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
