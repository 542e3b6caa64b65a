"""The passage index: exact search, files that are whole or absent, and refusal of what does not belong together."""

import json
import os
import shutil

import pytest
import torch

from modeling_cosup import CoSupForCausalLM, PassageIndex, index_files_cosup, index_store_cosup
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, encode_passages_for_gen
from support.models import PASSAGES, make_emb_seq, make_model, make_tokenizer

FILES = ["embeddings-00000.safetensors", "ids-00000.safetensors", "index_config.json", "passages-00000.arrow"]

json_dumps = json.dumps


def build(model, passages=PASSAGES, **kwargs):
    return model.build_index(passages, show_progress_bar=False, **kwargs)


def saved(model, folder):
    model.save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------ build and search


def test_index_holds_what_gen_reads_and_what_emb_seq_makes(model, passages):
    index = build(model)
    assert len(index) == len(passages) and [index[row]["id"] for row in range(len(index))] == [
        passage["id"] for passage in passages
    ]
    gen_ids = encode_passages_for_gen(model.tokenizer, passages, model.config)
    for row, (passage, ids) in enumerate(zip(passages, gen_ids, strict=True)):
        assert index[row] == {**passage, "input_ids": ids} and index.row_of(passage["id"]) == row
    for row, ids in enumerate(encode_passages_for_emb_seq(model.tokenizer, passages, model.config)):
        torch.testing.assert_close(
            index.embeddings[row], model.encode_passages(torch.tensor([ids]))[0], rtol=0, atol=1e-5
        )
    with pytest.raises(KeyError):
        index.row_of("p99")


def test_build_takes_any_iterable_and_leaves_the_mode(passages):
    model = make_model(emb_seq="gpt2")
    expected = build(model).embeddings
    model.train()  # dropout on, but not while embedding
    index = PassageIndex.build(
        ({"id": p["id"], "text": p["text"], **({"title": p["title"]} if p["title"] else {})} for p in passages),
        model=model,
    )
    assert model.training and index[2]["title"] == "" and torch.equal(index.embeddings, expected)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_search_equals_topk_of_the_product(similarity):
    model = make_model(similarity=similarity)
    index = build(
        model,
        [{"id": str(i), "title": "", "text": f"{i} {'radium ' * (i % 5)}in {i * 7}"} for i in range(40)],
        batch_size=7,
    )
    queries = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    scores, indices = index.search(queries, k=5)
    expected = (queries @ index.embeddings.T).topk(5)
    assert scores.shape == indices.shape == (9, 5) and indices.tolist() == expected.indices.tolist()
    torch.testing.assert_close(torch.from_numpy(scores), expected.values, rtol=1e-5, atol=1e-5)


def test_search_at_the_edges(model):
    index = build(model)
    queries = torch.randn(2, 32)
    scores, indices = index.search(queries, k=100)  # more than there are: all of them, best first
    assert (
        scores.shape == (2, len(index))
        and sorted(indices[0]) == list(range(len(index)))
        and (scores[:, :-1] >= scores[:, 1:]).all()
    )
    assert (index.search(queries.requires_grad_(), k=100)[1] == indices).all() and index.search(
        queries.detach().double()
    )[1].shape == (2, 1)
    assert [part.shape for part in index.search(torch.zeros(0, 32), k=3)] == [(0, 3), (0, 3)]
    with pytest.raises(ValueError, match="Queries have 16 dimensions, the index has 32"):
        index.search(torch.randn(2, 16))


def test_emb_seq_with_its_own_tokenizer_and_width():
    own = make_tokenizer(vocab_size=300, bos="<cls>", eos="<sep>", texts=["another corpus"])
    model = make_model(
        "gpt2", "bert", emb_seq_tokenizer=own, emb_seq_kwargs={"hidden_size": 16}, emb_seq_pooling="cls"
    )
    index = build(model)
    assert index.embeddings.shape == (len(PASSAGES), 32)
    ids = encode_passages_for_emb_seq(own, PASSAGES[:1], model.config)
    assert (
        index[0]["input_ids"]
        == encode_passages_for_gen(model.tokenizer, PASSAGES[:1], model.config)[0]
        != ids[0][1:-1]
    )
    torch.testing.assert_close(index.embeddings[:1], model.encode_passages(torch.tensor(ids)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "p0", "title": "", "text": "again"}, "Corpus row 6: id 'p0' is already used at Corpus row 0"),
        ({"id": "x", "title": "T", "text": ""}, "row 6: text is ''"),
        ({"id": "x", "title": "T", "text": " \n"}, "row 6: text is"),
        ({"id": "x", "title": "T"}, "row 6: text is None"),
        ({"title": "T", "text": "x"}, "row 6: id is None"),
        ({"id": "", "text": "x"}, "row 6: id is ''"),
        ({"id": 7, "text": "x"}, "row 6: id is 7, expected a string"),
        ({"id": "x", "title": ["T"], "text": "x"}, "row 6: title is"),
        ("not a passage", "row 6"),
        (None, "row 6"),
    ],
)
def test_a_bad_corpus_row_is_named(model, row, message):
    with pytest.raises(ValueError) as error:
        build(model, [*PASSAGES, row])
    assert message in str(error.value)


def test_an_empty_corpus_raises(model):
    with pytest.raises(ValueError, match="holds no passage"):
        build(model, [])


# ------------------------------------------------------------------ files


def test_saved_and_loaded_it_is_identical(model, tmp_path):
    index = build(model)
    index.save_pretrained(tmp_path / "deep" / "index")
    assert (
        sorted(os.listdir(tmp_path / "deep")) == ["index"] and sorted(os.listdir(tmp_path / "deep" / "index")) == FILES
    )
    loaded = model.load_index(str(tmp_path / "deep" / "index"))
    assert (
        torch.equal(loaded.embeddings, index.embeddings)
        and loaded.fingerprint == index.fingerprint == model.fingerprint()
    )
    assert [loaded[row] for row in range(len(loaded))] == [index[row] for row in range(len(index))]
    queries = torch.randn(3, 32)
    assert [part.tolist() for part in loaded.search(queries, 4)] == [
        part.tolist() for part in index.search(queries, 4)
    ]
    loaded.save_pretrained(tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "deep" / "index" / name).read_bytes()


def test_saving_replaces_an_index_also_the_one_it_was_loaded_from(model, tmp_path):
    build(model, PASSAGES[:2]).save_pretrained(tmp_path / "index")
    build(model).save_pretrained(tmp_path / "index")
    loaded = PassageIndex.from_pretrained(tmp_path / "index")
    assert len(loaded) == len(PASSAGES)
    loaded.save_pretrained(tmp_path / "index")
    assert PassageIndex.from_pretrained(tmp_path / "index")[5] == loaded[5]
    assert os.listdir(tmp_path) == ["index"]


@pytest.mark.parametrize("broken", ["embeddings", "passages", "ids", "config", "rename", "last rename"])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_save_leaves_nothing_half_written(model, tmp_path, monkeypatch, broken, existing):
    index = build(model)
    if existing:
        build(model, PASSAGES[:2]).save_pretrained(tmp_path / "index")

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    replace, write_tensors = os.replace, index_files_cosup.write_tensors

    def half_then_fail(path, tensors):
        write_tensors(path, tensors)
        path.write_bytes(path.read_bytes()[:100])
        fail()

    if broken == "embeddings":
        monkeypatch.setattr(index_files_cosup, "write_tensors", half_then_fail)
    elif broken == "passages":
        monkeypatch.setattr(index_files_cosup.pa.ipc, "new_file", fail)
    elif broken == "ids":
        monkeypatch.setattr(index_store_cosup, "make_id_table", fail)
    elif broken == "config":
        monkeypatch.setattr(
            index_files_cosup.json,
            "dumps",
            lambda value, **kwargs: fail() if "fingerprint" in value else json_dumps(value, **kwargs),
        )
    elif broken == "rename":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(
            os, "replace", lambda old, new: fail() if str(old).endswith(".unfinished") else replace(old, new)
        )
    with pytest.raises(OSError, match="No space left"):
        index.save_pretrained(tmp_path / "index")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == (["index"] if existing else [])
    if existing:  # the old one still stands
        assert len(PassageIndex.from_pretrained(tmp_path / "index")) == 2
    index.save_pretrained(tmp_path / "index")
    assert len(PassageIndex.from_pretrained(tmp_path / "index")) == len(PASSAGES)


def test_a_folder_that_is_no_index_is_not_overwritten(model, tmp_path):
    index = build(model)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="is not a passage index"):
        index.save_pretrained(tmp_path / "thesis")
    assert os.listdir(tmp_path) == ["thesis"] and (tmp_path / "thesis" / "chapter1.tex").read_text() == "precious"
    (tmp_path / "file").write_text("precious")
    for target in ("file", "file/below"):
        with pytest.raises(OSError):
            index.save_pretrained(tmp_path / target)
    assert (tmp_path / "file").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    index.save_pretrained(tmp_path / "empty")
    assert sorted(os.listdir(tmp_path / "empty")) == FILES


@pytest.mark.parametrize("name", FILES)
def test_an_incomplete_folder_names_the_missing_file(model, tmp_path, name):
    build(model).save_pretrained(tmp_path / "index")
    (tmp_path / "index" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"not a complete passage index: {name} is missing"):
        PassageIndex.from_pretrained(tmp_path / "index")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(model, tmp_path, name):
    build(model).save_pretrained(tmp_path / "index")
    content = (tmp_path / "index" / name).read_bytes()
    for length in (0, len(content) // 2, len(content) - 3):
        (tmp_path / "index" / name).write_bytes(content[:length])
        with pytest.raises(ValueError, match=name):
            PassageIndex.from_pretrained(tmp_path / "index", verify=False)


@pytest.mark.parametrize("name", [name for name in FILES if name != "index_config.json"])
def test_an_altered_file_is_named(model, tmp_path, monkeypatch, name):
    build(model).save_pretrained(tmp_path / "index")
    content = bytearray((tmp_path / "index" / name).read_bytes())
    content[content.index(b"Rembrandt") if name.endswith(".arrow") else -20] ^= 1
    (tmp_path / "index" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged: its SHA-256"):
        PassageIndex.from_pretrained(tmp_path / "index")
    monkeypatch.setattr(index_files_cosup, "ALWAYS_VERIFIED", 10)  # then only on request
    PassageIndex.from_pretrained(tmp_path / "index")
    with pytest.raises(ValueError, match=f"{name} is damaged: its SHA-256"):
        PassageIndex.from_pretrained(tmp_path / "index", verify=True)


def edit(folder, **changes):
    config = json.loads((folder / "index_config.json").read_text())
    (folder / "index_config.json").write_text(json.dumps({**config, **changes}))


def test_files_that_do_not_belong_together(model, tmp_path):
    build(model).save_pretrained(tmp_path / "index")
    build(model, PASSAGES[:3]).save_pretrained(tmp_path / "other")
    name = "embeddings-00000.safetensors"
    shutil.copy(tmp_path / "other" / name, tmp_path / "index")
    with pytest.raises(ValueError, match=f"{name} is damaged: it has .* bytes, expected"):
        PassageIndex.from_pretrained(tmp_path / "index")
    files = json.loads((tmp_path / "index" / "index_config.json").read_text())["files"]
    edit(
        tmp_path / "index",
        files={**files, name: json.loads((tmp_path / "other" / "index_config.json").read_text())["files"][name]},
    )
    with pytest.raises(
        ValueError, match=r"6 passages, embeddings of shape \(3, 32\), expected 6 of both and 32 dimensions"
    ):
        PassageIndex.from_pretrained(tmp_path / "index")


@pytest.mark.parametrize("version", [0, 1, 3, None, "2"])
def test_another_format_version(model, tmp_path, version):
    build(model).save_pretrained(tmp_path / "index")
    edit(tmp_path / "index", format_version=version)
    with pytest.raises(
        ValueError,
        match=f"format_version {version!r}, this release reads 2: build the index again, with recipes/build_index.py",
    ):
        PassageIndex.from_pretrained(tmp_path / "index")


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(OSError, match="missing_index"):
        PassageIndex.from_pretrained(tmp_path / "missing_index")


def test_nothing_on_the_path_of_an_index_is_unpickled(model, tmp_path):
    """A pickle under the name of the embeddings is refused as the bytes it is, also where it has their checksum."""
    build(model).save_pretrained(tmp_path / "index")
    path = tmp_path / "index" / "embeddings-00000.safetensors"
    torch.save({"embeddings": torch.zeros(6, 32)}, path)
    files = json.loads((tmp_path / "index" / "index_config.json").read_text())["files"]
    edit(tmp_path / "index", files={**files, path.name: index_files_cosup.seal(path)})
    with pytest.raises(ValueError, match="embeddings-00000.safetensors is damaged"):
        PassageIndex.from_pretrained(tmp_path / "index")


# ------------------------------------------------------------------ which model an index is of


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"emb_seq_kwargs": {"seed": 9}}, "emb_seq"),
        ({"similarity": "dot"}, "similarity"),
        ({"emb_seq_pooling": "mean"}, "emb_seq_pooling"),
        ({"passage_template": "{title}: {text}"}, "passage_template"),
        ({"max_passage_length": 64}, "max_passage_length"),
        ({"emb_seq_add_bos_token": False}, "emb_seq_add_bos_token"),
        ({"passage_prompt": "passage: "}, "passage_prompt"),
        ({"tokenizer": make_tokenizer(texts=["another corpus"])}, "tokenizer"),
        ({"emb_seq_tokenizer": make_tokenizer(texts=["another corpus"])}, "emb_seq_tokenizer"),
        ({"nsp_token": "[Ret]"}, "tokenizer"),
    ],
)
def test_an_index_of_another_model_is_refused_by_name(tmp_path, change, field):
    build(make_model()).save_pretrained(tmp_path / "index")
    other = make_model(**change)
    with pytest.raises(
        ValueError, match=f"built by another model(.|\n)*  {field}: the index has .*, the model "
    ) as error:
        other.load_index(tmp_path / "index")
    if field not in ("tokenizer", "emb_seq_tokenizer"):
        assert str(error.value).count("the index has") == 1
    inputs = {"input_ids": torch.tensor([[5, other.config.nsp_token_id]]), "max_new_tokens": 2}
    with pytest.raises(ValueError, match="built by another model"):
        other.generate(**inputs, retriever=PassageIndex.from_pretrained(tmp_path / "index"))


def test_an_index_of_an_earlier_release_is_one_with_the_settings_of_then(model, tmp_path):
    build(model).save_pretrained(tmp_path / "index")
    new = ("emb_seq_add_bos_token", "emb_seq_add_eos_token", "passage_prompt")
    path = tmp_path / "index" / "index_config.json"
    config = json.loads(path.read_text())
    config["fingerprint"] = {name: value for name, value in config["fingerprint"].items() if name not in new}
    path.write_text(json.dumps({**config, "sha256": index_files_cosup.digest_of_config(config)}))
    model.load_index(tmp_path / "index")
    with pytest.raises(ValueError, match="  emb_seq_add_bos_token: the index has True, the model False"):
        make_model(emb_seq_add_bos_token=False).load_index(tmp_path / "index")


def test_an_index_of_passages_with_a_prompt(passages):
    model = make_model(passage_prompt="passage: ", emb_seq_add_eos_token=False, emb_seq_pooling="lasttoken")
    index, tokenizer = build(model), model.tokenizer
    for row, passage in enumerate(passages):
        text = (
            f"passage: {passage['title']} :: {passage['text']}" if passage["title"] else f"passage: {passage['text']}"
        )
        ids = [
            tokenizer.bos_token_id,
            *tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
        ]
        torch.testing.assert_close(
            index.embeddings[row], model.encode_passages(torch.tensor([ids]))[0], rtol=0, atol=1e-5
        )
        assert tokenizer.decode(index[row]["input_ids"]) in text.removeprefix("passage: ")  # Gen reads no prompt


def test_what_leaves_emb_seq_alone_is_accepted(model, tmp_path):
    build(model).save_pretrained(tmp_path / "index")
    folder = saved(model, tmp_path / "model")
    loads = [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"load_emb_seq": False},
        {"load_emb_seq": False, "dtype": torch.bfloat16},
    ]
    for options in loads:
        CoSupForCausalLM.from_pretrained(folder, **options).load_index(tmp_path / "index")
    half = CoSupForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    CoSupForCausalLM.from_pretrained(saved(half, tmp_path / "half")).load_index(tmp_path / "index")
    model.to(torch.bfloat16).load_index(tmp_path / "index")
    make_model().to(torch.bfloat16).load_index(tmp_path / "index")  # hashed after the cast
    CoSupForCausalLM.from_gen_and_emb_seq(  # the same Emb_seq beside another Gen
        make_model("gpt2").gen, CoSupForCausalLM.from_pretrained(folder).emb_seq, tokenizer=model.tokenizer
    ).load_index(tmp_path / "index")


def train_step(model, parameters, passages=True):
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    ids = torch.tensor([[5, 6, model.config.nsp_token_id, 8]])
    more = (
        {"passage_input_ids": torch.tensor([[5, 6, 7], [7, 8, 9]]), "passage_labels": torch.tensor([0])}
        if passages
        else {}
    )
    model(ids, labels=ids, **more).loss.backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("loaded", [False, True])
def test_training_gen_keeps_and_training_emb_seq_changes_the_fingerprint(model, tmp_path, loaded):
    index = build(model)
    if loaded:
        model = CoSupForCausalLM.from_pretrained(saved(model, tmp_path / "model"))
    before = model.fingerprint()
    train_step(model, model.gen.parameters(), passages=False)
    assert model.fingerprint() == before
    train_step(model, model.gen.parameters())  # Emb_seq runs, but is not stepped
    assert model.fingerprint() == before
    index.check_model(model)
    index.check_model(CoSupForCausalLM.from_pretrained(saved(model, tmp_path / "trained_gen")))
    train_step(model, model.emb_seq.parameters())
    assert {name for name, value in model.fingerprint().items() if value != before[name]} == {"emb_seq"}
    for trained in (model, CoSupForCausalLM.from_pretrained(saved(model, tmp_path / "trained"))):
        with pytest.raises(ValueError, match="  emb_seq: the index has"):
            index.check_model(trained)
    build(model).check_model(CoSupForCausalLM.from_pretrained(tmp_path / "trained", load_emb_seq=False))


def test_emb_head_belongs_to_the_fingerprint():
    model = make_model(emb_seq_kwargs={"hidden_size": 48})
    before = model.fingerprint()
    train_step(model, model.emb_head.parameters())
    assert model.fingerprint()["emb_seq"] != before["emb_seq"]


def test_loading_other_weights_changes_the_fingerprint(model):
    before, other = model.fingerprint(), make_model(emb_seq_kwargs={"seed": 9})
    model.load_state_dict(other.state_dict())
    assert model.fingerprint() == other.fingerprint() != before


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's
def test_adapters_on_emb_seq_change_the_fingerprint(model):
    peft = pytest.importorskip("peft")
    index = build(model)
    config = peft.LoraConfig(target_modules=r"emb_seq\..*q_proj", r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="  emb_seq: the index has"):
        index.check_model(adapted.base_model.model)
    own = build(adapted.base_model.model)
    own.check_model(adapted.base_model.model)
    merged, fresh = adapted.merge_and_unload(), make_model()
    with pytest.raises(ValueError, match="  emb_seq: the index has"):
        index.check_model(merged)
    fresh.load_state_dict(merged.state_dict())
    assert merged.fingerprint() == fresh.fingerprint()


def test_building_with_another_tokenizer_changes_the_fingerprint(model, tmp_path):
    folder = saved(model, tmp_path / "model")
    foreign = make_model(tokenizer=make_tokenizer(texts=["another corpus"])).tokenizer
    index = build(model, tokenizer=foreign)
    with pytest.raises(ValueError, match="  tokenizer: the index has"):
        index.check_model(CoSupForCausalLM.from_pretrained(folder))


def test_building_with_an_equal_tokenizer_changes_nothing(model, tmp_path):
    before, files = model.fingerprint(), sorted(os.listdir(saved(model, tmp_path / "model")))
    again = CoSupForCausalLM.from_pretrained(tmp_path / "model").tokenizer
    index = build(model, tokenizer=again)
    assert index.fingerprint == model.fingerprint() == before and model.emb_seq_tokenizer is model.tokenizer
    assert sorted(os.listdir(saved(model, tmp_path / "again"))) == files


def test_a_model_that_was_never_fingerprinted_is_not_taken_on_trust(model, tmp_path):
    index = build(model)
    folder = saved(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["fingerprint"] = None
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    index.check_model(CoSupForCausalLM.from_pretrained(folder))  # hashed on the spot
    with pytest.raises(ValueError, match="no fingerprint of Emb_seq and Emb_seq is not loaded"):
        index.check_model(CoSupForCausalLM.from_pretrained(folder, load_emb_seq=False))


def test_query_encoder_of_another_width_is_refused():
    with pytest.raises(ValueError, match="query_encoder"):
        make_model(query_from="query_encoder", query_encoder=make_emb_seq(hidden_size=16))
