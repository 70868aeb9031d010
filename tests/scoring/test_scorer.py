"""What `Scorer` promises beside its numbers."""

import copy
import json
import logging
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from helpers.tiny import CONTEXT, SHAPE, V, alone, ragged, tiny
from sharpen import Scorer
from sharpen.errors import InputError
from sharpen.experiments.game24.train_base import build_tokenizer

NAN_ID = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its tokenizer on disk."""
    path = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def nan_row():
    """A model whose embedding of one id is NaN; its head is not tied to it."""
    model = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight[NAN_ID] = float("nan")
    return model


def test_scores_stand_in_input_order_whatever_the_order_of_input():
    prompts, completions = ragged()
    scorer = Scorer(tiny(), max_tokens=40)
    forward = scorer.score(prompts, completions).by_prompt("logprob")
    backward = scorer.score(prompts[::-1], [g[::-1] for g in completions[::-1]])
    for one, other in zip(forward, backward.by_prompt("logprob")[::-1], strict=True):
        torch.testing.assert_close(one, other.flip(0), atol=2e-5, rtol=0)


def test_empty_completions_have_no_tokens_and_cost_no_forward():
    model = tiny()
    scorer = Scorer(model)
    assert scorer.route.head == "hidden"
    model.forward = None
    scores = scorer.score([[1], [2, 3]], [[[], []], []])
    assert scores.offsets.tolist() == [0, 0, 0]
    assert scores.groups.tolist() == [0, 2, 2]
    assert scores.reward("logprob").tolist() == [0.0, 0.0]
    assert scorer.logprobs([[1]], [[[]]]).shape == (0,)
    tokens = scorer.score([[1]], [[[]]], stats=("topk", "top1")).tokens
    assert tokens.topk.shape == (0, 20)
    assert tokens.top1.dtype == torch.int64


def test_only_what_was_asked_for_is_computed():
    prompts, completions = ragged()
    tokens = Scorer(tiny()).score(prompts, completions, stats=("entropy",)).tokens
    assert tokens.entropy is not None
    assert tokens.logprob is not None
    assert tokens.lse is tokens.self_certainty is tokens.is_greedy is None


def test_scores_do_not_require_gradients_and_log_probs_do():
    prompts, completions = ragged()
    scorer = Scorer(tiny())
    assert not scorer.score(prompts, completions).reward("logprob").requires_grad
    assert scorer.logprobs(prompts, completions).requires_grad


def test_score_evaluates_and_restores_each_module_also_after_an_error(monkeypatch):
    prompts, completions = ragged()
    model = tiny("gpt2-tied")
    want = Scorer(model).score(prompts, completions).reward("logprob")
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    scorer = Scorer(model)
    assert torch.equal(scorer.score(prompts, completions).reward("logprob"), want)
    assert [module.training for module in model.modules()] == modes
    monkeypatch.setattr(model.transformer, "forward", None)
    with pytest.raises(TypeError):
        scorer.score(prompts, completions)
    assert [module.training for module in model.modules()] == modes


def test_logprobs_keep_dropout_of_a_model_in_training():
    prompts, completions = ragged()
    model = tiny("gpt2-tied").train()
    scorer = Scorer(model)
    first, second = (scorer.logprobs(prompts, completions) for _ in range(2))
    assert not torch.equal(first, second)
    assert model.training


def test_nan_stays_in_its_completion_and_is_named_once(caplog):
    clean, broken = [3, 4, 5, 6, 8, 9], [3, NAN_ID, 5]
    prompts = [[1, 2], [1, NAN_ID], [5, 6]]
    completions = [[clean, broken, [4]], [[4, 5], []], [[8], [9, 9, NAN_ID]]]
    scorer = Scorer(nan_row())
    with caplog.at_level(logging.WARNING, logger="sharpen"):
        rewards = scorer.score(prompts, completions).by_prompt("logprob")
    isnan = [r.isnan().tolist() for r in rewards]
    # the last id of a sequence is predicted and never read; an empty completion reads nothing
    assert isnan == [[False, True, False], [True, False], [False, False]]
    (record,) = caplog.records
    assert "NaN in completions[0][1], completions[1][0]: never chosen" in record.message
    whole = Scorer(tiny()).score(prompts, completions).by_prompt("logprob")
    torch.testing.assert_close(rewards[0][[0, 2]], whole[0][[0, 2]], atol=2e-5, rtol=0)


def test_many_nan_completions_are_one_line(caplog):
    with caplog.at_level(logging.WARNING, logger="sharpen"):
        Scorer(nan_row()).score([[NAN_ID]], [[[1]] * 9])
    (record,) = caplog.records
    assert "completions[0][4] and 4 more" in record.message


def test_tokens_beyond_the_padding_id_and_special_ids_are_ordinary():
    prompts, completions = [[0, 0, 2]], [[[0, 1, 2, 0], [V - 1, 0]]]
    model = tiny()
    with torch.no_grad():
        want = alone(model, prompts, completions)
    got = Scorer(model).score(prompts, completions).tokens.logprob
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_a_path_scores_like_its_model_and_pickles_small(folder):
    prompts, completions = ragged()
    want = Scorer(tiny()).score(prompts, completions).reward("mean_logprob")
    scorer = Scorer(folder, max_tokens=123, device="cpu", dtype="float32")
    got = scorer.score(prompts, completions).reward("mean_logprob")
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    data = pickle.dumps(scorer)
    assert len(data) < 1000
    twin = pickle.loads(data)
    assert twin.max_tokens == 123
    again = twin.score(prompts, completions).reward("mean_logprob")
    torch.testing.assert_close(again, want, atol=2e-5, rtol=0)


def test_a_model_pickles_with_its_weights():
    prompts, completions = ragged()
    scorer = Scorer(tiny(), max_tokens=40)
    twin = pickle.loads(pickle.dumps(scorer))
    one, other = (s.score(prompts, completions).reward("logprob") for s in (scorer, twin))
    assert torch.equal(one, other)


CHILD = """
import pickle, sys
model, scorer = (pickle.load(open(path, "rb")) for path in sys.argv[1:])
print(model.config._attn_implementation)
print(scorer.score([[5, 6]], [[[7, 8], [7, 9]]]).reward("logprob").tolist())
"""


def test_a_used_scorer_and_its_model_go_to_another_process(tmp_path):
    scorer = Scorer(tiny())
    want = scorer.score([[5, 6]], [[[7, 8], [7, 9]]]).reward("logprob").tolist()
    assert scorer.route.sharing == "tree"
    # what a copy falls back to, where nobody has registered the hooks
    assert copy.deepcopy(scorer.model).config._attn_implementation == "sdpa"
    paths = [tmp_path / "model.pickle", tmp_path / "scorer.pickle"]
    for path, thing in zip(paths, (scorer.model, scorer), strict=True):
        path.write_bytes(pickle.dumps(thing))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *paths], capture_output=True, text=True, check=True
    )
    implementation, found = child.stdout.splitlines()
    assert implementation == "sdpa"
    assert json.loads(found) == pytest.approx(want, abs=1e-6)
    # and the one that is used here stays as it was
    assert scorer.score([[5, 6]], [[[7, 8], [7, 9]]]).reward("logprob").tolist() == want


@pytest.mark.parametrize("form", [np.array, np.int32, torch.tensor, tuple])
def test_ids_may_be_arrays_and_tensors(form):
    make = (lambda ids: np.array(ids, dtype=np.int32)) if form is np.int32 else form
    scorer = Scorer(tiny())
    prompts, completions = [[5, 6, 7], [5, 6]], [[[8, 9], [10]], [[11], []]]
    given = [make(ids) for ids in prompts], [[make(ids) for ids in group] for group in completions]
    want = scorer.score(prompts, completions).reward("logprob")
    assert torch.equal(scorer.score(*given).reward("logprob"), want)
    assert torch.equal(scorer.logprobs(*given), scorer.logprobs(prompts, completions))


def test_text_is_tokenised_prompt_with_and_completion_without_special_tokens(folder):
    scorer = Scorer(str(folder), device="cpu")
    ids_of = build_tokenizer().get_vocab()
    prompt = [ids_of[word] for word in ("<s>", "Numbers:", "1", "2")]
    completion = [ids_of[word] for word in ("1", "+", "2", "=", "3")]
    for add_eos, ids in ((False, completion), (True, [*completion, ids_of["</s>"]])):
        got = scorer.score_text(["Numbers: 1 2"], [["1 + 2 = 3", ""]], add_eos=add_eos)
        want = scorer.score([prompt], [[ids, ids[5:]]])
        assert torch.equal(got.reward("logprob"), want.reward("logprob"))


@pytest.mark.parametrize("sharing", ["tree", "cache", "none"])
def test_a_context_may_be_full_before_the_last_token(sharing):
    # learned positions: one token more could not be read
    model = tiny("gpt2-tied")
    prompts, completions = [[5, 6]], [[[7] * (CONTEXT - 1), [7, 8]]]
    got = Scorer(model, sharing=sharing).logprobs(prompts, completions)
    read = torch.tensor([5, 6, *[7] * (CONTEXT - 2)])
    rows = model(read[None]).logits[0, 1:].log_softmax(dim=1)
    torch.testing.assert_close(got[: CONTEXT - 1], rows[:, 7], atol=2e-5, rtol=1e-5)
    with pytest.raises(InputError, match=rf"got 2 \+ {CONTEXT} = {CONTEXT + 2}"):
        Scorer(model).logprobs(prompts, [[[7] * CONTEXT]])


def test_errors_name_the_argument_and_the_fix(folder):
    scorer = Scorer(tiny())
    with pytest.raises(InputError, match=r"`completions` .* each of 1 prompts, got 2;"):
        scorer.score([[1]], [[], []])
    with pytest.raises(InputError, match=r"prompts\[1\]: the prompt must hold at least one"):
        scorer.score([[1], []], [[], []])
    with pytest.raises(InputError, match=rf"completions\[0\]\[1\]: .*got {V} at position 1 of the"):
        scorer.score([[1]], [[[2], [3, V]]])
    with pytest.raises(InputError, match=rf"context of {CONTEXT} tokens, got 2 \+ {CONTEXT} ="):
        scorer.logprobs([[1, 1]], [[[1] * CONTEXT]])
    with pytest.raises(InputError, match=r"`stats` must be of logprob, .*, got 'perplexity'"):
        scorer.score([[1]], [[[1]]], stats=("perplexity",))
    with pytest.raises(InputError, match=r"`valid` must hold one entry per completion"):
        scorer.score([[1]], [[[1]]], valid=[[True, True]])
    with pytest.raises(InputError, match=r"text needs a tokenizer, got none; pass"):
        scorer.score_text(["a"], [["b"]])
    with pytest.raises(InputError, match=r"`max_tokens` must be at least 1, got 0"):
        Scorer(folder, max_tokens=0)
    with pytest.raises(InputError, match=r"`dtype` applies to a path, got a loaded Llama"):
        Scorer(tiny(), dtype="float32")
    with pytest.raises(InputError, match=r"no such folder exists"):
        Scorer(folder / "missing")


def test_missing_eos_is_named():
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"`add_eos` needs a tokenizer with one EOS token"):
        Scorer(tiny(), tokenizer=tokenizer).score_text(["1"], [["2"]], add_eos=True)


def test_encoder_decoders_are_refused():
    config = T5Config(vocab_size=SHAPE["vocab_size"], d_model=8, d_kv=4, d_ff=8, num_layers=1)
    with pytest.raises(InputError, match=r"`model` must be a causal LM, got the encoder-decoder"):
        Scorer(T5ForConditionalGeneration(config))


def test_import_is_light_and_silent():
    code = (
        "import logging, os, sys; before = dict(os.environ); import sharpen, torch; "
        "assert not torch.cuda.is_initialized(); assert dict(os.environ) == before; "
        "assert not logging.root.handlers; assert 'transformers' not in sys.modules; "
        "assert sharpen.Scorer and sharpen.Scores and sharpen.best_of_n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
