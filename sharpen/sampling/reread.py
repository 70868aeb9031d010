"""Decode a model that cannot share prompts: every token reads its whole sequence again.

B rows, A rows that are open, C that go on, G prompts of P tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from sharpen.scoring.forward import accepted

from .decode import Take


def decode_rereading(
    model: PreTrainedModel, prompts: Int64[Tensor, "G P"], counts: Sequence[int], take: Take
) -> None:
    """`decode` without a cache and without hooks: right for any causal model, and slower.

    A row of P + T tokens costs about (P + T) T instead of P + T.

    Args:
        model: In eval mode.
        prompts: Of one length.
        counts: Rows of each prompt, at least one.
        take: As for `decode`.
    """
    device = prompts.device
    ids_AL = prompts.repeat_interleave(torch.tensor(list(counts), device=device), dim=0)
    rows_A = torch.arange(len(ids_AL), device=device)
    options = accepted(model, use_cache=False, logits_to_keep=1)
    while True:
        logits_AV = model(input_ids=ids_AL, **options).logits[:, -1]
        token_A, onward_C = take(rows_A, logits_AV)
        if not len(onward_C):
            return
        rows_A = rows_A[onward_C]
        ids_AL = torch.cat([ids_AL[onward_C], token_A[onward_C, None]], dim=1)
