"""
The record of a check: its own JSON file, `OUT/<part>/<check>.json`, which says what became of the check.

A record has the name and the order of the check, its status, and, once it ran, its result and the machine:

    status      meaning
    not run     the check has not been reached
    left        it did not fit into the time that was left, and is for the next call
    begun       it runs; or, if nothing runs any more, it never ended
    done        `result` holds what it returned
    failed      `reason` says why: what missed its bound, or the error and below it where it was raised
    skipped     `reason` says what the check needs and did not find
"""

from pathlib import Path
from typing import Any

from modeling_cosup.files_cosup import read_json
from trainer.judging.results import write_results

STATUSES = ("not run", "left", "begun", "done", "failed", "skipped")
WAITING = ("not run", "left", "skipped")  # a call tries these; the others stay as they are

Record = dict[str, Any]


def write_record(output_dir: str | Path, record: Record) -> None:
    """Write the file of a record, completely or not at all."""
    if record["status"] not in STATUSES:
        raise ValueError(f"The status of {record['check']} is {record['status']!r}, expected one of {STATUSES}.")
    folder = Path(output_dir, record["part"])
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / f"{record['check']}.json", record)  # an error may be NaN


def read_record(output_dir: str | Path, part: str, check: str) -> Record | None:
    """Return the record of a check, or `None` if it has none."""
    path = Path(output_dir, part, f"{check}.json")
    return read_json(path) if path.exists() else None


def read_part(output_dir: str | Path, part: str) -> list[Record]:
    """Return the records of a part, in the order of its checks."""
    records = []
    for path in Path(output_dir, part).glob("*.json"):
        record = read_json(path)
        if isinstance(record, dict) and record.get("check") == path.stem:
            records.append(record)
    return sorted(records, key=lambda record: record["order"])


def restore_records(output_dir: str | Path) -> None:
    """Write the records that `results.json` has and the folders of the parts lack: it may be all that was kept."""
    path = Path(output_dir, "results.json")
    if not path.exists():
        return
    for records in read_json(path).values():
        for record in records:
            if read_record(output_dir, record["part"], record["check"]) is None:
                write_record(output_dir, record)


def check_size(output_dir: str | Path, parts: tuple[str, ...], tiny: bool) -> None:
    """
    Check that a folder holds no results of the other size.

    Raises:
        `ValueError`: names the record that was made with another `--tiny`.
    """
    for part in parts:
        for record in read_part(output_dir, part):
            if record["tiny"] != tiny:
                raise ValueError(
                    f"{output_dir}/{part}/{record['check']}.json was written with --tiny {record['tiny']}, and this "
                    f"call has --tiny {tiny}: take another --output_dir."
                )


def try_again(output_dir: str | Path, part: str) -> None:
    """Let the next run try the checks again that failed, or that were begun and never ended."""
    for record in read_part(output_dir, part):
        if record["status"] in ("failed", "begun"):
            earlier = {name: record.get(name) for name in ("status", "reason", "command")}
            kept = {name: record[name] for name in ("part", "check", "order", "minutes", "tiny")}
            write_record(output_dir, {**kept, "status": "not run", "reason": "", "earlier": earlier})


def name_the_end(output_dir: str | Path, part: str, reason: str) -> list[str]:
    """Write into each record that is still `begun` why its process ended; return the names of these checks."""
    names = []
    for record in read_part(output_dir, part):
        if record["status"] == "begun" and not record["reason"]:
            write_record(output_dir, {**record, "reason": reason})
            names.append(record["check"])
    return names
