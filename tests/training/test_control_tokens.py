"""The rows of the control tokens have a learning rate of their own, though they are parts of matrices."""

import pytest
import torch
from transformers import TrainerCallback, get_scheduler

from support.models import make_model, plain_batch
from support.training import NAMES, arguments, world
from trainer import CoSupTrainer
from trainer.card import training_record
from trainer.control_tokens import set_control_token_lr, trained_rows
from trainer.model_setup import control_token_ids, without_peft

SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.1}
INPUT, HEAD = "gen.model.embed_tokens.weight", "gen.lm_head.weight"


class Steps(TrainerCallback):
    """Check that each SGD step subtracts rate · gradient, with another rate for the rows of control tokens."""

    def __init__(self, rate, control_token_rate):
        self.rate, self.control_token_rate = rate, control_token_rate
        self.num_steps = 0
        self.expected = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        rows = {id(parameter): numbers for parameter, numbers in trained_rows(without_peft(model))}
        assert rows
        self.expected = {}
        for parameter in model.parameters():
            if parameter.grad is None:
                continue
            step = self.rate * parameter.grad
            if id(parameter) in rows:
                numbers = rows[id(parameter)]
                assert parameter.grad[numbers].any()
                step[numbers] *= self.control_token_rate / self.rate
            self.expected[parameter] = parameter.detach() - step

    def on_optimizer_step(self, args, state, control, **kwargs):
        for parameter, expected in self.expected.items():
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
        self.num_steps += 1


def trained(tmp_path, model=None, resume=None, callbacks=None, instances=16, **options):
    """Train on 8 instances a step, and return the trainer."""
    args = arguments(tmp_path, train_sampling_strategy="sequential", **options)
    trainer = CoSupTrainer(model or make_model(), args, train_dataset=world(NAMES[:instances]), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize(("optim", "tied"), [("adamw_torch", True), ("adamw_torch_fused", False), ("sgd", False)])
def test_the_rows_are_trained_as_a_parameter_group_of_their_own(tmp_path, optim, tied):
    """Three steps of a cosine schedule equal a plain loop in which the rows are separate parameters."""
    rates = {"learning_rate": 1e-3, "control_token_lr": 2e-2}
    if optim == "sgd":
        rates = {"learning_rate": 0.05, "control_token_lr": 0.5}
    settings = {"weight_decay": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "cosine", "adam_epsilon": 1e-3}
    reference = make_model(gen_kwargs={"tie_word_embeddings": tied}).train()
    model = make_model(gen_kwargs={"tie_word_embeddings": tied})
    schedule = {"max_steps": 3, "warmup_steps": 1}
    trainer = trained(tmp_path, model, optim=optim, instances=24, **rates, **settings, **schedule)

    ids = torch.tensor(control_token_ids(reference.config))
    parameters = dict(reference.named_parameters())
    matrices = [INPUT] if tied else [INPUT, HEAD]
    rows = {name: torch.nn.Parameter(parameters[name].detach()[ids].clone()) for name in matrices}
    decayed = set(trainer.get_decay_parameter_names(reference))
    groups = [
        {"params": [parameter for name, parameter in parameters.items() if name in decayed]},
        {"params": [parameter for name, parameter in parameters.items() if name not in decayed], "weight_decay": 0},
        {"params": list(rows.values()), "lr": rates["control_token_lr"]},
    ]
    if optim == "sgd":
        optimizer = torch.optim.SGD(groups, lr=rates["learning_rate"], weight_decay=0.1)
    else:
        optimizer = torch.optim.AdamW(groups, lr=rates["learning_rate"], weight_decay=0.1, eps=1e-3)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=3)
    for step in range(3):
        batch = plain_batch([trainer.train_dataset[i] for i in range(8 * step, 8 * step + 8)])
        whole = {name: parameters[name].index_copy(0, ids, rows[name]) for name in matrices}
        torch.func.functional_call(reference, whole, kwargs=batch).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for name in matrices:
            parameters[name][ids] = rows[name]
    moved = parameters[INPUT] - make_model(gen_kwargs={"tie_word_embeddings": tied}).get_input_embeddings().weight
    assert moved[ids].norm(dim=1).min() > 2 * moved.norm(dim=1).median()
    for name, parameter in weights(trainer).items():
        torch.testing.assert_close(parameter, parameters[name], rtol=1e-4, atol=2e-6, msg=name)


def test_other_weights_take_the_same_step_and_the_same_rate_changes_nothing(tmp_path):
    """Bit by bit after one step of AdamW, with GradCache and gradient accumulation."""
    batches = {"nsp_batch_size": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    options = {**batches, "learning_rate": 1e-2, "weight_decay": 0.1, "warmup_steps": 0, "max_steps": 1}
    start = make_model().get_input_embeddings().weight.detach()
    plain = weights(trained(tmp_path, **options))
    same = weights(trained(tmp_path, control_token_lr=1e-2, **options))
    assert all(torch.equal(same[name], parameter) for name, parameter in plain.items())
    other = trained(tmp_path, control_token_lr=5e-2, **options)
    ids = control_token_ids(other.model.config)
    change = 5 * (plain[INPUT][ids] - start[ids])
    for name, parameter in weights(other).items():
        if name == INPUT:
            torch.testing.assert_close(parameter[ids], start[ids] + change, rtol=0, atol=1e-6)
            parameter[ids] = plain[name][ids]
        assert torch.equal(parameter, plain[name]), name


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    options = {"max_steps": 4, "control_token_lr": 3e-2, "save_strategy": "steps", "save_steps": 2}
    whole = weights(trained(tmp_path, **options))
    resumed = trained(tmp_path, resume=str(tmp_path / "checkpoint-2"), **options)
    assert all(torch.equal(parameter, whole[name]) for name, parameter in weights(resumed).items())
    record = training_record(resumed.args, resumed.model, None, resumed.state)["arguments"]
    assert record["learning rate of control tokens"] == "0.03"


KINDS = {
    "tokens": {"trainable_token_indices": [5, 6]},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, about tied weights
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_keep_the_rate_of_other_tokens(tmp_path, kind, tied):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **KINDS[kind])
    model = make_model(gen_kwargs={"tie_word_embeddings": tied})
    args = arguments(tmp_path, max_steps=2, control_token_lr=1.0, **SGD)
    steps = Steps(0.1, 1.0)
    options = {"train_dataset": world(NAMES[:16]), "callbacks": [steps], "peft_config": config}
    trainer = CoSupTrainer(model, args, **options)
    trainer.train()
    assert steps.num_steps == 2
    numbers = [(len(parameter), len(rows)) for parameter, rows in trained_rows(without_peft(trainer.model))]
    matrix_sizes = {"tokens": [5, 3], "saved": [400, 400]}[kind]  # [5, 6] are of Gen's input embeddings
    assert numbers == [(size, 3) for size in matrix_sizes[: 1 if tied else 2]]


def test_an_encoder_that_reads_queries_with_gens_tokenizer_has_such_rows_too(tmp_path):
    steps = Steps(0.1, 1.0)
    model = make_model(query_from="emb_seq")
    options = {"max_steps": 1, "supervision": "nsp", "control_token_lr": 1.0, **SGD}
    trained(tmp_path, model, callbacks=[steps], **options)  # Gen is frozen
    ((parameter, _),) = trained_rows(model)
    assert parameter is model.emb_seq.get_input_embeddings().weight and steps.num_steps == 1


def test_given_optimizers_scale_their_own_rate(tmp_path):
    """The rate of their parameter groups counts, not args.learning_rate; a second training does not scale twice."""
    model = make_model()
    args = arguments(tmp_path, max_steps=1, control_token_lr=1.0, **SGD)
    data = {"train_dataset": world(NAMES[:8])}
    steps = Steps(0.2, 1.0)
    optimizers = torch.optim.SGD(model.parameters(), lr=0.2), None
    trainer = CoSupTrainer(model, args, callbacks=[steps], optimizers=optimizers, **data)
    trainer.train()
    trainer.train()
    assert steps.num_steps == 2
    steps = Steps(0.3, 1.0)
    chosen = torch.optim.SGD, {"lr": 0.3}
    CoSupTrainer(make_model(), args, callbacks=[steps], optimizer_cls_and_kwargs=chosen, **data).train()
    assert steps.num_steps == 1


def test_every_new_model_of_model_init_has_the_rate(tmp_path):
    """Each training makes a model and an optimiser."""
    steps = Steps(0.1, 1.0)
    args = arguments(tmp_path, max_steps=1, control_token_lr=1.0, **SGD)
    options = {"model_init": lambda: make_model(), "train_dataset": world(NAMES[:8]), "callbacks": [steps]}
    trainer = CoSupTrainer(args=args, **options)
    trainer.train()
    trainer.train()
    assert steps.num_steps == 2


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_float16_skips_changes_nothing(fused):
    """A fused optimiser is called even so, and skips the step itself."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    set_control_token_lr(optimizer, model, 1.0)
    scaler = torch.amp.GradScaler("cpu")
    rows = model.get_input_embeddings().weight[control_token_ids(model.config)].detach()
    for factor, is_skipped in ((float("inf"), True), (1.0, False)):
        loss = model(torch.tensor([[5, *control_token_ids(model.config)]])).logits.sum()
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        now = model.get_input_embeddings().weight[control_token_ids(model.config)]
        assert torch.equal(now, rows) == is_skipped


class ScheduleFree(torch.optim.SGD):
    """What tells the optimisers of schedulefree from others."""

    def train(self):
        pass


@pytest.mark.parametrize(
    ("make_optimizer", "message"),
    [
        (lambda model: ScheduleFree(model.parameters(), lr=0.1), "a step of ScheduleFree is not proportional"),
        (lambda model: torch.optim.LBFGS(model.parameters(), lr=0.1), "a step of LBFGS is not proportional"),
        (lambda model: torch.optim.SGD(model.emb_seq.parameters(), lr=0.1), "the optimizer holds no row"),
        (lambda model: torch.optim.SGD(model.parameters(), lr=0.0), "learning_rate, which must be above 0"),
    ],
)
def test_an_optimizer_that_cannot_have_the_rate_is_refused(tmp_path, make_optimizer, message):
    model = make_model()
    args = arguments(tmp_path, max_steps=1, control_token_lr=1.0)
    options = {"optimizers": (make_optimizer(model), None), "train_dataset": world(NAMES[:8])}
    with pytest.raises(ValueError, match=message):
        CoSupTrainer(model, args, **options).train()


def test_a_rate_that_nothing_would_use_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no row of a control token is trained, so nothing would use it"):
        CoSupTrainer(make_model(), arguments(tmp_path, freeze_gen=True, control_token_lr=1.0))
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    model = make_model(gen_kwargs={"tie_word_embeddings": False})
    with pytest.raises(ValueError, match="control_token_lr needs rows that are trained as they are"):
        CoSupTrainer(model, arguments(tmp_path, control_token_lr=1.0), peft_config=config)
