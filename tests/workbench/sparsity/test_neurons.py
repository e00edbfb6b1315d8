"""One neuron from near against activations captured another way."""

from typing import Any

import pytest
import torch

from sae.errors import InputError
from workbench.models.capture import capture
from workbench.models.contexts import context_batches
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel, load_model
from workbench.sparsity.neurons import view_neuron
from workbench.text.corpora import Corpus, open_corpus

CONTEXT, TOKENS = 32, 1024
LAYER, NEURON = 1, 5


def test_values_and_examples_equal_what_is_captured(model: LoadedModel, corpus: Corpus) -> None:
    view = view_neuron(model, corpus, LAYER, NEURON, max_tokens=TOKENS, context_len=CONTEXT, top=4)
    hook = resolve_hook(model, f"blocks.{LAYER}.mlp.hook_post")
    values: dict[tuple[int, int], float] = {}
    largest: list[float] = []
    for batch in context_batches(model, corpus, "train", max_tokens=TOKENS, context_len=CONTEXT):
        h = capture(model, batch.tokens, [hook]).activations[hook.name][..., NEURON]
        for row in range(len(h)):
            mine = batch.ordinary[row].nonzero().squeeze(1).tolist()
            values |= {(int(batch.doc[row, at]), int(batch.doc_pos[row, at])): h[row, at].item() for at in mine}
            if mine:
                largest.append(max(abs(h[row, at].item()) for at in mine))
    assert view.tokens == len(values)
    assert view.zero == pytest.approx(sum(value == 0 for value in values.values()) / len(values))
    assert sum(view.counts) == sum(value != 0 for value in values.values())
    assert [abs(item.activation) for item in view.examples] == pytest.approx(sorted(largest)[::-1][:4], rel=1e-5)
    for item in view.examples:
        doc = int(item.document.removeprefix("document "))
        first = item.pos - item.peak
        shown = [values[doc, first + at] for at in range(len(item.tokens))]
        assert item.activations == pytest.approx(shown, rel=1e-5, abs=1e-6)
        assert item.activation == item.activations[item.peak]


def test_the_histogram_counts_every_value_that_is_not_zero(gpt2_model: LoadedModel, corpus: Corpus) -> None:
    view = view_neuron(gpt2_model, corpus, LAYER, NEURON, max_tokens=TOKENS, context_len=CONTEXT)
    assert len(view.edges) == len(view.counts) + 1
    assert view.edges == sorted(view.edges)
    assert view.edges[-1] == pytest.approx(view.examples[0].activation)


def test_a_neuron_that_never_fires_has_no_examples(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: object) -> None:
    model = load_model(str(tiny_gpt2), device="cpu")
    hf: Any = model.hf
    block = hf.transformer.h[LAYER]
    with torch.no_grad():
        block.mlp.c_fc.weight[:, NEURON] = 0.0
        block.mlp.c_fc.bias[NEURON] = -1.0
    folder = tmp_path_factory.mktemp("dead")
    (folder / "a.txt").write_text("some text " * 200)
    (folder / "b.txt").write_text("other text " * 200)
    view = view_neuron(model, open_corpus(str(folder)), LAYER, NEURON, max_tokens=128, context_len=CONTEXT)
    assert view.zero == 1.0
    assert view.examples == []
    assert sum(view.counts) == 0


@pytest.mark.parametrize(
    ("layer", "neuron", "message"), [(9, 0, "layer 9 does not exist"), (0, 9999, "neuron 9999 does not exist")]
)
def test_a_place_that_does_not_exist_is_one_line(
    gpt2_model: LoadedModel, corpus: Corpus, layer: int, neuron: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        view_neuron(gpt2_model, corpus, layer, neuron, max_tokens=TOKENS, context_len=CONTEXT)
