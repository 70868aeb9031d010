"""vLLM's own server over loopback: samples by token ids and by text, and its echo beside ours."""

import json
import os
import socket
import subprocess
import time
import urllib.request

import pytest

from helpers.other_pythons import ROOT, python_of
from helpers.vllm_llama import CPU, save_llama
from sharpen.cli import main
from sharpen.models import load_tokenizer

DRAW = ["--task", "game24", "--limit", "4", "-n", "4", "--max-new-tokens", "16"]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    python = python_of(".venv-vllm", "SHARPEN_VLLM_PYTHON", "run `make vllm`")
    port = free_port()
    log = open(tmp_path_factory.mktemp("server") / "log", "w+")  # noqa: SIM115 (closed below)
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        folder,
        "--served-model-name",
        "tiny",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--max-model-len",
        "256",
    ]
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **CPU},
        cwd=ROOT / "tests",
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def _wait_for(url, process, log):
    until = time.monotonic() + 400
    while time.monotonic() < until:
        if process.poll() is not None:
            log.seek(0)
            raise RuntimeError(log.read()[-3000:])
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(url)


def sample(server, out, *flags):
    argv = ["sample", "--endpoint", server, "--endpoint-model", "tiny", *DRAW, "--out", str(out)]
    assert main([*argv, *flags]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_ids_go_both_ways_and_agree_with_our_scorer(server, folder, tmp_path):
    out = tmp_path / "ids.jsonl"
    flags = ["--endpoint-prompts", "ids", "--model", str(folder), "--temperature", "0.7"]
    rows = sample(server, out, *flags)
    distinct = set()
    for row in rows:
        assert row["served_model"] == "tiny"
        assert [len(ids) for ids in row["completion_ids"]] == [len(x) for x in row["logprobs"]]
        assert len({tuple(ids) for ids in row["completion_ids"]}) == 4
        distinct |= {token for ids in row["completion_ids"] for token in ids}
    # the checkpoint's own top-k of 2 would leave far fewer
    assert len(distinct) > 40
    common = ["parity", "--model", str(folder), "--samples", str(out), "--tolerance", "1e-4"]
    # what it said while sampling, and what it says of the same tokens when asked to echo them
    assert main([*common, "--against", "sampler"]) == 0
    flags = ["--against", "server", "--endpoint", server, "--endpoint-model", "tiny"]
    assert main([*common, *flags]) == 0


def test_text_goes_both_ways_without_a_model(server, tmp_path):
    rows = sample(server, tmp_path / "text.jsonl")
    tokenizer = load_tokenizer("game24")
    for row in rows:
        assert "completion_ids" not in row
        assert [len(t) for t in row["tokens"]] == [len(x) for x in row["logprobs"]]
        for text, tokens in zip(row["completions"], row["tokens"], strict=True):
            assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= len(tokens)


def test_what_the_server_refuses_is_told(server, tmp_path, capsys):
    argv = ["sample", "--endpoint", server, "--endpoint-model", "none", *DRAW]
    assert main([*argv, "--out", str(tmp_path / "a.jsonl")]) == 2
    assert "HTTP 404" in capsys.readouterr().err
    argv = ["sample", "--endpoint", server, "--endpoint-model", "tiny", *DRAW]
    assert main([*argv, "--max-new-tokens", "999", "--out", str(tmp_path / "b.jsonl")]) == 2
    assert "4 of 4 prompts were refused" in capsys.readouterr().err
