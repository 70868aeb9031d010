"""Several processes that fit one model, by DDP or FSDP: what is supported, and what they agree on.

    is_for_cpu, asks_for_shards                   what the launcher and the arguments ask for
    check_way, check_device, check_started        everything else is rejected
    keep_log_probs                                FSDP in half precision returns fp32 log-probs
    broadcast_from_first, most, in_any            one answer in all processes
    average_gradients                             as DDP averages them

Each process has a share of every batch, and holds the whole model (DDP) or a part of each of its
weights (FSDP). Its loss is a mean over its own share, and the gradient is the mean of all: that of
one process that accumulates the shares.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharpen.errors import InputError, SharpenError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainingArguments

T = TypeVar("T")
REFUSED = ("deepspeed", "parallelism_config")


def is_for_cpu(model: nn.Module) -> bool:
    """Whether a model is to be fitted where it lies, on the CPU.

    Processes of a launcher load it there, and each moves it, or its part, to a GPU of its own.
    """
    lies_there = all(p.device.type == "cpu" for p in model.parameters())
    is_launched = "WORLD_SIZE" in os.environ
    by_launcher = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    return lies_there and (by_launcher or not is_launched or not torch.cuda.is_available())


def check_way(args: "TrainingArguments", model: nn.Module) -> None:
    """Reject all but DDP and FSDP, several GPUs in one process, and a model that comes in parts."""
    for name in REFUSED:
        if value := getattr(args, name, None):
            raise _refused(f"`{name}`", f"unset, got {value!r}")
    if args.n_gpu > 1:
        raise InputError(
            f"one process must have one GPU, got {args.n_gpu}; start it with `accelerate launch`, "
            "or choose one by CUDA_VISIBLE_DEVICES."
        )
    cut = next((name for name, p in model.named_parameters() if hasattr(p, "device_mesh")), None)
    if cut is not None:
        raise InputError(
            f"`model` must be loaded whole, got {cut!r} in parts already; leave it to the "
            "launcher to shard it (`fsdp=True`)."
        )


def asks_for_shards(args: "TrainingArguments") -> bool:
    """Whether the arguments or the launcher ask for FSDP, which needs a launcher."""
    is_launched = args.parallel_mode.value == "distributed"
    if args.fsdp and not is_launched:
        raise InputError(
            "`fsdp` must be unset in a process that no launcher started, got "
            f"{args.fsdp!r}; start it with `accelerate launch` or torchrun."
        )
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return is_launched and (bool(args.fsdp) or by_launcher)


def check_device(args: "TrainingArguments") -> None:
    """Reject FSDP on a CPU, where accelerate does not shard, before there is an accelerator."""
    if asks_for_shards(args) and args.device.type == "cpu":
        raise _no_shards("CPU processes")


def check_started(accelerator: "Accelerator", args: "TrainingArguments") -> None:
    """Reject what the launcher asked for and `check_way` could not see, and DDP instead of FSDP."""
    way = str(accelerator.distributed_type).rpartition(".")[2]
    if way == "FSDP":
        # accelerate has no types of its own
        plugin: Any = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise InputError(
                "FSDP must be of version 2, got version 1, which PyTorch has given up; set "
                "`fsdp_config={'version': 2}`, or `fsdp_version: 2` of `accelerate config`."
            )
    elif way != "NO" and not way.startswith("MULTI_"):
        raise _refused("the launcher", f"DDP or FSDP, got {way}")
    elif asks_for_shards(args):
        raise _no_shards(way)


def keep_log_probs(accelerator: "Accelerator") -> None:
    """Let FSDP round nothing that a module returns to the type of its weights.

    Log-probs are fp32; in half precision accelerate asks for outputs in it.
    """
    # accelerate has no types of its own
    plugin: Any = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        policy = replace(plugin.mixed_precision_policy, output_dtype=None)
        plugin.mixed_precision_policy = policy


def _refused(name: str, wanted: str) -> InputError:
    """Another way to spread a model."""
    return InputError(
        f"{name} must be {wanted}: a group of completions must stay whole; run DDP, or FSDP where "
        "memory is short."
    )


def _no_shards(got: str) -> InputError:
    """FSDP where accelerate does not shard."""
    return InputError(
        f"FSDP must run on GPUs, got {got}, where accelerate shards nothing; unset `fsdp`."
    )


def broadcast_from_first(find: Callable[[], T]) -> T:
    """What `find` returns or raises in rank 0, in all processes; all must call it.

    The others may hold a model without weights: they get them when it is sharded.
    """
    if not dist.is_initialized():
        return find()
    found: list[T | SharpenError | None] = [None]
    if dist.get_rank() == 0:
        try:
            found = [find()]
        except SharpenError as error:
            found = [error]
    dist.broadcast_object_list(found)
    (answer,) = found
    if isinstance(answer, SharpenError):
        raise answer
    # what `find` returns, pickled
    return answer  # type: ignore[return-value]


def most(n: int, accelerator: "Accelerator") -> int:
    """The largest `n` of all processes; all must ask."""
    if accelerator.num_processes == 1:
        return n
    largest = torch.tensor(n, device=accelerator.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def in_any(is_so: bool, accelerator: "Accelerator") -> bool:
    """Whether it is so in any process; all must ask."""
    return most(int(is_so), accelerator) > 0


def average_gradients(parameters: Sequence[nn.Parameter], n_processes: int) -> None:
    """Replace each gradient by its mean over all processes, as DDP does; all must ask.

    A parameter that no process has a gradient of keeps none.
    """
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        return
    has_one = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32)
    has_one = has_one.to(trained[0].device)
    dist.all_reduce(has_one, op=dist.ReduceOp.MAX)
    pending = [
        dist.all_reduce(_scaled(p, n_processes), async_op=True)
        for p, anyone in zip(trained, has_one.tolist(), strict=True)
        if anyone
    ]
    for work in pending:
        assert work is not None, "asynchronous"
        work.wait()


def _scaled(p: nn.Parameter, n_processes: int) -> Tensor:
    """The gradient of `p` or zeros, divided in place; gloo has no mean."""
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    return p.grad.div_(n_processes)
