"""Records on disk: read strictly, written so that a file is whole or not there.

    read_rows, read_prompts     JSON lines to records
    check_prompt, check_...     one field of a record, or an error that says FILE:LINE
    write_rows, write_table     JSON lines; parquet too

Field names are TRL's: `prompt` (text, or a list of messages), `completion`, and `completions`
for all the samples of one prompt. Token ids travel beside the text (`prompt_ids`,
`completion_ids`), so that nothing is ever tokenised twice.
"""

import hashlib
import importlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from .errors import InputError, RecordError, require

Row = dict[str, Any]
# a message has text as its content, or null beside calls of tools
Messages = list[dict[str, Any]]
# what a record says to the chat template beside its messages
TEMPLATE_FIELDS = ("tools", "documents", "chat_template_kwargs")
# a number of so many digits before its point, or such an exponent, may be above every float
LARGE = re.compile(r"[eE]\+?\d{3}|\d{300}")
# options of rendering that are not the record's to set
OURS = {"tokenize", "add_generation_prompt", "continue_final_message", "chat_template", "messages"}
TEXT_PARTS = ("text", "input_text", "output_text")
# how a data set can be written
TABLES = (".jsonl", ".parquet")
NO_PARQUET = (
    "`out` as .parquet needs pyarrow, got {error}; "
    'run `pip install "sharpen[data]"`, or write .jsonl.'
)


def dump(row: Row) -> str:
    """One line of JSON, with its newline; NaN and infinity are refused.

    Raises:
        ValueError: If a number is not finite.
    """
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    # half of a surrogate pair in a field that is passed on: written as it was read
    except UnicodeEncodeError:
        text = json.dumps(row, allow_nan=False)
    return text + "\n"


def read_rows(path: str | Path) -> Iterator[tuple[str, Row]]:
    """Every record of a JSON lines file with its place, `FILE:LINE`. Empty lines are skipped.

    Raises:
        InputError: If the file cannot be opened.
        RecordError: If a line is not UTF-8, not JSON, or not an object.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below; opening has its own error)
    except OSError as error:
        raise InputError(
            f"cannot read {str(path)!r}: {error.strerror}; check the path and its permissions."
        ) from error
    with file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parse(f"{path}:{number}", line)
        except OSError as error:
            raise InputError(f"cannot read {str(path)!r}: {error.strerror}.") from error


def _parse(place: str, line: bytes) -> Row:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(
            f"{place}: must be UTF-8, got byte 0x{line[error.start]:02x} at column "
            f"{error.start + 1}; re-encode the file."
        ) from error
    try:
        # a callback for every number is slow, and few lines hold one that may be too large
        parse_float = _finite if LARGE.search(text) else None
        row = json.loads(text, parse_constant=_no_constant, parse_float=parse_float)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{place}: must be one JSON object a line, got {error}.") from error
    if not isinstance(row, dict):
        raise RecordError(
            f"{place}: must be a JSON object, got {type(row).__name__}; "
            'write one object a line, such as {"prompt": "..."}.'
        )
    return row


def _no_constant(name: str) -> object:
    raise ValueError(f"{name}, which is no number of JSON; write null")


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text}, which no float holds; write null, or text")
    return value


def has(row: Row, name: str) -> bool:
    """Whether a record has a field: one that is null, as a table writes it, is not there."""
    return row.get(name) is not None


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file or nothing: to a neighbour, flushed to disk, then renamed over."""
    path = Path(path)
    neighbour = path.with_name(f".{path.name}.part")
    with open(neighbour, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(neighbour, path)


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write a whole JSON lines file or nothing."""
    write_text(path, "".join(map(dump, rows)))


def check_table(path: Path) -> None:
    """Reject a file that `write_table` could not write, before anything is computed.

    Raises:
        InputError: If its suffix is neither `.jsonl` nor `.parquet`, or parquet has no library.
    """
    if path.suffix not in TABLES:
        raise InputError(f"`out` must end in {' or '.join(TABLES)}, got {str(path)!r}.")
    if path.suffix == ".parquet":
        require("pyarrow.parquet", NO_PARQUET)


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write a whole file or nothing; the same rows make the same bytes with one pyarrow.

    Args:
        path: Ends in `.jsonl` or `.parquet`, as `check_table` wants it.
        rows: At least one: a column has the type that its values have.
    """
    if path.suffix == ".jsonl":
        write_rows(path, rows)
        return
    arrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    neighbour = path.with_name(f".{path.name}.part")
    parquet.write_table(arrow.Table.from_pylist(list(rows)), neighbour)
    with open(neighbour, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(neighbour, path)


def check_text(place: str, field: str, value: object) -> str:
    """`value` if it is text that can be written as UTF-8.

    Raises:
        RecordError: If it is not text, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise RecordError(f"{place}: `{field}` must be text, got {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{place}: `{field}` must be valid Unicode, got a lone surrogate at character "
            f"{error.start}; re-encode the text."
        ) from error
    return value


def check_id(place: str, value: object) -> str:
    """A `prompt_id` as text; a whole number is taken for its digits.

    Raises:
        RecordError: If it is neither.
    """
    return str(value) if type(value) is int else check_text(place, "prompt_id", value)


def check_prompt(place: str, row: Row) -> str | Messages:
    """The `prompt` of a record: non-empty text, or a non-empty list of messages.

    Raises:
        RecordError: If it is missing, empty or of another shape.
    """
    if not has(row, "prompt"):
        raise RecordError(
            f"{place}: must have the field `prompt`, got {', '.join(row) or 'no fields'}."
        )
    prompt = row["prompt"]
    if isinstance(prompt, list):
        return _check_messages(place, prompt)
    if not check_text(place, "prompt", prompt):
        raise RecordError(f"{place}: `prompt` must not be empty; give text or messages.")
    return prompt


def _check_messages(place: str, messages: list[object]) -> Messages:
    if not messages:
        raise RecordError(f"{place}: `prompt` must hold at least one message, got an empty list.")
    checked = []
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise RecordError(
                f"{place}: each message of `prompt` must be an object with `role` and `content`."
            )
        message = _plain(message)
        check_text(place, "role", message["role"])
        checked.append(message | {"content": _content(place, message)})
    return checked


def _content(place: str, message: Row) -> str | None:
    """The text of a message: as it is, of its parts end to end, or None beside calls of tools."""
    content = message["content"]
    if content is None and message.get("tool_calls"):
        return None
    if not isinstance(content, list):
        return check_text(place, "content", content)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in TEXT_PARTS:
            raise RecordError(
                f"{place}: `content` must be text or parts of text, got a part of type {kind!r}; "
                "sharpen reads text alone."
            )
        texts.append(check_text(place, "text", part.get("text")))
    return "".join(texts)


# whatever a message holds: arrays in it, as parquet and data sets have them, become lists
def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def template_fields(place: str, row: Row) -> dict[str, Any]:
    """What a record says to the chat template: `tools`, `documents`, `chat_template_kwargs`.

    Raises:
        RecordError: If one has another shape, or names what is not the record's to say.
    """
    found: dict[str, Any] = {}
    for name in TEMPLATE_FIELDS:
        if not has(row, name):
            continue
        value, wanted = _plain(row[name]), dict if name == "chat_template_kwargs" else list
        if not isinstance(value, wanted):
            raise RecordError(
                f"{place}: `{name}` must be {'an object' if wanted is dict else 'a list'}, got "
                f"{type(value).__name__}."
            )
        found |= value if wanted is dict else {name: value}
    for name in OURS & found.keys():
        raise RecordError(
            f"{place}: `chat_template_kwargs` must leave `{name}` to sharpen; take it out."
        )
    return found


def check_completions(place: str, row: Row) -> list[str]:
    """The texts of a record's `completions`, or of its one `completion`.

    Raises:
        RecordError: If it has neither or both, or one is neither text nor an assistant's turn.
    """
    if has(row, "completion") == has(row, "completions"):
        got = "both" if has(row, "completion") else f"only {', '.join(row)}"
        raise RecordError(f"{place}: must have one of `completion` and `completions`, got {got}.")
    values = [row["completion"]] if has(row, "completion") else row["completions"]
    if not isinstance(values, list):
        raise RecordError(
            f"{place}: `completions` must be a list, got {type(values).__name__}; "
            "a single one goes into `completion`."
        )
    return [_completion_text(place, value) for value in values]


def _completion_text(place: str, value: object) -> str:
    """Text, or the content of one message, which is TRL's conversational form."""
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or "content" not in value[0]:
            raise RecordError(f"{place}: `completion` as messages must be one with `content`.")
        value = value[0]["content"]
    return check_text(place, "completion", value)


def completion_as(prompt: str | Messages, text: str) -> str | Messages:
    """A completion in the form of its prompt: text, or an assistant's turn beside messages.

    A chat template is then applied once, by TRL.
    """
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def check_ids(place: str, field: str, value: object) -> list[int]:
    """`value` if it is a list of token ids.

    Raises:
        RecordError: If it is anything else.
    """
    if not isinstance(value, list) or any(type(i) is not int for i in value):
        raise RecordError(f"{place}: `{field}` must be a list of integers.")
    return value


@dataclass(frozen=True)
class PromptRecord:
    """One prompt of a file: where it stands, its name, what it says, and what to its template."""

    place: str
    id: str
    prompt: str | Messages
    template: dict[str, Any] = field(default_factory=dict)


def content_id(value: object) -> str:
    """A short name for `value` that depends on nothing but its content."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def file_digest(path: str | Path) -> str:
    """The content of a file in 32 hexadecimal digits (BLAKE2b)."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_prompts(path: str | Path) -> list[PromptRecord]:
    """All prompts of a file, each with a unique id.

    The id is the record's own `prompt_id`, or else made from the content of the prompt, so it
    does not change when other lines come or go; the second prompt of equal content gets "-2".

    Raises:
        InputError: If the file cannot be read or holds no prompt.
        RecordError: If a record is bad, or two records share a `prompt_id`.
    """
    records: list[PromptRecord] = []
    seen: dict[str, str] = {}
    copies: dict[str, int] = {}
    for place, row in read_rows(path):
        prompt = check_prompt(place, row)
        template = {} if isinstance(prompt, str) else template_fields(place, row)
        if has(row, "prompt_id"):
            prompt_id = check_id(place, row["prompt_id"])
        else:
            base = content_id([prompt, template] if template else prompt)
            copies[base] = copies.get(base, 0) + 1
            prompt_id = base if copies[base] == 1 else f"{base}-{copies[base]}"
        if prompt_id in seen:
            raise RecordError(
                f"{place}: `prompt_id` must be unique, got {prompt_id!r} again "
                f"(first at {seen[prompt_id]})."
            )
        seen[prompt_id] = place
        records.append(PromptRecord(place, prompt_id, prompt, template))
    if not records:
        raise InputError(f"{str(path)!r} must hold at least one prompt, got none.")
    return records
