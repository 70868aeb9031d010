import errno
import fcntl
import subprocess
import sys

import pytest

from sharpen.errors import InputError, RunError
from sharpen.runs import Journal, Run


def test_the_same_settings_go_on_and_others_are_refused_with_the_difference(tmp_path):
    path = tmp_path / "run" / "run.json"
    out = tmp_path / "run" / "samples.jsonl"
    with Run(path, {"n": 4, "seed": 0}, [out]):
        out.write_text("x\n")
    with Run(path, {"n": 4, "seed": 0}, [out]):
        pass
    with pytest.raises(RunError, match=r"other settings: n was 4, is 5; seed was 0, is None\. Use"):
        Run(path, {"n": 5}, [out])
    assert out.read_text() == "x\n"


def test_a_foreign_output_is_never_written_over(tmp_path):
    out = tmp_path / "samples.jsonl"
    out.write_text("precious\n")
    with pytest.raises(RunError, match=r"samples.jsonl' exists and was not made by this command"):
        Run(tmp_path / "run.json", {}, [out])
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]


def test_a_foreign_settings_file_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("not json")
    with pytest.raises(RunError, match="is not a settings file"):
        Run(tmp_path / "run.json", {}, [])


def test_two_processes_cannot_hold_one_run(tmp_path):
    code = (
        "import sys; from pathlib import Path; from sharpen.runs import Run\n"
        "from sharpen.errors import RunError\n"
        "try:\n    Run(Path(sys.argv[1]), {}, [])\n"
        "except RunError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run.json")]
    with Run(tmp_path / "run.json", {}, []):
        held = subprocess.run(command, capture_output=True, text=True, check=True)
    free = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "is in use by another process" in held.stdout
    assert free.stdout == ""


def test_an_impossible_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"`out` .* cannot be written"):
        Run(tmp_path / "file" / "run.json", {}, [])


@pytest.mark.parametrize("torn", ["", '{"a": 3', '{"a": 3}', "\x00\x00"], ids=repr)
def test_a_torn_last_line_is_cut_off_and_appending_goes_on(tmp_path, torn):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n' + torn)
    journal = Journal(path)
    assert journal.rows == [{"a": 1}, {"a": 2}]
    journal.append([{"a": 3}])
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'


def test_damage_before_the_end_is_told_not_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nbroken\n{"a": 2}\n')
    with pytest.raises(RunError, match=r"rows.jsonl:2: not a line this command wrote"):
        Journal(path)
    assert path.read_text().count("\n") == 3


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_works_and_says_so(tmp_path, monkeypatch, caplog, number):
    def no_lock(file, how):
        raise OSError(number, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    with Run(tmp_path / "run.json", {"a": 1}, []):
        assert (tmp_path / "run.json").exists()
    assert "without locks (Function not implemented)" in caplog.text
