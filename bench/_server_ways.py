"""Who scores the completions of `bench.server`: offline, micro-batches, and a server's clients."""

import contextlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from bench._server_clients import answers, request, serving
from bench._sharing import Problem, V, llama
from sharpen.models import load_model
from sharpen.scoring import Scorer
from sharpen.server.batcher import Job, MicroBatcher
from sharpen.server.state import scores_of

CLIENTS = 32


@contextlib.contextmanager
def contenders(
    problem: Problem, n_prompts: int, threads: int, device: str, dtype: str
) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """By name, what scores all completions of all prompts; the server ends with the block."""
    generator = torch.Generator().manual_seed(1)
    P, C, N = problem.P, problem.C, problem.N
    prompts = torch.randint(V, (n_prompts, P), generator=generator).tolist()
    groups = torch.randint(V, (n_prompts, N, C), generator=generator).tolist()
    each = [(prompt, [one]) for prompt, group in zip(prompts, groups, strict=True) for one in group]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        # both sides load it: cast in memory, its rotary frequencies would be rounded too
        llama().save_pretrained(folder)
        scorer = Scorer(load_model(folder, device=device, dtype=dtype), max_tokens=16384)
        ways: dict[str, Callable[[], Tensor]] = {
            "offline": lambda: scorer.score(prompts, groups).reward("logprob")
        }
        batcher = stack.enter_context(MicroBatcher(scorer.score))
        pool = stack.enter_context(ThreadPoolExecutor(CLIENTS))

        def one(pair: tuple[list[int], list[list[int]]]) -> Tensor:
            job = Job(*pair)
            (tokens,) = batcher.submit([job]).future.result()
            return scores_of(job, tokens).reward("logprob")

        ways["ours, micro-batcher"] = lambda: torch.cat(list(pool.map(one, each)))
        if importlib.util.find_spec("uvicorn") and importlib.util.find_spec("fastapi"):
            flags = ("--max-tokens", "16384", "--device", device, "--dtype", dtype)
            port = stack.enter_context(serving(Path(folder), *flags, threads=threads))
            whole = list(zip(prompts, groups, strict=True))
            for name, pairs in (("a prompt", whole), ("a completion", each)):
                sent = [request("/score", {"prompt": p, "completions": c}) for p, c in pairs]
                ways[f"ours, server, {name}"] = lambda sent=sent: torch.tensor(
                    [x for got in answers(port, sent, CLIENTS) for x in got["rewards"]["logprob"]]
                )
        yield ways
