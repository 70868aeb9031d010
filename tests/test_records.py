import json

import pytest

from sharpen.errors import InputError, RecordError
from sharpen.records import dump, read_prompts, read_rows, write_rows


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
