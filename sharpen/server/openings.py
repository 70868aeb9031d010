"""Where a prompt ends in a text that begins with it, or with what a host has left of it.

A host whose prompts are too long cuts them on the left and sends the whole prompt beside a text
that begins with the rest. So a text that does not begin with the prompt may begin with its end: of
all ends of the prompt that the text begins with, the longest. Where a prompt repeats itself, a
response that repeats it again counts as prompt. An end shorter than `MIN_KEPT` says nothing.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence

# characters; chosen. No run leaves so little of a prompt, and a new line ends many
MIN_KEPT = 32
# what a decoder writes for each byte of a character that was cut through, of at most four
REPLACEMENT, MAX_REPLACED = "\ufffd", 3
# tokens around the place that lengths of texts point to, as a cut character has other lengths
NEAR = 4


def kept_end(opening: str, text: str) -> int:
    """Characters of `text` that are an end of `opening`: the longest, or 0 if it is too short.

    Example:
        >>> kept_end("Question: what is the sum of 17 and 25? Answer: ",
        ...          "what is the sum of 17 and 25? Answer: 42")
        38
        >>> kept_end("Question: 17 + 25? Answer: ", "Answer: 42")
        0
    """
    n_replaced = len(text) - len(text.lstrip(REPLACEMENT))
    skip = n_replaced if n_replaced <= MAX_REPLACED else 0
    n = _overlap(opening, text[skip:])
    return n + skip if n >= MIN_KEPT else 0


def kept_ids(ids: Sequence[int], kept: str, decode: Callable[[list[int]], str]) -> list[int] | None:
    """The last of `ids` that are decoded to `kept`, as the host cut them; None if none are."""
    n = len(ids)
    at = bisect_left(range(n + 1), len(kept), key=lambda k: len(decode(list(ids[n - k :]))))
    for k in sorted(range(max(1, at - NEAR), min(n, at + NEAR) + 1), key=lambda k: abs(k - at)):
        last = list(ids[n - k :])
        if decode(last) == kept:
            return last
    return None


def _overlap(left: str, right: str) -> int:
    """Length of the longest end of `left` that `right` begins with; Knuth, Morris and Pratt."""
    right = right[: len(left)]
    left = left[len(left) - len(right) :]
    borders = [0] * len(right)
    n = 0
    for i in range(1, len(right)):
        while n and right[i] != right[n]:
            n = borders[n - 1]
        n += right[i] == right[n]
        borders[i] = n
    n = 0
    # both are as long, so all of `right` can be matched by the last character alone
    for character in left:
        while n and character != right[n]:
            n = borders[n - 1]
        n += character == right[n]
    return n
