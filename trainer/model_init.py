"""The model as it is trained: given, or made anew by `model_init` for each training and each trial of a search."""

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from modeling_cosup import CoSupConfig, CoSupForCausalLM

from .arguments import SET_BY_ARGUMENTS, check_collator, read_by_tokenizing
from .control_tokens import check_control_token_lr, check_rows_are_told_apart
from .isolation import check_isolation
from .model_setup import (
    check_control_tokens,
    check_gen_is_clipped,
    check_reader,
    check_retriever_is_trained,
    check_supervision,
    default_collator,
    freeze,
    keep_master_weights,
    speed_up,
    warn_of_base_in_memory,
    warn_of_half_precision,
    without_peft,
    wrap_in_peft,
)
from .training_args import CoSupTrainingArguments
from .unreached import freeze_unreached

if TYPE_CHECKING:
    from peft import PeftConfig


class ModelInitMixin(Trainer):
    """How [`CoSupTrainer`] gets the model that it trains."""

    args: CoSupTrainingArguments
    cosup_config: CoSupConfig
    data_collator: Any
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]
    _given_tokenizers: tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None]
    _peft_config: "PeftConfig | None"
    _has_default_collator: bool
    _has_checked_collator: bool
    _read_by_tokenizing: dict[str, Any]
    _num_parameters: tuple[int, int] | None

    def _take_given_tokenizers(self, base: CoSupForCausalLM) -> None:
        """Replace the tokenizers of a model with the ones that the caller gave."""
        tokenizer, emb_seq_tokenizer = self._given_tokenizers
        if tokenizer is not None:
            check_control_tokens(tokenizer, base.config)
            base.tokenizer = tokenizer
        if emb_seq_tokenizer is not None:
            base.emb_seq_tokenizer = emb_seq_tokenizer

    def _prepared(self, model: Any) -> Any:
        """Return the model as it is trained: with adapters, frozen parts and float32 weights."""
        base = without_peft(model)
        self.cosup_config = cast(CoSupConfig, base.config)
        self._num_parameters = None  # of Gen and Emb_seq; counted when asked for
        check_supervision(self.args, self.cosup_config)
        trained_model = model
        if self._peft_config is not None:
            if base is not model:
                raise ValueError("The model is a PeftModel already, and peft_config would wrap it again: give one.")
            trained_model = wrap_in_peft(model, self._peft_config)
        warn_of_base_in_memory(trained_model)
        freeze(trained_model, self.args)
        check_rows_are_told_apart(base, self.args)
        check_retriever_is_trained(base, self.args)
        check_reader(base, self.args)
        check_gen_is_clipped(base, self.args)
        if self.args.isolate_queries:
            check_isolation(base)
        freeze_unreached(base, self.args)
        if self.args.control_token_lr is not None:
            check_control_token_lr(base)
        if trained_model is base:
            keep_master_weights(base, self.args)
        else:
            warn_of_half_precision(trained_model)
        speed_up(base, self.args)
        collator = default_collator(base, self.args, self.tokenizers)
        if self._has_default_collator:
            self.data_collator = collator
        elif not self._has_checked_collator:
            check_collator(self.data_collator, collator)
            self._has_checked_collator = True
        else:  # of a trial, whose arguments may be others
            for name in SET_BY_ARGUMENTS:
                setattr(self.data_collator, name, getattr(collator, name))
            check_collator(self.data_collator, collator)
        return trained_model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a new model of `model_init`, prepared for the arguments of the trial."""
        self._hp_search_setup(trial)
        model = cast(CoSupForCausalLM, super().call_model_init(trial))
        base = without_peft(model)
        self._take_given_tokenizers(base)
        for name, value in read_by_tokenizing(base, self.args).items():
            if value != self._read_by_tokenizing[name]:
                raise ValueError(
                    f"{name} is not what the instances were tokenized with: make another CoSupTrainer for it."
                )
        return self._prepared(model)

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """
        Run `Trainer.hyperparameter_search`; the objective defaults to `eval_loss`.

        `Trainer` would add up all metrics, of which some should be low (losses), and others high (recall).

        Raises:
            `ValueError`: without a single evaluation set, unless `compute_objective` is given.
        """
        if self.eval_dataset is None or (isinstance(self.eval_dataset, dict) and compute_objective is None):
            raise ValueError(
                "A search needs an eval_dataset to compare trials; with several of them, compute_objective."
            )
        if compute_objective is None:
            compute_objective = operator.itemgetter("eval_loss")
        return super().hyperparameter_search(hp_space, compute_objective, *args, **kwargs)

    def _hp_search_setup(self, trial: Any) -> None:
        """Set the arguments of a trial, and check them; `Trainer` calls this again after the model was made."""
        if trial is not None and trial is self._trial:
            return
        super()._hp_search_setup(trial)
        self.args.check()
