"""Game of 24: puzzles, traces, checker, and the small model that ships with the package."""
