"""The small studies by name."""

from collections.abc import Callable

from .error_shape_study import error_shape_study
from .linear_softmax_study import linear_softmax_study
from .lower_bound_study import lower_bound_study
from .study import Study

STUDIES: dict[str, Callable[..., Study]] = {
    "lower-bound": lower_bound_study,
    "linear-softmax": linear_softmax_study,
    "error-shape": error_shape_study,
}
