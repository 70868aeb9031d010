"""Choices to weights: losses of log-probs, groups of completions, the Trainer that fits them."""
