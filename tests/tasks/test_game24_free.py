"""Prompts of other targets: reachable, always the same, and never of the test's numbers."""

from sharpen.tasks import get_task
from sharpen.tasks.game24.puzzles import free_puzzles, integer_solutions, split_puzzles
from sharpen.tasks.game24.traces import trace_text


def test_free_prompts_are_reachable_and_none_of_the_tests_numbers():
    task = get_task("game24")
    free = task.examples("free")
    assert len({example.id for example in free}) == len(free) == 12_000
    held_out = set(split_puzzles("test"))
    for example in free[:200]:
        numbers, target = example.problem
        assert numbers not in held_out
        assert target != 24
        solution = trace_text(numbers, integer_solutions(numbers, target)[0])
        assert task.is_correct(example, solution)
        assert task.prompt(example).endswith(f"Target: {target}\n")
        assert f"to make {target}" in task.prompt(example, chat=True)[0]["content"]
    assert not any(example.problem.numbers in held_out for example in free)


# written down once: what is trained on these prompts can be trained again
BEGINS_WITH = (((1, 6, 8, 11), 35), ((6, 7, 8, 12), 29), ((1, 7, 13, 13), 84))


def test_free_prompts_are_the_same_in_every_process():
    assert free_puzzles()[:3] == BEGINS_WITH


def test_a_completion_is_judged_by_its_own_target():
    task = get_task("game24")
    (example,) = (e for e in task.examples("free") if e.problem == ((1, 6, 8, 11), 35))
    assert task.is_correct(example, "Answer: (8 - 1) * 6 - 11 = 31") is False
    solutions = integer_solutions((1, 6, 8, 11), 35), integer_solutions((1, 6, 8, 11), 24)
    right, wrong = (trace_text((1, 6, 8, 11), found[0]) for found in solutions)
    assert task.is_correct(example, right)
    assert not task.is_correct(example, wrong)
