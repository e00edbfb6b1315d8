"""What tests of pages share: opening a page in Streamlit's own test harness, and a small indexed workspace."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from streamlit.testing.v1 import AppTest

from sae import SAE, Rule
from workbench import HarvestConfig, Workspace, load_model
from workbench.features.index.build import build_index

MAIN = Path(__file__).resolve().parents[2] / "app" / "main.py"
HOOK = "blocks.2.hook_resid_post"
OpenPage = Callable[..., AppTest]


@pytest.fixture
def open_page(monkeypatch: pytest.MonkeyPatch) -> OpenPage:
    """`open_page("Compare", workspace, saes=["a", "b"])`: the page as a link with these parameters opens it, which
    raises nothing."""

    def opened(page: str, workspace: Workspace | Path, **query: str | list[str]) -> AppTest:
        path = workspace.path if isinstance(workspace, Workspace) else workspace
        monkeypatch.setattr(sys, "argv", ["main.py", str(path)])
        # Streamlit knows the pages of an app by its main script.
        app = AppTest.from_file(str(MAIN), default_timeout=120)
        app.run()
        for name, value in query.items():
            app.query_params[name] = value
        shown = app.switch_page(f"pages/{page}.py").run()
        assert not shown.exception
        return shown

    return opened


@pytest.fixture(scope="session")
def demo_sae() -> Callable[..., SAE]:
    """`demo_sae(TopK(6))`: an SAE of 48 random features on the demo model's residual stream, of norm 1 with `unit`."""

    def made(rule: Rule, *, unit: bool = False) -> SAE:
        sae = SAE(load_model("demo", device="cpu").info.d_model, 48, rule, hook_name=HOOK, model_name="demo")
        with torch.no_grad():
            sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(0)))
            if unit:
                sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
            sae.W_enc.copy_(sae.W_dec.T)
        return sae

    return made


@pytest.fixture(scope="session")
def indexed_workspace() -> Callable[..., Workspace]:
    """`indexed_workspace(folder, sae, documents=20, tokens=1200)`: a harvest `h` of short texts of Python with markup
    in them, and the SAE under the name `s`, indexed on it."""

    def made(folder: Path, sae: SAE, *, documents: int, tokens: int) -> Workspace:
        (folder / "texts").mkdir()
        for number in range(documents):
            text = f"def f{number}(x):\n    return '<script>x</script>'\n" * 3
            (folder / "texts" / f"{number}.txt").write_text(text)
        workspace, model = Workspace(folder / "w"), load_model("demo", device="cpu")
        config = HarvestConfig("demo", str(folder / "texts"), (HOOK,), context_len=32, max_tokens=tokens)
        workspace.harvest("h", config, model=model)
        sae.save(workspace.sae_folder("s"))
        build_index(workspace, "s", harvest="h", model=model, device="cpu")
        return workspace

    return made
