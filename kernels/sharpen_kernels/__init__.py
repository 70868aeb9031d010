"""Operations on tensors that score given tokens; nothing of transformers in here."""

from .linear_logprob import linear_logprob as linear_logprob
from .partials import Partials as Partials
from .partials import merge as merge
from .partials import partials as partials
from .partials import ranks_ahead as ranks_ahead
from .segment_reduce import segment_reduce as segment_reduce
from .segment_stats import GroupStats as GroupStats
from .segment_stats import Segments as Segments
from .segment_stats import SequenceStats as SequenceStats
from .stats import TokenStats as TokenStats
from .token_logprob import token_logprob as token_logprob
from .vocab_parallel import vocab_parallel_linear_logprob as vocab_parallel_linear_logprob
