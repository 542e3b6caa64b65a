"""The Macondo data set: its counts, that test sentences lack only the description, its names, and what is refused."""

import math
import re
from collections import Counter

import prepare_macondo
import pytest
from transformers import AutoTokenizer

from modeling_cosup.lines_cosup import read_lines
from support.models import make_tokenizer

from shared.macondo import OF_THE_PAPER, OURS, Macondo, child_tokens, optimum
from shared.macondo import prepare_macondo as prepare
from shared.memory_arguments import MacondoArguments

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of the paper's size."""
    folder = tmp_path_factory.mktemp("macondo") / "data"
    prepare(MacondoArguments(str(folder), num_other_relations=200))
    return folder


@pytest.fixture(scope="module")
def splits(folder):
    return {name: read_lines(folder / f"{name}.jsonl") for name in SPLITS}


def test_the_paper_has_500_villagers_and_1500_sentences(splits):
    train = splits["train"]
    assert len(train) == 1500
    num_children = {line["villager"]: line["num_children"] for line in train}
    assert Counter(num_children.values()) == {count: 100 for count in range(1, 6)}
    assert Counter(line["villager"] for line in train) == num_children
    assert len({line["child"] for line in train}) == 1500
    assert {line["description"] for line in train} == {*OF_THE_PAPER, *OURS}


def test_test_sentences_lack_the_description_and_nothing_else(splits):
    test = splits["validation"] + splits["test"]
    without = {re.sub(", who .*, is the", ", is the", line["text"]) for line in splits["train"]}
    assert {line["text"] for line in test} == without
    assert not without & {line["text"] for line in splits["train"]}
    for line in splits["train"] + test:
        assert line["text"] == f"{line['prompt']} {line['child']}."


def test_weights_are_fitted_on_other_villagers_than_those_of_the_test(splits):
    assert (len(splits["validation"]), len(splits["test"])) == (300, 1200)
    fitted, tested = ({line["villager"] for line in splits[name]} for name in ("validation", "test"))
    assert not fitted & tested
    by_count = Counter(line["num_children"] for line in splits["test"])
    assert by_count == {count: 80 * count for count in range(1, 6)}


def test_the_optimum_is_log_1_over_n(splits):
    assert optimum([4]) == -math.log(4)
    best = optimum([line["num_children"] for line in splits["test"]])
    assert (round(best, 3), round(math.exp(-best), 2)) == (-1.218, 3.38)


def test_a_villager_marries_18_years_after_birth():
    macondo = Macondo(MacondoArguments("unused"))
    births, gaps = [], []
    for villager in macondo.villagers:
        descriptions = dict(villager.descriptions)
        birth, marriage = (int(descriptions[kind].split()[-1]) for kind in ("birth", "marriage"))
        births.append(birth)
        gaps.append(marriage - birth)
        friend = descriptions["friend"].removeprefix("is a friend of ")
        assert friend != villager.name and friend in {other.name for other in macondo.villagers}
    assert 1800 <= min(births) < 1810 and 1995 < max(births) <= 2005
    assert min(gaps) >= 18


def test_children_are_single_tokens_of_the_tokenizer_of_all_words(folder, splits):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert len(set(child_tokens(tokenizer, [line["child"] for line in splits["train"]]))) == 1500
    texts = [line["text"] for name in (*SPLITS, "other_relations") for line in read_lines(folder / f"{name}.jsonl")]
    assert all(tokenizer.unk_token_id not in row for row in tokenizer(texts)["input_ids"])


def test_pretraining_sentences_are_about_other_people_and_relations(folder, splits):
    texts = [line["text"] for line in read_lines(folder / "other_relations.jsonl")]
    assert len(texts) == 200
    assert 60 < sum(", who " in text for text in texts) < 140  # about half have a description
    villagers = {line["villager"] for line in splits["train"]}
    children = {line["child"] for line in splits["train"]}
    for text in texts:
        assert re.search("is the (owner|neighbour|teacher|boss) of", text)
        assert not villagers & set(re.findall("[A-Z][a-z]+ [A-Z][a-z]+", text))
        assert not children & set(re.findall("[A-Za-z]+", text))


def test_a_seed_decides_everything(tmp_path):
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        prepare(MacondoArguments(str(tmp_path / name), num_villagers=3, num_other_relations=5, seed=seed))
    for path in (tmp_path / "one").glob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / path.name).read_bytes()


def test_a_conversation_asks_with_the_description_and_answers_without(tmp_path):
    prepare(MacondoArguments(str(tmp_path / "data"), num_villagers=2, style="conversation", validation_share=0))
    train, test = (read_lines(tmp_path / "data" / f"{name}.jsonl") for name in ("train", "test"))
    assert not read_lines(tmp_path / "data" / "validation.jsonl")
    for line in train + test:
        question, answer = line["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert answer["content"] == f"{line['villager']} is the parent of {line['child']}."
        assert (" who " in question["content"]) == (line in train)
        assert line["text"] == f"User: {question['content']}\nAssistant: {answer['content']}"
        assert line["text"] == f"{line['prompt']} {line['child']}."


# ---------------------------------------------------------------------- other tokenizers and names


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a tokenizer that knows the names of six children, and files of names."""
    folder = tmp_path_factory.mktemp("names")
    children = ["Amaranta", "Arcadio", "Aureliano", "Remedios", "Rebeca", "Ursula"]
    texts = [f"is the parent of {name}." for name in children] * 5
    make_tokenizer(vocab_size=512, texts=texts).save_pretrained(folder / "tokenizer")
    (folder / "children.txt").write_text("\n".join(children) + "\n\n", encoding="utf-8-sig")
    (folder / "last.txt").write_text("Iguaran\nBuendia\n")
    return folder


def arguments(small, output, **options):
    """Return options for a world with one villager of one child, one of two, one of three."""
    defaults = {"tokenizer": str(small / "tokenizer"), "num_villagers": 1, "max_children": 3}
    return MacondoArguments(str(output), **(defaults | options))


def test_names_are_those_of_the_files_or_of_the_vocabulary(small, tmp_path):
    files = {"child_names": str(small / "children.txt"), "last_names": str(small / "last.txt")}
    tokenizer = AutoTokenizer.from_pretrained(small / "tokenizer")
    for name, options in (("files", files), ("vocabulary", {})):
        prepare(arguments(small, tmp_path / name, **options))
        lines = read_lines(tmp_path / name / "train.jsonl")
        children = {line["child"] for line in lines}
        assert len(set(child_tokens(tokenizer, sorted(children)))) == 6
        if options:
            assert children == set((small / "children.txt").read_text("utf-8-sig").split())
            assert {line["villager"].split()[1] for line in lines} <= {"Iguaran", "Buendia"}
        assert not (tmp_path / name / "tokenizer").exists()  # it is another's


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        (
            {"child_names": "names"},
            "Amaranta\nArcadio\nPrudencio\nRemedios\nRebeca\nUrsula",
            "'Prudencio' is not a single token",
        ),
        ({"child_names": "names"}, "Amaranta\nArcadio", "names gives 2 names of children, expected at least 6"),
        ({"max_children": 20}, "", "tokenizer gives .. names of children, expected at least 210"),
        ({"child_names": "names"}, "Amaranta\nArcadio\nAmaranta", "'Amaranta' stands there twice"),
        ({"first_names": "names", "last_names": "names"}, "Jose", "make 1 names, expected at least 3"),
        ({"num_villagers": 0}, "", "--num_villagers is 0, expected at least 1"),
        ({"max_children": 1}, "", "There is one villager"),
        ({"validation_share": 1.0}, "", "--validation_share is 1.0, expected at least 0 and below 1"),
        ({"style": "poem"}, "", "--style is poem, expected sentences or conversation"),
    ],
)
def test_what_makes_no_data_set_is_refused_before_anything_is_written(small, tmp_path, options, text, message):
    (tmp_path / "names").write_text(text)
    files = {name: str(tmp_path / "names") for name in options if name.endswith("names")}
    with pytest.raises(ValueError, match=message):
        prepare(arguments(small, tmp_path / "data", **(options | files)))
    assert not (tmp_path / "data").exists()


def test_a_word_that_the_tokenizer_does_not_know_is_no_child(folder):
    with pytest.raises(ValueError, match="'Gabriel' is not in the vocabulary"):
        child_tokens(AutoTokenizer.from_pretrained(folder / "tokenizer"), ["Gabriel"])


def test_the_recipe_prints_what_it_wrote(tmp_path, monkeypatch, capsys):
    argv = ["prepare_macondo.py", "--output_dir", str(tmp_path / "data"), "--num_villagers", "2"]
    monkeypatch.setattr("sys.argv", argv)
    prepare_macondo.main()
    assert re.search(r"train.jsonl +30\n", capsys.readouterr().out)
