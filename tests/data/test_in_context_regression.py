"""The exact Bayes predictor against ridge regression and the joint Gaussian, baselines, and what the model may see."""

import pytest
import small_training
import torch
from in_context_regression import (
    DIM,
    EXAMPLES,
    NOISE,
    Regressor,
    best_rates,
    dense,
    gradient,
    least_squares,
    measured,
    mixture,
    posterior_mean,
    probes,
    sparse,
    train,
)


def test_of_dense_vectors_bayes_is_ridge_regression() -> None:
    x, y, _ = dense().drawn(6, torch.Generator().manual_seed(0))
    for seen in (0, 1, 4, 9):
        found = posterior_mean(dense(), x[:, :seen], y[:, :seen])
        for row in range(6):
            a, b = x[row, :seen].double(), y[row, :seen].double()
            torch.testing.assert_close(found[row], torch.linalg.solve(a.T @ a + NOISE**2 * torch.eye(DIM), a.T @ b))


def test_of_a_mixture_bayes_is_its_components_means_by_how_well_they_fit() -> None:
    prior, seen = mixture("dense+sparse"), 7
    x, y, _ = prior.drawn(5, torch.Generator().manual_seed(1))
    found = posterior_mean(prior, x[:, :seen], y[:, :seen])
    for row in range(5):
        a, b = x[row, :seen].double(), y[row, :seen].double()
        chances, vectors = [], []
        for weight, variances in zip(prior.weights.double(), prior.variances.double(), strict=True):
            s = torch.diag(variances)
            covariance = a @ s @ a.T + NOISE**2 * torch.eye(seen)
            likelihood = torch.distributions.MultivariateNormal(torch.zeros(seen).double(), covariance).log_prob(b)
            chances.append(weight.log() + likelihood)
            vectors.append(s @ a.T @ torch.linalg.inv(covariance) @ b)
        expected = torch.stack(chances).softmax(dim=0) @ torch.stack(vectors)
        torch.testing.assert_close(found[row], expected)


def test_no_predictor_is_better_than_bayes_and_sparse_vectors_are_learnt_from_fewer_examples() -> None:
    risks = {}
    for make in (dense, sparse):
        x, y, w = make().drawn(4000, torch.Generator().manual_seed(2))
        step = best_rates(make())[5] * gradient(x[:, :5], y[:, :5])
        vectors = (
            posterior_mean(make(), x[:, :5], y[:, :5]),
            least_squares(x[:, :5], y[:, :5]),
            step,
            torch.zeros_like(w),
        )
        of = [float((vector - w).square().sum(dim=1).mean()) for vector in vectors]
        assert of[0] == min(of)
        assert of[2] < of[3]
        risks[make] = of[0]
    assert risks[sparse] < risks[dense] / 2
    a, b = x[0, :9].double(), y[0, :9].double()
    torch.testing.assert_close(least_squares(x[:1, :9], y[:1, :9])[0], torch.linalg.lstsq(a, b[:, None]).solution[:, 0])


def test_a_prediction_sees_its_input_and_what_was_before() -> None:
    torch.manual_seed(0)
    model = Regressor(2, 16, 2).eval()
    x, y, _ = dense().drawn(2, torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = model(x, y)
        y[:, 5:] += 1
        after = model(x, y)
        x[:, 9] += 1
        moved = model(x, y)
    assert before.shape == (2, EXAMPLES)
    torch.testing.assert_close(after[:, :6], before[:, :6])
    assert ((after[:, 6:] - before[:, 6:]).abs() > 1e-6).all()
    assert ((moved[:, 9] - after[:, 9]).abs() > 1e-6).all()
    torch.testing.assert_close(moved[:, :9], after[:, :9])


def test_training_lowers_the_loss_and_the_tables_say_how_far_it_is() -> None:
    torch.manual_seed(0)
    model = Regressor(1, 16, 2)
    losses = train(model, sparse(), steps=30, batch=16, lr=3e-3, seed=0, device="cpu")
    assert sum(losses[-10:]) < sum(losses[:10])
    table = measured(model.eval(), dense(), dense(), n=64).set_index("examples")
    assert (table["to training"] == table["to bayes"]).all()
    torch.testing.assert_close(torch.tensor(table["to bayes"]), torch.tensor(table["to ridge"]))
    # Without examples every predictor says 0, whose risk is w.x itself.
    assert table.loc[0, "bayes"] == table.loc[0, "least_squares"] == table.loc[0, "gradient_step"]
    assert table.loc[0, "bayes"] == pytest.approx(1, abs=0.5)
    # What the embedding holds is the last y alone.
    read = probes(model, dense(), n=512).set_index("layer")
    assert read["gradient"].max() <= 1
    assert read.loc[1, "gradient"] > read.loc[0, "gradient"]


@pytest.mark.gpu
def test_a_graph_of_a_step_trains_as_steps_one_by_one_do(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for eager in (2, 12):
        monkeypatch.setattr(small_training, "EAGER", eager)
        torch.manual_seed(0)
        model = Regressor(2, 16, 2).to("cuda")
        losses.append(train(model, dense(), steps=12, batch=8, lr=3e-3, seed=0, device="cuda"))
    assert len(set(losses[0])) == 12
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)
