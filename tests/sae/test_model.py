"""The SAE module."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae import SAE, DenseSAE, InputError, TopK
from sae.rules import AbsTopK, BatchTopK, GradientTopK, JumpReLU, Rule

TOPK = TopK(5)


def random_sae(d_in: int = 12, d_sae: int = 64, rule: Rule = TOPK, **options: Any) -> SAE:
    sae = SAE(d_in, d_sae, rule, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


def test_forward_is_the_formula() -> None:
    sae = random_sae()
    x = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1))
    z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    kept = z.topk(5, dim=-1)
    a = torch.zeros_like(z).scatter(-1, kept.indices, kept.values.relu())
    torch.testing.assert_close(sae(x), a @ sae.W_dec + sae.b_dec, rtol=1e-4, atol=1e-4)
    assert sae.encode(x).n_tokens == 21
    assert not sae(x).requires_grad


@pytest.mark.parametrize("rule", [TOPK, JumpReLU()])
@pytest.mark.parametrize("batch", [(), (4,), (3, 7), (2, 3, 2)])
def test_codes_and_full_matrices_keep_the_leading_dimensions(batch: tuple[int, ...], rule: Rule) -> None:
    sae = random_sae(rule=rule)
    x = torch.randn(*batch, 12, generator=torch.Generator().manual_seed(1))
    code = sae.encode(x)
    assert code.to_dense().shape == (*batch, 64)
    torch.testing.assert_close(sae.decode(code), sae(x))
    torch.testing.assert_close(sae.decode(code.to_dense()), sae(x), rtol=1e-4, atol=1e-4)
    flat = sae.encode(x.reshape(-1, 12))
    assert torch.equal(code.to_dense().view(-1, 64), flat.to_dense())
    with pytest.raises(InputError, match="64 features, got a code of 63"):
        sae.decode(torch.zeros(2, 63))


def test_reconstruction_keeps_the_precision_of_its_input() -> None:
    sae = random_sae()
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    assert sae(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(sae(x.double()), sae(x).double(), rtol=1e-6, atol=1e-6)


def test_a_bf16_sae_works_on_the_cpu() -> None:
    sae = random_sae()
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    exact = sae(x)
    rounded = sae.to(torch.bfloat16)(x)
    assert rounded.dtype == x.dtype
    assert (exact - rounded).norm() < 0.1 * exact.norm()


def test_no_tokens_give_no_tokens() -> None:
    assert random_sae()(torch.zeros(0, 12)).shape == (0, 12)


def test_a_wrong_width_names_the_hook_point() -> None:
    sae = random_sae(hook_name="blocks.1.hook_resid_post")
    with pytest.raises(InputError, match=r"width 12, got 13.*blocks\.1\.hook_resid_post"):
        sae(torch.zeros(2, 13))


@pytest.mark.parametrize("sae", [random_sae(), DenseSAE(random_sae(hook_name="blocks.1.hook_resid_post"))])
def test_what_is_no_tensor_is_refused_in_one_line(sae: SAE | DenseSAE) -> None:
    given = {"numpy.ndarray": np.zeros((2, 12), np.float32), "list": [[0.0] * 12], "single number": torch.tensor(1.0)}
    for said, x in given.items():
        for use in (sae.encode, sae.forward):
            with pytest.raises(
                InputError, match=rf"expected activations, a tensor of shape \[\.\.\., 12\], got a {said}"
            ):
                use(x)
        with pytest.raises(InputError, match=rf"expected a SparseCode, or a tensor of shape \[.*64\], got a {said}"):
            sae.decode(x)


def test_what_it_was_trained_on_is_said_where_it_is_known() -> None:
    assert (random_sae().cfg.prepend_bos, random_sae().cfg.context_size) == (True, None)
    told = random_sae(metadata={"prepend_bos": False, "context_size": 128, "dataset_path": "owner/text"}).cfg
    assert (told.prepend_bos, told.context_size, told.dataset_path) == (False, 128, "owner/text")


def test_sizes_must_fit() -> None:
    with pytest.raises(InputError, match="at least one input and one feature"):
        SAE(0, 4, TopK(1))
    with pytest.raises(InputError, match="k = 9 must lie between 1 and the number of features, 8"):
        SAE(4, 8, TopK(9))


def test_the_fingerprint_is_of_rule_and_weights_alone(tmp_path: Path) -> None:
    """Not of the layout in memory, the precision they are stored in, names, or a detour over the disk."""
    for rule in (TopK(5), GradientTopK(5), BatchTopK(5)):
        sae = random_sae(rule=rule)
        sae.save(tmp_path / rule.name)
        expected = sae.fingerprint()
        assert SAE.load(tmp_path / rule.name).fingerprint() == expected
        assert random_sae(rule=rule, hook_name="h", model_name="m", metadata={"a": 1}).fingerprint() == expected
        assert random_sae(rule=rule).double().fingerprint() == expected
        sae.W_enc.data = sae.W_enc.data.contiguous()
        assert sae.fingerprint() == expected


def test_the_fingerprint_changes_with_every_weight_and_with_the_rule() -> None:
    seen = {random_sae(rule=rule).fingerprint() for rule in (TopK(5), TopK(6), AbsTopK(5), BatchTopK(5), JumpReLU())}
    for name in random_sae(rule=BatchTopK(5)).state_dict():
        sae = random_sae(rule=BatchTopK(5))
        last = sae.state_dict()[name][..., -1:]
        last.copy_(torch.nextafter(last, last + 1))
        seen.add(sae.fingerprint())
    assert len(seen) == 5 + 5


@pytest.mark.gpu
def test_the_fingerprint_is_the_same_on_a_gpu() -> None:
    sae = random_sae()
    expected = sae.fingerprint()
    assert sae.to("cuda").fingerprint() == expected
