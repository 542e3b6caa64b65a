"""Gen for a machine without a network: a folder, a GGUF file, whole or in pieces, or random weights."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from modeling_cosup.files_cosup import digest_file

from gpu_parts.runner import Skip, is_installed
from random_world import SHAPES
from shared.quickstart_models import build_tokenizer, special_token_ids


def given_gen(gen: str, folder: Path) -> str:
    """
    Return the folder of a checkpoint of Gen.

    Args:
        gen (`str`): a folder of transformers; a file `NAME.gguf`; or a folder that holds `NAME.gguf` or its pieces
            `NAME.gguf.part*`, in the order of their names. If `NAME.gguf.sha256` is next to them, as `sha256sum`
            writes it, the file is compared with it.
        folder (`Path`): receives the checkpoint that a GGUF file is converted to, once.

    Raises:
        `Skip`: for a GGUF file without the package gguf.
        `ValueError`: if the file, whole or put together, is not the one of `NAME.gguf.sha256`.
    """
    if Path(gen, "config.json").exists():
        return gen
    name = gguf_name(Path(gen))
    if name is None:
        return gen  # whatever it is, transformers says what is wrong with it
    converted = folder / f"gen_of_{name}"
    if not converted.exists():
        if not is_installed("gguf"):
            raise Skip(f"gguf is not installed, and --gen {gen} is a GGUF file")
        model, tokenizer = read_gguf(gguf_file(Path(gen), folder))
        save(model, tokenizer, converted)
    return str(converted)


def name_of_gen(gen: str) -> str:
    """Return the name of a given Gen, for the results."""
    return gguf_name(Path(gen)) or Path(gen).name


def gguf_name(gen: Path) -> str | None:
    """Return NAME of the file `NAME.gguf` at a place, whole or in pieces; `None` if there is none."""
    if gen.suffix == ".gguf":
        return gen.stem
    names = sorted(path.name.partition(".gguf")[0] for path in gen.glob("*.gguf*"))
    return names[0] if names else None


def gguf_file(gen: Path, folder: Path) -> Path:
    """Return the GGUF file at a place; its pieces are put together in `folder`."""
    path = gen
    if gen.is_dir():
        path = next(iter(sorted(gen.glob("*.gguf"))), gen)
    if path.is_dir():
        pieces = sorted(gen.glob("*.gguf.part*"), key=lambda piece: (len(piece.name), piece.name))
        if not pieces:
            raise ValueError(f"{gen} holds neither a .gguf file nor pieces of one, NAME.gguf.part*.")
        path = join_pieces(pieces, folder)
    checksum = Path(f"{gen / path.name if gen.is_dir() else gen}.sha256")
    if checksum.exists():
        expected = checksum.read_text(encoding="utf-8").split()[0]
        found = digest_file(path)
        if found != expected:
            raise ValueError(f"{path} has the SHA-256 {found}, expected {expected}: is a piece missing or damaged?")
    return path


def join_pieces(pieces: list[Path], folder: Path) -> Path:
    """Write pieces one after another to `folder`, under their name without `.part…`, and return that file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / pieces[0].name.partition(".part")[0]
    with path.open("wb") as whole:
        for piece in pieces:
            with piece.open("rb") as file:
                shutil.copyfileobj(file, whole)
    return path


def read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model, in float32, and the tokenizer of a GGUF file."""
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype="float32")
    # its weights are dequantized, but transformers would refuse to save a quantized model
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def random_gen(folder: Path, texts: Iterable[str], tiny: bool) -> str:
    """
    Return a folder with random weights, made once: in the shape of SmolLM2-135M, or tiny ones.

    Args:
        folder (`Path`): receives the checkpoint.
        texts (`Iterable[str]`): what the tokenizer is trained on. A tiny model has the quickstart's tokenizer.
        tiny (`bool`): make a model of two narrow layers.
    """
    path = folder / "gen_random"
    if not path.exists():
        shape: dict[str, Any] = dict(SHAPES["tiny" if tiny else "135m"])
        tokenizer = build_tokenizer() if tiny else train_tokenizer(texts, shape["vocab_size"])
        shape |= {"vocab_size": len(tokenizer), "max_position_embeddings": 8192, "tie_word_embeddings": True}
        config = AutoConfig.for_model("llama", **shape, **special_token_ids(tokenizer))
        save(AutoModelForCausalLM.from_config(config), tokenizer, path)
    return str(path)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 3, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Save model and tokenizer to a folder, which is complete or not there at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(path)
