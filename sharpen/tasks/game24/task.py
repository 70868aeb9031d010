"""Game of 24 as a task: prompts, claimed answers and the strict check."""

import random

from sharpen.errors import InputError

from ..protocol import Example, Message, PromptForm, with_shots
from .puzzles import SPLIT_SEED, SPLIT_SIZES, Numbers, integer_solutions, split_puzzles
from .traces import claimed_answer, is_solution, prompt_text, trace_text

INSTRUCTION = (
    "Use the four numbers and the operations + - * / to make 24. Each number is used exactly "
    "once; parentheses are allowed. Think step by step: each step combines two of the numbers "
    "left. End with one line `Answer: EXPRESSION = 24`."
)


class Game24:
    """All 1362 solvable puzzles of four numbers in 1..13, split three ways by multiset."""

    name = "game24"
    splits: tuple[str, ...] = tuple(SPLIT_SIZES)
    description = "reach 24 from four numbers with + - * /; 1362 puzzles, exact checker"

    def examples(self, split: str) -> list[Example]:
        """The puzzles of "base", "sharpen" or "test"."""
        if split not in SPLIT_SIZES:
            raise InputError(
                f"`split` must be one of {', '.join(SPLIT_SIZES)} for task game24, got {split!r}."
            )
        return [Example("game24-" + "-".join(map(str, p)), p) for p in split_puzzles(split)]

    def prompt(self, example: Example, *, shots: int = 0, chat: bool = False) -> PromptForm:
        """The numbers and the target; `shots` solved puzzles of the base split go before."""
        worked = _worked_examples(shots)
        prompts = [prompt_text(p) for p, _ in worked]
        solutions = [text for _, text in worked]
        if not chat:
            return with_shots(prompts, solutions, prompt_text(example.problem))
        messages: list[Message] = [{"role": "system", "content": INSTRUCTION}]
        for question, answer in zip(prompts, solutions, strict=True):
            messages.append({"role": "user", "content": question.strip()})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": prompt_text(example.problem).strip()})
        return messages

    def answer(self, example: Example, completion: str) -> str | None:
        """The expression that the steps, or the `Answer:` line, claim; never checked."""
        return claimed_answer(completion)

    def is_correct(self, example: Example, completion: str) -> bool:
        """Exact rational check of every step, or of the `Answer:` line if there is one."""
        return is_solution(completion, example.problem)


def _worked_examples(shots: int) -> list[tuple[Numbers, str]]:
    if shots < 0:
        raise InputError(f"`shots` must be 0 or more, got {shots}.")
    rng = random.Random(SPLIT_SEED)
    solved = [p for p in split_puzzles("base") if integer_solutions(p)]
    if shots > len(solved):
        raise InputError(f"`shots` must be at most {len(solved)} for task game24, got {shots}.")
    return [(p, trace_text(p, integer_solutions(p)[0])) for p in rng.sample(solved, shots)]
