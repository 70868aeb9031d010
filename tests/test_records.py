import json

import pytest

from sharpen.errors import InputError, RecordError
from sharpen.records import (
    check_completions,
    check_id,
    check_prompt,
    content_id,
    dump,
    read_prompts,
    read_rows,
    write_rows,
)


def write(tmp_path, data: bytes):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    return path


def test_rows_come_with_their_place_and_empty_lines_are_skipped(tmp_path):
    path = write(tmp_path, b'{"prompt": "a"}\n\n{"prompt": "b"}')
    assert list(read_rows(path)) == [
        (f"{path}:1", {"prompt": "a"}),
        (f"{path}:3", {"prompt": "b"}),
    ]


def test_byte_order_mark_is_not_part_of_the_text(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\n')
    assert [row for _, row in read_rows(path)] == [{"prompt": "a"}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"rows.jsonl:2: must be UTF-8, got byte 0xff"),
        (b'{"prompt": "a"}\n{"prompt": \n', r"rows.jsonl:2: must be one JSON object a line"),
        (b"[1, 2]\n", r"rows.jsonl:1: must be a JSON object, got list"),
        (b"[" * 100_000, r"rows.jsonl:1: must be one JSON object a line"),
        (b'{"text": "a"}\n', r"rows.jsonl:1: must have the field `prompt`, got text"),
        (b'{"prompt": ""}\n', r"rows.jsonl:1: `prompt` must not be empty"),
        (b'{"prompt": 3}\n', r"rows.jsonl:1: `prompt` must be text, got int"),
        (b'{"prompt": "\\ud800"}\n', r"rows.jsonl:1: `prompt` must be valid Unicode"),
        (b'{"prompt": []}\n', r"rows.jsonl:1: `prompt` must hold at least one message"),
        (b'{"prompt": [{"role": "user"}]}\n', r"rows.jsonl:1: each message of `prompt`"),
        (
            b'{"prompt": "a", "prompt_id": "x"}\n{"prompt": "b", "prompt_id": "x"}\n',
            r"rows.jsonl:2: `prompt_id` must be unique, got 'x' again \(first at .*:1\)",
        ),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[11:45],
)
def test_bad_records_are_named(tmp_path, data, message):
    with pytest.raises(RecordError, match=message):
        read_prompts(write(tmp_path, data))


def test_missing_file_and_empty_file_are_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read '.*none.jsonl': No such file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        read_prompts(tmp_path)
    with pytest.raises(InputError, match="must hold at least one prompt, got none"):
        read_prompts(write(tmp_path, b"\n"))


def test_prompt_ids_follow_the_content_not_the_line(tmp_path):
    first = read_prompts(write(tmp_path, b'{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "a"}\n'))
    second = read_prompts(write(tmp_path, b'{"prompt": "b"}\n{"prompt": "a"}\n'))
    assert [r.id for r in second] == [first[1].id, first[0].id]
    assert first[2].id == first[0].id + "-2"
    assert len({r.id for r in first}) == 3


def test_numbers_json_cannot_say_are_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump({"reward": float("nan")})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.jsonl"
    write_rows(path, [{"a": 1}])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_rows(path, [{"a": 2}, {"a": float("inf")}])
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400 + ".0"])
def test_a_number_that_json_cannot_say_is_named_where_it_is_read(tmp_path, value):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"meta": 1e30}\n{"meta": {"deep": [' + value + "]}}\n")
    rows = read_rows(path)
    assert next(rows)[1] == {"meta": 1e30}
    with pytest.raises(RecordError, match=r"rows.jsonl:2: .*write null"):
        next(rows)


def test_half_of_a_surrogate_pair_is_passed_on_as_it_was_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    line = b'{"meta": "\\ud800", "text": "\\u00e9"}\n'
    path.write_bytes(line)
    ((_, row),) = read_rows(path)
    write_rows(path, [row])
    assert path.read_bytes() == line


def test_columns_of_null_are_not_there(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "prompt_id": null}\n{"prompt": "b", "prompt_id": 7}\n')
    assert [record.id for record in read_prompts(path)] == [content_id("a"), "7"]
    row = {"completion": None, "completions": ["x"]}
    assert check_completions("here", row) == ["x"]
    assert check_completions("here", {"completion": "x", "completions": None}) == ["x"]
    for bad in (
        {"completion": None},
        {"completion": "x", "completions": ["x"]},
    ):
        with pytest.raises(RecordError, match="must have one of"):
            check_completions("here", bad)
    with pytest.raises(RecordError, match="must have the field `prompt`"):
        check_prompt("here", {"prompt": None})
    with pytest.raises(RecordError, match="`prompt_id` must be text, got bool"):
        check_id("here", True)
