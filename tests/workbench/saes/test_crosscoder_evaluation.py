"""Crosscoders measured part by part on the models they read."""

import pytest
import torch

from sae import Crosscoder, InputError, ReLU, TopK
from sae.source import Part
from workbench.models.load import LoadedModel
from workbench.saes.part_evaluation import evaluate_parts
from workbench.text.corpora import Corpus, open_corpus

A, B = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
SIZES = {"max_tokens": 320, "context_len": 16}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"def function_{number}(value):\n    return value + {number}\n" * 3)
    return open_corpus(str(folder))


def exact(parts: list[Part]) -> Crosscoder:
    """relu(x) and relu(-x) of every coordinate: what it reads is what it writes."""
    d = sum(part.width for part in parts)
    made = Crosscoder(parts, 2 * d, ReLU())
    with torch.no_grad():
        made.W_enc.copy_(torch.cat([torch.eye(d), -torch.eye(d)], dim=1))
        made.W_dec.copy_(made.W_enc.T)
    return made


def parts_of(model: LoadedModel, *hooks: str) -> list[Part]:
    return [Part(str(i), hook, model.info.name, model.info.d_model) for i, hook in enumerate(hooks)]


def test_an_exact_crosscoder_changes_nothing(gpt2_model: LoadedModel, corpus: Corpus) -> None:
    found = evaluate_parts([gpt2_model] * 2, exact(parts_of(gpt2_model, A, B)), corpus, **SIZES)
    assert found.dead_share < 0.1
    for part, hook in zip(found.parts, (A, B), strict=True):
        assert part.hook == hook
        assert part.explained_variance == pytest.approx(1, abs=1e-6)
        assert part.added_nats == pytest.approx(0, abs=1e-5)
        assert part.kl == pytest.approx(0, abs=1e-5)
        assert part.loss_recovered_zero == pytest.approx(1, abs=1e-3)
    # Every feature writes one coordinate of one part.
    groups = found.features.group[found.features.firings > 0]
    assert set(groups.tolist()) == {0, 1}


def test_a_part_that_is_not_written_has_no_explained_variance(gpt2_model: LoadedModel, corpus: Corpus) -> None:
    made = exact(parts_of(gpt2_model, A, B))
    with torch.no_grad():
        made.W_dec[:, gpt2_model.info.d_model :] = 0
    kept, lost = evaluate_parts([gpt2_model] * 2, made, corpus, **SIZES).parts
    assert kept.explained_variance == pytest.approx(1, abs=1e-6)
    assert lost.explained_variance < 0.01
    assert lost.added_nats == pytest.approx(lost.ce_zero - lost.ce_clean, abs=1e-6)


def test_what_does_not_belong_together_gives_one_line(
    gpt2_model: LoadedModel, llama_model: LoadedModel, corpus: Corpus
) -> None:
    made = exact(parts_of(gpt2_model, A, A))
    with pytest.raises(InputError, match="have different tokenizers"):
        evaluate_parts([gpt2_model, llama_model], made, corpus, **SIZES)
    wide = Crosscoder([Part("a", A, "m", 7), Part("b", A, "m", 7)], 8, TopK(2))
    with pytest.raises(InputError, match="part 'a' of the crosscoder has width 7 and"):
        evaluate_parts([gpt2_model] * 2, wide, corpus, **SIZES)
