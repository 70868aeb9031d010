"""The small studies by name."""

from collections.abc import Callable

from .error_shape import error_shape_study
from .linear_softmax import linear_softmax_study
from .lower_bound import lower_bound_study
from .study import Study

STUDIES: dict[str, Callable[..., Study]] = {
    "lower-bound": lower_bound_study,
    "linear-softmax": linear_softmax_study,
    "error-shape": error_shape_study,
}
