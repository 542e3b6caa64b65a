"""
Make a CoSup checkpoint from existing models: a causal LM and a retriever, or a pair released by the paper's authors.

    python recipes/import_checkpoints.py --gen HuggingFaceTB/SmolLM2-135M \\
        --emb_seq sentence-transformers/all-MiniLM-L6-v2 --query_from emb_seq --output_dir out
    python recipes/import_checkpoints.py --gen kaist-ai/cosupervision-gen-Llama2_7b \\
        --emb_seq kaist-ai/cosupervision-emb_seq-Llama2_7b --tokenizer meta-llama/Llama-2-7b-hf --output_dir out

With `--query_from emb_seq` or `query_encoder` a retriever works without training (appendix C.1). With `gen`, the
default, Gen must first be trained to make queries: `recipes/train.py --model_name_or_path out`. The files of a
sentence-transformers retriever say how it pools, compares and is prompted; for any other retriever, options say so. If
sentence-transformers is installed, its embeddings are compared with the checkpoint's. A retriever reads everything up
to `[NSP]` as the query, including the instruction. With `--chat_template_path recipes/configs/question_only.jinja` a
prompt is the question alone, as in the training of most retrievers.

The paper's pairs are recognised by the name of Gen; for a copy, give `--paper cosupervision` or `--paper separate`.
Their tokens are `<PAD>` `[Cs]` `[Ce]` `[Ret]`, added in this order if the tokenizer (from `--tokenizer`, or else
`--gen`) has none of them. Their Emb_seq reads a passage, `title :: text`, with BOS and without EOS, and its embedding
is the hidden state of the last token. In the separate pair, Emb_seq also reads everything up to `[Ret]`, as the query.
The paper's code differs from this checkpoint:

- It samples (temperature 0.7, top_p 0.9). The paper, and by default this checkpoint, decode greedily.
- It limits prompt, passages and answer together to 1,024 tokens (the separate pair: 512). Here `max_new_tokens` limits
  the decoded tokens.
- It embeds passages in batches of ten, padded on the right, and reads the last column. The embedding of a shorter
  passage is therefore read at a `<PAD>`, and depends on the other passages of the batch. Here each passage is read at
  its own last token, as it would be there in a batch of one.
- For the passages of a single question it embeds the text without the title.
- If `[Ret]` is written inside `[Cs]`…, it inserts a `[Ce]` before that `[Ret]`, after the search; here nothing is
  inserted. The separate pair overlooks the token before `[Ret]`, and so writes a `[Ce]` twice. An answer that ends
  inside `[Cs]`… gets a `[Ce]` after its end.
- After a `[Ce]`, it forbids the next `[Ce]` until a passage has been retrieved. The separate pair also forbids `[Ce]`
  before the first passage.

`--tie_emb_seq true` imports a single model that writes and embeds. A token of its vocabulary that is named as a
control token keeps its trained rows. OneGen (github.com/zjunlp/OneGen; its workflows, `src/onegen` and
`scripts/self_rag/generate_score.py` were read) fits: a plain causal model, whose last hidden state is the query at
`[Question Representation]`, and the passage at `[Document Fragment Representation]` after it, compared by the cosine.

    python recipes/import_checkpoints.py --gen zjunlp/OneGen-SelfRAG-Llama2-7B --tie_emb_seq true \\
        --nsp_token '[Question Representation]' --passage_end '[Document Fragment Representation]' \\
        --cs_token '</paragraph>' --passage_template $'{title}\\n{text}' --output_dir out

Train such a checkpoint further (`recipes/train.py --model_name_or_path out`), because OneGen differs:

- It writes `<paragraph>` between the query's token and the passage; here there is nothing between them.
- Nothing ends the text that is grounded in a passage: `[CE]` is new.
- Its instruction before a passage holds the token of passages; as `--passage_prompt` it is read as text.
- Its model for multi-hop questions embeds every sentence of a passage; here a passage has one embedding.

GritLM (github.com/ContextualAI/gritlm; `gritlm/gritlm.py` was read) does not fit: code that comes with its checkpoints
reads passages and queries in both directions and takes the mean, and Gen reads from left to right. It is refused, as
is every single model with code of its own.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shared.cli import clear_errors, parse

from shared.imported_models import load, load_gen_tokenizer, set_chat_template

if TYPE_CHECKING:  # a recipe that only prints its options does not wait for torch
    from transformers import PreTrainedTokenizerBase

    from modeling_cosup import CoSupForCausalLM

PAPER_PAIRS = {
    "kaist-ai/cosupervision-gen-Llama2_7b": "cosupervision",
    "kaist-ai/separate_supervision-gen-Llama2_7b": "separate",
}
PAPER_TOKENS = ("<PAD>", "[Cs]", "[Ce]", "[Ret]")
DECIDED_BY_PAPER = (
    "query_from",
    "query_encoder",
    "emb_seq_pooling",
    "similarity",
    "passage_template",
    "passage_prompt",
    "query_prompt",
    "chat_template_path",
    "nsp_token",
    "cs_token",
    "ce_token",
)
NOT_TIED = ("emb_seq", "paper", "query_from", "query_encoder", "query_prompt")
CONTROL_TOKENS = ("nsp_token", "cs_token", "ce_token")

CHOICES = (
    "emb_seq_pooling",
    "similarity",
    "query_from",
    "passage_template",
    "passage_prompt",
    "query_prompt",
    "max_passage_length",
)


@dataclass
class ImportArguments:
    """The models that become Gen and Emb_seq, and how Emb_seq reads."""

    gen: str = field(metadata={"local_or_hub": True, "help": "name or path of Gen (AutoModelForCausalLM)"})
    output_dir: str = field(metadata={"help": "folder of the checkpoint; must be empty or missing"})
    emb_seq: str | None = field(
        default=None,
        metadata={"local_or_hub": True, "help": "name or path of Emb_seq (sentence-transformers or any AutoModel)"},
    )
    tie_emb_seq: bool = field(
        default=False, metadata={"help": "one tied model: Gen also reads the passages, in place of an --emb_seq"}
    )
    nsp_token: str | None = field(default=None, metadata={"help": "a token of Gen that becomes [NSP], or a new one"})
    cs_token: str | None = field(default=None, metadata={"help": "the same for [Cs]"})
    ce_token: str | None = field(default=None, metadata={"help": "the same for [CE]"})
    passage_end: str | None = field(
        default=None,
        metadata={"help": "with --tie_emb_seq: token of Gen that is read after a passage, in place of EOS"},
    )
    tokenizer: str | None = field(
        default=None, metadata={"local_or_hub": True, "help": "name or path of Gen's tokenizer; defaults to --gen"}
    )
    paper: Literal["cosupervision", "separate", "none"] | None = field(
        default=None,
        metadata={"help": "which pair of the paper's authors is imported; by default, the name of Gen decides"},
    )
    query_from: Literal["gen", "emb_seq", "query_encoder"] | None = field(
        default=None,
        metadata={"help": "which model makes the queries; defaults to gen, unless the paper's pair decides it"},
    )
    query_encoder: str | None = field(
        default=None,
        metadata={
            "local_or_hub": True,
            "help": "with --query_from query_encoder: its name or path; defaults to --emb_seq",
        },
    )
    emb_seq_pooling: Literal["eos", "lasttoken", "mean", "cls"] | None = field(
        default=None, metadata={"help": "only for an Emb_seq that is not a sentence-transformers model"}
    )
    similarity: Literal["cosine", "dot"] | None = field(
        default=None, metadata={"help": "only for an Emb_seq that is not a sentence-transformers model"}
    )
    passage_template: str | None = field(default=None, metadata={"help": "defaults to '{title} :: {text}'"})
    passage_prompt: str | None = field(
        default=None,
        metadata={"help": "text before every passage; defaults to the prompt of sentence-transformers"},
    )
    query_prompt: str | None = field(
        default=None, metadata={"help": "text before every query that Gen does not make; same default"}
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "Jinja file of the chat template, e.g. recipes/configs/question_only.jinja; "
            "defaults to the tokenizer's"
        },
    )
    max_passage_length: int | None = field(
        default=None,
        metadata={"help": "maximum number of tokens of a passage; defaults to the limit of the retriever"},
    )
    dtype: str = field(default="auto", metadata={"help": "dtype of the weights, e.g. bfloat16"})
    allow_pytorch_bin: bool = field(
        default=False, metadata={"help": "also read pytorch_model.bin, with torch's weights_only reader"}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "also push the checkpoint to this repository", "metavar": "REPO"}
    )


def main() -> None:
    """Read the options and import the pair."""
    (args,) = parse([ImportArguments], __doc__)
    with clear_errors():
        import_pair(args)


def import_pair(args: ImportArguments) -> None:
    """Load, check and combine the models, and save the checkpoint. An error leaves `output_dir` unchanged."""
    with writing(Path(args.output_dir)) as folder:
        paper = args.paper or PAPER_PAIRS.get(args.gen, "none")
        if args.tie_emb_seq:
            model = tied_model(args)
        elif args.emb_seq is None:
            raise ValueError("--emb_seq is missing: name the retriever, or give --tie_emb_seq true.")
        elif args.passage_end is not None:
            raise ValueError("--passage_end needs --tie_emb_seq true: the files of an Emb_seq say what it reads.")
        elif paper == "none":
            model = retriever_pair(args)
        else:
            model = paper_pair(args, paper)
        model.save_pretrained(folder)
    gen = type(model.gen).__name__
    emb_seq = "is Gen's body" if model.config.tie_emb_seq else type(model.emb_seq).__name__
    print(f"{args.output_dir}: Gen {gen}, Emb_seq {emb_seq}, queries from {model.config.query_from}", flush=True)
    if args.push_to_hub:
        model.push_to_hub(args.push_to_hub)


@contextlib.contextmanager
def writing(output: Path) -> Iterator[Path]:
    """
    Yield a new folder, which becomes `output` if the block ends without an error, and is removed otherwise.

    Raises:
        `ValueError`: if `output` holds anything.
        `OSError`: if nothing can be written there.
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


# ---------------------------------------------------------------------- the paper's pairs


def paper_pair(args: ImportArguments, paper: str) -> CoSupForCausalLM:
    """
    Make a CoSup model from a pair released by the paper's authors; it generates as theirs does.

    Args:
        args ([`ImportArguments`]): the options.
        paper (`str`): "cosupervision" or "separate".

    Raises:
        `ValueError`: if an option contradicts the pair, the tokenizer has only some of its tokens, or sizes differ.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    from modeling_cosup import CoSupForCausalLM

    for option in DECIDED_BY_PAPER:
        if getattr(args, option) is not None:
            raise ValueError(f"--{option} is decided by the paper's {paper} pair; leave it out, or give --paper none.")
    tokenizer = paper_tokenizer(args.tokenizer or args.gen)
    gen = load(AutoModelForCausalLM, args.gen, args)
    emb_seq = load(AutoModel, args.emb_seq, args)
    for name, model in ((args.gen, gen), (args.emb_seq, emb_seq)):
        num_embeddings = model.get_input_embeddings().weight.shape[0]
        if num_embeddings != len(tokenizer):
            raise ValueError(
                f"{name} has embeddings of {num_embeddings} tokens, the tokenizer has {len(tokenizer)}: "
                "give the tokenizer that it was trained with as --tokenizer."
            )
    gen_size, emb_seq_size = gen.config.hidden_size, emb_seq.config.hidden_size
    if paper == "cosupervision" and gen_size != emb_seq_size:
        raise ValueError(f"Gen is {gen_size} wide, Emb_seq {emb_seq_size}: a co-supervised pair has one width.")
    _, cs_token, ce_token, nsp_token = PAPER_TOKENS
    if paper == "cosupervision":
        query_from = "gen"
        max_passage_length = 1023  # their limit of 1,024 tokens, without BOS
    else:
        query_from = "emb_seq"
        max_passage_length = 511
    return CoSupForCausalLM.from_gen_and_emb_seq(
        gen,
        emb_seq,
        tokenizer=tokenizer,
        cs_token=cs_token,
        ce_token=ce_token,
        nsp_token=nsp_token,
        query_from=query_from,
        similarity="dot",
        emb_seq_pooling="lasttoken",
        emb_seq_add_eos_token=False,
        max_passage_length=args.max_passage_length or max_passage_length,
    )


def paper_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a pair, with the paper's four tokens, its prompt as chat template, and `<PAD>` padding."""
    from transformers import AddedToken

    from modeling_cosup.tokenization_cosup import PAPER_CHAT_TEMPLATE

    tokenizer = load_gen_tokenizer(name)
    missing = [token for token in PAPER_TOKENS if token not in tokenizer.get_vocab()]
    if 0 < len(missing) < len(PAPER_TOKENS):
        raise ValueError(
            f"{name}: the tokenizer lacks {' '.join(missing)} of the paper's tokens {' '.join(PAPER_TOKENS)}; "
            "expected all of them, or none."
        )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True)
    tokenizer.pad_token = PAPER_TOKENS[0]
    tokenizer.chat_template = PAPER_CHAT_TEMPLATE
    return tokenizer


# ---------------------------------------------------------------------- one tied model


def tied_model(args: ImportArguments) -> CoSupForCausalLM:
    """
    Make a tied CoSup model from a single model that writes and embeds.

    Raises:
        `ValueError`: if an option names a second model, the model has code of its own, or `--passage_end` is no token.
    """
    from transformers import AutoModelForCausalLM

    from modeling_cosup import CoSupForCausalLM
    from modeling_cosup.sources_cosup import load_config

    for option in NOT_TIED:
        if getattr(args, option) is not None:
            raise ValueError(f"--{option} with --tie_emb_seq: Gen alone makes queries and passages; leave out one.")
    if getattr(load_config(args.gen), "auto_map", None):
        raise ValueError(
            f"{args.gen} has code of its own, as GritLM has to read passages in both directions. Gen of a tied model"
            " reads them from left to right, so its embeddings would differ from the trained ones."
        )
    tokenizer = load_gen_tokenizer(args.tokenizer or args.gen)
    if args.chat_template_path is not None:
        set_chat_template(tokenizer, args.chat_template_path)
    if args.passage_end is not None and args.passage_end not in tokenizer.get_vocab():
        raise ValueError(f"--passage_end {args.passage_end!r} is no token of {args.tokenizer or args.gen}.")
    names = (*CONTROL_TOKENS, "emb_seq_pooling", "similarity", "passage_template", "passage_prompt")
    settings = {name: getattr(args, name) for name in (*names, "max_passage_length")}
    given = {name: value for name, value in settings.items() if value is not None}
    gen = load(AutoModelForCausalLM, args.gen, args)
    model = CoSupForCausalLM.from_gen_and_emb_seq(gen, tokenizer=tokenizer, tie_emb_seq=True, **given)
    if args.passage_end is not None:
        passage_tokenizer = copy.deepcopy(model.tokenizer)
        passage_tokenizer.eos_token = args.passage_end
        model.emb_seq_tokenizer = passage_tokenizer
    return model


# ---------------------------------------------------------------------- any causal LM and retriever


def retriever_pair(args: ImportArguments) -> CoSupForCausalLM:
    """
    Make a CoSup model from any causal LM and any retriever.

    Raises:
        `ValueError`: if the retriever does something Emb_seq cannot do, options are missing or contradict its files,
            or the embeddings differ from the retriever's.
    """
    from transformers import AutoModelForCausalLM

    from modeling_cosup import CoSupForCausalLM
    from modeling_cosup.architectures_cosup import encoder_auto_class
    from modeling_cosup.retriever_files_cosup import RetrieverFacts, emb_seq_settings, read_retriever
    from modeling_cosup.sources_cosup import fitting_head, load_config, load_tokenizer, read_query_encoder

    from shared.retriever_comparison import compare

    tokenizer = load_gen_tokenizer(args.tokenizer or args.gen)
    if args.chat_template_path is not None:
        set_chat_template(tokenizer, args.chat_template_path)
    if set(PAPER_TOKENS) <= set(tokenizer.get_vocab()):
        raise ValueError(
            f"The tokenizer holds the paper's {' '.join(PAPER_TOKENS)}: "
            "give --paper cosupervision, --paper separate, or --paper none."
        )
    facts = read_retriever(args.emb_seq, args.allow_pytorch_bin)
    is_sentence_transformers = facts is not None
    if facts is None:
        facts = RetrieverFacts()
        for option in ("emb_seq_pooling", "similarity"):
            if getattr(args, option) is None:
                raise ValueError(f"{args.emb_seq} is not a sentence-transformers model: give --{option}.")
    emb_seq_tokenizer = load_tokenizer(args.emb_seq, facts.subfolder)
    emb_seq_config = load_config(args.emb_seq, facts.subfolder)
    chosen = {option: getattr(args, option) for option in CHOICES}
    settings = emb_seq_settings(args.emb_seq, facts, emb_seq_tokenizer, emb_seq_config, chosen)
    encoder_name = None
    encoder_subfolder = facts.subfolder
    if args.query_from == "query_encoder":
        encoder_name = args.query_encoder or args.emb_seq
        if encoder_name != args.emb_seq:
            encoder_subfolder, query_prompt = read_query_encoder(
                encoder_name, emb_seq_tokenizer, facts.head, settings, {}
            )
            if query_prompt is not None and args.query_prompt is None:
                settings["query_prompt"] = query_prompt
    elif args.query_encoder:
        raise ValueError("--query_encoder needs --query_from query_encoder.")

    gen = load(AutoModelForCausalLM, args.gen, args)
    emb_seq = load(encoder_auto_class(emb_seq_config), args.emb_seq, args, facts.subfolder)
    query_encoder = None
    if encoder_name is not None:
        encoder_config = load_config(encoder_name, encoder_subfolder)
        query_encoder = load(encoder_auto_class(encoder_config), encoder_name, args, encoder_subfolder)
    head = None
    if facts.head is not None:
        head = fitting_head(facts.head, gen.config, args.query_from)
        if head is None:
            gen_size = gen.config.get_text_config().hidden_size
            print(
                f"The dense layer of {args.emb_seq} is left out: its output is {len(facts.head)} wide, Gen is"
                f" {gen_size} wide.",
                flush=True,
            )
    control_tokens = {name: getattr(args, name) for name in CONTROL_TOKENS if getattr(args, name) is not None}
    model = CoSupForCausalLM.from_gen_and_emb_seq(
        gen,
        emb_seq,
        tokenizer=tokenizer,
        emb_seq_tokenizer=emb_seq_tokenizer,
        query_encoder=query_encoder,
        emb_head=head,
        emb_head_size=None if head is None else len(head),
        **control_tokens,
        **settings,
    )
    prompts = f"The prompt of passages is {model.config.passage_prompt!r}"
    if args.query_from != "gen":
        prompts += f", the one of queries {model.config.query_prompt!r}"
    print(f"{prompts}.", flush=True)
    keeps_head = head is not None
    if is_sentence_transformers and (keeps_head or facts.head is None):
        own_queries = args.query_from == "emb_seq" or encoder_name == args.emb_seq
        compare(model, args.emb_seq, keeps_head, own_queries)
    return model


if __name__ == "__main__":
    main()
