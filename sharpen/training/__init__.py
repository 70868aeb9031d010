"""Choices to weights: losses and the loops that fit them."""
