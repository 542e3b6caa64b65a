"""
Serve a model and its index under OpenAI's API: answers with citations, and embeddings; see docs/serving.md.

    python recipes/serve.py --model out --index out/index
    python recipes/serve.py --model out --index wiki --index_uri http://host:19530         # collection in Milvus
    COSUP_API_KEY=secret python recipes/serve.py --model out --index out/index --host 0.0.0.0
    python recipes/serve.py --model out --index out/index --engine vllm \\
        --gen_url http://host:8001/v1 --query_url http://host:8002/v1

The variable VLLM_API_KEY may hold the key of the vLLM servers.

    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "out", "messages": [{"role": "user", "content": "who painted the night watch?"}]}'
"""

from __future__ import annotations

import logging
import os
import pkgutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cli import clear_errors, parse

from serving.arguments import INDEX_TIMEOUT, ServeArguments
from shared.indexes import check_faiss_option, check_index_options, faiss_options, open_index
from shared.memory_options import MemoryOptions, open_memory

if TYPE_CHECKING:  # options and a port in use do not wait for torch
    from serving.engine import Engine
    from serving.served_model import ServedModel


def main() -> None:
    """Read the options and serve until a signal."""
    args, memory_options = parse([ServeArguments, MemoryOptions], __doc__)
    with clear_errors():
        serve(args, memory_options)


def serve(args: ServeArguments, memory_options: MemoryOptions) -> None:
    """Open everything, beginning with what is quick to check, and serve it."""
    check_index_options(args.index, args.index_uri)
    check_faiss_option(args, memory_options.memory)
    set_up_logging()
    from serving.running import EngineServer, open_socket

    bound = open_socket(args.host, args.port)
    if args.is_open:
        print(
            f"warning: --host {args.host} without --api_key: everyone who reaches this machine can use the model.",
            file=sys.stderr,
        )
    from transformers import GenerationConfig

    from serving.api import ApiSettings, build_app

    engine = open_engine(args, memory_options)
    settings = ApiSettings(
        model_name=args.served_model_name or model_name(args.model),
        generation_config=GenerationConfig.from_pretrained(args.model),
        api_keys=args.keys,
        max_new_tokens=args.max_new_tokens,
        max_prompt_tokens=args.max_prompt_tokens,
        max_body_bytes=args.max_body_bytes,
        request_timeout=args.request_timeout,
        cors_origins=args.cors_origins,
        log_prompts=args.log_prompts,
    )
    server = EngineServer(build_app(engine, settings), engine, args.shutdown_timeout)
    server.run([bound])


def set_up_logging() -> None:
    """Write the server's own log, and warnings of others, to stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("cosup").setLevel(logging.INFO)


def model_name(model: str) -> str:
    """Return the name of a model on the Hub, or of its folder."""
    if Path(model).is_dir():
        return os.path.basename(os.path.abspath(model))
    return model


def open_engine(args: ServeArguments, memory_options: MemoryOptions) -> Engine:
    """Open the engine that `--engine` names."""
    if args.engine != "embedded" and memory_options.memory is not None:
        raise ValueError(f"--memory: {args.engine} mixes no token memory in; use --engine embedded.")
    if args.has_own_engine:
        return open_own_engine(args)
    if args.engine == "vllm":
        from serving.vllm_engine import VllmEngine, model_without_weights

        model = model_without_weights(args.model)
        index = open_index(model, args.index, args.index_uri, **index_options(args))
        urls = {"gen_url": args.gen_url, "query_url": args.query_url, "encoder_url": args.encoder_url}
        bounds = {"max_running": args.max_running, "max_waiting": args.max_waiting}
        return VllmEngine(model, index, **urls, api_key=os.environ.get("VLLM_API_KEY"), **bounds)
    from serving.decoding_process import DecodingProcess
    from serving.decoding_thread import DecodingThread
    from serving.embedded_engine import EmbeddedEngine

    if args.decode_in == "thread":
        return EmbeddedEngine(DecodingThread(load_served_model(args, memory_options)), args.max_waiting)
    return EmbeddedEngine(DecodingProcess(load_served_model, args, memory_options), args.max_waiting)


def load_served_model(args: ServeArguments, memory_options: MemoryOptions) -> ServedModel:
    """Load model, index and memory; the decoding process calls this."""
    import torch

    from modeling_cosup import CoSupConfig, CoSupForCausalLM

    from serving.served_model import ServedModel

    set_up_logging()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load_emb_seq = args.load_emb_seq or CoSupConfig.from_pretrained(args.model).query_from != "gen"
    model = CoSupForCausalLM.from_pretrained(args.model, dtype=args.dtype, load_emb_seq=load_emb_seq).to(device)
    return ServedModel(
        model,
        index=open_index(model, args.index, args.index_uri, **index_options(args)),
        **open_memory(model, memory_options, **faiss_options(args)),
        max_running=args.max_running,
        max_batch_tokens=args.max_batch_tokens,
    )


def index_options(args: ServeArguments) -> dict[str, Any]:
    """Return the options of the index. A search in Milvus must fail soon, because running answers wait for it."""
    if args.index_uri is None:
        return faiss_options(args)
    timeout = INDEX_TIMEOUT if args.index_timeout is None else args.index_timeout
    return {"timeout": timeout, "max_retries": 1}


def open_own_engine(args: ServeArguments) -> Engine:
    """Open an engine by calling `module:function`; the module is installed, or a file in the working directory."""
    sys.path.insert(0, os.getcwd())
    try:
        open_engine = pkgutil.resolve_name(args.engine)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--engine {args.engine}: {error}.") from error
    return open_engine(args)


if __name__ == "__main__":
    main()
