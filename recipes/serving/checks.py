"""The checks of a request, before anything is computed; each names the setting first, and what was expected."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from modeling_cosup import CoSupConfig
from modeling_cosup.passages_cosup import check_title_and_text

from serving.engine import GenerationRequest, UnsupportedSetting

_SEEDS = (-(2**63), 2**64 - 1)  # that torch and vLLM take


def check_request(request: GenerationRequest, config: CoSupConfig, context_length: int, has_index: bool) -> None:
    """
    Check everything but the ids of candidates and given passages.

    Args:
        request ([`GenerationRequest`]): what a client wants.
        config ([`CoSupConfig`]): of the model.
        context_length (`int`): the most positions that Gen reads.
        has_index (`bool`): there is an index to search.

    Raises:
        [`UnsupportedSetting`]: names the setting.
    """
    _check_prompt(request.prompt_ids, config.get_text_config().vocab_size, context_length)
    _check_integer("max_new_tokens", request.max_new_tokens, 1)
    _check_number("temperature", request.temperature, 0)
    _check_number("top_p", request.top_p, 0, 1)
    if request.top_p == 0:
        raise UnsupportedSetting("top_p is 0, expected a number above 0; temperature=0 takes the best token.")
    if request.seed is not None:
        _check_integer("seed", request.seed, *_SEEDS)
    if request.num_logprobs is not None:
        _check_integer("num_logprobs", request.num_logprobs, 0)
    if request.deadline is not None:
        _check_number("deadline", request.deadline)
    retrieval = request.retrieval
    for name in ("candidates", "passages"):
        entries = getattr(retrieval, name)
        if entries is not None and len(entries) != 1:
            raise UnsupportedSetting(f"{name} has {len(entries)} entries, expected one, for this prompt.")
    if has_index:
        return
    if retrieval.candidates is not None:
        raise UnsupportedSetting("candidates: this server has no index to search.")
    passages = None if retrieval.passages is None else retrieval.passages[0]
    if any(isinstance(passage, str) for passage in passages or ()):
        expected = "give objects with text and title"
        raise UnsupportedSetting(f"passages: this server has no index to look ids up; {expected}.")
    if retrieval.force_nsp_first and retrieval.passages is None:
        raise UnsupportedSetting("force_nsp_first: this server has no index to search.")


def _check_prompt(ids: Sequence[int], vocab_size: int, context_length: int) -> None:
    if not ids:
        raise UnsupportedSetting("prompt_ids is empty, expected at least one token.")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise UnsupportedSetting(
            f"prompt_ids holds the token ids {min(ids)} to {max(ids)}, but Gen knows 0 to {vocab_size - 1}."
        )
    if len(ids) >= context_length:
        raise UnsupportedSetting(
            f"prompt_ids has {len(ids):,} tokens, but Gen reads {context_length:,}: there is no room to write."
        )


def _check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or value < least or (most is not None and value > most):
        expected = f"{least} or more" if most is None else f"from {least} to {most}"
        raise UnsupportedSetting(f"{name} is {value!r}, expected an integer, {expected}.")


def _check_number(name: str, value: object, least: float = -math.inf, most: float = math.inf) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not least <= value <= most:
        expected = "a number"
        if most < math.inf:
            expected = f"a number from {least} to {most}"
        elif least > -math.inf:
            expected = f"a number, {least} or more"
        raise UnsupportedSetting(f"{name} is {value!r}, expected {expected}.")


def check_passages(passages: Sequence[dict[str, Any]]) -> None:
    """Raise [`UnsupportedSetting`] unless all passages have a text, and a title if any, that are texts."""
    for number, passage in enumerate(passages):
        try:
            check_title_and_text(passage, f"passages[{number}]")
        except (TypeError, ValueError, AttributeError) as error:
            raise UnsupportedSetting(f"passages: {error}") from error
