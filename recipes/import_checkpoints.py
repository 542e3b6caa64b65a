"""
Make a CoSup checkpoint of models that exist: a causal LM as Gen and a retriever as Emb_seq, or a pair that the paper's authors released.

    python recipes/import_checkpoints.py --gen HuggingFaceTB/SmolLM2-135M --emb_seq sentence-transformers/all-MiniLM-L6-v2 --query_from emb_seq --output_dir out
    python recipes/import_checkpoints.py --gen kaist-ai/cosupervision-gen-Llama2_7b --emb_seq kaist-ai/cosupervision-emb_seq-Llama2_7b \\
        --tokenizer meta-llama/Llama-2-7b-hf --output_dir out

With `--query_from emb_seq` or `query_encoder` a retriever works at once (appendix C.1); with `gen`, the default, Gen must first be trained to make its queries:
`recipes/train.py --model_name_or_path out`. The files of a sentence-transformers retriever say how it pools, compares and is prompted; of any other, say it
yourself. Where sentence-transformers is installed, its embeddings are compared with the checkpoint's. A retriever reads as the query all that was written up
to `[NSP]`, the instruction too; with `--chat_template_path recipes/configs/question_only.jinja` a prompt is the question alone, which most were trained for.

The paper's pairs are known by the name of their Gen; for a copy say `--paper cosupervision` or `--paper separate`. Their tokens are `<PAD>` `[Cs]` `[Ce]`
`[Ret]`, added in this order where the tokenizer (of `--tokenizer`, else of `--gen`) lacks all four. Their Emb_seq reads a passage, `title :: text`, with BOS
and without EOS, at its last token; in the separate pair it also reads all that was written up to `[Ret]`, as the query.
What their code does otherwise than this checkpoint:

- They sample (temperature 0.7, top_p 0.9), their paper decodes greedily, and so does this checkpoint unless told otherwise. They count 1,024 tokens (the
  separate pair: 512) of prompt, passages and answer; here `max_new_tokens` counts what was decoded.
- They embed passages in batches of ten, padded on the right, and read the last column: a shorter passage is read at a `<PAD>`, and its vector depends on its
  batch-mates. Here each is read at its own last token, as theirs is alone. Over the passages of one question they embed the text without its title.
- A row that writes `[Ret]` inside `[Cs]`… gets a `[Ce]` before that `[Ret]`, after the search; here nothing is put in. Their separate pair overlooks the token
  before `[Ret]`, and so writes a `[Ce]` twice. A row that ends inside `[Cs]`… gets a `[Ce]` after its end.
- After a `[Ce]` they forbid the next one until a passage was retrieved (the separate pair: before the first passage too).
"""

import contextlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shared.cli import clear_errors, parse

from jinja2 import TemplateError

PAPER_PAIRS = {
    "kaist-ai/cosupervision-gen-Llama2_7b": "cosupervision",
    "kaist-ai/separate_supervision-gen-Llama2_7b": "separate",
}
ONLY_SAFETENSORS = (
    "Only safetensors are read; --allow_pytorch_bin also reads pytorch_model.bin, by torch's weights_only reader."
)
PAPER_TOKENS = ("<PAD>", "[Cs]", "[Ce]", "[Ret]")


@dataclass
class ImportArguments:
    """Which models become Gen and Emb_seq, and how Emb_seq reads."""

    gen: str = field(metadata={"help": "name or path of Gen (AutoModelForCausalLM)"})
    emb_seq: str = field(metadata={"help": "name or path of Emb_seq: sentence-transformers or any AutoModel"})
    output_dir: str = field(metadata={"help": "folder of the checkpoint; must be empty or not there"})
    tokenizer: str | None = field(default=None, metadata={"help": "Gen's; by default the tokenizer of --gen"})
    paper: Literal["cosupervision", "separate", "none"] | None = field(
        default=None, metadata={"help": "a copy of a pair of the paper's authors, or none of theirs"}
    )
    query_from: Literal["gen", "emb_seq", "query_encoder"] | None = field(
        default=None, metadata={"help": "what makes the queries; gen, unless the pair decides it"}
    )
    query_encoder: str | None = field(
        default=None, metadata={"help": "with --query_from query_encoder; by default it starts as Emb_seq"}
    )
    emb_seq_pooling: Literal["eos", "lasttoken", "mean", "cls"] | None = field(
        default=None, metadata={"help": "of an Emb_seq that is not of sentence-transformers"}
    )
    similarity: Literal["cosine", "dot"] | None = field(
        default=None, metadata={"help": "of an Emb_seq that is not of sentence-transformers"}
    )
    passage_template: str | None = field(default=None, metadata={"help": "by default '{title} :: {text}'"})
    passage_prompt: str | None = field(
        default=None,
        metadata={"help": "what Emb_seq reads before every passage; by default the prompt of sentence-transformers"},
    )
    query_prompt: str | None = field(
        default=None, metadata={"help": "the same before a query, where Gen does not make it"}
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "Jinja file that prompts are made with, e.g. recipes/configs/question_only.jinja; "
            "else the tokenizer's"
        },
    )
    max_passage_length: int | None = field(
        default=None, metadata={"help": "tokens; by default what the retriever was made for"}
    )
    dtype: str = field(default="auto", metadata={"help": "of the weights, e.g. bfloat16"})
    allow_pytorch_bin: bool = field(
        default=False, metadata={"help": "also read pytorch_model.bin, by torch's weights_only reader"}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "also push the checkpoint to this repository", "metavar": "REPO"}
    )


def main():
    """Read the options and import the pair."""
    (args,) = parse([ImportArguments], __doc__)
    with clear_errors():
        import_pair(args)


def import_pair(args):
    """Check, load, put together, compare, save. Nothing is left in `output_dir` unless all of it went well."""
    with writing(Path(args.output_dir)) as folder:
        paper = args.paper or PAPER_PAIRS.get(args.gen, "none")
        model = retriever_pair(args) if paper == "none" else paper_pair(args, paper)
        model.save_pretrained(folder)
    print(
        f"{args.output_dir}: Gen {type(model.gen).__name__}, Emb_seq {type(model.emb_seq).__name__}, queries from {model.config.query_from}",
        flush=True,
    )
    if args.push_to_hub:
        model.push_to_hub(args.push_to_hub)


@contextlib.contextmanager
def writing(output):
    """
    A folder next to `output`, which gets its name when the block ends well and goes away when it does not.

    Raises:
        `ValueError`: when something stands in `output`.
        `OSError`: when nothing can be written there.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir()) or output.resolve() == Path.cwd()):
        raise ValueError(f"--output_dir {output}: expected an empty folder other than the current one, or none.")
    output = output.resolve()
    folder = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.replace(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load(kind, name, args, subfolder=""):
    """
    A model, of safetensors unless `--allow_pytorch_bin`.

    Raises:
        `OSError`: when it is not there, damaged, or there only as a file that must be unpickled.
        `ValueError`: when weights are missing: transformers would make them up.
    """
    from safetensors import SafetensorError

    safetensors = None if args.allow_pytorch_bin else True
    try:
        model, info = kind.from_pretrained(
            name, dtype=args.dtype, subfolder=subfolder, use_safetensors=safetensors, output_loading_info=True
        )
    except SafetensorError as error:
        raise OSError(f"{name}: its weights cannot be read: {error}") from error
    except OSError as error:
        raise OSError(f"{name}: {error}" + ("" if args.allow_pytorch_bin else f"\n{ONLY_SAFETENSORS}")) from error
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")):
        raise ValueError(
            f"{name} lacks {len(missing)} weights of a {type(model).__name__}, e.g. {missing[0]}: is it the right half of the pair?"
        )
    return model.eval()


def load_tokenizer(name):
    """The tokenizer of a repository or folder, with an error that names the option where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} holds no tokenizer that can be read: {error}\nGive Gen's, e.g. that of its base model, as --tokenizer."
        ) from error


# ---------------------------------------------------------------------- the paper's pairs


def paper_pair(args, paper):
    """
    One of the pairs that the paper's authors released, as a CoSup model that generates as theirs does.

    Raises:
        `ValueError`: when an option contradicts the pair, the tokenizer holds some of its tokens and not others, or sizes differ.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    from modeling_cosup import CoSupForCausalLM

    decided = (
        "query_from",
        "query_encoder",
        "emb_seq_pooling",
        "similarity",
        "passage_template",
        "passage_prompt",
        "query_prompt",
        "chat_template_path",
    )
    if given := [name for name in decided if getattr(args, name) is not None]:
        raise ValueError(f"--{given[0]} is decided by the paper's {paper} pair; leave it out, or say --paper none.")
    tokenizer = paper_tokenizer(args.tokenizer or args.gen)
    gen, emb_seq = load(AutoModelForCausalLM, args.gen, args), load(AutoModel, args.emb_seq, args)
    for name, part in ((args.gen, gen), (args.emb_seq, emb_seq)):
        rows = part.get_input_embeddings().weight.shape[0]
        if rows != len(tokenizer):
            raise ValueError(
                f"{name} has embeddings of {rows} tokens, the tokenizer has {len(tokenizer)}: give the one it was trained with as --tokenizer."
            )
    if paper == "cosupervision" and gen.config.hidden_size != emb_seq.config.hidden_size:
        raise ValueError(
            f"Gen is {gen.config.hidden_size} wide, Emb_seq {emb_seq.config.hidden_size}: a co-supervised pair has one width."
        )
    return CoSupForCausalLM.from_gen_and_emb_seq(
        gen,
        emb_seq,
        tokenizer=tokenizer,
        **dict(zip(("cs_token", "ce_token", "nsp_token"), PAPER_TOKENS[1:], strict=True)),
        query_from="gen" if paper == "cosupervision" else "emb_seq",
        similarity="dot",
        emb_seq_pooling="lasttoken",
        emb_seq_add_eos_token=False,
        max_passage_length=args.max_passage_length or (1023 if paper == "cosupervision" else 511),  # theirs, and BOS
    )


def paper_tokenizer(name):
    """The tokenizer of a pair of the paper: with its four tokens, its prompt as chat template, and `<PAD>` for padding."""
    from transformers import AddedToken

    from modeling_cosup.tokenization_cosup import PAPER_CHAT_TEMPLATE

    tokenizer = load_tokenizer(name)
    lacking = [token for token in PAPER_TOKENS if token not in tokenizer.get_vocab()]
    if 0 < len(lacking) < len(PAPER_TOKENS):
        raise ValueError(
            f"{name}: the tokenizer lacks {' '.join(lacking)} of the paper's tokens {' '.join(PAPER_TOKENS)}; expected all of them, or none."
        )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in lacking], special_tokens=True)
    tokenizer.pad_token = PAPER_TOKENS[0]
    tokenizer.chat_template = PAPER_CHAT_TEMPLATE
    return tokenizer


# ---------------------------------------------------------------------- any causal LM and retriever


def set_chat_template(tokenizer, path):
    """
    Give a tokenizer the chat template of a Jinja file.

    Raises:
        `ValueError`: when it cannot be read or rendered, or when the user's words are not in what it writes.
    """
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        question = [{"role": "user", "content": "who was first?"}]
        rendered = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    except (OSError, UnicodeError, TemplateError) as error:
        raise ValueError(f"--chat_template_path {path} cannot be read as a Jinja chat template: {error}") from error
    if "who was first?" not in rendered:
        raise ValueError(f"--chat_template_path {path} writes {rendered!r} for a question, without the question.")


def retriever_pair(args):
    """
    Any causal LM with any retriever, as a CoSup model.

    Raises:
        `ValueError`: when the retriever does what Emb_seq cannot, options are missing or contradict its files, or embeddings are not the retriever's.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    from modeling_cosup import CoSupForCausalLM
    from modeling_cosup.tokenization_cosup import same_tokenizer

    from shared.retriever_files import compare, read_retriever

    tokenizer = load_tokenizer(args.tokenizer or args.gen)
    if args.chat_template_path is not None:
        set_chat_template(tokenizer, args.chat_template_path)
    if set(PAPER_TOKENS) <= set(tokenizer.get_vocab()):
        raise ValueError(
            f"The tokenizer holds the paper's {' '.join(PAPER_TOKENS)}: say --paper cosupervision, --paper separate, or --paper none."
        )
    retriever = read_retriever(args.emb_seq, args)
    gen = load(AutoModelForCausalLM, args.gen, args)
    emb_seq = load(AutoModel, args.emb_seq, args, retriever.subfolder)
    query_encoder = None
    if args.query_from == "query_encoder":
        other = read_retriever(args.query_encoder or args.emb_seq, args)
        if (
            other.settings != retriever.settings
            or not same_tokenizer(other.tokenizer, retriever.tokenizer)
            or (args.query_encoder and other.head is not None)
        ):
            raise ValueError(
                f"{args.query_encoder} does not tokenize, pool and compare as {args.emb_seq} does, or has a dense layer of its own."
            )
        query_encoder = load(AutoModel, args.query_encoder or args.emb_seq, args, other.subfolder)
    elif args.query_encoder:
        raise ValueError("--query_encoder needs --query_from query_encoder.")
    head, settings = retriever.head, dict(retriever.settings)
    if head is not None and args.query_from in (None, "gen") and len(head) != gen.config.get_text_config().hidden_size:
        print(
            f"The dense layer of {args.emb_seq} makes {len(head)} numbers, Gen {gen.config.get_text_config().hidden_size}: it is left out.",
            flush=True,
        )
        head = None
    model = CoSupForCausalLM.from_gen_and_emb_seq(
        gen,
        emb_seq,
        tokenizer=tokenizer,
        emb_seq_tokenizer=retriever.tokenizer,
        query_encoder=query_encoder,
        emb_head=head,
        emb_head_size=None if head is None else len(head),
        query_from=args.query_from or "gen",
        **settings,
    )
    if retriever.is_sentence_transformers and (head is not None or retriever.head is None):
        compare(model, args.emb_seq, own_head=head is not None)
    return model


if __name__ == "__main__":
    main()
