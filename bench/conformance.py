"""Which implementation returns what on the inputs that implementations fail on.

    python -m bench.conformance                  # every peer that imports; prints two tables
    python -m bench.conformance --write          # and puts them into bench/README.md
    python -m bench.conformance --check          # ours alone, seconds

Fails unless ours is right everywhere. Each implementation runs in a process of its own, since a
wild read ends the process; kernels for GPUs run under Triton's interpreter where there is none.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch

from bench._cases import CASES
from bench._judge import judged
from bench._processes import ask
from bench._verdicts import Verdict, Verdicts, tables, write_into
from bench.peers import PEERS
from bench.peers.finding import Peer, available

OPS = {"token_logprob": "From logits", "linear_logprob": "From hidden rows and the head"}
README = Path(__file__).parent / "README.md"


def contenders(op: str, device: str) -> list[tuple[str, Peer, str]]:
    """A column's title, the implementation and where it runs; ours also under the interpreter."""
    listed = []
    for peer in PEERS[op]:
        if device in peer.devices:
            listed.append((peer.name, peer, device))
        if device == "cpu" and "interpreter" in peer.devices and find_spec("triton"):
            title = peer.name.replace("ours", "ours, Triton", 1)
            listed.append((title, peer, "interpreter"))
    return listed


def told(title: str, answer: dict[str, Verdict]) -> dict[str, Verdict]:
    """The answer, announced: the next one may take a minute."""
    print(f"{title}: {sum(v == 'right' for v, _ in answer.values())} right", file=sys.stderr)
    return answer


def check() -> bool:
    """Whether ours is right on every case, in this process."""
    wrong = []
    for op in OPS:
        found, _ = available([peer for peer in PEERS[op] if peer.ours], "cpu")
        for peer in found:
            for case in CASES:
                verdict, why = judged(peer, case, op, "cpu")
                if verdict not in ("right", "-"):
                    wrong.append(f"{op}, {peer.name}, {case.name}: {verdict}, {why}")
    print("\n".join(wrong) or "ours: right everywhere")
    return not wrong


def main() -> int:
    """Parse the flags; 0 where ours is right everywhere."""
    parser = argparse.ArgumentParser(description="who returns what on hard inputs")
    parser.add_argument("--check", action="store_true", help="ours alone, in this process")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {README.name}")
    parser.add_argument("--out", type=Path, help="write every verdict to this file, as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="implementations whose name holds this")
    args = parser.parse_args()
    if args.check:
        return 0 if check() else 1
    asked = [(op, *c) for op in OPS for c in contenders(op, args.device) if args.only in c[0]]
    with ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) // 4)) as pool:
        answers = list(pool.map(lambda a: told(a[1], ask(a[0], *a[2:])), asked))
    verdicts: Verdicts = {op: {} for op in OPS}
    for (op, title, *_), answer in zip(asked, answers, strict=True):
        verdicts[op][title] = answer
    text = tables(verdicts, OPS)
    print(text)
    if args.write:
        write_into(README, text)
    if args.out:
        args.out.write_text(json.dumps(verdicts, indent=1))
    ours = [v for by in verdicts.values() for t, v in by.items() if t.startswith("ours")]
    return 0 if all(v in ("right", "-") for found in ours for v, _ in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
