"""Texts in every script on a feature's page and in its search."""

import re
from pathlib import Path

import duckdb
import pytest
import torch

from sae import SAE, TopK
from workbench import Workspace
from workbench.features.index.build import build_index
from workbench.features.index.page import document
from workbench.features.index.query import FeatureIndex
from workbench.harvest.plan import HarvestConfig
from workbench.models.load import LoadedModel

HOOK = "blocks.1.hook_resid_post"
TEXT = "東京へ行く。Привет, мир 🙂 "


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory, gpt2_model: LoadedModel) -> Workspace:
    root = tmp_path_factory.mktemp("scripts")
    (root / "texts").mkdir()
    for number in range(30):
        (root / "texts" / f"{number}.txt").write_text(f"{number} {TEXT * 3}")
    space = Workspace(root / "w")
    config = HarvestConfig(gpt2_model.info.name, str(root / "texts"), (HOOK,), context_len=64, max_tokens=1500)
    space.harvest("h", config, model=gpt2_model)
    sae = SAE(gpt2_model.info.d_model, 16, TopK(4), hook_name=HOOK, model_name="tiny")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=generator))
        sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=generator))
    sae.save(space.path / "saes" / "s")
    build_index(space, "s", harvest="h", model=gpt2_model, device="cpu")
    return space


def test_examples_read_as_the_text_was_written(space: Workspace) -> None:
    index = FeatureIndex.open(space, "s")
    seen = 0
    for number in range(16):
        feature = index.feature(number)
        for group in feature.groups:
            for example in group.examples:
                # A window may begin and end within a character.
                text = "".join(example.tokens).strip("�")
                assert text in "".join(f"{at} {TEXT * 3}" for at in range(30)) or text in TEXT * 4
                assert "�" not in text
                assert len(example.tokens) == len(example.activations)
                seen += "東京" in text
        page = re.sub("<[^>]*>", "", document([feature]))
        assert "東京" in page or not any(group.examples for group in feature.groups)
    assert seen > 10
    index.close()


def test_search_finds_words_of_several_tokens_a_character(space: Workspace) -> None:
    index = FeatureIndex.open(space, "s")
    assert len(index.search("東京"))
    assert len(index.search("привет"))
    index.close()


def test_an_index_without_bytes_opens_and_shows_what_it_has(space: Workspace, tmp_path: Path) -> None:
    index = FeatureIndex.open(space, "s")
    old = tmp_path / "old.duckdb"
    old.write_bytes(index.path.read_bytes())
    with duckdb.connect(str(old)) as connection:
        connection.execute("DROP TABLE token_bytes")
    before = FeatureIndex(old, index._notes)
    number = next(n for n in range(16) if index.feature(n).groups)
    one, other = (each.feature(number).groups[0].examples[0] for each in (index, before))
    assert one.activations == other.activations
    assert "�" in "".join(other.tokens)
    index.close()
    before.close()
