"""Decoding, gradients and the whole step against float64 autograd and the plain path."""

import pytest
import torch
from torch import Tensor

from sae import kernels, losses, optim
from sae.code import SparseCode
from sae.kernels import triton as fast

N, D, F, K = 37, 20, 30, 4
LR, BETAS, EPS = 1e-2, (0.9, 0.999), 1e-8


SMALL = fast.KernelSizes(window=8)
"""Windows that a tiny batch fills."""
SLICED = fast.KernelSizes(window=8, cached=0)
"""As for batches that no cache keeps."""


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours.double().cpu() - reference.double().cpu()).norm() / reference.double().cpu().norm())


class Problem:
    """A small SAE on data with a large common offset; feature 3 is always on, feature 5 never."""

    def __init__(self, device: torch.device, d: int = D, sizes: fast.KernelSizes = SMALL) -> None:
        self.sizes = sizes
        self.batch = (torch.randn(N, d) + 3).to(device)
        W_dec = torch.randn(F, d)
        optim.normalise_rows_(W_dec)
        b_enc = torch.randn(F) * 0.1
        b_enc[3], b_enc[5] = 50, -50
        start = [W_dec + 0.1 * torch.randn(F, d), W_dec, b_enc, 3 + torch.randn(d) * 0.1]
        self.start = [t.to(device) for t in start]
        W_enc, W_dec, b_enc, b_dec = (t.clone() for t in self.start)
        self.parameters = fast.Parameters.starting(W_enc, W_dec, b_enc, b_dec, torch.float32)
        scalars = torch.tensor(fast.step_scalars(LR, 1, BETAS), device=device)
        self.adam = fast.AdamStep(scalars, *BETAS, EPS)
        self.since = torch.full((F,), 100, dtype=torch.int64, device=device)
        self.one = torch.ones((), device=device)

    def step(self, **options: object) -> fast.StepResult:
        return fast.training_step(
            self.batch, self.one, fast.topk_rule(K), self.parameters, self.since, self.adam, sizes=self.sizes, **options
        )

    def reference(self) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients (W_enc by rows, W_dec, b_enc, b_dec) in float64, the parallel part of W_dec's removed."""
        W_enc, W_dec, b_enc, b_dec = (t.double().cpu().requires_grad_() for t in self.start)
        x = self.batch.double().cpu()
        z = (x - b_dec) @ W_enc.T + b_enc
        best = z.relu().topk(K, dim=1)
        x_hat = torch.zeros_like(z).scatter(1, best.indices, best.values) @ W_dec + b_dec
        loss = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
        gradients = list(torch.autograd.grad(loss, (W_enc, W_dec, b_enc, b_dec)))
        optim.remove_parallel_(gradients[1], W_dec.detach())
        return loss.detach(), gradients


@pytest.mark.parametrize(
    ("clip", "d", "sizes"), [(None, D, SMALL), (None, 300, SLICED), (1e9, D, SMALL), (0.5, D, SMALL)]
)
def test_a_step_is_adam_on_the_gradients_of_float64(
    clip: float | None, d: int, sizes: fast.KernelSizes, device: torch.device
) -> None:
    problem = Problem(device, d, sizes)
    result = problem.step(clip=clip)
    loss, gradients = problem.reference()
    if clip is not None:
        limit = clip * N / result.total_variance.cpu()
        optim.clip_norm_(gradients, limit)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        assert (norm < 0.999 * limit) == (clip == 1e9)
    assert float(result.squared_error / result.total_variance) == pytest.approx(float(loss), rel=1e-6)
    p = problem.parameters
    trained = [
        (p.W_enc, p.m_W_enc), (p.W_dec, p.m_W_dec), (p.b_enc, p.m_b_enc), (p.b_dec, p.m_b_dec),
    ]  # fmt: skip
    for (parameter, moments), start, gradient in zip(trained, problem.start, gradients, strict=True):
        assert relative(moments.mean, (1 - BETAS[0]) * gradient) < 1e-5
        assert relative(moments.square, (1 - BETAS[1]) * gradient.square()) < 1e-5
        # Adam's first step is the gradient's sign; where that is rounding, nothing can be said about it.
        wanted = start.double().cpu() - LR * gradient / (gradient.abs() + EPS)
        if parameter is p.W_dec:
            optim.normalise_rows_(wanted)
        clear = gradient.abs() > 1e-4 * gradient.abs().max()
        assert relative(parameter.cpu()[clear], wanted[clear]) < 1e-5
    assert torch.equal(p.shadow_dec, p.W_dec)
    assert torch.equal(p.shadow_enc, p.W_enc)


@pytest.mark.parametrize(
    ("gradient", "limit", "factor"),
    [(0.0, 1.0, 1.0), (1.0, 5.0, 1.0), (2.0, 1.0, 0.25), (torch.inf, 1.0, 0.0), (torch.nan, 1.0, torch.nan)],
)
def test_the_factor_of_clipped_gradients_hides_no_nan(
    gradient: float, limit: float, factor: float, device: torch.device
) -> None:
    zeros = torch.zeros(F, D, device=device)
    gradients = fast.FeatureGradients(zeros, zeros, zeros[:, 0], zeros, None)
    b_dec = torch.zeros(D, device=device)
    b_dec[3] = gradient
    made = fast.clip_factor(gradients, b_dec, limit, torch.tensor(2.0, dtype=torch.float64, device=device))
    torch.testing.assert_close(made.cpu(), torch.tensor(factor), equal_nan=True)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_counters_of_features_that_fired_are_reset(clip: float | None, device: torch.device) -> None:
    problem = Problem(device)
    W_enc, _, b_enc, b_dec = problem.start
    values, indices = kernels.topk_encode(problem.batch - b_dec, W_enc.T, b_enc, K)
    fired = torch.bincount(indices[values != 0].cpu(), minlength=F) > 0
    problem.step(clip=clip)
    assert fired[3]
    assert not fired[5]
    assert torch.equal(problem.since.cpu(), torch.where(fired, 0, 100 + N))


def test_a_step_repeats_bit_for_bit(device: torch.device) -> None:
    first, second = Problem(device), Problem(device)
    second.batch, second.parameters = first.batch, _copy(first.parameters)
    first.step()
    second.step()
    assert torch.equal(first.parameters.W_enc, second.parameters.W_enc)
    assert torch.equal(first.parameters.W_dec, second.parameters.W_dec)
    assert torch.equal(first.parameters.b_dec, second.parameters.b_dec)


def _copy(p: fast.Parameters) -> fast.Parameters:
    clones = [getattr(p, name).clone() for name in ("W_enc", "W_dec", "b_enc", "b_dec")]
    return fast.Parameters.starting(*clones, torch.float32)


def ragged(device: torch.device) -> SparseCode:
    """Tokens with 0, 1, ... entries and one with inactive slots."""
    counts = torch.arange(N) % 6
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    values = torch.randn(int(offsets[-1]))
    values[::7] = 0
    return SparseCode(values, torch.randint(0, F, (len(values),)), F, offsets).to(device)


def fixed(device: torch.device) -> SparseCode:
    values = torch.randn(N, K)
    values[::5, 2] = 0
    indices = torch.randint(0, F, (N, K))
    indices[:, 0] = 3
    return SparseCode(values, indices, F).to(device)


@pytest.mark.parametrize("make", [fixed, ragged])
def test_decode_and_gradients_equal_the_plain_path_in_float64(make: object, device: torch.device) -> None:
    problem, code = Problem(device), make(device)
    W_enc, W_dec, _, b_dec = problem.start
    x, g = torch.randn(N, D, device=device), torch.randn(N, D, device=device)
    exact = SparseCode(code.values.double(), code.indices, F, code.offsets).to("cpu")
    exact_W = [t.double().cpu() for t in (W_enc.T, W_dec)]
    assert relative(fast.decode(code, W_dec, b_dec), kernels.decode(exact, exact_W[1], b_dec.double().cpu())) < 1e-6
    ours = fast.gradients(code, x, g, W_enc.T, W_dec, sizes=SMALL)
    reference = kernels.gradients(exact, x.double().cpu(), g.double().cpu(), *exact_W)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert relative(getattr(ours, name), getattr(reference, name)) < 1e-5


@pytest.mark.parametrize("bucket", [16, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_aux_gradients_equal_the_plain_ones(bucket: int, signed: bool, device: torch.device) -> None:
    """With a bucket of 8 the last of the eleven dead features wait."""
    problem = Problem(device)
    problem.since[1:30:3] = 1000
    problem.since[5] = 1000
    residual, x = torch.randn(N, D, device=device) + 1, torch.randn(N, D, device=device)
    W_enc, W_dec, b_enc, _ = (t.double().cpu() for t in problem.start)
    dead = torch.nonzero(problem.since.cpu() >= 1000).squeeze(1)
    assert len(dead) == 11
    treated = dead[:bucket]
    wanted = kernels.Gradients(
        torch.zeros(F, D, dtype=torch.float64).T, torch.zeros(F, D, dtype=torch.float64),
        torch.zeros(F, dtype=torch.float64), torch.zeros(D, dtype=torch.float64),
    )  # fmt: skip
    loss = losses.add_aux_k(
        wanted, treated, residual.double().cpu(), x.double().cpu(), W_enc.T, b_enc, W_dec, 0.25, signed=signed
    )
    ours, ours_loss = fast.aux_gradients(
        problem.parameters, problem.since >= 1000, residual, x, bucket, 0.25, signed=signed
    )
    assert float(ours_loss) == pytest.approx(float(loss), rel=1e-5)
    n = len(treated)
    assert torch.equal(ours.slot.cpu()[treated], torch.arange(n, dtype=torch.int32))
    assert int((ours.slot >= 0).sum()) == n
    assert relative(ours.W_enc[:n], wanted.W_enc.T[treated]) < 1e-5
    assert relative(ours.W_dec[:n], wanted.W_dec[treated]) < 1e-5
    assert relative(ours.b_enc[:n], wanted.b_enc[treated]) < 1e-5
    assert relative(-ours.through_x, wanted.b_dec) < 1e-5


def test_a_step_adds_the_aux_gradients(device: torch.device) -> None:
    plain, helped = Problem(device), Problem(device)
    helped.batch, helped.parameters = plain.batch, _copy(plain.parameters)
    plain_W_dec = plain.parameters.W_dec.clone()
    plain.start = helped.start = [t.clone() for t in plain.start]
    plain.step()
    helped.since[5] = 1000
    aux: list[fast.AuxGradients] = []

    def make(result: fast.StepResult) -> fast.AuxGradients:
        p = helped.parameters
        made, _ = fast.aux_gradients(p, helped.since >= 1000, result.residual, result.x_centred, 4, 1.0, signed=True)
        aux.append(made)
        return made

    helped.step(aux=make)
    share = 1 - BETAS[0]
    a, b, extra = plain.parameters, helped.parameters, aux[0]
    row = extra.W_dec[0] - (extra.W_dec[0] @ plain_W_dec[5]) * plain_W_dec[5]
    assert relative(b.m_W_dec.mean[5] - a.m_W_dec.mean[5], share * row) < 1e-5
    assert relative(b.m_W_enc.mean[5] - a.m_W_enc.mean[5], share * extra.W_enc[0]) < 1e-5
    assert relative(b.m_b_enc.mean[5] - a.m_b_enc.mean[5], share * extra.b_enc[0]) < 1e-5
    assert relative(b.m_b_dec.mean - a.m_b_dec.mean, -share * extra.through_x) < 1e-4
    others = torch.arange(F, device=device) != 5
    # Rounded alike but for the last bit: compilers may contract the two kernels' sums differently.
    assert relative(b.m_W_dec.mean[others], a.m_W_dec.mean[others]) < 1e-6
