"""`sharpen study`: every selector, sampler and trained model on one task."""

from sharpen.experiments.game24.run import POSITIONAL, StudyConfig, run

__all__ = ["POSITIONAL", "StudyConfig", "run"]
