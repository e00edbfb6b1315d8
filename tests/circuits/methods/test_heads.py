"""Head scores and composition against loops, TransformerLens and the planted heads."""

from typing import Any

import pytest
import torch
from transformer_lens import FactoredMatrix
from transformer_lens.head_detector import detect_head
from transformer_lens.utilities.matrix import composition_scores as their_scores

from circuits import heads
from circuits.blocks import head_weights
from circuits.composition import composition_scores, product_norms
from circuits.effective_weights import effective_weights
from circuits.heads import copying_scores, head_scores, pattern_sums, prefix_induction, repeated_tokens
from sae.errors import InputError


def test_scores_equal_a_loop_over_queries(random_model: Any) -> None:
    tokens = torch.tensor([[0, 5, 7, 5, 9, 7, 5], [0, 1, 2, 3, 1, 1, 0]])
    _, cache = random_model.run_with_cache(tokens)
    pattern = cache["blocks.1.attn.hook_pattern"].double()
    sums, counts = pattern_sums(pattern, tokens)
    for head in range(4):
        previous, duplicate, induction, sink, base, entropy, keys = ([] for _ in range(7))  # type: ignore[var-annotated]
        for row in range(2):
            ids = tokens[row].tolist()
            for q in range(7):
                A = pattern[row, head, q].tolist()
                if q >= 2:
                    previous.append(A[q - 1])
                earlier = [k for k in range(1, q) if ids[k] == ids[q]]
                if earlier:
                    duplicate.append(sum(A[k] for k in earlier))
                    induction.append(sum(A[k + 1] for k in earlier))
                if q == 0:
                    continue
                sink.append(A[0])
                base.append(A[0] - 1 / (q + 1))
                entropy.append(-sum(a * torch.tensor(a).log().item() for a in A if a > 0))
                total, count = 0.0, 0
                for a in sorted(A, reverse=True):
                    total, count = total + a, count + 1
                    if total >= 0.95 - 1e-6:
                        break
                keys.append(count)
        expected = [previous, duplicate, induction, sink, base, entropy, keys]
        assert [len(values) for values in expected] == counts.tolist()
        torch.testing.assert_close(
            sums[head], torch.tensor([sum(v) for v in expected], dtype=torch.float64), atol=1e-6, rtol=1e-6
        )


def test_pattern_scores_are_those_of_transformer_lens_detector(planted: Any) -> None:
    """Its score divides the sum over all queries by the attention in all of them, one a query; ours averages over the
    queries that qualify."""
    # The tokenizer takes a 0 inside a number for BOS.
    tokens = repeated_tokens([token for token in range(30) if token % 10], 0, n=1, length=12)
    text = " ".join(str(token) for token in tokens[0, 1:].tolist())
    assert torch.equal(planted.to_tokens(text), tokens)
    scores = head_scores(planted, tokens)
    for ours, theirs, queries in (("duplicate_token", "duplicate_token_head", 12), ("induction", "induction_head", 12)):
        detected = detect_head(planted, text, theirs)  # type: ignore[arg-type]
        torch.testing.assert_close(scores[ours].float(), detected * 25 / queries, atol=1e-5, rtol=1e-4)
    _, cache = planted.run_with_cache(tokens)
    at_one = torch.stack([cache[f"blocks.{layer}.attn.hook_pattern"][0, :, 1, 0] for layer in range(4)])
    detected = (detect_head(planted, text, "previous_token_head") * 25 - at_one) / 23
    torch.testing.assert_close(scores["previous_token"].float(), detected, atol=1e-5, rtol=1e-4)


def test_planted_heads_are_found(planted: Any, demo: Any) -> None:
    scores = head_scores(planted, repeated_tokens(range(30), 0, n=4, length=12))
    assert scores.best("previous_token", 1) == ["a0.h3"]
    assert scores.best("induction", 1) == ["a2.h5"]
    table = scores.table().set_index("node")
    assert table.previous_token["a0.h3"] > 0.9
    assert table.induction["a2.h5"] > 0.9
    assert table.induction.drop("a2.h5").max() < 0.3
    # A head without preference spreads evenly: the baseline, log of the keys, nearly all keys.
    flat = table.loc["a3.h0"]
    assert flat.sink_excess == pytest.approx(0, abs=0.01)
    assert flat.entropy == pytest.approx(sum(torch.arange(2, 26).log().tolist()) / 24, abs=0.01)
    real = head_scores(demo.bridge, repeated_tokens(range(10, 4000), demo.bos_id, n=4))
    assert real["induction"].max() > 0.3
    assert real["previous_token"].max() > 0.3


@torch.no_grad()
def test_copying_equals_the_eigenvalues_over_the_whole_vocabulary(bridge: Any) -> None:
    scores = copying_scores(bridge, 1)
    W_U = effective_weights(bridge, "unembed").W.double()
    W_E = bridge.embed.original_component.weight.double()
    W_V, W_O = effective_weights(bridge, "v", 1).W.double(), head_weights(bridge, 1).double()
    for head in range(W_O.shape[0]):
        shared = head * W_V.shape[1] // W_O.shape[0]
        eigenvalues = torch.linalg.eigvals(W_E @ W_V[:, shared] @ W_O[head] @ W_U[:, : len(W_E)])
        expected = (eigenvalues.sum() / eigenvalues.abs().sum()).real
        assert float(scores[head]) == pytest.approx(float(expected), abs=1e-4)


def test_the_planted_induction_head_copies(planted: Any) -> None:
    assert float(copying_scores(planted, 2)[5]) == pytest.approx(1, abs=1e-3)


def test_composition_norms_are_transformer_lens(bridge: Any) -> None:
    layer_1, layer_2 = (
        {p: effective_weights(bridge, p, layer).W.double().transpose(0, 1) for p in "qkv"}  # type: ignore[arg-type]
        for layer in (0, 1)
    )
    outs = [head_weights(bridge, layer).double() for layer in (0, 1)]
    repeats = outs[0].shape[0] // layer_1["v"].shape[0]
    for part in (layer_1, layer_2):
        for name in "kv":
            part[name] = part[name].repeat_interleave(repeats, dim=0)
    OV_1 = FactoredMatrix(layer_1["v"], outs[0])
    QK = FactoredMatrix(layer_2["q"], layer_2["k"].transpose(1, 2))
    OV_2 = FactoredMatrix(layer_2["v"], outs[1])
    for kind, right in (("q", QK), ("k", QK.T), ("v", OV_2)):
        found = composition_scores(bridge, kind)  # type: ignore[arg-type]
        torch.testing.assert_close(found.values[0, :, 1], their_scores(OV_1, right), atol=1e-10, rtol=1e-8)
        assert found.values[1, :, 0].abs().max() == 0


def test_composition_finds_the_planted_pair_and_knows_its_bounds(planted: Any) -> None:
    assert composition_scores(planted, "k").table(1).iloc[0, :2].tolist() == ["a0.h3", "a2.h5"]
    eye = torch.eye(6, 3, dtype=torch.float64)[None]
    other = torch.eye(6, dtype=torch.float64)[None, :, 3:]
    assert float(product_norms(eye, other, eye, eye)) == 0
    matched = torch.eye(6, 1, dtype=torch.float64)[None]
    assert float(product_norms(matched, matched, matched, matched)) == pytest.approx(1)


def test_prefixes_tell_one_token_matching_by_its_indifference(planted: Any, demo: Any) -> None:
    found = prefix_induction(planted, range(30), 0, lengths=(1, 2, 4), n=4)
    # The planted head matches one token.
    assert found.intact[2, 5].min() > 0.8
    for scores in (found.corrupted, found.intact):
        torch.testing.assert_close(scores[2, 5], found.intact[2, 5, :1].expand(3), atol=0.05, rtol=0)
    assert list(found.table().columns) == ["node", "length", "intact", "corrupted"]
    with pytest.raises(InputError, match="vocabulary of 36"):
        prefix_induction(planted, range(30), 0)


def test_prefix_rows_repeat_what_they_should(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a longest prefix of 4 the first prefix ends at 4, and the query, the second one's end, stands at 14."""
    given: list[list[int]] = []
    run = heads.activations

    def note(bridge: Any, tokens: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
        given.extend(tokens.tolist())
        return run(bridge, tokens, names)

    monkeypatch.setattr(heads, "activations", note)
    prefix_induction(planted, range(30), 0, lengths=(1, 2, 4), n=1)
    repeats = [{at: row.index(token) for at, token in enumerate(row) if row.index(token) < at} for row in given]
    assert repeats == [
        {14: 4}, {14: 4},
        {13: 3, 14: 4}, {9: 3, 14: 4},
        {11: 1, 12: 2, 13: 3, 14: 4}, {7: 1, 8: 2, 9: 3, 14: 4},
    ]  # fmt: skip


def test_bad_input(planted: Any) -> None:
    with pytest.raises(InputError, match="at least three tokens"):
        head_scores(planted, torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(InputError, match="unknown composition 'z'"):
        composition_scores(planted, "z")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the vocabulary has 4"):
        repeated_tokens(range(5), 0, length=9)
