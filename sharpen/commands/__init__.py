"""The verbs of the command line, one file each: a config dataclass and a `run` function."""
