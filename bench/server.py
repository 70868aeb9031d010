"""The server beside the scorer that it serves: 32 clients, the same work, seconds of all of it.

    python -m bench.server                              # in an environment with sharpen[serve]
    python -m bench.server --prompts 16 --shape 512 64 16 --threads 1 --out FILE.jsonl
    python -m bench.server --device cuda --dtype bfloat16 --shape 2048 256 16
    python -m bench.server --check                      # tiny shapes, agreement alone

    offline           one call of Scorer.score
    micro-batcher     32 threads of this process, one completion each, no HTTP
    a prompt          over loopback, a prompt with its N completions a request
    a completion      over loopback, one completion a request, as OpenRLHF asks

A random Llama of 4 layers x 256, V = 8192. Clients run on the same cores as the server, so their
work is part of what is measured. Agreement is judged in fp32; bfloat16 rounds as it may.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench._measure import (
    Row,
    Subject,
    flags,
    kind_of,
    machine,
    measure,
    parsed,
    say,
    speedup,
    steps,
    table,
    write,
)
from bench._sharing import Problem, V, llama
from sharpen.models import load_model
from sharpen.scoring import Scorer
from sharpen.server.batcher import Job, MicroBatcher
from sharpen.server.state import scores_of

ROOT = Path(__file__).parent.parent
CLIENTS = 32


def main() -> None:
    """Parse the flags and measure."""
    parser = flags("the server beside its scorer", seconds=30.0)
    letters = ("P", "C", "N")
    parser.add_argument("--shape", type=int, nargs=3, metavar=letters, default=(512, 64, 16))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parsed(parser)
    problem, n = (Problem(20, 5, 3), 5) if args.check else (Problem(*args.shape), args.prompts)
    say("loads the model and starts the server")
    with contenders(problem, n, torch.get_num_threads(), args.device, args.dtype) as ways:
        truth = ways["offline"]()
        errors = {}
        for name, way in steps(ways.items(), lambda item: f"agreement: {item[0]}"):
            errors[name] = (way() - truth).abs().max().item()
        say("timing")
        timings, missing = measure(ways, args.device, 0.0 if args.check else args.seconds)
    bound = 1e-3 if args.dtype == "float32" else float("inf")
    # NaN is above no bound, and below none
    if missing or not max(errors.values()) <= bound:
        raise SystemExit(f"does not agree with the scorer: {errors} {missing}")
    shape = f"prompts={n} {problem} clients={CLIENTS}"
    subject = Subject("server", shape, args.dtype, n * problem.flops, machine(args.device))
    rows = [
        Row.of(subject, name, kind_of(name), timing, errors[name])
        for name, timing in timings.items()
    ]
    print(table(f"server, {shape}, {args.dtype}, {args.device}", rows, missing))
    n_tokens = n * (problem.P + problem.N * problem.C)
    for name, timing in timings.items():
        ratio = speedup(timing, timings["offline"])
        print(f"  {name}: {n_tokens / timing.median:.0f} tokens/s, {ratio:.1%} of offline")
    if args.out:
        write(rows, args.out)


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


@contextlib.contextmanager
def serving(model: Path, *flags: str, threads: int) -> Iterator[int]:
    """The port of `sharpen serve` of a model in a process of its own."""
    command = [sys.executable, "-m", "sharpen", "serve", "--model", str(model), "--port", "0"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [*command, *flags],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server did not start: {' '.join(command)}")
        yield int(line.rpartition(":")[2])
    finally:
        process.terminate()
        process.communicate()


def request(path: str, body: dict[str, Any]) -> bytes:
    """A request as it goes over the wire."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def answers(port: int, requests: Sequence[bytes], n_clients: int) -> list[Any]:
    """Of all requests, in order; each client sends its next as soon as one is answered.

    Raises:
        RuntimeError: If one is refused.
    """
    return [json.loads(body) for body in asyncio.run(_all(port, requests, n_clients))]


async def _all(port: int, requests: Sequence[bytes], n_clients: int) -> list[bytes]:
    found: list[bytes] = [b""] * len(requests)
    left = iter(range(len(requests)))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        for i in left:
            writer.write(requests[i])
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            found[i] = await reader.readexactly(length)
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"{head.decode()}{found[i].decode()}")
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(client() for _ in range(n_clients)))
    return found


if __name__ == "__main__":
    main()
