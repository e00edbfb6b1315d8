"""Examples of heads' attention against a search over every pair, written out."""

from pathlib import Path

import pytest

from sae.errors import InputError
from workbench.circuits.head_examples import head_examples
from workbench.models.contexts import context_batches
from workbench.models.load import load_model
from workbench.text.corpora import open_corpus

CONTEXT = 24


@pytest.fixture
def texts(tmp_path: Path) -> str:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"def f{number}(x):\n    return '<b>' + x * {number}\n" * 3)
    return str(tmp_path)


def test_examples_are_the_strongest_pairs_of_text_tokens(texts: str) -> None:
    model, corpus = load_model("demo", device="cpu"), open_corpus(texts)
    found = head_examples(model, corpus, n=4, max_tokens=240, context_len=CONTEXT)
    (batch,) = context_batches(model, corpus, "heldout", max_tokens=240, context_len=CONTEXT, separate=True)
    assert found.n_tokens == batch.tokens.numel()
    _, cache = model.bridge.run_with_cache(batch.tokens)
    for layer, head in ((0, 3), (2, 1), (3, 7)):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][:, head]
        pairs = [
            (pattern[row, query, key].item(), row, query, key)
            for row in range(len(batch.tokens))
            for query in range(CONTEXT)
            for key in range(2, query)
            if batch.ordinary[row, query]
        ]
        looks = found.looks[f"a{layer}.h{head}"]
        assert looks[0].weight == pytest.approx(max(pairs)[0], abs=1e-6)
        assert [look.weight for look in looks] == sorted((look.weight for look in looks), reverse=True)
        kinds = {(look.texts[look.query], look.texts[look.key]) for look in looks}
        assert len(kinds) == len(looks) == 4
        for look in looks:
            assert 1 < look.key < look.query
            assert look.texts[0] == "BOS"
        html = found.html(f"a{layer}.h{head}")
        assert html.count('class="peak"') == 4
        assert "<b>" not in html


def test_a_corpus_too_small_for_a_context_is_refused(texts: str) -> None:
    with pytest.raises(InputError, match="do not fill one context"):
        head_examples(load_model("demo", device="cpu"), open_corpus(texts), max_tokens=10)
