"""Short texts of many features at once are those of a feature's own examples."""

from workbench.features.index.query import FeatureIndex
from workbench.features.index.snippets import AFTER, BEFORE, snippets
from workbench.workspace import Workspace

from .conftest import DEAD


def piece(tokens: list[str], peak: int) -> tuple[str, str, str]:
    before, after = tokens[max(0, peak - BEFORE) : peak], tokens[peak + 1 : peak + 1 + AFTER]
    return "".join(before), tokens[peak], "".join(after)


def test_snippets_are_pieces_of_the_strongest_examples(space: Workspace) -> None:
    index = FeatureIndex.open(space, "s")
    found = snippets(index, range(40), n=2)
    assert DEAD not in found
    assert len(found) > 10
    for number, texts in found.items():
        assert 1 <= len(texts) <= 2
        # Several firings may be equally strong.
        strongest = sorted((abs(e.activations[e.peak]) for e in index.feature(number).groups[0].examples), reverse=True)
        for text, strength in zip(texts, strongest, strict=False):
            alike = [e for e in index.feature(number).groups[0].examples if abs(e.activations[e.peak]) == strength]
            assert text in [piece(example.tokens, example.peak) for example in alike]
