"""The sweep over model types can tell right from wrong."""

import pytest
import torch

from bench import support
from bench.support import table
from sharpen import Scorer
from sharpen.sampling.hf import TransformersSampler


def test_right_scores_are_found_right():
    found = support.examine("llama")
    assert (found.verdict, found.sharing, found.sampling) == ("right", "tree", "shared")
    assert found.error is not None
    assert 0 < found.error < support.FLOOR_NATS


def test_one_wrong_score_is_found_wrong(monkeypatch):
    score = Scorer.score

    def off_at_one_token(*args, **options):
        scores = score(*args, **options)
        scores.tokens.logprob[100] += 1e-3
        return scores

    monkeypatch.setattr(Scorer, "score", off_at_one_token)
    found = support.examine("llama")
    assert (found.verdict, found.why) == ("wrong", "scores")
    assert "1e-03 **scores wrong**" in table([found])


def test_a_wrong_token_is_found_wrong(monkeypatch):
    sample = TransformersSampler.sample

    def without_the_last_token(*args):
        for batch in sample(*args):
            for samples in batch:
                samples.completion_ids[0][-1] += 1
            yield batch

    monkeypatch.setattr(TransformersSampler, "sample", without_the_last_token)
    found = support.examine("llama")
    assert (found.verdict, found.why) == ("wrong", "greedy tokens")


def test_what_raises_is_refused_and_what_cannot_be_built_is_said(monkeypatch):
    assert support.examine("xlnet").verdict == "refused"
    assert support.examine("blt").verdict == "not built"

    def fails(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Scorer, "score", fails)
    found = support.examine("llama")
    assert (found.verdict, found.why) == ("refused", "raises RuntimeError: out of luck")
    assert "`llama` (raises RuntimeError: out of luck)" in table([found])


@pytest.mark.parametrize("name", ["bamba", "deepseek_v3", "gpt_oss"])
def test_tiny_models_have_every_kind_of_layer_and_spread_logits(name):
    model = support.tiny_model(name)
    with torch.no_grad():
        logits = model(torch.tensor([support.PROMPTS[0]])).logits
    assert len(model.get_decoder().layers) == 2
    assert logits.std(-1).mean() > 0.1
