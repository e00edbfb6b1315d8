"""Crosscoders: SAEs of several activations side by side - identities, gradients, files, what their features are to the
parts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae import SAE, BatchTopK, Crosscoder, GradientTopK, InputError, JumpReLU, ReLU, TopK, TrainConfig, train
from sae.part_metrics import BETWEEN, SHARED, PartMetrics
from sae.plain_step import PlainStep
from sae.planted import PlantedSource, Planting
from sae.planted_parts import PartPlanting, PartRecovery, PlantedParts, PlantedPartSource, part_recovery
from sae.rules import Rule
from sae.source import Part, part_scales
from sae.state import TrainingState

WIDTHS, F = (5, 7), 40
PARTS = [Part("A", "hook", "base", 5, 2.0), Part("B", "hook", "tuned", 7, 0.5)]
PLANTED = PartPlanting(Planting(d_in=12, n_features=24, l0=2), n_only=4, sizes=(1.0, 4.0))
CONFIG = TrainConfig("a", total_tokens=30 * 128, batch_size=128, d_sae=32, rule=TopK(3), lr=5e-3)


def random_crosscoder(rule: Rule | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Crosscoder:
    generator = torch.Generator().manual_seed(seed)
    made = Crosscoder(PARTS, F, rule or TopK(4), dtype=dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for state in made.state.values():
            state.fill_(0.5)
    return made


def rows(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, sum(WIDTHS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_sums_the_parts_encoders_and_writes_every_part() -> None:
    made, x = random_crosscoder(), rows(50)
    z = made.b_enc - made.b_dec @ made.W_enc
    for part, encoder in zip(made.split(x), made.W_enc.split(WIDTHS), strict=True):
        z = z + part @ encoder
    values, indices = z.relu().topk(4, dim=1)
    a = torch.zeros_like(z).scatter(1, indices, values)
    torch.testing.assert_close(made.encode(x).to_dense(), a, rtol=1e-9, atol=1e-9)
    for m, part in enumerate(made.split(made(x))):
        expected = a @ made.split(made.W_dec)[m] + made.split(made.b_dec)[m]
        torch.testing.assert_close(part, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(made.concatenate(made.split(x)), x)


@pytest.mark.parametrize("rule", [TopK(3), BatchTopK(3), ReLU(), JumpReLU()], ids=lambda rule: rule.name)
def test_scales_are_folded_into_what_is_returned(rule: Rule) -> None:
    """The crosscoder on raw rows has the code of the trained SAE on scaled ones, and reconstructs the raw ones."""
    source = PlantedPartSource(PlantedParts(PLANTED))
    made = train([replace(CONFIG, rule=rule)], source)[0].sae
    assert isinstance(made, Crosscoder)
    scaled = SAE(made.d_in, made.d_sae, rule)
    scale = made.scales().float()
    with torch.no_grad():
        scaled.W_enc.copy_(made.W_enc / scale[:, None])
        scaled.W_dec.copy_(made.W_dec * scale)
        scaled.b_enc.copy_(made.b_enc)
        scaled.b_dec.copy_(made.b_dec * scale)
        for name, tensor in made.state.items():
            scaled.get_buffer(name).copy_(tensor)
    torch.testing.assert_close(scaled.W_dec.norm(dim=1), torch.ones(made.d_sae), rtol=0, atol=1e-5)
    raw = PlantedParts(PLANTED).rows(500).x
    torch.testing.assert_close(made.encode(raw).to_dense(), scaled.encode(raw * scale).to_dense(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made(raw) * scale, scaled(raw * scale), rtol=1e-4, atol=1e-4)


def test_the_scales_make_the_parts_of_one_size() -> None:
    assert part_scales([2.0, 8.0], [4, 16]) == pytest.approx([2**0.5, 2**-0.5])
    source = PlantedPartSource(PlantedParts(PLANTED))
    norms = [float(block.norm(dim=1).mean()) for block in source.sample(2000).split(12, dim=1)]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@pytest.mark.parametrize("strength", [0.02, 3.0], ids=["dense", "sparse"])
def test_the_l1_penalty_counts_features_by_the_sum_of_their_decoder_norms(strength: float) -> None:
    """Against autograd in float64 through the formulas, where many entries are active and where few are."""
    config = replace(CONFIG, d_sae=F, rule=ReLU(), sparsity_coefficient=0.7, sparsity_warmup=0.0)
    state = TrainingState(config, PARTS, torch.device("cpu"))
    state.sae.double()
    x = rows(64)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in state.sae.named_parameters():
        random = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(random - strength if name == "b_enc" else random)
    state.input_scale = state.input_scale.double()
    p = {name: parameter.detach().clone().requires_grad_() for name, parameter in state.sae.named_parameters()}
    a = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()
    error = (x - a @ p["W_dec"] - p["b_dec"]).square().sum() / (x - x.mean(dim=0)).square().sum()
    norms = sum(block.norm(dim=1) for block in p["W_dec"].split(WIDTHS, dim=1))
    loss = error + 0.7 / sum(WIDTHS) ** 0.5 * (a * norms).sum(dim=1).mean()
    loss.backward()
    done, _ = PlainStep(state).differentiate(x, step=0)
    torch.testing.assert_close(done.loss, loss.detach(), rtol=1e-10, atol=1e-12)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(done.gradients, name), p[name].grad, rtol=1e-9, atol=1e-12)


def test_everything_else_about_a_step_is_an_saes() -> None:
    """Two parts of scale 1 train to the bits of an SAE of the concatenated rows, but for the start."""

    class Concatenated(PlantedSource):
        def __init__(self) -> None:
            super().__init__(PlantedParts(replace(PLANTED, sizes=(1.0, 1.0))))

        d_in = 24

    class WithParts(Concatenated):
        parts = (Part("A", "h", "m", 10), Part("B", "h", "m", 14))

    plain, made = (train([CONFIG], source())[0].sae for source in (Concatenated, WithParts))
    assert isinstance(made, Crosscoder)
    assert not isinstance(plain, Crosscoder)
    for (name, one), (_, other) in zip(plain.named_parameters(), made.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_nothing_is_exclusive_between_a_part_and_itself() -> None:
    class Twice(PlantedSource):
        parts = (Part("A", "h", "m", 12), Part("B", "h", "m", 12))

        def next_pair(self, n: int) -> tuple[Tensor, Tensor]:
            x, gradients = super().next_pair(n)
            return torch.cat([x, x], dim=1), gradients

        def sample(self, n: int) -> Tensor:
            return super().sample(n).repeat(1, 2)

    truth = PlantedParts(replace(PLANTED, n_only=0))
    truth.chunk = super(PlantedParts, truth).chunk  # type: ignore[method-assign]
    for rule in (BatchTopK(3), ReLU()):
        made = train([replace(CONFIG, rule=rule)], Twice(truth))[0].sae
        assert isinstance(made, Crosscoder)
        torch.testing.assert_close(made.part_norms()[0], made.part_norms()[1], rtol=1e-4, atol=1e-6)
        metrics = PartMetrics(made)
        metrics.update(truth.rows(1000).x.repeat(1, 2))
        found = metrics.result().features
        fires = found.firings > 0
        assert (found.group[fires] == SHARED).all()
        torch.testing.assert_close(found.nu_error[:, fires], torch.ones(2, int(fires.sum()), dtype=torch.float64))


def test_a_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = train([CONFIG], PlantedPartSource(PlantedParts(PLANTED)))[0].sae

    class Stops(PlantedPartSource):
        def next_batch(self, n: int) -> Tensor:
            if self._number * 4096 + self._offset > 10 * 128:
                raise KeyboardInterrupt
            return super().next_batch(n)

    options = {"checkpoint_dir": tmp_path, "checkpoint_seconds": 0.0}
    with pytest.raises(KeyboardInterrupt):
        train([CONFIG], Stops(PlantedParts(PLANTED)), **options)  # type: ignore[arg-type]
    resumed = train([CONFIG], PlantedPartSource(PlantedParts(PLANTED)), resume=True, **options)[0].sae  # type: ignore[arg-type]
    assert whole is not None
    assert resumed is not None
    assert whole.fingerprint() == resumed.fingerprint()


def test_rules_that_weigh_by_gradients_are_refused() -> None:
    with pytest.raises(InputError, match="gradient_topk weighs features by the loss at one hook point"):
        train([replace(CONFIG, rule=GradientTopK(3))], PlantedPartSource(PlantedParts(PLANTED)))


@pytest.mark.parametrize("rule", [TopK(4), BatchTopK(4), ReLU()], ids=lambda rule: rule.name)
def test_files_give_the_same_crosscoder_back(tmp_path: Path, rule: Rule) -> None:
    made = random_crosscoder(rule, dtype=torch.float32)
    made.save(tmp_path)
    loaded = SAE.load(tmp_path)
    assert isinstance(loaded, Crosscoder)
    assert (loaded.parts, loaded.rule, loaded.fingerprint()) == (made.parts, made.rule, made.fingerprint())
    assert (loaded.hook_name, loaded.model_name) == ("hook", "base + tuned")


def test_damaged_parts_give_one_line(tmp_path: Path) -> None:
    random_crosscoder(dtype=torch.float32).save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    for parts, message in (
        ("both", "expected a list of objects"),
        ([{**config["parts"][0], "width": "5"}], "has the part"),
        (config["parts"][:1], "have another width together"),
        ([config["parts"][0], {**config["parts"][1], "name": "A"}], "two parts or more, of different names"),
    ):
        (tmp_path / "cfg.json").write_text(json.dumps({**config, "parts": parts}))
        with pytest.raises(InputError, match=message):
            SAE.load(tmp_path)


# Latent scaling


def two_parts(dtype: torch.dtype = torch.float64) -> Crosscoder:
    made = Crosscoder([Part("A", "h", "m", 6, 2.0), Part("B", "h", "m", 6, 0.5)], F, TopK(4), dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def test_latent_scaling_in_one_pass_is_the_least_squares_solution() -> None:
    """beta against lstsq on rows of which the feature's own contribution is taken out, feature by feature."""
    made, x = (
        two_parts().requires_grad_(False),
        torch.randn(300, 12, generator=torch.Generator().manual_seed(6), dtype=torch.float64),
    )
    metrics = PartMetrics(made)
    metrics.update(x[:100])
    metrics.update(x[100:])
    found = metrics.result().features
    scale = made.scales()
    a, blocks = made.encode(x).to_dense(), made.split(made.W_dec * scale)
    x_parts, hats = made.split(x * scale), made.split(made(x) * scale)
    checked = 0
    for i in torch.nonzero(found.firings).flatten().tolist():
        r = int(found.reference[i])
        design = (a[:, i, None] * blocks[r][i]).reshape(-1, 1)
        for m in range(2):
            error = x_parts[m] - (hats[m] - a[:, i, None] * blocks[m][i])
            for target, beta in ((error, found.beta_error), (hats[m], found.beta_reconstruction)):
                solved = torch.linalg.lstsq(design, target.reshape(-1, 1)).solution
                assert beta[m, i].item() == pytest.approx(solved.item(), rel=1e-8, abs=1e-10)
                checked += 1
    assert checked > 4 * 20


def test_a_planted_multiple_of_a_feature_is_found_again() -> None:
    """Part A lacks w, and its rows contain 0.3 a w: beta_error is 0.3 there and 1 in part B, nu_reconstruction 0."""
    made = two_parts()
    with torch.no_grad():
        made.W_dec[:, :6] = 0
        made.b_dec.zero_()
    x = torch.randn(400, 12, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    code = made.encode(x)
    b = made.split(made(x))[1]
    metrics = PartMetrics(made)
    # In scaled rows: 2 x_A = 0.3 (0.5 x_B), of one feature at a time.
    one = replace(code, values=code.values * (torch.arange(4) == 0))
    b = made.split(made.decode(one))[1]
    metrics.update(torch.cat([0.3 * 0.5 * b / 2, b], dim=1), one)
    found = metrics.result().features
    fires = found.firings > 0
    torch.testing.assert_close(found.beta_error[0, fires], torch.full((int(fires.sum()),), 0.3, dtype=torch.float64))
    torch.testing.assert_close(found.beta_error[1, fires], torch.ones(int(fires.sum()), dtype=torch.float64))
    assert (found.nu_reconstruction[0, fires].abs() < 1e-12).all()
    assert (found.group[fires] == 1).all()
    assert found.nu_error[:, ~fires].isnan().all()


def test_relative_norms_and_groups_follow_the_scales_and_turn_round_with_the_parts() -> None:
    made = two_parts()
    with torch.no_grad():
        made.W_dec[0, :6], made.W_dec[0, 6:] = 1.0, 4.0
        made.W_dec[1, :6], made.W_dec[1, 6:] = 1.0, 0.0
        made.W_dec[2, :6], made.W_dec[2, 6:] = 1.0, 2.0
        made.b_enc[:3] += 30
    x = torch.randn(400, 12, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    swapped = Crosscoder(made.parts[::-1], F, made.rule, dtype=torch.float64)
    with torch.no_grad():
        for one, other in ((swapped.W_enc.T, made.W_enc.T), (swapped.W_dec, made.W_dec), (swapped.b_dec, made.b_dec)):
            one.copy_(other.roll(6, dims=-1))
        swapped.b_enc.copy_(made.b_enc)
    found = []
    for coder, batch in ((made, x), (swapped, x.roll(6, dims=1))):
        metrics = PartMetrics(coder)
        metrics.update(batch)
        found.append(metrics.result().features)
    one, other = found
    assert one.group[:3].tolist() == [SHARED, 0, BETWEEN]
    torch.testing.assert_close(one.relative_norm[:, 2], torch.tensor([1.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(one.relative_norm, other.relative_norm.flip(0))
    # Of parts with equal norms the first is the reference, so feature 0 is measured against another one.
    torch.testing.assert_close(one.nu_error[:, 1:], other.nu_error.flip(0)[:, 1:], equal_nan=True)
    assert torch.equal(torch.where(one.group >= 0, 1 - one.group, one.group), other.group)


def test_parts_of_different_widths_have_norms_and_no_latent_scaling() -> None:
    metrics = PartMetrics(random_crosscoder())
    metrics.update(rows(100))
    found = metrics.result().features
    assert found.nu_error.isnan().all()
    assert not found.relative_norm.isnan().any()


def test_parts_of_several_widths_are_measured_by_their_own_sizes() -> None:
    """A feature that writes the same share of a narrow part and of a wide one is shared."""
    parts = [Part("A", "hook", "m", 4, 2.0), Part("B", "hook", "m", 16, 0.5)]
    made = Crosscoder(parts, 3, ReLU(), dtype=torch.float64)
    shares = torch.tensor([[1.0, 1.0], [1.0, 0.1], [0.5, 1.0]], dtype=torch.float64)
    with torch.no_grad():
        for part, block, share in zip(parts, made.split(made.W_dec), shares.T, strict=True):
            # Along one coordinate, as large as the part's rows are: sqrt(width) in its scale.
            block[:, 0] = share * part.width**0.5 / part.scale
        made.b_enc.fill_(1.0)
    metrics = PartMetrics(made)
    metrics.update(torch.randn(8, 20, dtype=torch.float64))
    found = metrics.result().features
    torch.testing.assert_close(found.relative_norm.T, shares / shares.amax(dim=1, keepdim=True))
    assert found.group.tolist() == [SHARED, 0, BETWEEN]


# Planted truth


def trained_on(planted: PartPlanting, rule: Rule, n_steps: int, **settings: float) -> PartRecovery:
    truth = PlantedParts(planted)
    config = TrainConfig("a", total_tokens=n_steps * 256, batch_size=256, d_sae=40, rule=rule, lr=1e-2, **settings)  # type: ignore[arg-type]
    made = train([config], PlantedPartSource(truth))[0].sae
    assert isinstance(made, Crosscoder)
    metrics = PartMetrics(made)
    metrics.update(truth.rows(4096).x)
    return part_recovery(made, metrics.result().features, truth)


def test_planted_shared_and_exclusive_features_are_found() -> None:
    """32 features, 6 of either part alone, in parts of which one measures three times the other."""
    planting = Planting(d_in=16, n_features=32, l0=2, zipf=0.3, noise=0.02)
    found = trained_on(PartPlanting(planting, n_only=6, sizes=(1.0, 3.0)), BatchTopK(2), 1000)
    assert found.shared_f1 >= 0.9
    assert found.only_f1 >= 0.9
    assert found.false_only == 0


def test_l1_makes_false_exclusive_features_that_latent_scaling_tells_and_batchtopk_makes_none() -> None:
    """Features that one part has at 0.3 of their strength, and such as fire half the time in one part alone."""
    planting = Planting(d_in=16, n_features=32, l0=2, zipf=0.3, noise=0.02)
    planted = PartPlanting(planting, n_only=4, n_weak=6, n_loose=6, sizes=(1.0, 3.0))
    batchtopk = trained_on(planted, BatchTopK(3), 600)
    l1 = trained_on(planted, ReLU(), 600, sparsity_coefficient=0.2)
    assert batchtopk.false_only == 0
    assert batchtopk.only_f1 >= 0.9
    assert l1.false_only >= 6
    assert l1.false_only_seen >= 0.7 * l1.false_only
    assert l1.only_f1 < 0.75
