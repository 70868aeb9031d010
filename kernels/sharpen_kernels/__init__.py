"""Operations on tensors that score given tokens; nothing of transformers in here."""

from .linear_logprob import linear_logprob as linear_logprob
from .stats import TokenStats as TokenStats
from .token_logprob import token_logprob as token_logprob
