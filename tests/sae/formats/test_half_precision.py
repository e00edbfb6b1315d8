"""Half-precision SAEs whose decoder rows are no unit vectors: folding changes no firing, in any format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae import rules
from sae.formats import conversion
from sae.formats.foreign import load_foreign

D_IN, D_SAE, TOKENS, K = 32, 512, 2048, 12
State = dict[str, Tensor]
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(7)) + 0.2


def random_state(dtype: torch.dtype, *, norm: float | None = None) -> State:
    """Weights with a bias of every kind; decoder rows of the norm given, or from 0.5 to 2."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    W_dec = normal(D_SAE, D_IN)
    norms = torch.linspace(0.5, 2, D_SAE) if norm is None else torch.full((D_SAE,), norm)
    state = {
        "W_enc": normal(D_IN, D_SAE), "W_dec": W_dec * norms[:, None] / W_dec.norm(dim=1, keepdim=True),
        "b_dec": normal(D_IN), "b_enc": normal(D_SAE), "threshold": normal(D_SAE).abs() * 3,
        "r_mag": normal(D_SAE), "b_mag": normal(D_SAE), "b_gate": normal(D_SAE),
    }  # fmt: skip
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def topk(z: Tensor) -> Tensor:
    values, indices = z.relu().topk(K, dim=1)
    return torch.zeros_like(z).scatter(1, indices, values)


def gate(y: Tensor, s: State) -> Tensor:
    return (y + s["b_gate"] > 0) * (y * s["r_mag"].exp() + s["b_mag"]).relu()


def saelens(architecture: str, *names: str, **options: Any) -> Callable[[Path, State], None]:
    def write(folder: Path, state: State) -> None:
        save_file(
            {name: state[name] for name in ("W_enc", "W_dec", "b_dec", *names)}, folder / "sae_weights.safetensors"
        )
        config = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "metadata": {"sae_lens_version": "6.9.0"}}
        dtype = str(state["W_enc"].dtype).removeprefix("torch.")
        (folder / "cfg.json").write_text(json.dumps({**config, "dtype": dtype, **options}))

    return write


def dictionary(class_name: str, make: Callable[[State], State]) -> Callable[[Path, State], None]:
    def write(folder: Path, state: State) -> None:
        torch.save({name: tensor.contiguous() for name, tensor in make(state).items()}, folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": class_name}}))

    return write


def sparsify(folder: Path, state: State) -> None:
    parts = {"encoder.weight": state["W_enc"].T.contiguous(), "encoder.bias": state["b_enc"]}
    save_file({**parts, "W_dec": state["W_dec"], "b_dec": state["b_dec"]}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"activation": "topk", "k": K, "num_latents": D_SAE}))


def linear(s: State) -> State:
    return {"encoder.weight": s["W_enc"].T, "encoder.bias": s["b_enc"], "decoder.weight": s["W_dec"].T}


def on_x(s: State, name: str = "b_enc") -> State:
    return {name: s[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


# What is written, and activations of the stored weights by the library's formula: of y = (x - b_dec) W_enc, of x W_enc.
CASES: dict[str, tuple[Callable[[Path, State], None], Callable[[Tensor, Tensor, State], Tensor]]] = {
    "saelens standard": (saelens("standard", "b_enc"), lambda y, xw, s: (y + s["b_enc"]).relu()),
    "saelens standard on x": (
        saelens("standard", "b_enc", apply_b_dec_to_input=False), lambda y, xw, s: (xw + s["b_enc"]).relu()
    ),
    "saelens jumprelu": (
        saelens("jumprelu", "b_enc", "threshold"),
        lambda y, xw, s: (y + s["b_enc"]) * (y + s["b_enc"] > s["threshold"]),
    ),
    "saelens topk": (saelens("topk", "b_enc", k=K), lambda y, xw, s: topk(y + s["b_enc"])),
    "saelens topk by contribution": (
        saelens("topk", "b_enc", k=K, rescale_acts_by_decoder_norm=True),
        lambda y, xw, s: topk((y + s["b_enc"]) * s["W_dec"].norm(dim=1)),
    ),
    "saelens gated": (saelens("gated", "b_gate", "b_mag", "r_mag"), lambda y, xw, s: gate(y, s)),
    "sparsify": (sparsify, lambda y, xw, s: topk(y + s["b_enc"])),
    "dictionary_learning topk": (
        dictionary("AutoEncoderTopK", lambda s: {**linear(s), "b_dec": s["b_dec"], "k": torch.tensor(K)}),
        lambda y, xw, s: topk(y + s["b_enc"]),
    ),
    "dictionary_learning batchtopk, its threshold in float32": (
        dictionary(
            "BatchTopKSAE",
            lambda s: {**linear(s), "b_dec": s["b_dec"], "k": torch.tensor(K), "threshold": torch.tensor(1.2345678)},
        ),
        lambda y, xw, s: (y + s["b_enc"]) * (y + s["b_enc"] > 1.2345678),
    ),
    "dictionary_learning relu": (
        dictionary("AutoEncoder", lambda s: {**linear(s), "bias": s["b_dec"]}), lambda y, xw, s: (y + s["b_enc"]).relu()
    ),
    "dictionary_learning relu on x": (
        dictionary("AutoEncoderNew", lambda s: {**linear(s), "decoder.bias": s["b_dec"]}),
        lambda y, xw, s: (xw + s["b_enc"]).relu(),
    ),
    "dictionary_learning jumprelu": (
        dictionary("JumpReluAutoEncoder", lambda s: {**on_x(s), "threshold": s["threshold"]}),
        lambda y, xw, s: (xw + s["b_enc"]) * (xw + s["b_enc"] > s["threshold"]),
    ),
    "dictionary_learning gated": (
        dictionary(
            "GatedAutoEncoder",
            lambda s: {
                "encoder.weight": s["W_enc"].T, "decoder.weight": s["W_dec"].T, "decoder_bias": s["b_dec"],
                "gate_bias": s["b_gate"], "mag_bias": s["b_mag"], "r_mag": s["r_mag"],
            },
        ),
        lambda y, xw, s: gate(y, s),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES)
def test_firings_are_those_of_the_stored_weights(case: str, dtype: torch.dtype, x: Tensor, tmp_path: Path) -> None:
    write, formula = CASES[case]
    state = random_state(dtype)
    write(tmp_path, state)
    sae = load_foreign(tmp_path)
    exact = {name: tensor.double() for name, tensor in state.items()}
    y, xw = (x.double() - exact["b_dec"]) @ exact["W_enc"], x.double() @ exact["W_enc"]
    expected = formula(y, xw, exact)
    ours = sae.encode(x).to_dense()
    assert 0.005 < (expected != 0).double().mean() < 0.6
    assert int(((ours != 0) != (expected != 0)).sum()) == 0
    x_hat = expected @ exact["W_dec"] + exact["b_dec"]
    if case == "saelens topk by contribution":
        x_hat = (expected / exact["W_dec"].norm(dim=1)) @ exact["W_dec"] + exact["b_dec"]
    # What stays in half precision is decoded in it.
    tolerance = 2e-4 if sae.W_dec.dtype == torch.float32 else 0.1
    torch.testing.assert_close(sae(x).double(), x_hat, atol=tolerance, rtol=1e-4)
    if not isinstance(sae.rule, rules.TopK) or case == "saelens topk by contribution":
        assert sae.W_dec.dtype == torch.float32
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


@pytest.mark.parametrize("dtype", HALVES)
def test_nothing_is_converted_where_nothing_is_computed(dtype: torch.dtype, tmp_path: Path) -> None:
    state = random_state(dtype, norm=1.0)
    saelens("jumprelu", "b_enc", "threshold")(tmp_path, state)
    sae = load_foreign(tmp_path)
    assert sae.W_enc.dtype == dtype
    assert all(torch.equal(getattr(sae, name), state[name]) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))


def test_a_shift_of_half_precision_weights_is_undone_without_rounding() -> None:
    state = random_state(torch.bfloat16)
    weights = conversion.Weights(state["W_enc"], state["b_enc"], state["W_dec"], state["b_dec"], rules.ReLU())
    again = conversion.not_subtracting(conversion.subtracting(weights))
    torch.testing.assert_close(again.b_enc, state["b_enc"].float(), atol=1e-6, rtol=0)
