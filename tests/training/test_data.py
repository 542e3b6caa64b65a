"""Labels token by token, and for every bad input an error that names its place."""

import gzip
import json

import datasets
import pytest
import torch

from modeling_cosup.tokenization_cosup import (
    bos_and_eos,
    encode_passages_for_emb_seq,
    encode_prompt,
    render_passage,
    special_ids,
)
from support.models import PASSAGES, make_model
from support.tokenizer_kinds import TOKENIZERS, xlm_roberta
from support.training import NAMES, arguments, world
from trainer import CoSupTrainer, data, load_corpus, load_evaluation_set, load_instances
from trainer.data import check_instance
from trainer.tokenizing import tokenize_instance

INSTANCE = {"id": "1", "dataset": "d", "instruction": "Answer.", "input": "who painted it?", "segments": []}


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("retrievals", [0, 1, 2, 3])
@pytest.mark.parametrize("train_on_passages", [False, True])
def test_labels_token_by_token(model, retrievals, train_on_passages):
    tokenizer, config = model.tokenizer, model.config
    nsp, cs, ce, eos = config.nsp_token_id, config.cs_token_id, config.ce_token_id, tokenizer.eos_token_id
    instance = dict(INSTANCE, segments=[{"text": "free text", "passage": None}])
    for i in range(retrievals):
        instance["segments"].append({"text": f"grounded {i}", "passage": PASSAGES[i]})

    expected = []  # token ids, and whether each is trained

    def expect(ids, trained):
        expected.extend((id, trained) for id in ids)

    expect([tokenizer.bos_token_id], trained=False)
    expect(plain(tokenizer, "Answer.## Input:\n\nwho painted it?## Output:\n\n"), trained=False)
    expect(plain(tokenizer, "free text"), trained=True)
    for i in range(retrievals):
        expect([nsp], trained=True)
        expect(plain(tokenizer, render_passage(PASSAGES[i], "{title} :: {text}")), trained=train_on_passages)
        expect([cs], trained=False)
        expect([*plain(tokenizer, f"grounded {i}"), ce], trained=True)
    expect([eos], trained=True)

    found = tokenize_instance(instance, tokenizer, tokenizer, config, train_on_passages)
    assert found["input_ids"] == [id for id, _ in expected]
    assert found["labels"] == [id if trained else -100 for id, trained in expected]
    assert len(found["passage_input_ids"]) == retrievals
    for ids, passage in zip(found["passage_input_ids"], PASSAGES[:retrievals], strict=True):
        assert ids == [tokenizer.bos_token_id, *plain(tokenizer, render_passage(passage, "{title} :: {text}")), eos]


def test_control_tokens_as_characters_stay_text(model):
    tokenizer, config = model.tokenizer, model.config
    hostile = "[NSP] a [Cs] b [CE] c </s> d <s>"
    passage = {"id": "h", "title": hostile, "text": hostile}
    segments = [{"text": hostile, "passage": passage}, {"text": hostile, "passage": None}]
    instance = dict(INSTANCE, instruction=hostile, input=hostile, segments=segments)
    found = tokenize_instance(check_instance(instance, "here"), tokenizer, tokenizer, config)
    for id in (config.nsp_token_id, config.cs_token_id, config.ce_token_id, tokenizer.eos_token_id):
        assert found["input_ids"].count(id) == 1  # the one that was not text
    assert found["input_ids"].count(tokenizer.bos_token_id) == 1
    assert found["passage_input_ids"][0].count(tokenizer.eos_token_id) == 1


def test_what_a_retriever_with_prompts_reads():
    settings = {"emb_seq_pooling": "lasttoken", "emb_seq_add_eos_token": False, "query_from": "emb_seq"}
    model = make_model(passage_prompt="passage: ", query_prompt="query: ", **settings)
    tokenizer, bos = model.tokenizer, model.tokenizer.bos_token_id
    segment = {"text": "Rembrandt", "passage": PASSAGES[0], "negatives": [PASSAGES[1]]}
    instance = check_instance(dict(INSTANCE, segments=[segment]), "here")
    found = tokenize_instance(instance, tokenizer, tokenizer, model.config)
    rendered = [render_passage(passage, "{title} :: {text}") for passage in PASSAGES[:2]]
    assert found["passage_input_ids"] == [[bos, *plain(tokenizer, f"passage: {rendered[0]}")]]
    assert found["negative_input_ids"] == [[bos, *plain(tokenizer, f"passage: {rendered[1]}")]]
    prompt = "query: Answer.## Input:\n\nwho painted it?## Output:\n\n"
    assert found["query_input_ids"] == [[bos, *plain(tokenizer, prompt)]]
    assert tokenizer.decode(found["input_ids"]).count("passage: ") == 0


def test_eos_survives_the_truncation_of_a_passage(model):
    model.config.max_passage_length = 8
    (ids,) = encode_passages_for_emb_seq(model.tokenizer, [{"title": "", "text": "word " * 100}], model.config)
    assert len(ids) == 10
    assert ids[0] == model.tokenizer.bos_token_id
    assert ids[-1] == model.tokenizer.eos_token_id


def test_end_of_turn_of_a_chat_template_is_trained(model):
    tokenizer = model.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    instance = dict(INSTANCE, segments=[{"text": "yes", "passage": None}])
    found = tokenize_instance(instance, tokenizer, tokenizer, model.config)
    assert found["labels"][-1] == found["input_ids"][-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = encode_prompt(tokenizer, INSTANCE["input"], INSTANCE["instruction"])
    assert found["input_ids"][: -len(plain(tokenizer, "yes")) - 1] == prompt


@pytest.mark.parametrize("name", ["Unigram, XLM-R", "Unigram, T5"])
def test_special_tokens_of_a_unigram_vocabulary_stay_text(name):
    tokenizer = TOKENIZERS[name]()
    model = make_model(tokenizer=tokenizer, emb_seq_pooling="mean")
    marked = "an <s>old</s> <pad><mask> price"
    passage = {"id": "p", "title": marked, "text": marked}
    segments = [{"text": marked, "passage": passage, "negatives": [passage]}, {"text": marked, "passage": None}]
    instance = check_instance(dict(INSTANCE, instruction=marked, input=marked, segments=segments), "here")
    found = tokenize_instance(instance, tokenizer, tokenizer, model.config)
    nsp, cs, ce = model.config.nsp_token_id, model.config.cs_token_id, model.config.ce_token_id
    specials = special_ids(tokenizer)
    bos, eos = bos_and_eos(tokenizer)
    prompt = [nsp] if not bos else [*bos, nsp]
    assert [id for id in found["input_ids"] if id in specials] == [*prompt, cs, ce, *eos]
    for ids in found["passage_input_ids"] + found["negative_input_ids"]:
        assert [id for id in ids if id in specials] == bos + eos


def test_a_text_with_a_special_token_that_cannot_be_spelled_is_named():
    tokenizer = xlm_roberta()
    tokenizer.eos_token = "~"
    model = make_model(tokenizer=tokenizer)
    instance = dict(INSTANCE, segments=[{"text": "calm", "passage": None}, {"text": "a wave ~", "passage": None}])
    with pytest.raises(ValueError, match=r"Instance '1', segments\[1\].text \('a wave ~'\) holds the special tokens"):
        tokenize_instance(instance, tokenizer, tokenizer, model.config)
    instance = dict(INSTANCE, input="a wave ~", segments=[{"text": "calm", "passage": None}])
    with pytest.raises(ValueError, match=r"Instance '1': The prompt holds the special tokens \['~'\]"):
        tokenize_instance(instance, tokenizer, tokenizer, model.config)


# ---------------------------------------------------------------------- bad input


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def good(**changes):
    segments = [{"text": "a", "passage": None}]
    return {"id": "1", "dataset": "d", "instruction": "", "input": "q?", "segments": segments, **changes}


def segment(**changes):
    return {"text": "a", "passage": {"id": "p", "title": "", "text": "passage"}, **changes}


BAD_INSTANCES = [
    ('{"id": "1", "input": ', "malformed JSON"),
    ("[1, 2]", "found list, expected a JSON object"),
    ({"id": "1", "segments": [segment()]}, "input is None, expected a string that is not empty"),
    (good(input="  "), "input is only white space, expected a text."),
    (good(instruction=3), "instruction is 3, expected a string"),
    (good(segments=[]), "segments is [], expected a list of at least one segment"),
    ({"input": "q?", "answers": []}, "segments is None, expected a list of at least one segment; or else answers"),
    (good(segments=None), "segments is None"),
    (good(segments=["text"]), "segments[0] is 'text'"),
    (good(segments=[segment(text="")]), "segments[0].text is empty"),
    (
        good(segments=[segment(), segment(passage={"id": "p", "text": " "})]),
        "segments[1].passage.text is only white space",
    ),
    (good(segments=[segment(passage={"id": "p", "title": "t"})]), "segments[0].passage.text is None"),
    (
        '{"input": "\\ud83d", "segments": [{"text": "a", "passage": null}]}',
        "input holds '\\ud83d'",
    ),
    (good(segments=[segment(passage={"id": "p", "title": 5, "text": "t"})]), "segments[0].passage.title is 5"),
    (good(segments=[segment(passage="passage")]), "segments[0].passage is 'passage', expected an object or null"),
    (good(segments=[{"text": "a"}]), "segments[0] has no passage, expected one; null for free text"),
    (
        good(segments=[{"text": "a", "pasage": PASSAGES[0]}]),
        "segments[0] has the unknown key 'pasage', expected",
    ),
    (
        good(segments=[{"text": "a", "Passages": PASSAGES[0]}]),
        "; did you mean 'passage'?",
    ),
    (good(segments=[{"text": "a", "pasage": PASSAGES[0]}]), "; did you mean 'passage'?"),
    (good(segments=[segment(), segment(ctx=PASSAGES[0])]), "segments[1] has the unknown key 'ctx', expected some of"),
    (good(segments=[segment(context="x")]), "segments[0] has the unknown key 'context', expected some of"),
    ({"input": "q?", "segment": [segment()]}, "unknown key segment; did you mean 'segments'?"),
    ({"input": "q?", "instuction": "Answer.", "segments": [segment()]}, "did you mean 'instruction'?"),
    (
        good(segments=[segment(passage={"titel": "t", "text": "x"})]),
        "[0].passage.titel; did you mean 'title'?",
    ),
    (good(segments=[segment(negatives=[{"_id": "p", "text": "x"}])]), "negatives[0]._id; did you mean 'id'?"),
    (
        good(segments=[segment(passage={"id": "", "text": "x"})]),
        "segments[0].passage.id is empty, expected a text or an integer.",
    ),
    (good(segments=[segment(passage={"id": 1.0, "text": "x"})]), "segments[0].passage.id is 1.0, expected a string"),
    (good(segments=[segment(passage={"id": True, "text": "x"})]), "segments[0].passage.id is True, expected a string"),
    (good(segments=[segment(passage={"id": "a/../b", "text": "x"})]), "expected no NUL and no '..' between slashes"),
    (good(id=[1]), "id is [1], expected a string that is not empty, or an integer"),
    ('{"input": ' + "[" * 100_000 + "]" * 100_000 + "}", "malformed JSON (it is nested too deeply)"),
    ('{"segments": ' + "[" * 900 + "]" * 900 + "}", "segments[0] is [[[[[[[...]]]]]]], expected an object"),
    ('{"input": ' + "1" * 5000 + "}", "malformed JSON (an integer has too many digits)"),
]


@pytest.mark.parametrize(("line", "message"), BAD_INSTANCES)
def test_bad_instances_name_file_line_and_field(tmp_path, line, message):
    path = write(tmp_path / "train.jsonl", good(), "", line)
    with pytest.raises(ValueError, match="train.jsonl, line 3") as error:
        load_instances(path)
    assert message in str(error.value)


def test_gzip_and_missing_files(tmp_path):
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.write(json.dumps(good()) + "\n")
    assert load_instances(tmp_path / "train.jsonl.gz")[0]["input"] == "q?"
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        load_instances(tmp_path / "nowhere.jsonl")


def test_bytes_that_are_not_text_and_empty_files(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"input": "q"}\n{"input": "\xff"}\n')
    with pytest.raises(ValueError, match="train.jsonl, line 1: segments"):
        load_instances(tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").write_bytes(b'\n{"input": "\xff"}\n')
    with pytest.raises(ValueError, match="train.jsonl, line 2: malformed JSON"):
        load_instances(tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").write_bytes(b"\n")
    with pytest.raises(ValueError, match="holds no instance"):
        load_instances(tmp_path / "train.jsonl")


def test_dataset_folder_names_the_row(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.json", good(), good(segments=[]))
    with pytest.raises(ValueError, match=r"\(train\), row 1: segments is \[\]"):
        load_instances(tmp_path / "data")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([PASSAGES[0], {"id": "x", "title": "t", "text": ""}], "line 2: text is empty"),
        ([PASSAGES[0], {"title": "t", "text": "t"}], "line 2: id is None"),
        ([PASSAGES[0], {"_id": "x", "text": "t"}], "line 2: unknown key _id; did you mean 'id'"),
        ([PASSAGES[0], {"id": "x", "Title": "t", "text": "t"}], "line 2: unknown key Title; did you mean 'title'"),
        ([{"id": 1, "text": "a"}, {"id": "1", "text": "a"}], "line 2: id '1' is already in .*line 1"),
        ([{"id": 1.5, "text": "a"}], "line 1: id is 1.5, expected a string that is not empty, or an integer"),
        ([PASSAGES[0], PASSAGES[1], PASSAGES[0]], "line 3: id 'p0' is already in"),
        ([], "the corpus holds no passage"),
    ],
)
def test_bad_corpora(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(write(tmp_path / "corpus.jsonl", *lines))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": ["p0", "nope"]}, "line 1: candidates holds 'nope', which the corpus lacks"),
        ({"provenance": [["p9"]]}, "line 1: provenance holds 'p9', which the corpus lacks"),
        ({"provenance": ["p0"]}, "line 1: provenance is"),
        ({"answers": []}, "line 1: answers is"),
        ({"candidates": "p0"}, "line 1: candidates is 'p0', expected a list of passage ids"),
        ({"provenance": [[{"id": "p0"}]]}, r"line 1: an id in provenance\[0\] is {'id': 'p0'}, expected a string"),
        ({"provenance": [[]]}, "line 1: provenance is"),
        ({"candidates": ["p0", None]}, "line 1: an id in candidates is None, expected a string"),
        ({"answers": [""]}, r"line 1: answers\[0\] is empty, expected a text"),
        ({"answers": ["a", "  "]}, r"line 1: answers\[1\] is only white space, expected a text"),
        ({"answers": "a"}, "line 1: answers is 'a'"),
        ({"candidates": None, "canditates": ["p0"]}, "line 1: unknown key canditates; did you mean 'candidates'"),
        ({"answers": None, "answer": ["a"]}, "line 1: unknown key answer; did you mean 'answers'"),
        ({"instruction": 5}, "line 1: instruction is 5, expected a string"),
        ({"input": None}, "line 1: input is None"),
    ],
)
def test_bad_evaluation_sets(tmp_path, changes, message):
    line = {"id": "1", "input": "q?", "answers": ["a"], "provenance": [["p0"]], "candidates": ["p0"], **changes}
    with pytest.raises(ValueError, match=message):
        load_evaluation_set(write(tmp_path / "eval.jsonl", line), corpus=PASSAGES)


def test_a_missing_provenance_is_unknown(tmp_path):
    question = {"input": "q?", "answers": ["a"], "meta": {"nouns": ["q"]}}
    rows = write(tmp_path / "eval.jsonl", question, {**question, "provenance": []})
    unknown, free = load_evaluation_set(rows, corpus=PASSAGES)
    assert unknown["provenance"] == [] and unknown["meta"] == {"nouns": ["q"], "provenance_unknown": True}
    assert free["provenance"] == [] and free["meta"] == {"nouns": ["q"]}


def test_a_question_without_an_id_has_the_same_one_wherever_its_file_is(tmp_path, monkeypatch):
    question = {"input": "q?", "answers": ["a"], "provenance": []}
    (tmp_path / "moved").mkdir()
    for folder in (tmp_path, tmp_path / "moved"):
        write(folder / "eval.jsonl", question, {**question, "id": "x"}, question)
    monkeypatch.chdir(tmp_path)
    for file in (tmp_path / "eval.jsonl", "eval.jsonl", "./eval.jsonl", "moved/eval.jsonl"):
        assert [instance["id"] for instance in load_evaluation_set(file)] == ["line 1", "x", "line 3"]


def test_further_columns_do_no_harm(tmp_path):
    """Datasets have columns that the schema does not know, and Arrow fills in None where a row lacks a key."""
    passage = {
        "id": "p",
        "title": "t",
        "text": "x",
        "score": 0.5,
        "titles": "s",
        "wikipedia_id": 3,
        "metadata": {"page": 1},
    }
    row = good(idx=3, dataset_name="d", metadata={}, segments=[segment(passage=passage, pasage=None, negatives=None)])
    (instance,) = load_instances(write(tmp_path / "train.jsonl", row))
    assert instance == good(
        segments=[{**segment(passage={"id": "p", "title": "t", "text": "x"}), "negatives": [], "positives": []}]
    )
    (corpus_passage,) = load_corpus(write(tmp_path / "corpus.jsonl", passage))
    assert corpus_passage == {"id": "p", "title": "t", "text": "x", "metadata": {"page": 1}}
    question = {"input": "q?", "answers": ["a"], "provenance": [["p"]], "candidates": None, "idx": 3, "metadata": {}}
    (instance,) = load_evaluation_set(write(tmp_path / "eval.jsonl", question))
    assert instance.keys() == {"id", "dataset", "instruction", "input", "answers", "provenance", "candidates", "meta"}


def test_an_integer_id_is_its_digits_everywhere(tmp_path, model):
    negative = {"id": 8, "text": "another"}
    row = good(id=5, segments=[segment(passage={"id": 7, "text": "x"}, negatives=[negative], positives=[9])])
    (instance,) = load_instances(write(tmp_path / "train.jsonl", row))
    (checked,) = instance["segments"]
    ids = (instance["id"], checked["passage"]["id"], checked["negatives"][0]["id"], checked["positives"])
    assert ids == ("5", "7", "8", ["9"])
    corpus = load_corpus(write(tmp_path / "corpus.jsonl", {"id": 7, "text": "x"}, negative))
    assert [passage["id"] for passage in corpus] == ["7", "8"]
    question = {"id": 5, "input": "q?", "answers": ["a"], "provenance": [[7]], "candidates": [8, "7"]}
    (question,) = load_evaluation_set(write(tmp_path / "eval.jsonl", question), corpus=corpus)
    assert (question["id"], question["provenance"], question["candidates"]) == ("5", [["7"]], ["8", "7"])
    index = model.build_index([{"id": 7, "text": "x"}, negative], show_progress_bar=False)
    assert index.rows_of(["8", "7"]).tolist() == [1, 0]


P1 = {"id": "p1", "title": "", "text": "one"}
OTHER_P1 = {"id": "p1", "title": "", "text": "two"}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (segment(passage=P1), segment(passage=OTHER_P1)),
        (segment(passage=P1), segment(passage={**P1, "title": "one"})),
        (segment(passage=P1), segment(negatives=[{"id": "n", "text": "x"}, OTHER_P1])),
        (segment(negatives=[P1]), segment(negatives=[OTHER_P1])),
        (segment(passage={"id": 1, "text": "one"}), segment(passage={"id": "1", "text": "two"})),
    ],
)
def test_two_contents_of_a_passage_id_name_both_lines(tmp_path, first, second):
    lines = [good(segments=[first]), good(), good(segments=[segment(passage=first["passage"]), second])]
    path = write(tmp_path / "train.jsonl", *lines)
    message = "train.jsonl, line 3: the passage id '.*' has another title or text than in .*train.jsonl, line 1[.]"
    with pytest.raises(ValueError, match=message):
        load_instances(path)
    write(path, *lines[:2], good(segments=[segment(passage=dict(first["passage"]))]))
    assert len(load_instances(path)) == 3  # the same content again


def test_evaluation_sets_carry_what_metrics_need_and_may_lack_answers(tmp_path):
    line = {"id": "1", "input": "q?", "answers": [], "provenance": [["p0"]], "meta": {"claims": ["c"]}}
    file = write(tmp_path / "eval.jsonl", line, {**line, "meta": None})
    first, second = load_evaluation_set(file, corpus=PASSAGES, answers_required=False)
    assert (first["meta"], second["meta"], first["candidates"], first["answers"]) == ({"claims": ["c"]}, {}, [], [])
    with pytest.raises(ValueError, match="line 1: answers is .*, expected a list of at least one string"):
        load_evaluation_set(file)
    with pytest.raises(ValueError, match=r"line 1: answers\[0\] is empty"):
        load_evaluation_set(write(tmp_path / "eval.jsonl", {**line, "answers": [""]}), answers_required=False)
    with pytest.raises(ValueError, match="line 1: meta is 'c', expected an object"):
        load_evaluation_set(write(tmp_path / "eval.jsonl", {**line, "meta": "c"}), answers_required=False)


def test_an_instance_is_checked_once(tmp_path, monkeypatch):
    """The trainer does not check loaded instances again, but it checks what was changed after loading."""
    checks = []
    check_question = data._check_question

    def recorded_check(value, where):
        checks.append(where)
        return check_question(value, where)

    monkeypatch.setattr(data, "_check_question", recorded_check)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(instance) + "\n" for instance in world(NAMES[:6])))
    instances = load_instances(path)[:5]
    assert len(checks) == 6
    CoSupTrainer(make_model(), arguments(tmp_path), train_dataset=instances, eval_dataset=instances)
    assert len(checks) == 6

    changed = [dict(instances[0]), {**instances[1], "segments": []}]
    with pytest.raises(ValueError, match="training set, row 1: segments"):
        CoSupTrainer(make_model(), arguments(tmp_path), train_dataset=changed)
    assert len(checks) == 7  # the first instance is checked again; the second fails before its question is checked


@pytest.mark.parametrize("kind", ["list", "dataset", "stream", "torch"])
def test_every_kind_of_dataset_is_checked(tmp_path, kind):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return rows[i]

    rows = world(NAMES[1:3])
    rows[1]["segments"][0]["text"] = ""
    makers = {
        "list": lambda: rows,
        "dataset": lambda: datasets.Dataset.from_list(rows),
        "stream": lambda: datasets.Dataset.from_list(rows).to_iterable_dataset(),
        "torch": Rows,
    }
    make_dataset = makers[kind]
    with pytest.raises(ValueError, match=r"training set, row 1: segments\[0\].text is empty"):
        trainer = CoSupTrainer(make_model(), arguments(tmp_path, max_steps=1), train_dataset=make_dataset())
        list(trainer.train_dataset)  # a stream is checked as it is read
    trainer = CoSupTrainer(make_model(), arguments(tmp_path), train_dataset=world(NAMES[:2]))
    with pytest.raises(ValueError, match=r"evaluation set, row 1: segments\[0\].text is empty"):
        trainer.evaluate(make_dataset())
