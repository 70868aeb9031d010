"""`sample`, `bon` and `score` on what a completions endpoint draws; engines that contradict."""

import json

import pytest

from helpers.completions_server import Completions, serving
from sharpen.cli import main
from sharpen.models import load_tokenizer
from sharpen.sampling.draw import row_key

QUICK = ["--endpoint-tries", "1", "--endpoint-timeout", "20"]


def solver(choice, body):
    """Index 0 is a claim cut short, 1 the likeliest whole one, which repeats as 3."""
    texts = ["1 + 1 = 2", "6 - 4 = 2 left: 2 12", "unlikely", "6 - 4 = 2 left: 2 12"]
    index = choice["index"] % 4
    words = texts[index].split()
    logprob = [-0.01, -0.1, -2.0, -0.1][index]
    return choice | {
        "text": texts[index],
        "logprobs": {"tokens": words, "token_logprobs": [logprob] * len(words)},
        "finish_reason": "length" if index == 0 else "stop",
    }


@pytest.fixture
def endpoint():
    server = Completions()
    server.change = solver
    with serving(server) as (url, server):
        yield url, server


def command(verb, url, out, *extra):
    return [
        verb,
        "--endpoint",
        url,
        "--endpoint-model",
        "instruct",
        "--out",
        str(out),
        *QUICK,
        "--max-new-tokens",
        "30",
        *extra,
    ]


def prompts_file(tmp_path, n=4):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Numbers: 1 2 3 {i} Target: 24\n", "prompt_id": f"q{i}"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_are_written_without_what_is_unknown(endpoint, tmp_path, capsys):
    url, server = endpoint
    out = tmp_path / "s.jsonl"
    prompts = str(prompts_file(tmp_path))
    assert main(command("sample", url, out, "--prompts", prompts, "-n", "4")) == 0
    assert "4 prompts x 4 completions, 88 tokens" in capsys.readouterr().out
    rows = rows_of(out)
    assert [row["prompt_id"] for row in rows] == ["q0", "q1", "q2", "q3"]
    for row in rows:
        # no ids: only the server has a tokenizer
        assert set(row) == {
            "prompt_id",
            "prompt",
            "completions",
            "logprobs",
            "finish_reasons",
            "tokens",
            "served_model",
        }
        assert row["completions"][1] == "6 - 4 = 2 left: 2 12"
        assert row["finish_reasons"] == ["length", "stop", "stop", "stop"]
    assert {body["seed"] for body in server.asked} == {
        row_key(0, f"q{i}", 0) % 2**31 for i in range(4)
    }


def test_a_broken_run_goes_on_by_prompt_id(endpoint, tmp_path, capsys):
    url, server = endpoint
    out = tmp_path / "s.jsonl"
    again = command("sample", url, out, "--prompts", str(prompts_file(tmp_path)), "-n", "2")
    server.refuse = lambda body: 503 if " 2 Target" in body["prompt"] else None
    assert main([*again, "--endpoint-concurrency", "1"]) == 2
    assert "HTTP 503 (as told, scripted); given up after 1 tries" in capsys.readouterr().err
    assert [row["prompt_id"] for row in rows_of(out)] == ["q0", "q1"]
    server.refuse = lambda body: None
    server.asked.clear()
    # patience is not what the samples depend on
    assert main([*again, "--endpoint-concurrency", "2", "--endpoint-rpm", "100000"]) == 0
    assert len(server.asked) == 2
    whole = out.read_bytes()
    assert [row["prompt_id"] for row in rows_of(out)] == ["q0", "q1", "q2", "q3"]
    once = tmp_path / "once.jsonl"
    prompts = str(tmp_path / "prompts.jsonl")
    assert main(command("sample", url, once, "--prompts", prompts, "-n", "2")) == 0
    assert once.read_bytes() == whole
    # another model at the endpoint is another run
    assert main([*again, "--endpoint-model", "other"]) == 2
    assert "endpoint_model was 'instruct', is 'other'" in capsys.readouterr().err


def test_score_takes_what_it_wrote(endpoint, tmp_path):
    url, _ = endpoint
    samples, scored = tmp_path / "s.jsonl", tmp_path / "scored.jsonl"
    prompts = str(prompts_file(tmp_path, 2))
    assert main(command("sample", url, samples, "--prompts", prompts, "-n", "3")) == 0
    flags = ["--model", "game24", "--device", "cpu", "--input", str(samples)]
    assert main(["score", *flags, "--out", str(scored)]) == 0
    tokenizer = load_tokenizer("game24")
    for row in rows_of(scored):
        lengths = [
            len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in row["completions"]
        ]
        assert row["n_tokens"] == lengths
        assert all(x < 0 for x in row["rewards"]["logprob"])


def test_bon_chooses_by_the_servers_log_probs_without_a_model(endpoint, tmp_path, capsys):
    url, server = endpoint
    out = tmp_path / "run"
    argv = command("bon", url, out, "--task", "game24", "--limit", "3", "-n", "4")
    assert main(argv) == 0
    for row in rows_of(out / "chosen.jsonl"):
        # the likeliest of those that ended
        assert (row["sample_id"], row["completion"]) == (1, "6 - 4 = 2 left: 2 12")
        assert "completion_ids" not in row
        assert row["logprob"] == pytest.approx(-0.8)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["model"] == "instruct"
    assert summary["settings"]["routes"] == {"sampling": "endpoint"}
    assert summary["tokens"]["sampled"] == 3 * 22
    # greedy: one completion a prompt at temperature 0
    assert [body["n"] for body in server.asked if body["temperature"] == 0] == [1, 1, 1]
    assert "sampling route 'endpoint'" in capsys.readouterr().out


def test_bon_rates_a_servers_text_by_a_model(endpoint, tmp_path):
    url, _ = endpoint
    out = tmp_path / "run"
    flags = ["--prompts", str(prompts_file(tmp_path, 2)), "-n", "4", "--scores", "scorer"]
    model = ["--model", "game24", "--device", "cpu"]
    assert main(command("bon", url, out, *flags, *model)) == 0
    tokenizer = load_tokenizer("game24")
    rated = rows_of(out / "scores.jsonl")
    for row, scores in zip(rows_of(out / "samples.jsonl"), rated, strict=True):
        # with the end of those that ended, which the server's text leaves out
        lengths = [
            len(tokenizer(text, add_special_tokens=False)["input_ids"]) + (reason == "stop")
            for text, reason in zip(row["completions"], row["finish_reasons"], strict=True)
        ]
        assert [len(tokens) for tokens in scores["logprob"]] == lengths
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
    assert json.loads((out / "summary.json").read_text())["settings"]["routes"]["scoring"] == "tree"


def test_the_key_comes_from_the_environment_and_stays_there(endpoint, tmp_path, monkeypatch, capfd):
    url, server = endpoint
    out = tmp_path / "s.jsonl"
    argv = command("sample", url, out, "--prompts", str(prompts_file(tmp_path)), "-n", "2")
    argv += ["--endpoint-key-env", "MY_KEY"]
    monkeypatch.delenv("MY_KEY", raising=False)
    assert main(argv) == 2
    assert "environment variable MY_KEY, which is not set" in capfd.readouterr().err
    monkeypatch.setenv("MY_KEY", "sk-never-written")
    # not sent to a host it was not named for
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another")
    assert main(argv) == 0
    assert {h["Authorization"] for h in server.headers} == {"Bearer sk-never-written"}
    assert "sk-" not in "".join(capfd.readouterr())
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"sk-" not in path.read_bytes()
    assert main([*argv[:-2], "--out", str(tmp_path / "none.jsonl")]) == 0
    assert "Authorization" not in server.headers[-1]


URL = "http://localhost:1/v1"
AT = ["--endpoint", URL, "--endpoint-model", "m"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "`model` must be given, or `--endpoint`, got neither"),
        (["--endpoint", URL], "`endpoint_model` must be given with `--endpoint`"),
        (["--model", "game24", "--endpoint-model", "m"], "must come with `--endpoint`"),
        ([*AT, "--engine", "vllm"], "give one of `--endpoint` and `--engine vllm`, got both"),
        (["--model", "game24", "--vllm", "a=1"], "`--vllm` must come with `--engine vllm`"),
        (["--model", "game24", "--engine", "vllm", "--vllm", "a"], "must be NAME=VALUE, got 'a'"),
        ([*AT, "--endpoint-prompts", "ids"], "`--endpoint-prompts ids` needs `--model`"),
        ([*AT, "--endpoint-tries", "0"], "`tries` of an endpoint must be positive"),
        ([*AT, "--endpoint-choices", "0"], "`choices` of an endpoint must be at least 1"),
        (["--endpoint", "https://u:p@h/v1", "--endpoint-model", "m"], "without user, password"),
        ([*AT, "--sampler", "mh"], "`--sampler` mh must run in transformers"),
        (
            ["--endpoint", "https://api.openai.com/v1", "--endpoint-model", "m"],
            "environment variable OPENAI_API_KEY, which is not set",
        ),
    ],
)
def test_engines_that_contradict_are_refused(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "--task", "game24", "--limit", "1", "--out", "s.jsonl", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_messages_need_a_tokenizer(endpoint, tmp_path, capsys):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": "hi"}]}) + "\n")
    assert main(command("sample", endpoint[0], tmp_path / "s.jsonl", "--prompts", str(path))) == 2
    assert (
        "there is no tokenizer to render them; give text, or `--model`" in capsys.readouterr().err
    )


def test_bon_with_a_scorer_needs_a_model(tmp_path, capsys):
    argv = command("bon", URL, tmp_path / "run", "--task", "game24", "--scores", "scorer")
    assert main(argv) == 2
    assert "`--scores scorer` needs `--model`" in capsys.readouterr().err
