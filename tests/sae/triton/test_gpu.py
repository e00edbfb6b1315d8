"""On a GPU: shapes and firing of real training, bitwise repeats, graphs, memory, and no host synchronisation."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is installed on Linux only")

from sae.code import SparseCode
from sae.kernels import triton as fast
from sae.kernels.triton import encode, features, order
from sae.kernels.triton.select import select_rows

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def sorted_topk(z: Tensor, k: int, absolute: bool) -> tuple[Tensor, Tensor]:
    ranked = z.abs() if absolute else z.relu()
    ordered, indices = torch.sort(ranked, dim=1, descending=True, stable=True)
    active = ordered[:, :k] != 0
    indices = torch.where(active, indices[:, :k], 0)
    return torch.where(active, z.gather(1, indices), 0), indices


@pytest.mark.parametrize(("n", "d", "d_sae", "k"), [(512, 768, 24576, 32), (333, 100, 5001, 1), (260, 768, 9000, 512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("absolute", [False, True])
def test_selection_is_that_of_a_full_sort(
    n: int, d: int, d_sae: int, k: int, dtype: torch.dtype, absolute: bool
) -> None:
    x = torch.randn(n, d, device="cuda").to(dtype)
    W = (torch.randn(d_sae, d, device="cuda") / d**0.5).to(dtype).T
    b = torch.randn(d_sae, device="cuda") * 0.1
    x[1], x[2, 0] = 0, torch.nan
    values, indices = fast.topk_encode(x, W, b, k, absolute=absolute)
    step = encode.chunk_rows(n, d_sae)
    for first in range(0, n, step):
        z = torch.empty(min(step, n - first), d_sae, device="cuda")
        encode.product(x[first : first + step], W, z)
        expected = sorted_topk(z + b, k, absolute)
        assert torch.equal(indices[first : first + step], expected[1])
        assert torch.equal(values[first : first + step].nan_to_num(7), expected[0].nan_to_num(7))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_batch_topk_is_that_of_the_whole_batch(scale: float) -> None:
    """Integers, so that sums are exact; where the first rows are larger than the others, the batch is done again."""
    n, d, d_sae, n_entries = 1000, 32, 3000, 20000
    x = torch.randint(-3, 4, (n, d), device="cuda").bfloat16()
    x[:100] *= scale
    W = torch.randint(-3, 4, (d_sae, d), device="cuda").bfloat16().T
    code = fast.batch_topk_encode(x, W, torch.zeros(d_sae, device="cuda"), n_entries)
    z = (x.float() @ W.float()).relu().view(-1)
    chosen = torch.sort(z, descending=True, stable=True).indices[:n_entries]
    wanted = torch.zeros_like(z).scatter_(0, chosen, z[chosen]).view(n, d_sae)
    assert int(code.offsets[-1]) == n_entries
    assert torch.equal(code.to_dense(), wanted)


@pytest.mark.parametrize("k", [1, 32, 100])
@pytest.mark.parametrize("kind", ["all equal", "all negative", "rounded", "one group", "infinite"])
def test_awkward_scores_at_full_width(kind: str, k: int) -> None:
    d_sae = 24576
    z = torch.randn(300, d_sae, device="cuda")
    if kind == "all equal":
        z = torch.ones_like(z)
    elif kind == "all negative":
        z = -z.abs()
    elif kind == "rounded":
        z = (2 * z).round()
    elif kind == "one group":
        z = -z.abs()
        z[:, ::1024] *= -1
    else:
        z[::2, 5] = torch.inf
        z[:, 9] = -torch.inf
    values, indices = torch.empty(300, k, device="cuda"), torch.empty(300, k, dtype=torch.int64, device="cuda")
    select_rows(z, torch.zeros(d_sae, device="cuda"), k, values, indices)
    expected_values, expected_indices = sorted_topk(z, k, False)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(values, expected_values)


def zipf_code(n: int, k: int, d_sae: int) -> SparseCode:
    """Feature 0 fires always; the others by a power law."""
    indices = (d_sae ** torch.rand(n, k, device="cuda", dtype=torch.float64)).long() % d_sae
    indices[:, 0] = 0
    return SparseCode(torch.randn(n, k, device="cuda"), indices, d_sae)


@pytest.mark.parametrize(("d", "dtype", "tolerance"), [(768, torch.float32, 1e-6), (1000, torch.bfloat16, 1e-2)])
def test_gradients_under_zipf_firing_against_float64(d: int, dtype: torch.dtype, tolerance: float) -> None:
    n, k, d_sae = 2000, 16, 3000
    code = zipf_code(n, k, d_sae)
    W = torch.randn(d_sae, d, device="cuda") / d**0.5
    x, g = torch.randn(n, d, device="cuda"), torch.randn(n, d, device="cuda")
    ours = fast.gradients(code, x.to(dtype), g.to(dtype), W.T, W)
    dense = torch.zeros(n, d_sae, dtype=torch.float64, device="cuda")
    dense.scatter_add_(1, code.indices, code.values.double())
    da = torch.einsum("nd,nkd->nk", g.double(), W.double()[code.indices])
    dense_da = torch.zeros_like(dense).scatter_add_(1, code.indices, da)
    wanted = {
        "W_dec": dense.T @ g.double(), "W_enc": (dense_da.T @ x.double()).T, "b_enc": dense_da.sum(0),
        "b_dec": g.double().sum(0) - dense_da.sum(0) @ W.double(),
    }  # fmt: skip
    for name, reference in wanted.items():
        error = (getattr(ours, name).double() - reference).norm() / reference.norm()
        assert error < tolerance, name


def test_gradients_repeat_bit_for_bit() -> None:
    code = zipf_code(4096, 32, 8192)
    W = torch.randn(8192, 512, device="cuda")
    x, g = torch.randn(4096, 512, device="cuda").bfloat16(), torch.randn(4096, 512, device="cuda").bfloat16()
    one = torch.ones((), device="cuda")

    def made() -> features.FeatureGradients:
        inputs = order.by_feature(code), g, x, one, W
        return features.feature_gradients(features.products(*inputs), *inputs)

    first = made()
    for _ in range(9):
        again = made()
        for name in ("W_dec", "W_enc", "b_enc", "squares"):
            assert torch.equal(getattr(first, name), getattr(again, name)), name


class Training:
    """A TopK SAE on planted data, trained step by step."""

    n, d, d_sae, k = 1024, 256, 2048, 16

    def __init__(self, shadow: torch.dtype) -> None:
        generator = torch.Generator("cuda").manual_seed(1)
        self.directions = torch.randn(512, self.d, device="cuda", generator=generator)
        W = torch.randn(self.d_sae, self.d, device="cuda", generator=generator)
        W /= W.norm(dim=1, keepdim=True)
        made = [W.clone(), W, torch.zeros(self.d_sae, device="cuda"), torch.zeros(self.d, device="cuda")]
        self.parameters = fast.Parameters.starting(*made, shadow)
        self.since = torch.zeros(self.d_sae, dtype=torch.int64, device="cuda")
        self.batch = torch.empty(self.n, self.d, device="cuda")
        self.scalars = torch.zeros(2, device="cuda")
        self.adam = fast.AdamStep(self.scalars, 0.9, 0.999, 1e-8)
        self.one = torch.ones((), device="cuda")

    def draw(self, step: int) -> None:
        generator = torch.Generator("cuda").manual_seed(100 + step)
        active = torch.rand(self.n, 512, device="cuda", generator=generator)
        self.batch.copy_(torch.where(active > 0.98, active, 0) @ self.directions)
        self.scalars.copy_(torch.tensor(fast.step_scalars(1e-3, step + 1, (0.9, 0.999))))

    def step(self) -> fast.StepResult:
        return fast.training_step(self.batch, self.one, fast.topk_rule(self.k), self.parameters, self.since, self.adam)

    def state(self) -> list[Tensor]:
        p = self.parameters
        return [p.W_enc, p.W_dec, p.b_enc, p.b_dec, p.m_W_dec.square, self.since]


def test_a_thousand_steps_follow_dense_autograd() -> None:
    """The same losses as torch.topk, autograd and torch's Adam in fp32, step by step until rounding has grown."""
    ours = Training(torch.float32)
    W_enc, W_dec, b_enc, b_dec = (t.clone().requires_grad_() for t in ours.state()[:4])
    adam = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=1e-3, fused=True)
    losses = []
    for step in range(1000):
        ours.draw(step)
        x = ours.batch
        z = ((x - b_dec) @ W_enc.T + b_enc).relu()
        best = z.topk(ours.k, dim=1)
        x_hat = torch.zeros_like(z).scatter(1, best.indices, best.values) @ W_dec + b_dec
        loss = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            adam.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        result = ours.step()
        losses.append(torch.stack([loss.detach().double(), result.squared_error / result.total_variance]))
    plain, fused = torch.stack(losses).T.cpu()
    assert torch.allclose(plain[:20], fused[:20], rtol=1e-4)
    assert torch.allclose(plain[-100:].mean(), fused[-100:].mean(), rtol=0.02)
    assert fused[-100:].mean() < 0.5 * fused[:10].mean()


def test_ten_runs_end_in_the_same_bits() -> None:
    ends = []
    for _ in range(10):
        run = Training(torch.bfloat16)
        for step in range(5):
            run.draw(step)
            run.step()
        ends.append(run.state())
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], end, strict=True))


def test_a_captured_graph_trains_as_the_eager_step() -> None:
    eager, graphed = Training(torch.bfloat16), Training(torch.bfloat16)
    graphed.draw(0)
    saved = [t.clone() for t in _everything(graphed)]
    step = fast.GraphedStep(graphed.step)
    for tensor, old in zip(_everything(graphed), saved, strict=True):
        tensor.copy_(old)
    for number in range(5):
        eager.draw(number)
        graphed.draw(number)
        eager.step()
        step()
    assert all(torch.equal(a, b) for a, b in zip(eager.state(), graphed.state(), strict=True))


def _everything(training: Training) -> list[Tensor]:
    p = training.parameters
    moments = [m for pair in (p.m_W_enc, p.m_W_dec, p.m_b_enc, p.m_b_dec) for m in (pair.mean, pair.square)]
    return [p.W_enc, p.W_dec, p.b_enc, p.b_dec, *moments, p.shadow_enc, p.shadow_dec, training.since]


@pytest.fixture
def synchronisation_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("synchronisation_is_an_error")
def test_a_step_never_waits_for_the_device() -> None:
    run = Training(torch.bfloat16)
    run.draw(0)
    p = run.parameters

    def aux(result: fast.StepResult) -> fast.AuxGradients:
        return fast.aux_gradients(p, run.since >= 1, result.residual, result.x_centred, 256, 1 / 32)[0]

    def step() -> None:
        fast.training_step(run.batch, run.one, fast.topk_rule(16), p, run.since, run.adam, aux=aux)

    step()
    torch.cuda.set_sync_debug_mode("error")
    step()


@pytest.mark.parametrize("rule", ["topk", "gradient_topk"])
def test_the_encoder_takes_an_eighth_of_the_dense_scores(rule: str) -> None:
    n, d, d_sae, k = 32768, 256, 65536, 32
    x, W = torch.randn(n, d, device="cuda").bfloat16(), torch.randn(d_sae, d, device="cuda").bfloat16()
    b = torch.zeros(d_sae, device="cuda")
    pairs = torch.stack((x, x)), torch.stack((W, W))

    def encode_once() -> tuple[Tensor, Tensor]:
        return fast.topk_encode(x, W.T, b, k) if rule == "topk" else fast.paired_topk_encode(*pairs, b, k, 1.0)

    encode_once()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    encode_once()
    results = n * k * 12
    # Beside the buffer of scores, the groups' largest and the lists of groups and candidates of one chunk.
    assert torch.cuda.max_memory_allocated() - before - results <= n * d_sae * 2 / 8 * 1.04
