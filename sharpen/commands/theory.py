"""`sharpen theory`: the most probable completion of every prompt, and what follows from it."""

from sharpen.experiments.theory.run import TheoryConfig, run

__all__ = ["TheoryConfig", "run"]
