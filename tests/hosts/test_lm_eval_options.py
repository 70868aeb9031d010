"""The arguments of the harness's `hf` do under `sharpen` what they do there, or are refused."""

import pytest
import torch

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.registry import get_model

from helpers.byte_checkpoint import byte_tokenizer
from helpers.lm_eval_runs import (
    CONTEXT,
    assert_same,
    evaluated,
    loglikelihoods,
    model_of,
    numbers,
    prepared,
)
from helpers.lm_eval_tasks import prose
from sharpen.errors import InputError
from sharpen.scoring import Scorer

TASKS = ("two", "cut", "nothing", "rolling")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("lm_eval"))


def both(paths, tasks=TASKS, run=(), **options):
    found, wanted = (
        evaluated(model_of(kind, paths[0], **options), paths[1], tasks, **dict(run))
        for kind in ("sharpen", "hf")
    )
    for task in tasks:
        assert_same(found, wanted, task)
    return found


@pytest.fixture(scope="module")
def plain(paths):
    return evaluated(model_of("sharpen", paths[0]), paths[1], TASKS)


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_token_id": 2},
        {"add_bos_token": True},
        {"max_length": 100},
        {"dtype": "float64"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_do_what_they_do_with_hf(paths, plain, options):
    found = both(paths, **options)
    if "dtype" not in options:
        assert any(numbers(found, task) != numbers(plain, task) for task in TASKS)


@pytest.mark.parametrize(
    "options",
    [
        {"logits_cache": False},
        {"truncation": True},
        {"softmax_dtype": "float32"},
        {"batch_size": "auto"},
        {"sharing": "none"},
        {"sharing": "cache"},
        {"max_tokens": 60},
        {"revision": "main"},
        {"trust_remote_code": False, "use_fast_tokenizer": True},
    ],
    ids=lambda options: "-".join(map(str, next(iter(options.items())))),
)
def test_options_that_leave_the_answers_alone(paths, plain, options):
    found = evaluated(model_of("sharpen", paths[0], **options), paths[1], TASKS)
    for task in TASKS:
        assert_same(found, plain, task)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_counts_and_so_does_a_loaded_model(paths, plain, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = model_of("hf", paths[0]).model
    adapted = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    found = both(paths, ["two"], peft=str(tmp_path / "adapter"))
    assert numbers(found, "two") != numbers(plain, "two")
    found, wanted = (
        evaluated(get_model(kind)(adapted, tokenizer=byte_tokenizer()), paths[1], ["two"])
        for kind in ("sharpen", "hf")
    )
    assert_same(found, wanted, "two")


def test_chat_templates_and_turns(paths, plain):
    run = {
        "apply_chat_template": True,
        "num_fewshot": 1,
        "fewshot_as_multiturn": True,
        "system_instruction": "Be brief.",
    }
    found = both(paths, ["two"], run)
    (first, _), *_ = found["samples"]["two"][0]["arguments"]
    assert first.startswith("[system]Be brief.\n[user]")
    assert first.endswith("[assistant]")


@pytest.mark.parametrize("option", ["dtype", "mixed_precision_dtype"])
def test_half_precision_is_closer_to_the_truth_than_hf(paths, option):
    pairs = [(prose(60, i), f" {end}") for i in range(4) for end in ("a b", "hills", "odd")]
    truth = loglikelihoods(model_of("hf", paths[0], dtype="float64"), pairs)
    error = {
        kind: max(
            abs(got - want)
            for (got, _), (want, _) in zip(
                loglikelihoods(model_of(kind, paths[0], **{option: "bfloat16"}), pairs),
                truth,
                strict=True,
            )
        )
        for kind in ("sharpen", "hf")
    }
    # the weights themselves are rounded to bf16, which no scorer can mend
    assert 0 < error["sharpen"] <= error["hf"]


def test_responses_are_kept_and_taken_from_the_cache(paths, tmp_path, monkeypatch):
    options = {"model_args": {"pretrained": str(paths[0])}, "device": "cpu"}
    run = options | {"use_cache": str(tmp_path / "answers")}
    first = evaluated("sharpen", paths[1], ["two", "rolling"], **run)

    def forbidden(*args, **kwargs):
        raise AssertionError("the answers were not taken from the cache")

    monkeypatch.setattr(Scorer, "score", forbidden)
    again = evaluated("sharpen", paths[1], ["two", "rolling"], **run)
    for task in ("two", "rolling"):
        assert_same(again, first, task, within=0.0)


def test_answers_of_a_run_that_was_killed_are_in_the_cache(paths, tmp_path, monkeypatch):
    monkeypatch.setattr("sharpen.integrations.lm_eval.model.FORWARDS", 1)
    lm = model_of("sharpen", paths[0], max_tokens=120)
    cached = lm_eval.api.model.CachingLM(lm, str(tmp_path / "answers.db"))
    score, calls = Scorer.score, []

    def killed_later(self, *args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, *args, **options)

    monkeypatch.setattr(Scorer, "score", killed_later)
    pairs = [(prose(100, i), " end") for i in range(4)]
    with pytest.raises(KeyboardInterrupt):
        loglikelihoods(cached, pairs)
    assert len(cached.dbdict) == 2
    assert len(loglikelihoods(cached, pairs)) == 4
    assert len(calls) == 5


def test_batches_shrink_where_memory_runs_out(paths, plain, monkeypatch):
    score, budgets = Scorer.score, []

    def crowded(self, *args, **options):
        budgets.append(self.max_tokens)
        if self.max_tokens > 5000:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return score(self, *args, **options)

    monkeypatch.setattr(Scorer, "score", crowded)
    found = evaluated(model_of("sharpen", paths[0], batch_size="auto"), paths[1], ["two"])
    assert budgets == [16384, 8192, 4096]
    assert_same(found, plain, "two")
    with pytest.raises(torch.OutOfMemoryError):
        loglikelihoods(model_of("sharpen", paths[0], max_tokens=6000), [("a", " b")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softmax_dtype": "bfloat16"}, "`softmax_dtype` must be float32, got torch.bfloat16"),
        ({"max_length": CONTEXT + 1}, f"`max_length` must be at most .* context of {CONTEXT}"),
        ({"max_tokens": 0}, "`max_tokens` must be at least 1, got 0"),
        ({"backend": "seq2seq"}, "`backend` must be causal"),
        ({"sharing": "some"}, "`sharing` must be 'auto', tree, cache, none, got 'some'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_cannot_be_done_is_refused(paths, options, message):
    with pytest.raises(InputError, match=message):
        model_of("sharpen", paths[0], **options)


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ("", "", "task 't', document 0: context and continuation must not both be empty"),
        ("abc", "", "request 1 .* got no token in the continuation"),
        (" ", "b", "request 1 .* got no token in the context"),
        ("abc", "x" * (CONTEXT + 1), "the continuation must fit .* 512 tokens, got 513"),
    ],
    ids=["nothing", "continuation", "context", "long"],
)
def test_what_hf_cannot_score_is_refused_by_name(paths, context, continuation, message):
    pairs = [("a", " b"), (context, continuation)]
    with pytest.raises((AssertionError, IndexError)):
        loglikelihoods(model_of("hf", paths[0]), pairs)
    with pytest.raises(InputError, match=message):
        loglikelihoods(model_of("sharpen", paths[0]), pairs)


def test_the_longest_request_that_fits_is_not_cut(paths):
    pairs = [("x" * (CONTEXT - 4), "abcde"), ("x", "a" * CONTEXT)]
    found, wanted = (loglikelihoods(model_of(kind, paths[0]), pairs) for kind in ("sharpen", "hf"))
    for (got, _), (want, _) in zip(found, wanted, strict=True):
        assert got == pytest.approx(want, rel=1e-6)
