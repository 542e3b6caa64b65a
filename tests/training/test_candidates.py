"""Candidates: an index of the training corpus that is built again while training, and travels with checkpoints."""

import os
import shutil

import numpy as np
import pytest
import torch

from modeling_cosup import PassageIndex
from modeling_cosup.hub_cosup import checkpoint_files
from modeling_cosup.index_build_cosup import ShardBuilder
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, encode_passages_for_gen
from support.models import PASSAGES, make_model, make_tokenizer
from support.training import NAMES, arguments, questions
from trainer import CoSupTrainer, candidate_files
from trainer.candidate_corpus import read_candidates_corpus
from trainer.candidates import CandidateIndex
from trainer.passage_contents import PassageContents

DROPOUT = {"emb_seq": "gpt2", "query_from": "emb_seq"}  # gpt2 has dropout: its losses depend on the random numbers
ASKED, CORPUS = questions(NAMES[:30])
HELD_OUT, HELD_OUT_CORPUS = questions(NAMES[30:36])
CORPUS = CORPUS + HELD_OUT_CORPUS


def candidate_index(folder, model, passages=PASSAGES, **options):
    """An index of candidates as CoSupTrainer makes it, not built yet."""
    args = arguments(folder, supervision="ntp", candidates_from="index", **{"num_candidates": 2, **options})
    corpus = read_candidates_corpus(passages, model, PassageContents(), {})
    return CandidateIndex(corpus, args)


def queries(count, model, seed=0):
    drawn = torch.randn(count, model.config.embedding_size, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=1)


def shake(model, seed=0):
    """Change the weights of Emb_seq, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.emb_seq.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def trainer_of(folder, model=None, instances=None, corpus=None, eval_dataset=None, **options):
    """A trainer that distils, unless told otherwise."""
    options = {"supervision": "attention_distillation", "num_candidates": 3, "refresh_index_steps": 2, **options}
    options = {"max_steps": 5, "per_device_train_batch_size": 4, **options}
    return CoSupTrainer(
        model or make_model(**DROPOUT),
        arguments(folder, **options),
        train_dataset=instances or ASKED,
        eval_dataset=eval_dataset,
        corpus=CORPUS if corpus is None else corpus,
    )


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.fixture
def embedded(monkeypatch):
    """The number of passages of each call that builds or reranks: filled while the test runs."""
    counts = []
    embed = ShardBuilder.embed

    def counting(builder, passage_ids, token_ids, embeddings, bar=None):
        counts.append(len(token_ids))
        embed(builder, passage_ids, token_ids, embeddings, bar)

    monkeypatch.setattr(ShardBuilder, "embed", counting)
    return counts


# ---------------------------------------------------------------------- search


def test_candidates_are_the_nearest_passages_as_gen_and_emb_seq_read_them(tmp_path):
    model = make_model(passage_prompt="passage: ")  # so that the two read different tokens
    candidates = candidate_index(tmp_path, model)
    candidates.refresh(model, 0)
    query_embeds = queries(3, model)
    found = candidates.search(model, query_embeds)
    expected = model.build_index(PASSAGES, show_progress_bar=False)
    scores, rows = expected.search(query_embeds, 2)
    for of_query, query_scores, query_rows in zip(found, scores, rows, strict=True):
        assert [candidate.id for candidate in of_query] == [PASSAGES[row]["id"] for row in query_rows]
        torch.testing.assert_close([candidate.score for candidate in of_query], query_scores.tolist())
        for candidate, row in zip(of_query, query_rows, strict=True):
            passage = PASSAGES[row]
            assert (candidate.title, candidate.text) == (passage["title"], passage["text"])
            assert [candidate.input_ids] == encode_passages_for_gen(model.tokenizer, [passage], model.config)
            ids = encode_passages_for_emb_seq(model.emb_seq_tokenizer, [passage], model.config)
            assert [candidate.emb_seq_input_ids] == ids


def test_pools_limit_the_search_and_may_be_small(tmp_path, model):
    candidates = candidate_index(tmp_path, model)
    candidates.refresh(model, 0)
    found = candidates.search(model, queries(3, model), [["p4", "p1", "p2"], ["p3"], None])
    assert {candidate.id for candidate in found[0]} < {"p1", "p2", "p4"}
    assert [len(of_query) for of_query in found] == [2, 1, 2]
    assert [candidate.id for candidate in found[1]] == ["p3"]
    with pytest.raises(
        ValueError, match=r"candidates that are not in the corpus.*\['nowhere'\].*CoSupTrainer was made"
    ):
        candidates.search(model, queries(1, model), [["p1", "nowhere"]])


def test_no_query_finds_nothing(tmp_path, model):
    candidates = candidate_index(tmp_path, model, rerank_candidates=4)
    candidates.refresh(model, 0)
    assert candidates.search(model, queries(0, model)) == []


def test_reranking_sorts_by_fresh_scores_and_encodes_each_passage_once(tmp_path, model, embedded):
    candidates = candidate_index(tmp_path, model, rerank_candidates=4)
    candidates.refresh(model, 0)
    query_embeds = queries(5, model)
    stale_scores, stale_rows = candidates.index.search(query_embeds, 4)
    shake(model)
    embedded.clear()
    model.train()
    found = candidates.search(model, query_embeds)
    assert model.training
    assert embedded == [len(np.unique(stale_rows))]
    fresh = model.build_index(PASSAGES, show_progress_bar=False)
    for query, of_query, rows in zip(query_embeds, found, stale_rows, strict=True):
        scores, best = fresh.search(query[None], 2, [rows])
        assert [candidate.id for candidate in of_query] == [PASSAGES[row]["id"] for row in best[0]]
        torch.testing.assert_close([candidate.score for candidate in of_query], scores[0].tolist(), atol=1e-5, rtol=0)
    assert any(of_query[0].id != PASSAGES[rows[0]]["id"] for of_query, rows in zip(found, stale_rows, strict=True))


def test_reranking_multiplies_in_float32_under_autocast(tmp_path, model):
    candidates = candidate_index(tmp_path, model, rerank_candidates=6)
    candidates.refresh(model, 0)
    query_embeds = queries(2, model)
    with torch.autocast("cpu", torch.bfloat16):
        found = candidates.search(model, query_embeds)
        embeddings = model.build_index(PASSAGES, show_progress_bar=False).embeddings
    for query, of_query in zip(query_embeds, found, strict=True):
        scores = [float(embeddings[int(candidate.id[1:])] @ query) for candidate in of_query]
        torch.testing.assert_close([candidate.score for candidate in of_query], scores, atol=1e-6, rtol=0)


def test_retrieving_draws_no_random_numbers(tmp_path):
    model = make_model(**DROPOUT).train()
    candidates = candidate_index(tmp_path, model, rerank_candidates=4, index_factory="IVF2,Flat")
    state = torch.get_rng_state()
    with candidates.fresh(model, 0):
        candidates.search(model, queries(3, model))
    candidates.refresh(model, 0)
    candidates.search(model, queries(3, model))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.emb_seq.training


def test_an_approximate_search_is_trained_at_each_refresh(tmp_path, model):
    candidates = candidate_index(tmp_path, model, index_factory="IVF2,Flat", refresh_index_steps=1)
    for step in range(2):
        candidates.refresh(model, step)
        assert candidates.index.config["approximate"]["index_factory"] == "IVF2,Flat"
        assert candidates.index._approximate is not None
        shake(model)
    with candidates.fresh(model):
        assert candidates.index._approximate is not None


def test_an_approximate_search_that_finds_too_few_is_completed_by_an_exact_one(tmp_path, model):
    candidates = candidate_index(tmp_path, model, index_factory="IVF6,Flat", num_candidates=4)
    candidates.refresh(model, 0)
    query_embeds = queries(3, model)
    _, rows = candidates.index.search(query_embeds, 4)
    assert (rows < 0).any(1).all()  # it reads one of six lists
    exact = model.build_index(PASSAGES, show_progress_bar=False).search(query_embeds, 4)[1]
    for pools in (None, [None, ["p1"], None]):
        expected = [[PASSAGES[row]["id"] for row in query_rows] for query_rows in exact]
        if pools is not None:
            expected[1] = ["p1"]
        found = candidates.search(model, query_embeds, pools)
        assert [[candidate.id for candidate in of_query] for of_query in found] == expected


# ---------------------------------------------------------------------- refresh


TWO_TOKENIZERS = {"emb_seq_tokenizer": make_tokenizer(texts=["Other words for the tokenizer of Emb_seq."])}


@pytest.mark.parametrize("config", [{}, {"passage_prompt": "passage: "}, {"tie_emb_seq": True}, TWO_TOKENIZERS])
def test_a_refresh_equals_a_new_index_and_keeps_what_does_not_change(tmp_path, config, monkeypatch):
    monkeypatch.setattr(candidate_files, "SMALLEST_SHARD", 2)
    monkeypatch.setattr(candidate_files, "NUM_SHARDS", 3)
    model = make_model(**config)
    candidates = candidate_index(tmp_path, model, refresh_index_steps=2)
    candidates.refresh(model, 0)
    first = candidates.index
    kept = {path.name: path.stat().st_ino for path in first.folder.iterdir() if path.name.startswith(("pass", "ids"))}
    shake(model)
    candidates.refresh(model, 1)
    assert candidates.index is first  # not due
    candidates.refresh(model, 2)
    monkeypatch.setattr(candidate_files, "emb_seq_ids", None)  # tokenized once
    shake(model, seed=1)
    candidates.refresh(model, 4)
    candidates.refresh(model, 4)
    expected = model.build_index(PASSAGES, shard_size=2, show_progress_bar=False)
    assert candidates.index.config["shards"] == [2, 2, 2] == expected.config["shards"]
    torch.testing.assert_close(candidates.index.embeddings, expected.embeddings, rtol=0, atol=0)
    assert list(candidates.index) == list(expected)
    assert candidates.index.rows_of(["p5", "p0"]).tolist() == [5, 0]
    candidates.index.check_model(model)
    PassageIndex.from_pretrained(candidates.index.folder, verify=True)
    assert candidates.step == 4
    for name, inode in kept.items():
        assert (candidates.index.folder / name).stat().st_ino == inode
    assert sorted(os.listdir(tmp_path / "candidates")) == ["step-4", "tokens"]
    candidates.close(model)
    assert not os.listdir(tmp_path)


def test_a_frozen_emb_seq_is_embedded_once(tmp_path, model, embedded):
    model.emb_seq.requires_grad_(False)
    candidates = candidate_index(tmp_path, model, refresh_index_steps=1)
    for step in range(3):
        candidates.refresh(model, step)
        with candidates.fresh(model, step):
            pass
    assert embedded == [len(PASSAGES)]


def test_a_refresh_that_fails_leaves_the_earlier_index(tmp_path, model, monkeypatch):
    candidates = candidate_index(tmp_path, model, refresh_index_steps=1)
    candidates.refresh(model, 0)
    query_embeds = queries(3, model)
    before = candidates.search(model, query_embeds)
    embed = ShardBuilder.embed

    def half(builder, passage_ids, token_ids, embeddings, bar=None):
        embed(builder, passage_ids[:2], token_ids[:2], embeddings[:2], bar)
        raise OSError("No space left on device")

    monkeypatch.setattr(ShardBuilder, "embed", half)
    with pytest.raises(OSError, match="No space"):
        candidates.refresh(model, 1)
    assert candidates.search(model, query_embeds) == before
    monkeypatch.setattr(ShardBuilder, "embed", embed)
    candidates.refresh(model, 1)
    assert candidates.step == 1
    assert sorted(os.listdir(tmp_path / "candidates")) == ["step-1", "tokens"]


def test_what_a_killed_build_left_is_not_taken_for_this_one(tmp_path, model):
    other = make_model(emb_seq_kwargs={"seed": 5})
    unfinished = tmp_path / "candidates" / ".step-0.unfinished"
    other.build_index(PASSAGES, save_directory=tmp_path / "candidates" / "step-0", show_progress_bar=False)
    other.build_index(PASSAGES, save_directory=tmp_path / "candidates" / "x", show_progress_bar=False)
    (tmp_path / "candidates" / "x").rename(unfinished)
    candidates = candidate_index(tmp_path, model)
    candidates.refresh(model, 0)
    candidates.index.check_model(model)
    assert sorted(os.listdir(tmp_path / "candidates")) == ["step-0"]


def test_what_others_have_put_next_to_the_indexes_stays(tmp_path, model):
    own = ["nq.jsonl", "nq/pools.jsonl", "step-9/notes.txt", "step-list/notes.txt", "evaluation/nq.jsonl"]
    for name in own:
        (tmp_path / "candidates" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "candidates" / name).write_text("mine")
    candidates = candidate_index(tmp_path, model, refresh_index_steps=1)
    candidates.restart()
    for step in range(2):
        candidates.refresh(model, step)
        with candidates.fresh(model, step + 100):
            shake(model)
    with pytest.raises(FileExistsError, match="step-9 exists, is not empty and is not a passage index"):
        candidates.refresh(model, 9)
    candidates.close(model)
    with pytest.raises(FileExistsError, match="evaluation exists, is not empty and is not a passage index"):
        candidates.fresh(model).__enter__()
    candidates.restart()
    files = [path for path in (tmp_path / "candidates").rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(tmp_path / "candidates")) for path in files) == sorted(own)


def test_an_evaluation_does_not_disturb_a_training_of_the_same_folder(tmp_path, model):
    training = candidate_index(tmp_path, model, refresh_index_steps=1)
    for step in range(2):  # from the second refresh on, there are tokens too
        training.refresh(model, step)
        shake(model)
    with candidate_index(tmp_path, model).fresh(model):  # in another process
        assert sorted(os.listdir(tmp_path / "candidates")) == ["evaluation", "step-1", "tokens"]
        training.refresh(model, 2)
        assert sorted(os.listdir(tmp_path / "candidates")) == ["evaluation", "step-2", "tokens"]
        training.close(model)
    assert not os.listdir(tmp_path)


def test_an_evaluation_searches_fresh_weights_and_a_refresh_of_the_same_step_takes_its_index(
    tmp_path, model, embedded
):
    candidates = candidate_index(tmp_path, model)
    candidates.refresh(model, 0)
    trained = candidates.index
    query_embeds = queries(3, model)
    before = candidates.search(model, query_embeds)
    shake(model)
    with candidates.fresh(model, 100), candidates.fresh(model, 100):  # a second set
        expected = model.build_index(PASSAGES, show_progress_bar=False).embeddings
        torch.testing.assert_close(candidates.index.embeddings, expected, rtol=0, atol=0)
    assert candidates.index is trained
    assert candidates.search(model, query_embeds) == before
    embedded.clear()
    candidates.refresh(model, 100)
    assert embedded == []
    torch.testing.assert_close(candidates.index.embeddings, expected, rtol=0, atol=0)
    with candidates.fresh(model, 100):
        assert embedded == []


def test_a_given_index_is_searched_until_the_first_refresh(tmp_path, model, embedded):
    index = model.build_index([*PASSAGES, {"id": "gone", "text": "It was deleted."}], show_progress_bar=False)
    index.delete(["gone"])
    candidates = candidate_index(tmp_path, model, index, refresh_index_steps=2)
    embedded.clear()
    candidates.restart()
    candidates.refresh(model, 0)
    assert candidates.index is index
    shake(model)
    candidates.refresh(model, 2)
    assert embedded == [len(PASSAGES)]
    expected = model.build_index(PASSAGES, show_progress_bar=False)
    torch.testing.assert_close(candidates.index.embeddings, expected.embeddings, rtol=0, atol=0)
    candidates.close(model)
    candidates.restart()  # a second training begins with other weights
    candidates.refresh(model, 0)
    assert candidates.index is not index
    assert len(index) == len(PASSAGES)


# ---------------------------------------------------------------------- training


def test_training_refreshes_on_schedule_and_leaves_nothing(tmp_path, monkeypatch, embedded):
    steps = []
    build = CandidateIndex._build

    def recording(candidates, model, name):
        steps.append(name)
        return build(candidates, model, name)

    monkeypatch.setattr(CandidateIndex, "_build", recording)
    trainer = trainer_of(tmp_path, eval_dataset=HELD_OUT)
    trainer.train()
    assert steps == ["step-0", "step-2", "step-4"]
    assert embedded == [len(CORPUS)] * 3
    assert not os.listdir(tmp_path)
    trainer.train()  # weights have changed: a new training begins with a new index
    assert steps[3:] == ["step-0", "step-2", "step-4"]
    monkeypatch.setattr(CoSupTrainer, "training_step", None)
    with pytest.raises(TypeError):
        trainer.train()
    assert not os.listdir(tmp_path)
    metrics = trainer.evaluate()
    assert "eval_hit_rate@3" in metrics
    assert steps[-1] == "evaluation"
    assert not os.listdir(tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Losses of 7 steps, and the output folder with a checkpoint of every third."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = trainer_of(folder, max_steps=7, save_strategy="steps", save_steps=3, bf16=True)
    trainer.train()
    return losses(trainer), folder


def test_evaluating_does_not_change_training(tmp_path, uninterrupted):
    trainer = trainer_of(tmp_path, max_steps=7, eval_dataset=HELD_OUT, eval_strategy="steps", eval_steps=1, bf16=True)
    trainer.train()
    assert losses(trainer) == uninterrupted[0]


def test_a_resumed_run_gives_the_same_losses(tmp_path, uninterrupted):
    """Killed after step 7: the index of step 6 must not be taken for that of step 2, which checkpoint 3 needs."""
    expected, folder = uninterrupted
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    later = make_model(**DROPOUT)
    shake(later)
    later.build_index(CORPUS, save_directory=tmp_path / "candidates" / "step-6", show_progress_bar=False)
    trainer = trainer_of(tmp_path, max_steps=7, save_strategy="steps", save_steps=3, save_total_limit=1, bf16=True)
    trainer.train(resume_from_checkpoint=True)
    resumed = losses(trainer)
    assert list(resumed)[-4:] == [4, 5, 6, 7]
    assert {step: resumed[step] for step in (4, 5, 6, 7)} == {step: expected[step] for step in (4, 5, 6, 7)}
    assert os.listdir(tmp_path) == ["checkpoint-7"]  # the rotation removed the index with its checkpoint


def test_a_checkpoint_holds_the_index_as_links_and_pushes_none_of_it(tmp_path, uninterrupted):
    _, folder = uninterrupted
    for step, refreshed in ((3, 2), (6, 4)):
        state = (folder / f"checkpoint-{step}" / "candidates" / "candidates.json").read_text()
        assert f'"step": {refreshed}' in state
        PassageIndex.from_pretrained(folder / f"checkpoint-{step}" / "candidates" / "index", verify=True)
    passages = [folder / f"checkpoint-{step}" / "candidates/index/passages-00000.arrow" for step in (3, 6)]
    assert os.path.samefile(*passages)  # written once in the whole run
    assert not any("candidates" in name or "embeddings" in name for name in checkpoint_files(folder / "checkpoint-6"))


def test_resuming_with_another_corpus_is_refused(tmp_path, uninterrupted):
    _, folder = uninterrupted
    trainer = trainer_of(tmp_path, corpus=CORPUS[:-1])
    with pytest.raises(ValueError, match="checkpoint-3 was trained with another corpus"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))


def test_resuming_reads_no_faiss_file_and_checks_the_others(tmp_path):
    """A checkpoint may be a download."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "refresh_index_steps": 100}
    trainer_of(tmp_path / "first", index_factory="IVF2,Flat", **options).train()
    checkpoint = tmp_path / "first" / "checkpoint-1"
    (faiss_file,) = (checkpoint / "candidates" / "index").glob("index-*.faiss")
    faiss_file.write_bytes(b"\0" * faiss_file.stat().st_size)
    searched = {}
    for factory in ("IVF2,Flat", None):
        trainer = trainer_of(tmp_path / str(factory), index_factory=factory, **options)
        search = trainer.candidates.search

        def recording(*args, trainer=trainer, factory=factory, search=search):
            searched[factory] = trainer.candidates.index._approximate is not None
            return search(*args)

        trainer.candidates.search = recording
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 3
    assert searched == {"IVF2,Flat": True, None: False}
    ids_file = next((checkpoint / "candidates" / "index").glob("ids-*"))
    ids_file.write_bytes(ids_file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="ids-.* is damaged: its SHA-256 differs"):
        trainer_of(tmp_path / "again", **options).train(resume_from_checkpoint=str(checkpoint))


def test_resuming_before_the_first_refresh_searches_the_given_index(tmp_path):
    index = make_model(**DROPOUT).build_index(CORPUS, show_progress_bar=False)
    trainer = trainer_of(tmp_path, corpus=index, max_steps=3, save_strategy="steps", save_steps=1)
    trainer.train()
    assert os.listdir(tmp_path / "checkpoint-1" / "candidates") == ["candidates.json"]
    expected = losses(trainer)
    for resumed in (trainer_of(tmp_path, corpus=index, max_steps=3), trainer):  # a new process, and the same one
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert losses(resumed) == expected


def test_each_model_of_model_init_gets_an_index_of_its_own(tmp_path, embedded):
    trainer = CoSupTrainer(
        None,
        arguments(tmp_path, supervision="attention_distillation", num_candidates=3, max_steps=1),
        train_dataset=ASKED,
        corpus=CORPUS,
        model_init=lambda: make_model(**DROPOUT),
    )
    for _ in range(2):
        trainer.train()
    assert embedded == [len(CORPUS)] * 2
    trainer.args.num_candidates = 99  # a trial of hyperparameter_search()
    with pytest.raises(ValueError, match="num_candidates is 99, and the corpus holds only 28 passages"):
        trainer.train()
