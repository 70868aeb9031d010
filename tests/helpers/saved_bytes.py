"""What autograd holds for backward, counted; nothing of the allocator or the machine."""

import weakref

import torch


def peak_saved_bytes(run):
    """The most that autograd holds for backward at any time while `run` runs."""
    now = peak = 0

    class Held:
        def __init__(self, x):
            self.x = x

    def forget(n):
        nonlocal now
        now -= n

    def pack(x):
        nonlocal now, peak
        held, n = Held(x), x.numel() * x.element_size()
        now += n
        peak = max(peak, now)
        weakref.finalize(held, forget, n)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.x):
        run()
    return peak
