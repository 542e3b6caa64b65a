"""Write `report.md` and `results.json` from the records of all parts. Needs no torch."""

import json
from pathlib import Path
from typing import Any

from modeling_cosup.files_cosup import replacing_file, write_json

from gpu_parts.records import Record, read_part

PARTS = ("correctness", "speed", "training")
MAX_RESULT_BYTES = 50_000  # of one check in results.json, which must stay small as a whole
HEADER = ["check", "status", "what came out", "s", "peak memory GB"]


def write_report(output_dir: str | Path) -> None:
    """Write the report and the file with all results, each completely or not at all."""
    records = {part: read_part(output_dir, part) for part in PARTS}
    write_json(Path(output_dir, "results.json"), {part: [small(record) for record in records[part]] for part in PARTS})
    with replacing_file(Path(output_dir, "report.md")) as unfinished:
        unfinished.write_text(report(records), encoding="utf-8")


def small(record: Record) -> Record:
    """Return a record, without its result if that is too large for the file with all results."""
    size = len(json.dumps(record.get("result")))
    if size <= MAX_RESULT_BYTES:
        return record
    note = f"{size:,} bytes, too many for this file: see {record['part']}/{record['check']}.json"
    return {**record, "result": {"left_out": note}}


def report(records: dict[str, list[Record]]) -> str:
    """Return the report as Markdown: one table a part, then the tables of its checks."""
    lines = ["# A GPU's hour", "", "Written by `recipes/benchmarks/gpu.py` from the files next to it.", ""]
    for part, part_records in records.items():
        lines += [f"## {part.capitalize()}", ""]
        if not part_records:
            lines += ["not run", ""]
            continue
        for machine in machines(part_records):
            lines.append(machine)
        lines += ["", *table(HEADER, [row(record) for record in part_records]), ""]
        for record in part_records:
            lines += tables_of(record)
    return "\n".join(lines)


def machines(records: list[Record]) -> list[str]:
    """Return a line for each machine and command that made the records."""
    lines = []
    for record in records:
        if "hardware" not in record or record["status"] == "skipped":
            continue
        versions = f"torch {record['torch']}, transformers {record['transformers']}, CUDA {record['cuda']}"
        size = ", tiny shapes" if record["tiny"] else ""
        line = f"- {record['hardware']}; {versions}{size}: `{record['command']}`"
        if line not in lines:
            lines.append(line)
    return lines


def row(record: Record) -> list[str]:
    """Return the line of a check in the table of its part."""
    status = record["status"]
    outcome = record.get("result", {}).get("summary", "")
    if record["reason"]:
        outcome = record["reason"].splitlines()[0]
    if status == "begun":
        outcome = f"begun and not ended. {record['reason']}".strip()
    seconds = f"{record['seconds']:.1f}" if "seconds" in record else ""
    memory = "" if record.get("peak_memory_gb") is None else f"{record['peak_memory_gb']:.2f}"
    return [record["check"], f"**{status}**" if status in ("failed", "begun") else status, outcome, seconds, memory]


def tables_of(record: Record) -> list[str]:
    """Return the lines of the tables in the result of a check."""
    lines = []
    for content in record.get("result", {}).get("tables", []):
        lines += [f"### {record['check']}: {content['title']}", "", *table(content["header"], content["rows"]), ""]
    return lines


def table(header: list[str], rows: list[list[Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for cells in rows:
        texts = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
        lines.append(f"| {' | '.join(texts)} |")
    return lines
