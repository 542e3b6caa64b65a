"""Retrievers of sentence-transformers as Emb_seq, by name: their settings come with them, and they embed as before."""

import json

import pytest
import torch
import torch.nn.functional as F

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, render_passage
from support.models import PASSAGES, make_emb_seq
from support.retrievers import dense, normalize, retriever
from trainer import CoSupTrainingArguments

from shared.arguments import ScriptArguments
from shared.model_options import load_model

library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
build = CoSupForCausalLM.from_gen_and_emb_seq
LONG = {"id": "long", "title": "Long", "text": "painters " * 100}
READABLE = [*(passage for passage in PASSAGES if "</s>" not in passage["text"]), LONG]  # </s> is control text to them
PROMPTS = {"query": "query: ", "document": "passage: "}
LAYOUTS = {
    "e5": ("bert", "mean", lambda: [normalize()], {"prompts": PROMPTS}),
    "bge": ("bert", "cls", lambda: [normalize()], {}),
    "gte": ("modernbert", "mean", lambda: [], {"similarity_fn_name": "cosine"}),
    "e5-mistral": ("mistral", "lasttoken", lambda: [normalize()], {"prompts": PROMPTS}),
    "dense": ("bert", "mean", lambda: [dense()], {"similarity_fn_name": "dot"}),
}


@torch.no_grad()
def embeddings(model, passages):
    ids, mask = pad_rows(encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config))
    return model.encode_passages(ids, mask)


def expected_embeddings(folder, model, passages):
    texts = [render_passage(passage, model.config.passage_template) for passage in passages]
    expected = torch.tensor(library.SentenceTransformer(str(folder), device="cpu").encode_document(texts))
    return F.normalize(expected, dim=-1) if model.config.similarity == "cosine" else expected


def in_layout_of_older_releases(folder):
    """Rewrite the settings as releases before 6 did, with the transformer in a folder of its own."""
    (folder / "0_Transformer").mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(folder / "0_Transformer" / path.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    for module in modules:
        module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"
    (folder / "modules.json").write_text(json.dumps(modules))
    settings = {"max_seq_length": 40, "do_lower_case": False}
    (folder / "0_Transformer" / "sentence_bert_config.json").write_text(json.dumps(settings))
    pooling = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize("layout", [*LAYOUTS, "minilm"])
def test_a_retriever_embeds_as_before(tmp_path, layout):
    architecture, pooling, modules, options = LAYOUTS.get(layout, LAYOUTS["e5"])
    retriever(tmp_path, architecture, pooling, modules(), **options)
    folder = tmp_path / "retriever"
    if layout == "minilm":
        in_layout_of_older_releases(folder)
    model = build(str(tmp_path / "gen"), str(folder), query_from="emb_seq")
    expected = expected_embeddings(folder, model, READABLE)
    torch.testing.assert_close(embeddings(model, READABLE), expected, rtol=1e-4, atol=1e-5)
    config = model.config
    assert (config.emb_seq_pooling, config.max_passage_length) == (pooling, 38 if layout == "minilm" else 94)
    prompts = options.get("prompts", {"query": "", "document": ""})
    assert (config.query_prompt, config.passage_prompt) == (prompts["query"], prompts["document"])
    model.save_pretrained(tmp_path / "saved")
    loaded = CoSupForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(embeddings(loaded, READABLE), expected, rtol=1e-4, atol=1e-5)


def test_train_reads_a_retriever_likewise(tmp_path):
    retriever(tmp_path, "bert", "cls", [normalize()], prompts=PROMPTS)
    folder = tmp_path / "retriever"
    args = CoSupTrainingArguments(str(tmp_path / "out"), report_to="none")
    script = ScriptArguments(gen=str(tmp_path / "gen"), emb_seq=str(folder))
    model = load_model(script, args)
    model.emb_head = None  # new, to reach the width of Gen, which makes the queries
    torch.testing.assert_close(
        embeddings(model, READABLE), expected_embeddings(folder, model, READABLE), rtol=1e-4, atol=1e-5
    )
    assert model.config.query_prompt == ""  # nothing would read it
    script.max_passage_length, script.passage_prompt = 20, "p: "
    config = load_model(script, args).config
    assert (config.max_passage_length, config.passage_prompt, config.emb_seq_pooling) == (20, "p: ", "cls")
    script.emb_seq_pooling = "mean"
    with pytest.raises(ValueError, match="emb_seq_pooling is mean, the files of .*retriever say cls. Leave it out"):
        load_model(script, args)
    script.emb_seq_pooling, script.query_encoder = None, str(folder)
    with pytest.raises(ValueError, match="--query_encoder needs --query_from query_encoder"):
        load_model(script, args)
    model = load_model(ScriptArguments(gen=str(tmp_path / "gen"), nsp_init="eos"), args)
    rows = model.get_input_embeddings().weight
    assert torch.equal(rows[model.config.nsp_token_id], rows[model.tokenizer.eos_token_id])
    model.save_pretrained(tmp_path / "checkpoint")
    # a config may name nsp_init again, but the embedding has begun
    again = load_model(ScriptArguments(model_name_or_path=str(tmp_path / "checkpoint"), nsp_init="eos"), args)
    assert torch.equal(again.get_input_embeddings().weight, rows)


def test_a_dense_layer_of_another_width_than_gen_is_left_out(tmp_path):
    retriever(tmp_path, "bert", "mean", [dense(24)], similarity_fn_name="dot")
    model = build(str(tmp_path / "gen"), str(tmp_path / "retriever"))
    assert model.emb_head.weight.shape == (32, 16)
    retriever(tmp_path / "fitting", "bert", "mean", [dense(32)], similarity_fn_name="dot")
    folder = tmp_path / "fitting" / "retriever"
    model = build(str(tmp_path / "gen"), str(folder))
    expected = expected_embeddings(folder, model, READABLE)
    torch.testing.assert_close(embeddings(model, READABLE), expected, rtol=1e-4, atol=1e-5)


def test_a_query_encoder_must_pool_and_read_as_emb_seq_does(tmp_path):
    gen = str(retriever(tmp_path / "a", "bert", "cls", [normalize()], prompts=PROMPTS)[1])
    retriever(tmp_path / "b", "bert", "mean", [normalize()])
    retriever(tmp_path / "c", "bert", "cls", [normalize()], prompts={"query": "ask: ", "document": ""})
    names = {name: str(tmp_path / name / "retriever") for name in "abc"}
    options = {"query_from": "query_encoder"}
    for encoder, prompt in (("a", "query: "), ("c", "ask: ")):
        model = build(gen, names["a"], query_encoder=names[encoder], **options)
        assert (model.config.query_prompt, model.config.passage_prompt) == (prompt, "passage: ")
    with pytest.raises(ValueError, match="query encoder .*b/retriever has emb_seq_pooling mean, Emb_seq has cls"):
        build(gen, names["a"], query_encoder=names["b"], **options)
    with pytest.raises(ValueError, match="query encoder .*a/retriever has emb_seq_pooling cls, Emb_seq has eos"):
        build(gen, make_emb_seq("bert", hidden_size=16), query_encoder=names["a"], **options)
    with pytest.raises(ValueError, match="gen has another tokenizer than Emb_seq"):
        build(gen, names["a"], query_encoder=gen, **options)
    with pytest.raises(ValueError, match="query_encoder was given, but query_from is 'gen'"):
        build(gen, names["a"], query_encoder=names["a"])


def test_an_adapter_that_sentence_transformers_saved_is_merged(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    retriever(tmp_path, "bert", "mean", [normalize()])
    model = library.SentenceTransformer(str(tmp_path / "retriever"), device="cpu")
    model.add_adapter(peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False))
    model.save(str(tmp_path / "adapter"))
    built = build(str(tmp_path / "gen"), str(tmp_path / "adapter"), query_from="emb_seq")
    expected = expected_embeddings(tmp_path / "adapter", built, READABLE)
    torch.testing.assert_close(embeddings(built, READABLE), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, expected_embeddings(tmp_path / "retriever", built, READABLE), atol=1e-2)
    with pytest.raises(TypeError, match="emb_seq is a SentenceTransformer.* Save it, and pass the folder"):
        build(str(tmp_path / "gen"), model)
