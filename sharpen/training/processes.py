"""Several processes that fit one model: which of their ways there are, and gradients in common.

Each process holds the whole model and a share of every batch (DDP). Its loss is a mean over its own
share, and the gradient is the mean of all: that of one process that accumulates the shares.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharpen.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainingArguments

SHARDS = ("fsdp", "deepspeed", "parallelism_config")


def check_way(args: "TrainingArguments") -> None:
    """Refuse ways to spread a model or a batch that the losses cannot follow.

    They read the head's weight itself, whole, and a group must stay whole too.

    Raises:
        InputError: If weights are to be sharded, or one process is to use several GPUs.
    """
    for name in SHARDS:
        if value := getattr(args, name, None):
            raise _refused(f"`{name}`", f"unset, got {value!r}")
    if args.n_gpu > 1:
        raise InputError(
            f"one process must have one GPU, got {args.n_gpu}; start it with `accelerate launch`, "
            "or choose one by CUDA_VISIBLE_DEVICES."
        )


def check_started(accelerator: "Accelerator") -> None:
    """Refuse what the launcher asked for and `check_way` could not see.

    Raises:
        InputError: If processes are to do anything but DDP.
    """
    way = str(accelerator.distributed_type).rpartition(".")[2]
    if way != "NO" and not way.startswith("MULTI_"):
        raise _refused("the launcher", f"DDP, got {way}")


def _refused(name: str, wanted: str) -> InputError:
    return InputError(
        f"{name} must be {wanted}: sharded weights are not supported, since the losses read the "
        "head's weight whole; run DDP, with LoRA where memory is short."
    )


def in_any(is_so: bool, accelerator: "Accelerator") -> bool:
    """Whether it is so in any process; all must ask."""
    if accelerator.num_processes == 1:
        return is_so
    flag = torch.tensor(int(is_so), device=accelerator.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


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
