"""Completions to exact scores: batches, forwards, token statistics, rewards."""

from .scorer import Scorer as Scorer
from .scores import Scores as Scores
