"""The Prompt and Steering pages in their states, run by Streamlit's own test harness."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from streamlit.testing.v1 import AppTest

from app.live import EXAMPLES
from sae import SAE, TopK, Transcoder, TranscoderSet
from sae.errors import InputError
from sae.rules import AbsTopK
from workbench import Workspace
from workbench.catalog.notes import Notes
from workbench.catalog.origin import Origin
from workbench.features.prompt_page import FEATURES
from workbench.models.load import load_model

OpenPage = Callable[..., AppTest]
HOOK, TEXT = "blocks.2.hook_resid_post", "def f1(x):\n    return '<script>x</script>' # 😀 e\u0301\n"
LIVE = pytest.mark.parametrize("page", ["Prompt", "Steering"])


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
    demo_sae: Callable[..., SAE],
    indexed_workspace: Callable[..., Workspace],
) -> Path:
    """A workspace with an SAE of signed features, once indexed (`s`) and once not (`bare`)."""
    sae = demo_sae(AbsTopK(6), unit=True)
    workspace = indexed_workspace(tmp_path_factory.mktemp("live"), sae, documents=10, tokens=500)
    sae.save(workspace.sae_folder("bare"))
    return workspace.path


@pytest.fixture
def space(made: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(made, tmp_path / "w")
    return Workspace(tmp_path / "w")


def asked(page: AppTest, name: str) -> str:
    """A parameter of the URL, which the harness gives as a text or as a list of one."""
    value = page.query_params[name]
    return value[0] if isinstance(value, list) else value


def grid_rows(page: AppTest) -> list[str]:
    """The rows of the first grid of a page."""
    grid = next(part.proto.json for part in page.get("bidi_component") if 'class=\\"grid' in part.proto.json)
    return re.findall(r'data-row=\\"([^"]*)\\"', grid)


def html(page: AppTest) -> str:
    return "".join(element.proto.body for element in page.get("html"))


@LIVE
def test_without_an_sae_the_page_says_what_to_do(page: str, tmp_path: Path, open_page: OpenPage) -> None:
    shown = open_page(page, Workspace(tmp_path / "empty"))
    assert not shown.exception
    assert "Train one with `workbench train --model demo --hook " in shown.info[0].value


@LIVE
def test_without_a_prompt_the_page_asks_for_one(page: str, space: Workspace, open_page: OpenPage) -> None:
    shown = open_page(page, space)
    assert not shown.exception
    assert "Type a prompt" in shown.info[0].value
    assert not shown.get("plotly_chart")


@LIVE
def test_an_sae_whose_model_is_missing_says_so_in_one_line(page: str, space: Workspace, open_page: OpenPage) -> None:
    SAE(8, 16, AbsTopK(2), hook_name=HOOK, model_name="/no/model").save(space.path / "saes" / "lost")
    shown = open_page(page, space, sae="lost", prompt=TEXT)
    assert not shown.exception
    assert len(shown.error) == 1
    assert "no model folder at /no/model" in shown.error[0].value.replace("\\", "")


@LIVE
def test_a_link_to_what_is_not_there_says_so(page: str, space: Workspace, open_page: OpenPage) -> None:
    shown = open_page(page, space, sae="gone", feature="48", prompt="x")
    assert not shown.exception
    said = " ".join(warning.value for warning in shown.warning).replace("\\", "")
    assert "SAE 'gone'" in said
    assert "0 to 47" in said


def test_a_prompt_from_a_link_shows_its_features(space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Prompt", space, sae="s", prompt=TEXT)
    assert not page.exception
    reading = space.prompt("s", TEXT, model=load_model("demo", device="cpu"))
    table = page.dataframe[0].value
    assert [int(link.split("=")[-1]) for link in table["feature"]] == reading.features()["feature"].tolist()
    assert (table["activation"] < 0).any()
    assert (table["activation"] > 0).any()
    assert np.array_equal(table["attribution"], reading.features()["attribution"])
    assert len(page.get("plotly_chart")) == 1
    assert grid_rows(page) == [str(number) for number in reading.features()["feature"][:FEATURES]]
    for by in ("mean", "rare"):
        page.segmented_control(key="rank_by").set_value(by).run()
        assert not page.exception
        links = page.dataframe[0].value["feature"]
        assert [int(link.split("=")[-1]) for link in links] == reading.features(by)["feature"].tolist()
        assert grid_rows(page) == [str(number) for number in reading.features(by)["feature"][:FEATURES]]


def test_a_token_shows_its_features_and_what_they_do_to_the_next(space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Prompt", space, sae="s", prompt=TEXT, token="4")
    assert not page.exception
    reading = space.prompt("s", TEXT, model=load_model("demo", device="cpu"))
    table, expected = page.dataframe[0].value, reading.at(4)
    assert np.array_equal(table["attribution"], expected["attribution"])
    page.text_input(key="target").set_value("return").run()
    wanted = reading.at(4, target=reading.target("return"))["attribution"]
    assert np.array_equal(page.dataframe[0].value["attribution"], wanted)
    page.checkbox(key="by_attribution").check().run()
    assert np.array_equal(np.sort(wanted.abs())[::-1], page.dataframe[0].value["attribution"].abs())
    page.text_input(key="target").set_value("two words of it").run()
    assert "tokens" in page.warning[0].value
    page.number_input(key="token").set_value(None).run()
    assert "token" not in page.query_params
    assert "score" not in page.dataframe[0].value


def test_a_selected_row_colours_the_prompt_by_its_feature(space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Prompt", space, sae="s", prompt=TEXT)
    first = int(page.dataframe[0].value["feature"].iloc[0].split("=")[-1])
    page.number_input(key="feature").set_value(first).run()
    assert not page.exception
    assert asked(page, "feature") == str(first)
    assert len(page.get("plotly_chart")) == 1
    component = page.get("bidi_component")[0].proto
    assert f"feature {first}" in component.json
    # As data, which the component sets as text; nothing is escaped twice.
    assert '"text": "script"' in component.json
    assert "&lt;" not in component.json


def test_all_saes_of_a_model_read_one_prompt(space: Workspace, open_page: OpenPage) -> None:
    assert "all_saes" not in [one.key for one in open_page("Prompt", space, sae="s", prompt=TEXT).toggle]
    shutil.copytree(space.sae_folder("s"), space.sae_folder("t"))
    space.build_index("t", harvest="h", model=load_model("demo", device="cpu"))
    page = open_page("Prompt", space, sae="s", prompt=TEXT)
    page.toggle(key="all_saes").set_value(True).run()
    assert not page.exception
    assert grid_rows(page) == ["s", "t"]


def test_an_example_becomes_the_prompt(space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Prompt", space, sae="s")
    page.button(key="example names").click().run()
    assert not page.exception
    assert page.text_area(key="prompt").value == EXAMPLES["names"]
    assert page.dataframe


@pytest.mark.parametrize(("query", "message"), [({"token": "999"}, "token '999'"), ({"feature": "x"}, "feature 'x'")])
def test_a_token_or_feature_that_does_not_exist_is_dropped(
    query: dict[str, str], message: str, space: Workspace, open_page: OpenPage
) -> None:
    page = open_page("Prompt", space, sae="s", prompt=TEXT, **query)
    assert not page.exception
    assert message in page.warning[0].value.replace("\\", "")
    assert not set(query) & set(page.query_params)


def test_a_long_prompt_is_cut_with_a_notice(space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Prompt", space, sae="s", prompt="x = 1\n" * 4000)
    assert not page.exception
    assert "Only the beginning was read" in page.info[0].value


def test_without_an_index_the_prompt_is_read_all_the_same(space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Prompt", space, sae="bare", prompt=TEXT)
    assert not page.exception
    assert list(page.segmented_control(key="rank_by").options) == ["max", "mean"]
    assert "density" not in page.dataframe[0].value
    assert any(f"`workbench index bare --workspace {space.path}`" in caption.value for caption in page.caption)


def test_steering_from_a_link_shows_both_texts_and_side_effects(space: Workspace, open_page: OpenPage) -> None:
    settings = {"sae": "s", "feature": "7", "prompt": TEXT, "strength": "4.0", "n": "6", "kind": "add"}
    page = open_page("Steering", space, **settings)
    assert not page.exception
    found = space.steer("s", 7, TEXT, strength=4.0, new_tokens=6, model=load_model("demo", device="cpu"))
    assert page.metric[0].value == f"{found.mean_kl:.4f}"
    assert found.mean_kl > 0
    assert len(page.get("plotly_chart")) == 2
    assert "<script" not in html(page)
    assert "&lt;script" in html(page)
    page.slider(key="strength").set_value(0.0).run()
    assert page.metric[0].value == "0.0000"
    assert any("Both texts are the same" in caption.value for caption in page.caption)
    page.radio(key="kind").set_value("ablate").run()
    page.radio(key="where").set_value("generated").run()
    page.checkbox(key="error").uncheck().run()
    assert not page.exception
    assert page.metric[0].value != "0.0000"


def test_several_features_and_a_sweep(space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Steering", space, sae="s", feature="7", prompt=TEXT, n="6", also="3=-2, 5, x")
    assert "'x' is no feature" in page.warning[0].value.replace("\\", "")
    model = load_model("demo", device="cpu")
    found = space.steer("s", {7: 1.0, 3: -2.0, 5: 1.0}, TEXT, new_tokens=6, model=model)
    assert page.metric[0].value == f"{found.mean_kl:.4f}"
    assert len(page.get("page_link")) == 3
    page.toggle(key="sweep").set_value(True).run()
    assert not page.exception
    assert len(page.get("plotly_chart")) == 3
    page.text_input(key="also").set_value("7=2").run()
    assert "given twice" in page.error[0].value


def test_the_label_of_the_steered_feature_is_shown_as_text(space: Workspace, open_page: OpenPage) -> None:
    Notes(space.path).set_label("s", 7, "*strings*")
    page = open_page("Steering", space, sae="s", feature="7")
    assert any("\\*strings\\*" in link.proto.label for link in page.get("page_link"))
    bare = open_page("Steering", space, sae="bare", feature="7")
    assert any("activation units" in caption.value for caption in bare.caption)


def test_an_sae_is_chosen_by_model_and_hook_point(space: Workspace, open_page: OpenPage) -> None:
    other = "blocks.1.hook_resid_post"
    for name, hook, model in (("below", other, "demo"), ("lost", HOOK, "/no/model")):
        SAE(256, 16, AbsTopK(2), hook_name=hook, model_name=model).save(space.path / "saes" / name)
    page = open_page("Prompt", space, sae="s", prompt=TEXT)
    assert page.selectbox(key="model of sae").options == ["/no/model", "demo"]
    assert page.selectbox(key="hook of sae").options == [other, HOOK]
    assert page.selectbox(key="sae").options == ["bare", "s"]
    page.selectbox(key="hook of sae").set_value(other).run()
    assert not page.exception
    assert page.query_params["sae"] == "below"
    assert page.selectbox(key="sae").options == ["below"]
    page.selectbox(key="model of sae").set_value("/no/model").run()
    assert page.query_params["sae"] == "lost"
    # Its only hook point is no choice.
    assert [box.key for box in page.selectbox] == ["model of sae", "sae"]


@LIVE
def test_a_layer_of_a_set_of_transcoders_is_chosen(page: str, space: Workspace, open_page: OpenPage) -> None:
    coders = {}
    for layer in range(3):
        coder = Transcoder(
            256, 256, 16, TopK(4), skip=True, hook_name=f"blocks.{layer}.mlp.hook_in",
            target_hook_name=f"blocks.{layer}.hook_mlp_out", model_name="demo",
        )  # fmt: skip
        for parameter in coder.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(layer))
        coders[layer] = coder.requires_grad_(False)
    space.add_transcoders("mlps", TranscoderSet(coders), [{}] * 3)
    shown = open_page(page, space, sae="mlps.layer_1", prompt=TEXT)
    assert not shown.error
    assert shown.selectbox(key="sae").value == "mlps"
    assert shown.selectbox(key="hook of sae").options == [HOOK, "blocks.*.mlp.hook_in"]
    box = shown.selectbox(key="layer of sae")
    assert (box.value, box.options) == ("1", ["0", "1", "2"])
    charts = len(shown.get("plotly_chart"))
    box.set_value("2").run()
    assert not shown.exception
    assert asked(shown, "sae") == "mlps.layer_2"
    assert len(shown.get("plotly_chart")) == charts > 0


def test_what_the_model_would_say_after_each_block(space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Prompt", space, sae="s", prompt="def f(x)", lens_shown="true")
    assert not page.exception
    assert page.selectbox(key="lens").options == ["logit lens"]
    grids = [part.proto.json for part in page.get("bidi_component") if "after block 3" in part.proto.json]
    assert len(grids) == 1
    assert "before the blocks" in grids[0]


def test_models_of_one_name_are_told_apart_by_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from app.shared import loaded_model
    from workbench.models.bundled import demo_model_dir

    def saved(seed: int) -> str:
        torch.manual_seed(seed)
        shape = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2)
        GPT2LMHeadModel(shape).save_pretrained(tmp_path / "m")
        return load_model(str(tmp_path / "m"), device="cpu").info.weights_sha256

    monkeypatch.setattr("sys.argv", ["main.py", str(tmp_path)])
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    tokenizer.save_pretrained(tmp_path / "m")
    path = str(tmp_path / "m")
    first = Origin({}, path, saved(1))
    held = loaded_model(path)
    assert loaded_model(first) is held
    second = Origin({}, path, saved(2))
    assert loaded_model(second).info.weights_sha256 == second.weights_sha256 != first.weights_sha256
    assert loaded_model(path) is loaded_model(second)
    with pytest.raises(InputError, match="has other weights than the one behind what is shown here"):
        loaded_model(first)
