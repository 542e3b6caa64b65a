"""The passage index: exact search, files that are complete or absent, and the model that an index belongs to."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from modeling_cosup import (
    CoSupForCausalLM,
    PassageIndex,
    RetrievalConfig,
    folders_cosup,
    index_files_cosup,
    index_store_cosup,
    sharing_cosup,
)
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, encode_passages_for_gen, encode_prompt
from support.models import PASSAGES, make_emb_seq, make_model, make_tokenizer

FILES = ["embeddings-00000.safetensors", "ids-00000.safetensors", "index_config.json", "passages-00000.arrow"]

json_dumps = json.dumps


def build(model, passages=PASSAGES, **kwargs):
    return model.build_index(passages, show_progress_bar=False, **kwargs)


def saved(model, folder):
    model.save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------ build and search


def test_an_index_holds_gens_token_ids_and_emb_seqs_embeddings(model, passages):
    index = build(model)
    assert len(index) == len(passages)
    gen_ids = encode_passages_for_gen(model.tokenizer, passages, model.config)
    for row, (passage, ids) in enumerate(zip(passages, gen_ids, strict=True)):
        assert index[row] == {**passage, "input_ids": ids}
        assert index.row_of(passage["id"]) == row
    for row, ids in enumerate(encode_passages_for_emb_seq(model.tokenizer, passages, model.config)):
        (alone,) = model.encode_passages(torch.tensor([ids]))
        torch.testing.assert_close(index.embeddings[row], alone, rtol=0, atol=1e-5)
    with pytest.raises(KeyError):
        index.row_of("p99")


def test_build_takes_any_iterable_and_leaves_the_mode(passages):
    model = make_model(emb_seq="gpt2")
    expected = build(model).embeddings
    model.train()  # dropout on, but not while embedding
    without_empty_titles = [{key: value for key, value in passage.items() if value} for passage in passages]
    index = PassageIndex.build(iter(without_empty_titles), model=model)
    assert model.training
    assert index[2]["title"] == ""
    assert torch.equal(index.embeddings, expected)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_search_equals_topk_of_the_product(similarity):
    model = make_model(similarity=similarity)
    corpus = [{"id": str(i), "title": "", "text": f"{i} {'radium ' * (i % 5)}in {i * 7}"} for i in range(40)]
    index = build(model, corpus, batch_size=7)
    queries = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    scores, rows = index.search(queries, k=5)
    expected = (queries @ index.embeddings.T).topk(5)
    assert scores.shape == rows.shape == (9, 5)
    assert rows.tolist() == expected.indices.tolist()
    torch.testing.assert_close(torch.from_numpy(scores), expected.values, rtol=1e-5, atol=1e-5)


def test_search_at_the_edges(model):
    index = build(model)
    queries = torch.randn(2, 32)
    scores, rows = index.search(queries, k=100)  # more than there are: all of them, best first
    assert scores.shape == (2, len(index))
    assert sorted(rows[0]) == list(range(len(index)))
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert (index.search(queries.requires_grad_(), k=100)[1] == rows).all()
    assert index.search(queries.detach().double())[1].shape == (2, 1)
    assert [part.shape for part in index.search(torch.zeros(0, 32), k=3)] == [(0, 3), (0, 3)]
    with pytest.raises(ValueError, match="Queries have 16 dimensions, the index has 32"):
        index.search(torch.randn(2, 16))


@pytest.mark.parametrize("query_from", ["gen", "emb_seq"])
def test_questions_are_embedded_as_generate_searches(query_from):
    model = make_model(query_from=query_from).eval()
    index = model.build_index(PASSAGES, show_progress_bar=False)
    questions = ["who discovered radium?", "where?", "who painted the night watch in 1642?"]
    scores, rows = index.search(model.embed_questions(questions, instruction="Answer.", batch_size=2), k=1)
    for question, score, row in zip(questions, scores[:, 0], rows[:, 0], strict=True):
        prompt = encode_prompt(model.tokenizer, question, "Answer.")
        options = {"retriever": index, "retrieval_config": RetrievalConfig(force_nsp_first=True, max_retrievals=1)}
        (answer,) = model.generate_many([prompt], max_new_tokens=2, show_progress_bar=False, **options)
        assert answer.retrievals[0].passage_id == index[row]["id"]
        assert answer.retrievals[0].score == pytest.approx(score, abs=1e-5)


def test_texts_in_the_place_of_embeddings_or_ids_are_refused(model, passages):
    index = model.build_index(passages, show_progress_bar=False)
    for texts in ("who?", ["who?", "where?"]):
        with pytest.raises(TypeError, match=r"query embeddings, not texts: index.search\(model.embed_questions"):
            index.search(texts)
    with pytest.raises(TypeError, match="got a list, expected a tensor of token ids"):
        model.encode_passages(["Radium is a metal."])
    with pytest.raises(TypeError, match="got a single text, expected a list"):
        model.embed_questions("who?")


def test_emb_seq_with_its_own_tokenizer_and_width():
    tokenizer = make_tokenizer(vocab_size=300, bos="<cls>", eos="<sep>", texts=["another corpus"])
    options = {"emb_seq_tokenizer": tokenizer, "emb_seq_kwargs": {"hidden_size": 16}, "emb_seq_pooling": "cls"}
    model = make_model("gpt2", "bert", **options)
    index = build(model)
    assert index.embeddings.shape == (len(PASSAGES), 32)
    ids = encode_passages_for_emb_seq(tokenizer, PASSAGES[:1], model.config)
    (gen_ids,) = encode_passages_for_gen(model.tokenizer, PASSAGES[:1], model.config)
    assert index[0]["input_ids"] == gen_ids
    assert gen_ids != ids[0][1:-1]
    torch.testing.assert_close(index.embeddings[:1], model.encode_passages(torch.tensor(ids)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "p0", "title": "", "text": "again"}, "Corpus row 6: id 'p0' is already in Corpus row 0"),
        ({"id": "x", "title": "T", "text": ""}, "row 6: text is empty"),
        ({"id": "x", "title": "T", "text": " \n"}, "row 6: text is"),
        ({"id": "x", "title": "T"}, "row 6: text is None"),
        ({"title": "T", "text": "x"}, "row 6: id is None"),
        ({"id": "", "text": "x"}, "row 6: id is empty"),
        ({"id": 7.5, "text": "x"}, "row 6: id is 7.5, expected a string"),
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


def test_a_saved_and_loaded_index_is_identical(model, tmp_path):
    index = build(model)
    index.save_pretrained(tmp_path / "deep" / "index")
    assert os.listdir(tmp_path / "deep") == ["index"]
    assert sorted(os.listdir(tmp_path / "deep" / "index")) == FILES
    loaded = model.load_index(str(tmp_path / "deep" / "index"))
    assert torch.equal(loaded.embeddings, index.embeddings)
    assert loaded.fingerprint == index.fingerprint == model.fingerprint()
    assert [loaded[row] for row in range(len(loaded))] == [index[row] for row in range(len(index))]
    queries = torch.randn(3, 32)
    for part, expected in zip(loaded.search(queries, 4), index.search(queries, 4), strict=True):
        assert part.tolist() == expected.tolist()
    loaded.save_pretrained(tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "deep" / "index" / name).read_bytes()


def test_saving_replaces_an_index_even_the_one_it_was_loaded_from(model, tmp_path):
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

    def fail_for_the_config(value, **kwargs):
        return fail() if "fingerprint" in value else json_dumps(value, **kwargs)

    def fail_for_the_unfinished_folder(old, new):
        return fail() if str(old).endswith(".unfinished") else replace(old, new)

    if broken == "embeddings":
        monkeypatch.setattr(index_files_cosup, "write_tensors", half_then_fail)
    elif broken == "passages":
        monkeypatch.setattr(index_files_cosup.pa.ipc, "new_file", fail)
    elif broken == "ids":
        monkeypatch.setattr(index_store_cosup, "make_id_table", fail)
    elif broken == "config":
        monkeypatch.setattr(folders_cosup.json, "dumps", fail_for_the_config)
    elif broken == "rename":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(os, "replace", fail_for_the_unfinished_folder)
    with pytest.raises(OSError, match="No space left"):
        index.save_pretrained(tmp_path / "index")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == (["index"] if existing else [])
    if existing:  # the old one is still there
        assert len(PassageIndex.from_pretrained(tmp_path / "index")) == 2
    index.save_pretrained(tmp_path / "index")
    assert len(PassageIndex.from_pretrained(tmp_path / "index")) == len(PASSAGES)


def test_a_folder_that_is_no_index_is_not_overwritten(model, tmp_path):
    index = build(model)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="is not a passage index"):
        index.save_pretrained(tmp_path / "thesis")
    assert os.listdir(tmp_path) == ["thesis"]
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "precious"
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
    place = content.index(b"Rembrandt") if name.endswith(".arrow") else -20
    content[place] ^= 1
    (tmp_path / "index" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged: its SHA-256"):
        PassageIndex.from_pretrained(tmp_path / "index")
    monkeypatch.setattr(folders_cosup, "ALWAYS_VERIFIED", 10)  # then only on request
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
    other_files = json.loads((tmp_path / "other" / "index_config.json").read_text())["files"]
    edit(tmp_path / "index", files={**files, name: other_files[name]})
    message = r"6 passages, embeddings of shape \(3, 32\), expected 6 of both and 32 dimensions"
    with pytest.raises(ValueError, match=message):
        PassageIndex.from_pretrained(tmp_path / "index")


@pytest.mark.parametrize("version", [0, 1, 3, None, "2"])
def test_another_format_version(model, tmp_path, version):
    build(model).save_pretrained(tmp_path / "index")
    edit(tmp_path / "index", format_version=version)
    message = f"format_version {version!r}, this release reads 2: build the index again, with recipes/build_index.py"
    with pytest.raises(ValueError, match=message):
        PassageIndex.from_pretrained(tmp_path / "index")


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(OSError, match="missing_index"):
        PassageIndex.from_pretrained(tmp_path / "missing_index")


def test_nothing_on_the_path_of_an_index_is_unpickled(model, tmp_path):
    """A pickle in place of the embeddings is refused, even if the config has its checksum."""
    build(model).save_pretrained(tmp_path / "index")
    path = tmp_path / "index" / "embeddings-00000.safetensors"
    torch.save({"embeddings": torch.zeros(6, 32)}, path)
    files = json.loads((tmp_path / "index" / "index_config.json").read_text())["files"]
    edit(tmp_path / "index", files={**files, path.name: folders_cosup.seal(path)})
    with pytest.raises(ValueError, match="embeddings-00000.safetensors is damaged"):
        PassageIndex.from_pretrained(tmp_path / "index")


# ------------------------------------------------------------------ the model that an index belongs to


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
        ({"truncate_dim": 16}, "truncate_dim"),
    ],
)
def test_an_index_of_another_model_is_refused_by_name(tmp_path, change, field):
    build(make_model()).save_pretrained(tmp_path / "index")
    other = make_model(**change)
    message = f"built by another model(.|\n)*  {field}: the index has .*, the model "
    with pytest.raises(ValueError, match=message) as error:
        other.load_index(tmp_path / "index")
    if field not in ("tokenizer", "emb_seq_tokenizer"):
        assert str(error.value).count("the index has") == 1
    inputs = {"input_ids": torch.tensor([[5, other.config.nsp_token_id]]), "max_new_tokens": 2}
    with pytest.raises(ValueError, match="built by another model"):
        other.generate(**inputs, retriever=PassageIndex.from_pretrained(tmp_path / "index"))


def test_an_index_of_an_earlier_release_has_the_settings_of_that_time(model, tmp_path):
    build(model).save_pretrained(tmp_path / "index")
    path = tmp_path / "index" / "index_config.json"
    config = json.loads(path.read_text())
    for new_setting in ("emb_seq_add_bos_token", "emb_seq_add_eos_token", "passage_prompt", "truncate_dim"):
        del config["fingerprint"][new_setting]
    path.write_text(json.dumps({**config, "sha256": folders_cosup.digest_of_config(config)}))
    model.load_index(tmp_path / "index")
    with pytest.raises(ValueError, match="  emb_seq_add_bos_token: the index has True, the model False"):
        make_model(emb_seq_add_bos_token=False).load_index(tmp_path / "index")


def test_an_index_of_passages_with_a_prompt(passages):
    model = make_model(passage_prompt="passage: ", emb_seq_add_eos_token=False, emb_seq_pooling="lasttoken")
    index, tokenizer = build(model), model.tokenizer
    for row, passage in enumerate(passages):
        text = f"{passage['title']} :: {passage['text']}" if passage["title"] else passage["text"]
        encoded = tokenizer(f"passage: {text}", add_special_tokens=False, split_special_tokens=True)
        ids = [tokenizer.bos_token_id, *encoded["input_ids"]]
        (alone,) = model.encode_passages(torch.tensor([ids]))
        torch.testing.assert_close(index.embeddings[row], alone, rtol=0, atol=1e-5)
        assert tokenizer.decode(index[row]["input_ids"]) in text  # Gen reads no prompt


def test_models_with_the_same_emb_seq_are_accepted(model, tmp_path):
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
    other_gen, same_emb_seq = make_model("gpt2").gen, CoSupForCausalLM.from_pretrained(folder).emb_seq
    other = CoSupForCausalLM.from_gen_and_emb_seq(other_gen, same_emb_seq, tokenizer=model.tokenizer)
    other.load_index(tmp_path / "index")


def train_step(model, parameters, passages=True):
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    ids = torch.tensor([[5, 6, model.config.nsp_token_id, 8]])
    inputs = {"input_ids": ids, "labels": ids}
    if passages:
        inputs["passage_input_ids"] = torch.tensor([[5, 6, 7], [7, 8, 9]])
        inputs["passage_labels"] = torch.tensor([0])
    model(**inputs).loss.backward()
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
    build(adapted.base_model.model).check_model(adapted.base_model.model)
    merged, fresh = adapted.merge_and_unload(), make_model()
    with pytest.raises(ValueError, match="  emb_seq: the index has"):
        index.check_model(merged)
    fresh.load_state_dict(merged.state_dict())
    assert merged.fingerprint() == fresh.fingerprint()


def test_a_cast_to_float16_keeps_a_stored_hash_that_is_true(model, tmp_path):
    folder = saved(model, tmp_path / "model")
    before = model.fingerprint()
    assert CoSupForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).half().fingerprint() == before
    changed = CoSupForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        next(changed.emb_seq.parameters()).add_(0.5)
    saved_again = changed.fingerprint()
    assert saved_again != before
    assert changed.half().fingerprint() == saved_again
    with torch.no_grad():
        next(changed.emb_seq.parameters()).add_(0.5)
    assert changed.fingerprint() not in (before, saved_again)
    unseen = CoSupForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        next(unseen.emb_seq.parameters()).add_(0.5)
    assert unseen.half().fingerprint() != before  # nobody asked in float32, after the change


def test_another_emb_head_in_float16_changes_the_hash_that_was_stored(tmp_path):
    folder = saved(make_model(emb_seq="gpt2", emb_seq_kwargs={"hidden_size": 48}), tmp_path / "model")
    model = CoSupForCausalLM.from_pretrained(folder, dtype=torch.float16)
    before = model.fingerprint()
    with torch.no_grad():
        model.emb_head.weight.add_(0.5)
    assert model.fingerprint() != before


def test_weights_are_hashed_once_for_each_generate(model, monkeypatch):
    model.fingerprint()
    calls = []
    hash_parameters = sharing_cosup.hash_parameters
    monkeypatch.setattr(sharing_cosup, "hash_parameters", lambda *args: calls.append(args) or hash_parameters(*args))
    model.fingerprint()
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's
@pytest.mark.parametrize("part", ["emb_seq", "gen"])
def test_adapters_on_weights_in_float16_change_the_hash_that_was_stored(model, tmp_path, part):
    peft = pytest.importorskip("peft")
    model.memory_fingerprint()  # stores Gen's hash too
    folder = saved(model, tmp_path / "model")
    model = CoSupForCausalLM.from_pretrained(folder, dtype=torch.float16)

    def hash_of(model):
        return model.fingerprint()["emb_seq"] if part == "emb_seq" else model.memory_fingerprint()["gen"]

    before = model.config.fingerprint[part]
    assert hash_of(model) == before
    config = peft.LoraConfig(target_modules=rf"{part}\..*q_proj", r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    assert hash_of(adapted.base_model.model) != before
    merged = adapted.merge_and_unload()
    assert hash_of(merged) != before
    again = CoSupForCausalLM.from_pretrained(saved(merged, tmp_path / "merged"), dtype=torch.float16)
    assert hash_of(again) == hash_of(merged)


# ------------------------------------------------------------------ a tied model: Gen is Emb_seq


@pytest.mark.parametrize("passages", [True, False])
def test_training_the_gen_of_a_tied_model_changes_the_fingerprint(tmp_path, passages):
    index = build(make_model(tie_emb_seq=True))
    model = CoSupForCausalLM.from_pretrained(saved(make_model(tie_emb_seq=True), tmp_path / "model"))
    index.check_model(model)
    train_step(model, model.gen.parameters(), passages)
    for trained in (model, CoSupForCausalLM.from_pretrained(saved(model, tmp_path / "trained"))):
        with pytest.raises(ValueError, match=r"tied model .*training Gen changes(.|\n)*  emb_seq: the index has"):
            index.check_model(trained)
    other = make_model(tie_emb_seq=True)
    other.load_state_dict(model.state_dict())
    assert other.fingerprint() == model.fingerprint()
    with pytest.raises(ValueError, match="training Gen changes"):
        index.check_model(other)


def test_a_tied_model_in_half_precision_forgets_its_hash_in_training_only(tmp_path):
    model = make_model(tie_emb_seq=True)
    index = build(model)
    half = CoSupForCausalLM.from_pretrained(saved(model, tmp_path / "model"), dtype=torch.float16)
    half(torch.tensor([[5, 6]]))
    index.check_model(half)
    train_step(half, half.gen.parameters(), passages=False)
    with pytest.raises(ValueError, match="training Gen changes"):
        index.check_model(half)


def test_the_lm_head_of_a_tied_model_is_not_in_the_fingerprint(tmp_path):
    model = make_model(tie_emb_seq=True, gen_kwargs={"tie_word_embeddings": False})
    index = build(model)
    train_step(model, model.gen.lm_head.parameters(), passages=False)
    index.check_model(model)
    index.check_model(CoSupForCausalLM.from_pretrained(saved(model, tmp_path)))


def test_the_emb_head_of_a_tied_model_is_in_the_fingerprint():
    model = make_model(tie_emb_seq=True, emb_head_size=8)
    index = build(model)
    assert index.embeddings.shape == (len(PASSAGES), 8)
    train_step(model, model.emb_head.parameters())
    with pytest.raises(ValueError, match="  emb_seq: the index has"):
        index.check_model(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's
def test_adapters_on_a_tied_gen_change_the_fingerprint():
    peft = pytest.importorskip("peft")
    model = make_model(tie_emb_seq=True)
    index = build(model)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    for changed in (adapted.base_model.model, adapted.merge_and_unload()):
        with pytest.raises(ValueError, match="training Gen changes"):
            index.check_model(changed)


@pytest.mark.parametrize("tied", [True, False])
def test_a_truncated_index_is_smaller_and_belongs_to_one_width(tmp_path, tied):
    whole = make_model(tie_emb_seq=tied)
    folder = saved(whole, tmp_path / "model")
    model = CoSupForCausalLM.from_pretrained(folder, truncate_dim=16)
    build(whole).save_pretrained(tmp_path / "whole")
    build(model).save_pretrained(tmp_path / "half")
    embeddings = {name: load_file(tmp_path / name / FILES[0])["embeddings"] for name in ("whole", "half")}
    assert embeddings["half"].nbytes * 2 == embeddings["whole"].nbytes
    cut = torch.nn.functional.normalize(embeddings["whole"][:, :16], dim=-1)
    torch.testing.assert_close(embeddings["half"], cut, rtol=0, atol=1e-6)
    model.load_index(tmp_path / "half")
    for loaded, index, message in ((whole, "half", "16, the model None"), (model, "whole", "None, the model 16")):
        with pytest.raises(ValueError, match=f"  truncate_dim: the index has {message}") as error:
            loaded.load_index(tmp_path / index)
        assert "training Gen changes" not in str(error.value)


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


def test_a_model_without_a_stored_fingerprint_is_not_trusted(model, tmp_path):
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
