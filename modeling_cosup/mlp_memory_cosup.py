"""A token memory that is a small network: in place of a datastore's entries, an MLP that was trained on them."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from .files_cosup import digest, read_json, replacing_file, write_json
from .fingerprints_cosup import check_memory_fingerprint, hash_parameters, memory_fingerprint
from .hub_cosup import CARD_FILE, check_download_options, make_repo, push_files
from .memory_cosup import MemoryConfig
from .plain_card_cosup import package_memory_cards, plain_card
from .token_keys_cosup import gen_of

CONFIG_FILE = "memory_config.json"
WEIGHTS_FILE = "model.safetensors"
MEMORY_TYPE = "mlp"
_FINGERPRINT = "fingerprint"  # key of the metadata of the weights
LOGITS_AT_ONCE = 2**24  # logits that are alive at a time: 64 MB
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class MLPMemory(nn.Module):
    """
    An MLP memory (arXiv 2311.09615, section 5): logits = W(z + LN(MLP(z))).

    z is the key: what enters the FFN of Gen's last layer. The MLP has one hidden layer; W begins as Gen's LM head.
    [`~MLPMemory.from_gen`] makes a memory that can be trained on the keys and values of a [`KNNMemory`].

    Args:
        hidden_size (`int`): width of the key.
        vocab_size (`int`): tokens that the memory predicts, as many as Gen's LM head.
        intermediate_size (`int`): width of the hidden layer.
        bias (`bool`): of W.
        fingerprint (`dict`, *optional*): of the Gen whose keys the memory reads, see
            [`~fingerprints_cosup.memory_fingerprint`]; without it the memory cannot be used in generate().
        memory_config ([`MemoryConfig`], *optional*): how it is used unless a call says otherwise.
        fit (`dict`, *optional*): the text that `memory_config` was fitted on: `sha256`, `tokens`, `ngram_overlap`.

    Attributes:
        gen_fingerprint (`dict[str, str]`): as given; empty if not.

    Raises:
        `ValueError`: for a size below 1.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        intermediate_size: int = 4096,
        bias: bool = False,
        fingerprint: dict[str, str] | None = None,
        memory_config: MemoryConfig | None = None,
        fit: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "vocab_size": vocab_size, "intermediate_size": intermediate_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}, expected at least 1.")
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.intermediate_size = intermediate_size
        self.gen_fingerprint = dict(fingerprint or {})
        self.memory_config = MemoryConfig() if memory_config is None else memory_config
        self.fit = fit
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=bias)

    @classmethod
    def from_gen(
        cls, gen: Any, intermediate_size: int = 4096, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any
    ) -> "MLPMemory":
        """
        Return a memory for a Gen, in float32 and on its device; W is a copy of Gen's LM head.

        Args:
            gen (`PreTrainedModel`): a [`CoSupForCausalLM`] or another causal language model.
            intermediate_size (`int`): width of the hidden layer.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): of a plain language model, to be compared later; a
                CoSup model gives its own.
            **kwargs: `memory_config`.

        Raises:
            `ValueError`: for an architecture whose key is not known, and for an LM head that is quantised, not loaded,
                or of another width than the key.
        """
        fingerprint = memory_fingerprint(gen, tokenizer)
        head = gen.get_output_embeddings()
        weight = head.weight.detach()
        width = gen_of(gen).config.get_text_config().hidden_size
        if weight.is_meta or weight.dtype not in _DTYPES or weight.shape[1:] != (width,):
            raise ValueError(
                f"Gen's LM head has weights {tuple(weight.shape)} in {weight.dtype} on {weight.device}, expected"
                f" (vocab_size, {width}), loaded and not quantised."
            )
        bias = getattr(head, "bias", None)
        memory = cls(width, len(weight), intermediate_size, bias is not None, fingerprint, **kwargs).to(weight.device)
        with torch.no_grad():
            memory.lm_head.weight.copy_(weight)
            if bias is not None:
                memory.lm_head.bias.copy_(bias)
        return memory

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        """Return the logits `(..., V)` of keys `(..., d)`, in the memory's dtype."""
        keys = keys.to(self.lm_head.weight.device, self.lm_head.weight.dtype)
        return self.lm_head(keys + self.norm(self.down_proj(F.gelu(self.up_proj(keys)))))

    # ------------------------------------------------------------------ what a memory says

    @property
    def states(self) -> tuple[str, ...]:
        """The name of the submodule of Gen that the key enters."""
        return (self.gen_fingerprint["key"],) if "key" in self.gen_fingerprint else ()

    @property
    def fingerprint(self) -> str:
        """Hash of a sample of the weights, which changes while they train: [`~fingerprints_cosup.hash_parameters`]."""
        return digest([MEMORY_TYPE, hash_parameters(self.named_parameters())])

    @torch.no_grad()
    def log_probs(self, states: dict[str, torch.Tensor], config: MemoryConfig) -> torch.Tensor:
        """
        Return log p_mem, see [`Memory`].

        Args:
            states (`dict[str, torch.Tensor]`): the keys `(R, d)` by the name in `states`.
            config ([`MemoryConfig`]): its `temperature` divides the logits.

        Returns:
            `torch.FloatTensor` of shape `(R, V)`: on the memory's device.
        """
        (keys,) = states.values()
        return self._log_probs(keys, config)

    def _log_probs(self, keys: torch.Tensor, config: MemoryConfig) -> torch.Tensor:
        return (self(keys).float() / config.temperature).log_softmax(-1)

    @torch.no_grad()
    def target_log_probs(
        self, keys: torch.Tensor, targets: torch.Tensor, config: MemoryConfig, kept_ids: torch.Tensor | None = None
    ) -> Any:
        """
        Return log p_mem of one token for each key.

        Args:
            keys (`torch.Tensor` of shape `(n, d)`), targets (`torch.LongTensor` of shape `(n,)`): keys, and the tokens
                after them.
            config ([`MemoryConfig`]): its `temperature` divides the logits.
            kept_ids (`torch.LongTensor` of shape `(C,)`, *optional*): ids whose total probability is wanted too.

        Returns:
            `torch.FloatTensor` of shape `(n,)`: on the device of `keys`. With `kept_ids` a tuple: also log P_mem of
            these ids together, `(n,)`.
        """
        device = self.lm_head.weight.device
        target_scores, kept_scores = [], []
        step = max(1, LOGITS_AT_ONCE // self.vocab_size)
        for start in range(0, max(1, len(keys)), step):
            log_probs = self._log_probs(keys[start : start + step], config)
            chosen = targets[start : start + step, None].to(device)
            target_scores.append(log_probs.gather(1, chosen)[:, 0])
            if kept_ids is not None:
                kept_scores.append(log_probs[:, kept_ids.to(device)].logsumexp(1))
        if kept_ids is None:
            return torch.cat(target_scores).to(keys.device)
        return torch.cat(target_scores).to(keys.device), torch.cat(kept_scores).to(keys.device)

    def check_model(self, model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """
        Raise unless this memory was made for the Gen of a model.

        Args:
            model (`PreTrainedModel`): a [`CoSupForCausalLM`] or another causal language model.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): of another causal language model, to compare it too.

        Raises:
            `ValueError`: names what differs, and a vocabulary of another size.
        """
        if not self.states:
            raise ValueError("This memory does not say whose keys it reads: make it with MLPMemory.from_gen.")
        check_memory_fingerprint(self.gen_fingerprint, model, tokenizer)
        vocab_size = model.get_output_embeddings().weight.shape[0]
        if vocab_size != self.vocab_size:
            raise ValueError(f"This memory predicts {self.vocab_size:,} tokens, the model {vocab_size:,}.")

    # ------------------------------------------------------------------ files

    @staticmethod
    def check_save_directory(save_directory: str | os.PathLike[str]) -> Path:
        """Return a folder to save to; `FileExistsError` if a memory of another kind, or a model, would be lost."""
        folder = Path(save_directory)
        path = folder / CONFIG_FILE
        if path.exists():
            if read_json(path).get("memory_type") != MEMORY_TYPE:
                raise FileExistsError(f"{folder} holds a memory of another kind; choose another folder.")
        elif (folder / "config.json").exists() or _has_other_weights(folder):
            raise FileExistsError(f"{folder} holds a model; choose another folder.")
        return folder

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """
        Save the memory: `memory_config.json` and `model.safetensors`.

        Args:
            save_directory (`str` or `Path`): created if it does not exist. A memory in it is replaced.

        Raises:
            `FileExistsError`: for a folder that holds a memory of another kind, or a model.
        """
        folder = self.check_save_directory(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.detach().contiguous() for name, weight in self.state_dict().items()}
        with replacing_file(folder / WEIGHTS_FILE) as unfinished:
            save_file(weights, unfinished, {"format": "pt", _FINGERPRINT: digest(self.gen_fingerprint)})
        write_json(folder / CONFIG_FILE, self._config())

    def _config(self) -> dict[str, Any]:
        """Return the content of `memory_config.json`."""
        config = {
            "memory_type": MEMORY_TYPE,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "intermediate_size": self.intermediate_size,
            "bias": self.lm_head.bias is not None,
            "fingerprint": self.gen_fingerprint,
            "memory_config": self.memory_config.to_dict(),
        }
        return config if self.fit is None else {**config, "fit": self.fit}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        **kwargs: Any,
    ) -> "MLPMemory":
        """
        Load a memory. Nothing is unpickled.

        Args:
            name_or_path (`str` or `Path`): a folder, or a repository on the Hub.
            revision (`str`, *optional*): of the repository.
            dtype (`torch.dtype`, *optional*): of the weights; defaults to that of the file.
            device (`str` or `torch.device`): of the weights.
            **kwargs: arguments of `huggingface_hub.snapshot_download`, such as `token` or `cache_dir`.

        Raises:
            `FileNotFoundError`: for what is neither a folder with both files nor such a repository.
            `ValueError`: for damaged files, and for a memory of another kind.
        """
        folder = _folder_of(name_or_path, revision, **kwargs)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is not an MLP memory: {name} is missing.")
        path = folder / CONFIG_FILE
        values = read_json(path)
        memory_type = values.pop("memory_type", None) if isinstance(values, dict) else None
        if memory_type != MEMORY_TYPE:
            kind = "a memory" if memory_type is None else f"a memory of the type {memory_type!r}"
            raise ValueError(f"{path} is not of an MLP memory but of {kind}; model.load_memory loads every kind.")
        try:
            values["memory_config"] = MemoryConfig.from_dict(values["memory_config"])
            with torch.device("meta"):
                memory = cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        path = folder / WEIGHTS_FILE
        try:
            weights = load_file(path, str(device))
            memory.load_state_dict(weights, assign=True)
            with safe_open(path, "pt") as file:
                made_for = (file.metadata() or {}).get(_FINGERPRINT)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged, or of another memory: {error}") from error
        if made_for not in (None, digest(memory.gen_fingerprint)):  # earlier releases wrote none
            raise ValueError(f"{path} is of another memory than {CONFIG_FILE}: a save was interrupted. Save it again.")
        wrong = {weight.dtype for weight in weights.values()} - set(_DTYPES)
        if wrong:
            raise ValueError(f"{path} holds weights in {wrong.pop()}, expected float32, bfloat16 or float16.")
        if dtype is not None:
            memory = memory.to(dtype)
        return memory.requires_grad_().eval()

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = "Upload MLPMemory",
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool | None = False,
        model: str | None = None,
        license: str | None = None,
    ) -> CommitInfo:
        """
        Share the memory as a model repository, with a card, in one commit.

        Args:
            repo_id (`str`): `namespace/name`, or a name in your own namespace; created if it does not exist.
            commit_message, commit_description, private, token, revision, create_pr: as in
                `PreTrainedModel.push_to_hub`.
            model (`str`, *optional*): repository of the model that it belongs to, for the card.
            license (`str`, *optional*): of the memory; defaults to the one on the repository's card, or `unknown`.

        Returns:
            `huggingface_hub.CommitInfo`.

        Raises:
            `HfHubHTTPError`: when the Hub refuses.
        """
        repo_id = make_repo(repo_id, private, token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            files: dict[str, Path | str | bytes] = {name: Path(folder) / name for name in (CONFIG_FILE, WEIGHTS_FILE)}
            files[CARD_FILE] = self._card(repo_id, model, license).encode()
            return push_files(
                files,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def _card(self, repo_id: str, model: str | None, license: str | None) -> str:
        cards = package_memory_cards()
        if cards is None:
            summary = "An MLP memory of a language model: `model.load_memory` loads it."
            return plain_card(repo_id, summary, license, ["token-memory"])
        return cards.memory_card(self._config(), repo_id, model, license)


def _has_other_weights(folder: Path) -> bool:
    """Return whether a folder holds other weights than those that an interrupted save of an MLP memory leaves."""
    path = folder / WEIGHTS_FILE
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            return _FINGERPRINT not in (file.metadata() or {})
    except SafetensorError:
        return True


def _folder_of(name_or_path: str | os.PathLike[str], revision: str | None, **kwargs: Any) -> Path:
    """Return a local folder, or the download of a repository."""
    check_download_options(kwargs)
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    names = [CONFIG_FILE, WEIGHTS_FILE]
    try:
        return Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=names, **kwargs))
    except (HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{name_or_path} is not a folder, and no repository of this name could be loaded: {error}"
        ) from error
