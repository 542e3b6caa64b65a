"""What CoSupTrainer does to a model before it trains: adapters, what is frozen, what is compiled, and the collator that suits it."""

import copy

import torch
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_peft_available, logging

from .batching import CoSupDataCollator
from .grad_cache import has_dropout

if is_peft_available():
    from peft import LoraConfig, PeftModel, get_peft_model

logger = logging.get_logger(__name__)


def without_peft(model):
    """The model itself, or the one that PEFT has wrapped."""
    return model.get_base_model() if is_peft_available() and isinstance(model, PeftModel) else model


def adapter_config(model):
    """`PeftConfig` of a model's active adapter; `None` of a model without adapters."""
    return model.active_peft_config if is_peft_available() and isinstance(model, PeftModel) else None


def check_supervision(args, config):
    """Whether the model makes its queries where `supervision` trains them."""
    if args.supervision == "separate" and config.query_from == "gen":
        raise ValueError(
            "supervision='separate' trains queries of an encoder: build the model with query_from='emb_seq' or 'query_encoder'."
        )
    if args.supervision == "co" and config.query_from != "gen":
        raise ValueError(
            f"The model makes queries with {config.query_from!r}: train it with supervision='separate' (or 'nsp', its encoders alone), "
            "or build it with query_from='gen'."
        )
    if args.freeze_gen and (args.freeze_emb_seq or args.supervision == "ntp"):
        raise ValueError(
            f"freeze_gen with {'freeze_emb_seq' if args.freeze_emb_seq else 'supervision=' + repr('ntp')} leaves nothing to train."
        )
    if args.supervision == "nsp" and config.query_from == "emb_seq" and args.freeze_emb_seq:
        raise ValueError(
            "freeze_emb_seq with supervision='nsp' leaves nothing to train: Emb_seq makes the queries too."
        )


def freeze(model, args):
    """Turn off gradients of what is frozen, and of what the supervision never reaches."""
    encoders_alone = args.supervision == "nsp" and model.config.query_from != "gen"
    frozen = [model.gen] * (args.freeze_gen or encoders_alone)
    if args.freeze_emb_seq or args.supervision == "ntp":
        frozen += [module for module in (model.emb_seq, model.emb_head) if module is not None]
    if args.supervision == "ntp" and model.query_encoder is not None:
        frozen.append(model.query_encoder)
    if args.supervision == "nsp" and not model.config.tie_word_embeddings:
        frozen.append(model.get_output_embeddings())
    for module in frozen:
        module.requires_grad_(False)


def keep_master_weights(model, args):
    """
    Trained weights in float32: an update of 2e-5 of a bfloat16 weight of 0.02 is lost. Autocast (`bf16=True`) computes in bfloat16 all the same.

    A whole part is converted where any of it is trained; adapters are PEFT's business.
    """
    for name in ("gen", "emb_seq", "emb_head", "query_encoder"):
        part = getattr(model, name)
        trained = (
            []
            if part is None
            else [p for p in part.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
        )
        if trained:
            hint = "" if args.bf16 or args.fp16 else " Set bf16=True to compute in bfloat16."
            logger.warning(
                f"The weights of {name} were {trained[0].dtype}; they are trained in float32, or small updates would be lost.{hint}"
            )
            part.float()


def speed_up(model, args):
    """`torch_compile`: every layer, in place, for any length. `use_liger_kernel`: in both models; the loss stays ours, which needs no logits either."""
    parts = [part for part in (model.gen, model.emb_seq, model.query_encoder) if part is not None]
    if args.use_liger_kernel:
        for part in parts:
            apply_liger_kernel(
                part, {"fused_linear_cross_entropy": False, "cross_entropy": False, **(args.liger_kernel_config or {})}
            )
    if args.torch_compile:
        for layer in [
            module for module in model.modules() if type(module).__name__ in set(model._no_split_modules or ())
        ]:
            layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)


def default_collator(model, args, tokenizers):
    """The collator that suits model, device and arguments."""
    config = model.config
    causal = model.find_causal_encoders()
    fused = [
        (part.config._attn_implementation or "").startswith(("flash", "flex")) for part in (model.gen, model.emb_seq)
    ]
    packed = fused if args.padding_free is None else [args.padding_free] * 2
    pad_ids = [tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0 for tokenizer in tokenizers]
    return CoSupDataCollator(
        *pad_ids,
        config.nsp_token_id,
        mask_duplicates=args.mask_duplicates,
        supervision=args.supervision,
        encoder_queries=args.supervision != "ntp" and config.query_from != "gen",
        max_instances=None if args.nsp_batch_size is None else args.per_device_train_batch_size,
        max_tokens=args.max_tokens_per_micro_batch,
        call_overhead=_call_overhead(model, args.device),
        padding_free=packed[0],
        padding_free_passages=packed[1] and causal and config.emb_seq_pooling in ("eos", "lasttoken"),
        shorten_first_pass=args.nsp_batch_size is not None
        and not has_dropout(model)
        and args.neftune_noise_alpha is None,
    )


def _call_overhead(model, device):
    """
    Tokens that could be read in the time that one more forward and backward costs.

    128 did as well as any value between 0 and 512 in a trial with 135M parameters on a CPU; a smaller model reads more in that time. A GPU's is a guess.
    """
    return 8192 if device.type != "cpu" else int(min(8192, max(128, 128 * 135e6 / model.gen.num_parameters())))


def check_control_tokens(tokenizer, config):
    """A tokenizer without the model's control tokens, or with others at their ids, would train and save something else."""
    tokens = [
        token
        for token in tokenizer.convert_ids_to_tokens([config.nsp_token_id, config.cs_token_id, config.ce_token_id])
        if token
    ]
    if len(tokens) < 3 or not set(tokens) <= set(tokenizer.get_added_vocab()):
        raise ValueError(
            f"processing_class has {tokens} where the model has its control tokens; pass the tokenizer that from_gen_and_emb_seq extended."
        )


def wrap_in_peft(model, peft_config):
    """`get_peft_model`; trains the rows of the control tokens (and `emb_head`) too, unless the config says what to do with embeddings."""
    peft_config = copy.deepcopy(peft_config)
    if (
        model.emb_head is not None
        and getattr(peft_config, "target_modules", None) == "all-linear"
        and peft_config.exclude_modules is None
    ):
        peft_config.exclude_modules = ["emb_head"]  # new and small: trained itself
    if (
        isinstance(peft_config, LoraConfig)
        and peft_config.trainable_token_indices is None
        and not peft_config.modules_to_save
    ):
        names = {id(module): name for name, module in model.named_modules()}
        ids = [model.config.nsp_token_id, model.config.cs_token_id, model.config.ce_token_id]
        peft_config.trainable_token_indices = {names[id(model.get_input_embeddings())]: ids}
        if not model.config.tie_word_embeddings:  # else their logits, equal at the start, would stay equal
            peft_config.trainable_token_indices[names[id(model.get_output_embeddings())]] = ids
        encoder = {"emb_seq": model.emb_seq, "query_encoder": model.query_encoder}.get(model.config.query_from)
        if (
            encoder is not None and model.emb_seq_tokenizer is model.tokenizer
        ):  # it reads [NSP] at the end of every query
            peft_config.trainable_token_indices[names[id(encoder.get_input_embeddings())]] = ids
        if model.emb_head is not None:
            peft_config.modules_to_save = ["emb_head"]
    return get_peft_model(model, peft_config)
