"""
Make the fictional world of the offline quickstart: people and places that no language model has ever read about.

    python recipes/prepare_quickstart.py --output_dir data/quickstart --seed 0

Every entity has one passage of three facts, and a question about it can only be answered by retrieving that passage. One question in nine (counting,
"which day comes after Monday?", greetings) needs no passage, so that the model also learns when not to retrieve.

Written under `output_dir`:
    train.jsonl, validation.jsonl   training instances
    eval.jsonl                      questions about entities that are neither in train.jsonl nor in validation.jsonl, nor are the names in their answers
    corpus.jsonl                    the passages of all entities, of training and unseen alike
    gen/, emb_seq/                  two tiny Llama checkpoints with their tokenizer, ready to be co-supervised
    world.json                      the settings

Gen has run a copy drill on random tokens. It stands in for the pretraining that a real Gen brings: without it retrieval is learned all the same, but
not how to copy an answer out of a passage.
"""

import argparse
import inspect
import json
import os
import random
import re
import shutil
import string
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modeling_cosup.files_cosup import digest_file, read_json, write_json
from modeling_cosup.lines_cosup import write_lines
from trainer.data import content_id

# ---------------------------------------------------------------------- the world

SYLLABLES = [consonant + vowel for consonant in "b d k l m n r s t v kr th".split() for vowel in "aeiou"]
JOBS = "baker smith weaver miller potter sailor tailor mason painter doctor lawyer farmer hunter singer dancer carver printer cooper".split()
INSTRUMENTS = "lute harp flute drum fiddle horn organ bell lyre pipe zither cello viol trumpet oboe".split()
GOODS = "salt wool honey glass silk paper cheese copper amber wine rope pearls lamps boots clocks carpets".split()
CYCLES = {
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "month": "January February March April May June July August September October November December".split(),
}

# A fact: its values (an int asks for a fictional name of so many syllables), its wordings in passages and in questions, and its answer.
PERSON = [
    (3, ["was born in {v}", "comes from the town of {v}", "grew up in {v}"],
     ["Where was {n} born?", "What is the birthplace of {n}?"], "{n} was born in {v}."),
    (range(1400, 1900), ["was born in the year {v}", "dates from {v}"],
     ["When was {n} born?", "What is the birth year of {n}?"], "{n} was born in the year {v}."),
    (JOBS, ["works as a {v}", "is a {v} by trade", "earns a living as a {v}"],
     ["What does {n} do for work?", "What is the job of {n}?"], "{n} works as a {v}."),
    (INSTRUMENTS, ["plays the {v}", "loves to play the {v}"],
     ["What instrument does {n} play?", "Which instrument is played by {n}?"], "{n} plays the {v}."),
    (2, ["is married to {v}", "shares a house with a spouse named {v}"],
     ["Who is {n} married to?", "Who is the spouse of {n}?"], "{n} is married to {v}."),
]  # fmt: skip
PLACE = [
    (2, ["was founded by {v}", "owes its founding to {v}"],
     ["Who founded {n}?", "Who is the founder of {n}?"], "{n} was founded by {v}."),
    (range(1000, 1400), ["was founded in the year {v}", "goes back to {v}"],
     ["When was {n} founded?", "In what year was {n} founded?"], "{n} was founded in the year {v}."),
    (GOODS, ["is known for its {v}", "sells {v} to travellers"],
     ["What is {n} known for?", "What does {n} sell?"], "{n} is known for its {v}."),
    (2, ["lies on the river {v}", "stands by the banks of the {v}"],
     ["Which river does {n} lie on?", "What river is near {n}?"], "{n} lies on the river {v}."),
]  # fmt: skip
NO_PASSAGE = {  # question, answer
    "count": ("Count from {a} to {b}.", "{c}."),
    "cycle": ("Which {c} comes after {a}?", "After {a} comes {b}."),
    "greeting": ("Say hello to {n}.", "Hello {n}."),
}


class World:
    """Draws entities and questions. A name belongs to one title, or to the answers of one split."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.owner = {}  # name -> "title", or the split whose answers may use it again
        self.counts = [(a, b) for b in range(1, 10) for a in range(1, b)]
        self.rng.shuffle(self.counts)  # the first 8 are held out

    def name(self, lengths, owner, avoid=""):
        """A name such as "Tathebro", for lengths (3,), or "Krado Zuli", for (2, 2); no syllable comes twice, and none of those in `avoid`."""
        syllables = [syllable for syllable in SYLLABLES if syllable not in avoid.lower()]
        for _ in range(10000):
            drawn = iter(self.rng.sample(syllables, sum(lengths)))
            name = " ".join("".join(next(drawn) for _ in range(length)).capitalize() for length in lengths)
            if name not in self.owner or self.owner[name] == owner != "title":
                self.owner[name] = owner
                return name
        raise ValueError("The world has run out of names: ask for fewer unseen entities.")

    def entity(self, split):
        """A person or a place: its passage, and for each of three facts the questions and their answer."""
        person = self.rng.random() < 0.7
        title = self.name((2, self.rng.choice([2, 3])) if person else (3,), "title")
        subject, pronoun = title, self.rng.choice(["He", "She"]) if person else "It"
        sentences, facts, names = [], [], title
        for values, wordings, questions, answer in self.rng.sample(PERSON if person else PLACE, 3):
            value = self.name((values,), split, avoid=names) if isinstance(values, int) else self.rng.choice(values)
            names += f" {value}"  # a syllable that stands once in a passage can be copied by looking for the one before it
            sentences.append(f"{subject} {self.rng.choice(wordings).format(v=value)}.")
            facts.append(([question.format(n=title) for question in questions], answer.format(n=title, v=value)))
            subject = pronoun
        text = " ".join(sentences)
        return {"id": content_id(title, text), "title": title, "text": text}, facts

    def ask(self, passage, facts):
        """A question about an entity: `(question, answer, passage)`."""
        questions, answer = self.rng.choice(facts)
        return self.rng.choice(questions), answer, passage

    def ask_no_passage(self, split):
        """A question that needs no passage: `(question, answer, None)`. Counts and names are other ones in training; days and months are the same."""
        question, answer = NO_PASSAGE[kind := self.rng.choice(list(NO_PASSAGE))]
        if kind == "count":
            a, b = self.rng.choice(self.counts[8:] if split == "train" else self.counts[:8])
            values = {"a": a, "b": b, "c": " ".join(map(str, range(a, b + 1)))}
        elif kind == "cycle":
            cycle = self.rng.choice(list(CYCLES))
            i = self.rng.randrange(len(CYCLES[cycle]))
            values = {"c": cycle, "a": CYCLES[cycle][i - 1], "b": CYCLES[cycle][i]}
        else:
            values = {"n": self.name(self.rng.choice([(2,), (2, 2)]), split)}
        return question.format(**values), answer.format(**values), None


def write_world(folder, settings):
    """Write the four JSON Lines files. Unseen entities come first: the names they use are then closed to training."""
    world, corpus = World(settings["seed"]), []
    for split, num_entities, num_instances, no_passage_share in (
        ("eval", settings["num_unseen_entities"], settings["num_unseen_entities"], 0.0),
        ("validation", settings["num_validation"], settings["num_validation"], settings["no_passage_share"]),
        ("train", settings["num_train_entities"], settings["num_train_instances"], settings["no_passage_share"]),
    ):
        entities = [world.entity(split) for _ in range(num_entities)]
        corpus += [passage for passage, _ in entities]
        free = [world.rng.random() < no_passage_share for _ in range(num_instances)]
        asked = [world.ask_no_passage(split) if free[i] else world.ask(*entities[i % num_entities]) for i in range(num_instances)]
        if split == "eval":
            distinct = {}
            while len(distinct) < settings["num_eval_no_passage"]:
                distinct[world.ask_no_passage(split)] = None
            asked += distinct
        write_lines(folder / f"{split}.jsonl", [record(split, i, *x) for i, x in enumerate(asked)])
    write_lines(folder / "corpus.jsonl", corpus)


def record(split, i, question, answer, passage):
    """A training instance, or for split "eval" an evaluation instance."""
    row = {"id": f"quickstart-{split}-{i}", "dataset": "quickstart", "instruction": "", "input": question}
    if split == "eval":
        return {**row, "answers": [answer], "provenance": [[passage["id"]]] if passage else [], "candidates": []}
    return {**row, "segments": [{"text": answer, "passage": passage}]}


# ---------------------------------------------------------------------- the tokenizer and the models


def build_tokenizer():
    """
    A lossless WordPiece tokenizer of about 400 pieces, the same for every seed; "▁" stands for a space.

    A word of the templates is one piece ("▁born"), a name its syllables ("▁Ta" "the" "kro"), a year its digits, anything else its characters. `<s>`, `</s>`
    and `<pad>` are added tokens only, so that no text encodes to their ids under `split_special_tokens=True`.
    """
    templates = [part for *_, wordings, questions, answer in PERSON + PLACE for part in (*wordings, *questions, answer)]
    templates += [part for pair in NO_PASSAGE.values() for part in pair]
    words = re.findall("[A-Za-z]+", re.sub("{.}", "", " ".join(templates)))
    words += [*JOBS, *INSTRUMENTS, *GOODS, *CYCLES, *CYCLES["day"], *CYCLES["month"], "He", "She", "It", *string.digits]
    pieces = ["<unk>", *string.printable[:95], "\n", "▁", *SYLLABLES]
    pieces += ["▁" + word for word in words + [syllable.capitalize() for syllable in SYLLABLES]]
    pieces += ["▁::", "▁##", "##", "▁Input", "▁Output", ":\n\n", *(word for word in words if word[0].isupper())]  # prompts; questions begin after "\n\n"
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, clean_up_tokenization_spaces=False, **names)


def write_models(folder, seed, drill_max_steps):
    """Write gen/ and emb_seq/: the same untrained weights, and for Gen the copy drill. Drilled weights make a poor Emb_seq."""
    tokenizer = build_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape, **ids))  # 0.4M parameters
        model.save_pretrained(folder / "emb_seq")
        if drill_max_steps:
            copy_drill(model, tokenizer, random.Random(seed), drill_max_steps)
        model.save_pretrained(folder / "gen")
    for name in ("emb_seq", "gen"):
        tokenizer.save_pretrained(folder / name)


def copy_drill(gen, tokenizer, rng, max_steps, batch_size=32, learning_rate=2e-3, target=0.1):
    """
    Train Gen, in place, to copy: `<s> x </s> gap </s> x` on random tokens, with the loss on the second x.

    The lengths of x and gap change at every step, so that looking for what followed the last time solves it and looking at a fixed distance does not.
    Ends once the mean loss of 20 steps is below `target` nats, typically after about 500 steps.
    """
    optimizer = torch.optim.AdamW(gen.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    bos, eos = (torch.full((batch_size, 1), token_id) for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    losses = []
    for _ in (progress := tqdm(range(max_steps), desc="Copy drill, ends early")):
        n, gap = rng.randint(8, 24), rng.randint(0, 20)
        x, noise = torch.randint(1, tokenizer.vocab_size, (batch_size, n + gap)).split([n, gap], dim=1)  # 0 is <unk>
        hidden = gen.model(torch.cat([bos, x, eos, noise, eos, x], dim=1), use_cache=False).last_hidden_state  # (B, 2n + gap + 3, h)
        loss = F.cross_entropy(gen.lm_head(hidden[:, -n - 1 : -1]).flatten(0, 1), x.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gen.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        mean = sum(losses[-20:]) / len(losses[-20:])
        progress.set_postfix(loss=f"{mean:.2f}", refresh=False)
        if len(losses) >= 20 and mean < target:
            return
    warnings.warn(f"The copy drill ended after {max_steps} steps above its target loss of {target}: answers will be copied less well.", stacklevel=2)


# ---------------------------------------------------------------------- all of it


def prepare(
    output_dir: str,
    seed: int = 0,
    num_train_entities: int = 20000,
    num_unseen_entities: int = 500,
    num_train_instances: int = 25600,
    num_validation: int = 256,
    num_eval_no_passage: int = 100,
    no_passage_share: float = 0.11,
    drill_max_steps: int = 1200,
) -> dict[str, str]:
    """
    Write a world under `output_dir`, or reuse the one that lies there if this file made it with the same settings.

    Args:
        output_dir (`str`): another world there is replaced; a folder that holds anything else is refused.
        seed (`int`): of names, facts, questions and weights.
        num_train_entities (`int`): entities of train.jsonl. With only a few hundred, names are memorised rather than looked up.
        num_unseen_entities (`int`): entities of eval.jsonl, one question each.
        num_train_instances (`int`): instances of train.jsonl; the default is 400 steps of 64.
        num_validation (`int`): instances of validation.jsonl, and its entities.
        num_eval_no_passage (`int`): further questions of eval.jsonl that need no passage.
        no_passage_share (`float`): share of such questions in train.jsonl and validation.jsonl.
        drill_max_steps (`int`): upper limit of the copy drill, which warns when it gets there; 0 leaves Gen untrained.

    Returns:
        `dict[str, str]`: the path of each output, under "train", "validation", "eval", "corpus", "gen", "emb_seq" and "world".
    """
    settings = {name: value for name, value in locals().items() if name != "output_dir"}
    settings["code"] = digest_file(__file__)
    output = Path(output_dir)
    names = ["train.jsonl", "validation.jsonl", "eval.jsonl", "corpus.jsonl", "gen", "emb_seq", "world.json"]
    paths = {name.partition(".")[0]: str(output / name) for name in names}
    found = set(os.listdir(output)) if output.exists() else set()
    if found == set(names) and read_json(paths["world"]) == settings:
        return paths
    if found not in (set(), set(names)):
        raise FileExistsError(f"{output} holds other things than a world of this script: choose another folder, or remove it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{output.name}.", dir=output.parent) as temporary:
        made = Path(temporary, output.name)
        made.mkdir()
        write_world(made, settings)
        write_models(made, seed, drill_max_steps)
        write_json(made / "world.json", settings)
        shutil.rmtree(output, ignore_errors=True)
        made.rename(output)  # complete, or not there at all
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, parameter in inspect.signature(prepare).parameters.items():
        required = parameter.default is inspect.Parameter.empty
        parser.add_argument(f"--{name}", type=parameter.annotation, required=required, default=None if required else parameter.default)
    print(json.dumps(prepare(**vars(parser.parse_args())), indent=2))
