"""The keys of a token memory: what enters Gen's last FFN, whatever the batch, the padding and the windows."""

import pytest
import torch

from modeling_cosup.token_keys_cosup import document_ids, ffn_name, token_states, windows
from support.models import make_gen, make_model, make_tokenizer

ARCHITECTURES = ("llama", "gpt2", "mistral", "qwen3", "gemma2", "phi3", "mixtral", "gptj")
LENGTHS = (1, 30, 2, 0, 7, 12)  # of documents; the sliding windows of mistral, gemma2 and phi3 are 8 wide


def random_documents(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 390, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_equal_a_hooked_forward_of_each_window_alone(architecture):
    gen, documents = make_gen(architecture), random_documents()
    entered = []
    hook = gen.get_submodule(ffn_name(gen)).register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    keys, values, numbers, hidden = [], [], [], []
    for number, ids in enumerate(documents):
        for start, end, first in windows(len(ids), 16, 6):
            output = gen(torch.tensor([ids[start:end]]), output_hidden_states=True)
            part = slice(first - 1 - start, end - 1 - start)
            keys.append(entered.pop().reshape(end - start, -1)[part])
            hidden.append(output.hidden_states[-1][0, part])
            values += ids[first:end]
            numbers += [number] * (end - first)
    hook.remove()
    gen.get_output_embeddings().register_forward_hook(lambda *args: pytest.fail("the LM head ran"))
    for batch_size in (1, 3, 100):
        options = {"max_length": 16, "stride": 6, "batch_size": batch_size, "with_hidden": True}
        found = list(token_states(gen, iter(documents), **options))
        torch.testing.assert_close(torch.cat([states.keys for states in found]), torch.cat(keys), rtol=1e-6, atol=1e-6)
        found_hidden = torch.cat([states.hidden for states in found])
        torch.testing.assert_close(found_hidden, torch.cat(hidden), rtol=0, atol=1e-5)
        assert torch.cat([states.values for states in found]).tolist() == values
        assert torch.cat([states.documents for states in found]).tolist() == numbers


@pytest.mark.parametrize(("length", "max_length", "stride"), [(0, 4, 2), (1, 4, 2), (4, 4, 3), (23, 4, 3), (9, 5, 1)])
def test_windows_predict_every_token_but_the_first_once(length, max_length, stride):
    targets = []
    for start, end, first in windows(length, max_length, stride):
        assert end - start <= max_length
        assert start < first  # so that the state before a target is in its window
        assert start == 0 or first - start >= max_length - stride
        targets += range(first, end)
    assert targets == list(range(1, length))


def test_a_model_in_training_keeps_its_mode_and_has_no_dropout():
    gen = make_gen("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    first, second = (
        next(token_states(gen, random_documents(), max_length=16, stride=8, batch_size=2)) for _ in range(2)
    )
    assert torch.equal(first.keys, second.keys)
    assert gen.training
    assert not first.keys.requires_grad


def test_a_document_begins_with_bos_and_holds_no_control_token():
    tokenizer = make_model().tokenizer
    ids = document_ids("a [NSP] </s>", tokenizer)
    assert ids[0] == tokenizer.bos_token_id
    assert not set(ids[1:]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids[1:]) == "a [NSP] </s>"
    assert document_ids("a", make_tokenizer(bos=None)) == make_tokenizer(bos=None)("a")["input_ids"]


def test_what_cannot_be_read_is_refused():
    gen = make_gen()
    with pytest.raises(ValueError, match=r"The key of a mamba model is not known; known are .*gpt2, .*llama"):
        ffn_name(make_gen("mamba"))
    for changes, message in (
        ({"max_length": 1}, "max_length is 1, expected at least 2"),
        ({"stride": 0}, "stride is 0, expected 1 to 7"),
        ({"stride": 8}, "stride is 8, expected 1 to 7, less than max_length"),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(ValueError, match=message):  # before anything is read
            token_states(gen, [], **{"max_length": 8, "stride": 4, "batch_size": 2, **changes})
