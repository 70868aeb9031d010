import pytest

from sharpen.tasks import get_task
from sharpen.tasks.game24.traces import claimed_answer, expression, is_solution, prompt_text

PUZZLE = (4, 4, 6, 8)
GOOD = "8 + 4 = 12 left: 4 6 12\n6 - 4 = 2 left: 2 12\n12 * 2 = 24"


def test_a_right_trace_is_right():
    assert is_solution(GOOD, PUZZLE)
    assert expression(GOOD, PUZZLE) == "((4 + 8) * (6 - 4))"


@pytest.mark.parametrize(
    "completion",
    [
        pytest.param(GOOD.replace("= 24", "= 25"), id="wrong-result"),
        pytest.param(GOOD.replace("12 * 2 = 24", "12 - 2 = 10"), id="true-but-another-target"),
        pytest.param(GOOD.replace("8 + 4 = 12", "8 + 4 = 13"), id="wrong-arithmetic"),
        pytest.param(GOOD.replace("left: 2 12", "left: 2 13"), id="wrong-left"),
        pytest.param(GOOD.replace("6 - 4 = 2", "7 - 4 = 2"), id="number-not-there"),
        pytest.param("8 + 4 = 12 left: 4 6 12\n12 + 12 = 24", id="uses-a-number-twice"),
        pytest.param("\n".join(GOOD.split("\n")[:2]), id="stops-early"),
        pytest.param(GOOD + "\n24 + 0 = 24", id="one-step-too-many"),
        pytest.param(GOOD.replace("12 * 2", "12 ** 2"), id="other-operator"),
        pytest.param(GOOD + "!", id="garbage-at-the-end"),
        pytest.param("", id="empty"),
        pytest.param("4 / 0 = 4 left: 4 6 8\n8 * 4 = 32 left: 6 32\n32 - 6 = 26", id="by-zero"),
    ],
)
def test_a_wrong_trace_is_wrong(completion):
    assert not is_solution(completion, PUZZLE)


def test_fractions_and_negative_numbers_are_exact():
    trace = "8 / 3 = 8/3 left: 8/3 3 8\n3 - 8/3 = 1/3 left: 1/3 8\n8 / 1/3 = 24"
    assert is_solution(trace, (3, 3, 8, 8))
    assert is_solution(
        "1 - 5 = -4 left: -4 1 7\n7 - -4 = 11 left: 1 11\n11 + 1 = 12", (1, 1, 5, 7), 12
    )


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("(8 + 4) * (6 - 4) = 24", True),
        ("(8+4)*(6-4)", True),
        ("4 * (8 - 6) * 4 = 24", False),  # 32
        ("(8 + 4) * (6 - 4) = 25", False),
        ("(8 + 4) * 2 = 24", False),  # not the puzzle's numbers
        ("8 + 4 * 6 - 4 = 24", False),
        ("(8 + 4) * (6 - 4", False),
        ("(8 + 4)(6 - 4)", False),
        ("__import__('os')", False),
        ("4 ** 4 - 6 - 8", False),
        ("((((8 + 4)))) * (6 - 4)", True),
        ("8 / (4 - 4) + 6", False),
    ],
)
def test_final_answer_line_decides(answer, right):
    assert is_solution(f"some reasoning\nAnswer: {answer}", PUZZLE) is right
    assert is_solution(f"The answer is {answer}", PUZZLE) is right


def test_hostile_expressions_end_quickly():
    assert not is_solution("Answer: " + "(" * 5000 + "4", PUZZLE)
    assert not is_solution("Answer: " + "9" * 5000, PUZZLE)


def test_commuting_forms_are_one_answer():
    swapped = "4 + 8 = 12 left: 4 6 12\n6 - 4 = 2 left: 2 12\n2 * 12 = 24"
    reordered = "6 - 4 = 2 left: 2 4 8\n8 + 4 = 12 left: 2 12\n12 * 2 = 24"
    assert claimed_answer(swapped) == claimed_answer(reordered) == claimed_answer(GOOD)


def test_claimed_answer_does_not_look_at_the_truth():
    wrong = GOOD.replace("12 * 2 = 24", "12 * 2 = 30")
    assert claimed_answer(wrong) == claimed_answer(GOOD)
    assert claimed_answer("no steps at all") is None
    assert claimed_answer("Answer: 1 + 1 = 24") == "1+1"


def test_task_prompts_and_grading():
    task = get_task("game24")
    example = task.examples("test")[0]
    text = task.prompt(example)
    assert text == prompt_text(example.problem)
    assert not task.is_correct(example, "nonsense")
    shots = task.prompt(example, shots=2)
    assert shots.endswith("\n\n" + text)
    assert shots.count("Target: 24") == 3
    messages = task.prompt(example, shots=1, chat=True)
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
