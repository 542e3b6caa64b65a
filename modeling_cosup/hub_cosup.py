"""Uploads to the Hub: which files, in one commit, so that no revision ever holds half of a checkpoint or index."""

import re
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from transformers.utils import logging

logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
EMB_SEQ_TOKENIZER_FOLDER = "emb_seq_tokenizer"  # only where the two tokenizers differ
CARD_MARKER = "<!-- CoSup wrote this card from what training recorded. Proofread it, complete it, then remove this comment: a card without it is never replaced. -->"
TOKENIZER_FILES = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
    ),
    *("*.model", "*.jinja"),
)
# What a checkpoint holds. Nothing else is uploaded: no resume states, no arguments, no data, whatever lies next to it. `*` does not reach into folders.
CHECKPOINT_FILES = (
    *(
        "*.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "adapter_config.json",
        "*_cosup.py",
    ),
    *("training_facts.json", "results.json", "loss_curves.png", CARD_FILE),
    *(*TOKENIZER_FILES, *(f"{EMB_SEQ_TOKENIZER_FOLDER}/{name}" for name in TOKENIZER_FILES)),
)
# Of these, what a later push replaces: weights in fewer shards, code in other files
REPLACED_FILES = (
    "*.safetensors",
    "model.safetensors.index.json",
    "*_cosup.py",
    f"{EMB_SEQ_TOKENIZER_FOLDER}/*",
    "loss_curves.png",
    "training_facts.json",
)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repo_id(name):
    """Whether a name names a repository on the Hub, `namespace/name`, and no folder here."""
    return isinstance(name, str) and _REPO_ID.fullmatch(name) is not None and not Path(name).exists()


def matches(name, patterns):
    """Whether a path in a repository matches one of the patterns; `*` stands for what holds no slash."""
    return any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns)


def checkpoint_files(folder, patterns=CHECKPOINT_FILES):
    """Files of a folder that make up a checkpoint: `dict` of path in the repository to `Path`. What lies next to them stays where it is."""
    folder = Path(folder)
    found = {
        path.relative_to(folder).as_posix(): path
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
    return dict(sorted(found.items()))


def make_repo(repo_id, private=None, token=None, repo_type="model"):
    """Create a repository unless it is there; its whole name: without a namespace it is the user's."""
    return HfApi().create_repo(repo_id, private=private, token=token, repo_type=repo_type, exist_ok=True).repo_id


def push_files(
    files,
    repo_id,
    replaced=(),
    repo_type="model",
    commit_message="Upload",
    commit_description=None,
    token=None,
    revision=None,
    create_pr=False,
):
    """
    Upload files as one commit.

    A process or a server that dies leaves the repository as it was; the same call goes on from there, and large files that had arrived are not sent again. A
    card that its owner has made theirs (without [`CARD_MARKER`]) stays.

    Args:
        files (`dict[str, Path | str | bytes]`): path in the repository to a local file, or its content.
        repo_id (`str`): of a repository that exists, `namespace/name`.
        replaced (sequence of `str`): patterns: files of the repository that match and are not in `files` are deleted by the same commit.
        repo_type (`str`): `"model"` or `"dataset"`.
        commit_message, commit_description, token, revision, create_pr: as in `huggingface_hub`; a branch that does not exist is created.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        `ValueError`: when the Hub finds the card's metadata invalid; then nothing was uploaded.
        `HfHubHTTPError`: when the Hub refuses, or another commit came in between.
    """
    api, options = HfApi(), {"repo_type": repo_type, "token": token}
    if revision is not None and not create_pr and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True, **options)
    head = api.repo_info(repo_id, revision=revision, **options)
    there = {file.rfilename for file in head.siblings or []}
    if CARD_FILE in files and CARD_FILE in there and not _wrote_card(api, repo_id, head.sha, options):
        logger.warning(f"{repo_id} has a card that its owner wrote; it stays as it is.")
        files = {name: content for name, content in files.items() if name != CARD_FILE}
    stale = [name for name in sorted(there - set(files)) if matches(name, replaced)]
    operations = [CommitOperationDelete(path_in_repo=name) for name in stale]
    operations += [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    commit = {
        "commit_message": commit_message or "Upload",
        "commit_description": commit_description,
        "revision": revision,
        "create_pr": create_pr,
    }
    return api.create_commit(repo_id, operations, parent_commit=head.sha, **commit, **options)


def _wrote_card(api, repo_id, commit, options):
    """Whether the card at a commit is one of ours, as we left it, or one that the Hub made with the repository."""
    text = Path(api.hf_hub_download(repo_id, CARD_FILE, revision=commit, **options)).read_text(encoding="utf-8")
    body = re.sub(r"\A---\n.*?\n---\s*", "", text, flags=re.DOTALL)
    return CARD_MARKER in text or not body.strip()
