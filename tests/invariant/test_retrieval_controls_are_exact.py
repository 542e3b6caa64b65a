"""Every control of RetrievalConfig, in a batch, equals a slow reference without cache, token by token: top_k, candidates, oracle, forgetting, refusals."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from modeling_cosup import RetrievalConfig
from modeling_cosup.tokenization_cosup import encode_passages_for_gen, encode_prompt, encode_texts
from support.generation import Steer, left_pad, real_tokens
from support.models import PASSAGES, make_model, make_tokenizer

QUESTIONS = ["who?", "who painted the Night Watch?", "Curie", "when was it finished; in Amsterdam", "not this one!"]
MAX_NEW_TOKENS = 24


class EndGroundedText(LogitsProcessor):
    """Makes a random model write `[CE]` now and then; like `Steer` it reads nothing but the row's own tokens."""

    def __init__(self, model, every=4):
        self.ce, self.pad, self.every = model.config.ce_token_id, model.generation_config.pad_token_id, every

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, ids in enumerate(input_ids):
            scores[row, self.ce] += 700.0 * ((17 * int(ids[-1]) + int((ids != self.pad).sum())) % self.every == 2)
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
    inputs = left_pad(prompts, model.generation_config.pad_token_id)
    options = {
        "max_new_tokens": MAX_NEW_TOKENS,
        "logits_processor": processors,
        "return_dict_in_generate": True,
        **kwargs,
    }
    output = model.generate(**inputs, retriever=index, retrieval_config=settings, **options)
    shifts = [output.prompt_length - len(prompt) for prompt in prompts]
    trace = [
        [(r.position - shift, r.passage_ids) for r in row]
        for row, shift in zip(output.retrievals, shifts, strict=True)
    ]
    return output, real_tokens(output, inputs["attention_mask"], model.generation_config.pad_token_id), trace


class Reference:
    """One row the slow way: all that is in view goes through Gen for every token; a memory sees what enters Gen's submodules."""

    def __init__(self, model, index, processors, settings, prompt, row, memory=None):
        self.memory, self.states = memory, {}
        self.model, self.index, self.processors, self.settings = model, index, processors, settings
        self.ids, self.prompt, self.trace, self.forgotten = (
            list(prompt),
            prompt,
            [],
            [],
        )  # forgotten: (start, end, [CE]) of a passage
        self.pool = (
            None
            if settings.candidates is None or settings.candidates[row] is None
            else [index.row_of(id) for id in settings.candidates[row]]
        )
        self.given = None if settings.passages is None else list(settings.passages[row])

    def view(self):
        hidden = {column for start, end, _ in self.forgotten for column in range(start, end)}
        return [id for column, id in enumerate(self.ids) if column not in hidden]

    def hidden_state(self):
        """Gen's last hidden state at the last token; `states` become what enters the memory's submodules there."""

        def keep(module, args, name):
            self.states[name] = args[0][:, -1]

        names = [] if self.memory is None else self.memory.states
        modules = {name: self.model.gen.get_submodule(name) for name in names}
        hooks = [module.register_forward_pre_hook(partial(keep, name=name)) for name, module in modules.items()]
        hidden = self.last_hidden_state()
        for hook in hooks:
            hook.remove()
        return hidden

    def last_hidden_state(self):
        if self.settings.forget_passages != "mask":
            return self.model.gen.base_model(torch.tensor([self.view()]), use_cache=False).last_hidden_state[0, -1]
        n = len(self.ids)
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        for start, end, ce in self.forgotten:
            seen[ce + 1 :, start:end] = False
        mask = torch.zeros(1, 1, n, n).masked_fill(~seen, torch.finfo(torch.float32).min)
        positions = torch.arange(n)[None]
        if window := getattr(self.model.gen.config, "sliding_window", None):
            near = positions[0][None, :] > positions[0][:, None] - window
            sliding = mask.masked_fill(~near, torch.finfo(torch.float32).min)
            mask = (
                {"sliding_attention": sliding, "full_attention": mask}
                if hasattr(self.model.gen.config, "layer_types")
                else sliding
            )
        return self.model.gen.base_model(
            torch.tensor([self.ids]), attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state[0, -1]

    def may_retrieve(self):
        limit = self.settings.max_retrievals
        return (
            not self.settings.forbid_nsp
            and (limit is None or len(self.trace) < limit)
            and (self.given is None or len(self.given) > 0)
        )

    def find(self, hidden):
        if self.given is not None:
            found, self.given = self.given[: self.settings.top_k], self.given[self.settings.top_k :]
            return found
        query = F.normalize(hidden, dim=-1) if self.model.config.similarity == "cosine" else hidden
        scores = (self.index.embeddings @ query).numpy()
        used = {id for _, ids in self.trace for id in ids} if self.settings.no_repeat_passages else set()
        rows = [row for row in np.argsort(-scores) if self.pool is None or row in self.pool]
        rows = [row for row in rows if self.settings.min_score is None or scores[row] >= self.settings.min_score]
        return [id for row in rows if (id := self.index[int(row)]["id"]) not in used][: self.settings.top_k]

    def decide(self, hidden, ban):
        config = self.model.config
        logits = self.model.gen.get_output_embeddings()(hidden)[None]
        if cap := getattr(self.model.gen.config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        if self.memory is not None:
            logits = self.memory.adjust(logits, self.states)
        scores = self.processors(torch.tensor([self.view()]), logits)[0]
        scores[[config.cs_token_id] + [config.nsp_token_id] * ban] = float("-inf")
        return int(scores.argmax())

    @torch.no_grad()
    def run(self, max_new_tokens=MAX_NEW_TOKENS):
        config, ends = self.model.config, self.model.generation_config.eos_token_id
        separator = encode_texts(self.model.tokenizer, ["\n"])[0]
        generated, refused, passage = 0, False, None
        while True:
            hidden = self.hidden_state()
            if self.ids[-1] == config.nsp_token_id and self.may_retrieve() and not refused:
                if found := self.find(hidden):
                    self.trace.append((len(self.ids) - 1, found))
                    parts = [self.index[self.index.row_of(id)]["input_ids"] for id in found]
                    joined = list(parts[0])
                    for part in parts[1:]:
                        joined += separator + part
                    passage = (len(self.ids), len(self.ids) + len(joined))
                    self.ids += [*joined, config.cs_token_id]
                    continue
                refused = True
                if len(self.ids) > len(self.prompt):
                    self.ids.pop()
                    generated -= 1
                    continue
            first = (
                self.settings.force_nsp_first
                and generated == 0
                and not refused
                and self.may_retrieve()
                and not self.trace
            )
            token = config.nsp_token_id if first else self.decide(hidden, ban=refused or not self.may_retrieve())
            refused = False
            self.ids.append(token)
            generated += 1
            if generated == max_new_tokens or token in ends:
                return self.ids, self.trace
            if token == config.ce_token_id and passage is not None and self.settings.forget_passages:
                self.forgotten.append((*passage, len(self.ids) - 1))
                passage = None


def check(settings, gen="llama", every=7, make_memory=None, **kwargs):
    model, index, prompts, processors = setup(gen, every, **kwargs)
    memory = None if make_memory is None else make_memory(model)
    output, rows, trace = generate(model, index, prompts, processors, settings, memory=memory)
    for row, prompt in enumerate(prompts):
        ids, found = Reference(model, index, processors, settings, prompt, row, memory).run()
        assert rows[row] == ids and trace[row] == found, f"row {row} differs from the reference"
    static = generate(model, index, prompts, processors, settings, memory=memory, cache_implementation="static")
    assert static[1:] == (rows, trace), "the static cache differs"
    options = {"retriever": index, "retrieval_config": settings, "logits_processor": processors, "memory": memory}
    options |= {"max_new_tokens": MAX_NEW_TOKENS, "show_progress_bar": False}
    for batch_size, kind in ((2, {}), (3, {"cache_implementation": "static"})):
        many = model.generate_many(prompts, batch_size=batch_size, **options, **kind)
        assert [[*prompt, *done.token_ids] for prompt, done in zip(prompts, many, strict=True)] == rows, (
            f"generate_many differs, {kind}"
        )
        assert [[(r.position, r.passage_ids) for r in done.retrievals] for done in many] == trace
    return model, index, output, rows, trace


ARCHITECTURES = ["llama", "gpt2", "mistral", "gemma2"]


@pytest.mark.parametrize("gen", ARCHITECTURES)
@pytest.mark.parametrize("forget", ["recompute", "mask"])
def test_forgotten_passages(gen, forget):
    model, index, output, rows, trace = check(RetrievalConfig(forget_passages=forget), gen)
    written = output.sequences.tolist()
    ends = [
        ids[r.grounded_span[1]]
        for ids, row in zip(written, output.retrievals, strict=True)
        for r in row
        if r.grounded_span[1] < len(ids)
    ]
    assert (
        ends.count(model.config.ce_token_id) >= 3 and max(map(len, trace)) >= 2
    )  # several passages are forgotten, some rows retrieve again after that
    assert generate(*setup(gen), RetrievalConfig())[1] != rows  # and it makes a difference


@pytest.mark.parametrize("gen", ARCHITECTURES)
def test_top_k(gen):
    *_, output, _, trace = check(RetrievalConfig(top_k=3), gen)
    assert all(len(ids) == 3 == len(set(ids)) for row in trace for _, ids in row) and sum(map(len, trace)) >= 4
    assert all(r.scores == sorted(r.scores, reverse=True) for row in output.retrievals for r in row)


@pytest.mark.parametrize("gen", ARCHITECTURES)
def test_candidates_of_each_row(gen):
    pools = [["p1", "p2"], ["p5"], None, ["p0", "p3", "p4"], ["p0"]]
    *_, trace = check(RetrievalConfig(candidates=pools), gen)
    for pool, row in zip(pools, trace, strict=True):
        assert pool is None or all(id in pool for _, ids in row for id in ids)
    assert sum(map(len, trace)) >= 4


@pytest.mark.parametrize("top_k", [1, 2])
def test_given_passages(top_k):
    given = [["p1", "p2", "p3"], ["p5"], [], ["p0", "p0"], ["p4"]]
    *_, output, _, trace = check(RetrievalConfig(passages=given, top_k=top_k), every=4)
    found = [[id for _, ids in row for id in ids] for row in trace]
    assert (
        all(ids == expected[: len(ids)] for ids, expected in zip(found, given, strict=True))
        and found[1] == given[1]
        and sum(map(len, found)) >= 5
    )
    assert {score for row in output.retrievals for r in row for score in r.scores} == {None}


@pytest.mark.parametrize("gen", ARCHITECTURES)
@pytest.mark.parametrize("force", [False, True])
def test_minimum_score(gen, force):
    model, index, prompts, processors = setup(gen, every=5)
    output, _, _ = generate(model, index, prompts, processors, RetrievalConfig())
    middle = float(np.median([r.score for row in output.retrievals for r in row]))
    *_, output, rows, trace = check(RetrievalConfig(min_score=middle, force_nsp_first=force), gen, every=5)
    assert all(r.score >= middle for row in output.retrievals for r in row) and any(trace)
    assert output.num_generated_tokens.tolist() == [MAX_NEW_TOKENS] * len(prompts)
    nothing = generate(model, index, prompts, processors, RetrievalConfig(min_score=9.0, force_nsp_first=force))
    assert not any(nothing[2])
    nsp = model.config.nsp_token_id
    assert not any(
        nsp in row[len(prompt) : -1] for row, prompt in zip(nothing[1], prompts, strict=True)
    )  # every one was taken back; the last is not asked


def test_no_passage_twice():
    *_, trace = check(RetrievalConfig(no_repeat_passages=True), every=3)
    found = [[id for _, ids in row for id in ids] for row in trace]
    assert all(len(row) == len(set(row)) for row in found) and max(map(len, found)) >= 4
    *_, repeated = check(RetrievalConfig(), every=3)
    assert any(len({tuple(ids) for _, ids in row}) < len(row) for row in repeated)


def test_no_passage_twice_until_none_is_left():
    *_, rows, trace = check(RetrievalConfig(no_repeat_passages=True, candidates=[["p0", "p1"]] * 5, top_k=2), every=3)
    assert [len(row) for row in trace[:4]] == [1, 1, 1, 1]


@pytest.mark.parametrize("gen", ARCHITECTURES)
def test_force_and_forbid(gen):
    *_, trace = check(RetrievalConfig(force_nsp_first=True), gen)
    starts = [12, 29, 13, 19, 23]
    assert all(row for row in trace) and [row[0][0] for row in trace][:1] == starts[:1]
    model, index, output, rows, trace = check(RetrievalConfig(forbid_nsp=True), gen)
    assert not any(trace)


def test_all_at_once():
    pools = [["p0", "p1", "p2"], None, ["p3"], None, ["p5", "p0"]]
    settings = RetrievalConfig(
        2,
        max_retrievals=2,
        force_nsp_first=True,
        candidates=pools,
        no_repeat_passages=True,
        forget_passages="recompute",
    )
    *_, trace = check(settings, every=5)
    assert sum(map(len, trace)) >= 6


def test_given_passages_without_an_index():
    model, index, prompts, processors = setup()
    passages = [[PASSAGES[i % 6]] for i in range(5)]
    expected = generate(model, index, prompts, processors, RetrievalConfig(passages=[[p[0]["id"]] for p in passages]))
    output = generate(model, None, prompts, processors, RetrievalConfig(passages=passages))
    assert output[1:] == expected[1:] and sum(map(len, output[2])) >= 3
    assert encode_passages_for_gen(model.tokenizer, [PASSAGES[0]], model.config)[0] == index[0]["input_ids"]
