"""
The bodies of requests: OpenAI's fields, and `retrieval`.

A field of OpenAI that this server cannot honour is refused by name, unless its value asks for nothing; a field that
never changes an answer is ignored. A field that OpenAI does not have is refused.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from modeling_cosup import RetrievalConfig
from modeling_cosup.metadata_cosup import check_metadata
from modeling_cosup.passages_cosup import blank

MAX_CHOICES = 16
MAX_PROMPTS = 64  # of a completion
MAX_INPUTS = 2048  # of embeddings
MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 256  # characters
MAX_PASSAGES = 64  # for an [NSP], and given to a prompt
MAX_PASSAGE_CHARACTERS = 100_000  # of a passage, and of all given ones together: others may wait for their encoding
MAX_CANDIDATES = 10_000
MAX_MESSAGES = 1024
LARGEST_ID = 2**31 - 1
LARGEST_SEED = 2**63 - 1

NEUTRAL: dict[str, list[Any]] = {  # values that ask for nothing; null always is one
    "audio": [],
    "best_of": [1],
    "echo": [False],
    "frequency_penalty": [0],
    "function_call": ["none"],
    "functions": [[]],
    "logit_bias": [{}],
    "modalities": [["text"]],
    "moderation": [],
    "prediction": [],
    "presence_penalty": [0],
    "reasoning_effort": ["none"],
    "response_format": [{"type": "text"}],
    "suffix": [""],
    "tool_calls": [[]],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "verbosity": ["medium"],
    "web_search_options": [],
}


def _check_neutral(value: Any, info: ValidationInfo) -> Any:
    """Refuse a value that asks for what this server cannot do."""
    assert info.field_name is not None
    allowed = NEUTRAL[info.field_name]
    for neutral in allowed:
        if value == neutral and isinstance(value, bool) == isinstance(neutral, bool):
            return value
    if value is None:
        return value
    expected = " or ".join(["null", *map(repr, allowed)])
    raise ValueError(f"this server does not support it, expected {expected}")


def _check_characters(text: str) -> str:
    """Refuse half a surrogate pair: JSON can hold it, no text can."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half a surrogate pair is no character")
    return text


def _check_not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError(f"it is {blank(text)}, expected a text")
    return text


def _check_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Refuse metadata that no passage may have, before it is sent to the process that decodes."""
    try:
        check_metadata(metadata, "")
    except ValueError as error:
        raise ValueError(str(error).removeprefix(": ").removesuffix(".")) from error
    return metadata


Text = Annotated[str, AfterValidator(_check_characters)]
Neutral = Annotated[Any, AfterValidator(_check_neutral)]
TokenIds = list[Annotated[int, Field(ge=0, le=LARGEST_ID)]]


class Body(BaseModel):
    """A JSON object without unknown fields, whose values are not converted; null stands for a field's default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            field = cls.model_fields.get(name)
            has_default = field is not None and not field.is_required()
            if value is not None or not has_default:
                kept[name] = value
        return kept


# ---------------------------------------------------------------------- parts of bodies


class TextPart(Body):
    """A part of a message; images, sound and files are refused."""

    type: Literal["text"]
    text: str


class PassageBody(Body):
    """A passage that the client gives; one of an answer's `retrievals` can be sent back as it is."""

    text: Annotated[Text, AfterValidator(_check_not_blank), Field(min_length=1, max_length=MAX_PASSAGE_CHARACTERS)]
    title: Annotated[Text, Field(max_length=MAX_PASSAGE_CHARACTERS)] = ""
    id: Text | None = None
    metadata: Annotated[dict[str, Any], AfterValidator(_check_metadata)] | None = None

    def passage(self) -> dict[str, Any]:
        """Return the passage as `RetrievalConfig.passages` takes it."""
        return {"id": self.id, "title": self.title, "text": self.text, "metadata": self.metadata}


# pydantic puts them into the path of an error; they are removed before the client sees it
PASSAGE_TAG, ID_TAG = "(passage)", "(id)"


def _kind_of_passage(value: Any) -> str | None:
    """Return the tag of a passage, or of its id."""
    if isinstance(value, str):
        return ID_TAG
    if isinstance(value, dict | PassageBody):
        return PASSAGE_TAG
    return None


PassageOrId = Annotated[
    Annotated[PassageBody, Tag(PASSAGE_TAG)] | Annotated[Text, Tag(ID_TAG)],
    Discriminator(
        _kind_of_passage,
        custom_error_type="passage_type",
        custom_error_message="expected an object with text and title, or the id of a passage",
    ),
]


def _one_text(content: Any, info: ValidationInfo) -> Any:
    """Return the text of a message whose content is a text, a list of text parts, or null of an assistant."""
    if content is None and info.data.get("role") == "assistant":  # a refusal
        return ""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"this model reads texts alone, found a part of type {str(kind)[:40]!r}")
        texts.append(part["text"])
    return "\n".join(texts)


class Message(Body):
    """A message of a chat. What else an assistant's message holds, such as its citations, is ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_one_text, json_schema_input_type=str | list[TextPart] | None)]
    name: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Neutral = None
    refusal: Any = None
    retrievals: Any = None
    tool_calls: Neutral = None


def _stop_strings(value: Any) -> Any:
    """Return stop strings as a list, whether one or a list was given."""
    if isinstance(value, str):
        value = [value]
    if value is not None and not isinstance(value, list):
        raise ValueError("expected a text, or a list of texts")
    if value is not None and "" in value:
        raise ValueError("it holds an empty text, expected texts at which an answer ends")
    return value


StopString = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopStrings = Annotated[
    Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)],
    BeforeValidator(_stop_strings, json_schema_input_type=StopString | list[StopString]),
]


def _prompts(value: Any) -> Any:
    """Return a list of prompts, each a text or token ids, for any of the forms of `prompt`."""
    if isinstance(value, str) or _are_token_ids(value):
        return [value]
    if isinstance(value, list) and all(isinstance(prompt, str) or _are_token_ids(prompt) for prompt in value):
        return value
    if isinstance(value, list) and [] in value:
        raise ValueError(f"entry {value.index([])} is empty, expected at least one token id")
    raise ValueError("expected a text, token ids, or a list of texts or of token ids")


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(id) is int and id >= 0 for id in value)


class StreamOptions(Body):
    """What a stream holds in addition."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class RetrievalBody(Body):
    """How the answer retrieves: fields of [`RetrievalConfig`]; `candidates` and `passages` are those of the prompt."""

    top_k: Annotated[int, Field(ge=1, le=MAX_PASSAGES)] = 1
    max_retrievals: Annotated[int, Field(ge=0, le=LARGEST_ID)] | None = None
    force_nsp_first: bool = False
    forbid_nsp: bool = False
    candidates: Annotated[list[Text], Field(max_length=MAX_CANDIDATES)] | None = None
    passages: Annotated[list[PassageOrId], Field(max_length=MAX_PASSAGES)] | None = None
    min_score: float | None = None
    no_repeat_passages: bool = False
    forget_passages: Literal["recompute", "mask"] | None = None

    @field_validator("passages")
    @classmethod
    def _check_passages(cls, passages: list[PassageBody | str] | None) -> list[PassageBody | str] | None:
        given = [passage for passage in passages or () if isinstance(passage, PassageBody)]
        num_characters = sum(len(passage.title) + len(passage.text) for passage in given)
        if num_characters > MAX_PASSAGE_CHARACTERS:
            raise ValueError(f"{num_characters:,} characters together, expected at most {MAX_PASSAGE_CHARACTERS:,}")
        return passages

    def config(self) -> RetrievalConfig:
        """
        Return the settings for one prompt.

        Raises:
            `ValueError`: for settings that exclude each other.
        """
        candidates = None if self.candidates is None else [self.candidates]
        passages = None
        if self.passages is not None:
            passages = [[passage if isinstance(passage, str) else passage.passage() for passage in self.passages]]
        return RetrievalConfig(
            top_k=self.top_k,
            max_retrievals=self.max_retrievals,
            force_nsp_first=self.force_nsp_first,
            forbid_nsp=self.forbid_nsp,
            candidates=candidates,
            passages=passages,
            min_score=self.min_score,
            no_repeat_passages=self.no_repeat_passages,
            forget_passages=self.forget_passages,
        )


# ---------------------------------------------------------------------- bodies


class GenerationBody(Body):
    """What bodies of chats and completions share; without a value a field has the server's default."""

    model: Text
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] | None = None
    stop: StopStrings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    retrieval: RetrievalBody | None = None
    frequency_penalty: Neutral = None
    logit_bias: Neutral = None
    presence_penalty: Neutral = None
    user: Any = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream=true")
        return self

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatBody(GenerationBody):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    audio: Neutral = None
    function_call: Neutral = None
    functions: Neutral = None
    modalities: Neutral = None
    moderation: Neutral = None
    prediction: Neutral = None
    reasoning_effort: Neutral = None
    response_format: Neutral = None
    tool_choice: Neutral = None
    tools: Neutral = None
    verbosity: Neutral = None
    web_search_options: Neutral = None
    # they change no answer
    metadata: Any = None
    parallel_tool_calls: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs=true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens to report; `None` for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerationBody):
    """The body of `/v1/completions`."""

    prompt: Annotated[
        Annotated[list[Text | TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)],
        BeforeValidator(_prompts, json_schema_input_type=str | list[str] | TokenIds | list[TokenIds]),
    ]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Neutral = None
    echo: Neutral = None
    suffix: Neutral = None

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens to report; `None` for no log-probabilities."""
        return self.logprobs


def _passages(value: Any) -> Any:
    """Return a list of passages for any of the forms of `input`."""
    values = value if isinstance(value, list) else [value]
    passages = []
    for number, passage in enumerate(values):
        if not isinstance(passage, str | dict):
            raise ValueError("expected a text, an object with text and title, or a list of them; no token ids")
        if isinstance(passage, str) and not passage.strip():  # the path of the error would name a passage
            where = f"entry {number}" if isinstance(value, list) else "it"
            raise ValueError(f"{where} is {blank(passage)}, expected a text")
        passages.append({"text": passage} if isinstance(passage, str) else passage)
    return passages


class EmbeddingBody(Body):
    """The body of `/v1/embeddings`; `input_type` is `"passage"` or `"query"`."""

    model: Text
    input: Annotated[
        Annotated[list[PassageBody], Field(min_length=1, max_length=MAX_INPUTS)],
        BeforeValidator(_passages, json_schema_input_type=str | PassageBody | list[str | PassageBody]),
    ]
    input_type: Literal["passage", "query"] = "passage"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: Any = None
