""""""

import torch

from helpers.enumerated import EOS, small
from sharpen.experiments.theory.search import SearchConfig, find_mode
from sharpen.scoring import Scorer


def test_a_model_in_training_is_searched_without_its_noise():
    model = small(0)
    config = SearchConfig(max_new_tokens=4)
    want = find_mode(Scorer(model, sharing="none"), [1, 3, 4], (EOS,), config)
    layer = torch.nn.Dropout(0.5)
    embed = model.get_input_embeddings()
    embed.register_forward_hook(lambda module, args, out: layer(out))
    embed.noise = layer
    model.train()
    got = find_mode(Scorer(model, sharing="none"), [1, 3, 4], (EOS,), config)
    assert got.sequences == want.sequences
    assert got.logprobs == want.logprobs
    assert model.training
    assert layer.training
