"""Ask a model the questions of an evaluation set: rank passages by its query embeddings, and let it answer."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_cosup import Completion, CoSupForCausalLM, Memory, MemoryConfig, RetrievalConfig, Retriever
from modeling_cosup.encoding_cosup import evaluating
from modeling_cosup.metadata_cosup import traced_passage
from modeling_cosup.tokenization_cosup import encode_prompt

from ..questions import answer_place, answers_to_find, gold_ids
from ..tokenizing import tokenize_instance
from .figures import MODES, QUERY, SEARCHING
from .grounding import split_sentences
from .intervals import Mean

RANKING_LENGTH = 100  # number of passages in a ranking over the whole corpus


# ---------------------------------------------------------------------- rankings by the query embedding


def embed_queries(model: CoSupForCausalLM, questions: list[dict], batch_size: int = 32) -> torch.Tensor:
    """
    Return the query embedding of each question: the hidden state at an `[NSP]` right after the prompt.

    Returns:
        `torch.FloatTensor` of shape `(len(questions), h)` on the CPU.
    """
    prompts = [[*prompt_ids(model, question), cast(int, model.config.nsp_token_id)] for question in questions]
    return model.embed_prompts(prompts, batch_size, show_progress_bar=True)


def rank_passages(
    model: CoSupForCausalLM, index: Retriever, questions: list[dict], batch_size: int = 32, pools: bool = False
) -> list[dict]:
    """
    Rank passages by the query embedding of each question.

    Args:
        model ([`CoSupForCausalLM`]): embeds the questions.
        index ([`Retriever`]): holds the passages.
        questions (`list[dict]`): evaluation instances.
        batch_size (`int`): questions per forward.
        pools (`bool`): whether to rank the `candidates` of each question as well.

    Returns:
        `list[dict]`: `{"id", "corpus"}` for each question: the ids of the nearest 100 passages of the index, best
        first. With `pools` also `"pool"`, the ids of all candidates. A question with
        [answers to find][`~trainer.questions.answers_to_find`] also has `"answer_places"`: for each of these
        rankings, the place of the first passage that holds an answer, or 0.
    """
    queries = embed_queries(model, questions, batch_size)
    rows_of_scope = {"corpus": index.search(queries, k=RANKING_LENGTH)[1]}
    if pools:
        candidates = [index.rows_of(question["candidates"]) for question in questions]
        largest_pool = max(map(len, candidates), default=1)
        rows_of_scope["pool"] = index.search(queries, k=largest_pool, candidates=candidates)[1]
    rankings = []
    for i, question in enumerate(questions):
        ranking = {"id": question["id"]}
        answers = answers_to_find(question)
        if answers:
            ranking["answer_places"] = {}
        for scope, rows in rows_of_scope.items():
            valid = rows[i][rows[i] >= 0]  # an approximate search may find fewer than k
            passages = index.get_passages(valid)
            ranking[scope] = [passage["id"] for passage in passages]
            if answers:
                ranking["answer_places"][scope] = answer_place(passages, answers)
        rankings.append(ranking)
    return rankings


# ---------------------------------------------------------------------- answers


def answer(
    model: CoSupForCausalLM,
    questions: list[dict],
    index: Retriever | None = None,
    mode: str = "retrieval",
    batch_size: int = 32,
    max_new_tokens: int = 64,
    candidates: list[list[str]] | None = None,
    top_k: int = 1,
    max_retrievals: int | None = None,
    seed: int = 0,
    memory: Memory | None = None,
    memory_config: MemoryConfig | None = None,
    output_file: str | Path | None = None,
    on_completion: Callable[[Completion], dict[str, Any] | None] | None = None,
    show_progress_bar: bool = True,
) -> list[dict]:
    """
    Answer questions, and return the answers with what was retrieved for them.

    Args:
        model ([`CoSupForCausalLM`]): answers greedily.
        questions (`list[dict]`): evaluation instances.
        index ([`Retriever`], *optional*): the passages; not needed in mode `"off"`.
        mode (`str`): how the questions retrieve, see [`retrieval_settings`].
        batch_size (`int`), max_new_tokens (`int`): as in `generate`.
        candidates (`list[list[str]]`, *optional*): for each question, the ids of the passages that its search is
            limited to.
        top_k (`int`), max_retrievals (`int`, *optional*): as in [`RetrievalConfig`]; unused if the model does not
            search.
        seed (`int`): seed for drawing the passages of mode `"wrong"`.
        memory, memory_config, output_file, on_completion, show_progress_bar: as in `generate_many`.

    Returns:
        `list[dict]`: one prediction per question, see [`as_prediction`], with its `mode`.
    """
    prompts = [prompt_ids(model, question) for question in questions]
    settings = retrieval_settings(mode, questions, index, candidates, top_k, max_retrievals, seed)
    with evaluating(model), torch.no_grad():
        completions = model.generate_many(
            prompts,
            retriever=None if mode == "off" else index,
            retrieval_config=settings,
            memory=memory,
            memory_config=memory_config,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            batch_size=batch_size,
            output_file=output_file,
            on_completion=on_completion,
            description=f"Answering ({mode})",
            show_progress_bar=show_progress_bar,
        )
    predictions = []
    for question, completion, prompt in zip(questions, completions, prompts, strict=True):
        prediction = as_prediction(question, completion, len(prompt), model.tokenizer)
        predictions.append({**prediction, "mode": mode})
    return predictions


def as_prediction(
    question: dict, completion: Completion, prompt_length: int, tokenizer: PreTrainedTokenizerBase
) -> dict:
    """
    Return a question and its answer as a line of `predictions.jsonl`, the input of all scoring.

    Args:
        question (`dict`): evaluation instance.
        completion ([`Completion`]): the answer, from `generate_many`.
        prompt_length (`int`): number of prompt tokens, which the positions of the retrieval trace include.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the model.

    Returns:
        `dict`: `id`, `dataset`, `input`, `answers` and `provenance` of the question, and

        - `output`: what the model wrote, without passages.
        - `output_with_citations`: the same in ALCE's form, with `[n]` before the end of each grounded sentence, where
          n counts the distinct passages.
        - `cited_text`: the same for human readers, with the passages listed below it.
        - `retrievals`: `{"passages": [{"id", "title", "text"}], "scores", "grounded_text"}` for each retrieval; a
          passage with metadata also has `"metadata"`.
        - `num_generated_tokens`.
    """
    tokens = completion.token_ids
    citation_numbers: dict[str | None, int] = {}  # passage id -> n
    pieces, retrievals = [], []
    written = 0  # number of tokens that `pieces` covers
    for retrieval in completion.retrievals:
        start, end = (position - prompt_length for position in retrieval.grounded_span)
        nsp = max(written, retrieval.position - prompt_length)
        free_text = _decode(tokenizer, tokens[written:nsp])
        grounded_text = _decode(tokenizer, tokens[start:end]).strip()
        numbers = [citation_numbers.setdefault(id, len(citation_numbers) + 1) for id in retrieval.passage_ids]
        marks = "".join(f"[{number}]" for number in numbers)
        pieces.append(free_text)
        pieces.extend(cite(sentence, marks) for sentence in split_sentences(grounded_text))
        written = end
        passages = [traced_passage(passage) for passage in retrieval.passages]
        retrievals.append({"passages": passages, "scores": retrieval.scores, "grounded_text": grounded_text})
    pieces.append(_decode(tokenizer, tokens[written:]))
    return {
        **{name: question[name] for name in ("id", "dataset", "input", "answers", "provenance")},
        "output": completion.text,
        "output_with_citations": " ".join(piece.strip() for piece in pieces if piece.strip()),
        "cited_text": completion.cited_text,
        "retrievals": retrievals,
        "num_generated_tokens": completion.num_generated_tokens,
    }


def cite(sentence: str, marks: str) -> str:
    """Insert `marks` before the closing punctuation of a sentence."""
    text = re.sub(r"[.!?]*[\"'”’)\]]*$", "", sentence, count=1)
    return f"{text} {marks}{sentence[len(text) :]}"


# ---------------------------------------------------------------------- how questions retrieve


def retrieval_settings(
    mode: str,
    questions: list[dict],
    index: Retriever | None = None,
    candidates: list[list[str]] | None = None,
    top_k: int = 1,
    max_retrievals: int | None = None,
    seed: int = 0,
) -> RetrievalConfig:
    """
    Return how the questions of an evaluation retrieve.

    Args:
        mode (`str`): one of

            - `"retrieval"`: Gen decides when to retrieve, and its query embedding decides what.
            - `"forced"`: the same, but every answer begins with `[NSP]`.
            - `"off"`: `[NSP]` is never emitted.
            - `"gold"`: every answer begins with `[NSP]` and gets the passages of the first evidence set of
              `provenance`, in order.
            - `"wrong"`: the same, but with as many passages that are not gold, see [`wrong_passages`].
        questions, index, candidates, top_k, max_retrievals, seed: see [`answer`].

    Raises:
        `ValueError`: for an unknown mode; with counts, for questions without provenance in modes `"gold"` and
            `"wrong"`, and for questions for which the index has too few wrong passages.
    """
    answering_modes = [name for name in MODES if name != QUERY]
    if mode not in answering_modes:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(answering_modes)}.")
    if mode == "off":
        return RetrievalConfig(forbid_nsp=True)
    if mode in SEARCHING:
        return RetrievalConfig(top_k, max_retrievals, force_nsp_first=mode == "forced", candidates=candidates)
    num_without = sum(not question["provenance"] for question in questions)
    if num_without:
        raise ValueError(
            f"{num_without} of {len(questions)} questions have no provenance: mode {mode!r} needs gold passages."
        )
    if mode == "gold":
        passages = [question["provenance"][0] for question in questions]
    else:
        assert index is not None, "mode 'wrong' reads the passages of an index"
        passages = wrong_passages(questions, index, seed)
    return RetrievalConfig(force_nsp_first=True, passages=passages)


def wrong_passages(questions: list[dict], index: Retriever, seed: int = 0) -> list[list[str]]:
    """
    Draw for each question as many random passages as its first evidence set holds, none of them gold.

    They are candidates of the question, and passages of the index if it has too few of those.

    Returns:
        `list[list[str]]`: the ids of each question's passages. They depend on the seed and the question alone.

    Raises:
        `ValueError`: if the index holds fewer wrong passages than that, with counts.
    """
    rows = index.live_rows()
    passages = []
    for question in questions:
        generator = random.Random(f"{seed} {question['id']}")
        passages.append(_draw_wrong_passages(question, index, rows, generator))
    pairs = zip(passages, questions, strict=True)
    num_short = sum(len(ids) < len(question["provenance"][0]) for ids, question in pairs)
    if num_short:
        raise ValueError(
            f"The index has too few wrong passages for {num_short} of {len(questions)} questions: mode 'wrong' gives "
            "each as many as its first evidence set holds."
        )
    return passages


def _draw_wrong_passages(
    question: dict, index: Retriever, rows: NDArray[np.int64], generator: random.Random
) -> list[str]:
    gold = gold_ids(question)
    count = len(question["provenance"][0])
    candidates = dict.fromkeys(question.get("candidates") or [])
    wrong = [id for id in candidates if id not in gold]
    passages = generator.sample(wrong, min(count, len(wrong)))
    if len(passages) < count:
        excluded = gold.union(passages)
        num_rows = min(len(rows), count + len(excluded))  # enough even if all excluded passages are among them
        drawn = index.get_passages(rows[generator.sample(range(len(rows)), num_rows)])
        others = [passage["id"] for passage in drawn if passage["id"] not in excluded]
        passages += generator.sample(others, min(count - len(passages), len(others)))
    return passages


# ---------------------------------------------------------------------- loss of the reference answers


def ntp_loss(model: CoSupForCausalLM, instances: list[dict]) -> Mean:
    """
    Return the NTP loss of training instances, such as those of [`reference_instances`].

    Returns:
        [`Mean`] over trained tokens, in nats.
    """
    sums, weights = [], []
    for instance in tqdm(instances, desc="NTP loss", unit="instance"):
        tokenized = tokenize_instance(instance, model.tokenizer, model.emb_seq_tokenizer, model.config)
        input_ids = torch.tensor([tokenized["input_ids"]], device=model.device)  # (1, T)
        labels = torch.tensor([tokenized["labels"]], device=model.device)  # (1, T)
        num_trained = int((labels[:, 1:] != -100).sum())
        with evaluating(model), torch.no_grad():
            loss = model(input_ids=input_ids, labels=labels, output_query_embeds=False).ntp_loss
        sums.append(float(loss) * num_trained)
        weights.append(num_trained)
    return Mean(sums, weights)


def reference_instances(questions: list[dict], corpus: list[dict]) -> list[dict]:
    """
    Turn evaluation instances into training instances. The text is the first answer, grounded on the first passage of
    the first evidence set, or free text if there is no provenance.
    """
    passage_of = {passage["id"]: passage for passage in corpus}
    instances = []
    for question in questions:
        passage = passage_of[question["provenance"][0][0]] if question["provenance"] else None
        segment = {"text": question["answers"][0], "passage": passage}
        instances.append({**question, "segments": [segment]})
    return instances


# ---------------------------------------------------------------------- helpers


def prompt_ids(model: CoSupForCausalLM, question: dict) -> list[int]:
    """Return the token ids of a question, as the chat template renders it."""
    return list(encode_prompt(model.tokenizer, question["input"], question["instruction"]))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True))  # only a batch would give a list of texts
