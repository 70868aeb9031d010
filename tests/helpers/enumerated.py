"""Every completion of a tiny random model by brute force: the oracle of what searches find."""

import math
from itertools import product

import torch

from helpers.tiny import tiny

EOS = 2
SMALL = {"vocab_size": 5, "num_hidden_layers": 1}


def small(seed=0, family="llama", **changes):
    """A random model of five tokens, in fp64 so that an oracle has no rounding to argue about."""
    return tiny(family, seed=seed, **SMALL | changes).double()


def law(model, prompt, depth, eos_ids=(EOS,)):
    """Log-prob of every finished and of every cut completion of at most `depth` tokens."""
    every = list(product(range(model.config.vocab_size), repeat=depth))
    # one forward of all of them: what comes behind an EOS is not looked at
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids] for ids in every])).logits
    step = logits[:, len(prompt) - 1 : -1].log_softmax(2)
    token = step.gather(2, torch.tensor(every)[:, :, None]).squeeze(2)
    finished, cut = {}, {}
    for ids, logprobs in zip(every, token.tolist(), strict=True):
        end = next((t + 1 for t, token in enumerate(ids) if token in eos_ids), None)
        (cut if end is None else finished)[ids[:end]] = math.fsum(logprobs[:end])
    return finished, cut


def ranked(finished):
    """Completions with their log-probs, most probable first."""
    return sorted(finished.items(), key=lambda pair: (-pair[1], pair[0]))
