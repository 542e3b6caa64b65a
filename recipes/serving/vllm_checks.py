"""What [`VllmEngine`] checks when it starts: the settings of the model, and that the servers serve its parts."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file

from modeling_cosup import CoSupForCausalLM, Retriever
from modeling_cosup.architectures_cosup import lm_logits
from modeling_cosup.files_cosup import read_json
from modeling_cosup.tokenization_cosup import (
    added_tokens,
    encode_passages_for_emb_seq,
    encode_prompt,
    query_length,
)

from serving.vllm_client import VllmClient

MOST_LOGPROBS = 20  # what a vLLM server gives unless it is told otherwise
PROBE = "Which passage comes next?"
# how far the server's log-probabilities may be from those of the embedded state: half precision stays below
LOGPROB_TOLERANCE = 0.3
COSINE_TOLERANCE = 0.002  # between a stored embedding and the server's: half precision stays below
# settings of generation_config.json that change what is decided and that no completion of vLLM takes
WITHOUT_EQUIVALENT = (
    *("bad_words_ids", "begin_suppress_tokens", "exponential_decay_length_penalty", "forced_bos_token_id"),
    *("forced_eos_token_id", "max_time", "min_length", "min_new_tokens", "no_repeat_ngram_size", "sequence_bias"),
    *("stop_strings", "watermarking_config", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"),
    *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
)
DEFAULT_TOP_K = 50  # that generate() takes if generation_config.json has none
NEUTRAL = {"typical_p": 1.0, "encoder_repetition_penalty": 1.0}  # values that change nothing, other than 0


# ---------------------------------------------------------------------- settings


def check_generation_config(model: CoSupForCausalLM) -> tuple[frozenset[int], dict[str, Any]]:
    """
    Return the ids that end an answer, and the settings of every completion.

    Raises:
        `ValueError`: names a setting of `generation_config.json` that vLLM cannot honour.
    """
    generation = model.generation_config
    for name in WITHOUT_EQUIVALENT:
        value = getattr(generation, name, None)
        if value and value != NEUTRAL.get(name):
            raise ValueError(f"generation_config.json: {name}={value!r} is not available with vLLM.")
    if not set(generation.suppress_tokens or ()) <= {model.config.cs_token_id}:  # [Cs] is banned anyway
        raise ValueError(
            f"generation_config.json: suppress_tokens={generation.suppress_tokens} is not available with vLLM, except"
            " for [Cs]."
        )
    if generation.num_beams not in (None, 1) or generation.guidance_scale not in (None, 1):
        raise ValueError("generation_config.json: num_beams and guidance_scale are not available with vLLM.")
    ends = generation.eos_token_id
    if not isinstance(ends, list):
        ends = [] if ends is None else [ends]
    settings = {
        "ignore_eos": True,  # the ends are stop tokens: vLLM's own choice may differ
        "top_k": DEFAULT_TOP_K if generation.top_k is None else generation.top_k,
        "min_p": generation.min_p or 0.0,
        "repetition_penalty": generation.repetition_penalty or 1.0,
    }
    return frozenset(ends), settings


def control_tokens(model: CoSupForCausalLM) -> dict[int, str]:
    """
    Return `[NSP]`, `[Cs]` and `[CE]` by their ids; vLLM takes banned tokens by name, and encodes them itself.

    Raises:
        `ValueError`: if the model has none, or the tokenizer does not read a name as its token.
    """
    tokens: dict[int, str] = {}
    for token_id in (model.config.nsp_token_id, model.config.cs_token_id, model.config.ce_token_id):
        if token_id is None:
            raise ValueError("The model has no control tokens: it is plain Gen, which vLLM serves by itself.")
        token = cast(str, model.tokenizer.convert_ids_to_tokens(token_id))
        if model.tokenizer.encode(token, add_special_tokens=False) != [token_id]:
            raise ValueError(f"The tokenizer does not read {token!r} as one token, so vLLM could not ban it.")
        tokens[token_id] = token
    return tokens


# ---------------------------------------------------------------------- servers


async def check_servers(
    model: CoSupForCausalLM, gen: VllmClient, query: VllmClient, index: Retriever | None, context_length: int
) -> int:
    """
    Check that both servers serve this model, and return how many tokens Gen reads there, at most `context_length`.

    If Gen makes the queries, the state that `query` returns for a prompt must lead to the log-probabilities that `gen`
    returns for it, through the LM head of the checkpoint: then all three belong together. If Emb_seq makes them,
    `query` is checked as [`check_encoder`] does, but `gen` is only asked for a token with log-probabilities: no server
    returns a hidden state of it to compare them with.

    Raises:
        [`BackendFailed`]: names a server that does not answer.
        `ValueError`: names a server that serves something else or reads too little, and how that shows.
    """
    context_length = min(context_length, await gen.max_model_len())
    prompt = encode_prompt(model.tokenizer, PROBE)
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "logprobs": MOST_LOGPROBS}
    top: list[tuple[int, float]] = []
    async for decisions in gen.complete(body, stream=False):
        assert decisions[0].logprobs is not None  # the client checks that they come if they are asked for
        top = decisions[0].logprobs.top
    if model.config.query_from == "emb_seq":
        # A query has about as many tokens as Gen has read. A longer one, which is rare, fails alone.
        longest = min(query_length(model.emb_seq_tokenizer, model.config), context_length)
        await _check_encoder(model, query, index, longest, "query")
        return context_length
    context_length = min(context_length, await query.max_model_len())
    state = (await query.embed([prompt]))[0]  # (h,)
    _check_width(query, len(state), model.config.gen_config.get_text_config().hidden_size)
    distance = _logprob_distance(model, state, top)
    if not distance <= LOGPROB_TOLERANCE:
        raise ValueError(
            f"{gen.name} and {query.name} do not serve the Gen of this checkpoint, both: the log-probabilities of"
            f" the next token differ by {distance:.2f}. Serve what save_gen wrote of it, twice."
        )
    return context_length


def _logprob_distance(model: CoSupForCausalLM, state: np.ndarray, top: list[tuple[int, float]]) -> float:
    """
    Return how far the log-probabilities `top` are from those of the last hidden state `(h,)`, up to a constant.

    Of the checkpoint only the rows of the LM head of these tokens are read.
    """
    head = model.get_output_embeddings()
    ids = [token_id for token_id, _ in top]
    if not ids:
        return float("inf")
    names = {id(module): name for name, module in model.named_modules()}
    weight = read_weight(model, f"{names[id(head)]}.weight", ids)
    if weight is None:  # tied to the token embeddings, or too short for a server of another model: then they differ
        weight = read_weight(model, f"{names[id(model.get_input_embeddings())]}.weight", ids)
    if weight is None or weight.shape[1] != len(state):
        return float("inf")
    bias = read_weight(model, f"{names[id(head)]}.bias", ids)
    rows = nn.Linear(len(state), len(ids), bias=bias is not None)
    rows.weight = nn.Parameter(weight.float())
    if bias is not None:
        rows.bias = nn.Parameter(bias.float())
    head_of_rows: Any = SimpleNamespace(config=model.gen.config, get_output_embeddings=lambda: rows)
    with torch.no_grad():
        logits = lm_logits(head_of_rows, torch.from_numpy(state.copy())[None])[0]  # (n,)
    logprobs = torch.tensor([logprob for _, logprob in top])
    return float((logits - logits[0] - (logprobs - logprobs[0])).abs().max())


async def check_encoder(model: CoSupForCausalLM, encoder: VllmClient, index: Retriever | None) -> None:
    """
    Check that a server embeds passages as this model does: a passage of the index must find itself.

    Raises:
        [`BackendFailed`]: names a server that does not answer.
        `ValueError`: names a server of another model, or one that reads too little.
    """
    added = sum(map(len, added_tokens(model.emb_seq_tokenizer, model.config)))
    await _check_encoder(model, encoder, index, model.config.max_passage_length + added, "passage")


async def _check_encoder(
    model: CoSupForCausalLM, encoder: VllmClient, index: Retriever | None, longest: int, what: str
) -> None:
    """Check a server of Emb_seq, which must read `longest` tokens: so many may a passage or a query (`what`) have."""
    max_model_len = await encoder.max_model_len()
    if max_model_len < longest:
        raise ValueError(
            f"{encoder.name} reads {max_model_len} tokens, but a {what} may have {longest}, with BOS and EOS: serve"
            " it with a longer --max-model-len."
        )
    if index is None or not len(index):
        passage: dict[str, Any] = {"id": "", "title": "", "text": PROBE}
        row = None
    else:
        row = int(index.live_rows()[0])
        passage = index.get_passages([row])[0]
    ids = encode_passages_for_emb_seq(model.emb_seq_tokenizer, [passage], model.config)
    states = torch.from_numpy(await encoder.embed(ids))  # (1, h)
    _check_width(encoder, states.shape[1], model.config.embedding_size)
    if index is None or row is None:
        return
    embeds = model._normalize(states)
    scores, _ = index.search(embeds, candidates=[[row]])
    score, expected = float(scores[0, 0]), float(embeds[0] @ embeds[0])
    if not abs(score - expected) <= COSINE_TOLERANCE * expected:
        raise ValueError(
            f"{encoder.name} does not serve the Emb_seq that made the index: passage {passage['id']!r} scores"
            f" {score:.3f} with its own embedding, expected {expected:.3f}."
        )


def _check_width(server: VllmClient, width: int, expected: int) -> None:
    if width != expected:
        raise ValueError(
            f"{server.name} returns embeddings of width {width}, expected {expected}: it serves another model."
        )


# ---------------------------------------------------------------------- single weights of a checkpoint


def read_weight(model: CoSupForCausalLM, name: str, rows: list[int] | None = None) -> torch.Tensor | None:
    """
    Read one weight of the checkpoint that a model without weights was made from.

    Args:
        model ([`CoSupForCausalLM`]): from `model_without_weights`.
        name (`str`): of the weight.
        rows (`list[int]`, *optional*): the rows to read; nothing else is read then.

    Returns:
        `torch.Tensor`, or `None` if the checkpoint has no such weight, or the weight has no such row.
    """
    place = model.config._name_or_path
    options = {"_raise_exceptions_for_missing_entries": False}
    file = "model.safetensors"
    index_file = cached_file(place, "model.safetensors.index.json", **options)
    if index_file is not None:
        file = read_json(index_file)["weight_map"].get(name)
        if file is None:
            return None
    with safe_open(cached_file(place, file), framework="pt") as weights:
        if name not in weights.keys():
            return None
        if rows is None:
            return weights.get_tensor(name)
        weight = weights.get_slice(name)
        if max(rows) >= weight.get_shape()[0]:
            return None
        return torch.cat([weight[row : row + 1] for row in rows])
