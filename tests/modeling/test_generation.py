"""What generate() takes and returns; tests/invariant hold that it is exact."""

import threading

import pytest
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import (
    BaseStreamer,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinNewTokensLengthLogitsProcessor,
)

from modeling_cosup import CoSupGenerateOutput, Retrieval, RetrievalConfig, RetrievalError
from modeling_cosup.tokenization_cosup import encode_prompt, encode_texts
from support.generation import Steer, left_pad, real_tokens
from support.models import PASSAGES, make_gen, make_model, make_tokenizer

QUESTIONS = ["who?", "who painted the Night Watch?", "Curie", "when was it finished; in Amsterdam", "not this one!"]


class Prefer(LogitsProcessor):
    """Adds to the scores of some tokens, at every step."""

    def __init__(self, ids, bonus=1000.0):
        self.ids = ids
        self.bonus = bonus

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.ids] += self.bonus
        return scores


@pytest.fixture
def index(model):
    return model.build_index(PASSAGES, show_progress_bar=False)


@pytest.fixture
def inputs(model):
    prompts = [encode_prompt(model.tokenizer, question) for question in QUESTIONS]
    prompts[1].append(model.config.nsp_token_id)
    return left_pad(prompts, model.tokenizer.pad_token_id)


@pytest.fixture
def steer(model):
    return Steer(model, retrieve_every=7, quiet_id=model.tokenizer("!")["input_ids"][0])


def generate(model, inputs, index, *processors, **kwargs):
    options = {"max_new_tokens": 20, "return_dict_in_generate": True, **kwargs}
    return model.generate(**inputs, retriever=index, logits_processor=LogitsProcessorList(processors), **options)


def prompt_of(inputs, row):
    """`input_ids` of a row alone, without padding."""
    return {"input_ids": inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]}


def rows_of(model, inputs, output):
    """Each row of the output without padding."""
    return real_tokens(output, inputs["attention_mask"], model.tokenizer.pad_token_id)


def question_that_retrieves(model):
    """Token ids of a prompt that ends in `[NSP]`."""
    return [*encode_prompt(model.tokenizer, "who?"), model.config.nsp_token_id]


def num_retrievals(output):
    return sum(map(len, output.retrievals))


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


def test_citations_of_a_prompt_that_ends_in_nsp(model, index):
    input_ids = torch.tensor([question_that_retrieves(model)])
    letter = encode_texts(model.tokenizer, ["a"])[0]
    output = generate(model, {"input_ids": input_ids}, index, Prefer(letter), max_new_tokens=3)
    (text,) = model.decode_with_citations(output, model.tokenizer)
    retrieval = output.retrievals[0][0]
    title = f"{retrieval.title}: " if retrieval.title else ""
    assert text == f"aaa [1]\n[1] {title}{retrieval.text}"


def test_streaming_gives_every_token_in_order(model, inputs, index, steer):
    for row in (0, 1):
        streamer = Collect()
        output = generate(model, prompt_of(inputs, row), index, steer, streamer=streamer)
        assert len(output.retrievals[0]) >= 1
        assert streamer.ended
        assert streamer.tokens == output.sequences[0].tolist()


def test_text_streamer_prints_answer_and_passages(model, index, capsys):
    input_ids = torch.tensor([question_that_retrieves(model)])
    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    letter = encode_texts(model.tokenizer, ["a"])[0]
    output = generate(model, {"input_ids": input_ids}, index, Prefer(letter), max_new_tokens=4, streamer=streamer)
    printed = capsys.readouterr().out.strip()
    assert printed == model.tokenizer.decode(output.sequences[0, input_ids.shape[1] :], skip_special_tokens=True)
    assert output.retrievals[0][0].text in printed
    assert printed.endswith("aaaa")


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
    eager = Prefer(ends, 500.0)  # wants to end at every step, unless it retrieves
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


def test_an_ended_row_is_padded_and_stays_as_it_was(model, inputs, index, steer):
    steer.end_every = 6
    output = generate(model, inputs, index, steer)
    ends = set(model.generation_config.eos_token_id)
    prompt_lengths = inputs["attention_mask"].sum(1).tolist()
    counts = output.num_generated_tokens.tolist()
    assert min(counts) < max(counts)
    for ids, count, prompt_length in zip(rows_of(model, inputs, output), counts, prompt_lengths, strict=True):
        assert (ids[-1] in ends) == (count < 20)
        assert not set(ids[prompt_length:-1]) & ends


def test_stopping_criteria_see_each_row_without_gaps(model, inputs, index, steer):
    word = encode_texts(model.tokenizer, ["a"])[0][0]

    class EndsInWord(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == word

    processors = [steer, Prefer([word], 3.0)]
    criteria = StoppingCriteriaList([EndsInWord()])
    output = generate(model, inputs, index, *processors, stopping_criteria=criteria)
    assert min(output.num_generated_tokens.tolist()) < 20
    for row, ids in enumerate(rows_of(model, inputs, output)):
        alone = generate(model, prompt_of(inputs, row), index, *processors, stopping_criteria=criteria)
        assert alone.sequences[0].tolist() == ids


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
    config = GenerationConfig(suppress_tokens=[5])  # a user's own
    output = generate(model, inputs, index, steer, Prefer([cs]), generation_config=config)
    assert (output.sequences == cs).sum(1).tolist() == [len(trace) for trace in output.retrievals]


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


def test_without_retriever_it_is_ordinary_generation(model, inputs, steer):
    options = {"max_new_tokens": 20, "logits_processor": LogitsProcessorList([steer])}
    expected = model.gen.generate(**inputs, generation_config=model.generation_config, **options)
    assert model.config.nsp_token_id in expected[:, inputs["input_ids"].shape[1] :]  # [NSP] is a token like any other
    assert torch.equal(model.generate(**inputs, **options), expected)
    beams = model.generate(**inputs, num_beams=3, output_scores=True, return_dict_in_generate=True, **options)
    assert beams.sequences.shape[0] == len(QUESTIONS)
    assert beams.sequences_scores is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "not in beam_search"),
        ({"use_cache": False}, "keeps its own KV cache"),
        ({"cache_implementation": "offloaded"}, "keeps its own KV cache"),
        ({"past_key_values": DynamicCache()}, "keeps its own KV cache"),
        ({"output_scores": True}, "output_scores=True is not available"),
        ({"output_logits": True}, "output_logits=True is not available"),
        ({"output_attentions": True}, "output_attentions=True is not available"),
        ({"output_hidden_states": True}, "output_hidden_states=True is not available"),
        ({"inputs_embeds": torch.zeros(5, 3, 32)}, "inputs_embeds and guidance_scale are not available"),
        ({"guidance_scale": 2.0}, "inputs_embeds and guidance_scale are not available"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size and cache_config are not available"),
        ({"assistant_model": make_gen()}, "not in assisted_generation"),
        ({"prompt_lookup_num_tokens": 2}, "not in assisted_generation"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "not in beam_search"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_combined_with_retrieval_raises(model, inputs, index, options, message):
    with pytest.raises(ValueError) as error:
        generate(model, inputs, index, **options)
    assert message in str(error.value)


def test_arguments_that_retrieval_would_ignore_raise(model, inputs, index):
    with pytest.raises(ValueError, match="passage_input_ids, position_ids: not available with a retriever"):
        generate(model, inputs, index, position_ids=inputs["attention_mask"], passage_input_ids=inputs["input_ids"])
    with pytest.raises(TypeError):  # transformers' third argument is another one
        model.generate(inputs["input_ids"], None, index)
    holes = inputs["attention_mask"].clone()
    holes[2, -2] = 0
    with pytest.raises(ValueError, match="Row 2 of input_ids has padding between its tokens"):
        generate(model, {**inputs, "attention_mask": holes}, index)
    with pytest.raises(ValueError, match="Row 0 of input_ids holds no token"):
        generate(model, {**inputs, "attention_mask": holes * 0}, index)


def test_a_misspelt_argument_raises(model, inputs, index):
    with pytest.raises(ValueError, match="max_retreivals"):
        generate(model, inputs, index, max_retreivals=3)


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


@pytest.mark.parametrize(
    ("gen", "message"),
    [("mamba", "recurrent state"), ("gpt_neo", "layers of the types global, local"), ("bloom", "from one cache")],
)
def test_architectures_that_are_refused(gen, message):
    model = make_model(gen)
    index = model.build_index(PASSAGES, show_progress_bar=False)
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[5, 6]]), retriever=index, max_new_tokens=2)


# ------------------------------------------------------------------ streaming


def generate_four_letters(model, index, **kwargs):
    inputs = {"input_ids": torch.tensor([question_that_retrieves(model)])}
    letter = encode_texts(model.tokenizer, ["a"])[0]
    return generate(model, inputs, index, Prefer(letter), max_new_tokens=4, **kwargs)


def test_passages_can_be_hidden_from_a_streamer(model, index, capsys):
    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    config = RetrievalConfig(stream_passages=False)
    output = generate_four_letters(model, index, streamer=streamer, retrieval_config=config)
    assert capsys.readouterr().out.strip() == "aaaa"
    assert len(output.retrievals[0]) == 1


def test_text_iterator_streamer(model, index):
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    thread = threading.Thread(target=generate_four_letters, args=(model, index), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.strip().endswith("aaaa")
    assert any(passage["text"] in text for passage in PASSAGES)


class Collect(BaseStreamer):
    def __init__(self):
        self.tokens = []
        self.ended = False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_refused_nsp_is_not_streamed(model, index, steer):
    ids = torch.tensor([encode_prompt(model.tokenizer, "who?")])
    streamer = Collect()
    settings = RetrievalConfig(min_score=9.0, force_nsp_first=True)
    output = generate(model, {"input_ids": ids}, index, steer, streamer=streamer, retrieval_config=settings)
    assert streamer.tokens == output.sequences[0].tolist()
    assert model.config.nsp_token_id not in streamer.tokens[:-1]


def test_a_streamer_takes_one_row(model, inputs, index):
    with pytest.raises(ValueError, match="A streamer takes one row, found 5"):
        generate(model, inputs, index, streamer=Collect())


# ------------------------------------------------------------------ rows that leave, processors that count


def test_finished_rows_leave_the_batch(model, inputs, index, steer):
    steer.end_every = 6
    shapes = []
    model.gen.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    output = generate(model, inputs, index, steer)
    steps = [rows for rows, width in shapes if width == 1]
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) > 1
    # a row decides its first token after its prompt, and after its last token it is gone
    assert sum(steps) == sum(count - 1 for count in output.num_generated_tokens.tolist())


def test_processors_see_the_whole_batch_in_order(model, inputs, index, steer):
    steer.end_every = 6
    letters = [encode_texts(model.tokenizer, [letter])[0][0] for letter in "abcde"]
    num_rows = set()

    class OneLetterPerRow(LogitsProcessor):
        def __call__(self, input_ids, scores):
            num_rows.add(input_ids.shape[0])
            scores = scores.clone()
            scores[torch.arange(5), letters] += 100.0
            return scores

    output = generate(model, inputs, index, steer, OneLetterPerRow())
    assert num_rows == {5}
    assert len(set(output.num_generated_tokens.tolist())) > 2
    assert_one_letter_per_row(model, output, letters)


def assert_one_letter_per_row(model, output, letters):
    """Each row wrote nothing but its letter, `[NSP]` and the end."""
    others = {model.config.nsp_token_id, *model.generation_config.eos_token_id, model.tokenizer.pad_token_id}
    for letter, ids, trace in zip(letters, output.sequences.tolist(), output.retrievals, strict=True):
        written = set()
        position = output.prompt_length
        for retrieval in trace:
            written |= set(ids[position : retrieval.position + 1])
            position = retrieval.grounded_span[0]
        written |= set(ids[position:])
        assert written <= {letter, *others}


@pytest.mark.parametrize(
    "options",
    [
        {"forced_eos_token_id": 5},
        {"exponential_decay_length_penalty": (4, 3.0)},
        {"begin_suppress_tokens": [22, 232]},
        {"min_new_tokens": 9},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_that_count_do_not_count_passages(model, inputs, index, steer, options):
    """A batch in which rows retrieve different amounts equals its rows alone, and the option makes a difference."""
    bonus = 500.0 if "min_new_tokens" in options else 1.0
    processors = [steer, Prefer(model.generation_config.eos_token_id, bonus)]
    output = generate(model, inputs, index, *processors, **options)
    rows = rows_of(model, inputs, output)
    counts = output.num_generated_tokens.tolist()
    assert len(set(map(len, output.retrievals))) > 1
    for row, ids in enumerate(rows):
        alone = generate(model, prompt_of(inputs, row), index, *processors, **options)
        assert alone.sequences[0].tolist() == ids
    if "forced_eos_token_id" in options:
        assert counts == [20] * 5
        assert [ids[-1] for ids in rows] == [5] * 5
    if "min_new_tokens" in options:
        assert min(counts) > 9
    without_option = generate(model, inputs, index, *processors)
    assert rows != rows_of(model, inputs, without_option)


def test_prefix_allowed_tokens_know_their_row(model, inputs, index, steer):
    letters = [encode_texts(model.tokenizer, [letter])[0][0] for letter in "abcde"]
    nsp, ends = model.config.nsp_token_id, model.generation_config.eos_token_id
    steer.end_every = 6

    def allowed_tokens(row, ids):
        return [letters[row], nsp, *ends]

    output = generate(model, inputs, index, steer, prefix_allowed_tokens_fn=allowed_tokens)
    assert len(set(output.num_generated_tokens.tolist())) > 2
    assert_one_letter_per_row(model, output, letters)


@pytest.mark.parametrize(
    "warper", [{"top_p": 0.5}, {"top_k": 1}, {"min_p": 0.5}], ids=lambda warper: next(iter(warper))
)
@pytest.mark.parametrize(
    "settings",
    [{"max_retrievals": 1}, {"forbid_nsp": True}, {"min_score": 9.0}],
    ids=lambda settings: next(iter(settings)),
)
def test_sampling_where_nsp_is_likely_but_not_allowed(model, inputs, index, warper, settings):
    """The warpers choose among what is allowed: they must not keep `[NSP]` alone."""
    torch.manual_seed(0)
    eager = Prefer([model.config.nsp_token_id])
    config = RetrievalConfig(**settings)
    output = generate(model, inputs, index, eager, do_sample=True, retrieval_config=config, **warper)
    limit = settings.get("max_retrievals", 0)
    assert [len(trace) for trace in output.retrievals] == [limit] * 5
    assert output.num_generated_tokens.tolist() == [20] * 5


def test_passages_for_which_there_is_no_room_are_not_cited(model, index):
    prompt = question_that_retrieves(model)
    inputs = {"input_ids": torch.tensor([prompt])}
    config = RetrievalConfig(top_k=3)
    passage_ids = (
        generate(model, inputs, index, max_new_tokens=1, retrieval_config=config).retrievals[0][0].passage_ids
    )
    lengths = [len(index[index.row_of(id)]["input_ids"]) for id in passage_ids]
    separator = len(encode_texts(model.tokenizer, ["\n"])[0])
    cases = [  # room for tokens, passages of which at least one is read
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


def test_an_nsp_without_room_for_a_passage_is_streamed(model, index):
    prompt = encode_prompt(model.tokenizer, "who?")
    model.config.get_text_config().max_position_embeddings = len(prompt) + 2
    streamer = Collect()
    eager = Prefer([model.config.nsp_token_id])
    output = generate(model, {"input_ids": torch.tensor([prompt])}, index, eager, streamer=streamer)
    assert streamer.tokens == output.sequences[0].tolist()
    assert output.retrievals == [[]]


# ------------------------------------------------------------------ settings


def test_query_embeddings_on_request(model, inputs, index, steer):
    output = generate(model, inputs, index, steer, retrieval_config=RetrievalConfig(output_query_embeds=True))
    assert num_retrievals(output) >= 2
    for trace in output.retrievals:
        for retrieval in trace:
            scores = index.embeddings @ torch.tensor(retrieval.query_embed)
            assert scores.max().item() == pytest.approx(retrieval.score, abs=1e-5)
    assert generate(model, inputs, index, steer).retrievals[1][0].query_embed is None


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"max_retrievals": -1}, "max_retrievals is -1"),
        ({"force_nsp_first": True, "forbid_nsp": True}, "exclude each other"),
        ({"candidates": [], "passages": []}, "set one of them"),
        ({"forget_passages": "yes"}, "'recompute' or 'mask'"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        RetrievalConfig(**settings)


def test_candidates_and_passages_must_fit(model, inputs, index):
    for name, entries in (("candidates", 3), ("passages", 3), ("candidates", 1)):
        config = RetrievalConfig(**{name: [["p0"]] * entries})
        for options in ({}, {"do_sample": True, "num_return_sequences": 3}):
            message = f"{name} has {entries} entries, expected one for each of the 5 prompts"
            with pytest.raises(ValueError, match=message):
                generate(model, inputs, index, retrieval_config=config, **options)
    for settings in ({"candidates": [["p0", "p77"]] * 5}, {"passages": [["p77"]] * 5}):
        with pytest.raises((ValueError, KeyError), match="p77"):
            generate(model, inputs, index, retrieval_config=RetrievalConfig(**settings))
    with pytest.raises(ValueError, match="retrieval_config needs a retriever"):
        generate(model, inputs, None, retrieval_config=RetrievalConfig(top_k=2))
    with pytest.raises(ValueError, match="candidates need a retriever"):
        generate(model, inputs, None, retrieval_config=RetrievalConfig(candidates=[["p0"]] * 5, forbid_nsp=True))
    with pytest.raises(ValueError, match="'p0' is given by its id"):
        generate(model, inputs, None, retrieval_config=RetrievalConfig(passages=[["p0"]] * 5))


# ------------------------------------------------------------------ a search that fails


class Breaks:
    """An index that fails at the third search."""

    def __init__(self, index):
        self.index = index
        self.searches = 0
        self.check_model = index.check_model
        self.get_passages = index.get_passages
        self.rows_of = index.rows_of

    def search(self, *args, **kwargs):
        self.searches += 1
        if self.searches == 3:
            raise ConnectionError("the server went away")
        return self.index.search(*args, **kwargs)


def test_a_failed_search_keeps_the_finished_rows(model, inputs, index, steer):
    steer.end_every = 6
    expected = rows_of(model, inputs, generate(model, inputs, index, steer))
    with pytest.raises(RetrievalError, match="the server went away") as error:
        generate(model, inputs, Breaks(index), steer)
    assert error.value.finished
    for row in error.value.finished:
        assert row.ids == expected[row.number]


def test_a_failed_search_ends_the_stream(model, inputs, index):
    streamer = Collect()
    eager = Prefer([model.config.nsp_token_id])
    with pytest.raises(RetrievalError):
        generate(model, {"input_ids": inputs["input_ids"][1:2]}, Breaks(index), eager, streamer=streamer)
    assert streamer.ended  # a thread that reads from it does not wait for ever


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
            assert [r.passage_id for r in trace] == [r.passage_id for r in expected_trace]


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
    in_double = generate(model.double(), inputs, index, steer, cache_implementation="static")
    assert model._static_row_cache is not cache
    assert in_double.sequences.shape[0] == 5


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
