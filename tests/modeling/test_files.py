"""JSON and JSON Lines that are written completely or not at all, digests, and locks."""

import errno
import gzip
import signal
import subprocess
import sys
from threading import Event, Thread

import pytest

from modeling_cosup import files_cosup
from modeling_cosup.files_cosup import digest, digest_all, digest_file, locked, read_json, write_json
from modeling_cosup.lines_cosup import lines_with_places, read_lines, write_lines, writing_lines
from trainer.judging.results import write_results

HOLD_LOCK = """
import sys, time
from pathlib import Path
from modeling_cosup.files_cosup import locked
with locked(Path(sys.argv[1]), "held"):
    print("locked", flush=True)
    time.sleep(600)
"""
ROWS = [{"id": "ä", "text": "[NSP] \u2028 line"}, {"id": "b"}]


def test_reading_and_writing_files_needs_neither_torch_nor_numpy():
    code = "import sys, modeling_cosup.files_cosup; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout == "set()\n"


@pytest.mark.parametrize("name", ["rows.jsonl", "folder/rows.jsonl.gz", "ROWS.JSONL.GZ"])
def test_lines_are_read_as_they_were_written(name, tmp_path):
    path = tmp_path / name
    write_lines(path, ROWS)
    assert read_lines(path) == ROWS
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == name.lower().endswith(".gz")
    assert list(lines_with_places(path))[1] == (f"{path}, line 2", {"id": "b"})
    before = path.read_bytes()
    write_lines(path, iter(ROWS))
    assert path.read_bytes() == before  # no time of day in a .gz
    with writing_lines(None) as write:
        write(ROWS[0])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_that_was_not_completely_written_is_not_there(tmp_path):
    def failing_rows():
        yield ROWS[0]
        raise RuntimeError("no more rows")

    with pytest.raises(RuntimeError):
        write_lines(tmp_path / "rows.jsonl", failing_rows())
    write_json(tmp_path / "value.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "value.json", {"a": object()})
    assert read_json(tmp_path / "value.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_no_file_holds_a_number_that_json_does_not_have(number, tmp_path):
    """`NaN` and `Infinity` are no JSON: other readers than Python's refuse the whole file."""
    write_json(tmp_path / "value.json", {"a": 1})
    with pytest.raises(ValueError, match=rf"value.json: runs.1.loss is {number}, which JSON does not have"):
        write_json(tmp_path / "value.json", {"runs": [{"loss": 1.5}, {"loss": number}]})
    assert read_json(tmp_path / "value.json") == {"a": 1}
    results = {"validation": {"eval_loss": number, "eval_num_queries": 3}}
    write_results(tmp_path / "value.json", results)
    assert read_json(tmp_path / "value.json") == {
        "validation": {"eval_loss": None, "eval_num_queries": 3},
        "not_finite": {"validation.eval_loss": str(number)},
    }


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_two_writers_of_one_file_do_not_disturb_each_other(name, tmp_path):
    path = tmp_path / name
    with writing_lines(path) as first:
        first({"writer": 1})
        with writing_lines(path) as second:
            second({"writer": 2})
        assert read_lines(path) == [{"writer": 2}]
        first({"writer": 1})
    assert read_lines(path) == [{"writer": 1}, {"writer": 1}]
    assert [file.name for file in tmp_path.iterdir()] == [name]
    (tmp_path / "ordinary").touch()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.json", b'{"a": ', "cut.json: malformed JSON"),
        ("latin.json", b'"\xe4"', "latin.json: malformed JSON"),
        ("cut.json.gz", gzip.compress(b'{"a": 1}', mtime=0)[:-9], "cut.json.gz is damaged: "),
        ("plain.json.gz", b"{}", "plain.json.gz is damaged: "),
        ("cut.jsonl", b'{}\n\n{"a": ', "cut.jsonl, line 3: malformed JSON"),
        ("list.jsonl", b"[1]\n", "list.jsonl, line 1: found list, expected a JSON object"),
        ("deep.json", b"[" * 100_000, "deep.json: malformed JSON .it is nested too deeply"),
        ("long.json", b"1" * 5000, "long.json: malformed JSON .an integer has too many digits"),
        ("deep.jsonl", b"{}\n" + b"[" * 100_000, "deep.jsonl, line 2: malformed JSON .it is nested too deeply"),
        ("long.jsonl", b"{}\n" + b"1" * 5000, "long.jsonl, line 2: malformed JSON .an integer has too many digits"),
        ("cut.jsonl.gz", gzip.compress(b"{}\n" * 9, mtime=0)[:-9], "cut.jsonl.gz is damaged: "),
    ],
)
def test_damage_is_reported_with_its_place(name, content, message, tmp_path):
    read = read_lines if ".jsonl" in name else read_json
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none is not a file"):
        read(tmp_path / "none")


def test_byte_order_marks_are_read(tmp_path):
    """Windows programs write them; two such files that are joined have one in the middle."""
    (tmp_path / "value.json").write_text('{"a": "\ufeff"}', encoding="utf-8-sig")
    assert read_json(tmp_path / "value.json") == {"a": "\ufeff"}
    (tmp_path / "rows.jsonl").write_bytes(2 * '{"a": 1}\n'.encode("utf-8-sig"))
    assert read_lines(tmp_path / "rows.jsonl") == [{"a": 1}, {"a": 1}]


def test_digests(tmp_path):
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1, "b": [2]}) != digest({"a": 1, "b": [3]})
    assert len(digest(ROWS)) == 64
    # as in sequence_bias of transformers
    assert digest([{(7,): -1.0, (7, 8): 2.0}]) == digest([{"(7, 8)": 2.0, "(7,)": -1.0}])
    assert digest([{(7,): -1.0}]) != digest([{(8,): -1.0}])
    assert digest_all(iter(ROWS)) == digest_all(ROWS)
    assert digest_all(ROWS) != digest_all(ROWS[::-1])
    assert digest_all(["a", "b"]) != digest_all(["ab"])
    (tmp_path / "file").write_bytes(b"abc")
    assert digest_file(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_lock_is_held_by_one(tmp_path):
    path = tmp_path / "lock"
    with locked(path, "held"), pytest.raises(ValueError, match="^held$"):
        with locked(path, "held"):
            pass
    with locked(path, "held"):
        path.unlink()  # its holder may remove it
    with locked(path, "held"):
        pass


def test_a_lock_is_released_when_its_process_dies(tmp_path):
    command = [sys.executable, "-c", HOLD_LOCK, tmp_path / "lock"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match="held"), locked(tmp_path / "lock", "held"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with locked(tmp_path / "lock", "held"):
        pass


def test_a_waiter_holds_the_lock_even_if_the_previous_holder_removed_the_file(tmp_path, capsys):
    path = tmp_path / "lock"
    entered, may_leave = Event(), Event()

    def wait_and_hold():
        with locked(path, "held", on_wait=print):
            entered.set()
            may_leave.wait(60)

    thread = Thread(target=wait_and_hold)
    with locked(path, "held"):
        thread.start()
        assert not entered.wait(0.3)
        path.unlink()
    assert entered.wait(60)
    assert capsys.readouterr().out == "held\n"
    with pytest.raises(ValueError, match="held"), locked(path, "held"):
        pass
    may_leave.set()
    thread.join()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_written_without_one(tmp_path, monkeypatch, code):
    def fails(file, operation):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(files_cosup.fcntl, "flock", fails)
    with files_cosup.locked(tmp_path / "lock", "busy") as descriptor:
        assert descriptor is None
    monkeypatch.setattr(files_cosup, "WITHOUT_LOCKS", ())
    with pytest.raises(OSError, match="no locks here"), files_cosup.locked(tmp_path / "lock", "busy"):
        pass
