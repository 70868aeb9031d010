"""Score completions exactly with a model's own probabilities, and choose the best."""

from .scoring import Scorer as Scorer
from .scoring import Scores as Scores
from .selection import best_of_n as best_of_n
