"""Requests of the harness in the order and the chunks in which the scorer reads them.

    request = (context ids, continuation ids)

The scorer reads what its requests begin with once, for all requests of one call. So contexts go in
the order of their ids: equal ones, and those with a beginning in common, such as the worked
examples before every question of a task, are neighbours and meet in one call. lm-eval is not
needed here.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from sharpen.errors import InputError

Ids = list[int]


def fitted(name: str, context: Ids, continuation: Ids, max_length: int) -> Ids:
    """The end of `context` that the model can read before `continuation`, as `hf` cuts it.

    The last token of a continuation is predicted and never read, so both together may have one
    token more than the model reads.

    Args:
        name: What the message begins with.
        context: Token ids, at least one.
        continuation: Token ids, at least one.
        max_length: Tokens that the model reads at most.

    Raises:
        InputError: If either is empty, or the continuation alone is too long.

    Example:
        >>> fitted("request 0", [1, 2, 3, 4], [5, 6], max_length=4)
        [2, 3, 4]
    """
    if not context or not continuation:
        empty = "continuation" if context else "context"
        raise InputError(
            f"{name}: context and continuation must hold at least one token each, got no token in "
            f"the {empty}; the harness's own `hf` refuses it too, so mend the task."
        )
    if len(continuation) > max_length:
        raise InputError(
            f"{name}: the continuation must fit `max_length` of {max_length} tokens, "
            f"got {len(continuation)}; shorten it, or leave the document out."
        )
    return context[-(max_length + 1 - len(continuation)) :]


def chunks(requests: Sequence[tuple[Ids, Ids]], max_tokens: int) -> Iterator[list[int]]:
    """Numbers of requests, contexts in the order of their ids, up to `max_tokens` at a time.

    Requests of one context stay together, in their order, and count it once; where they alone are
    more than `max_tokens` they make a chunk of their own.

    Example:
        >>> list(chunks([([1, 2], [3]), ([1], [4]), ([1, 2], [5])], max_tokens=4))
        [[1], [0, 2]]
    """
    order = sorted(range(len(requests)), key=lambda i: requests[i][0])
    chunk: list[int] = []
    held = 0
    for context, run in groupby(order, key=lambda i: requests[i][0]):
        numbers = list(run)
        tokens = len(context) + sum(len(requests[i][1]) for i in numbers)
        if chunk and held + tokens > max_tokens:
            yield chunk
            chunk, held = [], 0
        chunk += numbers
        held += tokens
    if chunk:
        yield chunk
