"""Requests to the scorer's calls: cut to the context, regrouped by equal context, in stretches.

    request = (context ids, continuation ids)

Requests of one context stand side by side in one call, so that it is read once for all of them.
Contexts go in the order of their ids: those with a beginning in common, such as the worked examples
before every question of a task, are neighbours and meet in the scorer's tree.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sharpen.errors import InputError

Ids = list[int]


@dataclass(frozen=True)
class Group:
    """One context and the continuations asked for.

    Attributes:
        context: Token ids.
        continuations: Token ids of each.
        requests: Which request each continuation is.
    """

    context: Ids
    continuations: list[Ids] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens that are read at most for it."""
        return len(self.context) + sum(map(len, self.continuations))

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence that are read."""
        return len(self.context) + max(map(len, self.continuations)) - 1


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


def grouped(requests: Sequence[tuple[Ids, Ids]]) -> list[Group]:
    """Every request once, those of equal context together, contexts in the order of their ids.

    Example:
        >>> [group.requests for group in grouped([([1, 2], [3]), ([1], [4]), ([1, 2], [5])])]
        [[1], [0, 2]]
    """
    groups: dict[tuple[int, ...], Group] = {}
    for i, (context, continuation) in enumerate(requests):
        group = groups.setdefault(tuple(context), Group(context))
        group.continuations.append(continuation)
        group.requests.append(i)
    return [groups[key] for key in sorted(groups)]


def stretches(groups: Sequence[Group], max_tokens: int) -> Iterator[list[Group]]:
    """Neighbouring groups of up to `max_tokens` tokens together; a larger group goes alone."""
    stretch: list[Group] = []
    held = 0
    for group in groups:
        if stretch and held + group.tokens > max_tokens:
            yield stretch
            stretch, held = [], 0
        stretch.append(group)
        held += group.tokens
    if stretch:
        yield stretch
