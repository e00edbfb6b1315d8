"""SparseCode: both layouts describe the same matrix."""

import pytest
import torch

from sae import SparseCode
from sae.kernels.sparse import ragged_code

# Three tokens, four features: token 0 fires 2 and 1, token 1 nothing, token 2 fires 3 (negative) and 0.
DENSE = torch.tensor([[0.0, 5.0, 7.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, -2.0]])
FIXED = SparseCode(
    values=torch.tensor([[7.0, 5.0, 0.0], [0.0, 0.0, 0.0], [-2.0, 1.0, 0.0]]),
    indices=torch.tensor([[2, 1, 0], [0, 0, 0], [3, 0, 0]]),
    d_sae=4,
)
RAGGED = SparseCode(
    values=torch.tensor([7.0, 5.0, -2.0, 1.0]),
    indices=torch.tensor([2, 1, 3, 0]),
    d_sae=4,
    offsets=torch.tensor([0, 2, 2, 4]),
)


def test_both_layouts_give_the_dense_matrix() -> None:
    assert torch.equal(FIXED.to_dense(), DENSE)
    assert torch.equal(RAGGED.to_dense(), DENSE)


def test_an_unused_slot_does_not_hide_feature_zero() -> None:
    """Unused slots name feature 0 with value 0; a real activation of feature 0 in the same token survives them."""
    assert FIXED.to_dense()[2, 0] == 1.0


def test_rows_lists_the_entries_that_are_not_zero_token_by_token() -> None:
    for code in (FIXED, RAGGED):
        token, feature, value = code.entries()
        assert token.tolist() == [0, 0, 2, 2]
        assert feature.tolist() == [2, 1, 3, 0]
        assert value.tolist() == [7.0, 5.0, -2.0, 1.0]


def test_l0_counts_active_features() -> None:
    assert FIXED.l0().tolist() == RAGGED.l0().tolist() == [2, 0, 2]


def test_the_largest_entries_of_either_layout_are_those_of_the_dense_matrix() -> None:
    dense = torch.tensor([[0.0, -3.0, 0.0, 1.0, 2.0], [0.0] * 5, [0.5, 0.0, 0.0, 0.0, -0.25]])
    token, feature = dense.nonzero(as_tuple=True)
    ragged = ragged_code(token, feature, dense[token, feature], 3, 5)
    for code in (ragged, ragged.largest(3)):
        for k in (1, 2, 9):
            kept = torch.zeros_like(dense)
            order = dense.abs().topk(min(k, 5), dim=1).indices
            kept.scatter_(1, order, dense.gather(1, order))
            found = code.largest(k)
            assert found.offsets is None
            assert torch.equal(found.to_dense(), kept)
            assert (found.values.abs().diff(dim=1) <= 0).all()


def test_tokens_cuts_out_a_range() -> None:
    for code in (FIXED, RAGGED):
        assert torch.equal(code.tokens(1, 3).to_dense(), DENSE[1:3])
        assert code.tokens(1, 1).n_tokens == 0


def test_a_code_is_indexed_as_its_matrix() -> None:
    for code in (FIXED, RAGGED):
        assert len(code) == 3
        assert torch.equal(code[2].to_dense(), DENSE[2])
        assert torch.equal(code[-1].to_dense(), DENSE[-1])
        assert torch.equal(code[1:].to_dense(), DENSE[1:])
        assert [row.l0().tolist() for row in code] == [[2], [0], [2]]
        for wrong in (3, -4):
            with pytest.raises(IndexError):
                code[wrong]


def test_any_index_of_a_tensor_gives_what_it_gives_of_the_matrix() -> None:
    for flat in (FIXED, RAGGED):
        twice = SparseCode(
            torch.cat([flat.values] * 2), torch.cat([flat.indices] * 2), 4,
            None if flat.offsets is None else torch.cat([flat.offsets, 4 + flat.offsets[1:]]),
        )  # fmt: skip
        for code in (flat, twice.arranged((2, 3)), twice.arranged((3, 1, 2))):
            dense = code.to_dense()
            first = torch.arange(len(code)) % 2 == 0
            for index in (first, [1, 0, 1], slice(None, None, 2), slice(2, 1), (..., 3), (0, ..., -4), (), ..., None):
                found = code[index]
                assert torch.equal(found if isinstance(found, torch.Tensor) else found.to_dense(), dense[index]), index
        code, dense = twice.arranged((2, 3)), twice.arranged((2, 3)).to_dense()
        for index in ((0, 1), (slice(None), -1), (dense.sum(dim=-1) > 0,), (slice(None), slice(1, None), 2), (1, 2, 3)):
            found = code[index]
            assert torch.equal(found if isinstance(found, torch.Tensor) else found.to_dense(), dense[index]), index
        for wrong in ((0, 0, 0, 0), (2,), (0, 3), (0, 0, 4), (0, 0, slice(2)), (0, 0, [1, 2])):
            with pytest.raises(IndexError):
                code[wrong]


def test_leading_dimensions_are_kept() -> None:
    for code in (FIXED, RAGGED):
        six = SparseCode(
            torch.cat([code.values] * 2), torch.cat([code.indices] * 2), 4,
            None if code.offsets is None else torch.cat([code.offsets, code.offsets[1:] + 4]),
        ).arranged((3, 2, 1))  # fmt: skip
        dense = torch.cat([DENSE] * 2).view(3, 2, 1, 4)
        assert six.shape == (3, 2, 1, 4)
        assert torch.equal(six.to_dense(), dense)
        assert torch.equal(six[1:].to_dense(), dense[1:])
        assert torch.equal(six[1][1].to_dense(), dense[1][1])
        assert torch.equal(six.to("cpu").to_dense(), dense)


def test_the_repr_is_short() -> None:
    assert repr(RAGGED) == "SparseCode([3, 4], L0 1.3)"
