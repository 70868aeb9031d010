"""Log-probs that a sampler kept: where they say all that a reward asks, no forward is needed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sharpen.errors import InputError

# of a rollout's extra fields
NAMES = ("completion_logprobs", "sampler_logprobs", "logprobs")


# whatever else a trainer passes to a reward
def sampler_logprobs(
    given: Mapping[str, Any], completion_ids: Sequence[Sequence[int]]
) -> list[list[float]] | None:
    """Nats of each token of each completion, NaN where the sampler has none; None if not given.

    Args:
        given: What the reward function was called with; the first of `NAMES` that is there counts.
        completion_ids: Token ids of each completion.

    Raises:
        InputError: If there is not one number for each token.

    Example:
        >>> sampler_logprobs({"completion_logprobs": [[-0.5, None]]}, [[7, 2]])
        [[-0.5, nan]]
    """
    name = next((name for name in NAMES if given.get(name) is not None), None)
    if name is None:
        return None
    rows = given[name]
    if len(rows) != len(completion_ids):
        raise InputError(
            f"`{name}` must hold one list for each of {len(completion_ids)} completions, "
            f"got {len(rows)}."
        )
    found = []
    for i, (row, ids) in enumerate(zip(rows, completion_ids, strict=True)):
        row = [] if row is None else row
        numbers = all(x is None or isinstance(x, (int, float)) for x in row)
        if len(row) != len(ids) or not numbers:
            raise InputError(
                f"`{name}`[{i}] must hold one number or None for each of {len(ids)} tokens, got "
                f"{len(row) if numbers else 'lists'}; hand over those of the sampled tokens."
            )
        found.append([math.nan if x is None else float(x) for x in row])
    return found
