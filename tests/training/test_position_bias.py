"""What a reader attends to because of the place of a passage, and not because of what it says."""

import pytest

from trainer.position_bias import added, place_sums, without_bias


def test_a_share_is_relative_to_the_mean_of_its_place() -> None:
    shares = [[0.2, 0.1, 0.7], [0.4, 0.1, 0.5], [0.9, 0.1]]
    sums = added([place_sums(shares[:1]), place_sums(shares[1:]), place_sums([])])
    assert sums[3][0] == 2
    assert sums[3][1] == pytest.approx([0.6, 0.2, 1.2])
    # 1/3, 1/2 and 7/12 of the sums of their places: the last passage has the largest share, but hardly more than usual
    expected = [4 / 17, 6 / 17, 7 / 17]
    assert without_bias(shares[0], sums) == pytest.approx(expected)
    assert sum(without_bias(shares[1], sums) or ()) == pytest.approx(1)


def test_equal_shares_at_every_place_leave_nothing_to_learn() -> None:
    sums = place_sums([[0.1, 0.9]] * 4)
    assert without_bias([0.1, 0.9], sums) == pytest.approx([0.5, 0.5])


def test_the_only_instance_with_so_many_passages_has_no_target() -> None:
    sums = place_sums([[0.2, 0.8], [0.3, 0.3, 0.4], [0.5, 0.5]])
    assert without_bias([0.3, 0.3, 0.4], sums) is None


def test_a_place_without_attention_stays_without() -> None:
    sums = place_sums([[0.0, 1.0], [0.0, 1.0]])
    assert without_bias([0.0, 1.0], sums) == [0.0, 1.0]
