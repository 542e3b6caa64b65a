"""
Each half of a CoSup model as a checkpoint of its own: Gen as a plain causal LM, Emb_seq as a sentence-transformers folder.

Both load without this code. The folder is written as sentence-transformers reads it, by JSON and safetensors files: the library is not needed to make it.
"""

import copy
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from .files_cosup import read_json, write_json
from .hub_cosup import CARD_FILE, CARD_MARKER, TOKENIZER_FILES, checkpoint_files, make_repo, push_files
from .plain_card_cosup import package_cards, plain_card
from .tokenization_cosup import added_tokens

POOLING_MODES = {
    "eos": "lasttoken",
    "lasttoken": "lasttoken",
    "mean": "mean_tokens",
    "cls": "cls_token",
}  # names of sentence-transformers
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

PART_FILES = (
    *(
        "*.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        CARD_FILE,
        *TOKENIZER_FILES,
    ),
    *(
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "[0-9]_*/config.json",
        "[0-9]_*/model.safetensors",
    ),
)


class PartsMixin:
    """`save_gen()` and `save_emb_seq()` of [`CoSupForCausalLM`]."""

    def save_gen(
        self,
        save_directory,
        is_main_process=True,
        state_dict=None,
        push_to_hub=False,
        repo_id=None,
        token=None,
        private=None,
        **kwargs,
    ):
        """
        Save Gen as a plain checkpoint of its architecture, e.g. `LlamaForCausalLM`, with tokenizer, chat template and generation config. Whatever serves
        such models serves it, without retrieval and without `trust_remote_code`. This model stays as it is.

        Args:
            save_directory (`str` or `Path`): made if it is not there.
            is_main_process (`bool`), **kwargs: as in `PreTrainedModel.save_pretrained`, e.g. `max_shard_size`.
            state_dict (`dict`, *optional*): this (whole) model's, where the parameters in memory are shards.
            push_to_hub (`bool`): upload the folder, in one commit, to
            repo_id (`str`, *optional*): the repository, made if it is not there; defaults to the folder's name.
            token (`str`, *optional*), private (`bool`, *optional*): as in `huggingface_hub`.

        Raises:
            `ValueError`: for weights that are quantised or hold adapters that are not merged.
        """
        part = _part(self, self.gen)
        part.generation_config = copy.deepcopy(self.generation_config)
        part.save_pretrained(
            save_directory, is_main_process=is_main_process, state_dict=_of_part(state_dict, "gen."), **kwargs
        )
        if not is_main_process:
            return
        nsp_token = "[NSP]"
        if self._has_tokenizer():
            self.tokenizer.save_pretrained(save_directory)
            nsp_token = self.tokenizer.convert_ids_to_tokens(self.config.nsp_token_id)
        repo_id = _repository(save_directory, repo_id, token, private) if push_to_hub else None
        name, cards = repo_id or Path(save_directory).absolute().name, package_cards()
        if cards is None:
            metadata = {"library_name": "transformers", "pipeline_tag": "text-generation"}
            card = plain_card(name, "Gen of a CoSup model, a plain causal language model.", **metadata)
        else:
            card = cards.gen_card(type(part).__name__, nsp_token, name)
        _write_card(save_directory, card)
        if push_to_hub:
            _push(save_directory, repo_id, token)

    def save_emb_seq(
        self,
        save_directory,
        is_main_process=True,
        state_dict=None,
        push_to_hub=False,
        repo_id=None,
        token=None,
        private=None,
        **kwargs,
    ):
        """
        Save Emb_seq as a sentence-transformers folder: `SentenceTransformer(save_directory).encode(rendered passages)` equals `encode_passages`.

        Its modules are the transformer, pooling, a dense layer for `emb_head`, and normalisation for the cosine. The tokenizer adds BOS and EOS as
        Emb_seq reads them, after truncation, and reads special tokens that stand in a text as text. `passage_prompt` is the default prompt; the
        template stands in `config_sentence_transformers.json` and, as code that renders passages, in the folder's `README.md`.

        Args: those of [`~CoSupForCausalLM.save_gen`].

        Raises:
            `ValueError`: when Emb_seq is not loaded, its tokenizer is not one of the tokenizers library, or weights are quantised or hold adapters that
                are not merged.
        """
        if self.emb_seq is None:
            raise ValueError(
                "Emb_seq is not in memory (load_emb_seq=False), so there is nothing to save: load the model with it."
            )
        part, tokenizer = _part(self, self.emb_seq), passage_tokenizer(self.emb_seq_tokenizer, self.config)
        part.save_pretrained(
            save_directory, is_main_process=is_main_process, state_dict=_of_part(state_dict, "emb_seq."), **kwargs
        )
        if not is_main_process:
            return
        tokenizer.save_pretrained(save_directory)
        path = Path(save_directory) / "tokenizer_config.json"
        write_json(
            path, {**read_json(path), "tokenizer_class": "PreTrainedTokenizerFast"}
        )  # its name in every release
        head = None if self.emb_head is None else (state_dict or self.state_dict())["emb_head.weight"]
        write_modules(Path(save_directory), self.config, tokenizer.model_max_length, head)
        repo_id = _repository(save_directory, repo_id, token, private) if push_to_hub else None
        name, cards = repo_id or Path(save_directory).absolute().name, package_cards()
        if cards is None:
            metadata = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
            card = plain_card(name, "Emb_seq of a CoSup model, its passage encoder.", **metadata)
        else:
            card = cards.emb_seq_card(self.config, name)
        _write_card(save_directory, card)
        if push_to_hub:
            _push(save_directory, repo_id, token)


def passage_tokenizer(tokenizer, config):
    """
    A tokenizer that turns a rendered passage into what Emb_seq reads: BOS, the passage, truncated and with special tokens as text, EOS.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Emb_seq's; stays as it is.
        config (`CoSupConfig`): length, and whether BOS and EOS are added.

    Raises:
        `ValueError`: when it is not backed by the tokenizers library, whose files hold what is added.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"Emb_seq's tokenizer, {type(tokenizer).__name__}, is not backed by the tokenizers library; sentence-transformers needs one that is."
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    before, behind = (
        [(tokenizer.convert_ids_to_tokens(id), id) for id in ids] for ids in added_tokens(tokenizer, config)
    )
    pieces = [*(token for token, _ in before), "$A", *(token for token, _ in behind)]
    backend.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=[*before, *behind])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=config.max_passage_length + len(before) + len(behind),
        model_input_names=["input_ids", "attention_mask"],  # no token types: Emb_seq is given none
        padding_side="right",
        truncation_side="right",
        split_special_tokens=True,
        **{name: getattr(tokenizer, name) for name in SPECIAL_TOKENS if getattr(tokenizer, name) is not None},
    )


def write_modules(folder, config, max_seq_length, head=None):
    """
    What makes a folder with a transformer one of sentence-transformers: the list of modules, and their settings.

    Args:
        folder (`Path`): with model and tokenizer.
        config (`CoSupConfig`): pooling, similarity, prompts and template.
        max_seq_length (`int`): tokens, with BOS and EOS.
        head (`torch.Tensor` of shape `(h, h_emb)`, *optional*): weight of `emb_head`.
    """
    width = config.emb_seq_config.get_text_config().hidden_size
    modes = {
        f"pooling_mode_{mode}": mode == POOLING_MODES[config.emb_seq_pooling]
        for mode in ("cls_token", "mean_tokens", "lasttoken")
    }
    modules = [
        ("", "Transformer", None),
        ("1_Pooling", "Pooling", {"word_embedding_dimension": width, **modes, "include_prompt": True}),
    ]
    if head is not None:
        options = {
            "in_features": width,
            "out_features": config.embedding_size,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        modules.append(("2_Dense", "Dense", options))
    if config.similarity == "cosine":
        modules.append((f"{len(modules)}_Normalize", "Normalize", {}))
    for path, _, options in modules[1:]:
        (folder / path).mkdir(exist_ok=True)
        write_json(folder / path / "config.json", options)
    if head is not None:
        save_file(
            {"linear.weight": head.detach().cpu().contiguous()},
            folder / "2_Dense" / "model.safetensors",
            metadata={"format": "pt"},
        )
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind, _) in enumerate(modules)
    ]
    write_json(folder / "modules.json", listed)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})
    settings = {
        "model_type": "SentenceTransformer",
        "prompts": {"query": config.query_prompt, "document": config.passage_prompt},
        "default_prompt_name": "document" if config.passage_prompt else None,
        "similarity_fn_name": config.similarity,
        "cosup": {"passage_template": config.passage_template, "query_from": config.query_from},
    }
    write_json(folder / "config_sentence_transformers.json", settings)


def _part(model, part):
    """A shallow copy of a sub-model, with a config of its own: saving notes class and dtype in the config, and the whole model's must not change."""
    if getattr(model, "hf_quantizer", None) is not None or getattr(part, "hf_quantizer", None) is not None:
        raise ValueError(
            "The weights are quantised; a part of them is saved from the model before, or after dequantize()."
        )
    if adapters := [name for name, _ in part.named_parameters() if ".base_layer." in name or "lora_" in name]:
        raise ValueError(
            f"{adapters[0]} belongs to an adapter that is not merged: call merge_and_unload() first, then save the parts of what it returns."
        )
    part = copy.copy(part)
    part.config = copy.deepcopy(part.config)
    if type(part).__module__.startswith("transformers."):
        vars(part.config).pop(
            "auto_map", None
        )  # of a repository that also ships the code; the class is known without it
    return part


def _of_part(state_dict, prefix):
    return (
        None
        if state_dict is None
        else {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    )


def _write_card(folder, card):
    """Write a card, unless there is one that somebody has made theirs."""
    path = Path(folder) / CARD_FILE
    if not path.exists() or CARD_MARKER in path.read_text(encoding="utf-8"):
        path.write_text(card, encoding="utf-8")


def _repository(folder, repo_id, token, private):
    return make_repo(repo_id or Path(folder).absolute().name, private, token)


def _push(folder, repo_id, token):
    replaced = ("*.safetensors", "model.safetensors.index.json")
    push_files(
        checkpoint_files(folder, PART_FILES),
        repo_id,
        replaced,
        commit_message="Upload a part of a CoSup model",
        token=token,
    )
