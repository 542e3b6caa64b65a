"""Eq. 2: what a function can express is reached, what it cannot is not; and the last block g of real architectures."""

import pytest
import torch

from modeling_cosup.architectures_cosup import lm_logits
from modeling_cosup.states_cosup import recording
from support.models import make_gen

from experiments.projection import LastBlock, project


def reached(function, start, targets, **options):
    """Return KL before and after a projection with enough steps."""
    result = project(function, start, targets, **{"learning_rate": 0.1, "tolerance": 0.0, "max_steps": 300} | options)
    assert torch.allclose(result.log_probs.exp().sum(1), torch.ones(len(start)), atol=1e-5)
    divergence = (result.log_probs.exp() * (result.log_probs - targets)).sum(1)
    assert torch.allclose(divergence, result.kl_after, atol=1e-6)  # KL[f(z) || target], not the other direction
    return result.kl_before, result.kl_after


def test_a_distribution_that_the_head_can_express_is_reached_and_another_is_not():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 40, bias=False).requires_grad_(False)
    head.weight.mul_(3)
    within = head(torch.randn(5, 8)).log_softmax(1)
    before, after = reached(head, torch.randn(5, 8), within)
    assert before.min() > 0.1 and after.max() < 1e-3
    beyond = torch.randn(5, 40).mul(3).log_softmax(1)  # 40 free logits, 8 dimensions
    before, after = reached(head, torch.randn(5, 8), beyond)
    assert (after < before).all() and after.min() > 0.2


def test_the_minimum_is_that_of_a_search_by_hand():
    torch.manual_seed(1)
    direction = torch.randn(30)
    targets = torch.randn(1, 30).mul(2).log_softmax(1)
    states = torch.linspace(-20, 20, 40001)[:, None]
    log_probs = (states * direction).log_softmax(1)
    best = (log_probs.exp() * (log_probs - targets)).sum(1).min()
    _, after = reached(lambda z: z * direction, torch.zeros(1, 1), targets, max_steps=600)
    assert after.item() == pytest.approx(best.item(), abs=1e-4)


def test_a_row_does_not_depend_on_the_others_and_ends_when_its_kl_no_longer_changes():
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 20, bias=False).requires_grad_(False)
    targets = torch.cat([head(torch.randn(2, 4)), head(torch.randn(2, 4)) * 4]).log_softmax(1)
    start = torch.randn(4, 4)
    together = project(head, start, targets, tolerance=0.01)
    assert together.steps.min() < together.steps.max() < 1000
    for row in range(4):
        alone = project(head, start[row : row + 1], targets[row : row + 1], tolerance=0.01)
        assert alone.steps.item() == together.steps[row]
        assert torch.allclose(alone.log_probs[0], together.log_probs[row], atol=1e-5)


def test_the_rule_of_the_paper_ends_at_once_where_steps_are_small():
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 20, bias=False).requires_grad_(False)
    targets, start = head(torch.randn(2, 4)).log_softmax(1), torch.randn(2, 4)
    small = project(head, start, targets, learning_rate=0.001)
    assert small.steps.tolist() == [1, 1]  # a step changes KL by less than the tolerance of 0.001
    assert torch.allclose(small.kl_after, small.kl_before, atol=1e-3)
    (_, after), (_, of_all_steps) = (
        reached(head, start, targets, learning_rate=0.001, max_steps=steps) for steps in (10, 100)
    )
    assert (of_all_steps < after).all()
    assert project(head, start, targets).kl_after.max() < of_all_steps.min()


def test_a_target_with_a_probability_of_0_is_refused():
    with pytest.raises(ValueError, match="hold a probability of 0"):
        project(torch.nn.Linear(2, 3), torch.zeros(1, 2), torch.tensor([[0.0, float("-inf"), float("-inf")]]))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "gemma2", "qwen3", "phi3"])
def test_g_rebuilds_the_last_hidden_state_and_f_of_g_the_logits(architecture):
    gen = make_gen(architecture)
    block = LastBlock(gen)
    ids = torch.randint(0, 380, (2, 12))
    with torch.no_grad(), recording(gen, (block.norm_name,)) as states:
        output = gen(input_ids=ids, output_hidden_states=True)
    residual, hidden = states[block.norm_name], output.hidden_states[-1]
    assert not torch.allclose(residual, hidden, atol=0.1)
    block.check(residual.flatten(0, 1), hidden.flatten(0, 1))
    with torch.no_grad():
        assert torch.allclose(block(residual), hidden, atol=1e-5)
        assert torch.allclose(lm_logits(gen, block(residual)), output.logits, atol=1e-4)
    with pytest.raises(ValueError, match=f"of a {architecture} model is not g.*differs from its last hidden state"):
        block.check(residual.flatten(0, 1), hidden.flatten(0, 1) + 0.1)


def test_an_architecture_whose_last_block_is_not_g_is_refused_by_name():
    """In gptj, attention and FFN read the same normed state: no norm stands between them."""
    with pytest.raises(ValueError, match="of a gptj model is not g.*no norm between attention and FFN"):
        LastBlock(make_gen("gptj"))
