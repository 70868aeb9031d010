"""The inputs that implementations fail on: each a name, why it is there, and how it is built.

From logits a case changes random logits. From hidden rows it changes a random head, whose last
column meets a 1 in every hidden row: a shift is in it, and so is a mask for an implementation
that takes no bias.
"""

import dataclasses
from typing import Literal

Want = Literal["logprob", "entropy", "gradient", "entropy gradient"]
Layout = Literal["plain", "padded", "strided", "transposed", "unaligned", "huge stride"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One class of inputs. Rows 2 and 3 hold what is special about its targets."""

    name: str
    why: str
    V: int = 1000
    rows: int = 5
    scale: float = 3.0  # standard deviation of the logits
    shift: float = 0.0  # added to every logit
    masked: tuple[int, int] | None = None  # these columns are -inf
    masked_row: bool = False  # row 1 is -inf throughout: of logits only
    nan_row: bool = False  # row 1 holds a NaN
    targets: tuple[int | None, int | None] = (None, None)  # of rows 2 and 3
    ignored: bool = False  # every target is -100
    likeliest: bool = False  # every target is the row's most likely column
    want: Want = "logprob"
    layout: Layout = "plain"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    tolerance: float = 0.0  # nats, where the kind of mistake looked for is far larger


# a whole block of any peer: they read 64 to 32 768 columns at a time
WIDE, FIRST, MIDDLE, LAST = 36_000, (0, 33_000), (1000, 35_000), (2900, 36_000)
FAR = 2**31  # elements: past what an int32 can count
CASES = (
    Case("first block masked", "a running maximum of -inf: (-inf) - (-inf)", WIDE, masked=FIRST),
    Case("middle block masked", "the same in the update and the merge", WIDE, masked=MIDDLE),
    Case("last block masked", "the same in the last merge", WIDE, masked=LAST),
    Case("one row all masked", "it is NaN or -inf, and no other row is", masked_row=True),
    Case("every column masked", "no maximum at all; NaN or -inf", masked=(0, 1000)),
    Case("target masked", "-inf, not NaN", masked=(10, 90), targets=(50, None)),
    Case("padded vocabulary", "rows past the tokenizer's tokens must not count", layout="padded"),
    Case("logits + 1e4", "shift invariance up to rounding", shift=1e4),
    Case("logits - 1e4", "a maximum that starts at 0 instead of -inf", shift=-1e4),
    Case("logits - 120", "the same, where exp underflows", shift=-120.0),
    Case("target -100", "an ignored position is 0, not memory out of bounds", targets=(-100, None)),
    Case("every target -100", "zeros everywhere", ignored=True),
    Case("every target -100, gradient", "exact zeros, on a graph", ignored=True, want="gradient"),
    Case("no rows", "a launch of no programs", rows=0),
    Case("one row", "a launch of one program", rows=1),
    Case("NaN in a row", "NaN there, and in no other row", nan_row=True),
    Case("p near 1", "log p is never above 0", rows=64, scale=30.0, shift=1e3, likeliest=True),
    Case("huge bf16 logits", "past fp16's 65 504, past bf16's 8 bits", scale=3e4, dtype="bfloat16"),
    Case("odd sizes", "a ragged tail in every block", V=32_001, rows=3),
    Case("strided", "a view of wider memory", layout="strided"),
    Case("transposed", "a view with the strides exchanged", layout="transposed"),
    Case("unaligned", "memory that begins 4 bytes off", layout="unaligned"),
    Case("gradient", "of log-prob, unlike weights a row", want="gradient"),
    Case("entropy", "per row", want="entropy"),
    Case("entropy, masked columns", "0 x (-inf)", masked=(10, 90), want="entropy"),
    Case("entropy, logits - 1e4", "shift invariance of entropy", shift=-1e4, want="entropy"),
    Case("entropy gradient", "dropped in silence by some", want="entropy gradient"),
    Case(
        "entropy gradient, masked columns", "0 x (-inf) again", want="entropy gradient",
        masked=(10, 90),
    ),
    Case("target out of range", "NaN or an error, never a number", targets=(1000, -7)),
    Case(
        "past 2^31 elements", "row x stride in int32", V=34, rows=2, layout="huge stride",
        dtype="float16", tolerance=0.2,
    ),
)  # fmt: skip
