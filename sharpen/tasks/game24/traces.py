"""Game of 24 as text: the prompt, the step-by-step trace, and the strict check of an answer.

    Numbers: 4 4 6 8 Target: 24          prompt
    8 + 4 = 12 left: 4 6 12              one step a line, then the sorted numbers left
    6 - 4 = 2 left: 2 12
    12 * 2 = 24                          the last step leaves the target

A completion is right when every line is a legal step in exact rational arithmetic and the
last one leaves exactly the target. A completion that ends in `Answer: EXPRESSION` (optionally
`= 24`) is judged by that expression alone, as the paper does. Expressions are parsed by
the grammar below, never evaluated as Python: integers, + - * / and parentheses only.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

from .puzzles import TARGET, Numbers, Step, apply, replace_pair

# longer numbers or deeper expressions cannot be a right answer to four numbers
MAX_ANSWER_CHARS = 200

_NUMBER = r"(-?\d{1,6}(?:/\d{1,6})?)"
_STEP = re.compile(rf"{_NUMBER} ([-+*/]) {_NUMBER} = {_NUMBER}(?: left: ([-\d/ ]{{1,40}}))?")
_ANSWER = re.compile(r"answer(?: is)?:?\s*(.+)", re.IGNORECASE)
_TOKEN = re.compile(r"\s*(\d{1,6}|[-+*/()])")


def prompt_text(numbers: Sequence[int], target: int = TARGET) -> str:
    """The prompt of a puzzle, ending in the newline after which the trace begins."""
    return f"Numbers: {' '.join(map(str, numbers))} Target: {target}\n"


def trace_text(numbers: Numbers, steps: Sequence[Step]) -> str:
    """The completion that solves `numbers` by `steps`, without a final newline."""
    lines = []
    for step in steps:
        numbers = replace_pair(numbers, step.left, step.right, step.result)
        line = f"{step.left} {step.op} {step.right} = {step.result}"
        lines.append(line if len(numbers) == 1 else f"{line} left: {' '.join(map(str, numbers))}")
    return "\n".join(lines)


def expression(completion: str, numbers: Sequence[int], target: int = TARGET) -> str | None:
    """The solution that `completion` states, in one canonical form; None if it is not one.

    Two traces that combine the same numbers in the same way, in whatever order of steps or
    of commuting operands, give the same expression: `(4 * (2 + (6 - 4)))` style, operands of
    + and * sorted.
    """
    answer = _last_answer(completion)
    if answer is not None:
        return _check_expression(answer, numbers, target)
    return _replay(completion, numbers, target)


def claimed_answer(completion: str) -> str | None:
    """The solution that `completion` claims, right or wrong: what a majority vote counts.

    The final `Answer:` line without its spaces, or else the steps folded into one expression
    by the results they claim (operands of + and * sorted, so the order of steps and of
    commuting operands does not matter). Nothing is checked against the puzzle: a vote must
    not know the truth. None when not every line is a step.
    """
    answer = _last_answer(completion)
    if answer is not None:
        return answer.partition("=")[0].replace(" ", "") or None
    made: dict[str, list[str]] = {}
    text = None
    for line in completion.strip().split("\n"):
        match = _STEP.fullmatch(line.strip())
        if match is None:
            return None
        left, op, right, result, _ = match.groups()
        a, b = (made[n].pop() if made.get(n) else n for n in (left, right))
        text = _join(op, a, b)
        made.setdefault(result, []).append(text)
    return text


def is_solution(completion: str, numbers: Sequence[int], target: int = TARGET) -> bool:
    """Whether `completion` solves the puzzle: see the module's docstring for the rule."""
    return expression(completion, numbers, target) is not None


def _replay(completion: str, numbers: Sequence[int], target: int) -> str | None:
    # the numbers still on the table, each with the expression that made it
    table = [(Fraction(n), str(n)) for n in numbers]
    lines = [line.strip() for line in completion.strip().split("\n")]
    if len(lines) != len(table) - 1:
        return None
    for line in lines:
        match = _STEP.fullmatch(line)
        if match is None:
            return None
        left, op, right, result, rest = match.groups()
        operands = []
        for text in (left, right):
            value = _fraction(text)
            index = next((i for i, (n, _) in enumerate(table) if n == value), None)
            if index is None:
                return None
            operands.append(table.pop(index))
        (a, a_text), (b, b_text) = operands
        value = apply(op, a, b)
        if value is None or value != _fraction(result):
            return None
        table.append((value, _join(op, a_text, b_text)))
        if rest is not None and Counter(n for n, _ in table) != Counter(
            map(_fraction, rest.split())
        ):
            return None
    value, text = table[0]
    return text if value == target else None


def _fraction(text: str) -> Fraction | None:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def _join(op: str, left: str, right: str) -> str:
    if op in "+*":
        left, right = sorted((left, right))
    return f"({left} {op} {right})"


def _last_answer(completion: str) -> str | None:
    lines = completion.strip().split("\n")
    match = _ANSWER.search(lines[-1])
    return match.group(1) if match else None


def _check_expression(answer: str, numbers: Sequence[int], target: int) -> str | None:
    text, _, claimed = answer.partition("=")
    if len(answer) > MAX_ANSWER_CHARS or (claimed and _fraction(claimed.strip(" .")) != target):
        return None
    tokens = _tokens(text)
    if tokens is None or Counter(int(t) for t in tokens if t.isdigit()) != Counter(numbers):
        return None
    parsed = _Parser(tokens).parse()
    return parsed[1] if parsed is not None and parsed[0] == target else None


def _tokens(text: str) -> list[str] | None:
    tokens, at = [], 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            return None
        tokens.append(match.group(1))
        at = match.end()
    return tokens


Parsed = tuple[Fraction, str] | None


class _Parser:
    """sum := product (+|- product)*;  product := atom (*|/ atom)*;  atom := int | ( sum )."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens
        self.at = 0

    def parse(self) -> Parsed:
        """Value and canonical text of the whole expression, or None if it is malformed."""
        value = self._sum()
        return value if self.at == len(self.tokens) else None

    def _peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _sum(self) -> Parsed:
        return self._binary("+-", lambda: self._binary("*/", self._atom))

    def _binary(self, ops: str, operand: Callable[[], Parsed]) -> Parsed:
        left = operand()
        while left is not None and self._peek() and self._peek() in ops:
            op = self.tokens[self.at]
            self.at += 1
            right = operand()
            if right is None:
                return None
            value = apply(op, left[0], right[0])
            left = None if value is None else (value, _join(op, left[1], right[1]))
        return left

    def _atom(self) -> Parsed:
        token = self._peek()
        self.at += 1
        if token.isdigit():
            return Fraction(token), token
        if token != "(":
            return None
        inner = self._sum()
        if inner is None or self._peek() != ")":
            return None
        self.at += 1
        return inner
