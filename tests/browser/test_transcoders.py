"""A transcoder's feature in a real browser: what it reads and writes, another layer of its set, steering with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae import TopK, Transcoder, TranscoderSet
from workbench import HarvestConfig, Workspace, load_model

SLOW = 90_000
WIDTH, LAYERS, INDEXED = 256, 3, (1, 2)


@pytest.fixture
def address(serve: Callable[[Path], str], tmp_path: Path) -> str:
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 3)
    space, model = Workspace(tmp_path / "w"), load_model("demo", device="cpu")
    config = HarvestConfig("demo", str(tmp_path / "texts"), ("blocks.*.mlp.hook_in",), context_len=32, max_tokens=320)
    space.harvest("h", config, model=model)
    coders = {}
    for layer in range(LAYERS):
        coder = Transcoder(
            WIDTH, WIDTH, 40, TopK(6), skip=True, hook_name=f"blocks.{layer}.mlp.hook_in",
            target_hook_name=f"blocks.{layer}.hook_mlp_out", model_name="demo",
        )  # fmt: skip
        for parameter in coder.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(layer))
        coders[layer] = coder.requires_grad_(False)
    space.add_transcoders("mlps", TranscoderSet(coders), [{}] * LAYERS)
    for layer in INDEXED:
        space.build_index(f"mlps.layer_{layer}", harvest="h", model=model, device="cpu")
    return serve(space.path)


def test_a_feature_says_what_it_reads_and_writes_and_its_layer_is_chosen(address: str, browser: Any) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(SLOW)
    page.goto(f"{address}/Feature?sae=mlps.layer_1&feature=2")
    page.get_by_text("blocks.1.mlp.hook_in → blocks.1.hook_mlp_out").first.wait_for()
    page.get_by_role("heading", name="Promotes").wait_for()
    page.get_by_role("combobox", name="Layer").click()
    page.get_by_role("option", name="2", exact=True).click()
    page.get_by_text("blocks.2.mlp.hook_in → blocks.2.hook_mlp_out").first.wait_for()
    assert "sae=mlps.layer_2" in page.url
    page.get_by_placeholder("Test on my text").fill("def g(x): return x")
    page.get_by_placeholder("Test on my text").press("Enter")
    page.get_by_text("your text").first.wait_for()
    page.goto(f"{address}/Prompt?sae=mlps.layer_1&prompt=def%20g(x)&all_saes=true")
    page.get_by_text("mlps.layer_2 · blocks.2.mlp.hook_in").first.wait_for()
    page.goto(f"{address}/Steering?sae=mlps.layer_2&feature=2&prompt=def%20g(x)%3A&n=4&strength=8")
    page.get_by_text("under the unedited model").first.wait_for()
    assert not page.locator("[data-testid=stException]").count()
    context.close()
