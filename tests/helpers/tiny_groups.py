"""Groups of completions of a tiny model, and runs that fit them."""

import json

import torch

from helpers.tiny import V, tiny
from sharpen import Scorer
from sharpen.training.fit import fit
from sharpen.training.groups import Batch, Group
from sharpen.training.losses import sequence_sums
from sharpen.training.options import FitOptions


def ids(n, seed):
    return torch.randint(3, V, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [ids(4 + p % 3, p) for p in range(6)]
COMPLETIONS = [[ids(3 + g, 10 * p + g) for g in range(3)] for p in range(6)]


def sums(model, batch):
    with torch.no_grad():
        logprob_S = Scorer(model, sharing="none").logprobs(batch.prompts, batch.completions)
    return sequence_sums(logprob_S, batch.offsets)


def likelihood():
    pairs = zip(PROMPTS, COMPLETIONS, strict=True)
    return [Group(prompt, group, weight=[1.0, 0.5, 0.25]) for prompt, group in pairs]


def compared():
    batch = Batch.of([Group(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    reference = sums(tiny(), batch).reshape(6, 3).tolist()
    return [
        Group(p, c, reference=ref, reward=[r / 10 for r in ref], pairs=[(0, 1), (0, 2), (1, 2)])
        for p, c, ref in zip(PROMPTS, COMPLETIONS, reference, strict=True)
    ]


def options(**changes):
    given = {"lr": 3e-4, "epochs": 2.0, "batch": 2, "save_every": 2, "more": {"logging_steps": 1}}
    return FitOptions(**given | changes)


def fitted(out, groups, objective, *, model=None, **changes):
    model = tiny() if model is None else model
    fit(model, None, groups, objective, options(**changes), out)
    return model


def losses(out):
    rows = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def bits(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])
