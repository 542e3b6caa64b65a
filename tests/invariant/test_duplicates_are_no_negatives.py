"""In the loss, identical passages of a batch never count as each other's negatives."""

import torch
import torch.nn.functional as F

from modeling_cosup import info_nce


def make_batch():
    """Return queries, distinct passages, the passage in each row of the batch, labels, and the mask of duplicates."""
    torch.manual_seed(0)
    distinct = F.normalize(torch.randn(4, 16), dim=-1)
    passage_of_row = torch.tensor([0, 1, 0, 2, 3, 0])  # the batch has passage 0 three times
    queries = F.normalize(torch.randn(5, 16), dim=-1).requires_grad_()
    labels = torch.tensor([0, 1, 2, -100, 5])
    same_passage = passage_of_row[labels.clamp(min=0)][:, None] == passage_of_row
    return queries, distinct, passage_of_row, labels, same_passage


def test_loss_and_gradient_equal_the_batch_without_duplicates():
    queries, distinct, passage_of_row, labels, same_passage = make_batch()
    unique_labels = torch.where(labels == -100, labels, passage_of_row[labels.clamp(min=0)])
    rows = [0, 2, 4]  # their positive is passage 0; for the other queries, every copy of it is a negative
    losses = info_nce(queries, distinct[passage_of_row], labels, same_passage, temperature=0.05)[rows]
    expected = info_nce(queries, distinct, unique_labels, temperature=0.05)[rows]
    torch.testing.assert_close(losses, expected)
    gradient = torch.autograd.grad(losses.sum(), queries)
    expected_gradient = torch.autograd.grad(expected.sum(), queries)
    torch.testing.assert_close(gradient, expected_gradient)


def test_a_copy_of_the_positive_gets_no_gradient_and_does_not_matter():
    queries, distinct, passage_of_row, labels, same_passage = make_batch()
    passages = distinct[passage_of_row].clone().requires_grad_()
    losses = info_nce(queries, passages, labels, same_passage, temperature=0.05)
    (gradient,) = torch.autograd.grad(losses[0], passages)
    assert not gradient[[2, 5]].any()
    assert gradient[[0, 1, 3, 4]].any(1).all()
    other = passages.detach().clone()
    other[[2, 5]] *= -7.0
    assert torch.equal(info_nce(queries, other, labels, same_passage, temperature=0.05)[0], losses[0])
    assert info_nce(queries, passages, labels, temperature=0.05)[0] > losses[0] + 0.1  # without the mask they count
