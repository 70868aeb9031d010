"""Score completions exactly with a model's own probabilities, and choose the best."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .scoring import Scorer, Scores
    from .selection import best_of_n

__all__ = ["Scorer", "Scores", "best_of_n"]

_HOMES = {"Scorer": ".scoring", "Scores": ".scoring", "best_of_n": ".selection"}


# imported when first asked for: the command line prints its help without PyTorch
def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
