"""
Uploads to the Hub: which files a checkpoint consists of, and one commit for all of them.

Because of the single commit, no revision ever holds half of a checkpoint or index. `pushing_cosup` and
`trainer/hub.py` decide what to push and when; `card_cosup` or `plain_card_cosup` writes the card.
"""

import inspect
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import cast

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetInfo,
    HfApi,
    ModelInfo,
    RepoCard,
    metadata_load,
    snapshot_download,
)
from transformers.utils import logging

logger = logging.get_logger(__name__)

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")  # of a download
KEPT_HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "subfolder")  # the config has the commit
CARD_FILE = "README.md"
CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
FACTS_FILE = "training_facts.json"
CURVES_FILE = "loss_curves.png"
RESULTS_FILE = "results.json"
EMB_SEQ_TOKENIZER_FOLDER = "emb_seq_tokenizer"  # only if the two tokenizers differ
CARD_MARKER = (
    "<!-- CoSup wrote this card from what training recorded. Proofread it, complete it, then remove this comment:"
    " a card without it is never replaced. -->"
)
METADATA_OF_WEIGHTS = {"base_model", "base_model_relation", "model-index"}  # a new card does not keep them
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.jinja",
    "additional_chat_templates/*.jinja",
)
# Files of a checkpoint. Nothing else in its folder is uploaded: no resume states, no arguments, no data.
# `*` does not match a slash.
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index*.json")
MODEL_FILES = (*WEIGHT_FILES, CONFIG_FILE, "generation_config.json", "*_cosup.py")
ADAPTER_FILES = ("adapter_model*.safetensors", ADAPTER_CONFIG_FILE)
MEASURED_FILES = (FACTS_FILE, RESULTS_FILE, CURVES_FILE)  # they are about one state of the weights
COMMON_FILES = (
    *MEASURED_FILES,
    CARD_FILE,
    *TOKENIZER_FILES,
    *(f"{EMB_SEQ_TOKENIZER_FOLDER}/{name}" for name in TOKENIZER_FILES),
)
CHECKPOINT_FILES = (*MODEL_FILES, *COMMON_FILES)
ADAPTER_CHECKPOINT_FILES = (*ADAPTER_FILES, *COMMON_FILES)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_YAML_HEADER = re.compile(r"\A---\n.*?\n---\s*", re.DOTALL)


def is_repo_id(name: object) -> bool:
    """Return whether a name is a repository on the Hub, `namespace/name`, and not a local folder."""
    return isinstance(name, str) and _REPO_ID.fullmatch(name) is not None and not Path(name).exists()


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a path in a repository matches one of the patterns; `*` does not match a slash."""
    return any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns)


def weight_files(variant: str | None = None) -> tuple[str, ...]:
    """Return patterns of the files that hold the weights of one variant, such as `"fp16"`, and no other."""
    stem, index = "model", "model.safetensors.index"
    if variant is not None:
        stem, index = f"{stem}.{variant}", f"{index}.{variant}"
    return f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors", f"{index}.json"


def replaced_files(
    adapters: bool = False, variant: str | None = None, keeps_measured: bool = False
) -> tuple[str, ...]:
    """
    Return patterns of the files that a push deletes unless it uploads new ones: the new checkpoint may have fewer.

    Args:
        adapters (`bool`): whether adapters are pushed, not a whole model.
        variant (`str`, *optional*): of the weights; the weights of other variants stay.
        keeps_measured (`bool`): what was measured with the weights of the repository still holds.
    """
    measured = () if keeps_measured else MEASURED_FILES
    if adapters:
        return (*ADAPTER_FILES, *measured)
    return (
        *weight_files(variant),
        *ADAPTER_FILES,  # next to them, the model would be loaded as their base
        *measured,
        "*_cosup.py",
        f"{EMB_SEQ_TOKENIZER_FOLDER}/*",
        f"{EMB_SEQ_TOKENIZER_FOLDER}/additional_chat_templates/*",
        "additional_chat_templates/*.jinja",
    )


def checkpoint_files(folder: str | os.PathLike[str], adapters: bool = False) -> dict[str, Path]:
    """Return the files of a whole model, or of adapters, in a folder, by their path in the repository."""
    return matching_files(folder, ADAPTER_CHECKPOINT_FILES if adapters else CHECKPOINT_FILES)


def matching_files(folder: str | os.PathLike[str], patterns: Iterable[str]) -> dict[str, Path]:
    """Return the files of a folder that match one of the patterns, by their path in the repository."""
    folder = Path(folder)
    files: dict[str, Path] = {}
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path
    return dict(sorted(files.items()))


def check_download_options(options: Iterable[str]) -> None:
    """Raise a `TypeError` for an option that a download does not have, also if a local folder needs no download."""
    known = set(inspect.signature(snapshot_download).parameters) - {"repo_id", "repo_type", "allow_patterns"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"Loading has no option {unknown[0]!r}, and neither has huggingface_hub.snapshot_download.")


def check_adapter_base(base: str | None, repo_id: str | None = None) -> None:
    """
    Check that others can load the model that adapters change, and that the push leaves it as it is.

    Args:
        base (`str`, *optional*): name or path of that model.
        repo_id (`str`, *optional*): where the adapters are pushed to.

    Raises:
        `ValueError`: when the base is no repository, or the one that the adapters are pushed to.
    """
    if not is_repo_id(base):
        raise ValueError(
            f"These are adapters of {base or 'a model in memory'}, which nobody else can load: push the base model"
            " first (model.push_to_hub, or recipes/import_checkpoints.py), then train adapters of that repository."
        )
    if base == repo_id:
        raise ValueError(f"{repo_id} holds the model that these adapters change: push them to another repository.")


def make_repo(
    repo_id: str, private: bool | None = None, token: str | bool | None = None, repo_type: str = "model"
) -> str:
    """Create a repository unless it exists. Return its full name, in the user's namespace if none was given."""
    return HfApi().create_repo(repo_id, private=private, token=token, repo_type=repo_type, exist_ok=True).repo_id


def push_files(
    files: Mapping[str, Path | str | bytes],
    repo_id: str,
    replaced: Sequence[str] = (),
    repo_type: str = "model",
    commit_message: str | None = "Upload",
    commit_description: str | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool | None = False,
) -> CommitInfo:
    """
    Upload files as one commit.

    If the process or the server dies, the repository stays unchanged. A second call completes the push without sending
    again the large files that had arrived. A card that its owner edited (without [`CARD_MARKER`]) is not replaced.
    Metadata of a replaced card that the new one does not state, such as the licence or a gate, is kept. Adapters are
    not added to a whole model: it would then be loaded as their base.

    Args:
        files (`dict[str, Path | str | bytes]`): path in the repository to a local file, or its content.
        repo_id (`str`): an existing repository, `namespace/name`.
        replaced (sequence of `str`): patterns. Files of the repository that match one and are not in `files` are
            deleted by the same commit.
        repo_type (`str`): `"model"` or `"dataset"`.
        commit_message, commit_description, token, revision, create_pr: as in `huggingface_hub`. A branch that does not
            exist is created.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        `ValueError`: when the Hub finds the card's metadata invalid, or adapters are pushed to the repository of a
            whole model; nothing is uploaded then.
        `HfHubHTTPError`: when the Hub refuses, or another commit came in between.
    """
    api = HfApi()
    if revision is not None and not create_pr and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=repo_type, token=token)
    info = api.repo_info(repo_id, revision=revision, repo_type=repo_type, token=token)
    head = cast(ModelInfo | DatasetInfo, info)  # no other type of repository is pushed
    old_names = {file.rfilename for file in head.siblings or []}
    if ADAPTER_CONFIG_FILE in files and CONFIG_FILE in old_names:
        raise ValueError(f"{repo_id} holds a whole model: push adapters to a repository of their own.")

    files = dict(files)
    if CARD_FILE in files and CARD_FILE in old_names:
        old_card = Path(api.hf_hub_download(repo_id, CARD_FILE, revision=head.sha, repo_type=repo_type, token=token))
        text = old_card.read_text(encoding="utf-8")
        if CARD_MARKER in text or not _YAML_HEADER.sub("", text).strip():  # a new repository's card is only metadata
            files[CARD_FILE] = _with_kept_metadata(files[CARD_FILE], old_card)
        else:
            logger.warning(f"{repo_id} has a card that its owner wrote; it is not replaced.")
            del files[CARD_FILE]

    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for name in sorted(old_names - set(files)):
        if matches(name, replaced):
            operations.append(CommitOperationDelete(path_in_repo=name))
    for name, content in files.items():
        data = content if isinstance(content, bytes) else str(content)
        operations.append(CommitOperationAdd(name, data))
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message or "Upload",
        commit_description=commit_description,
        token=token,
        repo_type=repo_type,
        revision=revision,
        create_pr=create_pr,
        parent_commit=head.sha,
    )


def _with_kept_metadata(content: Path | str | bytes, old_card: Path) -> bytes:
    """Return a card with the metadata of the one that it replaces, as far as it does not state its own."""
    text = content if isinstance(content, bytes) else Path(content).read_bytes()
    card = RepoCard(text.decode())
    old = metadata_load(old_card) or {}
    stated = card.data.to_dict()
    if stated.get("license") == "unknown":
        del stated["license"]
    names = old.keys() - stated.keys()
    if CARD_MARKER in old_card.read_text(encoding="utf-8"):  # otherwise its owner chose all of it
        names -= METADATA_OF_WEIGHTS
    if stated.get("license", old.get("license")) != old.get("license"):
        names -= {"license_name", "license_link"}  # they describe another licence
    if not names:
        return text
    for name in sorted(names):
        card.data[name] = old[name]
    return card.content.encode()
