"""How instances become micro-batches, how duplicates are found over ranks, and the sampler that avoids them."""

import copy
import itertools

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from support.models import PASSAGES, make_model
from trainer import CoSupDataCollator
from trainer.batching import BatchFacts
from trainer.cutting import cut_by_number, cut_by_padding, cut_by_tokens
from trainer.data import check_instance
from trainer.duplicates import NoDuplicatesSampler, global_batch
from trainer.micro_batches import query_rows
from trainer.tokenizing import tokenize_instance

SEGMENTS = [[0, 1], [], [1, 2, 0], [3], [], [4]]


def features(model, segment_lists=SEGMENTS, **segment):
    """Return a tokenized instance for each list of passage numbers; `segment` adds fields to every segment."""
    rows = []
    for i, numbers in enumerate(segment_lists):
        segments = [{"text": f"answer {number}", "passage": PASSAGES[number], **segment} for number in numbers]
        if not segments:
            segments = [{"text": "free", "passage": None}]
        rows.append(tokenized(model, {"id": f"i{i}", "input": f"question {i} " * (i + 1), "segments": segments}))
    return rows


def tokenized(model, instance):
    checked = check_instance(instance, "here")
    return tokenize_instance(checked, model.tokenizer, model.tokenizer, model.config)


def collator(model, **kwargs):
    pad = model.tokenizer.pad_token_id
    return CoSupDataCollator(pad, pad, model.config.nsp_token_id, **kwargs)


def queries_and_passages(model, batch):
    """
    Return, for each query, the token ids up to its `[NSP]`, and the token ids of its passage.

    Both are looked up by the positions and labels of the micro-batches.
    """
    prefixes = []
    passages = []
    for micro_batch in batch["micro_batches"]:
        ids = micro_batch.get("input_ids", torch.zeros(0, 0))
        if "position_ids" in micro_batch:
            starts = (micro_batch["position_ids"][0] == 0).nonzero()[:, 0]
        else:
            starts = torch.arange(len(ids)) * ids.shape[1]
        for position in micro_batch.get("nsp_positions", ids).tolist():
            start = int(starts[starts <= position].max())
            prefixes.append(ids.flatten()[start : position + 1].tolist())
        passage_ids = micro_batch.get("passage_input_ids", [])
        if "passage_ends" in micro_batch:
            starts = [0, *(micro_batch["passage_ends"] + 1).tolist()]
            passages += [passage_ids[0, start:end].tolist() for start, end in itertools.pairwise(starts)]
        elif len(passage_ids):
            masks = micro_batch["passage_attention_mask"].bool()
            passages += [row[mask].tolist() for row, mask in zip(passage_ids, masks, strict=True)]
    return prefixes, [passages[label] for label in batch["passage_labels"].tolist()]


CUTS = [
    {},
    {"call_overhead": 1},
    {"max_instances": 2},
    {"max_tokens": 100},
    {"max_tokens": 1},
    {"padding_free": True, "padding_free_passages": True},
    {"padding_free": True, "padding_free_passages": True, "max_tokens": 120},
]


@pytest.mark.parametrize("mask_duplicates", [True, False])
@pytest.mark.parametrize("cut", CUTS)
def test_every_cut_keeps_instances_queries_labels_and_passages(model, cut, mask_duplicates):
    rows = features(model)
    batch = collator(model, mask_duplicates=mask_duplicates, **cut)(copy.deepcopy(rows))
    facts = batch["facts"]
    assert sorted(id for ids in facts.instance_ids for id in ids) == [f"i{i}" for i in range(6)]

    expected = []
    for row in rows:
        columns = [i for i, token in enumerate(row["input_ids"]) if token == model.config.nsp_token_id]
        for column, passage in zip(columns, row["passage_input_ids"], strict=True):
            expected.append((row["input_ids"][: column + 1], passage))
    assert sorted(zip(*queries_and_passages(model, batch), strict=True)) == sorted(expected)
    assert len(facts.passage_keys) == (5 if mask_duplicates else 7)

    trained = []  # pairs of a token and the label of the next one
    for micro_batch in batch["micro_batches"]:
        if "labels" not in micro_batch:
            continue  # passages alone
        tokens = micro_batch["input_ids"].flatten()
        labels = micro_batch["labels"].flatten()
        positions = micro_batch["label_positions"]
        trained += zip(tokens[positions].tolist(), labels[positions + 1].tolist(), strict=True)
        assert int((labels != -100).sum()) == len(positions)
    pairs = []
    for row in rows:
        pairs += [(row["input_ids"][i], label) for i, label in enumerate(row["labels"][1:]) if label != -100]
    assert sorted(trained) == sorted(pairs)
    assert facts.num_labels == len(pairs)

    real = sum(len(row["input_ids"]) for row in rows)
    assert facts.num_gen_tokens == real
    assert facts.num_padded_tokens >= facts.num_tokens > real
    if cut.get("padding_free"):
        assert facts.num_padded_tokens == facts.num_tokens


@pytest.mark.parametrize("max_tokens", [60, 100, 200])
def test_no_micro_batch_is_completed_where_all_parts_have_rows(model, monkeypatch, max_tokens):
    """The last micro-batch has rows of every part, whichever part has more groups: a dummy row costs a whole pass."""
    monkeypatch.setattr(CoSupDataCollator, "complete", lambda self, micro_batch, device=None: micro_batch)
    batch = collator(model, max_tokens=max_tokens)(features(model))
    assert len(batch["micro_batches"]) > 1
    last = batch["micro_batches"][-1]
    assert "nsp_positions" in last and len(last["passage_input_ids"])


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_keep_to_the_token_budget(model, packed):
    rows = features(model) * 9
    longest_row = max(len(row["input_ids"]) for row in rows)
    longest_passage = max(len(ids) for row in rows for ids in row["passage_input_ids"])
    budget = 5 * max(longest_row, longest_passage)  # so that the longest row and passage fit into their shares
    options = {"padding_free": packed, "padding_free_passages": packed, "mask_duplicates": False}
    batch = collator(model, max_tokens=budget, **options)(rows)
    assert len(batch["micro_batches"]) > 2
    for micro_batch in batch["micro_batches"]:
        tokens = [micro_batch[name].numel() for name in ("input_ids", "passage_input_ids") if name in micro_batch]
        assert sum(tokens) <= budget


def test_shortened_rows_end_at_their_last_query(model):
    batch = collator(model, max_instances=2, shorten_first_pass=True)(features(model))
    for micro_batch in batch["micro_batches"]:
        first_pass = micro_batch["first_pass"]
        if not len(micro_batch["nsp_positions"]):
            assert not first_pass or first_pass["input_ids"].numel() == 1
            continue
        assert (first_pass["input_ids"].flatten()[first_pass["nsp_positions"]] == model.config.nsp_token_id).all()
        assert len(first_pass["nsp_positions"]) == len(micro_batch["nsp_positions"])
        assert first_pass["input_ids"].numel() < micro_batch["input_ids"].numel()


def test_what_each_supervision_reads(model):
    rows = features(model)
    ntp = collator(model, supervision="ntp")(rows)
    assert not any("passage" in name for name in ntp["micro_batches"][0])
    assert len(ntp["passage_labels"]) == 0
    nsp = collator(model, supervision="nsp")(rows)
    (micro_batch,) = nsp["micro_batches"]
    assert "labels" not in micro_batch
    assert len(micro_batch["input_ids"]) == 4  # instances without a passage are left out
    assert nsp["facts"].num_labels == 0
    with pytest.raises(ValueError, match="'i0' has no query_input_ids"):
        collator(model, supervision="separate")(rows)
    separate = make_model(query_from="emb_seq")
    (micro_batch,) = collator(separate, supervision="separate")(features(separate))["micro_batches"]
    assert len(micro_batch["query_input_ids"]) == 7
    assert "nsp_positions" not in micro_batch
    last_columns = micro_batch["query_attention_mask"].sum(1, keepdim=True) - 1
    assert (micro_batch["query_input_ids"].gather(1, last_columns) == separate.config.nsp_token_id).all()

    alone = collator(separate, supervision="nsp", encoder_queries=True)(features(separate))
    (micro_batch,) = alone["micro_batches"]
    assert micro_batch["input_ids"].shape == (1, 1)  # nothing for Gen
    assert "labels" not in micro_batch
    assert len(micro_batch["query_input_ids"]) == 7
    assert len(alone["facts"].instance_ids[0]) == 7


@pytest.mark.parametrize("max_tokens", [None, 60])
def test_packed_queries_share_the_row_of_the_longest_that_they_begin(max_tokens):
    separate = make_model(query_from="emb_seq")
    rows = features(separate)
    changed = rows[2]["query_input_ids"][1]
    changed[0] = separate.config.ce_token_id  # such as a query that lost its beginning: neither begins the other
    options = {"supervision": "separate", "padding_free_passages": True, "max_tokens": max_tokens}
    batch = collator(separate, **options)(copy.deepcopy(rows))
    read = []
    num_tokens = 0
    for micro_batch in batch["micro_batches"]:
        read += query_rows(micro_batch) if "query_input_ids" in micro_batch else []
        num_tokens += micro_batch.get("query_input_ids", torch.zeros(0)).numel()
    by_number = dict(zip(batch["facts"].query_numbers, read, strict=True))
    assert [by_number[number] for number in range(7)] == [ids for row in rows for ids in row["query_input_ids"]]
    own_rows = [rows[0]["query_input_ids"][1], *rows[2]["query_input_ids"], *rows[3]["query_input_ids"]]
    own_rows += rows[5]["query_input_ids"]
    assert num_tokens == sum(map(len, own_rows))


def test_a_batch_without_any_passage_still_touches_every_part(model):
    batch = collator(model)(features(model, [[], []]))
    assert batch["micro_batches"][-1]["passage_input_ids"].shape == (0, 1)
    assert batch["passage_labels"].shape == (0,) and batch["passage_labels"].dtype == torch.long


@pytest.mark.parametrize("broken", [{"passage_input_ids": []}, {"labels": [1]}, {"input_ids": []}])
def test_a_malformed_instance_is_named(model, broken):
    rows = features(model)
    with pytest.raises(ValueError, match="Instance 'i0' has .* expected as many"):
        collator(model)([rows[3], rows[0] | broken])


def test_cuts_are_optimal_and_within_limits():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 40, size=7).tolist()
        overhead = int(rng.integers(0, 40))

        def cost(groups, lengths=lengths, overhead=overhead):
            return sum(len(group) * max(lengths[i] for i in group) + overhead for group in groups)

        order = sorted(range(7), key=lambda i: -lengths[i])
        costs = []  # one for every way to cut the rows
        for num_cuts in range(7):
            for cuts in itertools.combinations(range(1, 7), num_cuts):
                costs.append(cost([order[start:end] for start, end in itertools.pairwise([0, *cuts, 7])]))
        groups = cut_by_padding(lengths, overhead)
        assert cost(groups) == min(costs)
        assert sorted(sum(groups, [])) == list(range(7))
        by_tokens = cut_by_tokens(lengths, 50)
        assert sorted(sum(by_tokens, [])) == list(range(7))
        assert all(len(group) == 1 or len(group) * lengths[group[0]] <= 50 for group in by_tokens)
        packed = cut_by_tokens(lengths, 50, packed=True)
        assert all(len(group) == 1 or sum(lengths[i] for i in group) <= 50 for group in packed)
    assert [len(group) for group in cut_by_number([1] * 7, 3)] == [3, 3, 1]
    assert cut_by_padding([], 5) == cut_by_tokens([], 5) == []


# ---------------------------------------------------------------------- duplicates over ranks


def facts_of(model, segment_lists, **segment):
    return collator(model)(features(model, segment_lists, **segment))["facts"]


def test_identical_passages_are_found_by_content():
    ranks = [
        BatchFacts(passage_keys=[(1, 10), (2, 20)]),
        BatchFacts(passage_keys=[(3, 30), (2, 40), (4,), (1, 10)]),
    ]
    batch = global_batch(ranks, 1)
    assert batch.passage_groups.tolist() == [0, 1, 2, 1, 4, 0]
    assert batch.repeated.tolist() == [False, False, False, True, False, True]
    assert (batch.passage_counts, batch.first_row) == ([2, 4], 2)
    assert not global_batch(ranks, 1, mask_duplicates=False).repeated.any()


def test_equal_contents_of_real_instances_share_a_row(model):
    rows = features(model, [[0], [1]])
    rows += features(model, [[0]])
    passage = dict(PASSAGES[0], id="other")
    rows.append(tokenized(model, {"id": "x", "input": "q", "segments": [{"text": "a", "passage": passage}]}))
    facts = collator(model)(rows)["facts"]
    assert sorted(map(len, facts.passage_keys)) == [2, 3]  # the content, and one id or two


@pytest.mark.parametrize("mask_duplicates", [True, False])
def test_two_contents_of_a_passage_id_are_refused_in_a_batch_and_across_ranks(model, mask_duplicates):
    """Whoever tokenized the instances: otherwise their passages would count as the same one."""
    other = {"text": "a", "passage": dict(PASSAGES[1], text="other text")}
    rows = features(model, [[0], [1]])
    rows.append(tokenized(model, {"id": "x", "input": "q", "segments": [other]}))
    collate = collator(model, mask_duplicates=mask_duplicates)
    with pytest.raises(ValueError, match="Instance 'x': the passage id 'p1' has another .* than in Instance 'i1'"):
        collate(rows)
    ranks = [collate(rows[:2])["facts"], collate(rows[2:])["facts"]]
    with pytest.raises(ValueError, match="A passage of instance 'i1' and a passage of instance 'x' have the same id"):
        global_batch(ranks, 0, mask_duplicates)
    negative = {"text": "a", "passage": PASSAGES[2], "negatives": [other["passage"]]}
    negative_rank = collate([tokenized(model, {"id": "y", "input": "q", "segments": [negative]})])["facts"]
    with pytest.raises(ValueError, match="A passage of instance 'i1' and a passage of an instance, as a hard negat"):
        global_batch([ranks[0], negative_rank], 1, mask_duplicates)


def test_further_positives_and_equal_questions_are_not_negatives(model):
    facts = facts_of(model, [[0], [1], [2]], positives=[PASSAGES[1]["id"]])
    pairs = global_batch([facts], 0).further_positives.T.tolist()
    query_of = {instance_id: query for query, instance_id in enumerate(facts.query_instance_ids)}
    row_of_p1 = facts.passage_labels[query_of["i1"]]
    assert sorted(pairs) == sorted([[query_of["i0"], row_of_p1], [query_of["i2"], row_of_p1]])

    ranks = []
    for i in range(2):
        instance = {"id": str(i), "input": "who?", "segments": [{"text": "a", "passage": PASSAGES[i]}]}
        ranks.append(collator(model)([tokenized(model, instance)])["facts"])
    # the same question on another rank: both passages are right
    assert global_batch(ranks, 0).further_positives.T.tolist() == [[0, 1]]
    assert global_batch(ranks, 0, mask_duplicates=False).further_positives.size == 0


def test_hard_negatives_are_passages_without_a_query(model):
    facts = facts_of(model, [[0], [1]], negatives=[PASSAGES[4], PASSAGES[0]])
    assert len(facts.passage_keys) == 3  # passage 0 is the answer of one and a negative of the other
    assert len(facts.passage_labels) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negatives": "p"}, r"segments\[0\].negatives is 'p', expected a list of passages"),
        ({"negatives": [{"text": ""}]}, r"segments\[0\].negatives\[0\].text is empty"),
        ({"positives": "p"}, r"segments\[0\].positives is 'p', expected a list of passage ids"),
        ({"positives": [3.5]}, r"an id in segments\[0\].positives is 3.5, expected a string"),
        ({"positives": ["p"], "passage": None}, "has negatives or positives but no passage"),
    ],
)
def test_bad_negatives_and_positives(change, message):
    segment = {"text": "a", "passage": PASSAGES[0], **change}
    with pytest.raises(ValueError, match=message):
        check_instance({"id": "1", "input": "q", "segments": [segment]}, "here")


def test_no_batch_of_the_sampler_names_a_passage_twice():
    rng = np.random.default_rng(0)
    passages = []
    for passage in rng.integers(0, 100, size=200).tolist():
        passages.append([passage] if passage < 80 else [passage, passage - 80])
    sampler = NoDuplicatesSampler(passages, 8, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(200))
    assert len(sampler) == 200
    clean = 0
    for start in range(0, 200, 8):
        named = sum((passages[i] for i in order[start : start + 8]), [])
        if len(set(named)) < len(named):
            break
        clean += 1
    assert clean >= 20
    assert order == list(NoDuplicatesSampler(passages, 8, seed=3))
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_no_batch_over_ranks_names_a_passage_twice():
    """Accelerate deals batches to ranks: rank r takes every W-th."""
    passages = [[i % 50] for i in range(200)]
    batches = BatchSampler(NoDuplicatesSampler(passages, 8), batch_size=4, drop_last=False)
    ranks = [list(BatchSamplerShard(batches, num_processes=2, process_index=rank)) for rank in range(2)]
    for first, second in list(zip(*ranks, strict=True))[:24]:
        named = [passages[i][0] for i in first + second]
        assert len(set(named)) == 8


@pytest.mark.parametrize("cut", CUTS)
def test_distilled_queries_find_their_candidates_and_scores(model, cut):
    """Next to queries with a passage, which stay what they are; a single candidate is no query."""
    rows = features(model, [[0], [], [1, 2]])
    passage_ids = {}
    for row in features(model, [[number] for number in range(5)]):
        (passage_ids[row["passage_ids"][0]],) = row["passage_input_ids"]
    alone = features(model, [[0]])[0]
    expected = {}
    for i, candidates in enumerate((["p3", "p1", "p0"], ["p4"], ["p0", "p4"])):
        resolved = alone | {"id": f"asked {i}", "passage_input_ids": [], "passage_ids": [], "positive_ids": []}
        resolved |= {"candidate_ids": candidates, "candidate_scores": [float(i + j) for j in range(len(candidates))]}
        resolved["candidate_input_ids"] = [passage_ids[id] for id in candidates]
        rows.insert(2 * i, resolved)
        expected[f"asked {i}"] = [*zip(resolved["candidate_input_ids"], resolved["candidate_scores"], strict=True)]
    batch = collator(model, **cut)(rows)
    facts = batch["facts"]
    assert len(facts.passage_keys) == 5  # p0 and p1 are encoded once
    assert sorted(facts.distilled_instance_ids) == ["asked 0", "asked 2"]
    assert sorted(facts.query_instance_ids) == ["i0", "i2", "i2"]
    num_queries = sum(len(micro_batch.get("nsp_positions", ())) for micro_batch in batch["micro_batches"])
    of_both = torch.cat([batch["nsp_query_rows"], batch["distilled_query_rows"]])
    assert sorted(of_both.tolist()) == list(range(num_queries)) == list(range(5))

    everyone = {**batch, "passage_labels": torch.arange(5)}
    _, passages = queries_and_passages(model, everyone)
    for id, candidate_rows, scores in zip(
        facts.distilled_instance_ids, batch["candidate_rows"].tolist(), batch["candidate_scores"].tolist(), strict=True
    ):
        measured = [(passages[row], score) for row, score in zip(candidate_rows, scores, strict=True) if row >= 0]
        assert measured == expected[id]
    golds = [passages[label] for label in batch["passage_labels"].tolist()]
    assert sorted(golds) == sorted(passage_ids[id] for id in ("p0", "p1", "p2"))
    merged = global_batch([facts], 0)
    assert merged.num_compared == 3 and not merged.repeated.any()
    rows[0] = {**rows[0], "needs_candidates": True, "candidate_input_ids": None}
    assert collator(model)(rows).features == rows  # an instance still needs candidates
