"""The NLI judge with models that were trained on known entailments, on pairs they never saw."""

import json

import pytest
import torch
from transformers import BertConfig, BertModel

from support.nli_models import held_out_pairs, make_classifier, make_t5
from trainer.judging.grounding import grounding
from trainer.judging.nli import NLIJudge, entailment_label

LABELLED_PAIRS = held_out_pairs(120)
PAIRS = [(premise, hypothesis) for premise, hypothesis, _ in LABELLED_PAIRS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of the two trained models."""
    folders = {}
    for name, make in (("classifier", make_classifier), ("t5", make_t5)):
        folders[name] = tmp_path_factory.mktemp(name)
        model, tokenizer = make()
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(params=["classifier", "t5"])
def folder(folders, request):
    return folders[request.param]


def record_shapes(judge):
    """Return a list that receives the shape `(B, T)` of every batch that the model reads."""
    shapes = []

    def record(module, args, kwargs):
        input_ids = args[0] if args else kwargs["input_ids"]
        shapes.append(tuple(input_ids.shape))

    encoder = judge.model.encoder if judge.writes else judge.model.bert
    encoder.register_forward_pre_hook(record, with_kwargs=True)
    return shapes


def count_judged(judge, pairs):
    """Return how many pairs the model reads when the judge is called."""
    shapes = record_shapes(judge)
    assert len(judge(pairs)) == len(pairs)
    return sum(rows for rows, _ in shapes)


def test_learned_answers_on_held_out_pairs(folder):
    judge = NLIJudge.from_pretrained(folder, device="cpu")
    answers = judge(PAIRS)
    num_right = sum(answer == entailed for answer, (_, _, entailed) in zip(answers, LABELLED_PAIRS, strict=True))
    assert num_right >= 0.9 * len(PAIRS)
    assert 0.3 < sum(answers) / len(answers) < 0.7  # both answers occur
    assert all(isinstance(answer, bool) for answer in answers)


def test_batches_do_not_change_answers_and_a_pair_is_judged_once(folder):
    pairs = PAIRS[:25]
    one_by_one = NLIJudge.from_pretrained(folder, device="cpu", batch_size=1)(pairs)
    judge = NLIJudge.from_pretrained(folder, device="cpu", batch_size=10)
    shapes = record_shapes(judge)
    assert judge(pairs + pairs[::-1]) == one_by_one + one_by_one[::-1]
    assert len(shapes) == 3
    assert sum(rows for rows, _ in shapes) == len(set(pairs))
    assert shapes[0][1] > shapes[-1][1]  # pairs of similar length share a batch, the longest first
    assert judge([]) == []


def test_truncation_cuts_the_end_of_the_premise_only(folder):
    """The first colour of a long premise is read, the last is cut off, and the hypothesis is kept."""
    judge = NLIJudge.from_pretrained(folder, device="cpu", max_length=14)
    red_first = f"red {'w1 ' * 40}blue"
    blue_first = f"blue {'w1 ' * 40}red"
    shapes = record_shapes(judge)
    assert judge([(red_first, "w2 red"), (red_first, "w2 blue")]) == [True, False]
    assert judge([(blue_first, "w2 red"), (blue_first, "w2 blue")]) == [False, True]
    assert shapes == [(2, 14), (2, 14)]
    with pytest.raises(ValueError, match=r"1 of 2 hypotheses leave no room for a premise: .* up to \d+ tokens of 14"):
        judge([("red", "w2 red"), ("red", "w2 " * 30)])


def test_grounding_with_a_trained_judge(folder):
    """Gr from predictions to figures."""

    def retrieval(passage_text, grounded_text):
        return {"passages": [{"title": "", "text": passage_text}], "grounded_text": grounded_text}

    predictions = [
        {"retrievals": [retrieval("w3 red w4", "w1 red . w2 blue"), retrieval("blue w5", "w1 blue")]},
        {"retrievals": [retrieval("blue w5", "w1 red")]},
        {"retrievals": []},
    ]
    assert grounding(predictions, NLIJudge.from_pretrained(folder, device="cpu")) == [pytest.approx(2 / 3), 0.0, None]


def test_answers_are_kept_by_content(folder, tmp_path):
    """Another judge of the same model reads them from the file; other weights or another length are judged again."""
    pairs = PAIRS[:20]
    num_distinct = len(set(pairs))
    cache = tmp_path / "cache" / "nli.jsonl"
    answers = NLIJudge.from_pretrained(folder, device="cpu", cache_file=cache)(pairs)

    same = NLIJudge.from_pretrained(folder, device="cpu", cache_file=cache)
    assert count_judged(same, pairs) == 0
    assert same(pairs) == answers

    shorter = NLIJudge.from_pretrained(folder, device="cpu", cache_file=cache, max_length=20)
    assert count_judged(shorter, pairs) == num_distinct

    with torch.no_grad():
        next(same.model.parameters()).mul_(1.01)
    other_weights = NLIJudge(same.model, same.tokenizer, cache_file=cache)
    assert count_judged(other_weights, pairs) == num_distinct

    lines = [line for line in cache.read_text().splitlines() if line]
    assert len(lines) == 3 * num_distinct
    assert set(json.loads(lines[0])) == {"key", "entailed"}


def test_a_torn_line_of_the_cache_is_judged_again(folder, tmp_path):
    pairs = PAIRS[:20]
    cache = tmp_path / "nli.jsonl"
    NLIJudge.from_pretrained(folder, device="cpu", cache_file=cache)(pairs)
    lines = [line for line in cache.read_text().splitlines() if line]
    cache.write_text("\n".join([*lines[:5], lines[5][:20]]))
    judge = NLIJudge.from_pretrained(folder, device="cpu", cache_file=cache)
    assert count_judged(judge, pairs) == len(set(pairs)) - 5


def test_the_label_of_entailment_is_part_of_the_key(folders, tmp_path):
    """The same weights with another label that says entailment are judged again."""
    pairs = PAIRS[:20]
    judge = NLIJudge.from_pretrained(folders["classifier"], device="cpu", cache_file=tmp_path / "nli.jsonl")
    judge(pairs)
    config = judge.model.config
    reversed_labels = reversed(config.id2label.values())
    config.id2label = dict(zip(config.id2label, reversed_labels, strict=True))
    relabelled = NLIJudge(judge.model, judge.tokenizer, cache_file=tmp_path / "nli.jsonl")
    assert count_judged(relabelled, pairs) == len(set(pairs))


def test_weights_are_float32_on_a_cpu(folders):
    for device in ("cpu", "cpu:0", torch.device("cpu", 0)):
        assert NLIJudge.from_pretrained(folders["classifier"], device=device).model.dtype == torch.float32


def test_without_a_cache_file_nothing_is_written(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    NLIJudge.from_pretrained(folders["classifier"], device="cpu")([("red", "red")])
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_answer_is_an_error(folders):
    """An untrained T5 writes neither digit, and NaN is not a score."""
    untrained = NLIJudge(*make_t5(steps=0))
    with pytest.raises(ValueError, match='gave 3 of 3 pairs no answer: expected "1" or "0", found'):
        untrained([("red", "w1 red"), ("red", "w1 blue"), ("blue", "w1 red")])
    judge = NLIJudge.from_pretrained(folders["classifier"], device="cpu")
    with torch.no_grad():
        judge.model.classifier.bias[1] = float("nan")
    with pytest.raises(ValueError, match="gave 2 of 2 pairs no answer: expected finite scores"):
        judge([("red", "w1 red"), ("red", "w1 blue")])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["entailment", "neutral", "contradiction"], 0),
        (["CONTRADICTION", "ENTAILMENT"], 1),
        (["not_entailment", "entailment"], 1),
        (["LABEL_0", "LABEL_1"], None),
        (["entailment"], None),
        (["entailed", "entailment"], None),
    ],
)
def test_the_label_of_entailment_is_found_by_name(labels, expected):
    config = BertConfig(id2label=dict(enumerate(labels)))
    if expected is None:
        with pytest.raises(ValueError, match=f"labels are .*{labels[0]}.* no NLI model"):
            entailment_label(config)
    else:
        assert entailment_label(config) == expected


def test_models_that_are_no_judges_are_refused(folders, tmp_path):
    """A classification head would be made up at random, and weights that must be unpickled are not read."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    without_head = BertModel(BertConfig(vocab_size=30, **sizes))
    without_head.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="lacks 2 weights of a BertForSequenceClassification"):
        NLIJudge.from_pretrained(tmp_path / "bare", device="cpu")
    judge = NLIJudge.from_pretrained(folders["classifier"], device="cpu")
    judge.model.config.save_pretrained(tmp_path / "bin")
    torch.save(judge.model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        NLIJudge.from_pretrained(tmp_path / "bin", device="cpu")
