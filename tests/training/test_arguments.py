"""Every argument of Trainer and TrainingArguments is heeded, has no meaning for a reason, or is refused by name."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from transformers import Trainer, TrainingArguments
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import BestRun, HPSearchBackend

from support.models import make_model, make_tokenizer, plain_batch
from support.training import NAMES, arguments, world
from trainer import CoSupTrainer, CoSupTrainingArguments
from trainer.arguments import REFUSED

HEEDED = set(
    """
    accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon
    auto_find_batch_size average_tokens_across_devices bf16 bf16_full_eval data_seed dataloader_drop_last
    dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
    dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm enable_jit_checkpoint
    eval_delay eval_on_start eval_steps eval_strategy fp16 fp16_full_eval fsdp fsdp_config full_determinism
    gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs greater_is_better
    hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip
    include_for_metrics include_num_input_tokens_seen label_smoothing_factor learning_rate liger_kernel_config
    load_best_model_at_end log_level log_level_replica log_on_each_node logging_first_step logging_steps
    logging_strategy lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps metric_for_best_model
    neftune_noise_alpha num_train_epochs optim optim_args optim_target_modules output_dir parallelism_config
    per_device_eval_batch_size per_device_train_batch_size prediction_loss_only project push_to_hub
    remove_unused_columns report_to restore_callback_states_from_checkpoint run_name save_on_each_node
    save_only_model save_steps save_strategy save_total_limit seed skip_memory_metrics tf32 torch_compile
    torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id
    trackio_static_space_id train_sampling_strategy use_cpu use_liger_kernel warmup_steps weight_decay
    """.split()
)
MEANINGLESS = {
    "do_eval": "no part of Trainer reads it",
    "do_predict": "no part of Trainer reads it",
    "do_train": "no part of Trainer reads it",
    "eval_accumulation_steps": "the embeddings of each batch go to the CPU at once",
    "eval_use_gather_object": "ranks always exchange embeddings as objects",
    "length_column_name": "the length of an instance is the number of its input_ids",
    "local_rank": "launchers set it in the environment",
    "logging_nan_inf_filter": "training stops at a loss that is not finite",
    "resume_from_checkpoint": "the argument of train() counts; recipes/train.py passes it on",
    "use_cache": "a training step never reads a cache",
}
REFUSED_FIELDS = {
    "batch_eval_metrics": ({"batch_eval_metrics": True}, "recall is over all passages of a set"),
    "eval_do_concat_batches": ({"eval_do_concat_batches": False}, "one array of queries"),
    "label_names": ({"label_names": ["answers"]}, "labels are in the column `labels`"),
}
# fields of the newest supported version that the lowest does not have
ADDED = {"activation_checkpointing", "activation_checkpointing_kwargs"}

HEEDED_BY_TRAINER = set(
    """
    args callbacks compute_metrics data_collator eval_dataset model model_init optimizer_cls_and_kwargs optimizers
    processing_class train_dataset
    """.split()
)


def test_every_field_of_training_arguments_is_in_one_table():
    """If this fails, a version of transformers has a field that nobody has tried: try it, then list it."""
    tables = [HEEDED, set(MEANINGLESS), set(REFUSED_FIELDS)]
    listed = set.union(*tables)
    assert len(listed) == sum(map(len, tables))  # each in one table
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert fields - listed == set()
    assert listed - fields <= ADDED


def test_every_argument_of_trainer_is_in_one_table():
    arguments_of_trainer = set(inspect.signature(Trainer).parameters)
    assert arguments_of_trainer == HEEDED_BY_TRAINER | set(REFUSED)
    assert set(inspect.signature(CoSupTrainer).parameters) >= HEEDED_BY_TRAINER


def test_tf32_is_off_unless_it_is_asked_for(tmp_path):
    for options in ({"torch_compile": True}, {"torch_compile_backend": "inductor"}, {"torch_compile_mode": "default"}):
        assert arguments(tmp_path, **options).tf32 is False
    assert arguments(tmp_path).tf32 is None  # what a program has chosen stays


def test_a_collator_of_the_caller_does_what_the_arguments_ask_for(tmp_path):
    model, rows = make_model(), world(["Ann", "Bob"])
    args = arguments(tmp_path, nsp_batch_size=2, per_device_train_batch_size=1)
    default = CoSupTrainer(model, args, train_dataset=rows).data_collator
    mine = dataclasses.replace(default, padding_free=False, call_overhead=3)
    assert CoSupTrainer(model, args, mine, rows).data_collator is mine
    for name, value, message in [
        ("max_instances", None, "max_instances=None, and model and arguments need 1"),
        ("supervision", "ntp", "supervision='ntp', and model and arguments need 'co'"),
        ("mask_duplicates", False, "mask_duplicates=False, and model and arguments need True"),
    ]:
        with pytest.raises(ValueError, match=message):
            CoSupTrainer(model, args, dataclasses.replace(default, **{name: value}), rows)
    padded = arguments(tmp_path, nsp_batch_size=2, per_device_train_batch_size=1, padding_free=False)
    with pytest.raises(ValueError, match="padding_free=True, which model and arguments do not allow"):
        CoSupTrainer(model, padded, default, rows)
    with pytest.raises(TypeError, match="data_collator is a function, expected a CoSupDataCollator"):
        CoSupTrainer(model, args, lambda features: {}, rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *REFUSED_FIELDS.values(),
        ({"include_for_metrics": ["input"]}, "include_for_metrics holds 'input': did you mean 'inputs'?"),
        ({"include_num_input_tokens_seen": "padded"}, "expected one of False, True, 'no', 'all', 'non_padding'"),
        (
            {"label_smoothing_factor": 1.0},
            "label_smoothing_factor is 1.0, expected a number of 0 or more, and less than 1",
        ),
        ({"label_smoothing_factor": 0.1, "supervision": "nsp"}, "which supervision='nsp' does not train"),
        ({"batch_sampler": "no_duplicates", "train_sampling_strategy": "group_by_length"}, "give one of them"),
        ({"train_sampling_strategy": "batch_rebalance"}, "does not keep its order after a resume"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, "only data parallelism works here"),
        ({"nsp_batch_size": 8, "optim": "lomo"}, "optim='lomo' changes weights during backward"),
        ({"nsp_batch_size": 8, "optim": "galore_adamw_layerwise"}, "changes weights during backward"),
        ({"control_token_lr": 0.0}, "control_token_lr is 0.0, expected a finite number above 0"),
        ({"control_token_lr": float("nan")}, "control_token_lr is nan, expected a finite number above 0"),
        ({"control_token_lr": 0.1, "optim": "adalomo"}, "optim='adalomo' changes weights during backward"),
        ({"control_token_lr": 0.1, "optim": "apollo_adamw_layerwise"}, "changes weights during backward"),
        ({"control_token_lr": 0.1, "optim": "schedule_free_adamw"}, "or keeps averages of them"),
        ({"fp16": True}, "fp16 needs a GPU"),
        ({"lr_decay_per_epoch": -0.5}, "lr_decay_per_epoch is -0.5, expected a number above 0, and at most 1"),
        ({"lr_decay_per_epoch": 0.0}, "lr_decay_per_epoch is 0.0, expected"),
        ({"lr_decay_per_epoch": 85}, "lr_decay_per_epoch is 85, expected"),
        ({"lr_decay_per_epoch": "0.85"}, "lr_decay_per_epoch is '0.85', expected"),
        (
            {"nsp_batch_size": 8, "max_tokens_per_micro_batch": 0},
            "max_tokens_per_micro_batch is 0, expected",
        ),
        ({"dataset_num_proc": -1}, "dataset_num_proc is -1, expected an integer of 0 or more"),
        ({"max_length": None}, "max_length is None, expected an integer of 1 or more"),
        ({"max_length": 0.5}, "max_length is 0.5, expected an integer of 1 or more"),
        ({"matryoshka_dims": 16}, "matryoshka_dims is 16, expected a list of widths"),
        ({"matryoshka_dims": [0]}, "A width of matryoshka_dims is 0, expected an integer of 1 or more"),
        ({"train_on_passages": True, "supervision": "nsp"}, "which supervision='nsp' does not train"),
    ],
)
def test_refused_training_arguments(tmp_path, options, message):
    with pytest.raises(ValueError) as error:
        arguments(tmp_path, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average_tokens_across_devices": False}, "leave average_tokens_across_devices=True"),
        ({"ddp_static_graph": True, "gradient_accumulation_steps": 2}, "ddp_static_graph lets DDP expect an exchange"),
        ({"ddp_static_graph": True, "nsp_batch_size": 8}, "ddp_static_graph lets DDP expect an exchange"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "with use_reentrant=True, DDP would take the gradient of a layer for complete after its first use",
        ),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True would slice a batch"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True would divide batches"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches=False would give some ranks fewer batches"),
    ],
)
def test_arguments_that_several_ranks_refuse(tmp_path, options, message, monkeypatch):
    args = arguments(tmp_path, **options)  # one rank takes them
    monkeypatch.setattr(CoSupTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match=message):
        args.check()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"compute_loss_func": print}, ValueError, "compute_loss_func has no meaning here: it would get"),
        ({"preprocess_logits_for_metrics": print}, ValueError, "an evaluation keeps no logits"),
        ({"compute_metric": print}, TypeError, "no argument 'compute_metric': did you mean 'compute_metrics'?"),
        ({"tokenizer": print}, TypeError, "no argument 'tokenizer': as in Trainer, it is named processing_class"),
        ({"args": TrainingArguments("out", use_cpu=True)}, ValueError, "args is a TrainingArguments"),
        ({"model_init": make_model}, ValueError, "either a model, or model_init"),
    ],
)
def test_refused_arguments_of_the_trainer(options, error, message):
    """Before a model is loaded: there is none of this name."""
    with pytest.raises(error) as raised:
        CoSupTrainer("no/such-model", **options)
    assert message in str(raised.value)


def test_an_optimizer_without_a_trained_weight_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # of the weights that the adapters freeze
    optimizer.param_groups[0]["params"] = [model.gen.model.norm.weight]
    options = {"peft_config": config, "optimizers": (optimizer, None)}
    with pytest.raises(ValueError, match="holds no weight that is trained"):
        CoSupTrainer(model, arguments(tmp_path), **options)


# ---------------------------------------------------------------------- label smoothing


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 8, "padding_free": True},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "gather": "local"},
        {"per_device_train_batch_size": 2, "nsp_batch_size": 8},
    ],
    ids=["plain", "packed", "accumulated", "cached"],
)
def test_smoothed_labels_are_those_of_transformers(tmp_path, options):
    """Loss and weights after an SGD step: NTP is the LabelSmoother's, NSP is the unsmoothed one."""
    smoothing = 0.2
    model = make_model()
    reference = make_model().train()
    sgd = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    sampling = {"train_sampling_strategy": "sequential", "max_steps": 1}
    args = arguments(tmp_path, label_smoothing_factor=smoothing, **options, **sgd, **sampling)
    instances = world(NAMES[:8])
    trainer = CoSupTrainer(model, args, train_dataset=instances, eval_dataset=instances)
    rows = list(trainer.train_dataset)
    unsmoothed = trainer.evaluate()["eval_ntp_loss"]

    batch = plain_batch(rows)
    outputs = reference(**batch, return_logits=True)
    assert unsmoothed == pytest.approx(outputs.ntp_loss.item(), rel=1e-5)  # an evaluation is not smoothed
    ntp_loss = LabelSmoother(smoothing)({"logits": outputs.logits}, batch["labels"], shift_labels=True)
    assert abs(ntp_loss - outputs.ntp_loss) > 1e-2
    nsp_loss = outputs.nsp_loss
    if "gradient_accumulation_steps" in options:  # negatives within a micro-batch
        parts = [plain_batch(rows[:4]), plain_batch(rows[4:])]
        losses = [reference(**part).nsp_loss * len(part["passage_labels"]) for part in parts]
        nsp_loss = sum(losses) / len(batch["passage_labels"])
    (ntp_loss + reference.config.nsp_loss_weight * nsp_loss).backward()

    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "nsp_accuracy" in entry]
    assert entry["ntp_loss"] == pytest.approx(ntp_loss.item(), rel=1e-5)
    assert entry["nsp_loss"] == pytest.approx(nsp_loss.item(), rel=1e-5)
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        change = 0.1 * expected.grad
        error = (expected - change - parameter).norm()
        assert error <= 1e-5 * change.norm() + 1e-6, name  # subtracting weights of float32 leaves about 1e-6


# ---------------------------------------------------------------------- tokens seen


@pytest.mark.parametrize(("value", "counted"), [(True, "all"), ("non_padding", "non_padding")])
def test_the_tokens_seen_are_those_of_gen_and_emb_seq(tmp_path, value, counted):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    options["padding_free"] = False
    args = arguments(tmp_path, include_num_input_tokens_seen=value, train_sampling_strategy="sequential", **options)
    trainer = CoSupTrainer(make_model(), args, train_dataset=world(NAMES[:16]))
    trainer.data_collator.call_overhead = None  # do not cut batches, so that padding can be counted here
    expected = []
    for start in range(0, 16, 4):
        rows = [trainer.train_dataset[i] for i in range(start, start + 4)]
        gen = [len(row["input_ids"]) for row in rows]
        passages = {tuple(ids) for row in rows for ids in row["passage_input_ids"]}
        emb_seq = [len(ids) for ids in passages]
        if counted == "non_padding":
            expected.append(sum(gen) + sum(emb_seq))
        else:
            expected.append(len(gen) * max(gen) + len(emb_seq) * max(emb_seq))
    trainer.train()
    seen = [entry["num_input_tokens_seen"] for entry in trainer.state.log_history if "loss" in entry]
    assert seen == [sum(expected[:2]), sum(expected)]


# ---------------------------------------------------------------------- model_init and a search


@dataclasses.dataclass
class Trial:
    """A trial as transformers' code for Optuna uses it."""

    number: int
    params: dict


class ListedTrials:
    """A search back end that tries the hyperparameters it is given, as the one for Optuna does."""

    trials: tuple = ()

    def ensure_available(self):
        pass

    def run(self, trainer, n_trials, direction):
        results = []
        for number, params in enumerate(self.trials[:n_trials]):
            trainer.train(trial=Trial(number, params))
            results.append(trainer.compute_objective(trainer.evaluate()))
            trainer.model = trainer.model_wrapped = None  # as release_memory leaves them
            trainer.accelerator.clear()
        best = int(np.argmin(results))
        return BestRun(str(best), results[best], {"objectives": results})


def search(tmp_path, monkeypatch, trials, model_init, **options):
    """Run a search over `trials`, and return the objective of each."""
    monkeypatch.setattr(ListedTrials, "trials", trials)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, ListedTrials)
    data = {"train_dataset": world(NAMES[:16]), "eval_dataset": world(NAMES[16:24])}
    trainer = CoSupTrainer(args=arguments(tmp_path, max_steps=2), model_init=model_init, **data, **options)
    best = trainer.hyperparameter_search(lambda trial: trial.params, n_trials=len(trials), backend="optuna")
    return best.hyperparameters["objectives"]


def test_a_search_trains_a_new_model_for_each_trial(tmp_path, monkeypatch):
    """A trial ends where a training with its arguments ends, whatever the trial before it did."""
    trials = (
        {"learning_rate": 1e-2, "freeze_emb_seq": True},
        {"learning_rate": 1e-3, "freeze_emb_seq": False, "nsp_batch_size": 16, "per_device_train_batch_size": 2},
    )
    called_with = []

    def model_init(trial):
        called_with.append(None if trial is None else trial.number)
        return make_model(nsp_loss_weight=1.0 if trial is None else 1.0 + trial.number)

    objectives = search(tmp_path / "search", monkeypatch, trials, model_init)
    assert called_with == [None, 0, 1]
    args = arguments(tmp_path / "alone", max_steps=2, **trials[1])
    data = {"train_dataset": world(NAMES[:16]), "eval_dataset": world(NAMES[16:24])}
    alone = CoSupTrainer(make_model(nsp_loss_weight=2.0), args, **data)
    alone.train()
    assert objectives[1] == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-5)
    assert objectives[0] != pytest.approx(objectives[1], rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "params", "message"),
    [
        ({}, {"max_length": 128}, "max_length is not what the instances were tokenized with"),
        ({}, {"supervision": "neither"}, "supervision is 'neither'"),
        ({"tie_emb_seq": True}, {"freeze_emb_seq": True}, "freeze_emb_seq: Gen and Emb_seq of this model are one"),
    ],
)
def test_a_trial_is_checked_like_a_run(tmp_path, monkeypatch, settings, params, message):
    with pytest.raises(ValueError, match=message):
        search(tmp_path, monkeypatch, (params,), lambda: make_model(**settings))


def test_a_search_without_one_evaluation_set_is_refused(tmp_path):
    trainer = CoSupTrainer(make_model(), arguments(tmp_path))
    with pytest.raises(ValueError, match="A search needs an eval_dataset"):
        trainer.hyperparameter_search(n_trials=1)


def test_model_init_makes_the_same_model_again(tmp_path):
    tokenizer = make_tokenizer()
    weights = []

    def model_init():
        model = make_model(tokenizer=tokenizer)
        torch.nn.init.normal_(model.gen.model.norm.weight)  # drawn, so it depends on the seed
        weights.append(model.gen.model.norm.weight.detach().clone())
        return model

    args = arguments(tmp_path, max_steps=1)
    trainer = CoSupTrainer(args=args, model_init=model_init, train_dataset=world(NAMES[:8]))
    losses = [trainer.train().training_loss for _ in range(2)]
    assert losses[0] == losses[1]
    assert len(weights) == 3
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
