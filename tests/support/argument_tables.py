"""
The tables of docs/training_arguments.md, made from the help texts of the dataclasses.

    PYTHONPATH=.:recipes python tests/support/argument_tables.py    # rewrites the page
"""

import re
from dataclasses import MISSING, Field, fields
from pathlib import Path

from transformers import TrainingArguments

from trainer.training_args import CoSupTrainingArguments

from shared.arguments import ScriptArguments

PAGE = Path(__file__).parents[2] / "docs/training_arguments.md"
HEADER = "| argument | default | what it does |\n|---|---|---|\n"
# what stands on the page between `<!-- arguments of NAME -->` and `<!-- end -->`
BLOCK = re.compile(r"(<!-- arguments of (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table(fields_of_table: list[Field]) -> str:
    """Return a Markdown table of dataclass fields: name, default and help text."""
    rows = []
    for field in fields_of_table:
        meaning = field.metadata["help"].replace("|", "\\|")
        rows.append(f"| `{field.name}` | {default_cell(field)} | {meaning} |\n")
    return HEADER + "".join(rows)


def default_cell(field: Field) -> str:
    """Return a field's default as a YAML config has it; a dash if it is not set."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if default is None:
        return "—"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`"


def trainer_fields() -> list[Field]:
    """Return the fields that CoSupTrainingArguments adds to TrainingArguments, or gives another default."""
    inherited = {field.name: field.default for field in fields(TrainingArguments)}
    return [field for field in fields(CoSupTrainingArguments) if field.default != inherited.get(field.name, MISSING)]


def with_tables(page: str) -> str:
    """Return the text of the page with both tables as they must be."""
    tables = {
        "CoSupTrainingArguments": table(trainer_fields()),
        "ScriptArguments": table(list(fields(ScriptArguments))),
    }
    return BLOCK.sub(lambda match: match[1] + tables[match[2]] + match[4], page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
