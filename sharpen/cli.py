"""The command line: `sharpen VERB --config FILE.yaml --flag value`.

Flags are the fields of the verb's config dataclass. `--config` reads the same names from a
YAML file; flags on the command line override it, and unknown names are refused. Exit codes:
0 done, 2 bad input (one line on stderr), 130 interrupted.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from .console import log_to_stderr, quiet_libraries
from .errors import InputError, SharpenError

VERBS = {
    "bon": "sample N completions a prompt, keep what the model itself rates highest, report",
    "export": "scored samples to the data sets that TRL's trainers take",
    "lm-eval": "lm-evaluation-harness with the model type `sharpen`; takes lm-eval's arguments",
    "parity": "how far another engine's log-probs of given completions are from ours",
    "rlhf": "sample, pair, and fit reward differences: RLHF-Sharpening",
    "sample": "draw completions into a JSON lines file",
    "score": "rate given completions under a model",
    "serve": "score over HTTP: OpenAI completions, rewards for trainers, metrics",
    "sft": "sample, choose the best of N, and fit it: SFT-Sharpening",
    "study": "compare every selector, sampler and trained model on one task",
    "tasks": "list the tasks",
    "theory": "prove the most probable completion of every prompt; coverage, margin, sample sizes",
    "xpo": "rounds of sampling from the model being trained, and fitting: XPO",
}
USAGE = "usage: sharpen VERB [--config FILE.yaml] [--flag value ...]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        sys.stdout.write(f"sharpen {version('sharpen')}\n")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        sys.stderr.write(f"sharpen: `VERB` must be one of {', '.join(VERBS)}, got {verb!r}.\n")
        return 2
    log_to_stderr()
    try:
        command = _command(verb)
        if hasattr(command, "forward"):
            # another program's command line: its own flags, its own exit code
            return command.forward(rest)
        config = parse(verb, rest)
        quiet_libraries()
        command.run(config)
    except SharpenError as error:
        sys.stderr.write(f"sharpen: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("sharpen: interrupted; the same command goes on from here.\n")
        return 130
    return 0


def _command(verb: str) -> ModuleType:
    return importlib.import_module(f"sharpen.commands.{verb.replace('-', '_')}")


def parse(verb: str, argv: Sequence[str]) -> Any:
    """The config of `verb`, from flags over a YAML file.

    Raises:
        InputError: If the YAML file is unreadable or names an unknown option.
        SystemExit: With code 2 for an unknown or malformed flag, 0 for `--help`.
    """
    from transformers import HfArgumentParser

    command = _command(verb)
    config_class = getattr(command, f"{verb.capitalize()}Config")
    first = getattr(command, "POSITIONAL", None)
    if first is not None and argv and not argv[0].startswith("-"):
        argv = [f"--{first}", *argv]
    types = {field: field.type for field in fields(config_class)}
    parser = HfArgumentParser(
        [config_class], prog=f"sharpen {verb}", description=VERBS[verb], allow_abbrev=False
    )
    # it strips `| None` from the dataclass itself, and so from every class that shares the field
    for field, kind in types.items():
        field.type = kind
    parser.add_argument("--config", help="YAML file with the same names; flags override it")
    path, rest = _split_config(list(argv))
    names = {field.name for field in fields(config_class)}
    from_file = [] if path is None else _flags_of(path, names)
    (config,) = parser.parse_args_into_dataclasses([*from_file, *rest], look_for_args_file=False)[
        :1
    ]
    return config


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


def _help() -> str:
    lines = [f"  {verb:8s}{what}" for verb, what in VERBS.items()]
    return "\n".join([USAGE, "", *lines, "", "`sharpen VERB --help` lists the flags.", ""])


if __name__ == "__main__":
    sys.exit(main())
