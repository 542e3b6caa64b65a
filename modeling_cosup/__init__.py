"""The model that travels with a checkpoint: Gen, Emb_seq, their losses, the passage index and generate()."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_cosup import CoSupConfig
    from .datastore_cosup import KNNMemory
    from .loss_cosup import chunked_cross_entropy, info_nce, similarity_scores
    from .memory_cosup import Memory, MemoryConfig, TokenNeighbors
    from .milvus_cosup import MilvusPassageIndex
    from .mlp_memory_cosup import MLPMemory
    from .modeling_cosup import CoSupForCausalLM, CoSupOutput
    from .outputs_cosup import CoSupGenerateOutput
    from .queue_cosup import Completion
    from .retrieval_cosup import PassageIndex
    from .retriever_cosup import Retriever
    from .settings_cosup import RetrievalConfig
    from .streaming_cosup import RetrievalStreamer, StreamEvent
    from .trace_cosup import Retrieval, RetrievalError

_MODULES = {
    "CoSupConfig": "configuration_cosup",
    "CoSupForCausalLM": "modeling_cosup",
    "CoSupGenerateOutput": "outputs_cosup",
    "CoSupOutput": "modeling_cosup",
    "Completion": "queue_cosup",
    "Memory": "memory_cosup",
    "KNNMemory": "datastore_cosup",
    "MLPMemory": "mlp_memory_cosup",
    "MemoryConfig": "memory_cosup",
    "MilvusPassageIndex": "milvus_cosup",
    "PassageIndex": "retrieval_cosup",
    "Retrieval": "trace_cosup",
    "RetrievalConfig": "settings_cosup",
    "RetrievalError": "trace_cosup",
    "RetrievalStreamer": "streaming_cosup",
    "Retriever": "retriever_cosup",
    "StreamEvent": "streaming_cosup",
    "TokenNeighbors": "memory_cosup",
    "chunked_cross_entropy": "loss_cosup",
    "info_nce": "loss_cosup",
    "similarity_scores": "loss_cosup",
}

__all__ = [
    "CoSupConfig",
    "CoSupForCausalLM",
    "CoSupGenerateOutput",
    "CoSupOutput",
    "Completion",
    "KNNMemory",
    "MLPMemory",
    "Memory",
    "MemoryConfig",
    "MilvusPassageIndex",
    "PassageIndex",
    "Retrieval",
    "RetrievalConfig",
    "RetrievalError",
    "RetrievalStreamer",
    "Retriever",
    "StreamEvent",
    "TokenNeighbors",
    "chunked_cross_entropy",
    "info_nce",
    "similarity_scores",
]


def __dir__() -> list[str]:
    """List the public names, which are imported on first use."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    """
    Import a public name on first use, so that a program that only reads files, such as a report, does not load torch.

    The first import also registers the model with transformers' Auto classes.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _register()
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def _register() -> None:
    """Let `AutoModel.from_pretrained` load a CoSup checkpoint with these classes, without `trust_remote_code`."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from .configuration_cosup import CoSupConfig
    from .modeling_cosup import CoSupForCausalLM

    AutoConfig.register("cosup", CoSupConfig, exist_ok=True)
    AutoModel.register(CoSupConfig, CoSupForCausalLM, exist_ok=True)
    AutoModelForCausalLM.register(CoSupConfig, CoSupForCausalLM, exist_ok=True)
