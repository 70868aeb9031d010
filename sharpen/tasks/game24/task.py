"""Game of 24 as a task: prompts, claimed answers and the strict check."""

import random

from sharpen.errors import InputError

from ..protocol import Example, Message, PromptForm
from .puzzles import (
    SPLIT_SEED,
    SPLIT_SIZES,
    TARGET,
    Numbers,
    Targeted,
    free_puzzles,
    integer_solutions,
    split_puzzles,
)
from .traces import claimed_answer, is_solution, prompt_text, trace_text

INSTRUCTION = (
    "Use the four numbers and the operations + - * / to make {target}. Each number is used exactly "
    "once; parentheses are allowed. Think step by step: each step combines two of the numbers "
    "left. End with one line `Answer: EXPRESSION = {target}`."
)
FREE = "free"


class Game24:
    """All 1362 solvable puzzles of four numbers in 1..13, split three ways by multiset.

    A fourth split, "free", asks for other targets than 24: prompts for sharpening, which needs no
    labels.
    """

    name = "game24"
    splits: tuple[str, ...] = (*SPLIT_SIZES, FREE)
    description = "reach 24 from four numbers with + - * /; 1362 puzzles, exact checker"

    def examples(self, split: str) -> list[Example]:
        """The puzzles of "base", "sharpen" or "test", or the "free" prompts."""
        if split not in self.splits:
            raise InputError(
                f"`split` must be one of {', '.join(self.splits)} for task game24, got {split!r}."
            )
        if split == FREE:
            return [
                Example(f"game24-free-{'-'.join(map(str, p.numbers))}-to-{p.target}", p)
                for p in free_puzzles()
            ]
        return [Example("game24-" + "-".join(map(str, p)), p) for p in split_puzzles(split)]

    def prompt(self, example: Example, *, shots: int = 0, chat: bool = False) -> PromptForm:
        """The numbers and the target; `shots` solved puzzles of the base split go before."""
        numbers, target = _puzzle(example)
        worked = [(prompt_text(p), text) for p, text in _worked_examples(shots)]
        if not chat:
            # an empty line after each
            shown = [question + answer + "\n\n" for question, answer in worked]
            return "".join([*shown, prompt_text(numbers, target)])
        instruction = INSTRUCTION.format(target=target)
        messages: list[Message] = [{"role": "system", "content": instruction}]
        for question, answer in worked:
            messages.append({"role": "user", "content": question.strip()})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": prompt_text(numbers, target).strip()})
        return messages

    def answer(self, example: Example, completion: str) -> str | None:
        """The expression that the steps, or the `Answer:` line, claim; never checked."""
        return claimed_answer(completion)

    def is_correct(self, example: Example, completion: str) -> bool:
        """Exact rational check of every step, or of the `Answer:` line if there is one."""
        return is_solution(completion, *_puzzle(example))


def _puzzle(example: Example) -> Targeted:
    problem = example.problem
    return problem if isinstance(problem, Targeted) else Targeted(problem, TARGET)


def _worked_examples(shots: int) -> list[tuple[Numbers, str]]:
    if shots < 0:
        raise InputError(f"`shots` must be 0 or more, got {shots}.")
    rng = random.Random(SPLIT_SEED)
    solved = [p for p in split_puzzles("base") if integer_solutions(p)]
    if shots > len(solved):
        raise InputError(f"`shots` must be at most {len(solved)} for task game24, got {shots}.")
    return [(p, trace_text(p, integer_solutions(p)[0])) for p in rng.sample(solved, shots)]
