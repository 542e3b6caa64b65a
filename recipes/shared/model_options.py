"""The model and the adapters that the options of recipes/train.py describe."""

from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer
from transformers.utils import logging

from modeling_cosup import CoSupConfig, CoSupForCausalLM
from trainer import CoSupTrainingArguments
from trainer.model_setup import check_tied_arguments

from shared.arguments import ScriptArguments

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.get_logger(__name__)

CONTROL_TOKENS = ("nsp_token", "cs_token", "ce_token")
MODEL_OPTIONS = (  # what a checkpoint was built with
    "similarity",
    "temperature",
    "nsp_loss_weight",
    "emb_seq_pooling",
    "passage_template",
    "passage_prompt",
    "query_prompt",
    "max_passage_length",
    "query_from",
    "tie_emb_seq",
    "emb_head_size",
    "truncate_dim",
    *CONTROL_TOKENS,
    "nsp_init",
)


def check_tied_options(script: ScriptArguments, args: CoSupTrainingArguments) -> None:
    """
    Check, before anything is loaded, that no option tells the two roles of a tied model apart.

    Raises:
        `ValueError`: naming the option.
    """
    if not script.tie_emb_seq:
        return
    query_reason = "Gen makes the queries of a tied model, at [NSP]"
    reasons = {
        "emb_seq": "Gen's body reads the passages of a tied model",
        "query_encoder": query_reason,
        "index": "training changes the whole model, and no index of it stays valid",
    }
    if script.query_from != "gen":
        reasons["query_from"] = query_reason
    for name, reason in reasons.items():
        if getattr(script, name) is not None:
            raise ValueError(f"--{name} with --tie_emb_seq: {reason}. Leave out one of the two.")
    check_tied_arguments(args)


def load_model(script: ScriptArguments, args: CoSupTrainingArguments) -> CoSupForCausalLM:
    """
    Load a CoSup checkpoint, or combine Gen and Emb_seq.

    Raises:
        `ValueError`: if an option differs from what the checkpoint was built with, or contradicts the files of a
            sentence-transformers Emb_seq.
    """
    model_kwargs: dict[str, Any] = {"dtype": script.dtype}
    if script.attn_implementation:
        model_kwargs["attn_implementation"] = script.attn_implementation
    defaults = ScriptArguments()
    options = {}  # only those that were given: others may be in the files of Emb_seq
    for name in MODEL_OPTIONS:
        value = getattr(script, name)
        if value != getattr(defaults, name):
            options[name] = value
    if script.model_name_or_path:
        for name in ("tie_emb_seq", "truncate_dim"):  # from_pretrained knows whether they fit the checkpoint
            if name in options:
                model_kwargs[name] = options.pop(name)
        unread = [f"--{name}" for name in ("gen", "emb_seq", "query_encoder") if getattr(script, name) is not None]
        if options.pop("nsp_init", None) is not None:  # the embedding of [NSP] has started
            unread.append("--nsp_init")
        check_unchanged(script.model_name_or_path, options)
        if unread:
            logger.warning(f"Not read, as {script.model_name_or_path} has parts of its own: {', '.join(unread)}.")
        return CoSupForCausalLM.from_pretrained(script.model_name_or_path, **model_kwargs)
    if args.freeze_gen or args.freeze_emb_seq or script.index:
        options.setdefault("tie_emb_seq", False)  # one part is kept as it is
    options.setdefault("query_from", "emb_seq" if args.supervision == "separate" else "gen")
    if script.query_encoder and options["query_from"] != "query_encoder":
        raise ValueError("--query_encoder needs --query_from query_encoder.")
    if options["query_from"] == "query_encoder":
        options["query_encoder"] = script.query_encoder or script.emb_seq or script.gen
    return CoSupForCausalLM.from_gen_and_emb_seq(script.gen, script.emb_seq, model_kwargs=model_kwargs, **options)


def check_unchanged(checkpoint: str, options: dict[str, Any]) -> None:
    """
    Check options, which a config file may hold, against what a checkpoint was built with.

    Raises:
        `ValueError`: naming an option that differs.
    """
    if not options:
        return
    try:
        config = CoSupConfig.from_pretrained(checkpoint)
    except OSError as error:  # without a network, transformers does not say what it looked for
        raise OSError(f"{checkpoint} cannot be read: {error}") from error
    tokens = control_tokens(checkpoint, config) if options.keys() & set(CONTROL_TOKENS) else {}
    for name, value in options.items():
        built_with = tokens[name] if name in tokens else getattr(config, name)
        if value != built_with:
            raise ValueError(f"--{name} {value} cannot be changed: {checkpoint} was built with {built_with}.")


def control_tokens(checkpoint: str, config: CoSupConfig) -> dict[str, str]:
    """Return the control tokens of a checkpoint, by the names of their options; its config has only their ids."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = [getattr(config, f"{name}_id") for name in CONTROL_TOKENS]
    return dict(zip(CONTROL_TOKENS, tokenizer.convert_ids_to_tokens(ids), strict=True))


def lora(script: ScriptArguments) -> "LoraConfig | None":
    """Return the `LoraConfig` of both models; `None` without `--use_peft`."""
    if not script.use_peft:
        return None
    from peft import LoraConfig

    target_modules: str | list[str] = script.lora_target_modules or "all-linear"
    if target_modules == ["all-linear"]:
        target_modules = "all-linear"  # PEFT does not know it in a list
    return LoraConfig(
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
    )
