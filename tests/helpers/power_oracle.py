"""Models small enough to enumerate: every completion, its log-prob, and the law p^alpha."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from helpers.tiny import tiny
from sharpen.sampling import Prompt

EOS = 0
PROMPT = Prompt("p", "", (1, 2, 1), "rows:0")


class TableModel(PreTrainedModel):
    """Logits looked up by the tokens behind the prompt; no attention, no cache.

    `tables[t]` is [V ** t, V]: a row for each beginning of t tokens, read as a number of base V.
    """

    config_class = PreTrainedConfig

    def __init__(self, tables):
        super().__init__(PreTrainedConfig())
        self.V, self.P = tables[0].shape[1], len(PROMPT.ids)
        self.embed = torch.nn.Embedding(self.V, 1)
        self.generation_config = GenerationConfig(eos_token_id=EOS)
        self.tables = tables

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=None):
        code = torch.zeros_like(input_ids[:, 0])
        rows = [self.tables[0][code]]
        for t in range(self.P, input_ids.shape[1]):
            code = code * self.V + input_ids[:, t]
            rows.append(self.tables[t - self.P + 1][code])
        # columns inside the prompt are never asked for
        return SimpleNamespace(logits=torch.stack([rows[0]] * (self.P - 1) + rows, dim=1))


def random_table(seed, V, T, scale=2.0):
    """A `TableModel` whose every beginning has logits of its own."""
    generator = torch.Generator().manual_seed(seed)
    tables = [torch.randn(V**t, V, generator=generator) * scale for t in range(T)]
    return TableModel([*tables, torch.zeros(V**T, V)]).eval()


def two_tokens():
    """aa 0, ab .40, ba .25, bb .25, normalised: b is the likelier first token, ab the best pair."""
    a, b = 1, 2
    first, second = torch.full((1, 3), -math.inf), torch.full((3, 3), -math.inf)
    first[0, a], first[0, b] = math.log(0.4), math.log(0.5)
    second[a, b] = 0.0
    second[b, a] = second[b, b] = 0.0
    second[EOS] = 0.0
    return TableModel([first, second, torch.zeros(9, 3)]).eval()


def small_llama(seed=5, V=4):
    """A Llama of V tokens, one of which ends."""
    model = tiny(
        seed=seed,
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=EOS,
        pad_token_id=1,
        initializer_range=0.5,
    )
    model.generation_config.eos_token_id = EOS
    return model


def logprobs(model, T):
    """Every completion of at most T tokens and its log-prob, nats, fp64."""
    V = model.get_input_embeddings().weight.shape[0]
    whole = list(itertools.product(range(V), repeat=T))
    ids = torch.tensor([list(PROMPT.ids) + list(tokens) for tokens in whole])
    with torch.no_grad():
        logits = model(ids).logits[:, len(PROMPT.ids) - 1 : -1].double()
    tokens = logits.log_softmax(2).gather(2, ids[:, len(PROMPT.ids) :, None]).squeeze(2)
    law = {}
    for ids_T, logprob_T in zip(whole, tokens.tolist(), strict=True):
        n = ids_T.index(EOS) + 1 if EOS in ids_T else T
        law[ids_T[:n]] = sum(logprob_T[:n])
    return law


def power_law(model, T, alpha):
    """p^alpha / Z, and log Z."""
    logprob = logprobs(model, T)
    scaled = torch.tensor(list(logprob.values()), dtype=torch.float64) * alpha
    return dict(zip(logprob, scaled.softmax(0).tolist(), strict=True)), scaled.logsumexp(0).item()


def total_variation(law, completions, weights=None):
    """Half the absolute difference between `law` and the completions' shares of weight."""
    seen = Counter()
    for ids, weight in zip(completions, weights or [1.0] * len(completions), strict=True):
        seen[tuple(ids)] += weight
    total = sum(seen.values())
    names = set(law) | set(seen)
    return 0.5 * sum(abs(law.get(name, 0.0) - seen[name] / total) for name in names)
