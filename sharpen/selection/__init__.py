"""Rewards to choices: pure functions of rewards, groups and answers."""

from .best_of_n import best_of_n as best_of_n
