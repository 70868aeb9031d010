"""The verbs of the command line, one file each with its `run`, and what they share."""
