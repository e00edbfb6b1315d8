"""Sparse inference against naive float64 references, every subset of a small dictionary, and planted codes."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from sae import SAE, InputError, SparseCode, TopK, Transcoder
from sae.inference import (
    InferredSAE,
    ista,
    iterative_hard_thresholding,
    least_for,
    matching_pursuit,
    penalty_for,
    refit,
)
from sae.inference.ista import L0_WITHIN, duality_gap
from sae.planted import PlantedDictionary, Planting

N, WIDTH, ATOMS = 24, 12, 30


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return drawn(N, WIDTH, seed=1)


@pytest.fixture(scope="module")
def atoms() -> Tensor:
    """Of unequal lengths: only their directions may decide what is chosen."""
    return drawn(ATOMS, WIDTH) * torch.linspace(0.2, 3, ATOMS, dtype=torch.float64)[:, None]


def errors(x: Tensor, code: SparseCode, atoms: Tensor) -> Tensor:
    return (x - code.to_dense() @ atoms).square().sum(dim=1)


def least_squares(x: Tensor, atoms: Tensor, signed: bool) -> tuple[np.ndarray, float]:
    """Values of these atoms for one row, and the squared error that is left."""
    matrix = atoms.numpy().T
    values = np.linalg.lstsq(matrix, x.numpy(), rcond=None)[0] if signed else nnls(matrix, x.numpy())[0]
    return values, float(((x.numpy() - matrix @ values) ** 2).sum())


@pytest.mark.parametrize("signed", [True, False])
def test_omp_is_the_naive_pursuit(rows: Tensor, atoms: Tensor, signed: bool) -> None:
    ks = (1, 3, 7)
    found = [code.to_dense() for code in matching_pursuit(rows, atoms, ks, signed=signed)]
    unit = torch.nn.functional.normalize(atoms, dim=1)
    for row, x in enumerate(rows):
        chosen: list[int] = []
        residual = x
        while len(chosen) < max(ks):
            scores = unit @ residual
            scores = scores.abs() if signed else scores
            scores[chosen] = -torch.inf
            chosen.append(int(scores.argmax()))
            values, _ = least_squares(x, atoms[chosen], signed)
            chosen = [atom for atom, value in zip(chosen, values, strict=True) if value != 0]
            values = values[values != 0]
            residual = x - torch.from_numpy(values) @ atoms[chosen]
            for k, code in zip(ks, found, strict=True):
                if len(chosen) == k and (code[row] != 0).any():
                    expected = torch.zeros(ATOMS, dtype=torch.float64)
                    expected[chosen] = torch.from_numpy(values)
                    torch.testing.assert_close(code[row], expected, rtol=1e-9, atol=1e-10)
                    # The first time that it has k.
                    code[row] = 0
    assert all((code == 0).all() for code in found)


def test_non_negative_omp_ends_at_non_negative_least_squares(rows: Tensor, atoms: Tensor) -> None:
    code = matching_pursuit(rows, atoms, [ATOMS])[0]
    best = torch.tensor([least_squares(x, atoms, signed=False)[1] for x in rows], dtype=torch.float64)
    torch.testing.assert_close(errors(rows, code, atoms), best, rtol=1e-9, atol=1e-12)
    assert code.values.min() >= 0


@pytest.mark.parametrize("signed", [True, False])
def test_no_search_beats_the_best_of_all_subsets_and_one_feature_is_the_best(
    rows: Tensor, atoms: Tensor, signed: bool
) -> None:
    rows, atoms = rows[:6], atoms[:10]
    for k in (1, 3):
        best = torch.tensor(
            [min(least_squares(x, atoms[[*chosen]], signed)[1] for chosen in combinations(range(10), k)) for x in rows],
            dtype=torch.float64,
        )
        for code in (
            matching_pursuit(rows, atoms, [k], signed=signed)[0],
            iterative_hard_thresholding(rows, atoms, k, signed=signed),
        ):
            assert (errors(rows, code, atoms) >= best - 1e-10).all()
            assert int(code.l0().max()) <= k
        if k == 1:
            greedy = errors(rows, matching_pursuit(rows, atoms, [k], signed=signed)[0], atoms)
            torch.testing.assert_close(greedy, best, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("signed", [True, False])
def test_in_an_orthonormal_dictionary_all_searches_are_known(rows: Tensor, signed: bool) -> None:
    basis = torch.linalg.qr(drawn(WIDTH, WIDTH, seed=2)).Q
    products = rows @ basis.T
    sizes = products.abs() if signed else products.clamp_min(0)
    kept = sizes >= sizes.topk(4, dim=1).values[:, -1:]
    hard = torch.where(kept & (sizes > 0), products, 0.0)
    soft = products.sign() * (products.abs() - 0.3).clamp_min(0) if signed else (products - 0.3).clamp_min(0)
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(matching_pursuit(rows, basis, [4], signed=signed)[0].to_dense(), hard, **close)
    torch.testing.assert_close(iterative_hard_thresholding(rows, basis, 4, signed=signed).to_dense(), hard, **close)
    torch.testing.assert_close(ista(rows, basis, 0.3, signed=signed, gap=1e-14).to_dense(), soft, **close)


@pytest.mark.parametrize("signed", [True, False])
def test_ista_meets_the_conditions_of_a_minimum(rows: Tensor, atoms: Tensor, signed: bool) -> None:
    penalty = 0.4
    lengths = torch.linalg.vector_norm(atoms, dim=1)
    values = ista(rows, atoms, penalty, signed=signed, gap=1e-13).to_dense()
    pull = ((rows - values @ atoms) @ atoms.T) / lengths
    active = values != 0
    assert active.any()
    assert signed or (values >= 0).all()
    torch.testing.assert_close(pull[active], penalty * values[active].sign(), rtol=1e-5, atol=1e-6)
    assert ((pull.abs() if signed else pull) <= penalty + 1e-6).all()
    loose = ista(rows, atoms, penalty, signed=signed, gap=1e-2).to_dense()

    def objective(code: Tensor) -> Tensor:
        return (rows - code @ atoms).square().sum(dim=1) / 2 + penalty * (code.abs() * lengths).sum(dim=1)

    # The gap is what it promises: no less than the distance to the minimum.
    promised = duality_gap(rows, loose * lengths, atoms / lengths[:, None], penalty, signed)
    distance = (objective(loose) - objective(values)) / (rows.square().sum(dim=1) / 2)
    assert (distance <= promised + 1e-12).all()
    assert (promised <= 1e-2).all()


def test_the_penalty_for_a_number_of_features_gives_it(rows: Tensor, atoms: Tensor) -> None:
    x = rows.repeat(8, 1) + 0.1 * drawn(8 * N, WIDTH, seed=3)
    found = ista(x, atoms, penalty_for(x, atoms, 4.0)).l0().double().mean().item()
    assert found == pytest.approx(4.0, rel=L0_WITHIN + 0.01)


@pytest.mark.parametrize("signed", [True, False])
def test_a_pursuit_to_a_threshold_leaves_no_product_above_it(rows: Tensor, atoms: Tensor, signed: bool) -> None:
    least = least_for(rows, atoms, 4, signed=signed)
    code = matching_pursuit(rows, atoms, [16], signed=signed, least=least)[0]
    assert code.l0().double().mean().item() == pytest.approx(4, abs=0.3)
    assert code.l0().max() > code.l0().min()
    products = (rows - code.to_dense() @ atoms) @ torch.nn.functional.normalize(atoms, dim=1).T
    assert ((products.abs() if signed else products).amax(dim=1) <= least + 1e-9)[code.l0() < 16].all()


@pytest.mark.parametrize("signed", [True, False])
def test_refitted_values_are_the_best_of_the_same_features(rows: Tensor, atoms: Tensor, signed: bool) -> None:
    indices = torch.stack([torch.randperm(ATOMS, generator=torch.Generator().manual_seed(n))[:7] for n in range(N)])
    start = drawn(N, 7, seed=4).abs()
    found = refit(rows, SparseCode(start, indices, ATOMS), atoms, signed=signed).to_dense().gather(1, indices)
    for row, x in enumerate(rows):
        expected, _ = least_squares(x, atoms[indices[row]], signed)
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-9, atol=1e-10)
    # Of a feature twice there is no one best value: such rows stay as they are.
    twice = SparseCode(start[:1, :2], torch.tensor([[5, 6]]), ATOMS)
    same = torch.cat([atoms[:6], atoms[5:6], atoms[7:]])
    assert torch.equal(refit(rows[:1], twice, same, signed=True).to_dense(), twice.to_dense())


def test_planted_codes_are_found_by_searches_where_features_are_few() -> None:
    truth = PlantedDictionary(Planting(d_in=64, n_features=96, l0=3.0, zipf=0.0, noise=0.001, offset=0.5))
    drawn_rows = truth.rows(512)
    x, true = drawn_rows.x - truth.offset, drawn_rows.activations != 0
    for code in (
        matching_pursuit(x, truth.directions, [8])[0],
        iterative_hard_thresholding(x, truth.directions, 8),
    ):
        # What is beyond the true features explains noise alone.
        present = code.to_dense() > 0.1
        hits = (present & true).sum().item()
        assert 2 * hits / (present.sum() + true.sum()).item() > 0.95


def test_float32_in_chunks_is_float64_at_once(rows: Tensor, atoms: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = [
        matching_pursuit(rows, atoms, [5])[0], iterative_hard_thresholding(rows, atoms, 5), ista(rows, atoms, 0.5)
    ]  # fmt: skip
    monkeypatch.setattr("sae.inference.least_squares.VALUES_AT_ONCE", 5 * ATOMS)
    x, W_dec = rows.float(), atoms.float()
    rough = [matching_pursuit(x, W_dec, [5])[0], iterative_hard_thresholding(x, W_dec, 5), ista(x, W_dec, 0.5)]
    for one, other in zip(exact, rough, strict=True):
        torch.testing.assert_close(other.to_dense().double(), one.to_dense(), rtol=1e-3, atol=1e-4)


def test_no_rows_and_rows_of_zeros_have_empty_codes(atoms: Tensor) -> None:
    for n in (0, 2):
        x = torch.zeros(n, WIDTH, dtype=torch.float64)
        for code in (
            matching_pursuit(x, atoms, [3])[0], iterative_hard_thresholding(x, atoms, 3), ista(x, atoms, 0.1),
        ):  # fmt: skip
            assert code.n_tokens == n
            assert refit(x, code, atoms).l0().sum() == 0


def test_an_inferred_sae_is_the_sae_with_other_codes(rows: Tensor) -> None:
    sae = SAE(WIDTH, ATOMS, TopK(3), hook_name="h")
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(drawn(ATOMS, WIDTH), dim=1))
        sae.b_dec.normal_()
    inferred = InferredSAE(sae, lambda x, W_dec: matching_pursuit(x, W_dec, [4])[0])
    x = rows.float().view(4, 6, WIDTH)
    code = inferred.encode(x)
    expected = matching_pursuit(x.reshape(-1, WIDTH) - sae.b_dec, sae.W_dec, [4])[0]
    assert code.shape == (4, 6, ATOMS)
    assert torch.equal(code.to_dense().view(-1, ATOMS), expected.to_dense())
    torch.testing.assert_close(inferred(x).view(-1, WIDTH), expected.to_dense() @ sae.W_dec + sae.b_dec)
    assert inferred.fingerprint() == sae.fingerprint()
    with pytest.raises(InputError, match="SAEs alone"):
        InferredSAE(Transcoder(WIDTH, WIDTH, ATOMS, TopK(3)), inferred.infer)
    with pytest.raises(InputError, match="expected activations, a tensor"):
        inferred.encode([0.0])
    with pytest.raises(InputError, match="width 12"):
        inferred.encode(torch.zeros(2, 5))
