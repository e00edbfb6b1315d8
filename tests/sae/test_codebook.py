"""Codebooks: the choice against a naive float64 loop, and fits whose answer is known."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae import SAE, Codebook, InputError, TrainConfig
from sae.codebook import DEAD_AFTER, CodebookLayer, fit_codebook, replace_dead

WIDTH, CENTRES = 12, 20


class Clusters:
    """Rows around centres of unequal lengths, on an offset; a `sae.BatchSource`."""

    d_in = WIDTH

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        directions = torch.nn.functional.normalize(torch.randn(CENTRES, WIDTH, generator=self.generator), dim=1)
        self.centres = directions * torch.linspace(1, 4, CENTRES)[:, None]

    def next_batch(self, n: int) -> Tensor:
        which = torch.randint(CENTRES, (n,), generator=self.generator)
        return self.centres[which] + 3.0 + 0.02 * torch.randn(n, WIDTH, generator=self.generator)

    def sample(self, n: int) -> Tensor:
        return Clusters().next_batch(n)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


def test_a_row_gets_the_mean_of_the_codes_of_largest_cosine(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codes, x, k = torch.randn(30, WIDTH) * torch.linspace(0.1, 3, 30)[:, None], torch.randn(40, WIDTH), 4
    sae = SAE(WIDTH, 30, Codebook(k), hook_name="h")
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(codes, dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.normal_()
        sae.get_buffer("lengths").copy_(codes.norm(dim=1))
    found = sae.predict(x)
    assert (sae.encode(x).l0() == k).all()
    for row, expected in zip(x, found, strict=True):
        centred = (row - sae.b_dec.detach()).double()
        cosines = torch.tensor(
            [float(centred @ code.double() / centred.norm() / code.double().norm()) for code in codes]
        )
        naive = codes[cosines.argsort(descending=True)[:k]].double().mean(dim=0) + sae.b_dec.double()
        torch.testing.assert_close(expected.double(), naive, rtol=1e-5, atol=1e-6)
    sae.save(tmp_path / "s")
    read = SAE.load(tmp_path / "s")
    assert read.rule == Codebook(k)
    assert torch.equal(read.predict(x), found)
    assert read.fingerprint() == sae.fingerprint()


def test_a_fitted_code_is_the_mean_of_its_rows_and_no_cluster_is_without_one() -> None:
    source = Clusters()
    steps: list[tuple[int, int, float]] = []
    sae = fit_codebook(
        source, 32, 1, total_tokens=300 * 2048, lr=0.05, on_step=lambda *step: steps.append(step)
    )  # fmt: skip
    assert steps[-1][0] == steps[-1][1] == 300 * 2048
    assert steps[-1][2] < 0.01
    x = source.next_batch(4096)
    chosen = sae.encode(x).indices[:, 0]
    codes = sae.W_dec * sae.get_buffer("lengths")[:, None] + sae.b_dec
    for code, count in zip(*chosen.unique(return_counts=True), strict=True):
        if count >= 100:
            torch.testing.assert_close(codes[code], x[chosen == code].mean(dim=0), rtol=0, atol=0.03)
    nearest = torch.cdist(source.centres + 3.0, codes).amin(dim=1)
    assert nearest.max() < 0.1


def test_a_layer_passes_gradients_to_its_codes_and_past_them() -> None:
    torch.manual_seed(0)
    layer, x = CodebookLayer(9, WIDTH, 2), torch.randn(3, 5, WIDTH, requires_grad=True)
    weight = torch.randn(3, 5, WIDTH)
    found = layer(x)
    assert torch.allclose(found, layer.codes[layer.chosen].mean(dim=2), atol=1e-6)
    (found * weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight)
    expected = torch.zeros(9, WIDTH).index_add(
        0, layer.chosen.flatten(), weight.flatten(0, 1).repeat_interleave(2, 0) / 2
    )
    assert layer.codes.grad is not None
    torch.testing.assert_close(layer.codes.grad, expected)
    x.grad = None
    layer(x)
    layer.error.backward()
    assert x.grad is None


def test_only_codes_that_were_idle_too_long_are_replaced_by_rows() -> None:
    codes = torch.randn(6, WIDTH, requires_grad=True)
    adam = torch.optim.Adam([codes], lr=0.1)
    codes.square().sum().backward()
    adam.step()
    before, moments = codes.detach().clone(), adam.state[codes]["exp_avg"].clone()
    idle = torch.tensor([0, DEAD_AFTER, 3, DEAD_AFTER + 9, DEAD_AFTER - 1, 1])
    x = 100 * torch.randn(50, WIDTH)
    replace_dead(codes, idle, x, adam, torch.Generator().manual_seed(0))
    dead = torch.tensor([False, True, False, True, False, False])
    assert torch.equal(codes[~dead], before[~dead])
    # Noise is a hundredth of a row's spread.
    assert (torch.cdist(codes[dead], x).amin(dim=1) < 0.05 * x.norm(dim=1).mean()).all()
    assert torch.equal(adam.state[codes]["exp_avg"] == 0, dead[:, None].expand(6, WIDTH) | (moments == 0))
    assert idle.tolist() == [0, 0, 3, 0, DEAD_AFTER - 1, 1]


def test_a_codebook_is_not_trained_and_not_fitted_to_too_little() -> None:
    with pytest.raises(InputError, match="workbench codebook"):
        TrainConfig("a", total_tokens=2048, d_sae=8, rule=Codebook(2)).check()
    with pytest.raises(InputError, match="100 tokens are no step"):
        fit_codebook(Clusters(), 8, 2, total_tokens=100)
    with pytest.raises(InputError, match="k = 9"):
        fit_codebook(Clusters(), 8, 9, total_tokens=4096)
    with pytest.raises(InputError, match="shared equally by 3 heads"):
        fit_codebook(Clusters(), 8, 2, total_tokens=4096, heads=3)
    with pytest.raises(InputError, match="not those of 8 heads"):
        fit_codebook(Clusters(), 8, 1, total_tokens=4096, heads=8)


class FirstHalf(Clusters):
    """Half of the rows' coordinates, as of the first of two heads."""

    d_in = WIDTH // 2

    def next_batch(self, n: int) -> Tensor:
        return super().next_batch(n)[:, : WIDTH // 2]

    def sample(self, n: int) -> Tensor:
        return FirstHalf().next_batch(n)


def test_a_head_has_the_codebook_that_it_alone_would_have() -> None:
    k = 2
    both = fit_codebook(Clusters(), 48, k, total_tokens=4 * 2048, heads=2)
    alone = fit_codebook(FirstHalf(), 24, k, total_tokens=4 * 2048)
    x = Clusters().next_batch(300)
    code = both.encode(x)
    assert code.indices.shape == (300, 2 * k)
    assert ((code.indices < 24).sum(dim=1) == k).all()
    # Codes of the other head are zero in this one's coordinates.
    torch.testing.assert_close(both.W_dec[24:, : WIDTH // 2], torch.zeros(24, WIDTH // 2))
    torch.testing.assert_close(both.predict(x)[:, : WIDTH // 2], alone.predict(x[:, : WIDTH // 2]))


class SilentSecond(Clusters):
    """The second of two heads has been taken out."""

    def next_batch(self, n: int) -> Tensor:
        rows = super().next_batch(n)
        rows[:, WIDTH // 2 :] = 0
        return rows

    def sample(self, n: int) -> Tensor:
        return SilentSecond().next_batch(n)


def test_a_head_that_says_nothing_leaves_the_others_their_codes() -> None:
    both = fit_codebook(SilentSecond(), 48, 2, total_tokens=4 * 2048, heads=2)
    alone = fit_codebook(FirstHalf(), 24, 2, total_tokens=4 * 2048)
    x = SilentSecond().next_batch(300)
    torch.testing.assert_close(both.predict(x)[:, : WIDTH // 2], alone.predict(x[:, : WIDTH // 2]))
    torch.testing.assert_close(both.predict(x)[:, WIDTH // 2 :], x[:, WIDTH // 2 :])


def test_a_layer_of_heads_is_a_layer_for_each() -> None:
    torch.manual_seed(0)
    both, x = CodebookLayer(10, WIDTH, 2, heads=2), torch.randn(7, WIDTH)
    found = both(x)
    for number in range(2):
        one = CodebookLayer(5, WIDTH // 2, 2)
        one.codes.data = both.codes.data[5 * number : 5 * number + 5]
        torch.testing.assert_close(found.chunk(2, dim=1)[number], one(x.chunk(2, dim=1)[number]))
