"""Rewards kept in a folder: a run that is begun again does not rate the same completion twice."""

import hashlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharpen.runs import Journal

from .micro_batches import Rate
from .unscorable import Rated, Unscorable


# settings, ready for JSON
def kept(depends: Mapping[str, Any], folder: Path, rate: Rate) -> Rate:
    """`rate`, with what it found kept as JSON lines, one file a process.

    What has no reward is not kept: it is asked for again.

    Args:
        depends: What a reward depends on beside prompt and completion.
        folder: Made if it is not there; several processes may share it.
        rate: Rates what is not known yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = json.dumps(dict(depends), sort_keys=True)
    known = dict(_read(folder))
    journal = Journal(folder / f"rewards-{uuid.uuid4().hex}.jsonl")

    def key(prompt: list[int], completion: list[int]) -> str:
        text = json.dumps([base, prompt, completion])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def rate_new(prompts: list[list[int]], completions: list[list[list[int]]]) -> list[list[Rated]]:
        keys = [[key(p, c) for c in group] for p, group in zip(prompts, completions, strict=True)]
        # the same completion twice is rated once
        todo = [
            {k: c for k, c in zip(ks, group, strict=True) if k not in known}
            for ks, group in zip(keys, completions, strict=True)
        ]
        asked = [i for i, new in enumerate(todo) if new]
        fresh: dict[str, Rated] = {}
        if asked:
            groups = [list(todo[i].values()) for i in asked]
            found = rate([prompts[i] for i in asked], groups)
            fresh = {
                k: x
                for i, values in zip(asked, found, strict=True)
                for k, x in zip(todo[i], values, strict=True)
            }
            numbers = {k: x for k, x in fresh.items() if not isinstance(x, Unscorable)}
            journal.append({"key": k, "reward": x} for k, x in numbers.items())
            known.update(numbers)
        return [[known[k] if k in known else fresh[k] for k in ks] for ks in keys]

    return rate_new


def _read(folder: Path) -> list[tuple[str, float]]:
    found = []
    for path in sorted(folder.glob("rewards-*.jsonl")):
        for line in path.read_bytes().splitlines(keepends=True):
            # without its newline it is one that another process is writing, or that a crash tore
            if line.endswith(b"\n"):
                row = json.loads(line)
                found.append((row["key"], row["reward"]))
    return found
