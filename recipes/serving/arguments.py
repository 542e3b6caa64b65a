"""Options of `recipes/serve.py`."""

import math
import os
from dataclasses import dataclass, field
from typing import Literal

from shared.indexes import FAISS_HELP, INDEX_HELP, INDEX_URI_HELP

ENGINES = ("embedded", "vllm")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY_VARIABLE = "COSUP_API_KEY"
INDEX_TIMEOUT = 5.0  # seconds


@dataclass(kw_only=True)
class ServeArguments:
    """Model, engine, and limits of a server."""

    model: str = field(metadata={"local_or_hub": True, "help": "name or path of a CoSup checkpoint"})
    index: str | None = field(default=None, metadata={"help": f"{INDEX_HELP}; without it nothing is retrieved"})
    index_uri: str | None = field(default=None, metadata={"help": INDEX_URI_HELP})
    allow_faiss_files: bool = field(default=False, metadata={"help": FAISS_HELP, "flag": True})
    index_timeout: float | None = field(
        default=None,
        metadata={
            "help": f"seconds that a search in Milvus (--index_uri) may take, {INDEX_TIMEOUT:g} by default; after two "
            "attempts the request that needs it fails"
        },
    )
    engine: str = field(
        default="embedded",
        metadata={
            "help": "embedded: this machine generates; vllm: servers of vLLM, see --gen_url and --query_url; or "
            "module:function of your own, which takes these options and returns an engine"
        },
    )
    decode_in: Literal["process", "thread"] = field(
        default="process",
        metadata={
            "help": "where the embedded engine decodes: a process of its own, next to HTTP, or a thread of this one, "
            "which saves the memory of a second Python"
        },
    )
    gen_url: str | None = field(default=None, metadata={"help": "vLLM server that generates, http://host:8001/v1"})
    query_url: str | None = field(default=None, metadata={"help": "vLLM server that embeds, http://host:8002/v1"})
    encoder_url: str | None = field(
        default=None, metadata={"help": "vLLM server of what save_emb_seq wrote, for embeddings of passages"}
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": "address to listen on; 0.0.0.0 is open to the network: set --api_key"}
    )
    port: int = field(default=8000, metadata={"help": "port to listen on; 0 takes a free one"})
    api_key: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"keys, of which requests must bring one; also read from the variable {KEY_VARIABLE}, separated "
            "by commas, where other users of this machine do not see them"
        },
    )
    served_model_name: str | None = field(
        default=None, metadata={"help": "name by which requests call the model; defaults to its name or folder"}
    )
    dtype: str = field(default="auto", metadata={"help": "dtype of the weights, e.g. bfloat16 on a GPU"})
    load_emb_seq: bool = field(
        default=False, metadata={"help": "also load Emb_seq, for embeddings of passages", "flag": True}
    )
    max_running: int = field(default=32, metadata={"help": "answers that are generated at a time"})
    max_waiting: int = field(
        default=256, metadata={"help": "answers and embeddings that wait; further ones get status 429"}
    )
    max_batch_tokens: int | None = field(
        default=None, metadata={"help": "limit the answers at a time by the columns of their KV caches together"}
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "the most tokens of an answer; defaults to what Gen's context has room for"}
    )
    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "the most tokens of a prompt; defaults to Gen's context"}
    )
    max_body_bytes: int = field(default=4 * 2**20, metadata={"help": "the most bytes of a request's body"})
    request_timeout: float | None = field(
        default=None, metadata={"help": "seconds after which an unfinished answer fails; by default never"}
    )
    shutdown_timeout: float = field(
        default=30.0, metadata={"help": "seconds for running answers to finish after SIGTERM or Ctrl+C"}
    )
    cors_origins: list[str] = field(
        default_factory=list,
        metadata={"help": "origins of web pages that may call the server, e.g. http://localhost:3000, or *"},
    )
    log_prompts: bool = field(default=False, metadata={"help": "write prompts and answers to the log", "flag": True})

    def __post_init__(self) -> None:
        for name in ("max_running", "max_batch_tokens", "max_new_tokens", "max_prompt_tokens", "max_body_bytes"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"--{name} {limit}: expected at least 1.")
        if self.max_waiting < 0:
            raise ValueError(f"--max_waiting {self.max_waiting}: expected at least 0.")
        if not 0 <= self.shutdown_timeout < math.inf:
            raise ValueError(f"--shutdown_timeout {self.shutdown_timeout}: expected a finite number, at least 0.")
        if self.index_timeout is not None and not 0 < self.index_timeout < math.inf:
            raise ValueError(f"--index_timeout {self.index_timeout}: expected a finite number above 0.")
        if self.index_timeout is not None and self.index_uri is None and not self.has_own_engine:
            raise ValueError("--index_timeout is for an index in Milvus: give --index_uri.")
        if self.request_timeout is not None and not 0 < self.request_timeout < math.inf:
            expected = "a finite number above 0; leave it out for never"
            raise ValueError(f"--request_timeout {self.request_timeout}: expected {expected}.")
        self._check_keys()
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port {self.port}: expected 0 to 65535.")
        if self.engine not in ENGINES and not self.has_own_engine:
            raise ValueError(f"--engine {self.engine}: expected {', '.join(ENGINES)}, or module:function.")
        is_vllm = self.engine == "vllm"
        of_embedded = {"dtype": "auto", "load_emb_seq": False, "max_batch_tokens": None, "decode_in": "process"}
        for name, default in of_embedded.items():
            if is_vllm and getattr(self, name) != default:
                raise ValueError(f"--{name} is of --engine embedded.")
        for name in ("gen_url", "query_url", "encoder_url"):
            is_given = getattr(self, name) is not None
            if is_given and self.engine == "embedded":
                raise ValueError(f"--{name} is of --engine vllm.")
            if is_vllm and not is_given and name != "encoder_url":
                raise ValueError(f"--engine vllm needs --{name}.")

    def _check_keys(self) -> None:
        """Raise `ValueError` where keys were meant and none is there: the server would be open to everyone."""
        if not all(key.strip() for key in self.api_key):
            raise ValueError("--api_key: a key is empty; leave the option out for a server without keys.")
        if KEY_VARIABLE in os.environ and not self.keys:
            raise ValueError(f"{KEY_VARIABLE} is set but holds no key; unset it for a server without keys.")

    @property
    def has_own_engine(self) -> bool:
        """Whether `--engine` names a function of the user's, `module:function`."""
        module, _, function = self.engine.partition(":")
        return bool(module and function)

    @property
    def keys(self) -> list[str]:
        """The keys of `--api_key` and of the variable `KEY_VARIABLE`."""
        keys = [*self.api_key, *os.environ.get(KEY_VARIABLE, "").split(",")]
        return [key.strip() for key in keys if key.strip()]

    @property
    def is_open(self) -> bool:
        """Whether anyone in the network may use the server."""
        return self.host not in LOOPBACK and not self.keys
