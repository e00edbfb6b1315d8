"""What an encoder loses, on a tiny model: the same tokens and losses as an evaluation, stored once."""

from pathlib import Path

import pytest
import torch

from sae import SAE, InputError, TopK, Transcoder
from workbench import Workspace
from workbench.models.load import LoadedModel
from workbench.saes.evaluation import evaluate_sae
from workbench.saes.inference import METHODS, measure_inference
from workbench.text.corpora import open_corpus

CONTEXT, TOKENS, K = 16, 320, 6


@pytest.fixture
def space(tmp_path: Path, gpt2_model: LoadedModel) -> Workspace:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number}.txt").write_text(f"def function_{number}(value):\n    return value + {number}\n" * 3)
    generator = torch.Generator().manual_seed(0)
    width = gpt2_model.info.d_model
    sae = SAE(width, 64, TopK(K), hook_name="blocks.1.hook_resid_post", model_name=gpt2_model.info.name)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(64, width, generator=generator), dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
    workspace = Workspace(tmp_path / "w")
    origin = {"context_len": CONTEXT, "corpus": str(texts), "model": gpt2_model.info.name}
    workspace.add_sae("s", sae, {"harvest": {"config": origin}, "hook": sae.hook_name})
    return workspace


def test_codes_are_measured_as_an_evaluation_measures_and_stored(space: Workspace, gpt2_model: LoadedModel) -> None:
    origin = space.origin("s")
    found = space.inference("s", ks=(3, K, 9), model=gpt2_model, max_tokens=TOKENS)
    table = found.table().set_index(["method", "k"])
    assert {method for method, _ in table.index} == set(METHODS)
    assert ("encoder", 9) not in table.index
    assert origin.corpus is not None
    alone = evaluate_sae(
        gpt2_model, [space.sae("s")], open_corpus(origin.corpus), max_tokens=TOKENS, context_len=CONTEXT
    )[0]
    for key in ("l0", "fvu", "added_nats", "kl", "dead_share"):
        assert table.loc[("encoder", K), key] == pytest.approx(getattr(alone, key), rel=1e-6, abs=1e-9)
    fvu = table["fvu"]
    for k in (3, K):
        assert fvu["encoder, refitted", k] < fvu["encoder", k]
    assert (fvu["l1, refitted"] < fvu["l1"]).all()
    assert fvu["omp", 3] > fvu["omp", K] > fvu["omp", 9]
    assert (table["l0"]["omp"] <= [3, K, 9]).all()
    assert found.encoder_loses == pytest.approx(fvu["encoder", K] - fvu["omp", K])
    assert {trace.name for trace in found.figure().data} == set(METHODS)
    stored = space.results.open("inference", "s")
    again = space.inference("s", ks=(3, K, 9), model=gpt2_model, max_tokens=TOKENS)
    assert space.results.open("inference", "s").created == stored.created
    assert again.table().equals(found.table())


@pytest.mark.parametrize(("settings", "words"), [
    ({"ks": (65,)}, "between 1 and the SAE's 64"),
    ({"methods": ("lars",)}, "no method 'lars'"),
    ({"ks": (9,), "methods": ("encoder", "encoder, refitted")}, "the encoder finds 6 features a token, not 9"),
])  # fmt: skip
def test_what_cannot_be_searched_is_refused(
    space: Workspace, gpt2_model: LoadedModel, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        space.inference("s", model=gpt2_model, max_tokens=TOKENS, **settings)


def test_a_transcoder_of_two_widths_is_refused_before_its_tokens_are_read(
    space: Workspace, gpt2_model: LoadedModel
) -> None:
    width = gpt2_model.info.d_model
    coder = Transcoder(width, 2 * width, 64, TopK(K), hook_name="blocks.1.hook_resid_post")
    corpus = open_corpus(str(space.origin("s").corpus))
    with pytest.raises(InputError, match="SAEs alone"):
        measure_inference(gpt2_model, coder, corpus, context_len=CONTEXT)
