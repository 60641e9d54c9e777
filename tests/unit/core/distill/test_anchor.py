import pytest
import torch

from nexus_cli.core.distill.anchor import Anchor


def masters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}


def clone(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_a_merge_moves_the_weights_part_of_the_way_back_to_the_start():
    start, trained = masters(0), masters(1)
    anchor = Anchor(start, beta=0.25, every=10)
    merged = clone(trained)
    move = anchor.merge(merged)
    changes = []
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.75 * trained[name] + 0.25 * start[name])
        changes.append((tensor - trained[name]).flatten())
    change = torch.cat(changes)
    assert move.l2 == pytest.approx(change.norm().item(), rel=1e-5)
    assert move.max == pytest.approx(change.abs().max().item())


def test_the_start_stays_the_anchor_and_the_previous_merge_does_not():
    start, first, second = masters(0), masters(1), masters(2)
    for kind, anchor_of_second in (
        ("start", start["a"]),
        ("previous", 0.5 * first["a"] + 0.5 * start["a"]),
    ):
        anchor = Anchor(clone(start), beta=0.5, every=1, kind=kind)
        anchor.merge(clone(first))
        merged = clone(second)
        anchor.merge(merged)
        torch.testing.assert_close(merged["a"], 0.5 * second["a"] + 0.5 * anchor_of_second)


def test_the_anchor_is_a_copy_that_training_does_not_move():
    weights = masters()
    anchor = Anchor(weights, beta=1.0, every=1)
    expected = clone(weights)
    weights["a"].add_(1)
    anchor.merge(weights)
    torch.testing.assert_close(weights["a"], expected["a"])


def test_merging_works_in_place_on_parameters_that_need_gradients():
    parameter = torch.nn.Parameter(torch.ones(3))
    anchor = Anchor({"p": parameter}, beta=0.5, every=1)
    with torch.no_grad():
        parameter.mul_(3)
    anchor.merge({"p": parameter})
    assert parameter.tolist() == [2, 2, 2]


def test_it_is_due_every_few_steps_but_not_before_the_first():
    anchor = Anchor(masters(), beta=0.5, every=3)
    assert [step for step in range(10) if anchor.due(step)] == [3, 6, 9]


def test_a_resumed_anchor_merges_as_the_unbroken_one():
    first, second = masters(1), masters(2)
    unbroken = Anchor(masters(0), beta=0.5, every=1, kind="previous")
    unbroken.merge(clone(first))
    resumed = Anchor(masters(3), beta=0.5, every=1, kind="previous")
    resumed.load_state_dict(clone(unbroken.state_dict()))
    expected, actual = clone(second), clone(second)
    unbroken.merge(expected)
    resumed.merge(actual)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_other_tensors_than_the_anchors_are_refused():
    anchor = Anchor(masters(), beta=0.5, every=1)
    with pytest.raises(ValueError, match="other tensors: b"):
        anchor.merge({"a": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match=r"anchor of a has shape \(2,\), not \(3, 2\)"):
        anchor.load_state_dict({"a": torch.zeros(2), "b": torch.zeros(4)})


@pytest.mark.parametrize(("beta", "every"), [(0.0, 1), (1.5, 1), (0.5, 0)])
def test_settings_that_average_nothing_are_refused(beta, every):
    with pytest.raises(ValueError, match=r"beta|merges"):
        Anchor(masters(), beta=beta, every=every)
