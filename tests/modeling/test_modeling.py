"""Building a CoSup model from two models, its configuration, and the two losses in one forward."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from modeling_cosup import CoSupConfig, CoSupForCausalLM, configuration_cosup
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, encode_texts
from support.models import PASSAGES, TEXTS, make_emb_seq, make_gen, make_model, make_tokenizer

ARCHITECTURES_OF_GEN = ["llama", "gpt2", "mistral", "qwen3"]


def batch(model, passages=PASSAGES[:4], rows=3):
    """Return rows with 2, 1 and 0 [NSP], padded on the right, four passages, and the positives of the queries."""
    nsp = model.config.nsp_token_id
    texts = encode_texts(model.tokenizer, TEXTS[:3])
    texts[0][5:5] = [nsp]
    texts[0].append(nsp)
    texts[1][3:3] = [nsp]
    input_ids, attention_mask = pad_rows(texts)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, ::3] = -100
    encoded = encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config)
    passage_input_ids, passage_attention_mask = pad_rows(encoded)
    return {
        "input_ids": input_ids[:rows],
        "attention_mask": attention_mask[:rows],
        "labels": labels[:rows],
        "passage_input_ids": passage_input_ids,
        "passage_attention_mask": passage_attention_mask,
        "passage_labels": torch.tensor([2, 0, 3]),
    }


def reference_losses(model, inputs):
    """Compute both losses and embeddings with the sub-models alone, unpadded, one row at a time."""
    ntp, count, queries, passages = 0.0, 0, [], []
    for ids, mask, labels in zip(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["labels"], strict=True):
        ids, labels = ids[mask], labels[mask]
        output = model.gen(ids[None], output_hidden_states=True)
        ntp = ntp + F.cross_entropy(output.logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
        queries += list(output.hidden_states[-1][0][ids == model.config.nsp_token_id])
    for ids, mask in zip(inputs["passage_input_ids"], inputs["passage_attention_mask"].bool(), strict=True):
        embedding = model.emb_seq(ids[mask][None]).last_hidden_state[0, -1]
        if model.emb_head is not None:
            embedding = model.emb_head.weight @ embedding
        passages.append(embedding)
    queries, passages = torch.stack(queries), torch.stack(passages)
    if model.config.similarity == "cosine":
        queries, passages = F.normalize(queries, dim=-1), F.normalize(passages, dim=-1)
    scores = queries @ passages.T / model.config.temperature
    nsp = F.cross_entropy(scores, inputs["passage_labels"], ignore_index=-100)
    return ntp / count, nsp, queries, passages


# ------------------------------------------------------------------ forward


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize(
    ("gen", "emb_seq", "width"),
    [("llama", "llama", 32), ("gpt2", "mistral", 48), ("mistral", "gpt2", 16), ("qwen3", "bert", 32)],
)
def test_losses_embeddings_and_gradients_equal_the_reference(gen, emb_seq, width, similarity):
    model = make_model(gen, emb_seq, similarity=similarity, emb_seq_kwargs={"hidden_size": width})
    inputs = batch(model)
    output = model(**inputs)
    ntp, nsp, queries, passages = reference_losses(model, inputs)
    torch.testing.assert_close(output.query_embeds, queries, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.passage_embeds, passages, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.ntp_loss, ntp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.nsp_loss, nsp, rtol=1e-4, atol=1e-4)
    assert output.loss == output.ntp_loss + model.config.nsp_loss_weight * output.nsp_loss

    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(output.loss, parameters, allow_unused=True)
    expected = torch.autograd.grad(ntp + model.config.nsp_loss_weight * nsp, parameters, allow_unused=True)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert gradient is not None
        if reference is None:
            reference = torch.zeros_like(gradient)
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-4)


def test_weight_and_temperature_follow_the_similarity_unless_given():
    def settings(**kwargs):
        config = CoSupConfig(**kwargs)
        return config.similarity, config.temperature, config.nsp_loss_weight

    assert settings() == ("cosine", 0.05, 1.0)
    assert settings(similarity="dot") == ("dot", 1.0, 0.01)  # the paper's
    assert settings(similarity="dot", nsp_loss_weight=0.5, temperature=2.0) == ("dot", 2.0, 0.5)
    assert settings(nsp_loss_weight=0.0) == ("cosine", 0.05, 0.0)


BAD_SETTINGS = pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"similarity": "l2"}, "similarity is 'l2', expected one of 'cosine', 'dot'"),
        ({"query_from": "passage"}, "query_from is 'passage'"),
        ({"emb_seq_pooling": "max"}, "emb_seq_pooling is 'max', expected one of 'eos', 'lasttoken', 'mean', 'cls'"),
        ({"temperature": 0.0}, "temperature is 0.0, expected a finite number above 0"),
        ({"temperature": float("inf")}, "temperature is inf, expected a finite number above 0"),
        ({"temperature": "0.05"}, "temperature is '0.05', expected a finite number above 0"),
        ({"nsp_loss_weight": -1}, "nsp_loss_weight is -1, expected a finite number of 0 or more"),
        ({"nsp_loss_weight": float("nan")}, "nsp_loss_weight is nan, expected a finite number of 0 or more"),
        ({"max_passage_length": 0}, "max_passage_length is 0, expected an integer of 1 or more"),
        ({"max_passage_length": True}, "max_passage_length is True, expected an integer of 1 or more"),
        ({"truncate_dim": 0}, "truncate_dim is 0, expected an integer of 1 or more"),
        ({"passage_template": "{title}"}, "expected a template that holds {text}"),
        ({"passage_template": "{titel}: {text}"}, "is '{titel}: {text}', expected a template that holds {text},"),
        ({"emb_seq_add_eos_token": False}, "use 'lasttoken' for a passage's last token"),
        ({"query_prompt": "query: "}, "query_prompt is 'query: ', but Gen makes the queries"),
        ({"emb_head_size": 0}, "emb_head_size is 0, expected an integer of 1 or more"),
        ({"emb_head_size": 8}, "emb_head_size is 8, but Gen makes the queries: expected its width, "),
    ],
)


@BAD_SETTINGS
def test_a_bad_setting_is_named(bad, message):
    with pytest.raises(ValueError) as error:
        CoSupConfig(**bad)
    assert message in str(error.value)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(folder)
    return folder


@BAD_SETTINGS
def test_a_bad_setting_of_a_checkpoint_is_named_when_it_is_loaded_and_before_it_is_saved(
    checkpoint, tmp_path, bad, message
):
    with pytest.raises(ValueError, match=re.escape(message)):
        CoSupForCausalLM.from_pretrained(checkpoint, **bad)
    model = CoSupForCausalLM.from_pretrained(checkpoint)
    for name, value in bad.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_passages_that_fill_all_positions_are_refused_when_bos_and_eos_do_not_fit(checkpoint, tmp_path):
    model = CoSupForCausalLM.from_pretrained(checkpoint, max_passage_length=511)
    with pytest.raises(ValueError, match="it may be 510 at most"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it may be 512 at most"):
        CoSupForCausalLM.from_pretrained(checkpoint, max_passage_length=513)


@pytest.mark.parametrize(
    ("changed", "warns"),
    [
        ({"similarity": "dot"}, True),
        ({"similarity": "dot", "temperature": 1.0}, True),  # λ is of the cosine
        ({"similarity": "dot", "temperature": 1.0, "nsp_loss_weight": 0.01}, False),
        ({"similarity": "cosine"}, False),
    ],
)
def test_another_similarity_with_the_temperature_of_the_checkpoint_is_told(checkpoint, monkeypatch, changed, warns):
    messages = []
    monkeypatch.setattr(configuration_cosup.logger, "warning", messages.append)
    CoSupForCausalLM.from_pretrained(checkpoint, **changed)
    assert [("keeps the temperature" in message) for message in messages] == [True] * warns


def test_config_survives_saving(tmp_path):
    model = make_model(
        "mistral",
        "bert",
        emb_seq_kwargs={"hidden_size": 16},
        similarity="dot",
        temperature=3.0,
        passage_template="{text}",
        nsp_token="[Ret]",
    )
    model.config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
    assert config.gen_config.sliding_window == 8
    assert config.emb_seq_config.model_type == "bert"
    assert config.get_text_config() is config.gen_config
    assert config.temperature == 3.0
    assert config.nsp_token_id == model.config.nsp_token_id
    assert config.embedding_size == 32
    assert config.needs_emb_head is True


def test_an_emb_head_that_the_config_sets():
    weight = torch.randn(8, 16)
    model = make_model(
        emb_seq_kwargs={"hidden_size": 16}, query_from="emb_seq", emb_head_size=8, emb_head=weight, similarity="dot"
    )
    assert torch.equal(model.emb_head.weight, weight)
    assert model.config.embedding_size == 8
    ids = torch.tensor([[5, 6, model.config.nsp_token_id]])
    expected = model.emb_seq(ids).last_hidden_state[:, -1] @ weight.T  # of a query and of a passage alike
    torch.testing.assert_close(model.encode_queries(ids, torch.ones_like(ids)), expected)
    torch.testing.assert_close(model.encode_passages(ids), expected)
    square = make_model(emb_head_size=32)
    assert square.emb_head.weight.shape == (32, 32)
    assert make_model().emb_head is None


def test_passages_may_fill_the_positions_of_an_emb_seq_that_reads_no_eos():
    settings = {"emb_seq_pooling": "lasttoken", "max_passage_length": 511}
    make_model(emb_seq_add_eos_token=False, **settings)
    message = "max_passage_length=511, BOS and EOS do not fit into Emb_seq's 512 positions: it may be 510 at most"
    with pytest.raises(ValueError, match=message):
        make_model(**settings)


def test_logits_are_computed_only_on_request():
    model = make_model()
    inputs = batch(model)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model.gen(**text).logits
    assert model(**inputs).logits is None
    torch.testing.assert_close(model(**inputs, return_logits=True).logits, expected)
    torch.testing.assert_close(model(**text).logits, expected)
    assert model(**text, return_logits=False).logits is None
    torch.testing.assert_close(model(**text, logits_to_keep=1).logits, expected[:, -1:])
    torch.testing.assert_close(model(**text, logits_to_keep=torch.tensor([0, 4])).logits, expected[:, [0, 4]])


def test_num_items_in_batch_replaces_the_count():
    model = make_model()
    inputs = batch(model)
    count = int((inputs["labels"][:, 1:] != -100).sum())
    mean = model(**inputs)
    for total in (50, torch.tensor(50)):
        scaled = model(**inputs, num_items_in_batch=total)
        torch.testing.assert_close(scaled.ntp_loss, mean.ntp_loss * count / 50)
        assert scaled.nsp_loss == mean.nsp_loss


def test_nsp_loss_can_be_left_to_the_caller():
    model = make_model()
    inputs = batch(model)
    expected, output = model(**inputs), model(**inputs, compute_nsp_loss=False)
    assert output.nsp_loss is None
    assert output.loss == output.ntp_loss == expected.ntp_loss
    assert torch.equal(output.query_embeds, expected.query_embeds)
    assert torch.equal(output.passage_embeds, expected.passage_embeds)
    del inputs["labels"]  # the NSP loss alone
    output = model(**inputs)
    assert output.ntp_loss is None
    assert output.loss == model.config.nsp_loss_weight * expected.nsp_loss


def test_queries_without_a_positive_do_not_count():
    model = make_model()
    inputs = batch(model)

    def nsp_loss(*passage_labels):
        return model(**{**inputs, "passage_labels": torch.tensor(passage_labels)}).nsp_loss

    first, second = nsp_loss(2, -100, -100), nsp_loss(-100, 0, -100)
    torch.testing.assert_close(nsp_loss(2, 0, -100), (first + second) / 2)
    assert nsp_loss(-100, -100, -100) == 0


@pytest.mark.parametrize("count", [0, 2, 4])
@pytest.mark.parametrize("compute_nsp_loss", [True, False])
def test_wrong_number_of_passage_labels(count, compute_nsp_loss):
    model = make_model()
    inputs = {**batch(model), "passage_labels": torch.zeros(count, dtype=torch.long)}
    message = rf"passage_labels has {count} entries, expected one for each of the 3 \[NSP\]"
    with pytest.raises(ValueError, match=message):
        model(**inputs, compute_nsp_loss=compute_nsp_loss)


@pytest.mark.parametrize("query_from", ["gen", "emb_seq"])
def test_a_batch_without_nsp(query_from):
    model = make_model(query_from=query_from)
    inputs = batch(model)
    inputs["input_ids"][inputs["input_ids"] == model.config.nsp_token_id] = 9
    nothing = torch.zeros(0, dtype=torch.long)
    output = model(**{**inputs, "passage_labels": nothing})
    assert output.query_embeds.shape == (0, 32)
    assert output.nsp_loss is None
    assert output.loss == output.ntp_loss
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(p.grad.any() for p in model.emb_seq.parameters())
    assert any(p.grad.any() for p in model.gen.parameters())
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    assert model(**text).loss == output.ntp_loss  # no passages at all


def test_a_single_passage_is_no_loss_of_zero():
    """It has no negative, so there is nothing to be right about; the loss still reaches every part, as DDP needs."""
    model = make_model()
    inputs = {**batch(model, PASSAGES[:1]), "passage_labels": torch.zeros(3, dtype=torch.long)}
    output = model(**inputs)
    assert output.nsp_loss is None
    assert output.loss == output.ntp_loss
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("width", [0, 7])
def test_queries_without_any_passage(width):
    model = make_model()
    nothing = torch.zeros(0, width, dtype=torch.long)
    inputs = {
        **batch(model),
        "passage_input_ids": nothing,
        "passage_attention_mask": nothing,
        "passage_labels": torch.full((3,), -100),
    }
    output = model(**inputs)
    assert output.passage_embeds.shape == (0, 32)
    assert output.nsp_loss is None
    assert output.loss == output.ntp_loss
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_no_labels_at_all_gives_zero_losses_with_gradients():
    model = make_model()
    inputs = batch(model)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    inputs["passage_labels"] = torch.full((3,), -100)
    output = model(**inputs)
    assert output.loss == output.ntp_loss == output.nsp_loss == 0
    output.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_passages_alone():
    model = make_model()
    inputs = batch(model)
    passages = {name: inputs[name] for name in ("passage_input_ids", "passage_attention_mask")}
    output = model(**passages)
    assert torch.equal(output.passage_embeds, model(**inputs).passage_embeds)
    assert output.loss is None
    assert output.logits is None


@pytest.mark.parametrize("query_from", ["gen", "emb_seq"])
@pytest.mark.parametrize("has_nsp", [True, False])
def test_another_token_may_be_nsp_in_a_call(query_from, has_nsp):
    """Also for a model whose config names none."""
    model = make_model(query_from=query_from)
    ids = torch.tensor([[5, 6, model.config.nsp_token_id, 7, 8]])
    expected = model(ids).query_embeds
    renamed = ids.clone()
    renamed[ids == model.config.nsp_token_id] = 9
    if not has_nsp:
        model.config.nsp_token_id = None
        assert model(ids).query_embeds is None
    found = model(renamed, nsp_token_id=9).query_embeds
    assert found.shape == (1, 32)
    torch.testing.assert_close(found, model(renamed, nsp_positions=torch.tensor([2]), nsp_token_id=9).query_embeds)
    if query_from == "gen":
        assert not torch.allclose(found, expected)  # read at another token


@pytest.mark.parametrize("query_from", ["emb_seq", "query_encoder"])
def test_queries_of_another_encoder_read_everything_up_to_nsp(query_from):
    encoder = make_emb_seq("gpt2", seed=7) if query_from == "query_encoder" else None
    model = make_model(query_from=query_from, query_encoder=encoder, similarity="dot")
    inputs = batch(model)
    expected = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        ids = ids[mask]
        for position in (ids == model.config.nsp_token_id).nonzero()[:, 0].tolist():
            expected.append((encoder or model.emb_seq)(ids[None, : position + 1]).last_hidden_state[0, -1])
    torch.testing.assert_close(model(**inputs).query_embeds, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_autocast_keeps_losses_and_embeddings_in_float32():
    model = make_model(similarity="dot")
    inputs = batch(model)
    expected = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
    for name in ("loss", "ntp_loss", "nsp_loss", "query_embeds", "passage_embeds"):
        assert output[name].dtype == torch.float32
    torch.testing.assert_close(output.ntp_loss, expected.ntp_loss, rtol=0.05, atol=0)


def test_gradient_checkpointing_changes_no_gradient():
    model = make_model(
        "llama", "gpt2", emb_seq_kwargs={"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    ).train()
    inputs = batch(model)
    model(**inputs).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # renamed in transformers
    for part in (model.gen, model.emb_seq):
        assert any(getattr(module, "gradient_checkpointing", False) for module in part.modules())
    model(**inputs).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ from_gen_and_emb_seq


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gen", ARCHITECTURES_OF_GEN)
def test_new_rows_start_at_the_mean_and_nothing_else_changes(gen, tied):
    tokenizer = make_tokenizer()
    old = len(tokenizer)
    gen = make_gen(gen, vocab_size=old, tie_word_embeddings=tied)
    emb_seq = make_emb_seq("bert", vocab_size=old)
    before = {name: p.detach().clone() for model in (gen, emb_seq) for name, p in model.state_dict().items()}
    model = CoSupForCausalLM.from_gen_and_emb_seq(gen, emb_seq, tokenizer=tokenizer)
    assert len(tokenizer) == old + 3
    assert [model.config.nsp_token_id, model.config.cs_token_id, model.config.ce_token_id] == [old, old + 1, old + 2]
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    for embeddings in (inputs, outputs, model.emb_seq.get_input_embeddings()):
        weight = embeddings.weight
        assert weight.shape[0] == old + 3
        torch.testing.assert_close(weight[old:], weight[:old].mean(0).expand(3, -1), rtol=1e-5, atol=1e-6)
    assert (inputs.weight is outputs.weight) == tied == model.config.tie_word_embeddings
    for config in (model.config.get_text_config(), model.gen.config, model.config.emb_seq_config):
        assert config.vocab_size == old + 3
    for part in (model.gen, model.emb_seq):
        for name, parameter in part.state_dict().items():
            if parameter.shape[:1] == (old + 3,):
                parameter = parameter[:old]
            assert torch.equal(parameter, before[name]), name


def test_spare_embedding_rows_are_used_and_kept():
    tokenizer = make_tokenizer()
    old = len(tokenizer)
    gen = make_gen(vocab_size=400)
    before = gen.get_input_embeddings().weight.detach().clone()
    model = CoSupForCausalLM.from_gen_and_emb_seq(gen, tokenizer=tokenizer)
    weight = model.get_input_embeddings().weight
    assert weight.shape == before.shape
    assert torch.equal(weight[old + 3 :], before[old + 3 :])
    assert torch.equal(weight[:old], before[:old])
    torch.testing.assert_close(weight[old : old + 3], before[:old].mean(0).expand(3, -1))


def test_a_tokenizer_that_has_the_control_tokens_keeps_their_rows():
    first = make_model()
    second = CoSupForCausalLM.from_gen_and_emb_seq(copy.deepcopy(first.gen), tokenizer=first.tokenizer)
    assert torch.equal(second.get_input_embeddings().weight, first.get_input_embeddings().weight)
    assert second.config.nsp_token_id == first.config.nsp_token_id


@pytest.mark.parametrize("tie_emb_seq", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gen", ARCHITECTURES_OF_GEN)
def test_a_query_at_nsp_that_starts_as_eos_is_the_passage_at_eos(gen, tied, tie_emb_seq):
    """The query embedding of BOS + text + [NSP], and the embedding of BOS + text + EOS, before any training."""
    options = {"tokenizer": make_tokenizer(), "nsp_init": "eos", "tie_emb_seq": tie_emb_seq}
    model = CoSupForCausalLM.from_gen_and_emb_seq(make_gen(gen, tie_word_embeddings=tied), **options)
    ids = encode_passages_for_emb_seq(model.tokenizer, PASSAGES[:1], model.config)[0]
    assert (ids[0], ids[-1]) == (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id)
    query = [*ids[:-1], model.config.nsp_token_id]
    with torch.no_grad():
        output = model(torch.tensor([query]))
        torch.testing.assert_close(output.query_embeds, model.encode_passages(torch.tensor([ids])), rtol=0, atol=1e-5)
        wrong = model.encode_passages(torch.tensor([[*ids[:-1], model.config.cs_token_id]]))
        assert (output.query_embeds - wrong).abs().max() > 1e-3
    is_as_likely = torch.equal(output.logits[..., model.config.nsp_token_id], output.logits[..., ids[-1]])
    assert is_as_likely == tied


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_input_rows_of_nsp_start_as_eos(tied):
    """In Gen, Emb_seq and the query encoder, each with the EOS or SEP of its own tokenizer."""
    tokenizer = make_tokenizer()
    emb_seq_tokenizer = make_tokenizer(300, eos=None)
    emb_seq_tokenizer.add_special_tokens({"sep_token": "[SEP]"})
    parts = {"gen": make_gen(tie_word_embeddings=tied), "emb_seq": make_emb_seq("bert")}
    parts["query_encoder"] = make_emb_seq("bert", seed=2)
    tokenizers = {"tokenizer": tokenizer, "emb_seq_tokenizer": emb_seq_tokenizer}
    options = {"query_from": "query_encoder"}
    mean = CoSupForCausalLM.from_gen_and_emb_seq(**copy.deepcopy(parts | tokenizers), **options)
    eos = CoSupForCausalLM.from_gen_and_emb_seq(**parts, **tokenizers, nsp_init="eos", **options)
    expected = mean.state_dict()
    nsp, end = eos.config.nsp_token_id, tokenizer.eos_token_id
    emb_seq_nsp, emb_seq_end = emb_seq_tokenizer.convert_tokens_to_ids(["[NSP]", "[SEP]"])
    assert emb_seq_nsp != nsp
    for name, part, row, source in (
        ("gen.model.embed_tokens.weight", "gen", nsp, end),
        ("emb_seq.embeddings.word_embeddings.weight", "emb_seq", emb_seq_nsp, emb_seq_end),
        ("query_encoder.embeddings.word_embeddings.weight", "query_encoder", emb_seq_nsp, emb_seq_end),
    ):
        weight = getattr(eos, part).get_input_embeddings().weight
        assert torch.equal(weight[row], weight[source]) and not torch.equal(weight[row], expected[name][row])
        expected[name][row] = expected[name][source]
    if tied:
        expected["gen.lm_head.weight"] = expected["gen.model.embed_tokens.weight"]
    for name, weight in eos.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_a_trained_row_of_nsp_does_not_start_again():
    first = make_model()
    options = {"tokenizer": first.tokenizer, "nsp_init": "eos"}
    second = CoSupForCausalLM.from_gen_and_emb_seq(copy.deepcopy(first.gen), **options)
    assert torch.equal(second.get_input_embeddings().weight, first.get_input_embeddings().weight)


def test_a_start_of_nsp_that_is_unknown_or_impossible_is_refused():
    with pytest.raises(ValueError, match="nsp_init is 'EOS', expected one of 'mean', 'eos'"):
        CoSupForCausalLM.from_gen_and_emb_seq("no/such-model", nsp_init="EOS")
    tokenizer = make_tokenizer(eos=None)
    size = len(tokenizer)
    with pytest.raises(ValueError, match="has neither an EOS nor a SEP token"):
        make_model(tokenizer=tokenizer, nsp_init="eos")
    assert len(tokenizer) == size


@pytest.mark.parametrize("gen", ARCHITECTURES_OF_GEN)
@pytest.mark.parametrize("given", [False, True])
def test_without_an_emb_seq_two_towers_start_as_copies_of_gen(gen, given):
    gen = make_gen(gen)
    emb_seq = gen if given else None
    model = CoSupForCausalLM.from_gen_and_emb_seq(gen, emb_seq, tokenizer=make_tokenizer(), tie_emb_seq=False)
    weights = dict(model.gen.base_model.named_parameters())
    assert weights.keys() == dict(model.emb_seq.named_parameters()).keys()
    assert model.emb_head is None
    for name, copied in model.emb_seq.named_parameters():
        assert torch.equal(copied, weights[name])
        assert copied.data_ptr() != weights[name].data_ptr()
    assert model.emb_seq_tokenizer is model.tokenizer


def test_names_paths_and_models_give_the_same(tmp_path):
    gen, emb_seq = str(tmp_path / "gen"), str(tmp_path / "emb_seq")
    tokenizer = make_tokenizer()
    for folder, part in ((gen, make_gen("gpt2")), (emb_seq, make_emb_seq("bert", hidden_size=16))):
        part.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    build = CoSupForCausalLM.from_gen_and_emb_seq
    gen_model, emb_seq_model = AutoModelForCausalLM.from_pretrained(gen), AutoModel.from_pretrained(emb_seq)
    models = [
        build(gen, emb_seq, emb_seq_pooling="cls"),
        build(gen_model, emb_seq, tokenizer=gen, emb_seq_pooling="cls"),
        build(gen, emb_seq_model, AutoTokenizer.from_pretrained(gen), emb_seq_pooling="cls"),
    ]
    state = models[0].state_dict()
    for model in models:
        assert model.config.emb_seq_pooling == "cls"
        assert model.emb_head.weight.shape == (32, 16)
        assert model.emb_seq_tokenizer is model.tokenizer
        for name, parameter in model.state_dict().items():
            assert name == "emb_head.weight" or torch.equal(parameter, state[name]), name
    half = build(gen, emb_seq, model_kwargs={"dtype": "bfloat16"})
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.config.dtype == torch.bfloat16
    alone = build(gen)
    assert torch.equal(alone.emb_seq.get_input_embeddings().weight, alone.get_input_embeddings().weight)


def test_a_model_without_a_tokenizer_raises():
    with pytest.raises(ValueError, match="pass its tokenizer as `tokenizer=`"):
        CoSupForCausalLM.from_gen_and_emb_seq(make_gen())


def test_control_tokens_by_other_names():
    model = make_model(nsp_token="[Ret]", ce_token="[Ce]")
    control_ids = [model.config.nsp_token_id, model.config.cs_token_id, model.config.ce_token_id]
    assert model.tokenizer.convert_tokens_to_ids(["[Ret]", "[Cs]", "[Ce]"]) == control_ids
    assert "[NSP]" not in model.tokenizer.get_vocab()


def test_two_tokenizers_are_kept_apart():
    tokenizer = make_tokenizer()
    emb_seq_tokenizer = make_tokenizer(vocab_size=300, bos="<cls>", eos="<sep>", texts=["another corpus"])
    model = make_model(tokenizer=tokenizer, emb_seq_tokenizer=emb_seq_tokenizer, emb_seq_kwargs={"vocab_size": 260})
    assert model.tokenizer is tokenizer
    assert model.emb_seq_tokenizer is emb_seq_tokenizer
    assert {"[NSP]", "[Cs]", "[CE]"} <= emb_seq_tokenizer.get_vocab().keys()
    assert model.emb_seq.get_input_embeddings().weight.shape[0] == max(260, len(emb_seq_tokenizer))
    same = make_model(tokenizer=make_tokenizer(), emb_seq_tokenizer=make_tokenizer())
    assert same.emb_seq_tokenizer is same.tokenizer


def test_modes_and_handed_in_configs_stay():
    gen, emb_seq = make_gen().train(), make_emb_seq("gpt2").train()
    model = CoSupForCausalLM.from_gen_and_emb_seq(gen, emb_seq, tokenizer=make_tokenizer())
    assert model.training and model.emb_seq.training
    assert model.gen is gen and model.emb_seq is emb_seq
    assert not make_model().training


def test_an_architecture_with_another_head_raises():
    """Gemma 2 and RecurrentGemma cap their logits, which is known; a model that scales them otherwise is refused."""
    input_ids = torch.tensor([[5, 6, 7]])
    for model in (make_gen("gemma2", final_logit_softcapping=5.0), make_gen("recurrent_gemma", logits_soft_cap=0.1)):
        built = CoSupForCausalLM.from_gen_and_emb_seq(model, tokenizer=make_tokenizer())
        torch.testing.assert_close(built(input_ids).logits, model(input_ids).logits, rtol=1e-4, atol=1e-5)

    unknown = make_gen()
    read = unknown.forward

    def with_doubled_logits(*args, **kwargs):
        output = read(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    unknown.forward = with_doubled_logits
    with pytest.raises(ValueError, match="LlamaForCausalLM does more after its LM head"):
        CoSupForCausalLM.from_gen_and_emb_seq(unknown, tokenizer=make_tokenizer())


def test_resize_token_embeddings_keeps_the_configs_in_step():
    model = make_model()
    model.resize_token_embeddings(410)
    assert model.get_input_embeddings().weight.shape[0] == 410
    assert model.config.get_text_config().vocab_size == 410
    assert model.gen.config.vocab_size == 410
    assert model(torch.tensor([[409]])).logits.shape[-1] == 410
    assert model.emb_seq.get_input_embeddings().weight.shape[0] == 400


@pytest.mark.parametrize("shared", [True, False])
def test_new_tokens_of_a_tokenizer_get_rows_where_it_is_read_and_a_new_hash(tmp_path, shared):
    other = None if shared else make_tokenizer(texts=["another corpus"])
    make_model(emb_seq_tokenizer=other).save_pretrained(tmp_path)
    model = CoSupForCausalLM.from_pretrained(tmp_path)
    index = model.build_index(PASSAGES, show_progress_bar=False)
    model = CoSupForCausalLM.from_pretrained(tmp_path)
    model.tokenizer.add_tokens([f"new{i}" for i in range(40)])
    model.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
    size = len(model.tokenizer) if shared else 400
    assert len(model.tokenizer) > 400
    assert model.emb_seq.get_input_embeddings().weight.shape[0] == size
    assert model.config.emb_seq_config.vocab_size == size
    model.build_index([{"id": "1", "text": "new0 new39"}], show_progress_bar=False)
    with pytest.raises(ValueError, match="  tokenizer: the index has") as error:
        index.check_model(model)
    assert ("  emb_seq_tokenizer: the index has" in str(error.value)) == shared
    model.save_pretrained(tmp_path / "saved")
    loaded = CoSupForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.tokenizer is loaded.emb_seq_tokenizer or not shared
    assert loaded.fingerprint() == model.fingerprint()
    loaded.config.fingerprint = None  # hash it all anew
    assert loaded.fingerprint() == model.fingerprint()


def test_saved_and_loaded_it_is_the_same_model(tmp_path):
    model = make_model("gpt2", "llama", emb_seq_kwargs={"hidden_size": 48})
    inputs = batch(model)
    model.save_pretrained(tmp_path)
    for loaded in (
        CoSupForCausalLM.from_pretrained(tmp_path),
        AutoModel.from_pretrained(str(tmp_path)),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert not loaded.training
        assert torch.equal(loaded(**inputs).loss, model(**inputs).loss)
        assert loaded.fingerprint() == model.fingerprint()
        assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
        assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
        assert loaded.tokenizer.chat_template == model.tokenizer.chat_template
