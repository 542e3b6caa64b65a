"""Every control of RetrievalConfig, in a batch, equals a slow reference without cache, token by token."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from modeling_cosup import RetrievalConfig
from modeling_cosup.tokenization_cosup import encode_passages_for_gen, encode_prompt, encode_texts
from support.generation import QUESTIONS, Steer, left_pad, real_tokens
from support.memories import kept_ids, mixture
from support.models import PASSAGES, make_model, make_tokenizer

MAX_NEW_TOKENS = 24


class EndGroundedText(LogitsProcessor):
    """Makes a random model write `[CE]` now and then; like `Steer` it depends only on the row's tokens."""

    def __init__(self, model, every=4):
        self.ce = model.config.ce_token_id
        self.pad = model.generation_config.pad_token_id
        self.every = every

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, ids in enumerate(input_ids):
            clock = 17 * int(ids[-1]) + int((ids != self.pad).sum())
            if clock % self.every == 2:
                scores[row, self.ce] += 700.0
        return scores


def setup(gen="llama", every=7, **kwargs):
    tokenizer = make_tokenizer()
    model = make_model(gen, tokenizer=tokenizer, gen_kwargs={"max_position_embeddings": 4096}, **kwargs)
    index = model.build_index(PASSAGES, show_progress_bar=False)
    prompts = [encode_prompt(tokenizer, question) for question in QUESTIONS]
    prompts[1].append(model.config.nsp_token_id)
    processors = [Steer(model, every, quiet_id=tokenizer("!")["input_ids"][0]), EndGroundedText(model)]
    return model, index, prompts, LogitsProcessorList(processors)


def generate(model, index, prompts, processors, settings, **kwargs):
    """Return the output, its rows without padding, and `[(column, passage ids)]` of each row."""
    inputs = left_pad(prompts, model.generation_config.pad_token_id)
    output = model.generate(
        **inputs,
        retriever=index,
        retrieval_config=settings,
        max_new_tokens=MAX_NEW_TOKENS,
        logits_processor=processors,
        return_dict_in_generate=True,
        **kwargs,
    )
    rows = real_tokens(output, inputs["attention_mask"], model.generation_config.pad_token_id)
    traces = []
    for prompt, trace in zip(prompts, output.retrievals, strict=True):
        padding = output.prompt_length - len(prompt)
        traces.append([(retrieval.position - padding, retrieval.passage_ids) for retrieval in trace])
    return output, rows, traces


class Reference:
    """
    Generates one row the slow way: Gen forwards all tokens in view for every decision.

    A memory gets what enters Gen's submodules.
    """

    def __init__(self, model, index, processors, settings, prompt, row, memory=None, memory_config=None):
        self.model = model
        self.index = index
        self.processors = processors
        self.settings = settings
        self.prompt = prompt
        self.memory = memory
        self.memory_config = memory_config
        if memory is not None and memory_config is None:
            self.memory_config = memory.memory_config
        self.states = {}
        self.ids = list(prompt)
        self.trace = []
        self.forgotten = []  # (start, end, column of [CE]) of passages
        self.pool = None  # rows of the index that may be retrieved
        if settings.candidates is not None and settings.candidates[row] is not None:
            self.pool = [index.row_of(id) for id in settings.candidates[row]]
        self.given = None
        if settings.passages is not None:
            self.given = list(settings.passages[row])

    def view(self):
        """Return the ids without forgotten passages."""
        ids = list(self.ids)
        for start, end, _ in reversed(self.forgotten):
            del ids[start:end]
        return ids

    def hidden_state(self):
        """Return Gen's last hidden state at the last token; keep what enters the memory's submodules in `states`."""

        def keep(module, args, name):
            self.states[name] = args[0][:, -1]

        names = [] if self.memory is None else self.memory.states
        hooks = []
        for name in names:
            module = self.model.gen.get_submodule(name)
            hooks.append(module.register_forward_pre_hook(partial(keep, name=name)))
        hidden = self.last_hidden_state()
        for hook in hooks:
            hook.remove()
        return hidden

    def last_hidden_state(self):
        base_model = self.model.gen.base_model
        if self.settings.forget_passages != "mask":
            return base_model(torch.tensor([self.view()]), use_cache=False).last_hidden_state[0, -1]
        n = len(self.ids)
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        for start, end, ce in self.forgotten:
            seen[ce + 1 :, start:end] = False
        lowest = torch.finfo(torch.float32).min
        mask = torch.zeros(1, 1, n, n).masked_fill(~seen, lowest)
        positions = torch.arange(n)
        window = getattr(self.model.gen.config, "sliding_window", None)
        if window:
            near = positions[None, :] > positions[:, None] - window
            sliding = mask.masked_fill(~near, lowest)
            if hasattr(self.model.gen.config, "layer_types"):
                mask = {"sliding_attention": sliding, "full_attention": mask}
            else:
                mask = sliding
        output = base_model(
            torch.tensor([self.ids]), attention_mask=mask, position_ids=positions[None], use_cache=False
        )
        return output.last_hidden_state[0, -1]

    def may_retrieve(self):
        if self.settings.forbid_nsp:
            return False
        if self.settings.max_retrievals is not None and len(self.trace) >= self.settings.max_retrievals:
            return False
        return self.given is None or len(self.given) > 0

    def find(self, hidden):
        """Return the ids of the passages that the row gets, best first."""
        top_k, min_score = self.settings.top_k, self.settings.min_score
        if self.given is not None:
            passage_ids = self.given[:top_k]
            self.given = self.given[top_k:]
            return passage_ids
        query = F.normalize(hidden, dim=-1) if self.model.config.similarity == "cosine" else hidden
        scores = (self.index.embeddings @ query).numpy()
        retrieved = {id for _, passage_ids in self.trace for id in passage_ids}
        found = []
        for row in np.argsort(-scores):
            id = self.index[int(row)]["id"]
            if self.pool is not None and row not in self.pool:
                continue
            if min_score is not None and scores[row] < min_score:
                continue
            if self.settings.no_repeat_passages and id in retrieved:
                continue
            found.append(id)
        return found[:top_k]

    def join(self, passage_ids):
        """Return the token ids of passages, with a line break between."""
        separator = encode_texts(self.model.tokenizer, ["\n"])[0]
        joined = []
        for id in passage_ids:
            if joined:
                joined += separator
            joined += self.index[self.index.row_of(id)]["input_ids"]
        return joined

    def mixed(self, logits):
        """Return log-probabilities of the mixture with the memory, `(V,)`."""
        config = self.memory_config
        memory = self.memory.log_probs(self.states, config)[0]
        weight = config.weight
        if config.grounded_weight is not None and self.is_grounded():
            weight = config.grounded_weight
        return mixture(logits.softmax(-1), memory.exp(), weight, kept_ids(self.model)).log().float()

    def is_grounded(self):
        """Return whether the last of `[Cs]`, `[CE]`, `[NSP]` and the ends is `[Cs]`."""
        marks = [id for id in self.ids if id in kept_ids(self.model)]
        return bool(marks) and marks[-1] == self.model.config.cs_token_id

    def decide(self, hidden, ban):
        config = self.model.config
        logits = self.model.gen.get_output_embeddings()(hidden)[None]
        cap = getattr(self.model.gen.config, "final_logit_softcapping", None)
        if cap:
            logits = cap * torch.tanh(logits / cap)
        if self.memory is not None:
            logits = self.mixed(logits[0])[None]
        scores = self.processors(torch.tensor([self.view()]), logits)[0]
        scores[config.cs_token_id] = float("-inf")
        if ban:
            scores[config.nsp_token_id] = float("-inf")
        return int(scores.argmax())

    @torch.no_grad()
    def run(self, max_new_tokens=MAX_NEW_TOKENS):
        """Return the ids of the row, and `[(column, passage ids)]`."""
        config, ends = self.model.config, self.model.generation_config.eos_token_id
        generated = 0
        nothing_found = False  # for the [NSP] that was just read
        passage = None  # columns of the last one, until it is forgotten
        while True:
            hidden = self.hidden_state()
            if self.ids[-1] == config.nsp_token_id and self.may_retrieve() and not nothing_found:
                passage_ids = self.find(hidden)
                if passage_ids:
                    self.trace.append((len(self.ids) - 1, passage_ids))
                    joined = self.join(passage_ids)
                    passage = (len(self.ids), len(self.ids) + len(joined))
                    self.ids += [*joined, config.cs_token_id]
                    continue
                nothing_found = True
                if len(self.ids) > len(self.prompt):
                    self.ids.pop()
                    generated -= 1
                    continue
            may_retrieve = self.may_retrieve() and not nothing_found
            is_first = generated == 0 and not self.trace
            if self.settings.force_nsp_first and is_first and may_retrieve:
                token = config.nsp_token_id
            else:
                token = self.decide(hidden, ban=not may_retrieve)
            nothing_found = False
            self.ids.append(token)
            generated += 1
            if generated == max_new_tokens or token in ends:
                return self.ids, self.trace
            if token == config.ce_token_id and passage is not None and self.settings.forget_passages:
                self.forgotten.append((*passage, len(self.ids) - 1))
                passage = None


def check(settings, gen="llama", every=7, make_memory=None, memory_config=None, **kwargs):
    """Check a batch, with and without a static cache, and generate_many() against the reference of each row."""
    model, index, prompts, processors = setup(gen, every, **kwargs)
    memory = None if make_memory is None else make_memory(model)
    memories = {"memory": memory, "memory_config": memory_config}
    output, rows, traces = generate(model, index, prompts, processors, settings, **memories)
    for row, prompt in enumerate(prompts):
        ids, trace = Reference(model, index, processors, settings, prompt, row, **memories).run()
        assert rows[row] == ids, f"row {row} differs from the reference"
        assert traces[row] == trace, f"the trace of row {row} differs from the reference"
    static = {"cache_implementation": "static"}
    _, static_rows, static_traces = generate(model, index, prompts, processors, settings, **memories, **static)
    assert static_rows == rows, "the static cache differs"
    assert static_traces == traces, "the static cache differs"
    options = {"retriever": index, "retrieval_config": settings, "logits_processor": processors, **memories}
    options |= {"max_new_tokens": MAX_NEW_TOKENS, "show_progress_bar": False}
    for batch_size, cache in ((2, {}), (3, static)):
        completions = model.generate_many(prompts, batch_size=batch_size, **options, **cache)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            assert [*prompt, *completion.token_ids] == rows[row], f"row {row} of generate_many differs, {cache}"
            trace = [(retrieval.position, retrieval.passage_ids) for retrieval in completion.retrievals]
            assert trace == traces[row]
    return model, index, output, rows, traces


def all_ids(trace):
    """Return the ids of all passages of a row."""
    return [id for _, passage_ids in trace for id in passage_ids]


ARCHITECTURES = ["llama", "gpt2", "mistral", "gemma2"]


@pytest.mark.parametrize("gen", ARCHITECTURES)
@pytest.mark.parametrize("forget", ["recompute", "mask"])
def test_forgotten_passages(gen, forget):
    model, index, output, rows, traces = check(RetrievalConfig(forget_passages=forget), gen)
    num_forgotten = 0
    for ids, trace in zip(output.sequences.tolist(), output.retrievals, strict=True):
        for retrieval in trace:
            _, end = retrieval.grounded_span
            if ids[end : end + 1] == [model.config.ce_token_id]:
                num_forgotten += 1
    assert num_forgotten >= 3
    assert max(map(len, traces)) >= 2  # some rows retrieve again after that
    _, rows_without_forgetting, _ = generate(*setup(gen), RetrievalConfig())
    assert rows_without_forgetting != rows


@pytest.mark.parametrize("gen", ARCHITECTURES)
def test_top_k(gen):
    *_, output, _, traces = check(RetrievalConfig(top_k=3), gen)
    assert sum(map(len, traces)) >= 4
    for trace in output.retrievals:
        for retrieval in trace:
            assert len(retrieval.passage_ids) == len(set(retrieval.passage_ids)) == 3
            assert retrieval.scores == sorted(retrieval.scores, reverse=True)


@pytest.mark.parametrize("gen", ARCHITECTURES)
def test_candidates_of_each_row(gen):
    pools = [["p1", "p2"], ["p5"], None, ["p0", "p3", "p4"], ["p0"]]
    *_, traces = check(RetrievalConfig(candidates=pools), gen)
    for pool, trace in zip(pools, traces, strict=True):
        assert pool is None or set(all_ids(trace)) <= set(pool)
    assert sum(map(len, traces)) >= 4


@pytest.mark.parametrize("top_k", [1, 2])
def test_given_passages(top_k):
    given = [["p1", "p2", "p3"], ["p5"], [], ["p0", "p0"], ["p4"]]
    *_, output, _, traces = check(RetrievalConfig(passages=given, top_k=top_k), every=4)
    used = [all_ids(trace) for trace in traces]
    for ids, given_ids in zip(used, given, strict=True):
        assert ids == given_ids[: len(ids)]
    assert used[1] == given[1]
    assert sum(map(len, used)) >= 5
    for trace in output.retrievals:
        for retrieval in trace:
            assert set(retrieval.scores) == {None}


@pytest.mark.parametrize("gen", ARCHITECTURES)
@pytest.mark.parametrize("force", [False, True])
def test_minimum_score(gen, force):
    model, index, prompts, processors = setup(gen, every=5)
    output, _, _ = generate(model, index, prompts, processors, RetrievalConfig())
    median = float(np.median([retrieval.score for trace in output.retrievals for retrieval in trace]))
    *_, output, _, traces = check(RetrievalConfig(min_score=median, force_nsp_first=force), gen, every=5)
    assert any(traces)
    assert all(retrieval.score >= median for trace in output.retrievals for retrieval in trace)
    assert output.num_generated_tokens.tolist() == [MAX_NEW_TOKENS] * len(prompts)

    settings = RetrievalConfig(min_score=9.0, force_nsp_first=force)
    _, rows, traces = generate(model, index, prompts, processors, settings)
    assert not any(traces)
    for ids, prompt in zip(rows, prompts, strict=True):
        # every [NSP] was taken back; the last token does not search
        assert model.config.nsp_token_id not in ids[len(prompt) : -1]


def test_no_passage_twice():
    *_, traces = check(RetrievalConfig(no_repeat_passages=True), every=3)
    used = [all_ids(trace) for trace in traces]
    assert all(len(ids) == len(set(ids)) for ids in used)
    assert max(map(len, used)) >= 4
    *_, traces = check(RetrievalConfig(), every=3)
    used = [all_ids(trace) for trace in traces]
    assert any(len(set(ids)) < len(ids) for ids in used)  # without the control passages do repeat


def test_no_passage_twice_until_none_is_left():
    settings = RetrievalConfig(no_repeat_passages=True, candidates=[["p0", "p1"]] * 5, top_k=2)
    *_, traces = check(settings, every=3)
    assert [len(trace) for trace in traces[:4]] == [1, 1, 1, 1]


@pytest.mark.parametrize("gen", ARCHITECTURES)
def test_force_and_forbid(gen):
    *_, traces = check(RetrievalConfig(force_nsp_first=True), gen)
    assert all(traces)
    column, _ = traces[0][0]
    assert column == 12  # right after the prompt
    *_, traces = check(RetrievalConfig(forbid_nsp=True), gen)
    assert not any(traces)


def test_all_controls_together():
    pools = [["p0", "p1", "p2"], None, ["p3"], None, ["p5", "p0"]]
    settings = RetrievalConfig(
        top_k=2,
        max_retrievals=2,
        force_nsp_first=True,
        candidates=pools,
        no_repeat_passages=True,
        forget_passages="recompute",
    )
    *_, traces = check(settings, every=5)
    assert sum(map(len, traces)) >= 6


def test_given_passages_without_an_index():
    model, index, prompts, processors = setup()
    by_id = RetrievalConfig(passages=[[passage["id"]] for passage in PASSAGES[:5]])
    by_text = RetrievalConfig(passages=[[passage] for passage in PASSAGES[:5]])
    _, expected_rows, expected_traces = generate(model, index, prompts, processors, by_id)
    _, rows, traces = generate(model, None, prompts, processors, by_text)
    assert rows == expected_rows
    assert traces == expected_traces
    assert sum(map(len, traces)) >= 3
    assert encode_passages_for_gen(model.tokenizer, [PASSAGES[0]], model.config)[0] == index[0]["input_ids"]
