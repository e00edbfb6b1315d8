"""k-sparse codes of documents: the loss against loops in float64, annealing, planted topics that labels bring out."""

import math

import numpy as np
import pytest
import torch

from sae import losses
from workbench.features.documents.contrastive import TEMPERATURE, Coder, Recipe, contrastive_loss, loss, train_codes
from workbench.features.documents.sparse import LEAST, Rows, passage_means


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_contrastive_loss_is_that_of_its_formula() -> None:
    z, labels = drawn(9, 5).relu(), torch.tensor([0, 1, 0, 2, 1, 0, 3, 2, 0])
    z[4] = 0
    total, anchors = 0.0, 0
    for i in range(9):
        alike, among = 0.0, 0.0
        for j in range(9):
            if i != j:
                norms = max(float(z[i].norm() * z[j].norm()), 1e-300)
                near = math.exp(float(z[i] @ z[j]) / norms / TEMPERATURE)
                among += near
                alike += near if labels[i] == labels[j] else 0
        if alike:
            total -= math.log(alike / among)
            anchors += 1
    # The text with label 3 has no other and is no anchor.
    assert anchors == 8
    assert float(contrastive_loss(z, labels)) == pytest.approx(total / anchors, rel=1e-12)
    assert float(contrastive_loss(z, torch.arange(9))) == 0


def test_the_loss_is_the_sum_of_its_parts() -> None:
    x, labels = drawn(12, 6, seed=1), torch.arange(12) % 3
    coder = Coder(drawn(6, 20, seed=2), drawn(20, seed=3), drawn(20, 6, seed=4), drawn(6, seed=5))
    pre = (x - coder.b_dec) @ coder.W_enc + coder.b_enc

    def sparse(values: torch.Tensor, k: int) -> torch.Tensor:
        kept = torch.zeros_like(values)
        for row, of in zip(kept, values, strict=True):
            for place in sorted(range(len(of)), key=lambda i: -float(of[i]))[:k]:
                row[place] = max(0.0, float(of[place]))
        return kept

    def error(k: int) -> torch.Tensor:
        return losses.reconstruction(x, sparse(pre, k) @ coder.W_dec + coder.b_dec).loss

    dead = torch.tensor([1, 4, 5, 9, 17])
    residual = x - (sparse(pre, 2) @ coder.W_dec + coder.b_dec)
    guess = sparse(pre[:, dead], 3) @ coder.W_dec[dead]
    aux = (residual - guess).square().sum() / (residual - residual.mean(dim=0)).square().sum()
    total, z = loss(coder, x, labels, 2, 0.5, dead)
    assert torch.equal(z, sparse(pre, 2))
    expected = error(2) + error(8) / 8 + aux / 32 + 0.5 * contrastive_loss(z, labels)
    assert float(total) == pytest.approx(float(expected), rel=1e-12)


def test_k_falls_to_its_end_over_seven_tenths_of_the_steps() -> None:
    recipe = Recipe(2, anneal_from=64, steps=100)
    assert [recipe.k_at(step) for step in (0, 35, 70, 99)] == [64, 33, 2, 2]
    assert Recipe(2).k_at(0) == 2


def test_labels_bring_out_what_texts_of_one_label_share() -> None:
    # Two texts of a topic share a weak direction; what is strong is drawn anew for each.
    topics, labels = drawn(25, 16, seed=6), torch.arange(250) % 25
    x = 0.5 * topics[labels] + drawn(250, 16, seed=7) @ torch.diag(torch.linspace(2, 0.1, 16, dtype=torch.float64))
    shared = []
    for gamma in (0.0, 1.0):
        recipe = Recipe(4, anneal_from=16, gamma=gamma, width=48, steps=60, batch=125, lr=1e-2)
        coder = train_codes(x, labels, recipe)
        z = coder.code(x.float(), 4)
        assert int((z > 0).sum(dim=1).max()) <= 4
        unit = z / z.norm(dim=1, keepdim=True).clamp(min=1e-9)
        cosine = unit @ unit.T - 2 * torch.eye(250)
        shared.append(float((labels[cosine.argmax(dim=1)] == labels).float().mean()))
    assert shared[1] > shared[0] + 0.1
    # The same for a seed, in the units that were given.
    assert torch.equal(train_codes(x, labels, recipe).W_enc, coder.W_enc)
    bigger = train_codes(4 * x, labels, recipe)
    torch.testing.assert_close(bigger.code(4 * x.float(), 4), 4 * z, rtol=1e-3, atol=1e-3)


def test_passages_are_what_a_context_holds_of_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    class Held:
        width = 3

        def rows(self, rows: np.ndarray) -> torch.Tensor:
            return torch.stack([torch.from_numpy(rows).float(), torch.ones(len(rows)), torch.zeros(len(rows))], dim=1)

    monkeypatch.setattr("workbench.features.documents.sparse.ROWS_AT_ONCE", 7)
    # Contexts of 64 rows; document 5 from row 1 to 99, 6 to 130, which leaves a context two rows of it.
    row = np.array([at for at in range(131) if at % 64])
    rows = Rows(row, np.where(row < 100, 5, 6), row)
    means, labels = passage_means(Held(), rows, 64)  # type: ignore[arg-type]
    pieces = [range(1, 64), range(65, 100)]
    assert [len(piece) >= LEAST for piece in pieces] == [True, True]
    assert labels.tolist() == [5, 5]
    assert means[:, 0].tolist() == pytest.approx([np.mean(piece) for piece in pieces])
    assert rows.only(np.array([6])).row.tolist() == [row for row in range(100, 131) if row % 64]
