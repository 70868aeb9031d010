"""The model type `sharpen` beside the harness's own `hf`: same answers, each token read once."""

import pytest

pytest.importorskip("lm_eval")

from helpers.lm_eval_runs import (
    TASKS,
    assert_same,
    evaluated,
    loglikelihoods,
    model_of,
    numbers,
    prepared,
    request,
)
from helpers.lm_eval_tasks import prose


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("lm_eval"))


@pytest.fixture(scope="module")
def runs(paths):
    model, folder = paths
    return {
        (kind, shots): evaluated(
            kind,
            folder,
            model_args={"pretrained": str(model)},
            device="cpu",
            batch_size=4,
            num_fewshot=shots,
        )
        for kind in ("hf", "sharpen")
        for shots in (0, 2)
    }


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_comes_out_as_with_hf(runs, task, shots):
    assert_same(runs["sharpen", shots], runs["hf", shots], task)


def test_the_tasks_hold_what_they_claim(runs):
    greedy = [greedy for _, greedy in numbers(runs["sharpen", 0], "last")]
    assert greedy == [True] * 3 + [False] * 3
    assert runs["sharpen", 0]["results"]["last"]["acc,none"] == 0.5
    assert all(answer for answer in numbers(runs["sharpen", 0], "write"))


def test_order_and_copies_of_requests_change_nothing(paths):
    lm = model_of("sharpen", paths[0])
    pairs = [(prose(50, i % 2), " " + prose(5 + i, i)) for i in range(6)]
    first = loglikelihoods(lm, pairs)
    again = loglikelihoods(lm, [*pairs[::-1], pairs[0]])
    for (got, greedy), (want, wanted) in zip(again, [*first[::-1], first[0]], strict=True):
        assert got == pytest.approx(want, abs=1e-5)
        assert greedy == wanted


@pytest.fixture
def read(paths):
    """A model of one forward for all, and the numbers of tokens of its forwards."""
    lm = model_of("sharpen", paths[0], max_tokens=10_000)
    # the probes of its route are over after the first call
    loglikelihoods(lm, [("a", " b")])
    sizes: list[int] = []
    embedding = lm.model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, args, __: sizes.append(args[0].numel()))
    return lm, sizes


def test_a_context_is_read_once_for_its_continuations(read):
    lm, sizes = read
    pairs = [(prose(200, 1), f"{c} end of it") for c in "ABCDEFGH"]
    loglikelihoods(lm, pairs)
    assert sizes == [200 + sum(len(end) - 1 for _, end in pairs)]


def test_worked_examples_are_read_once_for_all_questions(read):
    lm, sizes = read
    shots, ends = prose(150, 1) + "\n", ("X yes", "Y no")
    questions = [f"{c}: {prose(20, ord(c))}?" for c in "ABC"]
    loglikelihoods(lm, [(shots + question, end) for question in questions for end in ends])
    own = sum(len(question) for question in questions)
    assert sizes == [len(shots) + own + 3 * sum(len(end) - 1 for end in ends)]


@pytest.mark.parametrize(("batch", "wanted"), [(8, 1), (2, 3)])
def test_batch_size_is_a_budget_of_tokens(paths, monkeypatch, batch, wanted):
    monkeypatch.setattr("sharpen.integrations.lm_eval.model.FLOOR", 1)
    lm = model_of("sharpen", paths[0], batch_size=batch)
    loglikelihoods(lm, [("a", " b")])
    sizes: list[int] = []
    embedding = lm.model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, args, __: sizes.append(args[0].numel()))
    # 5 sequences of 103 tokens that share nothing
    loglikelihoods(lm, [(c + prose(98, ord(c)), "ABCDE") for c in "ABCDE"])
    assert len(sizes) == wanted
    assert sum(sizes) == 5 * 103
    assert max(sizes) <= batch * 103


def test_generation_is_that_of_hf_after_scoring_too(paths):
    written = []
    for kind in ("hf", "sharpen"):
        lm = model_of(kind, paths[0])
        loglikelihoods(lm, [("a b c", " d"), ("a b c", " e")])
        asked = {"until": ["\n"], "max_gen_toks": 12}
        written.append(lm.generate_until([request("generate_until", "a b c", asked)] * 2))
    assert written[0] == written[1]
    assert written[0][0]
