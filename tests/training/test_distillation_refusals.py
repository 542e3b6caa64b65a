"""What a distillation refuses: arguments that do not fit, and instances, models and readers that cannot be used."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from support.models import make_emb_seq, make_model
from support.training import NAMES, arguments, questions
from trainer import CoSupTrainer
from trainer.arguments import check_sharding
from trainer.watch import explained_memory_errors

ATTENTION = {"supervision": "attention_distillation"}
PERPLEXITY = {"supervision": "perplexity_distillation"}
K = 3
ASKED, CORPUS = questions(NAMES[:20])
ASKED = ASKED[:6]


@pytest.fixture(scope="module")
def models():
    """A model for each place that queries come from."""
    return {
        "gen": make_model(),
        "emb_seq": make_model(query_from="emb_seq"),
        "query_encoder": make_model(query_from="query_encoder", query_encoder=make_emb_seq(seed=2)),
    }


def make_trainer(model, folder, instances=ASKED, **options):
    args = arguments(folder, **{"max_steps": 1, "num_candidates": K, **options})
    return CoSupTrainer(copy.deepcopy(model), args, train_dataset=instances, corpus=CORPUS)


FITS_NOT = [
    ({"num_candidates": 1}, "num_candidates=1 with a distillation: there is nothing to compare"),
    ({"num_candidates": 0}, "num_candidates is 0, expected an integer of 1 or more"),
    ({"refresh_index_steps": 0}, "refresh_index_steps is 0, expected an integer of 1 or more"),
    ({"target_temperature": 0.0}, "target_temperature is 0.0, expected a finite number above 0"),
    ({"target_temperature": float("nan")}, "target_temperature is nan, expected a finite number above 0"),
    ({"distillation_target": "emdr"}, "distillation_target is 'emdr', but .* has 'attention', 'attention_shares'"),
    ({"supervision": "co", "candidates_from": "index"}, "which supervision='co' cannot train: choose 'ntp'"),
    ({"supervision": "nsp", "candidates_from": "instance"}, "which supervision='nsp' cannot train"),
    ({"supervision": "co", "target_temperature": 1.0}, "target_temperature is of a distillation, and .*'co' is none"),
    ({"supervision": "co", "shuffle_candidates": True}, "shuffle_candidates has no meaning without candidates"),
    ({"supervision": "co", "num_candidates": 50}, "num_candidates has no meaning without candidates"),
    ({"supervision": "co", "refresh_index_steps": 3}, "refresh_index_steps has no meaning without candidates"),
    (
        {"freeze_gen": True, "train_on_passages": True},
        "train_on_passages .* with freeze_gen does not train",
    ),
    ({"rerank_candidates": 5}, "rerank_candidates is 5, expected more than num_candidates, 5"),
    ({"candidates_from": "instance", "index_factory": "HNSW32"}, "own candidates exactly: leave it out"),
    ({"per_device_train_batch_size": 1}, "compares the instances of a step, and a step has one: raise per_device_"),
    ({"candidates_from": "corpus"}, "candidates_from is 'corpus', expected one of None, 'index', 'instance'"),
    ({"freeze_gen": True, "label_smoothing_factor": 0.1}, "with freeze_gen does not train"),
    ({"matryoshka_dims": [8]}, "not for a distillation"),
]


@pytest.mark.parametrize(("options", "message"), FITS_NOT)
def test_arguments_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **{**ATTENTION, **options})


def test_a_retriever_that_is_frozen_cannot_be_taught(models, tmp_path):
    remedy = "all of it is frozen.*train the reader alone: supervision='ntp' with candidates_from='index'"
    with pytest.raises(ValueError, match=remedy):
        make_trainer(models["emb_seq"], tmp_path, **ATTENTION, freeze_emb_seq=True)
    make_trainer(models["query_encoder"], tmp_path, **ATTENTION, freeze_emb_seq=True)  # its queries learn


def test_what_cannot_be_trained_is_refused_before_training(models, tmp_path):
    model = models["gen"]
    with pytest.raises(ValueError, match="Instance 'hinmuru' has answers and no segments: its passage is unknown"):
        CoSupTrainer(copy.deepcopy(model), arguments(tmp_path), train_dataset=ASKED)
    for answers, message in (([""], r"answers\[0\] is empty"), ("Kodu", "answers is 'Kodu', expected a list")):
        with pytest.raises(ValueError, match=f"training set, row 0: {message}"):
            make_trainer(model, tmp_path, [{"input": "q", "answers": answers}], **ATTENTION)
    with pytest.raises(ValueError, match="has no candidates, and candidates_from='instance'"):
        make_trainer(model, tmp_path, **ATTENTION, candidates_from="instance")
    with pytest.raises(ValueError, match="Gen reads at most 512 tokens, .* Set max_length=512"):
        make_trainer(model, tmp_path, **ATTENTION, max_length=513)
    tokenized = make_trainer(model, tmp_path, **ATTENTION).train_dataset
    with pytest.raises(ValueError, match="was tokenized for candidates_from, which is not set"):
        CoSupTrainer(copy.deepcopy(model), arguments(tmp_path), train_dataset=tokenized)
    args = arguments(tmp_path, **ATTENTION)
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        with pytest.raises(ValueError, match=f"{kind.value} shards it. One process and DDP work"):
            check_sharding(args, kind, SimpleNamespace(fsdp_version=2))


@pytest.mark.parametrize("supervision", [ATTENTION, PERPLEXITY])
def test_a_reader_that_is_not_finite_names_the_instance(models, tmp_path, supervision):
    trainer = make_trainer(models["emb_seq"], tmp_path, **supervision, freeze_gen=True)
    with torch.no_grad():
        trainer.model.gen.model.layers[0].self_attn.v_proj.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=f"of instance {ASKED[0]['id']!r} are NaN or infinite"):
        trainer.train()


def test_too_little_memory_names_the_number_of_candidates(tmp_path):
    for options, is_named in ((ATTENTION, True), ({}, False)):
        with pytest.raises(torch.OutOfMemoryError) as error, explained_memory_errors(arguments(tmp_path, **options)):
            raise MemoryError
        assert ("a num_candidates below 5" in str(error.value)) == is_named
