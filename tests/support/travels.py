"""The files that transformers copies with a checkpoint: what a careful user reads before trusting one."""

from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

import modeling_cosup

PACKAGE = Path(modeling_cosup.__file__).parent
ENTRY = PACKAGE / "modeling_cosup.py"
TRAVELS = sorted({ENTRY, *map(Path, get_relative_import_files(ENTRY))})
STAYS = sorted(set(PACKAGE.glob("*.py")) - set(TRAVELS))  # in the installed package alone
