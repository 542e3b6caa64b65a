"""A loss of either kind that a subclass adds is trained, logged, evaluated and shown; no list of names is extended."""

import copy

import pytest
import torch

from support.models import make_model
from support.training import NAMES, arguments, world
from trainer import CoSupTrainer, running
from trainer.losses import total_loss
from trainer.running import RunningFigures, widest_float

WEIGHTS = {"double_loss": 0.5, "square_loss": 0.25}


class FurtherLosses(CoSupTrainer):
    """Adds two losses: twice the NTP loss of a micro-batch, and the square of each query's NSP loss."""

    @property
    def loss_weights(self):
        return super().loss_weights | WEIGHTS

    def token_losses(self, output):
        losses = super().token_losses(output)
        if "ntp_loss" in losses:
            losses["double_loss"] = 2 * losses["ntp_loss"]
        return losses

    def embedding_losses(self, batch):
        losses, scores = super().embedding_losses(batch)
        return losses | {"square_loss": losses["nsp_loss"] ** 2}, scores


def train(model, folder, trainer_class=CoSupTrainer, **options):
    options = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"} | options
    options |= {"train_sampling_strategy": "sequential", "learning_rate": 0.1}
    trainer = trainer_class(copy.deepcopy(model), arguments(folder, **options), train_dataset=world(NAMES[:8]))
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    return trainer, entry


def test_further_losses_are_trained_logged_evaluated_and_shown(tmp_path):
    model = make_model()
    trainer, entry = train(model, tmp_path / "a", FurtherLosses)
    weights = trainer.loss_weights
    assert entry["double_loss"] == pytest.approx(2 * entry["ntp_loss"], rel=1e-6)
    assert entry["square_loss"] > entry["nsp_loss"] ** 2  # the mean of squares, and queries differ
    assert entry["loss"] == pytest.approx(sum(weight * entry[name] for name, weight in weights.items()), rel=1e-4)

    metrics = trainer.evaluate(world(NAMES[8:18]))
    assert metrics["eval_double_loss"] == pytest.approx(2 * metrics["eval_ntp_loss"], rel=1e-6)
    total = sum(weight * metrics[f"eval_{name}"] for name, weight in weights.items())
    assert metrics["eval_loss"] == pytest.approx(total, rel=1e-6)

    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "a" / "README.md").read_text()
    assert "| step | loss | ntp_loss | nsp_loss | double_loss | square_loss | nsp_accuracy |" in card


def test_grad_cache_takes_further_losses_of_both_kinds(tmp_path):
    model = make_model()
    whole, entry = train(model, tmp_path / "a", FurtherLosses)
    options = {"nsp_batch_size": 8, "per_device_train_batch_size": 3}
    cached, cached_entry = train(model, tmp_path / "b", FurtherLosses, **options)
    for name in ("loss", "ntp_loss", "nsp_loss", "double_loss", "square_loss"):
        assert cached_entry[name] == pytest.approx(entry[name], rel=1e-5)
    before = dict(model.named_parameters())
    after_cached_step = dict(cached.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        update = (parameter - before[name]).norm()
        assert (after_cached_step[name] - parameter).norm() <= 1e-5 * update + 1e-6, name


def test_further_losses_change_the_gradient(tmp_path):
    model = make_model()
    plain, _ = train(model, tmp_path / "a")
    more, _ = train(model, tmp_path / "b", FurtherLosses)
    for part in ("gen", "emb_seq"):
        pairs = zip(getattr(plain.model, part).parameters(), getattr(more.model, part).parameters(), strict=True)
        assert any((first - second).norm() > 1e-3 for first, second in pairs)


def test_a_loss_without_a_weight_is_named():
    with pytest.raises(KeyError, match="z_loss"):
        total_loss({"z_loss": torch.ones(())}, {"ntp_loss": 1.0})


def test_running_figures_are_means_over_steps_and_queries():
    running = RunningFigures(["ntp_loss"])
    for loss in (1.0, 3.0):
        running.add_step()
        running.add_losses({"ntp_loss": torch.tensor(loss)})
    scores = torch.tensor([[2.0, 1.0, float("-inf")], [1.0, 1.0, 0.0]])
    running.add_scores(scores, torch.tensor([0, 1]))  # right with one negative; a tie, with two
    figures = running.averages(torch.device("cpu"), lambda sums: sums)
    assert figures["ntp_loss"] == 2.0
    assert figures["nsp_accuracy"] == 0.5
    assert figures["num_negatives"] == 1.5


def test_sums_are_in_float64_except_on_a_mac_which_has_none(monkeypatch):
    dtypes = []
    figures = RunningFigures(["ntp_loss"])
    figures.averages(torch.device("cpu"), lambda sums: dtypes.append(sums.dtype) or sums)
    monkeypatch.setattr(running, "widest_float", lambda device: widest_float(torch.device("mps")))
    figures.averages(torch.device("cpu"), lambda sums: dtypes.append(sums.dtype) or sums)
    assert dtypes == [torch.float64, torch.float32]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_matryoshka_loss_is_the_mean_nsp_loss_of_cut_embeddings(tmp_path, similarity):
    model = make_model(similarity=similarity, nsp_loss_weight=0.5)
    _, entry = train(model, tmp_path / "whole", matryoshka_dims=[4, 16])
    nsp_losses = []
    for dim in (4, 16):
        model.config.truncate_dim = dim
        _, cut = train(model, tmp_path / str(dim))
        nsp_losses.append(cut["nsp_loss"])
    assert abs(nsp_losses[0] - nsp_losses[1]) > 0.01
    assert entry["matryoshka_loss"] == pytest.approx(sum(nsp_losses) / 2, rel=1e-4)
    total = entry["ntp_loss"] + 0.5 * entry["nsp_loss"] + 0.5 * entry["matryoshka_loss"]
    assert entry["loss"] == pytest.approx(total, rel=1e-4)


def test_matryoshka_dims_must_cut_embeddings_that_are_trained(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="A width of matryoshka_dims is 0, expected an integer of 1 or more"):
        arguments(tmp_path, matryoshka_dims=[8, 0])
    with pytest.raises(ValueError, match="matryoshka_dims holds 32, expected widths below .* 32"):
        CoSupTrainer(model, arguments(tmp_path, matryoshka_dims=[8, 32]), train_dataset=world(NAMES[:8]))
    with pytest.raises(ValueError, match="supervision='ntp' does not train"):
        arguments(tmp_path, matryoshka_dims=[8], supervision="ntp")
