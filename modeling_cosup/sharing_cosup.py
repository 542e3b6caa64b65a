"""
What a model needs to be saved, pushed and recognised again: tokenizers, fingerprint, folder, repository.

Its neighbours: `facts_cosup` has what was recorded of a checkpoint, `hub_cosup` uploads files, `card_cosup` writes
cards; `trainer/card.py` records what was trained, `trainer/hub.py` says what the Trainer pushes, and when.
"""

import hashlib
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from .facts_cosup import carry_facts, load_facts
from .hub_cosup import (
    CARD_FILE,
    CARD_MARKER,
    EMB_SEQ_TOKENIZER_FOLDER,
    REPLACED_FILES,
    checkpoint_files,
    make_repo,
    push_files,
)
from .plain_card_cosup import package_cards, plain_card
from .tokenization_cosup import same_tokenizer, tokenizer_fingerprint

try:
    from torch.distributed.tensor import DTensor
except ImportError:  # a torch without distributed
    DTensor = ()  # type: ignore[assignment, misc]


SUMMARY = (
    "A CoSup model: it retrieves passages while it writes. "
    "Load it with `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`."
)


class SharingMixin:
    """The part of [`CoSupForCausalLM`] that is saved, pushed and recognised again."""

    def fingerprint(self, state_dict=None):
        """
        What an index must share with this model: hashes of Emb_seq's weights and of the tokenizers, and the embedding settings.

        The weights' hash is taken anew where the weights are float32 or bfloat16 (a cast between the two keeps it). Otherwise, quantised, sharded, offloaded,
        in float16 or not loaded, it is that of the last save, so that none of these refuses an index; neither does further training of Gen.

        Args:
            state_dict (`dict`, *optional*): this model's full state dict, where the parameters in memory are shards.

        Returns:
            `dict[str, str | int]`.

        Raises:
            `ValueError`: when Emb_seq is not loaded and the checkpoint stores no hash of it.
        """
        stored = self.config.fingerprint or {}
        hashes = {
            name: stored.get(name) or tokenizer_fingerprint(getattr(self, name))
            for name in ("tokenizer", "emb_seq_tokenizer")
        }
        weights = [] if self.emb_seq is None else list(self.emb_seq.parameters())
        # FSDP2's shards, which to put together costs every rank a gather, and weights that accelerate keeps elsewhere (device_map)
        elsewhere = state_dict is None and any(isinstance(weight, DTensor) or weight.is_meta for weight in weights)
        exact = (
            self.emb_seq is not None
            and not elsewhere
            and {weight.dtype for weight in weights} <= {torch.float32, torch.bfloat16}
        )
        hashes["emb_seq"] = self._hash_emb_seq(state_dict) if exact or not stored.get("emb_seq") else stored["emb_seq"]
        self.config.fingerprint = hashes
        return {**hashes, **self.config.embedding_settings}

    def _forget_fingerprint(self, *names):
        """Drop the stored hashes that no longer describe this model."""
        if self.config.fingerprint is not None:
            self.config.fingerprint = {**self.config.fingerprint, **dict.fromkeys(names)}

    def _hash_emb_seq(self, state_dict=None):
        """Hash of Emb_seq and `emb_head`; see [`~SharingMixin.hash_weights`]."""
        if self.emb_seq is None:
            raise ValueError(
                "The checkpoint stores no fingerprint of Emb_seq and Emb_seq is not loaded, so no index can be checked against it."
            )
        return self.hash_weights(state_dict, ("emb_seq.", "emb_head."))

    def hash_all_weights(self, state_dict=None):
        """
        Hash of all weights, `str`: what says whether recorded facts are about them.

        `None` where they are elsewhere: offloaded, or shards without `state_dict`, which only all ranks could put together.
        """
        if state_dict is None and any(isinstance(weight, DTensor) or weight.is_meta for weight in self.parameters()):
            return None
        return self.hash_weights(state_dict)

    @torch.no_grad()
    def hash_weights(self, state_dict=None, parts=("",)):
        """
        SHA-256 (hex `str`) of up to 8,192 weights of each parameter, evenly spread, in bfloat16: cheap enough for every use.

        Args:
            state_dict (`dict`, *optional*): the weights, where the model's own are shards.
            parts (`tuple[str]`): of the model, by how the names of their parameters begin; all by default.
        """
        digest = hashlib.sha256()
        for name, parameter in self.named_parameters():
            if name.startswith(parts):
                weights = (parameter if state_dict is None else state_dict[name]).detach()
                weights = (weights.full_tensor() if isinstance(weights, DTensor) else weights).reshape(-1)
                sample = weights[:: max(1, len(weights) // 4096)].to(torch.bfloat16).contiguous().cpu()
                digest.update(f"{name} {tuple(parameter.shape)}".encode())
                digest.update(sample.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

    # ------------------------------------------------------------------ tokenizers

    @property
    def tokenizer(self):
        """Gen's tokenizer: the one this model was built with or was given, else the one saved next to it."""
        if self._tokenizer is None:
            self._tokenizer = self._load_saved_tokenizer()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer):
        shared = not self._has_tokenizer() or self.emb_seq_tokenizer is self.tokenizer
        self._tokenizer = tokenizer
        if shared:
            self._emb_seq_tokenizer = tokenizer
        self._forget_fingerprint("tokenizer", "emb_seq_tokenizer")

    @property
    def emb_seq_tokenizer(self):
        """Emb_seq's tokenizer; the same object as `tokenizer` unless the checkpoint holds one of its own."""
        if self._emb_seq_tokenizer is None:
            # a checkpoint that was never fingerprinted has one tokenizer
            stored = self.config.fingerprint or {}
            if stored.get("emb_seq_tokenizer") == stored.get("tokenizer"):
                self._emb_seq_tokenizer = self.tokenizer
            else:
                self._emb_seq_tokenizer = self._load_saved_tokenizer(subfolder=EMB_SEQ_TOKENIZER_FOLDER)
        return self._emb_seq_tokenizer

    @emb_seq_tokenizer.setter
    def emb_seq_tokenizer(self, tokenizer):
        self._emb_seq_tokenizer = self.tokenizer if same_tokenizer(tokenizer, self.tokenizer) else tokenizer
        self._forget_fingerprint("emb_seq_tokenizer")

    def _has_tokenizer(self):
        try:
            return self.tokenizer is not None
        except (OSError, ValueError):  # built from a bare config, or a checkpoint that was saved without one
            return False

    def _load_saved_tokenizer(self, **kwargs):
        if not self.config._name_or_path:
            raise ValueError(
                "This model knows no tokenizer: build it with from_gen_and_emb_seq, load it with from_pretrained, or pass tokenizer=."
            )
        # without the config, AutoTokenizer would load it again and ask whether its code may run
        revision = getattr(self.config, "_commit_hash", None)
        return AutoTokenizer.from_pretrained(
            self.config._name_or_path, config=self.config, revision=revision, **kwargs
        )

    # ------------------------------------------------------------------ saving

    def save_pretrained(
        self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, max_shard_size="5GB", **kwargs
    ):
        """
        Save weights (safetensors), config with fingerprint, generation config, the code of this model, the tokenizer(s), and what training recorded of
        these weights.

        Args: those of `PreTrainedModel.save_pretrained`; with `push_to_hub=True` also those of [`~SharingMixin.push_to_hub`], and `repo_id`, which defaults to
            the name of the folder.

        Raises:
            `ValueError`: when Emb_seq was not loaded: the checkpoint would lack half of its weights.
        """
        if self.emb_seq is None:
            raise ValueError(
                "This model was loaded with load_emb_seq=False; saved, it would be a checkpoint without Emb_seq."
            )
        names = (
            "repo_id",
            "commit_message",
            "commit_description",
            "private",
            "token",
            "revision",
            "create_pr",
            "tags",
            "index",
            "license",
        )
        hub = {name: kwargs.pop(name) for name in names if name in kwargs}
        if is_main_process and self._has_tokenizer():
            self.fingerprint(state_dict)
            self.tokenizer.save_pretrained(save_directory)
            if self.emb_seq_tokenizer is not self.tokenizer:
                self.emb_seq_tokenizer.save_pretrained(f"{save_directory}/{EMB_SEQ_TOKENIZER_FOLDER}")
        if is_main_process:
            carry_facts(self, Path(save_directory), self.hash_all_weights(state_dict))
            _remove_stale_card(Path(save_directory))
        self._be_found_by_its_own_name()
        super().save_pretrained(
            save_directory,
            is_main_process=is_main_process,
            state_dict=state_dict,
            max_shard_size=max_shard_size,
            **kwargs,
        )
        if push_to_hub and is_main_process:
            hub.setdefault("repo_id", Path(save_directory).absolute().name)
            self._push_folder(save_directory, **hub)

    def _be_found_by_its_own_name(self):
        """`fully_shard` makes a class of its own, whose file transformers would save in place of this one."""
        if type(self).__module__.startswith("torch."):
            own = next(base for base in type(self).__mro__ if not base.__module__.startswith("torch."))
            type(self).__name__, type(self).__module__ = own.__name__, own.__module__

    def load_state_dict(self, *args, **kwargs):
        """Other weights than those that were fingerprinted, e.g. the best checkpoint at the end of training."""
        self._forget_fingerprint("emb_seq")
        return super().load_state_dict(*args, **kwargs)

    # ------------------------------------------------------------------ the Hub

    def push_to_hub(
        self,
        repo_id,
        commit_message="Upload CoSupForCausalLM",
        commit_description=None,
        private=None,
        token=None,
        revision=None,
        create_pr=False,
        max_shard_size="5GB",
        tags=None,
        index=None,
        license=None,
    ):
        """
        Share this model: weights, config, generation config, code, tokenizer(s) and a card, in one commit.

        A push that is cut off leaves the repository as it was; the same call goes on, and files that had arrived are not sent again. Weights and code of an
        earlier push that this one does not have are deleted.

        Args:
            repo_id (`str`): `namespace/name`, or a name in your own; created if it does not exist.
            commit_message, commit_description, private, token, revision, create_pr, max_shard_size: as in `PreTrainedModel.push_to_hub`.
            tags (`list[str]`, *optional*): more tags for the card.
            index (`str`, *optional*): dataset repository of an index of this model, for the usage block of the card; see [`PassageIndex.push_to_hub`].
            license (`str`, *optional*): identifier of the licence; defaults to what was recorded, else `unknown`.

        Returns:
            `huggingface_hub.CommitInfo`.

        Raises:
            `ValueError`: when Emb_seq was not loaded, or the Hub finds the card's metadata invalid.
            `HfHubHTTPError`: when the Hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            hub = {
                "commit_message": commit_message,
                "commit_description": commit_description,
                "private": private,
                "token": token,
            }
            return self._push_folder(
                folder, repo_id, tags=tags, index=index, license=license, revision=revision, create_pr=create_pr, **hub
            )

    def _push_folder(self, folder, repo_id, tags=None, index=None, license=None, private=None, token=None, **hub):
        """Push a folder that holds this checkpoint, with a card of the facts that were saved in it and of those given here."""
        repo_id = make_repo(repo_id, private, token)
        given = {"index": index, "license": license, "tags": [tags] if isinstance(tags, str) else tags}
        facts = {**load_facts(folder), **{name: value for name, value in given.items() if value is not None}}
        cards = package_cards()
        if cards is None:
            metadata = {"library_name": "transformers", "pipeline_tag": "text-generation"}
            tags = ["custom_code", *facts.get("tags", [])]
            card = plain_card(repo_id, SUMMARY, facts.get("license"), tags, **metadata)
        else:
            card = cards.model_card(self, repo_id, facts)
        files = {**checkpoint_files(folder), CARD_FILE: card.encode()}
        return push_files(files, repo_id, REPLACED_FILES, token=token, **hub)


def _remove_stale_card(folder):
    """Remove a card of ours that shows results which [`carry_facts`] did not keep."""
    card = folder / CARD_FILE
    if not load_facts(folder).get("results") and card.exists() and CARD_MARKER in card.read_text(encoding="utf-8"):
        card.unlink()
