"""docs/training_arguments.md lists every argument of a training as the code has it."""

import re
from dataclasses import fields

from transformers import TrainingArguments

from support.argument_tables import PAGE, with_tables
from trainer.training_args import CoSupTrainingArguments

from shared.arguments import ScriptArguments

REWRITE = "run PYTHONPATH=.:recipes python tests/support/argument_tables.py"


def test_the_tables_of_arguments_are_those_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), (
        f"docs/training_arguments.md has other arguments, defaults or help texts: {REWRITE}"
    )


def test_no_argument_is_missing_or_surplus():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    inherited = {field.name for field in fields(TrainingArguments)}
    added = [field.name for field in fields(CoSupTrainingArguments) if field.name not in inherited]
    changed = ["lr_scheduler_type", "warmup_steps"]
    of_the_recipe = [field.name for field in fields(ScriptArguments)]
    assert sorted(name for name, _ in rows) == sorted([*added, *changed, *of_the_recipe])
    defaults = dict(rows)
    assert defaults["warmup_steps"] == "`0.1`" and defaults["mask_duplicates"] == "`true`"
    assert defaults["nsp_batch_size"] == "—" and defaults["nsp_token"] == "`[NSP]`"
