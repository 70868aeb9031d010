"""The command line: `sharpen VERB --config FILE.yaml --flag value`.

Flags are the fields of the verb's options (`commands/options.py`). `--config` reads the same names
from a YAML file; flags on the command line override it, and unknown names are rejected. Exit codes:
0 done, 2 bad input (one line on stderr), 130 interrupted.

The code of a command, and with it PyTorch, is imported only once its flags are known to be good.
"""

import argparse
import importlib
import sys
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from .commands import options
from .console import log_to_stderr, quiet_libraries
from .errors import InputError, SharpenError
from .experiments.options import StudyConfig, TheoryConfig


class Verb(NamedTuple):
    """A command.

    Attributes:
        options: The dataclass of its flags; None for another program's command line.
        summary: What it does, in a line.
        module: Holds its `run(options)`, or `forward(argv)`; by default the verb's in `commands`.
        positional: The option that may come first without its flag.
    """

    options: type | None
    summary: str
    module: str | None = None
    positional: str | None = None


VERBS = {
    "bon": Verb(
        options.BonConfig,
        "sample N completions a prompt, keep what the model itself rates highest, report",
    ),
    "export": Verb(
        options.ExportConfig, "scored samples to the data sets that TRL's trainers take"
    ),
    "lm-eval": Verb(
        None, "lm-evaluation-harness with the model type `sharpen`; takes lm-eval's arguments"
    ),
    "parity": Verb(
        options.ParityConfig,
        "how far another engine's log-probs of given completions are from ours",
    ),
    "rlhf": Verb(options.RlhfConfig, "sample, pair, and fit reward differences: RLHF-Sharpening"),
    "sample": Verb(options.SampleConfig, "draw completions into a JSON lines file"),
    "score": Verb(options.ScoreConfig, "rate given completions under a model"),
    "serve": Verb(
        options.ServeConfig, "score over HTTP: OpenAI completions, rewards for trainers, metrics"
    ),
    "sft": Verb(options.SftConfig, "sample, choose the best of N, and fit it: SFT-Sharpening"),
    "study": Verb(
        StudyConfig,
        "compare every selector, sampler and trained model on one task",
        "sharpen.experiments.game24.run",
        positional="task",
    ),
    "tasks": Verb(options.TasksConfig, "list the tasks"),
    "theory": Verb(
        TheoryConfig,
        "prove the most probable completion of every prompt; coverage, margin, sample sizes",
        "sharpen.experiments.theory.run",
    ),
    "xpo": Verb(
        options.XpoConfig, "rounds of sampling from the model being trained, and fitting: XPO"
    ),
}
USAGE = "usage: sharpen VERB [--config FILE.yaml] [--flag value ...]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:8s}{verb.summary}" for name, verb in VERBS.items()]
        last = "`sharpen VERB --help` lists the flags."
        sys.stdout.write("\n".join([USAGE, "", *lines, "", last, ""]))
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        sys.stdout.write(f"sharpen {version('sharpen')}\n")
        return 0
    name, *rest = argv
    if name not in VERBS:
        sys.stderr.write(f"sharpen: `VERB` must be one of {', '.join(VERBS)}, got {name!r}.\n")
        return 2
    verb = VERBS[name]
    log_to_stderr()
    try:
        if verb.options is None:
            return _command(name).forward(rest)
        config = parse(name, rest)
        command = _command(name)
        quiet_libraries()
        command.run(config)
    except SharpenError as error:
        sys.stderr.write(f"sharpen: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("sharpen: interrupted; the same command goes on from here.\n")
        return 130
    return 0


def _command(name: str) -> types.ModuleType:
    return importlib.import_module(
        VERBS[name].module or f"sharpen.commands.{name.replace('-', '_')}"
    )


def parse(verb: str, argv: Sequence[str]) -> Any:
    """The options of `verb`, from flags over a YAML file.

    Raises:
        InputError: If the YAML file is unreadable or names an unknown option.
        SystemExit: With code 2 for an unknown or malformed flag, 0 for `--help`.
    """
    config_class, _, _, positional = VERBS[verb]
    assert config_class is not None, "another program's command line"
    if positional is not None and argv and not argv[0].startswith("-"):
        argv = [f"--{positional}", *argv]
    path, rest = _split_config(list(argv))
    names = {field.name for field in fields(config_class)}
    from_file = [] if path is None else _flags_of(path, names)
    given = vars(parser_of(verb).parse_args([*from_file, *rest]))
    return config_class(**{name: given[name] for name in names})


def parser_of(verb: str) -> argparse.ArgumentParser:
    """A flag for every field of the verb's options."""
    config_class = VERBS[verb].options
    assert config_class is not None, "another program's command line"
    parser = argparse.ArgumentParser(
        prog=f"sharpen {verb}",
        description=VERBS[verb].summary,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in fields(config_class):
        _add_flag(parser, field)
    parser.add_argument("--config", help="YAML file with the same names; flags override it")
    return parser


def _add_flag(parser: argparse.ArgumentParser, field: Field[Any]) -> None:
    """`--a_b` and `--a-b` of a field: a value, one of its choices, a switch, or a list."""
    names = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
    given: dict[str, Any] = {"help": field.metadata["help"]}
    if field.default is not MISSING:
        given["default"] = field.default
    elif field.default_factory is not MISSING:
        given["default"] = field.default_factory()
    else:
        given["required"] = True
    kind = field.type
    if get_origin(kind) is types.UnionType:
        (kind,) = [part for part in get_args(kind) if part is not types.NoneType]
    if get_origin(kind) is Literal:
        given["choices"] = get_args(kind)
    elif kind is bool:
        given |= {"type": _switch, "nargs": "?", "const": True}
    elif get_origin(kind) is list:
        given |= {"type": get_args(kind)[0], "nargs": "+"}
    else:
        given["type"] = kind
    parser.add_argument(*names, *field.metadata.get("aliases", ()), **given)


def _switch(text: str) -> bool:
    words = {"yes": True, "true": True, "t": True, "y": True, "1": True}
    words |= {"no": False, "false": False, "f": False, "n": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(words)}, got {text!r}")
    return words[text.lower()]


def _split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    path, rest, at = None, [], 0
    while at < len(argv):
        if argv[at] == "--config" and at + 1 < len(argv):
            path, at = argv[at + 1], at + 2
        elif argv[at].startswith("--config="):
            path, at = argv[at].partition("=")[2], at + 1
        else:
            rest.append(argv[at])
            at += 1
    return path, rest


def _flags_of(path: str, names: set[str]) -> list[str]:
    """A YAML file as flags, so that one parser checks every value."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"`config` {path!r} must be a readable YAML file ({reason}).") from error
    if not isinstance(data, dict):
        raise InputError(f"`config` {path!r} must hold `name: value` pairs.")
    unknown = [str(key) for key in data if key not in names]
    if unknown:
        raise InputError(
            f"`config` {path!r}: unknown option {', '.join(unknown)}; "
            f"known: {', '.join(sorted(names))}."
        )
    flags = []
    for key, value in data.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if any(isinstance(v, (list, dict)) for v in values):
            raise InputError(f"`config` {path!r}: `{key}` must be a plain value or a list of them.")
        flags += [f"--{key}", *map(str, values)]
    return flags


if __name__ == "__main__":
    sys.exit(main())
