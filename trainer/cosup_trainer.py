"""CoSupTrainer: the Trainer whose loss is L = L_NTP + λ·L_NSP over the global batch."""

import copy
import time
from collections import defaultdict

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer_utils import EvalPrediction
from transformers.utils import is_peft_available, logging

from modeling_cosup import CoSupForCausalLM, info_nce, similarity_scores
from modeling_cosup.tokenization_cosup import end_of_turn_token_id

from .data import CoSupDataCollator, check_instance, tokenize_instance
from .distributed import gather_rows, world_size
from .training_args import CoSupTrainingArguments

if is_peft_available():
    from peft import LoraConfig, PeftModel, get_peft_model

logger = logging.get_logger(__name__)

COLUMNS = ["input_ids", "labels", "passage_input_ids"]
RECALL_AT = (1, 5)


class CoSupTrainer(Trainer):
    """
    Trains a [`CoSupForCausalLM`] by next token and next sequence prediction in the same step.

    NTP is summed over tokens and divided by the global count of trained tokens, NSP is summed over queries and divided by the global count of
    queries, over all ranks and accumulated micro-batches; the negatives of a query are all passages of its micro-batch, on all ranks.

    Logs beside `loss`: `ntp_loss`, `nsp_loss`, `nsp_accuracy` (in-batch retrieval accuracy), `num_negatives` (mean per query) and
    `tokens_per_second` (tokens of Gen and Emb_seq, without padding). `evaluate()` returns `eval_ntp_loss`, `eval_nsp_loss`, their weighted sum
    `eval_loss`, and `eval_recall@1`, `eval_recall@5` over all distinct passages of the evaluation set.

    Args:
        model (`CoSupForCausalLM` or `str`): a model or the name or path of one.
        args ([`CoSupTrainingArguments`], *optional*): defaults to an output folder `cosup`.
        data_collator (`Callable`, *optional*): defaults to [`CoSupDataCollator`].
        train_dataset, eval_dataset (`Dataset`, `IterableDataset`, `list[dict]`, *optional*): instances, or already tokenized ones (columns
            `input_ids`, `labels`, `passage_input_ids`). `eval_dataset` may be a dict of them.
        processing_class, emb_seq_processing_class (`PreTrainedTokenizerBase`, *optional*): default to the model's own.
        compute_metrics (`Callable`, *optional*): gets an `EvalPrediction` with `predictions=(query_embeds, passage_embeds)` and `label_ids`, for each
            query the row of its passage (-100 for none).
        callbacks, optimizers: as in `Trainer`.
        peft_config (`PeftConfig`, *optional*): wraps the model; control-token rows of Gen's embeddings are trained too.

    Raises:
        `ValueError`: an invalid instance, naming its row, before training starts.
    """

    loss_is_scaled_for_ga = True  # over tokens and queries of the whole accumulated batch, not per micro-batch

    def __init__(
        self,
        model,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        emb_seq_processing_class=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        peft_config=None,
        **kwargs,
    ):
        args = args if args is not None else CoSupTrainingArguments("cosup")
        model = CoSupForCausalLM.from_pretrained(model) if isinstance(model, str) else model
        base = _without_peft(model)
        if base.config.model_type != "cosup" or base.emb_seq is None:
            raise ValueError("CoSupTrainer needs a CoSupForCausalLM with Emb_seq; this one is another model or was loaded with load_emb_seq=False.")
        if world_size() > 1 and not args.average_tokens_across_devices:
            raise ValueError("Losses are divided by global counts: leave average_tokens_across_devices=True.")
        if processing_class is not None:
            _check_control_tokens(processing_class, base.config)
            base.tokenizer = processing_class
        if emb_seq_processing_class is not None:
            base.emb_seq_tokenizer = emb_seq_processing_class
        if peft_config is not None:
            model = _wrap_in_peft(model, peft_config)
        self.cosup_config = base.config
        self.tokenizers = base.tokenizer, base.emb_seq_tokenizer
        if data_collator is None:
            pad_ids = [tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0 for tokenizer in self.tokenizers]
            data_collator = CoSupDataCollator(*pad_ids, mask_duplicates=args.mask_duplicates)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._prepare_dataset(dataset, args, f"evaluation set {name!r}") for name, dataset in eval_dataset.items()}
        else:
            eval_dataset = self._prepare_dataset(eval_dataset, args, "evaluation set")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=self._prepare_dataset(train_dataset, args, "training set"),
            eval_dataset=eval_dataset,
            processing_class=self.tokenizers[0],
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            **kwargs,
        )
        self._num_queries = None  # of the accumulated batch, over all ranks
        self._sums, self._logged_at = defaultdict(float), time.time()
        self._eval_batches = []

    # ------------------------------------------------------------------ data

    def _prepare_dataset(self, dataset, args, name):
        """Instances to token ids; instances longer than `max_length` are dropped, with their number in a warning."""
        if dataset is None:
            return None
        checked = False
        if isinstance(dataset, torch.utils.data.IterableDataset) and not isinstance(dataset, datasets.IterableDataset):
            dataset = datasets.IterableDataset.from_generator(dataset.__iter__)
        elif isinstance(dataset, torch.utils.data.Dataset) and not isinstance(dataset, torch.utils.data.IterableDataset):
            dataset = list(dataset)
        if isinstance(dataset, list):
            if not dataset:
                raise ValueError(f"The {name} is empty.")
            if not set(COLUMNS) <= set(dataset[0]):  # before Arrow sees it: its errors name no row
                dataset = [check_instance(instance, f"{name}, row {row}") for row, instance in enumerate(dataset)]
                checked = True
            dataset = datasets.Dataset.from_list(dataset)
        columns = dataset.column_names or list(next(iter(dataset)))
        if set(COLUMNS) <= set(columns):
            return dataset
        tokenizer, emb_seq_tokenizer = self.tokenizers
        config, end_of_turn_id = self.cosup_config, end_of_turn_token_id(self.tokenizers[0])

        def tokenize(instance, row):
            instance = instance if checked else check_instance(instance, f"{name}, row {row}")
            return tokenize_instance(instance, tokenizer, emb_seq_tokenizer, config, args.train_on_passages, end_of_turn_id)

        options = {"with_indices": True, "remove_columns": columns}
        if isinstance(dataset, datasets.IterableDataset):
            return dataset.map(tokenize, **options).filter(_ShorterThan(args.max_length, name))
        with args.main_process_first(desc=f"Tokenizing the {name}"):
            tokenized = dataset.map(tokenize, num_proc=args.dataset_num_proc, desc=f"Tokenizing the {name}", **options)
        short = [row for row, ids in enumerate(tokenized["input_ids"]) if len(ids) <= args.max_length]
        if not short:
            raise ValueError(f"All {len(tokenized)} instances of the {name} are longer than max_length={args.max_length} tokens.")
        if len(short) < len(tokenized):
            logger.warning(f"Dropped {len(tokenized) - len(short)} of {len(tokenized)} instances of the {name}: longer than max_length={args.max_length}.")
            tokenized = tokenized.select(short)
        return tokenized

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """`Trainer.evaluate`; `eval_dataset` may hold instances or tokenized ones, as in the constructor."""
        if eval_dataset is not None and not isinstance(eval_dataset, str | dict):
            eval_dataset = self._prepare_dataset(eval_dataset, self.args, "evaluation set")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = COLUMNS

    def train(self, *args, **kwargs):
        """`Trainer.train`."""
        self._sums, self._logged_at = defaultdict(float), time.time()
        return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Count the queries of the accumulated batch beside its tokens."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._sums["steps"] += 1
            self._num_queries = self._global_sum(sum((batch["passage_labels"] != -100).sum() for batch in batches).to(device))
        return batches, num_items_in_batch

    # ------------------------------------------------------------------ loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        L = L_NTP + λ·L_NSP (Eq. 5) of this rank's micro-batch, scaled so that the mean over ranks and sum over micro-batches is the global loss.

        Args:
            model: the (wrapped) model.
            inputs (`dict`): a batch of [`CoSupDataCollator`].
            return_outputs (`bool`): also return the model's output.
            num_items_in_batch (`torch.Tensor`, *optional*): trained tokens of the accumulated batch, over all ranks; without it, of this batch.

        Returns:
            `torch.FloatTensor` scalar, or `(loss, CoSupOutput)`.
        """
        inputs = dict(inputs)
        passage_hashes = inputs.pop("passage_hashes", None)
        passage_labels = inputs["passage_labels"]
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch, compute_nsp_loss=False)
        passage_embeds, first_row = gather_rows(outputs.passage_embeds)  # (M, h), this rank's from first_row on
        passage_labels = torch.where(passage_labels == -100, -100, passage_labels + first_row)
        same_passage = None
        if self.args.mask_duplicates and passage_hashes is not None and world_size() > 1:  # within a rank the collator left none
            all_hashes, _ = gather_rows(passage_hashes)
            same = all_hashes[:, None] == all_hashes[None]  # (M, M)
            repeated = same.tril(-1).any(1)  # stands on an earlier row already: one negative, not two
            same_passage = same[passage_labels.clamp(min=0)] | repeated  # (N, M)
        losses = info_nce(outputs.query_embeds, passage_embeds, passage_labels, same_passage, self.cosup_config.temperature)
        num_queries = self._num_queries if num_items_in_batch is not None else (passage_labels != -100).sum()
        nsp_loss = losses.sum() / num_queries.clamp(min=1)  # 0 without queries, but every parameter keeps a gradient
        loss = outputs.ntp_loss + self.cosup_config.nsp_loss_weight * nsp_loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # data parallelism averages gradients over ranks
        if model.training:
            self._count(inputs, outputs, nsp_loss, passage_embeds, passage_labels, same_passage)
        outputs.nsp_loss, outputs.loss = nsp_loss, loss
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _count(self, inputs, outputs, nsp_loss, passage_embeds, passage_labels, same_passage):
        """Add a micro-batch to what the next log shows; tensors only, nothing waits for the device."""
        scores = similarity_scores(outputs.query_embeds, passage_embeds)
        sums = self._sums
        sums["ntp_loss"] += outputs.ntp_loss.detach()
        sums["nsp_loss"] += nsp_loss.detach()
        sums["tokens"] += inputs["attention_mask"].sum() + inputs["passage_attention_mask"].sum()
        if scores.numel():
            valid = passage_labels != -100
            positive = scores.gather(1, passage_labels.clamp(min=0)[:, None])
            negatives = torch.ones_like(scores, dtype=torch.bool) if same_passage is None else ~same_passage
            negatives = negatives & (torch.arange(scores.shape[1], device=scores.device) != passage_labels[:, None])
            sums["correct"] += (valid & ~((scores >= positive) & negatives).any(1)).sum()
            sums["negatives"] += (negatives.sum(1) * valid).sum()
            sums["queries"] += valid.sum()

    def log(self, logs, start_time=None):
        """Add the components of the loss to what `Trainer` logs."""
        if "loss" in logs and self._sums:
            keys = ("ntp_loss", "nsp_loss", "tokens", "correct", "negatives", "queries")
            totals = torch.stack([torch.as_tensor(self._sums[key], dtype=torch.float32, device=self.args.device) for key in keys])
            total = dict(zip(keys, self._global_sum(totals).tolist(), strict=True))
            steps = max(1, self._sums["steps"])
            logs["ntp_loss"] = total["ntp_loss"] / steps
            logs["nsp_loss"] = total["nsp_loss"] / steps
            logs["nsp_accuracy"] = total["correct"] / max(1, total["queries"])
            logs["num_negatives"] = total["negatives"] / max(1, total["queries"])
            logs["tokens_per_second"] = total["tokens"] / max(1e-9, time.time() - self._logged_at)
            self._sums, self._logged_at = defaultdict(float), time.time()
        super().log(logs, start_time)

    def _global_sum(self, tensor):
        return self.accelerator.reduce(tensor, "sum") if world_size() > 1 else tensor

    # ------------------------------------------------------------------ evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Losses and embeddings of a batch; the loop returns the loss alone, the embeddings wait for the end of the set."""
        inputs = self._prepare_inputs(inputs)
        hashes = inputs.pop("passage_hashes")
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        queries, tokens = (inputs["passage_labels"] != -100).sum(), (inputs["labels"][:, 1:] != -100).sum()
        labels = inputs["passage_labels"]
        positives = torch.where(labels == -100, -1, hashes[labels.clamp(min=0)]) if len(hashes) else torch.full_like(labels, -1)
        arrays = (outputs.query_embeds, positives, outputs.passage_embeds, hashes)
        self._eval_batches.append(
            {
                "sums": [float(outputs.ntp_loss * tokens), int(tokens), float(outputs.nsp_loss * queries), int(queries)],
                "arrays": [array.cpu().numpy() for array in arrays],
            }
        )
        return outputs.loss.detach(), None, None

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        """`Trainer`'s loop, then token-weighted losses and recall over all passages of the set."""
        self._eval_batches, start = [], time.time()
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        batches = gather_object(self._eval_batches)
        self._eval_batches = []
        self._logged_at += time.time() - start  # no training time
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._evaluation_metrics(batches).items()})
        return output

    def _evaluation_metrics(self, batches):
        ntp_sum, tokens, nsp_sum, queries = (sum(batch["sums"][i] for batch in batches) for i in range(4))
        metrics = {"ntp_loss": ntp_sum / max(1, tokens), "nsp_loss": nsp_sum / max(1, queries)}
        metrics["loss"] = metrics["ntp_loss"] + self.cosup_config.nsp_loss_weight * metrics["nsp_loss"]
        query_embeds, positives, passage_embeds, hashes = (np.concatenate([batch["arrays"][i] for batch in batches]) for i in range(4))
        hashes, first = np.unique(hashes, return_index=True)  # identical passages once, hashes sorted
        passage_embeds = passage_embeds[first]
        asked = positives >= 0
        metrics["num_passages"], metrics["num_queries"] = len(hashes), int(asked.sum())
        labels = np.full(len(positives), -100)
        labels[asked] = np.searchsorted(hashes, positives[asked])
        if asked.any():
            ranks = _ranks(query_embeds[asked], passage_embeds, labels[asked])
            metrics.update({f"recall@{k}": float((ranks < k).mean()) for k in RECALL_AT})
        if self.compute_metrics is not None:
            metrics.update(self.compute_metrics(EvalPrediction(predictions=(query_embeds, passage_embeds), label_ids=labels)))
        return metrics

    # ------------------------------------------------------------------ the paper's optimiser

    def create_scheduler(self, num_training_steps, optimizer=None):
        """With `lr_decay_per_epoch`: a constant learning rate, multiplied by it after every epoch (section 4: 0.85)."""
        decay = self.args.lr_decay_per_epoch
        if decay is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        steps_per_epoch = max(1, round(num_training_steps / self.args.num_train_epochs))
        if self.args.max_steps > 0:
            if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
                raise ValueError("lr_decay_per_epoch needs to know how long an epoch is; a streamed dataset does not say.")
            batches = len(self.get_train_dataloader())
            steps_per_epoch = max(1, -(-batches // self.args.gradient_accumulation_steps))
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay ** (step // steps_per_epoch))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model):
        if not self.args.clip_gen_only:
            return super()._clip_grad_norm(model)
        gen = _without_peft(self.accelerator.unwrap_model(model)).gen
        return self.accelerator.clip_grad_norm_(gen.parameters(), self.args.max_grad_norm)

    def _issue_warnings_after_load(self, load_result):
        """Tied weights are stored once: a head that the checkpoint lacks because it is the embedding is not missing."""
        tied = set(getattr(self.model, "all_tied_weights_keys", {}))
        if load_result.missing_keys and set(load_result.missing_keys) <= tied:
            self.model.tie_weights()
            load_result.missing_keys.clear()
        super()._issue_warnings_after_load(load_result)


class _ShorterThan:
    """Filter of a streamed dataset that says how many instances it has dropped, at the first and at every power of two."""

    def __init__(self, max_length, name):
        self.max_length, self.name, self.dropped = max_length, name, 0

    def __call__(self, instance):
        if len(instance["input_ids"]) <= self.max_length:
            return True
        self.dropped += 1
        if self.dropped & (self.dropped - 1) == 0:
            logger.warning(f"Dropped {self.dropped} instance(s) of the {self.name} so far: longer than max_length={self.max_length}.")
        return False


def _ranks(query_embeds, passage_embeds, labels, chunk_size=1024):
    """
    Number of other passages that score at least as high as the positive (a tie is a miss, or a collapsed model would be perfect): `(N,)` for
    queries `(N, h)`, passages `(M, h)` and labels `(N,)`.
    """
    ranks = []
    for start in range(0, len(labels), chunk_size):
        scores = query_embeds[start : start + chunk_size] @ passage_embeds.T
        positive = np.take_along_axis(scores, labels[start : start + chunk_size, None], axis=1)
        ranks.append((scores >= positive).sum(1) - 1)
    return np.concatenate(ranks)


def _without_peft(model):
    """The model itself, or the one that PEFT has wrapped."""
    return model.get_base_model() if is_peft_available() and isinstance(model, PeftModel) else model


def _check_control_tokens(tokenizer, config):
    """A tokenizer without the model's control tokens, or with others at their ids, would train and save something else."""
    tokens = [token for token in tokenizer.convert_ids_to_tokens([config.nsp_token_id, config.cs_token_id, config.ce_token_id]) if token]
    if len(tokens) < 3 or not set(tokens) <= set(tokenizer.get_added_vocab()):
        raise ValueError(f"processing_class has {tokens} where the model has its control tokens; pass the tokenizer that from_gen_and_emb_seq extended.")


def _wrap_in_peft(model, peft_config):
    """`get_peft_model`; trains the rows of Gen's control tokens (and `emb_head`) too, unless the config says what to do with embeddings."""
    peft_config = copy.deepcopy(peft_config)
    if isinstance(peft_config, LoraConfig) and peft_config.trainable_token_indices is None and not peft_config.modules_to_save:
        names = {id(module): name for name, module in model.named_modules()}
        ids = [model.config.nsp_token_id, model.config.cs_token_id, model.config.ce_token_id]
        peft_config.trainable_token_indices = {names[id(model.get_input_embeddings())]: ids}
        if not model.config.tie_word_embeddings:  # else their logits, equal at the start, would stay equal
            peft_config.trainable_token_indices[names[id(model.get_output_embeddings())]] = ids
        if model.emb_head is not None:
            peft_config.modules_to_save = ["emb_head"]
    return get_peft_model(model, peft_config)
