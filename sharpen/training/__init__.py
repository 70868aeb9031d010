"""Choices to weights: losses of log-probs, groups of completions, and the Trainer that fits them."""
