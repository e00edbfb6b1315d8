"""An attention-output SAE trained on a real harvest, and its features taken apart, end to end."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks.planted_heads import LENGTH, N_CODES, codes, jobs, save_planted, texts
from circuits.dfa import head_shares
from circuits.passes import activations
from sae.config import TrainConfig
from sae.errors import InputError
from sae.model import SAE
from sae.rules import TopK
from workbench.catalog.notes import Notes
from workbench.circuits.attention_saes import report_dfa
from workbench.circuits.head_features import family, of_head, polysemantic_share, reach_of
from workbench.circuits.relations import RELATIONS, TOLD
from workbench.cli.main import run
from workbench.features.index.feature import Concept
from workbench.features.index.query import FeatureIndex
from workbench.harvest.plan import HarvestConfig
from workbench.models.load import LoadedModel, load_model
from workbench.workspace import Workspace

ATTENTION, RESIDUAL, LOWER = "blocks.2.attn.hook_z", "blocks.2.hook_resid_pre", "blocks.1.hook_resid_pre"
TEXT = "def area(width, height):\n    return width * height\n\ndef area(width, height):\n    return width"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, demo: LoadedModel) -> Workspace:
    """SAEs on the heads of layer 2, side by side, and on the residual stream before it and before layer 1."""
    space = Workspace(tmp_path_factory.mktemp("attention") / "w")
    hooks = (ATTENTION, RESIDUAL, LOWER)
    config = HarvestConfig("demo", "python-stdlib", hooks, context_len=64, max_tokens=6000)
    space.harvest("h", config, model=demo)
    for name, hook in zip(("attention", "residual", "lower"), hooks, strict=True):
        one = TrainConfig(name=name, rule=TopK(16), d_sae=256, total_tokens=30_000, batch_size=512)
        space.train(name, "h", [one], hook=hook, device="cpu")
    return space


def test_it_reads_all_heads_side_by_side_and_reconstructs_them(trained: Workspace, demo: LoadedModel) -> None:
    sae = trained.sae("attention")
    assert sae.W_enc.shape[0] == demo.info.n_heads * demo.info.d_head
    tokens = torch.tensor([[demo.bos_id, *demo.tokenizer.encode(TEXT)]])
    z = activations(demo.bridge, tokens, [ATTENTION])[ATTENTION][0].flatten(1)[1:]
    error = (z - sae.decode(sae.encode(z))).square().sum() / (z - z.mean(dim=0)).square().sum()
    # Trained for a second on 6,000 tokens: it has learnt, not converged.
    assert float(error) < 0.6
    shares = head_shares(sae.W_dec, demo.info.n_heads)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(sae.d_sae, dtype=torch.float64))


def test_the_index_and_the_attribution_show_the_same_shares_of_heads(trained: Workspace, demo: LoadedModel) -> None:
    trained.build_index("attention", device="cpu")
    on_page = FeatureIndex.open(trained, "attention").feature(7).heads
    result = report_dfa(trained, "shares", demo, ("attention", trained.sae("attention")), TEXT, feature=7)
    assert len(on_page) == demo.info.n_heads
    assert result.table("heads").decoder_share.tolist() == pytest.approx(on_page, rel=1e-6)


def test_heads_are_told_by_their_features(trained: Workspace, demo: LoadedModel) -> None:
    trained.build_index("attention", device="cpu")
    result = trained.head_features("attention", demo, n=4, texts=2)
    features, heads = result.table("features"), result.table("heads")
    sae = trained.sae("attention")
    shares = head_shares(sae.W_dec, demo.info.n_heads)
    index = FeatureIndex.open(trained, "attention")
    fires = torch.tensor(index.table().sort_values("feature")["firings"].tolist()) > 0
    for head in range(demo.info.n_heads):
        own = features[features.node == f"a2.h{head}"]
        expected = torch.where(fires, shares[:, head], -1).topk(4).indices.tolist()
        assert own.feature.tolist() == expected
    assert heads[["induction", "short", "long"]].sum(axis=1).tolist() == [4] * demo.info.n_heads
    told = features.told_by.str.split(", ")
    assert (heads.told.to_numpy() == (features.told_by != "").groupby(features.node).sum().to_numpy()).all()
    assert (heads.meanings <= heads.told).all()
    assert told.explode().isin(["", *RELATIONS]).all()
    # The context ends at the peak: the feature has its strongest activation there.
    feature = int(features.feature[0])
    for tokens in index.strongest_contexts(feature, 2):
        z = activations(demo.bridge, tokens[None], [ATTENTION])[ATTENTION][0].flatten(1)
        values = sae.encode(z).to_dense()[1:, feature]
        assert int(values.argmax()) == len(tokens) - 2
    first, second = (int(feature) for feature in features.feature[:2])
    scores = (0.9, 0.7, 0.6, 2.0, 0.8, 40, 30)
    aligned = {first: [Concept("self", 1, 0.8, *scores)], second: [Concept("string", 1, 0.4, *scores)]}
    known = FeatureIndex(index.path, Notes(trained.path), aligned)
    table = of_head(known, 0, 2)
    assert table.concept.dropna().tolist() == ["self"]
    assert table.f1[0] == 0.8
    with pytest.raises(InputError, match="not 0 and 8"):
        trained.head_features("attention", demo, n=0)


def test_how_far_a_feature_looks_back_is_weighted_by_what_sources_bring() -> None:
    tokens = torch.tensor([0, 5, 7, 9, 5])
    # Half from the token after the earlier 5, half from the query's own; BOS and what works against it do not count.
    distance, induction = reach_of(torch.tensor([9.0, -3.0, 2.0, 0.0, 2.0]), tokens)
    assert (distance, induction) == (1.0, 0.5)
    assert family(1.0, 0.5) == "short"
    assert family(1.0, 0.51) == "induction"
    assert family(8.1, 0.0) == "long"
    assert family(*reach_of(torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0]), tokens)) == ""
    # Without BOS the first token is a source as any other, and what follows it follows it.
    assert reach_of(torch.tensor([1.0, 3.0, 0.0, 0.0]), torch.tensor([5, 7, 9, 5]), n_bos=0) == (2.25, 0.75)


def test_a_planted_head_has_one_meaning_and_one_family(tmp_path: Path) -> None:
    """Features set by hand to the codes that the two planted heads hand on; no other head has any."""
    folder, text = save_planted(tmp_path / "model", sharpness=3.0), tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps(document) + "\n" for document in texts(120)))
    model, space = load_model(str(folder), device="cpu"), Workspace(tmp_path / "w")
    heads = {0: (3, "after", "short"), 2: (5, "led_to", "induction")}
    hooks = tuple(f"blocks.{layer}.attn.hook_z" for layer in heads)
    config = HarvestConfig(str(folder), str(text), hooks, context_len=2 * LENGTH + 1, max_tokens=3000)
    space.harvest("h", config, model=model)
    tokens = space.sql("SELECT row, context, token FROM tokens WHERE flags = 0 ORDER BY row")
    known = jobs(pd.DataFrame(tokens.rows, columns=tokens.columns))
    known = known[known["concept"].str.contains("_[3-6]$")]
    for (layer, (head, job, kind)), hook in zip(heads.items(), hooks, strict=True):
        sae, name = SAE(256, N_CODES, TopK(1), hook_name=hook), f"layer-{layer}"
        with torch.no_grad():
            sae.W_dec.zero_()[:, 16 * head : 16 * head + 16] = codes() / 4
            sae.W_enc.copy_(sae.W_dec.T)
        space.add_sae(name, sae, {})
        space.build_index(name, harvest="h", model=model, device="cpu")
        space.concepts(name, harvest="h", table=known)
        result = space.head_features(name, model, n=7, texts=1)
        table, features = result.table("heads").set_index("node"), result.table("features")
        node = f"a{layer}.h{head}"
        assert set(features["node"]) == {node}
        # What the head hands on, seen without being told what: all its features say it, each of its own token.
        relation = {"after": "previous", "led_to": "followed an earlier copy"}[job]
        assert set(features["relation"]) == {relation}
        assert features["tokens"].tolist() == [f'" {feature}"' for feature in features["feature"]]
        assert (features["relation_f1"] > TOLD).all()
        # Before anything is repeated the induction head looks anywhere, so not every feature of it is told so well.
        concepts = features["concept"].dropna()
        assert len(concepts) >= 3
        assert (concepts == [f"{job}_{feature}" for feature in features.loc[concepts.index, "feature"]]).all()
        assert table.loc[node, ["features", "told", "meanings"]].tolist() == [7, 7, 1]
        assert set(features["family"]) - {""} == {kind}
        assert (table.drop(node)["features"] == 0).all()
        assert polysemantic_share(table) == 0.0


def test_polysemantic_heads_have_more_than_one_meaning() -> None:
    # One feature that is told can say one thing alone.
    heads = pd.DataFrame({"told": [0, 1, 2, 2, 5], "meanings": [0, 1, 1, 2, 3]})
    assert polysemantic_share(heads) == pytest.approx(2 / 3)


def test_a_features_activation_is_the_sum_of_its_parts_at_every_level(trained: Workspace, demo: LoadedModel) -> None:
    sae = trained.sae("attention")
    residuals = {name: trained.sae(name) for name in ("residual", "lower")}
    result = report_dfa(trained, "d", demo, ("attention", sae), TEXT, residuals=residuals)
    row = result.table("summary").iloc[0]
    tokens = torch.tensor([[demo.bos_id, *demo.tokenizer.encode(TEXT)]])
    z = activations(demo.bridge, tokens, [ATTENTION])[ATTENTION][0, -1].flatten().double()
    feature = int(row.feature)
    W_enc, b_enc, b_dec = (tensor.detach().double() for tensor in (sae.W_enc, sae.b_enc, sae.b_dec))
    expected = float((z - b_dec) @ W_enc[:, feature] + b_enc[feature])
    assert expected > 0
    assert row.pre_activation == pytest.approx(expected, abs=1e-3)
    parts = result.table("by_head").value.sum() + row.constant
    assert parts == pytest.approx(expected, abs=1e-3)
    assert result.table("heads").dfa.sum() + row.constant == pytest.approx(expected, abs=1e-3)
    steps = result.table("steps")
    # Attention feature, residual feature, what one head carried, and the residual feature below it.
    assert steps.target.nunique() >= 4
    assert steps[steps.step == 0].value.sum() == pytest.approx(expected, abs=2e-3)
    target = str(steps[steps.step == 1].target.iloc[0])
    number, position = (int(part) for part in target.removeprefix("r2/f").split("@"))
    x = activations(demo.bridge, tokens, [RESIDUAL])[RESIDUAL][0, position].double()
    residual = residuals["residual"]
    below = (x - residual.b_dec.double()) @ residual.W_enc[:, number].double() + residual.b_enc[number].double()
    assert steps[steps.step == 1].value.sum() == pytest.approx(float(below.detach()), abs=2e-3)


def test_the_command_stores_it_and_mistakes_are_one_line(
    trained: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--workspace", str(trained.path), "--device", "cpu"]
    assert run(["circuits", "dfa", "attention", "--text", "x = y\nx =", "--residual", "residual", *common]) == 0
    assert "pre_activation" in capsys.readouterr().out
    assert trained.results.open("circuit-dfa", "dfa-attention").table("tokens").token[0] == "BOS"
    for arguments, message in (
        (["residual", "--text", "x"], "DFA needs one on attn.hook_z"),
        (["attention", "--text", ""], "should have 1 to"),
        (["attention", "--text", "x", "--feature", "9999"], "features 0 to 255"),
        (["attention", "--text", "x", "--position", "40"], "position 40 does not exist"),
    ):
        assert run(["circuits", "dfa", *arguments, *common]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert message in lines[-1]


def test_features_of_trained_saes_make_a_circuit(trained: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "circuits", "discover", "induction", "--method", "features", "--sae", "attention", "--sae", "lower",
        "-n", "4", "--keep", "0.3", "--workspace", str(trained.path), "--device", "cpu",
    ]  # fmt: skip
    assert run(arguments) == 0
    row = trained.results.open("circuit-features", "induction-features").table("summary").iloc[0]
    assert row.share >= 0.3
    assert run(["circuits", "discover", "induction", "--method", "features", "--workspace", str(trained.path)]) == 2
    assert "(--sae) go together" in capsys.readouterr().err


def test_an_sae_needs_a_residual_sae_at_its_layer_to_go_on(trained: Workspace, demo: LoadedModel) -> None:
    with pytest.raises(InputError, match="residual SAE on the input of layer 2"):
        report_dfa(
            trained, "x", demo, ("attention", trained.sae("attention")), TEXT, residuals={"lower": trained.sae("lower")}
        )
