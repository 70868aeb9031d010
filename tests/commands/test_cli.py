"""The command line: frozen names, YAML under flags, every bad input one clear line."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from helpers.frozen_options import CHOICES, FORWARDED, MUST, OPTIONS
from sharpen.cli import VERBS, main, parse, parser_of
from sharpen.commands.options import REWARDS, REWARDS_WITHOUT_ANSWERS, ServeConfig
from sharpen.scoring import rewards
from sharpen.server.state import ServerLimits

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("verb", OPTIONS)
def test_options_are_frozen(verb):
    given = [f"--{name}=x" for name in MUST if name in OPTIONS[verb]] + CHOICES.get(verb, [])
    assert sorted(vars(parse(verb, given))) == sorted(OPTIONS[verb])


@pytest.mark.parametrize("verb", OPTIONS)
def test_flags_are_those_that_transformers_makes_of_the_same_dataclass(verb):
    kinds = {field: field.type for field in fields(VERBS[verb].options)}
    theirs = HfArgumentParser(
        VERBS[verb].options,
        prog=f"sharpen {verb}",
        description=VERBS[verb].summary,
        allow_abbrev=False,
    )
    # it strips `| None` from the dataclass itself
    for field, kind in kinds.items():
        field.type = kind
    theirs.add_argument("--config", help="YAML file with the same names; flags override it")
    ours = parser_of(verb)
    assert ours.format_help() == theirs.format_help()
    for mine, other in zip(ours._actions, theirs._actions, strict=True):
        names = ("option_strings", "dest", "nargs", "const", "default", "required")
        assert [getattr(mine, x) for x in names] == [getattr(other, x) for x in names]
        if mine.type in (int, float) or other.type in (int, float):
            assert mine.type is other.type


LIGHT = """
import sys
from sharpen.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
heavy = {"torch", "transformers", "numpy", "sharpen_kernels"} & sys.modules.keys()
assert not heavy, heavy
sys.exit(code)
"""


@pytest.mark.parametrize("verb", [*OPTIONS, None])
def test_help_and_a_wrong_option_import_neither_torch_nor_transformers(verb):
    argv = [] if verb is None else [verb]
    for flag, code in (("--help", 0), ("--no-such-option", 2)):
        done = subprocess.run(
            [sys.executable, "-c", LIGHT, *argv, flag], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == code, done.stderr


def test_the_options_know_rewards_and_limits_by_heart():
    assert tuple(rewards.REWARDS) == REWARDS
    without = [name for name in REWARDS if not rewards.options_needed(name)]
    assert tuple(without) == REWARDS_WITHOUT_ANSWERS
    config, limits = ServeConfig(model="m"), ServerLimits()
    for field in fields(ServerLimits):
        assert getattr(config, field.name) == getattr(limits, field.name)


@pytest.mark.parametrize(
    "value", [["--token-stats"], ["--token-stats=yes"], ["--token_stats", "1"]]
)
def test_a_switch_takes_a_word_or_none(value, capsys):
    given = ["--model", "m", "--input", "i", "--out", "o"]
    assert not parse("score", given).token_stats
    assert parse("score", [*given, *value]).token_stats
    assert not parse("score", [*given, *value, "--token-stats", "No"]).token_stats
    with pytest.raises(SystemExit):
        parse("score", [*given, "--token-stats", "maybe"])
    assert "must be one of yes, true, t, y, 1, no, false" in capsys.readouterr().err


def test_yaml_gives_values_and_flags_override_them(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: game24\nout: here\nn: 7\ntemperature: 0.5\ntask: null\n")
    config = parse("bon", ["--config", str(path), "-n", "9", "--max-new-tokens", "5"])
    assert (config.model, config.n, config.temperature) == ("game24", 9, 0.5)
    assert (config.task, config.max_new_tokens) == (None, 5)
    assert parse("bon", [f"--config={path}"]).n == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: game24\n", "unknown option modle; known: allow_pickle, device"),
        ("- model\n", "must hold `name: value` pairs"),
        ("model: [\n", "must be a readable YAML file"),
        ("n: {a: 1}\n", "`n` must be a plain value"),
        (None, "must be a readable YAML file"),
    ],
)
def test_bad_yaml_is_refused(tmp_path, capsys, text, message):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["bon", "--config", str(path), "--model", "game24", "--out", "x"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["bon", "--modle", "game24"],
        ["bon", "--model", "game24"],
        ["bon", "--model", "game24", "--out", "x", "-n", "many"],
        ["score", "--model", "game24", "--input", "a", "--out", "b", "--dtype", "int8"],
        ["bon", "--model", "game24", "--out", "x", "--scores", "guessed"],
    ],
    ids=" ".join,
)
def test_unknown_and_malformed_flags_exit_with_two(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def write(path, *lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines) + b"\n")


GOOD = json.dumps({"prompt": "Numbers: 1 2 3 4 Target: 24\n", "completion": "1 + 2 = 3"})
BON = ["bon", "--model", "game24", "--out", "out", "--max-new-tokens", "8", "-n", "2"]
SCORE = ["score", "--model", "game24", "--input", "in.jsonl", "--out", "out"]
FROM_FILE = [*BON, "--prompts", "in.jsonl"]


@pytest.mark.parametrize(
    ("argv", "lines", "message"),
    [
        pytest.param(FROM_FILE, None, "cannot read 'in.jsonl': No such file", id="no-file"),
        pytest.param(FROM_FILE, [GOOD, b"\xff"], "in.jsonl:2: must be UTF-8", id="not-utf8"),
        pytest.param(FROM_FILE, [GOOD, "{"], "in.jsonl:2: must be one JSON", id="not-json"),
        pytest.param(FROM_FILE, ['{"text": "a"}'], "in.jsonl:1: must have the field", id="field"),
        pytest.param(FROM_FILE, ['{"prompt": ""}'], "in.jsonl:1: `prompt` must not", id="empty"),
        pytest.param(
            FROM_FILE,
            ['{"prompt": [{"role": "user", "content": "a"}]}'],
            "in.jsonl:1: `prompt` holds messages, but the model's tokenizer has no chat template",
            id="messages",
        ),
        pytest.param(
            FROM_FILE,
            [json.dumps({"prompt": "1 " * 1100})],
            "in.jsonl:1: prompt and completion must fit the model's context of 1024",
            id="prompt-too-long",
        ),
        pytest.param([*BON, "--task", "game25"], None, "`task` must be one of game24", id="task"),
        pytest.param(
            [*BON, "--task", "game24", "--split", "dev"],
            None,
            "`split` must be one of base, sharpen, test, free",
            id="split",
        ),
        pytest.param(
            [*BON, "--task", "game24", "--split", "sharpen+dev"],
            None,
            "for task game24, got 'dev'",
            id="split-of-two",
        ),
        pytest.param(BON, None, "give one of `--task` and `--prompts`, got neither", id="neither"),
        pytest.param([*FROM_FILE, "--task", "game24"], [GOOD], "`--prompts`, got both", id="both"),
        pytest.param([*FROM_FILE, "-n", "0"], [GOOD], "`n` must be at least 1, got 0", id="n-zero"),
        pytest.param(
            [*FROM_FILE, "--reward", "beauty"], [GOOD], "`reward` must be one of", id="reward"
        ),
        pytest.param(
            [*FROM_FILE, "--reward", "majority"],
            [GOOD],
            "`reward` majority needs answers, which only a task can extract",
            id="majority",
        ),
        pytest.param(
            [*FROM_FILE, "--reward", "neg_entropy"],
            [GOOD],
            "needs entropy, which sampling does not keep; add `--scores scorer`",
            id="needs",
        ),
        pytest.param(
            [*FROM_FILE, "--model", "./no/such/model"],
            [GOOD],
            "where no such folder exists",
            id="no-model",
        ),
        pytest.param(
            [*FROM_FILE, "--max-tokens", "0"], [GOOD], "`max_tokens` must be at least", id="budget"
        ),
        pytest.param([*SCORE, "--rewards", "x"], [GOOD], "`rewards` must be among", id="rewards"),
        pytest.param(SCORE, [GOOD, '{"prompt": "1"}'], "in.jsonl:2: must have one of", id="no-c"),
        pytest.param(
            SCORE,
            [GOOD, '{"prompt": "1", "completions": "1"}'],
            "in.jsonl:2: `completions` must be a list, got str",
            id="not-a-list",
        ),
        pytest.param(
            SCORE,
            ['{"prompt": "1", "completion": "", "completion_ids": [214]}'],
            "in.jsonl:1: token ids must be in [0, 214), got 214 at position 0",
            id="vocabulary",
        ),
        pytest.param(
            SCORE,
            [json.dumps({"prompt": "1", "completion": "1 " * 1100})],
            "in.jsonl:1: prompt and completion must fit the model's context of 1024",
            id="context",
        ),
        pytest.param(
            SCORE,
            ['{"prompt": "1", "completion": "a", "completion_ids": ["a"]}'],
            "in.jsonl:1: `completion_ids` must be a list of integers",
            id="ids",
        ),
        pytest.param(SCORE, [""], "must hold at least one record", id="no-records"),
    ],
)
def test_bad_input_is_one_line_exit_two_and_nothing_written(
    argv, lines, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    if lines is not None:
        write(tmp_path / "in.jsonl", *lines)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1, error
    assert error.startswith("sharpen: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_file_that_is_not_ours_is_never_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", GOOD)
    (tmp_path / "out").write_text("precious")
    assert main(SCORE) == 2
    assert "exists and was not made by this command" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "precious"


def test_tasks_are_listed(capsys):
    assert main(["tasks"]) == 0
    assert "splits: base 800, sharpen 250, test 312, free 12000" in capsys.readouterr().out


def test_help_and_unknown_verbs(capsys):
    assert main(["--help"]) == 0
    assert "sharpen VERB" in capsys.readouterr().out
    assert main(["bno"]) == 2
    verbs = ", ".join(sorted([*OPTIONS, *FORWARDED]))
    assert f"`VERB` must be one of {verbs}, got 'bno'" in capsys.readouterr().err
    assert main([]) == 2


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "sharpen", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("sharpen 0.")
