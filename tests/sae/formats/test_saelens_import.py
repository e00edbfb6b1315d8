"""SAELens' own folders, with what the native format has no room for: the numbers of its own classes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE as SAELensSAE
from sae_lens.saes.gated_sae import GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAEConfig

from sae import rules
from sae.errors import InputError
from sae.formats.foreign import load_foreign
from sae.formats.saelens_import import from_parts

SIZES = {"d_in": 16, "d_sae": 64}
NORMS = torch.linspace(0.5, 2, 64)
CASES: dict[str, tuple[Any, rules.Rule]] = {
    "standard": (StandardSAEConfig(**SIZES), rules.ReLU()),
    "standard on x itself": (StandardSAEConfig(**SIZES, apply_b_dec_to_input=False), rules.ReLU()),
    "jumprelu": (JumpReLUSAEConfig(**SIZES), rules.JumpReLU()),
    "jumprelu on x itself": (JumpReLUSAEConfig(**SIZES, apply_b_dec_to_input=False), rules.JumpReLU()),
    "topk by contribution": (TopKSAEConfig(**SIZES, k=6, rescale_acts_by_decoder_norm=True), rules.TopK(6)),
    "gated": (GatedSAEConfig(**SIZES), rules.JumpReLU()),
    "gated on x itself": (GatedSAEConfig(**SIZES, apply_b_dec_to_input=False), rules.JumpReLU()),
}


def peer_of(config: Any, randomise: Any) -> Any:
    config.metadata = SAEMetadata(hook_name="blocks.2.hook_resid_post", model_name="gpt2")
    return randomise(SAELensSAE.get_sae_class_for_architecture(config.architecture())(config), norms=NORMS)


@pytest.mark.parametrize("case", CASES)
def test_an_import_gives_saelens_reconstructions(case: str, randomise: Any, x: torch.Tensor, tmp_path: Path) -> None:
    config, rule = CASES[case]
    peer = peer_of(config, randomise)
    peer.save_model(tmp_path)
    sae = load_foreign(tmp_path)
    with torch.no_grad():
        acts = peer.encode(x)
        x_hat = peer.decode(acts)
    # SAELens' rescaled TopK gives lengths of contributions already.
    lengths = acts if case == "topk by contribution" else acts * NORMS
    assert sae.rule == rule
    assert (sae.hook_name, sae.model_name) == ("blocks.2.hook_resid_post", "gpt2")
    assert 0 < (acts != 0).double().mean() < 0.7
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    torch.testing.assert_close(sae.encode(x).to_dense(), lengths, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x), x_hat, atol=1e-5, rtol=1e-5)


def test_parts_in_memory_give_the_same_as_files(randomise: Any, x: torch.Tensor, tmp_path: Path) -> None:
    peer = peer_of(CASES["gated"][0], randomise)
    peer.save_model(tmp_path)
    sae = from_parts(peer.cfg.to_dict(), peer.state_dict(), "here", hook_name="blocks.0.hook_resid_pre")
    assert torch.equal(sae(x), load_foreign(tmp_path)(x))
    assert sae.hook_name == "blocks.0.hook_resid_pre"


def test_what_cannot_be_expressed_is_refused_by_name(randomise: Any) -> None:
    peer = peer_of(CASES["standard"][0], randomise)
    config, state = peer.cfg.to_dict(), peer.state_dict()
    with pytest.raises(InputError, match="here has normalize_activations = 'layer_norm', which is not supported"):
        from_parts({**config, "normalize_activations": "layer_norm"}, state, "here")
    with pytest.raises(InputError, match="here holds a 'temporal' SAE, which is not supported: supported are"):
        from_parts({**config, "architecture": "temporal"}, state, "here")
    with pytest.raises(InputError, match="here is a transcoder with apply_b_dec_to_input"):
        from_parts({**config, "architecture": "transcoder", "apply_b_dec_to_input": True}, state, "here")
    with pytest.raises(InputError, match="here lacks b_gate: it is not a SAELens gated SAE"):
        from_parts({**config, "architecture": "gated"}, state, "here")
    with pytest.raises(InputError, match=r"here: the decoder has shape \[64, 15\]"):
        from_parts(config, {**state, "W_dec": state["W_dec"][:, :15]}, "here")
