"""The rules against SAELens' and dictionary_learning's own implementations."""

import importlib.util
import sys
import types

import pytest
import torch
from torch import Tensor

from sae import kernels, losses, passes
from sae.config import TrainConfig
from sae.rules import AbsTopK, Batch, BatchTopK, JumpReLU, TopK
from sae.state import TrainingState

N, D, F, K = 64, 12, 90, 6
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"x": (N, D), "W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    made = {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}
    made["W_dec"] /= made["W_dec"].norm(dim=1, keepdim=True)
    return made


def pre_activations(w: dict[str, Tensor]) -> Tensor:
    return (w["x"] - w["b_dec"]) @ w["W_enc"] + w["b_enc"]


def batch(w: dict[str, Tensor]) -> Batch:
    return Batch(w["x"] - w["b_dec"], w["W_enc"], w["b_enc"], w["W_dec"], torch.zeros(F), 0.0)


def test_selections_are_those_of_saelens(weights: dict[str, Tensor]) -> None:
    from sae_lens.saes import abstopk_sae, batchtopk_sae, topk_sae

    z = pre_activations(weights)
    for ours, theirs in (
        (TopK(K), topk_sae.TopK(K)),
        (AbsTopK(K), abstopk_sae.AbsTopK(K)),
        (BatchTopK(K), batchtopk_sae.BatchTopK(K)),
    ):
        torch.testing.assert_close(ours.select(batch(weights)).to_dense(), theirs(z), **TIGHT)


def test_selections_are_those_of_dictionary_learning(weights: dict[str, Tensor], monkeypatch) -> None:
    if importlib.util.find_spec("nnsight") is None:
        # Imported by its package for harvesting, which is not what runs here.
        absent = types.ModuleType("nnsight")
        absent.LanguageModel = object  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "nnsight", absent)
    pytest.importorskip("dictionary_learning", exc_type=ImportError)
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    for ours, theirs in ((TopK(K), AutoEncoderTopK(D, F, K)), (BatchTopK(K), BatchTopKSAE(D, F, K))):
        theirs = theirs.double()
        with torch.no_grad():
            theirs.encoder.weight.copy_(weights["W_enc"].T)
            theirs.encoder.bias.copy_(weights["b_enc"])
            theirs.decoder.weight.copy_(weights["W_dec"].T)
            theirs.b_dec.copy_(weights["b_dec"])
            options = {"use_threshold": False}
            torch.testing.assert_close(
                ours.select(batch(weights)).to_dense(), theirs.encode(weights["x"], **options), **TIGHT
            )


def test_thresholds_encode_as_saelens_jumprelu(weights: dict[str, Tensor]) -> None:
    from sae_lens.saes import jumprelu_sae

    z, threshold = pre_activations(weights), torch.linspace(-0.5, 2, F, dtype=torch.float64)
    ours = JumpReLU().encode(batch(weights).x, weights["W_enc"], weights["b_enc"], {"threshold": threshold})
    sae = jumprelu_sae.JumpReLUSAE(jumprelu_sae.JumpReLUSAEConfig(d_in=D, d_sae=F, dtype="float64"))
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            getattr(sae, name).copy_(weights[name])
        sae.threshold.copy_(threshold)
        torch.testing.assert_close(ours.to_dense(), sae.encode(weights["x"]), **TIGHT)
    assert (z < 0).any()
    assert not (ours.values < 0).any()


def test_jumprelu_gradients_are_saelens(weights: dict[str, Tensor]) -> None:
    """Through SAELens' autograd functions, the same objective."""
    from sae_lens.saes.jumprelu_sae import JumpReLU as TheirJumpReLU
    from sae_lens.saes.jumprelu_sae import Step

    config = TrainConfig(name="a", total_tokens=N, d_sae=F, rule=JumpReLU(0.1, 0.2), sparsity_coefficient=0.3)
    state = TrainingState(config, D, torch.device("cpu"))
    state.sae.double()
    own = {name: tensor.double() for name, tensor in state.own.items()}
    leaves = {name: weights[name].clone().requires_grad_() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    for name, parameter in state.sae.named_parameters():
        parameter.data.copy_(weights[name])
    rule, x = config.rule, weights["x"]
    assert isinstance(rule, JumpReLU)
    bandwidth, theta = rule.bandwidth_at(D), own["log_threshold"].exp().requires_grad_()
    z = (x - leaves["b_dec"]) @ leaves["W_enc"] + leaves["b_enc"]
    a = TheirJumpReLU.apply(z, theta, bandwidth, False)
    x_hat = a @ leaves["W_dec"] + leaves["b_dec"]
    objective = (x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum()
    (objective + 0.3 * Step.apply(z, theta, bandwidth, False).sum(dim=1).mean()).backward()
    centred = x - weights["b_dec"]
    done = passes.threshold_pass(state.sae, x, centred, centred, theta.detach(), bandwidth=bandwidth)
    for name, leaf in leaves.items():
        torch.testing.assert_close(getattr(done.gradients, name), leaf.grad, **TIGHT)
    ours = rule.own_gradients(own, done.sums, 0.3, D)["log_threshold"]
    assert theta.grad is not None
    torch.testing.assert_close(ours, theta.grad * theta.detach(), **TIGHT)


def test_matryoshka_prefixes_are_saelens(weights: dict[str, Tensor]) -> None:
    from sae_lens.saes import matryoshka_batchtopk_sae as peer

    widths = [7, 30, F]
    config = peer.MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=D, d_sae=F, k=K, dtype="float64", matryoshka_widths=widths, rescale_acts_by_decoder_norm=False
    )
    theirs = peer.MatryoshkaBatchTopKTrainingSAE(config)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            getattr(theirs, name).copy_(weights[name])
        code = BatchTopK(K).select(batch(weights))
        reconstructions = [x_hat for _, x_hat in theirs._iterable_decode(code.to_dense(), include_outer_loss=True)]
    x = weights["x"]
    nested = losses.prefixes(x, code, weights["W_dec"], weights["b_dec"], widths)
    errors = [losses.reconstruction(x, x_hat).loss for x_hat in reconstructions]
    torch.testing.assert_close(nested.loss, torch.stack(errors).mean(), **TIGHT)
    torch.testing.assert_close(
        nested.fit.residual, x - kernels.decode(code, weights["W_dec"], weights["b_dec"]), **TIGHT
    )
