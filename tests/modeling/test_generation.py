"""Arguments and outputs of generate(); tests/invariant checks that it is exact."""

import contextlib
from functools import partial

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinNewTokensLengthLogitsProcessor,
)

from modeling_cosup import CoSupGenerateOutput, Retrieval, RetrievalConfig
from modeling_cosup.cache_cosup import maskable_attention
from modeling_cosup.tokenization_cosup import encode_prompt, encode_texts
from support.generation import (
    QUESTIONS,
    Prefer,
    Steer,
    generate,
    left_pad,
    num_retrievals,
    question_steer,
    question_that_retrieves,
    rows_of,
)
from support.models import PASSAGES, make_model, make_tokenizer

# ------------------------------------------------------------------ output


def test_trace_points_at_the_tokens_of_the_sequences(model, inputs, index, steer):
    output = generate(model, inputs, index, steer, Prefer([model.config.ce_token_id], 5.0))
    config, width = model.config, inputs["input_ids"].shape[1]
    ends = {config.ce_token_id, config.nsp_token_id, *model.generation_config.eos_token_id}
    assert output.prompt_length == width
    assert torch.equal(output.sequences[:, :width], inputs["input_ids"])
    assert num_retrievals(output) > 5
    assert config.ce_token_id in output.sequences
    counts = output.num_generated_tokens.tolist()
    for ids, trace, count in zip(output.sequences.tolist(), output.retrievals, counts, strict=True):
        passages = [index[index.row_of(retrieval.passage_id)] for retrieval in trace]
        length = width + count + sum(len(passage["input_ids"]) + 1 for passage in passages)
        assert set(ids[length:]) <= {model.tokenizer.pad_token_id}
        for retrieval, passage in zip(trace, passages, strict=True):
            start, end = retrieval.grounded_span
            assert (retrieval.title, retrieval.text) == (passage["title"], passage["text"])
            assert ids[retrieval.position] == config.nsp_token_id
            assert ids[retrieval.position + 1 : start] == [*passage["input_ids"], config.cs_token_id]
            assert start <= end <= length
            assert not ends & set(ids[start:end])
            assert end == length or ids[end] in ends
        positions = [column for column, id in enumerate(ids[: length - 1]) if id == config.nsp_token_id]
        assert [retrieval.position for retrieval in trace] == positions


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_score_is_the_similarity_at_nsp(similarity):
    model = make_model(similarity=similarity)
    index = model.build_index(PASSAGES, show_progress_bar=False)
    input_ids = torch.tensor([question_that_retrieves(model)])
    (retrieval,) = generate(model, {"input_ids": input_ids}, index, max_retrievals=1).retrievals[0]
    scores = index.embeddings @ model(input_ids).query_embeds[0]
    assert retrieval.score == pytest.approx(scores.max().item(), abs=1e-4)
    assert index.row_of(retrieval.passage_id) == scores.argmax()
    assert retrieval.to_dict() == {**vars(retrieval)}
    assert retrieval.to_dict()["position"] == input_ids.shape[1] - 1


def test_query_embeddings_on_request(model, inputs, index, steer):
    output = generate(model, inputs, index, steer, retrieval_config=RetrievalConfig(output_query_embeds=True))
    assert num_retrievals(output) >= 2
    for trace in output.retrievals:
        for retrieval in trace:
            scores = index.embeddings @ torch.tensor(retrieval.query_embed)
            assert scores.max().item() == pytest.approx(retrieval.score, abs=1e-5)
    assert generate(model, inputs, index, steer).retrievals[1][0].query_embed is None


def test_without_return_dict_it_is_a_tensor(model, inputs, index, steer):
    expected = generate(model, inputs, index, steer)
    assert isinstance(expected, CoSupGenerateOutput)
    assert torch.equal(generate(model, inputs, index, steer, return_dict_in_generate=False), expected.sequences)
    by_position = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        retriever=index,
        max_new_tokens=20,
        logits_processor=LogitsProcessorList([steer]),
    )
    assert torch.equal(by_position, expected.sequences)


def test_decode_with_citations(model):
    tokenizer, config = model.tokenizer, model.config
    texts = ["who?", "So: ", "Amsterdam is a city.", " Rembrandt did", " and also", " Curie", " twice."]
    prompt, answer, passage, first, middle, second, tail = encode_texts(tokenizer, texts)
    nsp, cs, ce = [config.nsp_token_id], [config.cs_token_id], [config.ce_token_id]
    eos, pad = [tokenizer.eos_token_id], [tokenizer.pad_token_id]
    pieces = [prompt, answer]
    pieces += [nsp, passage, cs, first, ce, middle]
    pieces += [nsp, passage, cs, second]
    pieces += [nsp, passage, cs, tail]
    pieces += [eos, pad, pad]
    columns = [0]  # where each piece begins
    for piece in pieces:
        columns.append(columns[-1] + len(piece))

    def retrieval(i, id, title):  # the [NSP] is piece i, the grounded text piece i + 3
        passage = {"id": id, "title": title, "text": f"Text of {id}."}
        return Retrieval(0, columns[i], [passage], [0.5], (columns[i + 3], columns[i + 4]))

    trace = [retrieval(2, "a", "Title"), retrieval(8, "b", ""), retrieval(12, "a", "Title")]
    sequences = torch.tensor([sum(pieces, [])] * 2)
    output = CoSupGenerateOutput(sequences=sequences, retrievals=[trace, []], prompt_length=len(prompt))
    with_citations, without = model.decode_with_citations(output, tokenizer)
    answer_line, *passage_lines = with_citations.split("\n")
    assert answer_line == "So: Rembrandt did [1] and also Curie [2] twice. [1]"
    assert passage_lines == ["[1] Title: Text of a.", "[2] Text of b."]
    assert without == tokenizer.decode(sequences[0, len(prompt) :], skip_special_tokens=True).strip()


def test_citations_need_the_trace(model, inputs, index):
    ids = generate(model, inputs, index, max_new_tokens=1, return_dict_in_generate=False)
    with pytest.raises(TypeError, match="got a Tensor, expected what generate.*return_dict_in_generate=True"):
        model.decode_with_citations(ids)


def test_given_passages_that_share_an_id_are_cited_apart(model, inputs):
    given = [{"id": "a", "text": "One."}, {"id": "a", "text": "Two."}, {"id": 7, "text": "One."}]
    settings = RetrievalConfig(top_k=3, force_nsp_first=True, passages=[given] * 5)
    letter = Prefer(encode_texts(model.tokenizer, ["a"])[0])
    output = generate(model, inputs, None, letter, retrieval_config=settings, max_new_tokens=2)
    assert output.retrievals[0][0].passage_ids == ["a", "a", "7"]  # an integer becomes its digits, as in a corpus
    assert model.decode_with_citations(output)[0].split("\n") == ["a [1][2][3]", "[1] One.", "[2] Two.", "[3] One."]


def test_citations_of_a_prompt_that_ends_in_nsp(model, index):
    input_ids = torch.tensor([question_that_retrieves(model)])
    letter = encode_texts(model.tokenizer, ["a"])[0]
    output = generate(model, {"input_ids": input_ids}, index, Prefer(letter), max_new_tokens=3)
    (text,) = model.decode_with_citations(output, model.tokenizer)
    retrieval = output.retrievals[0][0]
    title = f"{retrieval.title}: " if retrieval.title else ""
    assert text == f"aaa [1]\n[1] {title}{retrieval.text}"


# ------------------------------------------------------------------ budgets and stops


def test_max_new_tokens_counts_decoded_tokens_of_each_row(model, inputs, index, steer):
    for budget in (1, 6):
        output = generate(model, inputs, index, steer, max_new_tokens=budget)
        assert output.num_generated_tokens.tolist() == [budget] * len(QUESTIONS)
        prompt_lengths = inputs["attention_mask"].sum(1).tolist()
        rows = rows_of(model, inputs, output)
        for ids, trace, prompt_length in zip(rows, output.retrievals, prompt_lengths, strict=True):
            passages = [index[index.row_of(retrieval.passage_id)]["input_ids"] for retrieval in trace]
            num_retrieved_tokens = sum(len(passage) + 1 for passage in passages)
            assert len(ids) == prompt_length + budget + num_retrieved_tokens
    longer = generate(model, inputs, index, steer, max_new_tokens=None, max_length=inputs["input_ids"].shape[1] + 6)
    assert torch.equal(longer.sequences, output.sequences)


def test_nsp_as_the_last_token_of_the_budget_retrieves_nothing(model, inputs, index):
    nsp = model.config.nsp_token_id
    first = {name: value[:1] for name, value in inputs.items()}
    output = generate(model, first, index, Prefer([nsp]), max_new_tokens=1)
    assert output.retrievals == [[]]
    assert output.sequences[0, -1] == nsp


def test_min_new_tokens_counts_decoded_tokens(model, inputs, index, steer):
    ends = model.generation_config.eos_token_id
    eager = Prefer(ends, 500.0)  # ends as soon as it may, unless it retrieves
    assert set(generate(model, inputs, index, steer, eager).num_generated_tokens.tolist()) <= {1, 2, 3, 4}
    output = generate(model, inputs, index, steer, eager, min_new_tokens=7)
    assert num_retrievals(output) >= 2
    assert min(output.num_generated_tokens.tolist()) == 8
    assert all(ids[-1] in ends for ids in rows_of(model, inputs, output))
    width = inputs["input_ids"].shape[1]
    by_length = generate(model, inputs, index, steer, eager, min_length=width + 7)
    assert torch.equal(by_length.sequences, output.sequences)
    processor = MinNewTokensLengthLogitsProcessor(width, 7, ends, "cpu")
    by_processor = generate(model, inputs, index, steer, eager, processor)
    assert torch.equal(by_processor.sequences, output.sequences)


def test_criteria_of_the_user_end_rows(model, inputs, index, steer):
    word = encode_texts(model.tokenizer, ["a"])[0][0]
    criteria = StoppingCriteriaList([EosTokenCriteria(eos_token_id=word)])
    output = generate(model, inputs, index, Prefer([word], 3.0), steer, stopping_criteria=criteria)
    assert any(ids[-1] == word for ids in rows_of(model, inputs, output))
    assert min(output.num_generated_tokens.tolist()) < 20

    width = inputs["input_ids"].shape[1]
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length=width + 4)])
    output = generate(model, inputs, index, steer, max_new_tokens=None, stopping_criteria=criteria)
    assert output.num_generated_tokens.tolist() == [4] * 5

    criteria = StoppingCriteriaList([MaxTimeCriteria(max_time=0.0)])
    output = generate(model, inputs, index, steer, stopping_criteria=criteria)
    assert output.num_generated_tokens.tolist() == [1] * 5


@pytest.mark.parametrize("gen", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("limit", [48, 49, 60, 70])
def test_the_end_of_the_context_ends_a_row(gen, limit):
    tokenizer = make_tokenizer()
    model = make_model(gen, tokenizer=tokenizer, gen_kwargs={"max_position_embeddings": limit})
    index = model.build_index(PASSAGES, show_progress_bar=False)
    prompts = [encode_prompt(tokenizer, question) for question in QUESTIONS]
    prompts[1].append(model.config.nsp_token_id)
    inputs = left_pad(prompts, tokenizer.pad_token_id)
    output = generate(model, inputs, index, Steer(model, retrieve_every=5), max_new_tokens=100)
    for ids in rows_of(model, inputs, output):
        if ids[-1] == model.config.nsp_token_id:
            assert len(ids) in (limit - 1, limit)  # no room for a token of a passage
        else:
            assert len(ids) == limit  # [Cs] included, if a passage was cut short
    for ids, trace in zip(output.sequences.tolist(), output.retrievals, strict=True):
        for retrieval in trace:
            start, end = retrieval.grounded_span
            passage = index[index.row_of(retrieval.passage_id)]["input_ids"]
            assert ids[start - 1] == model.config.cs_token_id and start <= end <= len(ids)
            assert ids[retrieval.position + 1 : start - 1] == passage[: start - retrieval.position - 2]


def test_a_prompt_that_fills_the_context(model, index):
    prompt = encode_prompt(model.tokenizer, "who?")
    # room for one token, but none for a passage
    for ids, room in ((prompt, 1), ([*prompt, model.config.nsp_token_id], 0)):
        model.config.get_text_config().max_position_embeddings = len(ids) + 1
        output = generate(model, {"input_ids": torch.tensor([ids])}, index, max_new_tokens=5)
        assert output.sequences.shape[1] == len(ids) + room
        assert output.retrievals == [[]]
        model.config.get_text_config().max_position_embeddings = len(ids)
        with pytest.raises(ValueError, match=f"Prompt 1 has {len(ids)} tokens, but Gen reads {len(ids)}"):
            generate(model, left_pad([prompt[:3], ids], model.tokenizer.pad_token_id), index, max_new_tokens=5)


def test_passages_for_which_there_is_no_room_are_not_cited(model, index):
    prompt = question_that_retrieves(model)
    inputs = {"input_ids": torch.tensor([prompt])}
    config = RetrievalConfig(top_k=3)
    passage_ids = (
        generate(model, inputs, index, max_new_tokens=1, retrieval_config=config).retrievals[0][0].passage_ids
    )
    lengths = [len(index[index.row_of(id)]["input_ids"]) for id in passage_ids]
    separator = len(encode_texts(model.tokenizer, ["\n"])[0])
    cases = [  # tokens that there is room for, passages of which at least one token is read
        (1, 1),
        (lengths[0] + separator, 1),
        (lengths[0] + separator + 1, 2),
        (sum(lengths) + 2 * separator, 3),
    ]
    for room, num_cited in cases:
        context_length = len(prompt) + room + 1  # and [Cs]
        model.config.get_text_config().max_position_embeddings = context_length
        output = generate(model, inputs, index, retrieval_config=config)
        assert output.retrievals[0][0].passage_ids == passage_ids[:num_cited]
        assert output.sequences.shape[1] == context_length
        assert int(output.num_generated_tokens) == 0


# ------------------------------------------------------------------ retrieval


def test_max_retrievals(model, inputs, index, steer):
    nsp = model.config.nsp_token_id
    unlimited = generate(model, inputs, index, Prefer([nsp]), max_new_tokens=5)
    assert [len(trace) for trace in unlimited.retrievals] == [4, 5, 4, 4, 4]  # the last [NSP] comes too late
    for limit in (0, 1, 2):
        output = generate(model, inputs, index, Prefer([nsp]), max_new_tokens=5, max_retrievals=limit)
        assert [len(trace) for trace in output.retrievals] == [limit] * 5
        generated = output.sequences[:, inputs["input_ids"].shape[1] :]
        expected = [limit] * 5
        expected[1] = max(limit - 1, 0)  # the first one is in the prompt
        assert (generated == nsp).sum(1).tolist() == expected


def test_cs_is_never_generated(model, inputs, index, steer):
    cs = model.config.cs_token_id
    processors = LogitsProcessorList([Prefer([cs])])
    for options in ({}, {"do_sample": True}, {"do_sample": True, "temperature": 5.0, "top_k": 0}):
        torch.manual_seed(0)
        output = generate(model, inputs, index, steer, Prefer([cs]), **options)
        assert (output.sequences == cs).sum(1).tolist() == [len(trace) for trace in output.retrievals]
        plain = model.generate(**inputs, max_new_tokens=10, logits_processor=processors, **options)
        assert cs not in plain
    config = GenerationConfig(suppress_tokens=[5])  # set by a user
    output = generate(model, inputs, index, steer, Prefer([cs]), generation_config=config)
    assert (output.sequences == cs).sum(1).tolist() == [len(trace) for trace in output.retrievals]


def test_candidates_with_num_return_sequences(model, inputs, index, steer):
    candidates = [["p0"], ["p1"], ["p2"], ["p3"], ["p4"]]
    config = RetrievalConfig(candidates=candidates, force_nsp_first=True)
    torch.manual_seed(0)
    output = generate(model, inputs, index, steer, do_sample=True, num_return_sequences=2, retrieval_config=config)
    for row, trace in enumerate(output.retrievals):
        assert {retrieval.passage_id for retrieval in trace} == {f"p{row // 2}"}
        assert trace[0].row == row
    assert len(output.retrievals) == 10


def test_an_index_smaller_than_top_k(model, inputs):
    index = model.build_index(PASSAGES[:2], show_progress_bar=False)
    config = RetrievalConfig(top_k=5, force_nsp_first=True)
    output = generate(model, inputs, index, retrieval_config=config, max_new_tokens=3)
    assert [len(trace[0].passages) for trace in output.retrievals] == [2] * 5


def test_without_retriever_it_is_ordinary_generation(model, inputs, steer):
    options = {"max_new_tokens": 20, "logits_processor": LogitsProcessorList([steer])}
    expected = model.gen.generate(**inputs, generation_config=model.generation_config, **options)
    assert model.config.nsp_token_id in expected[:, inputs["input_ids"].shape[1] :]  # [NSP] is a token like any other
    assert torch.equal(model.generate(**inputs, **options), expected)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    from_embeds = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "max_new_tokens": 20}
    expected = model.gen.generate(**from_embeds, generation_config=model.generation_config)
    assert torch.equal(model.generate(**from_embeds), expected)
    beams = model.generate(**inputs, num_beams=3, output_scores=True, return_dict_in_generate=True, **options)
    assert beams.sequences.shape[0] == len(QUESTIONS)
    assert beams.sequences_scores is not None


# ------------------------------------------------------------------ sampling


def test_sampling_is_reproducible_and_varies(model, inputs, index, steer):
    def sample(seed):
        torch.manual_seed(seed)
        return generate(model, inputs, index, steer, do_sample=True, top_k=20, temperature=0.8)

    first, second, other = sample(0), sample(0), sample(1)
    assert torch.equal(first.sequences, second.sequences)
    assert first.retrievals == second.retrievals
    assert not torch.equal(first.sequences, other.sequences)  # in shape or in content
    assert num_retrievals(first) >= 2


def test_num_return_sequences(model, inputs, index, steer):
    torch.manual_seed(0)
    output = generate(model, inputs, index, steer, do_sample=True, num_return_sequences=3)
    assert len(output.sequences) == len(output.retrievals) == len(output.num_generated_tokens) == 15
    assert torch.equal(output.sequences[:, : output.prompt_length], inputs["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(ids) for ids in output.sequences[:3].tolist()}) == 3
    assert len(model.decode_with_citations(output, model.tokenizer)) == 15


def test_the_defaults_of_the_checkpoint_are_greedy(model, inputs, index, steer):
    greedy = generate(model, inputs, index, steer, do_sample=False)
    assert torch.equal(generate(model, inputs, index, steer).sequences, greedy.sequences)
    assert not model.generation_config.do_sample
    assert model.config.cs_token_id in model.generation_config.suppress_tokens


@pytest.mark.parametrize(
    "warper", [{"top_p": 0.5}, {"top_k": 1}, {"min_p": 0.5}], ids=lambda warper: next(iter(warper))
)
@pytest.mark.parametrize(
    "settings",
    [{"max_retrievals": 1}, {"forbid_nsp": True}, {"min_score": 9.0}],
    ids=lambda settings: next(iter(settings)),
)
def test_sampling_when_nsp_is_likely_but_not_allowed(model, inputs, index, warper, settings):
    """Check that warpers choose among allowed tokens only: they must not keep `[NSP]` alone."""
    torch.manual_seed(0)
    eager = Prefer([model.config.nsp_token_id])
    config = RetrievalConfig(**settings)
    output = generate(model, inputs, index, eager, do_sample=True, retrieval_config=config, **warper)
    limit = settings.get("max_retrievals", 0)
    assert [len(trace) for trace in output.retrievals] == [limit] * 5
    assert output.num_generated_tokens.tolist() == [20] * 5


# ------------------------------------------------------------------ models


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_generate(model, inputs, index, steer, dtype):
    output = generate(model.to(dtype), inputs, index, steer)
    assert num_retrievals(output) >= 2
    assert output.num_generated_tokens.tolist() == [20] * 5


def test_under_autocast_the_index_is_searched_in_float32(model, inputs, index, steer):
    config = RetrievalConfig(force_nsp_first=True, output_query_embeds=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = generate(model, inputs, index, steer, retrieval_config=config)
    assert num_retrievals(output) >= 5
    for trace in output.retrievals:
        for retrieval in trace:
            scores = index.embeddings @ torch.tensor(retrieval.query_embed)
            assert scores.max().item() == pytest.approx(retrieval.score, abs=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's
def test_a_model_with_adapters_generates(model, inputs, index, steer):
    peft = pytest.importorskip("peft")
    expected = generate(model, inputs, index, steer)
    config = peft.LoraConfig(target_modules=r"gen\..*q_proj", r=2, task_type="CAUSAL_LM")  # starts as the identity
    output = generate(peft.get_peft_model(model, config), inputs, index, steer, max_retrievals=9)
    assert torch.equal(output.sequences, expected.sequences)
    assert output.retrievals == expected.retrievals


# ------------------------------------------------------------------ a static cache, a captured step


def test_a_static_cache_gives_the_same_tokens(model, inputs, index, steer):
    steer.end_every = 11
    expected = generate(model, inputs, index, steer)
    in_config = GenerationConfig(cache_implementation="static", pad_token_id=model.tokenizer.pad_token_id)
    for options in ({"cache_implementation": "static"}, {"generation_config": in_config}):
        output = generate(model, inputs, index, steer, **options)
        assert torch.equal(output.sequences, expected.sequences)
        assert model._static_row_cache.static
        for trace, expected_trace in zip(output.retrievals, expected.retrievals, strict=True):
            passage_ids = [retrieval.passage_id for retrieval in trace]
            assert passage_ids == [retrieval.passage_id for retrieval in expected_trace]


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_the_models_own_config_may_name_a_cache(model, inputs, index, steer, monkeypatch, kind):
    expected = generate(model, inputs, index, steer)
    monkeypatch.setattr(model.generation_config, "cache_implementation", kind)
    assert torch.equal(generate(model, inputs, index, steer).sequences, expected.sequences)
    config = GenerationConfig(cache_implementation="dynamic", pad_token_id=model.tokenizer.pad_token_id)
    output = generate(model, inputs, index, steer, generation_config=config)
    assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.parametrize("mode", [partial(torch.autocast, "cpu", torch.bfloat16), torch.inference_mode])
def test_a_static_cache_serves_calls_within_a_mode_and_without(model, inputs, index, mode):
    for _ in range(2):
        with mode():
            generate(model, inputs, index, cache_implementation="static")
        generate(model, inputs, index, cache_implementation="static")


def test_a_static_cache_can_be_released(model, inputs, index):
    generate(model, inputs, index, cache_implementation="static")
    model.release_static_cache()
    assert model._static_row_cache is None


def test_a_static_cache_is_used_again(model, inputs, index, steer):
    first = generate(model, inputs, index, steer, cache_implementation="static")
    cache = model._static_row_cache
    second = generate(model, inputs, index, steer, cache_implementation="static")
    assert model._static_row_cache is cache
    assert torch.equal(first.sequences, second.sequences)
    with pytest.raises(ValueError, match="does not hold 1 of 1 ids"):
        settings = RetrievalConfig(candidates=[["unknown"]] * 5)
        generate(model, inputs, index, steer, cache_implementation="static", retrieval_config=settings)
    assert model._static_row_cache is cache  # also after a call that was refused
    in_double = generate(model.double(), inputs, index, steer, cache_implementation="static")
    assert model._static_row_cache is not cache
    assert in_double.sequences.shape[0] == 5


def test_a_call_does_not_write_into_the_static_cache_of_another(model, inputs, index, monkeypatch):
    """The second call begins and ends while the first one searches."""
    expected = generate(model, inputs, index, question_steer(model))
    search, others = index.search, []

    def search_during_another_call(*args, **kwargs):
        if not others:
            others.append(None)
            others[0] = generate(model, inputs, index, question_steer(model), cache_implementation="static")
        return search(*args, **kwargs)

    monkeypatch.setattr(index, "search", search_during_another_call)
    output = generate(model, inputs, index, question_steer(model), cache_implementation="static")
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(others[0].sequences, expected.sequences)


def test_the_last_of_several_calls_restores_gens_own_attention(model, monkeypatch):
    config = model.gen.config
    monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    with contextlib.ExitStack() as second:
        with maskable_attention(model.gen):
            second.enter_context(maskable_attention(model.gen))
            assert config._attn_implementation == "sdpa"
        assert config._attn_implementation == "sdpa"
    assert config._attn_implementation == "flash_attention_2"


@pytest.mark.slow
def test_a_captured_step_gives_the_same_tokens(model, inputs, index, steer):
    compiled = CompileConfig(mode="default")
    compiled._compile_all_devices = True  # transformers compiles on accelerators only
    steer.end_every = 11
    expected = generate(model, inputs, index, steer)
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        output = generate(model, inputs, index, steer, cache_implementation="static", compile_config=compiled)
        assert torch.equal(output.sequences, expected.sequences)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in (1, 2)  # a second one if the cache had to grow
    assert not torch._dynamo.utils.counters["graph_break"]
