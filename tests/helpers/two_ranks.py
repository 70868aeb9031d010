"""Two processes that share a gloo group, and what they are asked to compute.

They live as long as a `Ranks`; a job is a function of this module, called on both at once with the
rank first. What passes between is pickled whole: nothing is shared, no port is opened but by gloo.
"""

import datetime
import multiprocessing
import pickle
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import helpers.interpreter_dots as interpreter_dots
from helpers.oracle import assert_as_accurate, values, values_and_gradients
from sharpen_kernels import _linear_logprob_torch as blocked
from sharpen_kernels import linear_logprob, vocab_parallel_linear_logprob
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels.linear_logprob import linear_logprob_reference

WORLD = 2
TIMEOUT_S = 60


def serve(rank, folder, pipe):
    """Answer jobs until the pipe closes."""
    torch.set_num_threads(1)
    if INTERPRETED:
        interpreter_dots.install()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    blocked.SEGMENT_ELEMENTS = 1  # segments of 64 columns: several a shard
    while (asked := pickle.loads(pipe.recv_bytes())) is not None:
        job, args = asked
        try:
            answer = job(rank, *args)
        except Exception as error:
            answer = type(error), str(error), traceback.format_exc()
            pipe.send_bytes(pickle.dumps(("raised", answer)))
        else:
            pipe.send_bytes(pickle.dumps(("returned", answer)))
    dist.destroy_process_group()


class Ranks:
    """The two processes; close it to end them."""

    def __init__(self, folder: Path):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, folder, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def outcomes(self, job, *args):
        """What `job(rank, *args)` does on each rank: ("returned", x) or ("raised", error)."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((job, args)))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(TIMEOUT_S), f"rank {rank} does not answer"
            answers.append(pickle.loads(pipe.recv_bytes()))
        return answers

    def call(self, job, *args):
        """What the job returns on each rank."""
        answers = self.outcomes(job, *args)
        for rank, (how, answer) in enumerate(answers):
            assert how == "returned", f"rank {rank}:\n{answer[-1]}"
        return [answer for _, answer in answers]

    def errors(self, job, *args):
        """Type and message of what the job raises on each rank, None where it returns."""
        answers = self.outcomes(job, *args)
        return [answer[:2] if how == "raised" else None for how, answer in answers]

    def close(self):
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.join(TIMEOUT_S)
            if process.is_alive():
                process.kill()


def assert_found_matches_fp64(found, problem, stats, **options):
    """Values and gradients are as close to fp64 as PyTorch's own fp32, within a factor of 2."""
    asked = linear_logprob_reference, problem, stats
    low = values_and_gradients(*asked, torch.float32, **options)
    truth = values_and_gradients(*asked, torch.float64, **options)
    assert set(found) == set(truth)
    for name, x in found.items():
        assert_as_accurate(name, x, low[name], truth[name])


def cut(x, sizes, rank):
    """The rows of `x` on `rank`."""
    start = sum(sizes[:rank])
    return None if x is None else x[start : start + sizes[rank]]


def score(rank, problem, sizes, stats, options):
    """Values and gradients; those of weight and bias are 0 outside this rank's rows."""

    def fn(hidden, weight, target, *, rows, bias, **options):
        mask = cut(options.pop("vocab_mask", None), sizes, rank)
        weight, bias = cut(weight, sizes, rank), cut(bias, sizes, rank)
        return vocab_parallel_linear_logprob(
            hidden, weight, target, rows=rows, bias=bias, vocab_mask=mask, **options
        )

    return values_and_gradients(fn, problem, stats, **options)


def each_its_own(rank, problems, options):
    """Values, where each rank makes a call of its own."""
    return values(problems[rank], fn=vocab_parallel_linear_logprob, **options[rank])


def place(problem, layouts, mesh):
    """The arguments, those that `layouts` names as DTensors."""
    named = {name: x for name, x in layouts.items() if problem[name] is not None}
    return problem | {
        name: distribute_tensor(problem[name], mesh, layout) for name, layout in named.items()
    }


def score_dtensors(rank, problem, layouts, stats, options):
    """Values and whole gradients, then placements and local shapes of gradients."""
    placed = place(problem, layouts, init_device_mesh("cpu", (WORLD,)))
    found = values_and_gradients(linear_logprob, placed, stats, **options)
    cut = {name: x for name, x in found.items() if isinstance(x, DTensor)}
    whole = {name: x.full_tensor() for name, x in cut.items()}
    return found | whole, {n: (x.placements, x.to_local().shape) for n, x in cut.items()}


def score_on_mesh(rank, problem, layouts, shape):
    """Log-probabilities, with a mesh of `shape`."""
    values(place(problem, layouts, init_device_mesh("cpu", shape)), ("logprob",))


class Model(torch.nn.Module):
    """A tiny language model that scores its own targets."""

    def __init__(self, V, D):
        super().__init__()
        self.embed = torch.nn.Embedding(V, D)
        self.body = torch.nn.Linear(D, D)
        self.head = torch.nn.Linear(D, V)

    def forward(self, tokens, target):
        hidden = torch.tanh(self.body(self.embed(tokens)))
        found = linear_logprob(
            hidden, self.head.weight, target, bias=self.head.bias, stats=("logprob", "entropy")
        )
        return found.logprob.sum() + 0.3 * found.entropy.sum()


def train_step(rank, state, tokens, target, wraps_head):
    """Loss of this rank's half of the tokens, and the whole gradients under FSDP2."""
    model = Model(*state["embed.weight"].shape)
    model.load_state_dict(state)
    mesh = init_device_mesh("cpu", (WORLD,))
    if wraps_head:
        fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    mine = slice(rank, None, WORLD)
    loss = model(tokens[mine], target[mine])
    loss.backward()
    grads = {name: x.grad.full_tensor() for name, x in model.named_parameters()}
    return loss.detach(), grads
