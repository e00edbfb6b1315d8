"""An SAE in the shape that evaluations of custom SAEs ask for."""

import json
from dataclasses import asdict

import pytest
import torch

from sae import SAE, AbsTopK, DenseSAE, Rule, TopK, Transcoder
from sae.errors import InputError

HOOK = "blocks.3.hook_resid_post"


def made(rule: Rule) -> SAE:
    sae = SAE(8, 24, rule, hook_name=HOOK, model_name="gpt2")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae


@pytest.mark.parametrize("rule", [TopK(3), AbsTopK(3)], ids=["topk", "abstopk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_full_tensors_in_the_precision_of_what_is_read(rule: Rule, dtype: torch.dtype) -> None:
    sae = made(rule)
    dense = DenseSAE(sae)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    code = dense.encode(x)
    assert code.shape == (2, 5, 24)
    assert code.dtype == dtype
    assert torch.equal(code, sae.encode(x).to_dense().to(dtype))
    assert (code != 0).sum(-1).max() == 3
    assert torch.equal(dense(x), sae(x))
    # In half precision three activations of up to 10 are each rounded by a part of 2^-9, and so is their sum.
    rounding = 1e-5 if dtype == torch.float32 else 4 * 10 * 2**-9
    assert torch.allclose(dense.decode(code), dense(x), atol=rounding)
    # An evaluation that takes a feature out writes into the full tensor.
    code[..., 7] = 0
    assert torch.allclose(dense.decode(code).float(), code.float() @ sae.W_dec + sae.b_dec, atol=rounding)


def test_it_says_what_it_is_and_shares_its_weights() -> None:
    sae = made(TopK(3))
    dense = DenseSAE(sae)
    said = json.loads(json.dumps(asdict(dense.cfg)))
    assert (said["model_name"], said["hook_name"], said["hook_layer"]) == ("gpt2", HOOK, 3)
    assert (said["d_in"], said["d_sae"], said["architecture"], said["dtype"]) == (8, 24, "topk", "float32")
    assert dense.W_dec is sae.W_dec
    assert torch.allclose(dense.W_dec.norm(dim=1), torch.ones(24))
    moved = dense.to(dtype=torch.bfloat16, device="cpu")
    assert moved is dense
    assert dense.dtype == dense.b_enc.dtype == dense.b_dec.dtype == dense.W_enc.dtype == torch.bfloat16
    assert dense.device.type == "cpu"


def test_an_sae_says_what_it_is_by_the_names_that_saelens_has_and_as_a_table() -> None:
    sae = made(TopK(3)).to(torch.bfloat16)
    assert (sae.device.type, sae.dtype) == ("cpu", torch.bfloat16)
    assert sae.cfg == DenseSAE(sae).cfg
    assert (sae.cfg.d_sae, sae.cfg.dtype, sae.cfg.device, sae.cfg.apply_b_dec_to_input) == (24, "bfloat16", "cpu", True)
    sae.model_name = "<b>gpt2"
    page = sae._repr_html_()
    for said in ("SAE", HOOK, "&lt;b&gt;gpt2", "24", "416, bfloat16", "TopK(k=3"):
        assert said in page
    assert "writes" not in page
    coder = Transcoder(8, 8, 24, TopK(3), hook_name="embed", target_hook_name="blocks.1.hook_mlp_out")
    assert coder.cfg.hook_layer is None
    assert not coder.cfg.apply_b_dec_to_input
    assert "<th>writes</th><td>blocks.1.hook_mlp_out</td>" in coder._repr_html_()


def test_what_is_no_sae_of_a_layer_is_refused() -> None:
    coder = Transcoder(8, 8, 24, TopK(3), hook_name="blocks.1.mlp.hook_in", target_hook_name="blocks.1.hook_mlp_out")
    with pytest.raises(InputError, match="this is for SAEs alone"):
        DenseSAE(coder)
    with pytest.raises(InputError, match="no layer in its name"):
        DenseSAE(SAE(8, 24, TopK(3), hook_name="mlp"))
