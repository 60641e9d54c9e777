import math

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func

from nexus_cli.core.distill.losses import load_balance, router_drift, router_kl, router_z

# Shape letters: L layers, B sequences, S positions, N = B * S, E experts.

L, B, S, E, TOP_K = 3, 4, 5, 6, 2


def routers(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(B * S, E, generator=generator, dtype=dtype) for _ in range(L)]


def ragged_mask():
    mask_BS = torch.ones(B, S, dtype=torch.bool)
    mask_BS[1, 3:] = False
    mask_BS[2] = False
    mask_BS[3, ::2] = False
    return mask_BS


def softmax(logits, temperature=1.0):
    """One row in plain Python."""
    powers = [math.exp(x / temperature) for x in logits.tolist()]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_router_kl_is_the_definition_averaged_over_layers(temperature):
    student, teacher = routers(0), routers(1)
    expected = torch.zeros(B * S, dtype=torch.float64)
    for ours_NE, theirs_NE in zip(student, teacher, strict=True):
        for n in range(B * S):
            p, q = softmax(theirs_NE[n], temperature), softmax(ours_NE[n], temperature)
            kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            expected[n] += temperature**2 * kl / L
    torch.testing.assert_close(router_kl(student, teacher, temperature=temperature), expected)


def test_router_kl_trains_the_student_alone():
    student = [logits.requires_grad_() for logits in routers(0)]
    teacher = [logits.requires_grad_() for logits in routers(1)]
    assert torch.autograd.gradcheck(
        lambda *ours: router_kl(ours, teacher, temperature=2.0).sum(), tuple(student)
    )
    router_kl(student, teacher).sum().backward()
    assert all(logits.grad is None for logits in teacher)


def test_router_kl_of_equal_routers_is_zero_and_computed_in_float32():
    routers_bf16 = routers(0, torch.bfloat16)
    kl_N = router_kl(routers_bf16, routers_bf16)
    assert kl_N.dtype == torch.float32
    assert kl_N.abs().max() == 0


def test_routers_of_different_depth_are_refused():
    with pytest.raises(ValueError, match="3 and 2 layers"):
        router_kl(routers(0), routers(1)[:2])


def test_router_z_is_the_squared_log_sum_of_exponentials():
    student = routers(0)
    expected = [
        sum(math.log(sum(map(math.exp, logits_NE[n].tolist()))) ** 2 for logits_NE in student) / L
        for n in range(B * S)
    ]
    torch.testing.assert_close(router_z(student), torch.tensor(expected, dtype=torch.float64))


def test_load_balance_is_the_switch_loss_of_each_sequence():
    student, mask_BS = routers(0), ragged_mask()
    expected = 0.0
    for logits_NE in student:
        logits_BSE = logits_NE.view(B, S, E)
        for b in range(B):
            tokens = [s for s in range(S) if mask_BS[b, s]]
            if not tokens:
                continue
            counts, mass = [0] * E, [0.0] * E
            for s in tokens:
                row = logits_BSE[b, s].tolist()
                for e in sorted(range(E), key=lambda e: -row[e])[:TOP_K]:
                    counts[e] += 1
                mass = [m + p for m, p in zip(mass, softmax(logits_BSE[b, s]), strict=True)]
            n = len(tokens)
            expected += E * sum((counts[e] / (n * TOP_K)) * (mass[e] / n) for e in range(E)) / L
    total, num_sequences = load_balance(student, mask_BS, top_k=TOP_K)
    assert total.item() == pytest.approx(expected, rel=1e-12)
    assert num_sequences.item() == 3


def test_load_balance_of_one_layer_and_sequence_is_transformers_loss_over_k():
    logits_NE = routers(0)[0]
    mask_BS = torch.ones(1, B * S, dtype=torch.bool)
    ours, _ = load_balance([logits_NE], mask_BS, top_k=TOP_K)
    theirs = load_balancing_loss_func((logits_NE,), num_experts=E, top_k=TOP_K)
    torch.testing.assert_close(ours.float() * TOP_K, theirs.float())


def test_perfect_balance_gives_one_and_collapse_gives_the_number_of_experts_over_k():
    mask_BS = torch.ones(1, E, dtype=torch.bool)
    turns_NE = 50 * (torch.eye(E) + torch.eye(E).roll(1, 1))
    collapsed_NE = torch.zeros(E, E)
    collapsed_NE[:, :TOP_K] = 50
    assert load_balance([turns_NE], mask_BS, top_k=TOP_K)[0].item() == pytest.approx(1)
    assert load_balance([collapsed_NE], mask_BS, top_k=TOP_K)[0].item() == pytest.approx(E / TOP_K)


def test_load_balance_does_not_depend_on_the_split_into_batches():
    student, mask_BS = routers(0), ragged_mask()
    whole, count = load_balance(student, mask_BS, top_k=TOP_K)
    halves = [
        load_balance(
            [logits_NE[rows * S : (rows + 2) * S] for logits_NE in student],
            mask_BS[rows : rows + 2],
            top_k=TOP_K,
        )
        for rows in (0, 2)
    ]
    torch.testing.assert_close(halves[0][0] + halves[1][0], whole)
    assert halves[0][1] + halves[1][1] == count


def test_load_balance_pushes_probability_from_busy_to_idle_experts():
    logits_NE = torch.zeros(E, E, dtype=torch.float64)
    logits_NE[:, :TOP_K] = 1.0
    logits_NE.requires_grad_()
    load_balance([logits_NE], torch.ones(1, E, dtype=torch.bool), top_k=TOP_K)[0].backward()
    assert (logits_NE.grad[:, :TOP_K] > 0).all()
    assert (logits_NE.grad[:, TOP_K:] < 0).all()


def test_masked_tokens_take_no_part_in_any_measure():
    student, teacher, mask_BS = routers(0), routers(1), ragged_mask()
    hidden_N = ~mask_BS.reshape(-1)
    spoiled = [logits.masked_fill(hidden_N[:, None], 30.0) for logits in student]
    for before, after in zip(student, spoiled, strict=True):
        assert not torch.equal(before, after)
    clean = load_balance(student, mask_BS, top_k=TOP_K)[0]
    assert torch.equal(clean, load_balance(spoiled, mask_BS, top_k=TOP_K)[0])
    clean, dirty = (
        router_drift(ours, teacher, mask_BS, top_k=TOP_K).sums for ours in (student, spoiled)
    )
    assert torch.equal(clean, dirty)


def test_drift_metrics_are_the_definitions():
    student, teacher, mask_BS = routers(0), routers(1), ragged_mask()
    counted = mask_BS.reshape(-1).nonzero()[:, 0].tolist()
    kl = l1 = entropy = overlap = 0.0
    load = torch.zeros(L, E)
    for layer, (ours_NE, theirs_NE) in enumerate(zip(student, teacher, strict=True)):
        for n in counted:
            p, q = softmax(theirs_NE[n]), softmax(ours_NE[n])
            kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            l1 += sum(abs(a - b) for a, b in zip(p, q, strict=True))
            entropy += sum(a * math.log(a) for a in p) - sum(b * math.log(b) for b in q)
            mine = set(ours_NE[n].topk(TOP_K).indices.tolist())
            overlap += len(mine & set(theirs_NE[n].topk(TOP_K).indices.tolist())) / TOP_K
            for e in mine:
                load[layer, e] += 1
    metrics = router_drift(student, teacher, mask_BS.reshape(-1), top_k=TOP_K).metrics()
    scale = L * len(counted)
    assert metrics["drift_kl"] == pytest.approx(kl / scale)
    assert metrics["drift_l1"] == pytest.approx(l1 / scale)
    assert metrics["drift_entropy"] == pytest.approx(entropy / scale)
    assert metrics["drift_topk_overlap"] == pytest.approx(overlap / scale)
    assert metrics["load_max"] == pytest.approx(load.max().item() / (len(counted) * TOP_K))


def test_layers_have_the_measures_of_a_model_of_that_layer_alone():
    student, teacher, mask_BS = routers(0), routers(1), ragged_mask()
    layers = router_drift(student, teacher, mask_BS, top_k=TOP_K).metrics()["drift_layers"]
    for layer in range(L):
        alone = router_drift([student[layer]], [teacher[layer]], mask_BS, top_k=TOP_K).metrics()
        for name in ("kl", "l1", "entropy", "topk_overlap"):
            assert layers[name][layer] == pytest.approx(alone[f"drift_{name}"])
        assert layers["load_max"][layer] == pytest.approx(alone["load_max"])


def test_drift_adds_up_over_batches_and_is_empty_without_tokens():
    student, teacher, mask_BS = routers(0), routers(1), ragged_mask()
    parts = [
        router_drift(
            [logits[rows * S : (rows + 2) * S] for logits in student],
            [logits[rows * S : (rows + 2) * S] for logits in teacher],
            mask_BS[rows : rows + 2],
            top_k=TOP_K,
        )
        for rows in (0, 2)
    ]
    whole = router_drift(student, teacher, mask_BS, top_k=TOP_K)
    torch.testing.assert_close((parts[0] + parts[1]).sums, whole.sums)
    nothing = router_drift(student, teacher, torch.zeros_like(mask_BS), top_k=TOP_K)
    assert nothing.metrics() == {}
