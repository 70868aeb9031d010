"""`linear_logprob` of DTensors: never gathered, never read in part as if it were the whole.

A replicated one is read locally, a head cut by rows on the ranks that hold them; others raise.

Not imported by the package: who holds a DTensor has paid for the import of its module.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .linear_logprob import linear_logprob
from .stats import TokenStats
from .vocab_parallel import vocab_parallel_linear_logprob

FIX = (
    "gather it with `.full_tensor()`, or let FSDP do so: call inside the forward of the module "
    "that was wrapped, or after its `unshard()`"
)


def linear_logprob_of_dtensors(
    hidden: Tensor, weight: Tensor, target: Tensor, **options: Any
) -> TokenStats:
    """`linear_logprob` with the same arguments, where some are DTensors.

    Raises:
        ValueError: If the placements are not those that `linear_logprob` names.
    """
    pairs = {"target": target, "rows": options["rows"]}
    options |= {name: whole(name, x) for name, x in pairs.items()}
    replicated = isinstance(hidden, DTensor)
    hidden = whole("hidden", hidden)
    names = ("bias", "vocab_mask")
    if not isinstance(weight, DTensor) or is_whole(weight):
        options |= {name: whole(name, options[name]) for name in names}
        return linear_logprob(hidden, whole("weight", weight), **options)
    check_cut(weight)
    options |= {name: of_shard(name, options[name], weight) for name in names}
    if options["vocab_size"] is None:
        options["vocab_size"] = weight.shape[0]
    return vocab_parallel_linear_logprob(
        hidden,
        weight.to_local(),
        group=weight.device_mesh.get_group(),
        check_replicated=not replicated,
        **options,
    )


def is_whole(x: DTensor) -> bool:
    """Whether every rank holds all of `x`."""
    return all(isinstance(placement, Replicate) for placement in x.placements)


def whole(name: str, x: Any) -> Any:
    """`x`, locally where it is a replicated DTensor; `ValueError` for any other DTensor."""
    if not isinstance(x, DTensor):
        return x
    if is_whole(x):
        return x.to_local()
    raise ValueError(f"`{name}` must be whole on every rank, got {layout(x)}; {FIX}.")


def check_cut(weight: DTensor) -> None:
    """Raise `ValueError` unless `weight` is cut by rows, in the order of its ranks."""
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1 or type(placements[0]) is not Shard or placements[0].dim != 0:
        raise ValueError(
            "`weight` must be replicated, or cut by rows, (Shard(dim=0),), over a mesh of one "
            f"dimension, got {layout(weight)}; {FIX}."
        )
    ranks = dist.get_process_group_ranks(mesh.get_group())
    if mesh.mesh.tolist() != ranks:
        raise ValueError(
            f"`weight` must lie on a mesh in the order of its group, {ranks}, got "
            f"{mesh.mesh.tolist()}; {FIX}."
        )


def of_shard(name: str, x: Any, weight: DTensor) -> Any:
    """The part of `x` [V] that goes with this rank's rows of `weight`."""
    if x is None:
        return None
    if not isinstance(x, DTensor):
        if x.shape != weight.shape[:1] or x.is_floating_point():
            raise ValueError(
                f"`{name}` must be a DTensor laid out as `weight` is, {layout(weight)}, got a "
                f"tensor of shape {tuple(x.shape)}; call `distribute_tensor` on it."
            )
        # as `Shard` cuts
        step = -(-weight.shape[0] // weight.device_mesh.size())
        start = step * weight.device_mesh.get_local_rank()
        return x[start : start + step]
    if x.device_mesh != weight.device_mesh or x.placements != weight.placements:
        raise ValueError(
            f"`{name}` must be laid out as `weight` is, {layout(weight)}, got {layout(x)}; "
            "call `.redistribute` on it."
        )
    return x.to_local()


def layout(x: DTensor) -> str:
    """The placements and the mesh, for a message."""
    return f"{tuple(x.placements)} over a mesh of shape {tuple(x.device_mesh.shape)}"
