"""Rewards to choices: pure functions of rewards, groups and answers."""

from .adaptive import adaptive_best_of_n as adaptive_best_of_n
from .best_of_n import best_of_n as best_of_n
from .best_of_n import soft_best_of_n as soft_best_of_n
from .pessimism import inference_time_pessimism as inference_time_pessimism
from .pessimism import pessimistic_best_of_n as pessimistic_best_of_n
from .votes import borda_vote as borda_vote
from .votes import confidence_filter as confidence_filter
from .votes import confidence_vote as confidence_vote
from .votes import majority_vote as majority_vote
from .votes import probability_vote as probability_vote
from .votes import weighted_vote as weighted_vote
