"""The code that travels with a checkpoint: every module of the package except those listed here."""

from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

FOLDER = Path(__file__).parents[2] / "modeling_cosup"
# Files that only authors need, and why. The travelling code imports them under a guard, in a function.
STAYS = {
    "adapters_cosup.py": "adapters, merged into the model that a part is built from",
    "card_cosup.py": "cards of models, parts and indexes; without it a plain card is written",
    "checks_cosup.py": "checks of a model while it is built from two others, which needs the package",
    "corpus_cosup.py": "corpora in files; without it an index is built from a list of passages",
    "datastore_build_cosup.py": "building a token datastore; loading and using one needs none of it",
    "lines_cosup.py": "JSON Lines, the format of corpora and results",
    "memory_card_cosup.py": "cards of token memories; without it a plain card is written",
    "milvus_client_cosup.py": "the client of a Milvus server",
    "milvus_cosup.py": "an index in Milvus; without it an index is a folder or a repository on the Hub",
    "milvus_upload_cosup.py": "uploading an index to Milvus",
    "retriever_files_cosup.py": "the settings of a sentence-transformers retriever that becomes Emb_seq",
    "source_files_cosup.py": "single files of the models that a model is built from",
    "sources_cosup.py": "the names, folders and models that a model is built from; loading one needs none of them",
    "templates_cosup.py": "checks and repairs of chat templates while a model is built",
}


def names_of_travelling_files() -> set[str]:
    """Return the names of the files that must travel, however they are imported."""
    return {path.name for path in FOLDER.glob("*.py")} - {"__init__.py", *STAYS}


def travelling_files() -> list[Path]:
    """Return the sorted paths of the modules that are saved with a checkpoint."""
    model_file = FOLDER / "modeling_cosup.py"
    imported_files = get_relative_import_files(str(model_file))
    return sorted({model_file, *map(Path, imported_files)})
