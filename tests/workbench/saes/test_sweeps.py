"""Sweeps: what a file says becomes the right configurations, mistakes get one line, and one failure stays one."""

import json
from pathlib import Path

import pytest
import torch

from sae.config import TrainConfig
from sae.errors import InputError
from sae.plain_step import PlainStep
from sae.rules import RULES, TopK
from sae.state import TrainingState
from workbench.cli.main import run
from workbench.harvest.loader import ActivationLoader
from workbench.saes.settings import required_fields
from workbench.saes.sweeps import SweepEstimate, estimate, memory, parse_sweep, read_sweep
from workbench.workspace import Workspace

HOOK = "blocks.1.hook_resid_post"
RULE = {"name": "topk", "k": 4}


def names(document: dict) -> list[str]:
    return [config.name for config in parse_sweep(document).configs("s", 1000)]


def test_every_list_is_an_axis_of_the_product() -> None:
    document = {"d_sae": [64, 128], "seed": [0, 1], "batch_size": 256, "rule": [{"name": "topk", "k": [4, 8]}]}
    configs = parse_sweep(document).configs("s", 1000)
    found = {(config.rule, config.d_sae, config.seed, config.batch_size, config.total_tokens) for config in configs}
    expected = {(TopK(k), width, seed, 256, 1000) for k in (4, 8) for width in (64, 128) for seed in (0, 1)}
    assert len(configs) == 8
    assert found == expected


def test_names_tell_apart_what_differs_and_nothing_else() -> None:
    assert names({"rule": [RULE]}) == ["s"]
    assert names({"seed": [0, 1], "rule": [{"name": "topk", "k": [4, 8]}]}) == [
        "s-k4-seed0", "s-k8-seed0", "s-k4-seed1", "s-k8-seed1",
    ]  # fmt: skip
    assert names({"lr": [1e-3, 5e-4], "rule": [RULE]}) == ["s-lr0.001", "s-lr0.0005"]
    assert names({"frozen_decoder": [False, True], "rule": [RULE]}) == ["s", "s-frozen_decoder"]
    assert names({"d_sae": [64, 128], "rule": [RULE]}) == ["s-d64", "s-d128"]


def test_names_tell_tables_apart_of_which_one_leaves_a_setting_at_its_default() -> None:
    assert names({"rule": [RULE, {**RULE, "frozen_decoder": True}]}) == ["s", "s-frozen_decoder"]
    assert names({"rule": [{**RULE, "normalize_input": False}, RULE]}) == ["s", "s-normalize_input"]
    assert names({"rule": [RULE, {**RULE, "lr": 1e-3}, {**RULE, "multi_k": 0.125}]}) == [
        "s-multi_k0", "s-lr0.001-multi_k0", "s-multi_k0.125",
    ]  # fmt: skip
    assert names({"rule": [RULE, {**RULE, "matryoshka": [32]}]}) == ["s", "s-matryoshka32"]
    with pytest.raises(InputError, match="makes the SAE 's' twice"):
        names({"rule": [RULE, {**RULE, "frozen_decoder": False}]})


def test_a_rules_table_overrides_the_common_settings() -> None:
    document = {"d_sae": 64, "lr": 1e-3, "rule": [RULE, {"name": "topk", "k": 8, "lr": 2e-3, "d_sae": 128}]}
    configs = parse_sweep(document).configs("s", 1000)
    assert [(config.d_sae, config.lr, config.rule.k) for config in configs] == [(64, 1e-3, 4), (128, 2e-3, 8)]


def test_a_field_that_is_a_list_takes_a_list_of_lists() -> None:
    one = parse_sweep({"betas": [0.9, 0.99], "rule": [RULE]}).configs("s", 1000)
    two = parse_sweep({"betas": [[0.9, 0.99], [0, 0.999]], "rule": [RULE]}).configs("s", 1000)
    assert [config.betas for config in one] == [(0.9, 0.99)]
    assert [config.betas for config in two] == [(0.9, 0.99), (0.0, 0.999)]
    assert [config.name for config in two] == ["s-betas0.9+0.99", "s-betas0+0.999"]


MINIMAL = {
    name: {"name": name, **{key: 4 for key in required_fields(rule) if key == "k"}} for name, rule in RULES.items()
}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_can_be_swept(name: str) -> None:
    configs = parse_sweep({"d_sae": 64, "seed": [0, 1], "rule": [MINIMAL[name]]}).configs("s", 100_000)
    assert [(type(config.rule), config.seed) for config in configs] == [(RULES[name], 0), (RULES[name], 1)]


def test_several_rules_are_named_and_each_by_its_own_axes() -> None:
    document = {"d_sae": 64, "rule": [{"name": "topk", "k": [4, 8]}, MINIMAL["relu"], {**MINIMAL["jumprelu"]}]}
    assert names(document) == ["s-topk-k4", "s-topk-k8", "s-relu", "s-jumprelu"]


def test_a_long_setting_has_a_short_name() -> None:
    document = {"d_sae": 64, "rule": [{"name": "relu", "sparsity_coefficient": [1, 2.5]}]}
    assert names(document) == ["s-sparsity1", "s-sparsity2.5"]


def test_groups_of_features_are_one_value() -> None:
    one = parse_sweep({"d_sae": 64, "matryoshka": [16, 64], "rule": [RULE]}).configs("s", 1000)
    two = parse_sweep({"d_sae": 64, "matryoshka": [[16, 64], [32, 64]], "rule": [RULE]}).configs("s", 1000)
    assert [config.matryoshka for config in one] == [(16, 64)]
    assert [config.matryoshka for config in two] == [(16, 64), (32, 64)]


def test_whole_numbers_serve_as_numbers(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text('lr = 1\ntokens = 5_000\n[[rule]]\nname = "topk"\nk = 4\n')
    sweep = read_sweep(file)
    assert sweep.tokens == 5000
    assert isinstance(sweep.configs("s", 1)[0].lr, float)


MISTAKES = {
    "unknown key": ('sede = 1\n[[rule]]\nname = "topk"\nk = 4', "unknown key 'sede': did you mean 'seed'?"),
    "far key": ('zzz = 1\n[[rule]]\nname = "topk"\nk = 4', "known are anneal_from_k, "),
    "unknown rule key": ('[[rule]]\nname = "topk"\nkk = 4', "[[rule]] 1: unknown key 'kk': did you mean 'k'?"),
    "unknown rule": ('[[rule]]\nname = "topkk"\nk = 4', "unknown selection rule 'topkk': did you mean 'topk'?"),
    "no rule": ("seed = 1", "names no selection rule: add a table [[rule]]"),
    "rule without a name": ("[[rule]]\nk = 4", "unknown selection rule 'None': known are"),
    "rule table": ('[rule]\nname = "topk"\nk = 4', "add a table [[rule]]"),
    "missing k": ('[[rule]]\nname = "topk"', "topk needs k: give it a value"),
    "wrong type": ('seed = "one"\n[[rule]]\nname = "topk"\nk = 4', "seed is 'one': expected a whole number"),
    "wrong type in a list": ('seed = [0, 1.5]\n[[rule]]\nname = "topk"\nk = 4', "seed is 1.5: expected a whole number"),
    "boolean": ('seed = true\n[[rule]]\nname = "topk"\nk = 4', "seed is True: expected a whole number"),
    "choice": (
        'b_dec_init = "median"\n[[rule]]\nname = "topk"\nk = 4',
        "expected 'geometric_median' or 'mean' or 'zero'",
    ),
    "too short": ('betas = [0.9]\n[[rule]]\nname = "topk"\nk = 4', "expected a list of 2 values, each a number"),
    "empty list": ('seed = []\n[[rule]]\nname = "topk"\nk = 4', "seed is an empty list"),
    "swept batch": ('batch_size = [1, 2]\n[[rule]]\nname = "topk"\nk = 4', "batch_size must be one value"),
    "batch in a rule": ('[[rule]]\nname = "topk"\nk = 4\nbatch_size = 2', "unknown key 'batch_size'"),
    "twice": ('seed = [1, 1]\n[[rule]]\nname = "topk"\nk = 4', "makes the SAE 's' twice"),
    "k above d_sae": ('d_sae = 4\n[[rule]]\nname = "topk"\nk = 5', "between 1 and the number of features, 4"),
    "no TOML": ("seed = = 1", "is not TOML"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_file_give_one_line(mistake: str, tmp_path: Path) -> None:
    text, expected = MISTAKES[mistake]
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        read_sweep(file).configs("s", 1000)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the sweep .*none\.toml: No such file"):
        read_sweep(tmp_path / "none.toml")


def test_the_memory_estimate_counts_what_training_holds() -> None:
    config = TrainConfig(name="a", total_tokens=1000, d_sae=512, rule=TopK(4), batch_size=64)
    state = TrainingState(config, 32, torch.device("cpu"))
    step = PlainStep(state)
    step(torch.randn(64, 32), 0)
    held = list(state.trained.values()) + [
        tensor
        for moments in state.adam.state.values()
        for tensor in moments.values()
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1
    ]
    held += [value for value in vars(step.gradients).values() if isinstance(value, torch.Tensor)]
    bytes_held = sum(tensor.nbytes for tensor in held)
    assert bytes_held <= memory([config], 32, 32) <= 1.2 * bytes_held


def test_more_memory_than_is_free_is_refused() -> None:
    with pytest.raises(InputError, match=r"3 SAEs need about 4\.0 GB and 2\.0 GB are free: train fewer"):
        SweepEstimate(3, 4_000_000_000, 2_000_000_000, 0.0).check()


def test_time_is_estimated_for_every_kind_of_sae(make_harvest) -> None:
    harvest = make_harvest({HOOK: torch.randn(640, 16)})
    configs = parse_sweep({"d_sae": [64, 4096], "seed": [0, 1], "batch_size": 256, "rule": [RULE]}).configs("s", 25_600)
    both = estimate(configs, ActivationLoader(harvest, HOOK, seed=0), device="cpu")
    narrow = estimate(configs[:2], ActivationLoader(harvest, HOOK, seed=0), device="cpu")
    assert both.saes == 4
    assert both.seconds > narrow.seconds > 0


@pytest.fixture
def workspace(tmp_path: Path, make_harvest) -> Workspace:
    space = Workspace(tmp_path / "w")
    harvest = make_harvest({HOOK: torch.randn(640, 16)})
    (space.path / "harvests").mkdir()
    harvest.directory.rename(space.path / "harvests" / "h")
    return space


def train_arguments(space: Workspace, sweep: Path, *more: str) -> list[str]:
    return [
        "train",
        "h",
        "--name",
        "s",
        "--sweep",
        str(sweep),
        "--workspace",
        str(space.path),
        "--device",
        "cpu",
        *more,
    ]


def test_one_failing_sae_leaves_the_others_and_is_reported_at_the_end(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep.toml"
    text = 'd_sae = 64\nbatch_size = 64\ntokens = 2_000\nlr = [1e-3, 1e38]\n[[rule]]\nname = "topk"\nk = 4\n'
    sweep.write_text(text)
    for _ in range(2):  # The second time the run is finished, and says the same.
        capsys.readouterr()
        assert run(train_arguments(workspace, sweep, "--json")) == 2
        captured = capsys.readouterr()
        printed = json.loads(captured.out)
        assert [item["name"] for item in printed["saes"]] == ["s-lr0.001"]
        assert list(printed["failed"]) == ["s-lr1e+38"]
        errors = [line for line in captured.err.splitlines() if "error:" in line]
        assert len(errors) == 1
        assert "1 of 2 SAEs failed (s-lr1e+38: the loss stopped being finite" in errors[0]
    rows = workspace.sql('SELECT sae, error IS NULL AS fine FROM "run.s".configuration ORDER BY sae').rows
    assert rows == [("s-lr0.001", True), ("s-lr1e+38", False)]


def test_single_options_do_not_go_with_a_sweep(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep.toml"
    sweep.write_text('[[rule]]\nname = "topk"\nk = 4\n')
    assert run(train_arguments(workspace, sweep, "--k", "8")) == 2
    assert "--k does not go with --sweep: write k = ... into the file" in capsys.readouterr().err
    sweep.write_text('tokens = 100\n[[rule]]\nname = "topk"\nk = 4\n')
    assert run(train_arguments(workspace, sweep, "--tokens", "8")) == 2
    assert "leave --tokens out" in capsys.readouterr().err


def test_an_estimate_alone_trains_nothing(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep.toml"
    sweep.write_text('d_sae = 64\nbatch_size = 64\n[[rule]]\nname = "topk"\nk = [4, 8]\n')
    assert run(train_arguments(workspace, sweep, "--estimate-only", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["saes"] == 2
    assert found["bytes"] == memory(read_sweep(sweep).configs("s", 1), 16, 16)
    assert workspace.runs() == []
