"""The model that travels with a checkpoint: Gen, Emb_seq, their losses, the passage index and the retrieval-aware generate()."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_cosup import CoSupConfig
from .generation_cosup import CoSupGenerateOutput, RetrievalConfig
from .loss_cosup import chunked_cross_entropy, info_nce, similarity_scores
from .milvus_cosup import MilvusPassageIndex
from .modeling_cosup import CoSupForCausalLM, CoSupOutput
from .queue_cosup import Completion
from .retrieval_cosup import PassageIndex
from .streaming_cosup import RetrievalStreamer, StreamEvent
from .trace_cosup import Retrieval, RetrievalError

AutoConfig.register("cosup", CoSupConfig)
AutoModel.register(CoSupConfig, CoSupForCausalLM)
AutoModelForCausalLM.register(CoSupConfig, CoSupForCausalLM)

__all__ = [
    "CoSupConfig",
    "CoSupForCausalLM",
    "CoSupGenerateOutput",
    "CoSupOutput",
    "Completion",
    "MilvusPassageIndex",
    "PassageIndex",
    "Retrieval",
    "RetrievalConfig",
    "RetrievalError",
    "RetrievalStreamer",
    "StreamEvent",
    "chunked_cross_entropy",
    "info_nce",
    "similarity_scores",
]
