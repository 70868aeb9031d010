"""The ratio of a move: by hand, and in detailed balance over every pair of an enumerated law."""

import itertools
import math

import pytest
import torch

from helpers.power_oracle import EOS, PROMPT, random_table
from sharpen.sampling.metropolis import Chains, log_ratio

T = 4


def chains(logprob, proposal, counts):
    n = torch.tensor(counts)
    no = torch.zeros(len(n), dtype=torch.bool)
    tokens = torch.zeros(len(n), len(logprob[0]), dtype=torch.int64)
    return Chains(tokens, torch.tensor(logprob), torch.tensor(proposal), n, no, no)


def test_the_ratio_by_hand():
    # behind the end of a completion stands what must not count
    old = chains([[-1.0, -2.0, -3.0]], [[-0.5, -0.25, -0.125]], [3])
    new = chains([[-9.0, -4.0, 99.0]], [[-9.0, -1.0, 99.0]], [2])
    cut = torch.tensor([1])
    # 2 (-4 - (-2 - 3)) + (-.25 - .125) - (-1) + log 3 - log 2
    want = 2 * 1.0 - 0.375 + 1.0 + math.log(1.5)
    assert log_ratio(old, new, cut, 2.0).tolist() == pytest.approx([want])
    assert log_ratio(new, old, cut, 2.0).tolist() == pytest.approx([-want])


def test_at_alpha_infinity_the_likelier_wins():
    one, other = (
        chains([[-1.0, -2.0]], [[0.0, 0.0]], [2]),
        chains([[-1.0, -1.5]], [[0.0, 0.0]], [2]),
    )
    cut = torch.tensor([0])
    assert log_ratio(one, other, cut, math.inf).tolist() == [math.inf]
    assert log_ratio(other, one, cut, math.inf).tolist() == [-math.inf]
    assert log_ratio(one, one, cut, math.inf).tolist() == [-math.inf]


def every_state(model, temperature):
    """All completions as chains, log p^1 and log q of each token."""
    rows = []
    for tokens in itertools.product(range(3), repeat=T):
        n = tokens.index(EOS) + 1 if EOS in tokens else T
        # one of the sequences that agree up to the end
        if not any(tokens[n:]):
            rows.append((tokens, n))
    tokens_ST = torch.tensor([tokens for tokens, _ in rows])
    ids = torch.cat([torch.tensor(PROMPT.ids).expand(len(rows), -1), tokens_ST], dim=1)
    logits = model(ids).logits[:, len(PROMPT.ids) - 1 : -1].double()
    p, q = (
        z.log_softmax(2).gather(2, tokens_ST[:, :, None]).squeeze(2)
        for z in (logits, logits / temperature)
    )
    n_S = torch.tensor([n for _, n in rows])
    no = torch.zeros(len(rows), dtype=torch.bool)
    return Chains(tokens_ST, p.float(), q.float(), n_S, no, no)


def taken(states, index):
    return Chains(**{name: x[index] for name, x in vars(states).items()})


@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (4.0, 0.25), (2.5, 1.5)])
def test_every_move_is_in_detailed_balance(alpha, temperature):
    states = every_state(random_table(0, 3, T), temperature)
    S = len(states.count)
    assert S == 31
    assert sorted(set(states.count.tolist())) == [1, 2, 3, 4]
    log_pi_S = alpha * states.total(states.logprob, torch.zeros(S, dtype=torch.int64))
    one, other = (
        x.flatten() for x in torch.meshgrid(torch.arange(S), torch.arange(S), indexing="ij")
    )
    seen = 0
    for c in range(T):
        same = (states.token[one, :c] == states.token[other, :c]).all(dim=1)
        reach = same & (c < states.count[one]) & (c < states.count[other]) & (one != other)
        a, b = one[reach], other[reach]
        old, new, cut = taken(states, a), taken(states, b), torch.full_like(a, c)
        log_r = log_ratio(old, new, cut, alpha)
        # pi(x) (1 / T) q(x' from c) min(1, r)
        flow = log_pi_S[a] - old.count.double().log() + new.total(new.proposal, cut)
        flow = flow + log_r.clamp(max=0)
        back = torch.zeros(S, S, dtype=torch.float64)
        back[a, b] = flow
        torch.testing.assert_close(back[a, b], back[b, a], atol=1e-5, rtol=0)
        seen += len(a)
    assert seen > 1000
