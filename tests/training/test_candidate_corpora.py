"""The corpora that candidates come from, the candidates that instances bring, and what is refused."""

import os
import re

import datasets
import pytest

from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq
from support.models import PASSAGES, make_model
from support.recipes import write
from support.training import NAMES, arguments, questions
from trainer import CoSupTrainer
from trainer.candidate_corpus import read_candidates_corpus
from trainer.candidates import CandidateIndex
from trainer.passage_contents import PassageContents

EMB_SEQ_QUERIES = {"emb_seq": "gpt2", "query_from": "emb_seq"}
ASKED, CORPUS = questions(NAMES[:30])
CORPUS = CORPUS + questions(NAMES[30:36])[1]


def trainer_of(folder, instances=None, corpus=None, **options):
    """A trainer that distils, unless told otherwise."""
    options = {"supervision": "attention_distillation", "num_candidates": 3, "max_steps": 5, **options}
    return CoSupTrainer(
        make_model(**EMB_SEQ_QUERIES),
        arguments(folder, **options),
        train_dataset=instances or ASKED,
        corpus=CORPUS if corpus is None else corpus,
    )


# ---------------------------------------------------------------------- candidates of the instances


def with_candidates(as_ids=False):
    """Questions, each with its passage and the next two as candidates."""
    instances = []
    for i, question in enumerate(ASKED):
        own = [CORPUS[(i + offset) % len(ASKED)] for offset in range(3)]
        instances.append({**question, "candidates": [passage["id"] for passage in own] if as_ids else own})
    return instances


@pytest.mark.parametrize(("as_ids", "kind"), [(False, "list"), (False, "dataset"), (True, "dataset")])
def test_instances_search_their_own_candidates(tmp_path, as_ids, kind, monkeypatch):
    instances = with_candidates(as_ids)
    allowed = {
        instance["id"]: {passage["id"] for passage in with_candidates()[i]["candidates"]}
        for i, instance in enumerate(instances)
    }
    found = []
    search = CandidateIndex.search

    def recording(candidates, model, query_embeds, pools=None):
        found.extend(zip(pools, search(candidates, model, query_embeds, pools), strict=True))
        return [of_query for _, of_query in found[-len(pools) :]]

    monkeypatch.setattr(CandidateIndex, "search", recording)
    trainer = CoSupTrainer(
        make_model(**EMB_SEQ_QUERIES),
        arguments(
            tmp_path, supervision="perplexity_distillation", candidates_from="instance", num_candidates=2, max_steps=2
        ),
        train_dataset=instances if kind == "list" else datasets.Dataset.from_list(instances),
        corpus=CORPUS if as_ids else None,
    )
    assert len(trainer.candidates.corpus) == len(CORPUS if as_ids else ASKED)
    trainer.train()
    assert found
    for pool, of_query in found:
        assert len(of_query) == 2
        assert {candidate.id for candidate in of_query} < set(pool)
        assert set(pool) in allowed.values()


# ---------------------------------------------------------------------- corpora, and what is refused


class OnlyRetriever:
    """A retriever with the members of the protocol, and no others."""

    def __init__(self, index):
        for name in ("fingerprint", "search", "get_passages", "rows_of", "live_rows", "check_model"):
            setattr(self, name, getattr(index, name))
        self.count = len(index)

    def __len__(self):
        return self.count


def corpora(folder):
    """The same corpus in each form that can be read again and again."""
    path = write(folder / "corpus.jsonl", PASSAGES)
    dataset = datasets.Dataset.from_list(PASSAGES)
    return [PASSAGES, tuple(PASSAGES), str(path), path, dataset, dataset.to_iterable_dataset()]


def test_a_corpus_may_come_in_any_form_that_can_be_read_again(tmp_path, model):
    read = [read_candidates_corpus(corpus, model, PassageContents(), {}) for corpus in corpora(tmp_path)]
    assert {(len(corpus), corpus.digest) for corpus in read} == {(len(PASSAGES), read[0].digest)}
    changed = [{**PASSAGES[0], "title": "New"}, *PASSAGES[1:]]
    assert read_candidates_corpus(changed, model, PassageContents(), {}).digest != read[0].digest
    candidates = CandidateIndex(read[-1], arguments(tmp_path, supervision="ntp", candidates_from="index"))
    candidates.refresh(model, 0)
    assert len(candidates.index) == len(PASSAGES)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (iter(PASSAGES), "corpus is a list_iterator, which can be read only once"),
        ([], "corpus holds no passage"),
        ([PASSAGES[0], PASSAGES[0]], "Corpus row 1: id 'p0' is already in Corpus row 0"),
        ([{"id": "x", "title": "t", "text": " "}], "Corpus row 0: text is only white space"),
        ([PASSAGES[0], {**PASSAGES[1], "text": "Another."}], "Corpus row 1: the passage id 'p1' has another title or"),
        (["missing.jsonl"], "missing.jsonl is not a file"),
    ],
)
def test_a_corpus_that_cannot_be_searched_is_refused(model, corpus, message):
    gold = PassageContents()
    for passage in PASSAGES[:2]:
        (ids,) = encode_passages_for_emb_seq(model.emb_seq_tokenizer, [passage], model.config)
        gold.add(passage["id"], tuple(ids), "training set, row 7")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        read_candidates_corpus(corpus, model, gold, {})


def index_of(model, **options):
    return model.build_index(CORPUS, show_progress_bar=False, **options)


@pytest.mark.parametrize(
    ("options", "corpus", "message"),
    [
        ({}, None, "Candidates are retrieved from a corpus: give corpus"),
        ({"num_candidates": 50}, CORPUS, "num_candidates is 50, and the corpus holds only 28 passages"),
        ({"rerank_candidates": 40}, CORPUS, "rerank_candidates is 40, and the corpus holds only 28 passages"),
        ({"index_factory": "Nonsense"}, CORPUS, "index_factory 'Nonsense' of 32 dimensions"),
        ({"index_factory": "IVF99,Flat"}, CORPUS, "99 lists need at least as many training embeddings"),
        (
            {"supervision": "separate", "num_candidates": 5},
            CORPUS,
            "corpus is what candidates are retrieved from: give candidates_from",
        ),
        ({}, lambda: index_of(make_model(emb_seq_kwargs={"seed": 9})), "This index was built by another model"),
        (
            {},
            lambda: OnlyRetriever(index_of(make_model(**EMB_SEQ_QUERIES))),
            "OnlyRetriever, which cannot be embedded again",
        ),
        (
            {"supervision": "ntp", "candidates_from": "index", "index_factory": "Flat"},
            lambda: index_of(make_model(**EMB_SEQ_QUERIES)),
            "index_factory: a given index is searched as it is",
        ),
        ({"candidates_from": "instance"}, None, "has no candidates, and candidates_from='instance' searches nothing"),
    ],
)
def test_what_cannot_be_retrieved_is_refused_before_training(tmp_path, options, corpus, message):
    options = {"supervision": "attention_distillation", "num_candidates": 3, **options}
    if callable(corpus):  # an index
        corpus = corpus()
    with pytest.raises(ValueError, match=re.escape(message)):
        CoSupTrainer(make_model(**EMB_SEQ_QUERIES), arguments(tmp_path, **options), train_dataset=ASKED, corpus=corpus)


def test_gold_passages_and_corpus_must_agree(tmp_path):
    gold = {**CORPUS[0], "text": "Another text."}
    instances = [*ASKED, {"input": "where?", "segments": [{"text": "there", "passage": gold}]}]
    message = "Corpus row 0: the passage id .* has another title or text than in training set, row 24"
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, instances=instances)
    with pytest.raises(ValueError, match="Row 0 of the index: the passage id"):
        trainer_of(tmp_path, instances=instances, corpus=index_of(make_model(**EMB_SEQ_QUERIES)))


def test_candidates_of_instances_that_contradict_the_corpus_are_refused(tmp_path):
    options = {"candidates_from": "instance", "num_candidates": 2}
    with pytest.raises(ValueError, match="Some candidates of the instances are passages, and there is a corpus too"):
        trainer_of(tmp_path, instances=with_candidates(), **options)
    changed = with_candidates()
    changed[3]["candidates"][0] = {**CORPUS[3], "text": "Another."}
    with pytest.raises(ValueError, match="training set, row 3: the passage id .* has another title or text"):
        CoSupTrainer(
            make_model(**EMB_SEQ_QUERIES),
            arguments(tmp_path, supervision="attention_distillation", **options),
            train_dataset=changed,
        )
    unknown = with_candidates(as_ids=True)
    unknown[2]["candidates"][1] = "nowhere"
    with pytest.raises(ValueError, match="training set, row 2: candidates holds 'nowhere', which the corpus lacks"):
        trainer_of(tmp_path, instances=unknown, **options)


def test_an_index_of_one_model_is_refused_with_model_init(tmp_path):
    with pytest.raises(ValueError, match="corpus is an index of one model, and model_init makes new ones"):
        CoSupTrainer(
            None,
            arguments(tmp_path, supervision="attention_distillation"),
            train_dataset=ASKED,
            corpus=index_of(make_model(**EMB_SEQ_QUERIES)),
            model_init=lambda: make_model(**EMB_SEQ_QUERIES),
        )


def test_any_retriever_serves_a_frozen_emb_seq(tmp_path):
    corpus = OnlyRetriever(index_of(make_model(**EMB_SEQ_QUERIES)))
    trainer = trainer_of(tmp_path, corpus=corpus, supervision="ntp", candidates_from="index", max_steps=1)
    trainer.train()
    assert "hit_rate@3" in trainer.state.log_history[0]
    assert trainer.candidates.index is corpus
    assert not os.listdir(tmp_path)


def test_a_corpus_with_metadata_has_the_digest_of_its_passages():
    model = make_model(**EMB_SEQ_QUERIES)
    with_metadata = [{**passage, "metadata": {"source": "a.pdf"}} for passage in CORPUS]
    digests = []
    for corpus in (CORPUS, with_metadata):
        digests.append(read_candidates_corpus(corpus, model, PassageContents(), {}).digest)
    assert digests[0] == digests[1]
