"""Prepare a model for CoSupTrainer: adapters, frozen parts, compiled layers, and the collator that suits it."""

import copy
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_peft_available, logging

from modeling_cosup import CoSupConfig, CoSupForCausalLM

from .batching import CoSupDataCollator
from .grad_cache import has_dropout
from .packed_attention import check_packed_rows, keeps_packed_rows_apart
from .recording import recording_implementation
from .training_args import CoSupTrainingArguments

if TYPE_CHECKING or is_peft_available():
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
    from peft.tuners.tuners_utils import check_target_module_exists

logger = logging.get_logger(__name__)

HALF_DTYPES = (torch.bfloat16, torch.float16)
# by model, which may be a PeftModel: the weights that the arguments of its last training froze
_frozen_by_arguments: WeakKeyDictionary[nn.Module, list[nn.Parameter]] = WeakKeyDictionary()


def without_peft(model: Any) -> CoSupForCausalLM:
    """Return the model itself, or the one that PEFT has wrapped."""
    if is_peft_available() and isinstance(model, PeftModel):
        return cast(CoSupForCausalLM, model.get_base_model())
    return model


def adapter_config(model: Any) -> "PeftConfig | None":
    """Return the `PeftConfig` of a model's active adapter; `None` for a model without adapters."""
    if is_peft_available() and isinstance(model, PeftModel):
        return model.active_peft_config
    return None


def check_supervision(args: CoSupTrainingArguments, config: CoSupConfig) -> None:
    """Raise if the model does not make its queries where `supervision` trains them, or if nothing is left to train."""
    if config.tie_emb_seq:
        check_tied_arguments(args)
    for dim in args.matryoshka_dims or []:
        if not 0 < dim < config.embedding_size:
            raise ValueError(
                f"matryoshka_dims holds {dim}, expected widths below that of the embeddings, {config.embedding_size}."
            )
    if args.supervision == "separate" and config.query_from == "gen":
        raise ValueError(
            "supervision='separate' trains queries of an encoder:"
            " build the model with query_from='emb_seq' or 'query_encoder'."
        )
    if args.supervision == "co" and config.query_from != "gen":
        raise ValueError(
            f"The model makes queries with {config.query_from!r}: train it with supervision='separate' (or 'nsp', its"
            " encoders alone), or build it with query_from='gen'."
        )
    if args.freeze_gen and args.freeze_emb_seq:
        raise ValueError("freeze_gen with freeze_emb_seq leaves nothing to train.")
    if args.freeze_gen and args.supervision == "ntp":
        raise ValueError("freeze_gen with supervision='ntp' leaves nothing to train.")
    if args.supervision == "nsp" and config.query_from == "emb_seq" and args.freeze_emb_seq:
        raise ValueError(
            "freeze_emb_seq with supervision='nsp' leaves nothing to train: Emb_seq makes the queries too."
        )


def check_retriever_is_trained(model: CoSupForCausalLM, args: CoSupTrainingArguments) -> None:
    """Raise if a distillation has nothing to teach: no part that makes queries or passage embeddings is trained."""
    if not args.distills or trains_retriever(model):
        return
    raise ValueError(
        f"supervision={args.supervision!r} teaches a retriever, and all of it is frozen: Emb_seq, and what makes the"
        f" queries (query_from={model.config.query_from!r}). Leave freeze_emb_seq out, or train the reader alone:"
        " supervision='ntp' with candidates_from='index'."
    )


def check_gen_is_clipped(model: CoSupForCausalLM, args: CoSupTrainingArguments) -> None:
    """Raise if `clip_gen_only` would clip nothing, because no weight of Gen is trained."""
    if args.clip_gen_only and not any(parameter.requires_grad for parameter in model.gen.parameters()):
        raise ValueError(
            "clip_gen_only clips the gradients of Gen alone, and no weight of Gen is trained, so nothing would be"
            " clipped: leave it out."
        )


def trains_retriever(model: CoSupForCausalLM) -> bool:
    """Return whether training changes what a query finds: a part that makes queries or passage embeddings."""
    parts: list[nn.Module | None] = [model.emb_seq, model.emb_head, model.query_encoder]
    if model.config.query_from == "gen":
        parts.append(model.gen)
    for part in parts:
        if part is not None and any(parameter.requires_grad for parameter in part.parameters()):
            return True
    return False


def check_reader(model: CoSupForCausalLM, args: CoSupTrainingArguments) -> None:
    """Raise if Gen's attention is needed, as a target or for an indicator, and cannot be recorded."""
    if args.supervision == "attention_distillation" or args.log_indicators:
        recording_implementation(model)


def check_tied_arguments(args: CoSupTrainingArguments) -> None:
    """Raise if an argument tells Gen and Emb_seq apart, which are one model with `tie_emb_seq`."""
    if args.supervision == "separate":
        raise ValueError(
            "supervision='separate' trains an Emb_seq that makes the queries too, and this model is tied: its Gen"
            " makes them. Train it with 'co', 'ntp' or 'nsp', or build a model of two towers: query_from='emb_seq'"
            " (tie_emb_seq=False)."
        )
    for name in ("freeze_gen", "freeze_emb_seq"):
        if getattr(args, name):
            raise ValueError(
                f"{name}: Gen and Emb_seq of this model are one (tie_emb_seq), so neither trains alone. Build it with"
                " tie_emb_seq=False for two towers."
            )


def freeze(trained_model: Any, args: CoSupTrainingArguments) -> None:
    """
    Turn off the gradients of frozen parts, and of parts that the supervision never reaches.

    What an earlier training of this model turned off by its arguments is turned on first. What its user or PEFT has
    frozen stays so.
    """
    for parameter in _frozen_by_arguments.pop(trained_model, []):
        parameter.requires_grad_(True)
    model = without_peft(trained_model)
    frozen: list[nn.Module | None] = []
    encoders_alone = not args.trains_ntp and model.config.query_from != "gen"
    if args.freeze_gen or encoders_alone:
        frozen.append(model.gen)
    if args.freeze_emb_seq or not args.trains_embeddings:
        frozen.append(model.emb_head)
        if not model.config.tie_emb_seq:
            frozen.append(model.emb_seq)
    if not args.trains_embeddings:
        frozen.append(model.query_encoder)
    if not args.trains_ntp and not model.config.tie_word_embeddings:
        frozen.append(model.get_output_embeddings())
    parts = nn.ModuleList(module for module in frozen if module is not None)
    parameters = [parameter for parameter in parts.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    _frozen_by_arguments[trained_model] = parameters


def check_something_is_trained(model: nn.Module) -> None:
    """Raise before a training if all weights are frozen."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "All weights of the model are frozen, so nothing would be trained. Load adapters with is_trainable=True;"
            " after merge_and_unload(), which leaves the weights as frozen as the adapters needed them, call"
            " model.requires_grad_(True)."
        )


def trains_passages(model: CoSupForCausalLM) -> bool:
    """Return whether training changes the embeddings of passages, so that no index of them stays valid."""
    for part in (model.emb_seq, model.emb_head):
        if part is not None and any(parameter.requires_grad for parameter in part.parameters()):
            return True
    return False


def keep_master_weights(model: CoSupForCausalLM, args: CoSupTrainingArguments) -> None:
    """
    Convert trained weights to float32: an update of 2e-5 to a bfloat16 weight of 0.02 would be lost.

    Autocast (`bf16=True`) still computes in bfloat16. A part is converted as a whole if any of it is trained. What
    PEFT trains is left to it: adapters are in float32, other weights are not (see [`warn_of_half_precision`]).
    """
    parts = dict(model.named_children())
    if model.config.tie_emb_seq:
        parts = {"the tied model": model}  # an emb_head that is frozen reads the states of a trained Gen
    for name, part in parts.items():
        dtypes = [parameter.dtype for parameter in part.parameters() if parameter.requires_grad]
        half_dtypes = [dtype for dtype in dtypes if dtype in HALF_DTYPES]
        if half_dtypes:
            hint = "" if args.bf16 or args.fp16 else " Set bf16=True to compute in bfloat16."
            logger.warning(
                f"The weights of {name} were {half_dtypes[0]}; they are trained in float32, or small updates would be"
                f" lost.{hint}"
            )
            part.float()


def warn_of_half_precision(trained_model: nn.Module) -> None:
    """Warn of weights next to adapters (`modules_to_save`, `emb_head`) that are trained in bfloat16 or float16."""
    for name, parameter in trained_model.named_parameters():
        if parameter.requires_grad and parameter.dtype in HALF_DTYPES:
            logger.warning(
                f"{name} is trained in {parameter.dtype}, as in the model that got the adapters, and small updates are"
                " lost. Load that model with dtype=torch.float32; bf16=True still computes in bfloat16."
            )
            return


def speed_up(model: CoSupForCausalLM, args: CoSupTrainingArguments) -> None:
    """
    Apply `use_liger_kernel` and `torch_compile` to the layers, in place.

    Liger's losses stay off, because our loss does without logits too. Compiled layers take any length.
    """
    if args.use_liger_kernel:
        kernels = {"fused_linear_cross_entropy": False, "cross_entropy": False, **(args.liger_kernel_config or {})}
        for part in model.children():
            if isinstance(part, PreTrainedModel):
                apply_liger_kernel(part, kernels)
    if args.torch_compile:
        layer_names = set(model._no_split_modules or ())
        layers = [module for module in model.modules() if type(module).__name__ in layer_names]
        for layer in layers:
            layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)


def default_collator(
    model: CoSupForCausalLM,
    args: CoSupTrainingArguments,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
) -> CoSupDataCollator:
    """Return the collator that suits model, device and arguments."""
    config = model.config
    tokenizer, emb_seq_tokenizer = tokenizers
    packs_gen, packs_passages = _packs_rows(model, args)
    cached = args.nsp_batch_size is not None
    draws_noise = has_dropout(model) or args.neftune_noise_alpha is not None
    return CoSupDataCollator(
        pad_token_id=_pad_token_id(tokenizer),
        emb_seq_pad_token_id=_pad_token_id(emb_seq_tokenizer),
        nsp_token_id=config.nsp_token_id,
        mask_duplicates=args.mask_duplicates,
        supervision=_collated_supervision(args),
        encoder_queries=args.trains_embeddings and config.query_from != "gen",
        max_instances=args.per_device_train_batch_size if cached else None,
        max_tokens=args.max_tokens_per_micro_batch,
        call_overhead=_call_overhead(model, args.device),
        padding_free=packs_gen,
        padding_free_passages=packs_passages,
        shorten_first_pass=cached and not draws_noise,
    )


def _packs_rows(model: CoSupForCausalLM, args: CoSupTrainingArguments) -> tuple[bool, bool]:
    """Return whether rows of Gen, and rows of the encoders, are packed into one row without padding."""
    encoders = [encoder for encoder in (model.emb_seq, model.query_encoder) if encoder is not None]
    can_pack_passages = model.find_causal_encoders() and model.config.emb_seq_pooling in ("eos", "lasttoken")
    if args.neftune_noise_alpha is not None:  # the noise depends on the length of a row
        if args.padding_free:
            raise ValueError("padding_free=True with neftune_noise_alpha: the noise would depend on what is packed.")
        return False, False
    if args.padding_free is None:
        packs_gen = keeps_packed_rows_apart(model.gen, args)
        return packs_gen, can_pack_passages and all(keeps_packed_rows_apart(encoder, args) for encoder in encoders)
    if args.padding_free:
        for part in [model.gen, *(encoders if can_pack_passages else [])]:
            check_packed_rows(part, args)
    return args.padding_free, args.padding_free and can_pack_passages


def _collated_supervision(args: CoSupTrainingArguments) -> str:
    """Return the supervision whose batches have the rows that the losses need."""
    if not args.distills:
        return args.supervision
    return "co" if args.trains_ntp else "nsp"


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _call_overhead(model: CoSupForCausalLM, device: torch.device) -> int:
    """
    Return how many tokens the model could read in the time that one more forward and backward call costs.

    In a trial with 135M parameters on a CPU, 128 did as well as any other value between 0 and 512. A smaller model
    reads more tokens in that time. The value for a GPU is a guess.
    """
    if device.type != "cpu":
        return 8192
    return int(min(8192, max(128, 128 * 135e6 / model.gen.num_parameters())))


def check_control_tokens(tokenizer: PreTrainedTokenizerBase, config: CoSupConfig) -> None:
    """
    Raise if a tokenizer lacks the model's control tokens, or has other tokens at their ids.

    With it, the wrong tokens would be trained and saved.
    """
    tokens = [token for token in tokenizer.convert_ids_to_tokens(control_token_ids(config)) if token]
    if len(tokens) < 3 or not set(tokens) <= set(tokenizer.get_added_vocab()):
        raise ValueError(
            f"processing_class has {tokens} where the model has its control tokens;"
            " pass the tokenizer that from_gen_and_emb_seq extended."
        )


def control_token_ids(config: CoSupConfig) -> list[int]:
    """Return the ids of `[NSP]`, `[Cs]` and `[CE]` in Gen's tokenizer."""
    ids = [config.nsp_token_id, config.cs_token_id, config.ce_token_id]
    return cast(list[int], ids)  # set when Gen and Emb_seq were put together


def wrap_in_peft(model: CoSupForCausalLM, peft_config: "PeftConfig") -> "PeftModel":
    """
    Return `get_peft_model` of the model.

    With LoRA, the rows of the control tokens are trained too, next to the tokens of `trainable_token_indices`, and so
    is `emb_head`. Where the config trains embeddings or an LM head anyway (`target_modules`, `modules_to_save`), it
    trains their rows, and tied weights stay tied.

    Raises:
        `ValueError`: when `trainable_token_indices` and `target_modules` or `modules_to_save` name the same layer, and
            when `target_modules` names embeddings that Gen shares with its LM head.
    """
    config: Any = copy.deepcopy(peft_config)  # not every kind of adapter has the fields below
    all_linear = getattr(config, "target_modules", None) == "all-linear"
    if model.emb_head is not None and all_linear and config.exclude_modules is None:
        config.exclude_modules = ["emb_head"]  # new and small, so trained itself, without an adapter
    if isinstance(config, LoraConfig):
        _train_control_tokens(model, config)
        if model.emb_head is not None and not _trains("emb_head", config):
            config.modules_to_save = [*(config.modules_to_save or []), "emb_head"]
    return get_peft_model(model, config)


def warn_of_base_in_memory(model: Any) -> None:
    """Warn of adapters whose base model is in no folder or repository: they could not be loaded again."""
    adapters = adapter_config(model)
    if adapters is not None and not adapters.base_model_name_or_path:
        logger.warning(
            "The model that gets the adapters was built in memory, and adapters cannot be loaded without it. Save it"
            " first and train what you load from there; or merge them after training, with merge_and_unload(), and"
            " save the result (recipes/train.py does that)."
        )


def _train_control_tokens(model: CoSupForCausalLM, config: "LoraConfig") -> None:
    """Add the rows of the control tokens to what a config trains, unless it trains their matrix."""
    names = {id(module): name for name, module in model.named_modules()}
    input_name, head_name = names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]
    token_indices = _token_indices_by_layer(model, config, input_name)
    for name in token_indices:
        if _trains(name, config):
            raise ValueError(
                f"trainable_token_indices names {name}, which target_modules or modules_to_save train as a whole:"
                " leave it out of one of them."
            )
    is_trained = [name for name in (input_name, head_name) if _trains(name, config)]
    if model.config.tie_word_embeddings and is_trained:
        if check_target_module_exists(config, is_trained[0]):
            remedies = [
                "Leave it out (the rows of the control tokens are trained anyway)",
                "train whole embeddings with modules_to_save",
            ]
            if not model.config.tie_emb_seq:
                remedies.append("name emb_seq.embed_tokens to adapt those of Emb_seq alone")
            raise ValueError(
                f"target_modules names {is_trained[0]}, whose weights Gen's embeddings and LM head share: merged, its"
                f" adapter would change both. {', or '.join(remedies)}."
            )
        config.ensure_weight_tying = True
        is_trained = [input_name, head_name]
    for matrix in control_token_matrices(model):
        name = names[id(matrix)]
        if name not in is_trained and not _trains(name, config):
            token_indices[name] = sorted({*token_indices.get(name, []), *control_token_ids(model.config)})
    config.trainable_token_indices = token_indices or None


def _token_indices_by_layer(model: CoSupForCausalLM, config: "LoraConfig", input_name: str) -> dict[str, list[int]]:
    """Return the user's `trainable_token_indices` by full names of layers; a list is for Gen's embeddings."""
    chosen = config.trainable_token_indices or {}
    if not isinstance(chosen, dict):
        return {input_name: list(chosen)}
    token_indices = {}
    for ending, indices in chosen.items():
        matching = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{ending}")]
        for name in matching or [ending]:  # PEFT raises for a layer that does not exist
            token_indices[name] = list(indices)
    return token_indices


def _trains(name: str, config: "LoraConfig") -> bool:
    """Return whether a config gives a module an adapter, or trains and saves it."""
    for ending in config.modules_to_save or []:
        if f".{name}".endswith(f".{ending}"):
            return True
    return bool(check_target_module_exists(config, name))


def control_token_matrices(model: CoSupForCausalLM) -> list[torch.nn.Module]:
    """Return the embedding matrices and heads that have a row for each control token."""
    matrices = [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:
        # the rows of the control tokens are equal at the start; frozen, their logits would stay equal
        matrices.append(model.get_output_embeddings())
    encoder = {"emb_seq": model.emb_seq, "query_encoder": model.query_encoder}.get(model.config.query_from)
    if encoder is not None and model.emb_seq_tokenizer is model.tokenizer:
        # with the same tokenizer, every query that the encoder reads ends in [NSP]
        matrices.append(encoder.get_input_embeddings())
    return matrices
