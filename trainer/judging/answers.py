"""Ask a model the questions of an evaluation set: what its query embeddings find, and what it retrieves and writes."""

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from modeling_cosup import Completion, CoSupForCausalLM, RetrievalConfig, Retriever
from modeling_cosup.index_build_cosup import evaluating
from modeling_cosup.tokenization_cosup import encode_prompt, pad_rows

from ..data import tokenize_instance
from .figures import MODES, QUERY
from .grounding import split_sentences
from .intervals import Mean
from .matching import gold_ids

RANKED = 100  # passages of a ranking over the whole corpus


# ---------------------------------------------------------------------- what the query embedding finds


def embed_queries(model: CoSupForCausalLM, questions: list[dict], batch_size: int = 32) -> torch.Tensor:
    """
    Query embeddings of questions: the hidden state at an `[NSP]` right after the prompt.

    Returns:
        `torch.FloatTensor` of shape `(len(questions), h)` on the CPU.
    """
    prompts = [[*_prompt(model, question), model.config.nsp_token_id] for question in questions]
    embeds = torch.empty(len(prompts), model.config.embedding_size)
    with evaluating(model), torch.no_grad():
        for rows, batch in _batches(model, prompts, batch_size, "Embedding questions"):
            if model.config.query_from == "gen":
                embeds[rows] = model(**batch, return_logits=False, use_cache=False).query_embeds.float().cpu()
            else:  # what an encoder reads, Gen need not
                embeds[rows] = model.encode_queries(**batch).float().cpu()
    return embeds


def rank_passages(
    model: CoSupForCausalLM, index: Retriever, questions: list[dict], batch_size: int = 32, pools: bool = False
) -> list[dict]:
    """
    Rankings of passages by the query embedding of each question.

    Args:
        model ([`CoSupForCausalLM`]), index ([`Retriever`]).
        questions (`list[dict]`): evaluation instances.
        batch_size (`int`): questions at once.
        pools (`bool`): also rank the `candidates` of each question.

    Returns:
        `list[dict]`: `{"id", "corpus"}`: passage ids, best first, the nearest 100 of the index; with `pools` also
        `"pool"`: all candidates.
    """
    queries = embed_queries(model, questions, batch_size)
    rows = {"corpus": index.search(queries, k=RANKED)[1]}
    if pools:
        candidates = [index.rows_of(question["candidates"]) for question in questions]
        longest = max(map(len, candidates), default=1)
        rows["pool"] = index.search(queries, k=longest, candidates=candidates)[1]
    rankings = []
    for i, question in enumerate(questions):
        ranking = {"id": question["id"]}
        for scope, nearest in rows.items():
            there = nearest[i][nearest[i] >= 0]  # an approximate search may find fewer
            ranking[scope] = [passage["id"] for passage in index.get_passages(there)]
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
    output_file: str | Path | None = None,
    on_completion: Callable[[Completion], dict | str | None] | None = None,
    show_progress_bar: bool = True,
) -> list[dict]:
    """
    Answers to questions, with their traces.

    Args:
        model (`CoSupForCausalLM`), questions (`list[dict]`): evaluation instances.
        index ([`Retriever`]): searched or read, unless the mode is `"off"`.
        mode (`str`): see [`retrieval_settings`].
        batch_size, max_new_tokens (`int`): as in generate().
        candidates (`list`, *optional*): for each question the ids of the passages among which it searches.
        top_k (`int`), max_retrievals (`int`, *optional*): of [`RetrievalConfig`], where the model searches.
        seed (`int`): of mode `"wrong"`.
        output_file, on_completion, show_progress_bar: as in generate_many().

    Returns:
        `list[dict]`: see [`as_prediction`].
    """
    prompts = [_prompt(model, question) for question in questions]
    settings = retrieval_settings(mode, questions, index, candidates, top_k, max_retrievals, seed)
    with evaluating(model), torch.no_grad():
        completions = model.generate_many(
            prompts,
            retriever=None if mode == "off" else index,
            retrieval_config=settings,
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
        predictions.append({**as_prediction(question, completion, len(prompt), model.tokenizer), "mode": mode})
    return predictions


def as_prediction(question: dict, completion: Completion, prompt_length: int, tokenizer) -> dict:
    """
    A question and its answer with the trace: a line of predictions.jsonl, which everything that judges reads.

    Args:
        question (`dict`): evaluation instance.
        completion ([`Completion`]): what generate_many() gave.
        prompt_length (`int`): tokens of the prompt, from whose first token the positions of the trace count.
        tokenizer: the model's.

    Returns:
        `dict`: `id`, `dataset`, `input`, `answers`, `provenance` of the question; `output`: what the model wrote,
        without passages; `output_with_citations`: the same as ALCE wants it, with `[n]` before the end of each
        grounded sentence, where n counts the distinct passages; `cited_text`: for people, with the passages below;
        `retrievals`: each `{"passages": [{"id", "title", "text"}], "scores", "grounded_text"}`;
        `num_generated_tokens`.
    """
    tokens = completion.token_ids
    numbers: dict[str, int] = {}
    pieces, retrievals, written = [], [], 0
    for retrieval in completion.retrievals:
        start, end = (position - prompt_length for position in retrieval.grounded_span)
        nsp = max(written, retrieval.position - prompt_length)
        marks = "".join(f"[{numbers.setdefault(id, len(numbers) + 1)}]" for id in retrieval.passage_ids)
        grounded = tokenizer.decode(tokens[start:end], skip_special_tokens=True).strip()
        pieces.append(tokenizer.decode(tokens[written:nsp], skip_special_tokens=True))
        pieces.extend(cite(sentence, marks) for sentence in split_sentences(grounded))
        written = end
        passages = [{name: passage[name] for name in ("id", "title", "text")} for passage in retrieval.passages]
        retrievals.append({"passages": passages, "scores": retrieval.scores, "grounded_text": grounded})
    pieces.append(tokenizer.decode(tokens[written:], skip_special_tokens=True))
    return {
        **{name: question[name] for name in ("id", "dataset", "input", "answers", "provenance")},
        "output": completion.text,
        "output_with_citations": " ".join(piece.strip() for piece in pieces if piece.strip()),
        "cited_text": completion.cited_text,
        "retrievals": retrievals,
        "num_generated_tokens": completion.num_generated_tokens,
    }


def cite(sentence: str, marks: str) -> str:
    """A sentence with `marks` before its closing punctuation."""
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
    How the questions of an evaluation retrieve.

    Args:
        mode (`str`): `"retrieval"`: Gen decides when, and its query finds what. `"forced"`: the same, but every answer
            begins with `[NSP]`. `"off"`: `[NSP]` is never emitted. `"gold"`: every answer begins with `[NSP]` and gets
            the passages of the first set of `provenance`, in order. `"wrong"`: the same with as many passages that are
            not gold, drawn at random from the question's `candidates`, or from the index where it has none.
        others: see [`answer`].

    Raises:
        `ValueError`: for an unknown mode; with counts, for questions without provenance in `"gold"` and `"wrong"`, or
            without a wrong passage to draw.
    """
    answering = [name for name in MODES if name != QUERY]
    if mode not in answering:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(answering)}.")
    if mode == "off":
        return RetrievalConfig(forbid_nsp=True)
    if mode in ("retrieval", "forced"):
        return RetrievalConfig(top_k, max_retrievals, force_nsp_first=mode == "forced", candidates=candidates)
    if without := sum(not question["provenance"] for question in questions):
        raise ValueError(
            f"{without} of {len(questions)} questions have no provenance: mode {mode!r} needs gold passages."
        )
    if mode == "gold":
        passages = [question["provenance"][0] for question in questions]
    else:
        assert index is not None, "mode 'wrong' reads the passages of an index"
        passages = wrong_passages(questions, index, seed)
    return RetrievalConfig(force_nsp_first=True, passages=passages)


def wrong_passages(questions: list[dict], index: Retriever, seed: int = 0) -> list[list[str]]:
    """
    For each question as many ids of random passages that are not gold as its first set of `provenance` holds. Which
    ones, depends on seed and question alone.
    """
    rows = index.live_rows()
    passages = [_wrong_passages(x, index, rows, random.Random(f"{seed} {x['id']}")) for x in questions]
    if without := sum(not ids for ids in passages):
        raise ValueError(
            f"{without} of {len(questions)} questions have no passage but gold ones: "
            "mode 'wrong' has nothing to give them."
        )
    return passages


def _wrong_passages(question: dict, index: Retriever, rows: NDArray[np.int64], generator: random.Random) -> list[str]:
    gold, count = gold_ids(question), len(question["provenance"][0])
    if question.get("candidates"):
        wrong = [id for id in question["candidates"] if id not in gold]
    else:
        drawn = generator.sample(
            range(len(rows)), min(len(rows), count + len(gold))
        )  # enough, even with all gold ones
        wrong = [passage["id"] for passage in index.get_passages(rows[drawn]) if passage["id"] not in gold]
    return generator.sample(wrong, min(count, len(wrong)))


# ---------------------------------------------------------------------- loss of the reference answers


def ntp_loss(model: CoSupForCausalLM, instances: list[dict]) -> Mean:
    """
    NTP loss of training instances, e.g. of [`reference_instances`].

    Returns:
        [`Mean`] over trained tokens, in nats.
    """
    sums, weights = [], []
    for instance in tqdm(instances, desc="NTP loss", unit="instance"):
        tokenized = tokenize_instance(instance, model.tokenizer, model.emb_seq_tokenizer, model.config)
        ids, labels = (torch.tensor([tokenized[name]], device=model.device) for name in ("input_ids", "labels"))
        count = int((labels[:, 1:] != -100).sum())
        with evaluating(model), torch.no_grad():
            loss = model(input_ids=ids, labels=labels, output_query_embeds=False).ntp_loss
        sums.append(float(loss) * count)
        weights.append(count)
    return Mean(sums, weights)


def reference_instances(questions: list[dict], corpus: list[dict]) -> list[dict]:
    """
    Evaluation instances as training instances: the first answer on the first passage of the first set of `provenance`,
    or as free text where there is none.
    """
    passages = {passage["id"]: passage for passage in corpus}
    instances = []
    for question in questions:
        passage = passages[question["provenance"][0][0]] if question["provenance"] else None
        instances.append({**question, "segments": [{"text": question["answers"][0], "passage": passage}]})
    return instances


# ---------------------------------------------------------------------- helpers


def _prompt(model: CoSupForCausalLM, question: dict) -> list[int]:
    return list(encode_prompt(model.tokenizer, question["input"], question["instruction"]))


def _batches(
    model: CoSupForCausalLM, prompts: list[list[int]], batch_size: int, description: str
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """`(rows, {"input_ids", "attention_mask"})`, padded on the left, prompts of similar length together."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    with tqdm(total=len(prompts), desc=description, unit="question") as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = pad_rows([prompts[row] for row in rows], side="left", device=model.device)
            yield rows, {"input_ids": ids, "attention_mask": mask}
            bar.update(len(rows))
