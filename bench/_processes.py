"""One implementation in a process of its own: a wild read ends that process and no other."""

import json
import os
import subprocess
import sys

import torch

from bench._cases import CASES
from bench._judge import judged
from bench._verdicts import Verdict
from bench.peers import PEERS
from bench.peers.finding import Peer, available, interpret

LOST = 3  # exit code: the GPU was lost after the last answer
SECONDS = 300  # of one process: compiling takes a minute, a spin lock takes for ever


def ask(op: str, peer: Peer, device: str) -> dict[str, Verdict]:
    """Every verdict on `peer`; a case that ends its process is a crash, and the rest go on."""
    verdicts: dict[str, Verdict] = {}
    environment = os.environ | {"TRITON_INTERPRET": "1" if device == "interpreter" else "0"}
    while left := [case.name for case in CASES if case.name not in verdicts]:
        command = [sys.executable, "-m", "bench._processes", op, peer.name, device]
        try:
            done = subprocess.run(
                [*command, *left], capture_output=True, text=True, env=environment, timeout=SECONDS
            )
            out, ended = done.stdout, f"exit code {done.returncode}"
        except subprocess.TimeoutExpired as stopped:
            heard = stopped.stdout or b""
            out = heard.decode() if isinstance(heard, bytes) else str(heard)
            ended = f"no answer in {SECONDS} s"
        lines = [json.loads(line) for line in out.splitlines() if line.startswith('["')]
        verdicts |= {case: (verdict, why) for case, verdict, why in lines}
        if ended == f"exit code {LOST}":
            continue
        unanswered = [name for name in left if name not in verdicts]
        if unanswered:
            verdicts[unanswered[0]] = "crash", ended
    return verdicts


def child(op: str, name: str, device: str, cases: list[str]) -> None:
    """Judge one implementation on the named cases; a JSON line each, as soon as it is known."""
    torch.set_num_threads(1)
    peers = [peer for peer in PEERS[op] if peer.name == name]
    found, missing = available(peers, device)
    ours = name.startswith("ours")
    if device == "interpreter" and not ours:
        interpret()
    for case in CASES:
        if case.name in cases:
            if missing:
                verdict = "absent", missing[name]
            elif (
                device == "interpreter" and case.dtype == "bfloat16" and not name.startswith("ours")
            ):
                verdict = "-", "the interpreter lacks much of bf16"
            else:
                verdict = judged(found[0], case, op, "cuda" if device == "cuda" else "cpu")
            print(json.dumps([case.name, *verdict]), flush=True)
            if device == "cuda" and not answers():
                sys.exit(LOST)


def answers() -> bool:
    """Whether the GPU still does: a kernel's wild read ends its use by this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
