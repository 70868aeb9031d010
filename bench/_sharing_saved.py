"""What autograd keeps for backward: the most bytes at a time, each storage once, no parameters."""

import weakref
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn


class _Held(list[Tensor]):
    """What takes a saved tensor's place; its end is that of the saving."""

    __slots__ = ("__weakref__",)


def saved_mib(run: Callable[[], object], model: nn.Module) -> float:
    """The most that one call keeps for backward at a time, beside the parameters of `model`.

    A view counts its whole storage. What a function keeps without telling autograd is not seen:
    `peak_extra_mib` of a row sees all.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    holders: Counter[int] = Counter()
    now = peak = 0

    def forget(key: int, n_bytes: int) -> None:
        nonlocal now
        holders[key] -= 1
        now -= n_bytes if holders[key] == 0 else 0

    def pack(x: Tensor) -> _Held:
        nonlocal now, peak
        held = _Held([x])
        storage = x.untyped_storage()
        key, n_bytes = storage.data_ptr(), storage.nbytes()
        if key not in own:
            holders[key] += 1
            now += n_bytes if holders[key] == 1 else 0
            peak = max(peak, now)
            weakref.finalize(held, forget, key, n_bytes)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held[0]):
        run()
    assert now == 0, f"{now} bytes outlived the backward pass"
    return peak / 2**20
