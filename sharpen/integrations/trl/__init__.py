"""TRL >= 1.15: self-rewards, trainers that compute a prompt once, and its operations, fused.

What needs TRL itself is imported when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .ops import entropy_from_logits as entropy_from_logits
from .ops import selective_log_softmax as selective_log_softmax
from .ops import selective_log_softmax_and_entropy as selective_log_softmax_and_entropy
from .rewards import SelfReward as SelfReward
from .rewards import self_reward as self_reward

if TYPE_CHECKING:
    from .fused_head import add_fused_lm_head as add_fused_lm_head
    from .trainers import SharedPrefixDPOTrainer as SharedPrefixDPOTrainer
    from .trainers import SharedPrefixGRPOTrainer as SharedPrefixGRPOTrainer
    from .trainers import SharedPrefixKTOTrainer as SharedPrefixKTOTrainer
    from .trainers import SharedPrefixMixin as SharedPrefixMixin
    from .trainers import SharedPrefixRLOOTrainer as SharedPrefixRLOOTrainer
    from .trainers import use_reference_columns as use_reference_columns

_OF_HOST = {
    "add_fused_lm_head": "fused_head",
    "SharedPrefixMixin": "trainers",
    "SharedPrefixDPOTrainer": "trainers",
    "SharedPrefixGRPOTrainer": "trainers",
    "SharedPrefixKTOTrainer": "trainers",
    "SharedPrefixRLOOTrainer": "trainers",
    "use_reference_columns": "trainers",
}


# a function or class of those above
def __getattr__(name: str) -> Any:
    if name not in _OF_HOST:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_OF_HOST[name]}", __name__), name)
