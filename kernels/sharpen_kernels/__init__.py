"""Operations on tensors that score given tokens; nothing of transformers in here."""

from .linear_logprob import linear_logprob as linear_logprob
from .segment_reduce import GroupStats as GroupStats
from .segment_reduce import Segments as Segments
from .segment_reduce import SequenceStats as SequenceStats
from .segment_reduce import segment_reduce as segment_reduce
from .stats import TokenStats as TokenStats
from .token_logprob import token_logprob as token_logprob
from .tree import Run as Run
from .tree import Tree as Tree
from .tree import tree_mask as tree_mask
from .tree_attention import tree_attention as tree_attention
from .tree_attention import tree_attention_reference as tree_attention_reference
from .vocab_parallel import vocab_parallel_linear_logprob as vocab_parallel_linear_logprob
