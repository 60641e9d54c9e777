import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from nexus_cli.core.distill.head import head_loss
from nexus_cli.core.distill.teacher import TAIL_TEMPERATURES, DenseSignal, TopKSignal

# Shape letters: N positions, H hidden size, V vocabulary, K teacher entries, T temperatures.

N, H, V = 11, 6, 23


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(100)  # not the seed of problem(): a teacher equal to its student tests little


def problem(seed=0, dtype=torch.float64):
    """Hidden states, head, labels and ragged weights: some positions have one, both or none."""
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(N, H, generator=generator, dtype=dtype)
    head_VH = torch.randn(V, H, generator=generator, dtype=dtype)
    labels_N = torch.randint(V, (N,), generator=generator)
    ce_N = torch.rand(N, generator=generator, dtype=torch.float64)
    kd_N = torch.rand(N, generator=generator, dtype=torch.float64)
    ce_N[[0, 3, 4]] = 0
    kd_N[[0, 1, 5]] = 0
    return hidden_NH, head_VH, labels_N, ce_N, kd_N


def power_sums(logp_NV):
    """``log sum p ** (1 / T)`` at every temperature; ``-inf`` where a token is left out."""
    return torch.stack([(logp_NV / value).logsumexp(-1) for value in TAIL_TEMPERATURES], -1)


def topk_signal(hidden_NH, head_VH, k):
    logp_NV = torch.log_softmax(hidden_NH @ head_VH.T, -1)
    logprobs_NK, ids_NK = logp_NV.topk(k)
    tails_NT = power_sums(logp_NV.scatter(1, ids_NK, -torch.inf))
    return TopKSignal(ids_NK, logprobs_NK, tails_NT, dense=k == len(head_VH))


def dense_kl(logits_NV, teacher_NV, temperature):
    p_NV = torch.log_softmax(teacher_NV / temperature, -1)
    q_NV = torch.log_softmax(logits_NV / temperature, -1)
    return torch.nn.functional.kl_div(q_NV, p_NV, reduction="none", log_target=True).sum(-1)


def reverse_kl(logits_NV, teacher_NV, temperature):
    p_NV = torch.log_softmax(teacher_NV / temperature, -1)
    q_NV = torch.log_softmax(logits_NV / temperature, -1)
    return torch.nn.functional.kl_div(p_NV, q_NV, reduction="none", log_target=True).sum(-1)


def jsd(logits_NV, teacher_NV, temperature, beta):
    """By its definition, with the mixture's probabilities themselves."""
    p_NV = torch.softmax(teacher_NV / temperature, -1)
    q_NV = torch.softmax(logits_NV / temperature, -1)
    m_NV = beta * p_NV + (1 - beta) * q_NV
    teacher_N = (p_NV * (p_NV / m_NV).log()).sum(-1)
    student_N = (q_NV * (q_NV / m_NV).log()).sum(-1)
    return beta * teacher_N + (1 - beta) * student_N


REVERSE = {"divergence": "reverse"}
JSDS = [{"divergence": "jsd", "jsd_beta": beta} for beta in (0.5, 0.1, 0.9)]
DIVERGENCES = [{"divergence": "forward"}, REVERSE, *JSDS]


def divergence_of(settings, logits_NV, teacher_NV, temperature):
    if settings["divergence"] == "jsd":
        return jsd(logits_NV, teacher_NV, temperature, settings["jsd_beta"])
    by_kind = {"forward": dense_kl, "reverse": reverse_kl}
    return by_kind[settings["divergence"]](logits_NV, teacher_NV, temperature)


def bucket_kl(logits_NV, teacher_NV, kept, temperature):
    """By the definition, row by row: sum both models at T into K + 1 buckets, then compare.

    ``kept`` lists the ids of each row.
    """
    kls = []
    for logits_V, teacher_V, ids in zip(logits_NV, teacher_NV, kept, strict=True):
        p_V, q_V = (torch.softmax(x_V / temperature, -1) for x_V in (teacher_V, logits_V))
        rest_V = torch.ones(V, dtype=torch.bool)
        rest_V[ids] = False
        p_B, q_B = (torch.cat([x_V[ids], x_V[rest_V].sum()[None]]) for x_V in (p_V, q_V))
        used_B = p_B > 0
        kls.append((p_B[used_B] * (p_B[used_B] / q_B[used_B]).log()).sum())
    return torch.stack(kls)


def check_against_autograd(signal, kl_of_logits, temperature, **settings):
    hidden_NH, head_VH, labels_N, ce_N, kd_N = problem()
    if signal is None:
        kd_N = torch.zeros_like(kd_N)
    ours_NH = hidden_NH.clone().requires_grad_()
    oracle_NH = hidden_NH.clone().requires_grad_()

    loss = head_loss(
        ours_NH, head_VH, labels_N, ce_N, kd_N, signal, temperature=temperature, chunk_size=4,
        **settings,
    )  # fmt: skip
    (3 * loss.total).backward()

    logits_NV = oracle_NH @ head_VH.T
    ce = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
    kd = kl_of_logits(logits_NV) * temperature**2
    expected = (ce_N * ce + kd_N * kd).sum()
    (3 * expected).backward()

    assert signal is None or kd.min() > 1e-4
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(ours_NH.grad, oracle_NH.grad)
    active_N = (ce_N != 0) | (kd_N != 0)
    torch.testing.assert_close(loss.ce_N, torch.where(active_N, ce, 0.0).detach())
    torch.testing.assert_close(loss.kd_N, torch.where(kd_N != 0, kd, 0.0).detach())


def test_without_a_teacher_it_is_weighted_cross_entropy():
    check_against_autograd(None, lambda logits_NV: logits_NV.new_zeros(N), 1.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_dense_teacher_gives_the_loss_and_gradient_of_autograd(temperature):
    teacher_NH = torch.randn(N, H, dtype=torch.float64)
    teacher_NV = teacher_NH @ problem()[1].T
    check_against_autograd(
        DenseSignal(teacher_NH),
        lambda logits_NV: dense_kl(logits_NV, teacher_NV, temperature),
        temperature,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("settings", [REVERSE, *JSDS], ids=str)
def test_reverse_kl_and_jsd_have_the_value_and_gradient_of_autograd(temperature, settings):
    teacher_NH = torch.randn(N, H, dtype=torch.float64)
    teacher_NV = teacher_NH @ problem()[1].T
    check_against_autograd(
        DenseSignal(teacher_NH),
        lambda logits_NV: divergence_of(settings, logits_NV, teacher_NV, temperature),
        temperature,
        **settings,
    )


@pytest.mark.parametrize("temperature", TAIL_TEMPERATURES)
@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_a_top_k_teacher_gives_the_loss_and_gradient_of_the_buckets_of_the_dense_one(
    temperature, k
):
    teacher_NH, head_VH = torch.randn(N, H, dtype=torch.float64), problem()[1]
    teacher_NV = teacher_NH @ head_VH.T
    kept = teacher_NV.argsort(-1, descending=True)[:, :k].tolist()
    check_against_autograd(
        topk_signal(teacher_NH, head_VH, k),
        lambda logits_NV: bucket_kl(logits_NV, teacher_NV, kept, temperature),
        float(temperature),
    )


@pytest.mark.parametrize("temperature", [1.0, 1.7, 2.0, 4.0])
def test_a_top_k_of_the_whole_vocabulary_gives_the_loss_of_the_dense_teacher(temperature):
    teacher_NH, head_VH = torch.randn(N, H, dtype=torch.float64), problem()[1]
    teacher_NV = teacher_NH @ head_VH.T
    check_against_autograd(
        topk_signal(teacher_NH, head_VH, V),
        lambda logits_NV: dense_kl(logits_NV, teacher_NV, temperature),
        temperature,
    )


@pytest.mark.parametrize("temperature", TAIL_TEMPERATURES)
def test_unused_top_k_entries_belong_to_the_tail_whatever_their_ids(temperature):
    teacher_NH, head_VH = torch.randn(N, H, dtype=torch.float64), problem()[1]
    teacher_NV = teacher_NH @ head_VH.T
    whole = topk_signal(teacher_NH, head_VH, 5)
    logprobs_NK, ids_NK = whole.logprobs_NK.clone(), whole.ids_NK.clone()
    logprobs_NK[::2, 3:] = -torch.inf
    logprobs_NK[1::2, 0] = -torch.inf
    used_NK = logprobs_NK > -torch.inf
    kept = [ids_K[used_K].tolist() for ids_K, used_K in zip(ids_NK, used_NK, strict=True)]
    rest_NV = torch.log_softmax(teacher_NV, -1)
    for row, ids in enumerate(kept):
        rest_NV[row, ids] = -torch.inf
    ids_NK[::2, 3:] = 0
    check_against_autograd(
        TopKSignal(ids_NK, logprobs_NK, power_sums(rest_NV)),
        lambda logits_NV: bucket_kl(logits_NV, teacher_NV, kept, temperature),
        float(temperature),
    )


@pytest.mark.parametrize("temperature", TAIL_TEMPERATURES)
def test_a_position_without_a_distribution_harms_only_who_counts_it(temperature):
    hidden_NH, head_VH, labels_N, ce_N, kd_N = problem()
    whole = topk_signal(torch.randn(N, H, dtype=torch.float64), head_VH, 5)
    signal = TopKSignal(whole.ids_NK, whole.logprobs_NK.clone(), whole.tails_NT.clone())
    signal.logprobs_NK[0], signal.tails_NT[0] = -torch.inf, torch.nan
    losses = []
    for teacher in (whole, signal):
        leaf_NH = hidden_NH.clone().requires_grad_()
        loss = head_loss(leaf_NH, head_VH, labels_N, ce_N, kd_N, teacher, temperature=temperature)
        loss.total.backward()
        losses.append((loss.total, leaf_NH.grad))
    assert kd_N[0] == 0
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    kd_N[0] = 1
    loss = head_loss(hidden_NH, head_VH, labels_N, ce_N, kd_N, signal, temperature=temperature)
    assert loss.total.isnan()
    assert loss.kd_N.isnan().nonzero().tolist() == [[0]]


@pytest.mark.parametrize("kind", ["none", "dense", "top-k"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_passes_gradcheck(kind, temperature):
    hidden_NH, head_VH, labels_N, ce_N, kd_N = problem()
    teacher_NH = torch.randn(N, H, dtype=torch.float64)
    signal = {
        "none": None,
        "dense": DenseSignal(teacher_NH),
        "top-k": topk_signal(teacher_NH, head_VH, 4),
    }[kind]
    if signal is None:
        kd_N = torch.zeros_like(kd_N)

    def total(hidden_NH):
        return head_loss(
            hidden_NH, head_VH, labels_N, ce_N, kd_N, signal, temperature=temperature, chunk_size=4
        ).total

    assert torch.autograd.gradcheck(total, hidden_NH.requires_grad_())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("settings", [REVERSE, *JSDS], ids=str)
def test_the_gradient_of_reverse_kl_and_jsd_passes_gradcheck(temperature, settings):
    hidden_NH, head_VH, labels_N, ce_N, kd_N = problem()
    signal = DenseSignal(torch.randn(N, H, dtype=torch.float64))

    def total(hidden_NH):
        return head_loss(
            hidden_NH, head_VH, labels_N, ce_N, kd_N, signal, temperature=temperature,
            chunk_size=4, **settings,
        ).total  # fmt: skip

    assert torch.autograd.gradcheck(total, hidden_NH.requires_grad_())


def test_a_jsd_of_vanishing_beta_is_beta_times_the_forward_kl():
    hidden_NH, head_VH, labels_N, _, kd_N = problem()
    given = hidden_NH, head_VH, labels_N, torch.zeros(N), kd_N
    signal = DenseSignal(torch.randn(N, H, dtype=torch.float64))
    forward = head_loss(*given, signal).total
    vanishing = head_loss(*given, signal, divergence="jsd", jsd_beta=1e-9).total
    torch.testing.assert_close(vanishing / 1e-9, forward, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("settings", DIVERGENCES, ids=str)
def test_float32_is_the_loss_of_float64_where_probabilities_underflow(settings):
    """Each of the two is sure of another token, by more than float32 can hold as a number."""
    head_VH = torch.eye(4)
    hidden_NH = torch.tensor([[300.0, 0, 0, 0], [0, 1, 2, 3], [0, 500, 0, 0]])
    teacher_NH = torch.tensor([[0.0, 300, 0, 0], [250, 0, 1, 2], [0, 500, 1, 0]])
    results = []
    for dtype in (torch.float32, torch.float64):
        ours_NH = hidden_NH.to(dtype, copy=True).requires_grad_()
        loss = head_loss(
            ours_NH, head_VH.to(dtype), torch.zeros(3).long(), torch.zeros(3), torch.ones(3),
            DenseSignal(teacher_NH.to(dtype)), **settings,
        )  # fmt: skip
        loss.total.backward()
        results.append((loss.kd_N.double(), ours_NH.grad.double()))
    exact = divergence_of(settings, hidden_NH.double(), teacher_NH.double(), 1.0)
    torch.testing.assert_close(results[1][0], exact)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("settings", DIVERGENCES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_student_equal_to_its_teacher_has_kl_and_gradient_of_exactly_zero(
    dtype, settings, temperature
):
    hidden_NH, head_VH, labels_N, _, kd_N = problem(dtype=dtype)
    hidden_NH.requires_grad_()
    loss = head_loss(
        hidden_NH,
        head_VH,
        labels_N,
        torch.zeros(N),
        kd_N,
        DenseSignal(hidden_NH.detach().clone()),
        temperature=temperature,
        chunk_size=4,
        **settings,
    )
    loss.total.backward()
    assert loss.total.item() == 0
    assert loss.kd_N.abs().max() == 0
    assert hidden_NH.grad.abs().max() == 0


def test_bf16_weights_lose_only_the_rounding_of_the_inputs():
    hidden_NH, head_VH, labels_N, ce_N, kd_N = problem(dtype=torch.bfloat16)
    teacher_NH = torch.randn(N, H).to(torch.bfloat16)
    exact_NH = hidden_NH.double().requires_grad_()
    hidden_NH.requires_grad_()

    signals = DenseSignal(teacher_NH), DenseSignal(teacher_NH.double())
    ours = head_loss(hidden_NH, head_VH, labels_N, ce_N, kd_N, signals[0])
    exact = head_loss(exact_NH, head_VH.double(), labels_N, ce_N, kd_N, signals[1])
    ours.total.backward()
    exact.total.backward()

    assert ours.ce_N.dtype == torch.float32
    torch.testing.assert_close(ours.ce_N.double(), exact.ce_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.kd_N.double(), exact.kd_N, rtol=1e-5, atol=1e-5)
    assert hidden_NH.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden_NH.grad.double(), exact_NH.grad, rtol=3e-2, atol=3e-2)


def test_autocast_does_not_lower_the_precision():
    hidden_NH, head_VH, labels_N, ce_N, kd_N = problem(dtype=torch.float32)
    signal = DenseSignal(torch.randn(N, H))
    plain = head_loss(hidden_NH, head_VH, labels_N, ce_N, kd_N, signal)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = head_loss(hidden_NH, head_VH, labels_N, ce_N, kd_N, signal)
    assert torch.equal(plain.total, cast.total)


def test_the_chunk_size_does_not_change_the_loss():
    hidden_NH, head_VH, labels_N, ce_N, kd_N = problem()
    signal = DenseSignal(torch.randn(N, H, dtype=torch.float64))
    losses = [
        head_loss(hidden_NH, head_VH, labels_N, ce_N, kd_N, signal, chunk_size=size).total
        for size in (1, 3, N, 1000)
    ]
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(4))


def test_a_certain_student_that_gives_the_tail_no_mass_has_a_finite_loss():
    head_VH = torch.eye(4)
    hidden_NH = torch.tensor([[200.0, 0, 0, 0]], requires_grad=True)
    quarter = torch.tensor(0.25).log()
    tails_NT = torch.tensor([[0.75, torch.nan, torch.nan]]).log()  # of no use at temperature 1
    teacher = TopKSignal(torch.tensor([[0]]), quarter.view(1, 1), tails_NT)
    loss = head_loss(hidden_NH, head_VH, torch.tensor([0]), torch.ones(1), torch.ones(1), teacher)
    loss.total.backward()
    assert loss.total.isfinite()
    assert hidden_NH.grad.isfinite().all()


def test_labels_of_inactive_positions_are_never_read():
    hidden_NH, head_VH, labels_N, ce_N, kd_N = problem()
    signal = DenseSignal(torch.randn(N, H, dtype=torch.float64))
    expected = head_loss(hidden_NH, head_VH, labels_N, ce_N, kd_N, signal).total
    labels_N[0] = -100
    assert torch.equal(head_loss(hidden_NH, head_VH, labels_N, ce_N, kd_N, signal).total, expected)


def test_no_active_position_gives_zero_loss_and_zero_gradient():
    hidden_NH, head_VH, labels_N, _, _ = problem()
    hidden_NH.requires_grad_()
    loss = head_loss(hidden_NH, head_VH, labels_N, torch.zeros(N), torch.zeros(N), None)
    loss.total.backward()
    assert loss.total.item() == 0
    assert hidden_NH.grad.abs().max() == 0


class Allocations(TorchDispatchMode):
    """Records the largest tensor that any operation returns, and rows that met the head.

    Also how many bytes there are at one time in storages of at least ``large`` bytes.
    """

    def __init__(self, large=0):
        super().__init__()
        self.large = large
        self.alive = {}
        self.peak = 0
        self.largest = 0
        self.projected_rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and result.shape[1] == 4096:
            self.projected_rows += result.shape[0]
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage):
        self.largest = max(self.largest, storage.size())
        if storage.size() >= self.large:
            self.alive[StorageWeakRef(storage)] = storage.size()
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))


@pytest.mark.parametrize(
    ("kind", "settings"), [("top-k", {}), *(("dense", settings) for settings in DIVERGENCES)]
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("metrics", [False, True])
def test_no_tensor_grows_with_positions_times_vocabulary(kind, settings, temperature, metrics):
    num_positions, vocabulary, chunk = 512, 4096, 16
    head_VH = torch.randn(vocabulary, H)
    hidden_NH = torch.randn(num_positions, H, requires_grad=True)
    teacher_NH = torch.randn(num_positions, H)
    signal = DenseSignal(teacher_NH)
    if kind == "top-k":
        signal = topk_signal(teacher_NH, head_VH, 8)
    weight_N = torch.ones(num_positions)
    with Allocations(large=chunk * vocabulary * 4) as seen:
        head_loss(
            hidden_NH,
            head_VH,
            torch.zeros(num_positions, dtype=torch.long),
            weight_N,
            weight_N,
            signal,
            temperature=temperature,
            chunk_size=chunk,
            metrics=metrics,
            **settings,
        ).total.backward()
    assert seen.largest <= chunk * vocabulary * 4
    assert seen.peak <= 4 * chunk * vocabulary * 4


def test_inactive_positions_are_not_projected_and_cross_entropy_alone_needs_no_teacher():
    head_VH = torch.randn(4096, H)
    hidden_NH = torch.randn(100, H)
    ce_N, kd_N = torch.zeros(100), torch.zeros(100)
    ce_N[:30] = 1
    kd_N[20:30] = 1
    with Allocations() as seen:
        head_loss(hidden_NH, head_VH, torch.zeros(100).long(), ce_N, kd_N, DenseSignal(hidden_NH))
    assert seen.projected_rows == 30 + 10


def test_metrics_are_the_teachers_entropy_and_the_agreement_of_the_likeliest_token():
    hidden_NH, head_VH, labels_N, ce_N, kd_N = problem()
    signs_N1 = torch.where(torch.arange(N)[:, None] % 3 == 0, -1.0, 2.0)
    teacher_NH = hidden_NH * signs_N1
    active_N = kd_N != 0
    teacher_NV = teacher_NH @ head_VH.T
    expected = torch.distributions.Categorical(logits=teacher_NV / 2).entropy()
    agree = teacher_NV.argmax(-1) == (hidden_NH @ head_VH.T).argmax(-1)

    for signal in (DenseSignal(teacher_NH), topk_signal(teacher_NH, head_VH, V)):
        loss = head_loss(
            hidden_NH, head_VH, labels_N, ce_N, kd_N, signal, temperature=2.0, metrics=True
        )
        torch.testing.assert_close(loss.entropy_N, torch.where(active_N, expected, 0.0))
        assert torch.equal(loss.agreement_N.bool(), agree & active_N)
    assert 0 < agree[active_N].sum() < active_N.sum()


def test_a_temperature_at_which_the_tail_is_not_known_is_refused():
    hidden_NH, head_VH, labels_N, ce_N, kd_N = problem()
    signal = topk_signal(hidden_NH, head_VH, 4)
    with pytest.raises(ValueError, match="at the temperatures 1, 2, 4, not at 3"):
        head_loss(hidden_NH, head_VH, labels_N, ce_N, kd_N, signal, temperature=3.0)


@pytest.mark.parametrize("kind", ["reverse", "jsd"])
def test_a_top_k_teacher_is_refused_for_all_but_the_forward_kl(kind):
    hidden_NH, head_VH, labels_N, ce_N, kd_N = problem()
    signal = topk_signal(hidden_NH, head_VH, V)
    with pytest.raises(ValueError, match=f"{kind} divergence needs a dense teacher"):
        head_loss(hidden_NH, head_VH, labels_N, ce_N, kd_N, signal, divergence=kind)


@pytest.mark.parametrize("beta", [0.0, 1.0, -1.0])
def test_a_beta_that_leaves_one_of_the_two_out_of_the_mixture_is_refused(beta):
    hidden_NH, head_VH, labels_N, ce_N, kd_N = problem()
    given = hidden_NH, head_VH, labels_N, ce_N, kd_N, DenseSignal(hidden_NH)
    with pytest.raises(ValueError, match="between 0 and 1"):
        head_loss(*given, divergence="jsd", jsd_beta=beta)


def test_a_kl_weight_without_a_teacher_is_refused():
    with pytest.raises(ValueError, match="no teacher"):
        head_loss(*problem(), None)


def test_lengths_that_differ_are_refused():
    hidden_NH, head_VH, labels_N, ce_N, kd_N = problem()
    with pytest.raises(ValueError, match="numbers of positions differ"):
        head_loss(hidden_NH, head_VH, labels_N[1:], ce_N, kd_N, DenseSignal(hidden_NH))


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "settings"), [("top-k", {}), *(("dense", settings) for settings in DIVERGENCES)]
)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_a_gpu_gives_the_loss_and_gradient_of_float64(kind, settings, temperature):
    hidden_NH, head_VH, labels_N, ce_N, kd_N = (t.cuda() for t in problem(dtype=torch.bfloat16))
    teacher_NH = torch.randn(N, H).to("cuda", torch.bfloat16)
    losses, gradients = [], []
    for dtype in (torch.bfloat16, torch.float64):
        ours_NH = hidden_NH.to(dtype, copy=True).requires_grad_()
        signal = DenseSignal(teacher_NH.to(dtype))
        if kind == "top-k":
            signal = topk_signal(teacher_NH.double(), head_VH.double(), 5)
        loss = head_loss(
            ours_NH, head_VH.to(dtype), labels_N, ce_N, kd_N, signal, temperature=temperature,
            **settings,
        )  # fmt: skip
        loss.total.backward()
        losses.append(loss.total.double())
        gradients.append(ours_NH.grad.double())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=3e-2, atol=3e-2)


@gpu
@pytest.mark.gpu
def test_on_a_gpu_memory_does_not_grow_with_the_number_of_positions():
    head_VH = torch.randn(201_088, 64, device="cuda", dtype=torch.bfloat16)
    peaks = []
    for num_positions in (512, 4096):
        hidden_NH = torch.randn(num_positions, 64, device="cuda", dtype=torch.bfloat16)
        weight_N = torch.ones(num_positions, device="cuda")
        labels_N = torch.zeros(num_positions, device="cuda", dtype=torch.long)
        teacher = DenseSignal(torch.randn_like(hidden_NH))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        head_loss(
            hidden_NH.requires_grad_(), head_VH, labels_N, weight_N, weight_N, teacher,
            chunk_size=256,
        ).total.backward()  # fmt: skip
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0] + 8 * 4096 * 64
    assert peaks[0] < 4.5 * 256 * 201_088 * 4
