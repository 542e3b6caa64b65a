"""info_nce and chunked_cross_entropy against few-line references."""

import pytest
import torch
import torch.nn.functional as F

from modeling_cosup import chunked_cross_entropy, info_nce, similarity_scores


def reference_info_nce(queries, passages, labels, same_passage=None, temperature=1.0):
    losses = []
    for i, label in enumerate(labels.tolist()):
        if label == -100:
            losses.append(queries.sum() * 0)
            continue
        scores = []
        for j, passage in enumerate(passages):
            if j == label or same_passage is None or not same_passage[i, j]:
                scores.append(queries[i] @ passage / temperature)
        positive = queries[i] @ passages[label] / temperature
        losses.append(torch.stack(scores).logsumexp(0) - positive)
    return torch.stack(losses)


def embeddings(n=6, m=9, h=16, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = (torch.randn(n, h, generator=generator) * scale).requires_grad_()
    passages = (torch.randn(m, h, generator=generator) * scale).requires_grad_()
    return queries, passages


LABELS = torch.tensor([3, 0, -100, 8, 3, -100])
SAME = torch.zeros(6, 9, dtype=torch.bool)
SAME[0, [3, 5]] = SAME[4, [3, 5]] = True  # passage 5 is passage 3 again
SAME[3, [1, 2, 8]] = True


@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("same_passage", [None, SAME])
def test_info_nce_and_its_gradients_equal_the_reference(same_passage, temperature):
    queries, passages = embeddings()
    doubles = queries.detach().double().requires_grad_(), passages.detach().double().requires_grad_()
    losses = info_nce(queries, passages, LABELS, same_passage, temperature)
    expected = reference_info_nce(*doubles, LABELS, same_passage, temperature)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    gradients = torch.autograd.grad((losses * weights).sum(), (queries, passages))
    expected_gradients = torch.autograd.grad((expected * weights).sum(), doubles)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-4)


def test_info_nce_is_zero_where_the_label_is_minus_100():
    queries, passages = embeddings()
    losses = info_nce(queries, passages, LABELS)
    assert losses.shape == (6,)
    assert losses[[2, 5]].tolist() == [0.0, 0.0]
    assert (losses[[0, 1, 3, 4]] > 0).all()
    losses.sum().backward()
    assert not queries.grad[[2, 5]].any()
    assert queries.grad[[0, 1, 3, 4]].any(1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_info_nce_under_autocast_at_paper_scale_scores(dtype):
    """Raw dot products of final-norm states start near 1,000, where bf16 knows only every eighth number."""
    torch.manual_seed(0)
    passages = F.normalize(torch.randn(64, 128), dim=-1) * 34
    queries = F.normalize(passages + 0.05 * torch.randn(64, 128), dim=-1) * 34
    # differences of about 0.1 between scores of about 1,000
    passages[1::2] = passages[::2] + 0.002 * torch.randn(32, 128)
    labels = torch.arange(64)
    expected = info_nce(queries, passages, labels)
    assert 900 < similarity_scores(queries, passages).max() < 1200
    assert expected.max() > 0.1
    with torch.autocast("cpu", dtype):
        losses, scores = info_nce(queries, passages, labels), similarity_scores(queries, passages)
        assert (queries @ passages.T).dtype == dtype  # autocast is on
    assert losses.dtype == scores.dtype == torch.float32
    assert torch.equal(losses, expected)
    reference = reference_info_nce(queries.double(), passages.double(), labels)
    torch.testing.assert_close(losses.double(), reference, rtol=0, atol=1e-3)


def test_info_nce_takes_low_precision_embeddings():
    queries, passages = (embeds.detach().bfloat16() for embeds in embeddings())
    losses = info_nce(queries, passages, LABELS)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, info_nce(queries.float(), passages.float(), LABELS))


@pytest.mark.parametrize(("n", "m"), [(0, 5), (0, 0), (3, 0)])
def test_info_nce_without_queries_or_passages(n, m):
    queries, passages = embeddings(n, m)
    losses = info_nce(queries, passages, torch.full((n,), -100), torch.zeros(n, m, dtype=torch.bool))
    assert losses.shape == (n,)
    assert losses.sum() == 0
    losses.sum().backward()
    assert not queries.grad.any()
    assert not passages.grad.any()


def lm_case(valid=0.6, batch=3, length=17, width=8, vocabulary=29):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(batch, length, width, generator=generator).requires_grad_()
    head = torch.nn.Linear(width, vocabulary)
    torch.nn.init.normal_(head.weight, generator=generator)
    labels = torch.randint(vocabulary, (batch, length), generator=generator)
    return hidden, head, labels.masked_fill(torch.rand(batch, length, generator=generator) > valid, -100)


def full_cross_entropy(hidden, labels, head):
    logits = head(hidden)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("valid", [0.3, 1.0])
@pytest.mark.parametrize("chunk_size", [1, 5, 16, 2048])
def test_chunked_cross_entropy_and_its_gradients_equal_the_full_logits(chunk_size, valid):
    hidden, head, labels = lm_case(valid)
    variables = (hidden, head.weight, head.bias)
    loss = chunked_cross_entropy(hidden, labels, head, chunk_size)
    expected = full_cross_entropy(hidden, labels, head)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, variables), torch.autograd.grad(expected, variables))


def test_chunked_cross_entropy_computes_logits_only_at_labels():
    hidden, head, labels = lm_case()
    seen = []
    head.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    chunked_cross_entropy(hidden, labels, head, chunk_size=4)
    assert sum(seen) == (labels[:, 1:] != -100).sum()
    assert max(seen) == 4


@pytest.mark.parametrize("length", [17, 1])
def test_chunked_cross_entropy_without_labels_is_zero_with_a_graph(length):
    hidden, head, labels = lm_case(length=length)
    loss = chunked_cross_entropy(hidden, torch.full_like(labels, -100), head)
    assert loss == 0
    loss.backward()
    for variable in (hidden, head.weight, head.bias):
        assert variable.grad is not None
        assert not variable.grad.any()


def test_chunked_cross_entropy_under_autocast_sums_in_float32():
    hidden, head, labels = lm_case()
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, labels, head, chunk_size=5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, full_cross_entropy(hidden, labels, head), rtol=1e-2, atol=0)
    hidden, head = hidden.bfloat16(), head.bfloat16()  # a model in bf16, without autocast
    loss = chunked_cross_entropy(hidden, labels, head)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, full_cross_entropy(hidden, labels, lambda states: head(states).float()))
