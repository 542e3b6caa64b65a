"""
Save, push and recognise a model: its fingerprint, its tokenizers, its folder and its repository.

`facts_cosup` reads and carries the facts recorded about a checkpoint, `card_cosup` writes cards, `pushing_cosup` and
`hub_cosup` upload. `trainer/hub.py` decides what is pushed during training.
"""

import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import CommitInfo
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .building_cosup import check_passage_length
from .configuration_cosup import CoSupConfig
from .facts_cosup import carry_facts
from .fingerprints_cosup import adapter_weight, can_be_hashed, hash_parameters, is_elsewhere
from .hub_cosup import EMB_SEQ_TOKENIZER_FOLDER
from .parts_cosup import check_adapters_are_merged
from .pushing_cosup import push_folder, saves_adapters
from .token_keys_cosup import ffn_name
from .tokenization_cosup import same_tokenizer, tokenizer_fingerprint, tokenizer_state
from .tokenizer_files_cosup import class_to_save

if TYPE_CHECKING:

    class ModelBase(torch.nn.Module):
        """Stub of `PreTrainedModel` for the type checker; the mixin overrides methods of it with fewer arguments."""

        def save_pretrained(self, *args: Any, **kwargs: Any) -> None: ...
else:
    ModelBase = object

logger = logging.get_logger(__name__)

_PLAIN_TOKENIZER = (
    "Set model.tokenizer (or model.emb_seq_tokenizer) to"
    " PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token, ...)."
)


class SharingMixin(ModelBase):
    """The part of [`CoSupForCausalLM`] that saves, pushes and recognises the model."""

    config: CoSupConfig
    gen: PreTrainedModel
    emb_seq: PreTrainedModel | None
    _emb_seq_prefix: Callable[[], str]
    _tokenizer: PreTrainedTokenizerBase | None
    _emb_seq_tokenizer: PreTrainedTokenizerBase | None
    hub_options: dict[str, Any]  # with which the checkpoint was loaded, such as `token` and `subfolder`
    _seen_states: dict[str, Any]  # what parts, in float16, and tokenizers were like when their stored hashes were true

    # ------------------------------------------------------------------ hashes

    def fingerprint(self, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
        """
        Return what an index must have in common with this model.

        That is a hash of Emb_seq's weights, hashes of the tokenizers, and the embedding settings.

        The weights are hashed only if they are complete and in float32 or bfloat16 (a cast between the two keeps the
        hash). If they are quantised, sharded, offloaded, in float16 or not loaded, the hash of the last save is
        returned, so that none of these makes an index unusable. Two exceptions are always hashed: adapters, and
        weights in float16 that have changed since the stored hash was true. In a tied model (`tie_emb_seq`), training
        Gen changes the fingerprint, because Gen is Emb_seq; with two towers it does not.

        Args:
            state_dict (`dict`, *optional*): this model's full state dict, needed if the parameters in memory are
                shards.

        Returns:
            `dict[str, str | int | bool]`.

        Raises:
            `ValueError`: when Emb_seq is not loaded and the checkpoint stores no hash of it.
        """
        hashes = self._tokenizer_hashes()
        if self._stored_hash_holds("emb_seq", state_dict):
            hashes["emb_seq"] = cast(dict, self.config.fingerprint)["emb_seq"]
        else:
            hashes["emb_seq"] = self._hash_emb_seq(state_dict)
            self._remember_changed("emb_seq", hashes["emb_seq"])
        self.config.fingerprint = {**(self.config.fingerprint or {}), **hashes}
        return {**hashes, **self.config.embedding_settings}

    def _stored_hash_holds(self, name: str, state_dict: dict[str, torch.Tensor] | None = None) -> bool:
        """Return whether the stored hash of Emb_seq or Gen stands for weights that cannot be hashed as they are."""
        part = self._hashed_part(name)
        if not (self.config.fingerprint or {}).get(name):
            return False
        if part is None:
            return True
        if can_be_hashed(part, state_dict):
            return False
        if any(is_elsewhere(weight) for weight in part.parameters()):
            return True
        if adapter_weight(part) is not None:
            return False
        if getattr(self, "hf_quantizer", None) is not None:
            return True
        state = self._hash_in_half(name)
        return self._seen_states.setdefault(name, state) == state

    def _remember_state(self, name: str) -> None:
        """Remember what Emb_seq or Gen is like in float16 while its stored hash is true."""
        part = self._hashed_part(name)
        if part is None or any(is_elsewhere(weight) for weight in part.parameters()):
            self._seen_states.pop(name, None)
        else:
            self._seen_states[name] = self._hash_in_half(name)

    def _remember_changed(self, name: str, hash: str) -> None:
        """Remember the state that a new hash is of. Every generate() asks for the hash; it rarely is a new one."""
        if name not in self._seen_states or (self.config.fingerprint or {}).get(name) != hash:
            self._remember_state(name)

    def _hash_in_half(self, name: str) -> str:
        """Return the hash that Emb_seq, with `emb_head`, or Gen has after a cast to float16."""
        if name == "emb_seq":
            return self.hash_weights(parts=(self._emb_seq_prefix(), "emb_head."), cast_to=torch.float16)
        return hash_parameters(self.gen.base_model.named_parameters(), torch.float16)

    def _hashed_part(self, name: str) -> PreTrainedModel | None:
        """Return Emb_seq or the body of Gen, by the name of its hash."""
        return self.emb_seq if name == "emb_seq" else cast(PreTrainedModel, self.gen.base_model)

    def _forget_fingerprint(self, *names: str) -> None:
        """Drop the stored hashes that no longer describe this model."""
        if self.config.fingerprint is not None:
            self.config.fingerprint = {**self.config.fingerprint, **dict.fromkeys(names)}

    def _forget_trained_gen(self) -> None:
        """Drop the stored hash of Gen if it may be in training: the hash no longer describes it."""
        if torch.is_grad_enabled() and (self.config.fingerprint or {}).get("gen"):
            if any(parameter.requires_grad for parameter in self.gen.parameters()):
                self._forget_fingerprint("gen")

    def _hash_emb_seq(self, state_dict: dict[str, torch.Tensor] | None = None) -> str:
        """Hash Emb_seq and `emb_head`; see [`~SharingMixin.hash_weights`]."""
        if self.emb_seq is None:
            raise ValueError(
                "The checkpoint stores no fingerprint of Emb_seq and Emb_seq is not loaded,"
                " so no index can be checked against it."
            )
        return self.hash_weights(state_dict, (self._emb_seq_prefix(), "emb_head."))

    def hash_all_weights(self, state_dict: dict[str, torch.Tensor] | None = None) -> str | None:
        """
        Hash all weights, to tell whether recorded facts are about them.

        Returns:
            `str`, or `None` if no `state_dict` is given and weights are offloaded or sharded.
        """
        if state_dict is None and any(is_elsewhere(weight) for weight in self.parameters()):
            return None
        return self.hash_weights(state_dict)

    def hash_weights(
        self,
        state_dict: dict[str, torch.Tensor] | None = None,
        parts: tuple[str, ...] = ("",),
        cast_to: torch.dtype | None = None,
    ) -> str:
        """
        Return the SHA-256 (hex) of a sample of the weights, see [`hash_parameters`].

        Args:
            state_dict (`dict`, *optional*): the weights, needed if the model's own are shards.
            parts (`tuple[str]`): prefixes of the names of the parameters to hash; all by default.
            cast_to (`torch.dtype`, *optional*): as in [`hash_parameters`].
        """
        named = {name: weight for name, weight in self.named_parameters() if name.startswith(parts)}
        weights = ((name, weight if state_dict is None else state_dict[name]) for name, weight in named.items())
        return hash_parameters(weights, cast_to)

    def memory_fingerprint(self) -> dict[str, str]:
        """
        Return what a token memory must have in common with this model, see [`fingerprints_cosup.memory_fingerprint`].

        As for [`~SharingMixin.fingerprint`], weights that cannot be hashed have the hash of the last save.
        """
        key = ffn_name(self)
        hashes = self._tokenizer_hashes()
        if self._stored_hash_holds("gen"):
            gen = cast(dict, self.config.fingerprint)["gen"]
        else:
            gen = self._hash_gen()
            self._remember_changed("gen", gen)
        self.config.fingerprint = {**(self.config.fingerprint or {}), **hashes, "gen": gen}
        return {"gen": gen, "tokenizer": hashes["tokenizer"], "key": key}

    def _hash_gen(self, state_dict: dict[str, torch.Tensor] | None = None) -> str:
        """Hash the body of Gen: a plain language model of the same weights has the same hash."""
        parameters = self.gen.base_model.named_parameters()
        if state_dict is None:
            return hash_parameters(parameters)
        prefix = f"gen.{self.gen.base_model_prefix}."
        return hash_parameters((name, state_dict[prefix + name]) for name, _ in parameters)

    def _tokenizer_hashes(self) -> dict[str, str]:
        """Return the hashes of both tokenizers: the stored ones, unless tokens were added since."""
        stored = self.config.fingerprint or {}
        hashes: dict[str, str] = {}
        for name in ("tokenizer", "emb_seq_tokenizer"):
            in_memory = getattr(self, f"_{name}")
            state = None if in_memory is None else tokenizer_state(in_memory)
            if stored.get(name) and (state is None or self._seen_states.setdefault(name, state) == state):
                hashes[name] = stored[name]
                continue
            tokenizer = getattr(self, name)
            hashes[name] = tokenizer_fingerprint(tokenizer)
            self._seen_states[name] = tokenizer_state(tokenizer)
        return hashes

    # ------------------------------------------------------------------ tokenizers

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Gen's tokenizer: the one that this model was built with or was given, otherwise the one saved next to it."""
        if self._tokenizer is None:
            self._tokenizer = self._load_saved_tokenizer()
            self._seen_states["tokenizer"] = tokenizer_state(self._tokenizer)
            if self._stores_one_tokenizer() and self._emb_seq_tokenizer is None:
                self._emb_seq_tokenizer = self._tokenizer
                self._seen_states["emb_seq_tokenizer"] = self._seen_states["tokenizer"]
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        shared = not self._has_tokenizer() or self.emb_seq_tokenizer is self.tokenizer
        self._tokenizer = tokenizer
        if shared:
            self._emb_seq_tokenizer = tokenizer
        self._forget_fingerprint("tokenizer", "emb_seq_tokenizer")

    @property
    def emb_seq_tokenizer(self) -> PreTrainedTokenizerBase:
        """Emb_seq's tokenizer; the same object as `tokenizer` unless the checkpoint holds a separate one."""
        if self._emb_seq_tokenizer is None:
            if self._stores_one_tokenizer():
                self._emb_seq_tokenizer = self.tokenizer
            else:
                self._emb_seq_tokenizer = self._load_saved_tokenizer(EMB_SEQ_TOKENIZER_FOLDER)
            self._seen_states["emb_seq_tokenizer"] = tokenizer_state(self._emb_seq_tokenizer)
        return self._emb_seq_tokenizer

    @emb_seq_tokenizer.setter
    def emb_seq_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._emb_seq_tokenizer = self.tokenizer if same_tokenizer(tokenizer, self.tokenizer) else tokenizer
        self._forget_fingerprint("emb_seq_tokenizer")

    def _stores_one_tokenizer(self) -> bool:
        """Return whether both hashes are of one tokenizer; without a fingerprint, a checkpoint has only one."""
        stored = self.config.fingerprint or {}
        return stored.get("emb_seq_tokenizer") == stored.get("tokenizer")

    def _has_tokenizer(self) -> bool:
        """Return whether this model has a tokenizer, in memory or next to its checkpoint."""
        try:
            return self.tokenizer is not None
        except (OSError, ValueError):  # built from a bare config, or a checkpoint that was saved without one
            return False

    def _load_saved_tokenizer(self, subfolder: str = "") -> PreTrainedTokenizerBase:
        """Load a tokenizer from a subfolder of the folder or repository that this model was loaded from."""
        if not self.config._name_or_path:
            raise ValueError(
                "This model knows no tokenizer: build it with from_gen_and_emb_seq, load it with from_pretrained,"
                " or pass tokenizer=."
            )
        folders = [self.hub_options.get("subfolder"), subfolder]
        options = {**self.hub_options, "subfolder": "/".join(folder for folder in folders if folder)}
        revision = getattr(self.config, "_commit_hash", None)
        # without `config`, AutoTokenizer would load it a second time and ask whether its code may run
        return AutoTokenizer.from_pretrained(
            self.config._name_or_path, config=self.config, revision=revision, **options
        )

    # ------------------------------------------------------------------ saving

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> None:
        """
        Save a checkpoint that loads without this package.

        It holds the weights (safetensors), the config with the fingerprint, the generation config, the code of this
        model, the tokenizers, and what training recorded about these weights.

        The arguments are those of `PreTrainedModel.save_pretrained`. With `push_to_hub=True` they are also those of
        [`~SharingMixin.push_to_hub`]; `repo_id` defaults to the name of the folder.

        Raises:
            `ValueError`: when Emb_seq was not loaded, because the checkpoint would lack its weights, for settings
                with which it would not load, for adapters that are not merged, and for a tokenizer that would be
                loaded as one that reads text differently.
        """
        if self.emb_seq is None:
            raise ValueError(
                "This model was loaded with load_emb_seq=False; saved, it would be a checkpoint without Emb_seq."
            )
        if not saves_adapters(self):
            check_adapters_are_merged(self)
        self.config.check()
        push_names = inspect.signature(self.push_to_hub).parameters
        push_arguments = {name: kwargs.pop(name) for name in push_names if name in kwargs}
        has_tokenizer = self._has_tokenizer()
        if is_main_process and not has_tokenizer and self.config._name_or_path:
            logger.warning(f"No tokenizer was found in {self.config._name_or_path}, so none is saved with the model.")
        if is_main_process and has_tokenizer:
            tokenizers = {"": self.tokenizer}  # by subfolder
            if self.emb_seq_tokenizer is not self.tokenizer:
                tokenizers[EMB_SEQ_TOKENIZER_FOLDER] = self.emb_seq_tokenizer
            for tokenizer in tokenizers.values():
                class_to_save(tokenizer, self.config, (None,), _PLAIN_TOKENIZER)
            check_passage_length(self.config, self.emb_seq_tokenizer)
            self.fingerprint(state_dict)
            if can_be_hashed(self.gen.base_model, state_dict):
                self.config.fingerprint = {**(self.config.fingerprint or {}), "gen": self._hash_gen(state_dict)}
            elif not self._stored_hash_holds("gen", state_dict):
                self._forget_fingerprint("gen")
            for subfolder, tokenizer in tokenizers.items():
                tokenizer.save_pretrained(Path(save_directory) / subfolder)
        if is_main_process:
            carry_facts(self, Path(save_directory), self.hash_all_weights(state_dict))
        self._restore_class_name()
        super().save_pretrained(
            save_directory,
            is_main_process=is_main_process,
            state_dict=state_dict,
            max_shard_size=max_shard_size,
            **kwargs,
        )
        if push_to_hub and is_main_process:
            push_arguments.setdefault("repo_id", Path(save_directory).absolute().name)
            push_folder(self, save_directory, variant=kwargs.get("variant"), **push_arguments)

    def _restore_class_name(self) -> None:
        """
        Undo the change that `fully_shard` makes to the name and module of this model's class.

        transformers would otherwise save the file in which torch defines its class, instead of this model's code.
        """
        if type(self).__module__.startswith("torch."):
            original = next(base for base in type(self).__mro__ if not base.__module__.startswith("torch."))
            type(self).__name__ = original.__name__
            type(self).__module__ = original.__module__

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load other weights, such as the best checkpoint after training, and drop the stored hashes of weights."""
        self._forget_fingerprint("emb_seq", "gen")
        return super().load_state_dict(*args, **kwargs)

    # ------------------------------------------------------------------ the Hub

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Upload CoSupForCausalLM",
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "5GB",
        tags: str | list[str] | None = None,
        index: str | None = None,
        license: str | None = None,
    ) -> CommitInfo:
        """
        Share this model in one commit: weights, config, generation config, code, tokenizers and a card.

        A push that is cut off leaves the repository unchanged. The same call completes it without sending again the
        files that had arrived. Weights and code of an earlier push that this one does not have are deleted, but not
        the weights of another `variant`. If this model holds adapters (`add_adapter`), they alone are pushed, to a
        repository of their own.

        Args:
            repo_id (`str`): `namespace/name`, or a name in your own namespace; created if it does not exist.
            commit_message, commit_description, private, token, revision, create_pr, max_shard_size: as in
                `PreTrainedModel.push_to_hub`.
            tags (`str` or `list[str]`, *optional*): more tags for the card, next to the recorded ones.
            index (`str`, *optional*): dataset repository of an index of this model, for the usage block of the card;
                see [`PassageIndex.push_to_hub`].
            license (`str`, *optional*): identifier of the licence; defaults to the one that the repository states, or
                else to the recorded one, otherwise `unknown`.

        Returns:
            `huggingface_hub.CommitInfo`.

        Raises:
            `ValueError`: when Emb_seq was not loaded, `index` is not a repository, the adapters have no base that
                others can load or would be pushed next to a whole model, or the Hub finds the card's metadata invalid.
            `HfHubHTTPError`: when the Hub refuses.
        """
        target: dict[str, Any] = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
        messages: dict[str, Any] = {"commit_message": commit_message, "commit_description": commit_description}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return push_folder(self, folder, repo_id, tags, index, license, **target, **messages)
