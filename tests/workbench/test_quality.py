"""Planted features: drawn as SAELens draws them, the same again anywhere in the stream, and measured on known cases."""

import json

import pytest
import torch
from torch import Tensor

from sae import SAE, SparseCode, TopK
from workbench.bench.quality import Family, measures, nearest_latents, split_share
from workbench.bench.synthetic import BLOCK, TINY, Planted, Stream, benchmark_model
from workbench.cli.main import run


@pytest.fixture(scope="module")
def drawn() -> tuple[Planted, Tensor, Tensor, Tensor]:
    """The model; a block drawn here, and as many rows of SAELens' sampler; SAELens' activations of the first."""
    model = benchmark_model(TINY, "cpu")
    planted = Planted.of(model)
    ours = Stream(planted, 0).features(0).to_dense()
    torch.manual_seed(0)
    theirs = model.activation_generator.sample(BLOCK)
    return planted, ours, theirs, model.feature_dict(ours).detach()


def test_every_feature_fires_as_often_as_saelens_has_it(drawn: tuple[Planted, Tensor, Tensor, Tensor]) -> None:
    _, ours, theirs, _ = drawn
    one, other = (ours > 0).double().mean(0), (theirs > 0).double().mean(0)
    spread = ((one * (1 - one) + other * (1 - other)) / BLOCK).sqrt().clamp_min(1 / BLOCK)
    scores = (one - other) / spread
    assert scores.abs().max() < 4.5
    assert 0.8 < scores.std() < 1.2


def test_features_fire_together_and_as_strongly_as_saelens_has_it(
    drawn: tuple[Planted, Tensor, Tensor, Tensor],
) -> None:
    _, ours, theirs, _ = drawn
    frequent = ((ours > 0).double().mean(0) > 0.02).nonzero().squeeze(1)
    assert len(frequent) > 20
    one, other = ours[:, frequent].double(), theirs[:, frequent].double()
    strength = one.sum(0) / (one > 0).sum(0), other.sum(0) / (other > 0).sum(0)
    assert torch.allclose(*strength, rtol=0.05)
    # 16,384 rows know a correlation to 0.01.
    assert (one.T.corrcoef() - other.T.corrcoef()).abs().max() < 0.05
    assert (one.T.corrcoef() - torch.eye(len(frequent))).abs().max() > 0.2


def test_children_fire_with_their_parent_and_without_each_other(
    drawn: tuple[Planted, Tensor, Tensor, Tensor],
) -> None:
    planted, ours, _, _ = drawn
    fires = ours > 0
    children = (planted.parent >= 0).nonzero().squeeze(1)
    assert not (fires[:, children] & ~fires[:, planted.parent[children]]).any()
    families = planted.children[planted.children[:, 0] >= 0]
    assert len(families) == 4 + 16 + 64
    assert fires[:, families].sum(2).max() == 1


def test_rows_are_sums_of_directions(drawn: tuple[Planted, Tensor, Tensor, Tensor]) -> None:
    planted, _, _, rows = drawn
    assert torch.allclose(planted.activations(Stream(planted, 0).features(0)), rows, atol=1e-4)


def test_a_stream_goes_on_where_another_stood(drawn: tuple[Planted, Tensor, Tensor, Tensor]) -> None:
    planted, *_ = drawn
    whole = Stream(planted, 3)
    rows = torch.cat([whole.next_batch(n) for n in (1024, BLOCK, 1000)])
    stood = Stream(planted, 3)
    stood.next_batch(2000)
    again = Stream(planted, 3)
    again.load_state_dict(json.loads(json.dumps(stood.state_dict())))
    assert torch.equal(again.next_batch(BLOCK), rows[2000 : 2000 + BLOCK])
    assert not torch.equal(Stream(planted, 4).next_batch(1024), rows[:1024])
    assert torch.equal(again.sample(100), whole.sample(100))
    # Where nothing fires, rows are the bias.
    apart = whole.sample(100)
    apart = apart[(apart - planted.bias).abs().amax(dim=1) > 1e-3]
    assert len(apart) > 20
    assert not torch.isin(apart[:, 0], rows[:, 0]).any()


def test_the_latent_of_a_feature_is_the_nearest_of_its_own() -> None:
    directions = torch.eye(4)
    W_dec = torch.tensor([[1.0, 0.2, 0, 0], [1.0, 0, 0, 0], [0, 0, -1.0, 0.1]])
    assert nearest_latents(W_dec, directions).tolist() == [1, -1, 2, -1]
    assert split_share(W_dec, directions) == pytest.approx(2 / 3)


def family_of_one_parent() -> Planted:
    """Feature 0 with the children 1 and 2; feature 3 alone."""
    nothing = torch.zeros(4)
    children = torch.tensor([[1, 2], [-1, -1], [-1, -1], [-1, -1]])
    return Planted(
        torch.eye(4), nothing, torch.zeros(4, 1), nothing, nothing, nothing, nothing, children,
        torch.tensor([-1, 0, 0, -1]),
    )  # fmt: skip


def test_a_child_that_silences_its_parents_latent_is_absorbed() -> None:
    """60 rows: the parent alone (2 of 20 missed), with child 1 (20 of 20 missed), with child 2 (5 of 20)."""
    present = torch.zeros(60, 4, dtype=torch.bool)
    present[:, 0] = True
    present[20:40, 1] = True
    present[40:, 2] = True
    active = torch.ones(60, 1, dtype=torch.bool)
    active[:2] = False
    active[20:40] = False
    active[40:45] = False
    family = Family(family_of_one_parent(), torch.tensor([0, -1, -1, -1]))
    for rows in (slice(0, 30), slice(30, 60)):
        family.add(active[rows], present[rows])
    assert family.shares() == pytest.approx(
        {"children_judged": 2, "missed_with_child": (1 + 0.25) / 2, "missed_alone": 0.1, "absorbed": 0.5}
    )


def test_children_whose_parent_has_no_latent_are_not_judged() -> None:
    family = Family(family_of_one_parent(), torch.tensor([-1, 0, -1, -1]))
    family.add(torch.ones(60, 1, dtype=torch.bool), torch.ones(60, 4, dtype=torch.bool))
    assert family.shares()["children_judged"] == 0


def test_an_sae_of_the_planted_directions_finds_its_features(drawn: tuple[Planted, Tensor, Tensor, Tensor]) -> None:
    planted, *_ = drawn
    sae = SAE(48, 96, TopK(4))
    with torch.no_grad():
        sae.W_dec.copy_(planted.directions[:96])
        sae.W_enc.copy_(planted.directions[:96].T)
        sae.b_dec.copy_(planted.bias)
    found = measures(sae, Stream(planted, 0), 1)
    assert found["mcc"] == pytest.approx(1)
    assert found["split"] == 0
    assert found["f1"] > 0.3
    # What is measured beside SAELens' numbers: the same sums by hand.
    code: SparseCode = Stream(planted, 0).features(-2)
    x = planted.activations(code)
    error = (x - sae(x)).double().square().sum()
    assert found["explained_variance"] == pytest.approx(1 - (error / (x - x.mean(0)).double().square().sum()).item())
    assert found["l0"] == pytest.approx((sae.encode(x).to_dense() > 0).sum().item() / BLOCK)


def test_the_command_trains_and_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--quality", "--samples", "20000", "--device", "cpu", "--json"]) in (0, None)
    arms = json.loads(capsys.readouterr().out)["arms"]
    assert list(arms) == ["topk", "batchtopk", "matryoshka", "jumprelu", "SAELens batchtopk"]
    assert all(0 < measured["f1"] < 1 and 0 < measured["mcc"] < 1 for measured in arms.values())
    assert arms["topk"]["l0"] == pytest.approx(4, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quality", "--samples", "10"], "--samples must be at least 20000"),
        (["S", "--quality"], "--quality has one size: leave out S"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
