"""A rule from outside the package: registered in this process, or an entry point of an installed package."""

import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from jaxtyping import Float
from sae_lens import SAE as TheirSAE
from torch import Tensor

from sae import SAE, Batch, CodeRule, InputError, SparseCode, StepMetrics, TopK, TrainConfig, register_rule, train
from sae.kernels import Encoder
from sae.rules import RULES, FeatureChoice, from_dict, rule_class, rule_names
from sae.rules.base import NO_TENSORS, Tensors


@dataclass(frozen=True)
class GroupMax(CodeRule):
    """Keeps the largest positive pre-activation of each of `k` groups of neighbouring features."""

    boost: float = 1.0
    name: ClassVar[str] = "groupmax"

    def select(self, batch: Batch) -> SparseCode:
        return self.encode(batch.x, batch.W_enc, batch.b_enc)

    def encode(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        state: Tensors = NO_TENSORS,
    ) -> SparseCode:
        encoder = Encoder.of(x, W_enc, b_enc)
        size = encoder.d_sae // self.k
        z = torch.cat([scores.clone() for _, scores in encoder.chunks()])
        best, where = z.unflatten(1, (self.k, size)).max(dim=2)
        best = self.boost * best.relu()
        indices = (where + size * torch.arange(self.k)).masked_fill(best == 0, 0)
        return SparseCode(best, indices, encoder.d_sae)


@dataclass(frozen=True)
class LikeTopK(TopK):
    """TopK under another name: SAELens has its inference."""

    name: ClassVar[str] = "like_topk"


CONFIG = TrainConfig(name="a", total_tokens=40 * 64, batch_size=64, d_sae=96, rule=GroupMax(4), lr=1e-2)


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.rules.registry._registered", {})


def trained(config: TrainConfig, source: Any, **options: Any) -> SAE:
    (result,) = train([config], source, **options)
    assert result.sae is not None, result.error
    return result.sae


def test_a_registered_rule_trains_resumes_and_is_saved_under_its_own_name(
    planted: Callable[[], Any], tmp_path: Path
) -> None:
    assert register_rule(GroupMax) is register_rule(GroupMax) is GroupMax
    assert TrainConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
    whole = trained(CONFIG, planted())

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(CONFIG, planted(), checkpoint_dir=tmp_path, checkpoint_seconds=0, on_metrics=stop)
    resumed = trained(CONFIG, planted(), checkpoint_dir=tmp_path, resume=True)
    assert resumed.fingerprint() == whole.fingerprint()
    whole.save(tmp_path / "sae")
    read = SAE.load(tmp_path / "sae")
    assert read.rule == GroupMax(4)
    assert read.fingerprint() == whole.fingerprint()
    x = planted().held_out(200)
    assert torch.equal(read(x), whole(x))
    assert read.encode(x).l0().max() <= 4
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["architecture"] == "groupmax"
    with pytest.raises(Exception, match="groupmax"):
        TheirSAE.load_from_disk(tmp_path / "sae")


def test_one_with_an_architecture_of_saelens_is_read_by_saelens_too(planted: Callable[[], Any], tmp_path: Path) -> None:
    register_rule(LikeTopK)
    sae = trained(replace(CONFIG, rule=LikeTopK(4)), planted())
    sae.save(tmp_path)
    assert SAE.load(tmp_path).rule == LikeTopK(4)
    x = planted().held_out(100)
    torch.testing.assert_close(TheirSAE.load_from_disk(tmp_path)(x), sae(x))


def test_without_what_registers_it_an_sae_says_what_is_missing(planted: Callable[[], Any], tmp_path: Path) -> None:
    for rule in (GroupMax, LikeTopK):
        register_rule(rule)
        trained(replace(CONFIG, rule=rule(4)), planted()).save(tmp_path / rule.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae.rules.registry._registered", {})
        for rule in (GroupMax, LikeTopK):
            with pytest.raises(InputError, match=f"rule '{rule.name}'.*import what registers it"):
                SAE.load(tmp_path / rule.name)


def test_names_that_are_taken_and_what_is_no_rule_are_refused() -> None:
    register_rule(GroupMax)

    def named(name: Any, base: type = TopK, **members: Any) -> type:
        return dataclass(frozen=True)(type("Mine", (base,), {"name": name, **members}))

    unfrozen = type("Mine", (FeatureChoice,), {"name": "mine"})
    for made, message in (
        (named("topk"), "there is a rule 'topk' already: give Mine another name"),
        (named("groupmax"), "there is a rule 'groupmax' already"),
        (named("standard"), "no other rule's name is"),
        (named("mine", saelens="gated"), "the SAELens architecture 'gated'"),
        (named("My Rule"), "has the name 'My Rule'"),
        (named("mine", CodeRule), "lacks encode, select"),
        (unfrozen, "is no frozen dataclass"),
        (dict, "the rule 'dict' is no selection rule: derive a class from sae.CodeRule"),
        (3, "the rule a int is no selection rule"),
    ):
        with pytest.raises(InputError, match=message) as error:
            register_rule(made)
        assert "\n" not in str(error.value)
    assert rule_names() == [*RULES, "groupmax"]


def install(site: Path, package: str, *points: str) -> None:
    described = site / f"{package}-1.0.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("\n".join(["[interp_workbench.rules]", *points, ""]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installs a package with rules, of which one works; the folder it lies in."""
    points = ("twin = more_rules:Twin", "other = more_rules:Twin", "broken = gone:Rule", "number = more_rules:NUMBER")
    install(tmp_path, "more-rules", *points)
    (tmp_path / "more_rules.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass
            from sae import TopK

            NUMBER = 3

            @dataclass(frozen=True)
            class Twin(TopK):
                name = "twin"
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_an_installed_packages_rule_is_known_by_name(site: Path, planted: Callable[[], Any]) -> None:
    assert rule_names() == [*RULES, "broken", "number", "other", "twin"]
    rule = from_dict({"name": "twin", "k": 4})
    assert type(rule).__module__ == "more_rules"
    assert trained(replace(CONFIG, rule=rule), planted()).rule == rule
    with pytest.raises(InputError, match="there is a rule 'twin' already"):
        register_rule(dataclass(frozen=True)(type("Mine", (TopK,), {"name": "twin"})))


def test_a_package_whose_rule_is_broken_or_clashes_is_named(site: Path) -> None:
    for name, message in (
        ("broken", "the rule 'broken' of more-rules cannot be imported: No module named 'gone'"),
        ("number", "the rule 'number' of more-rules is no selection rule"),
        ("other", "the rule 'other' of more-rules calls itself 'twin'"),
        ("none", "unknown selection rule 'none': choose one of abstopk"),
    ):
        with pytest.raises(InputError, match=message):
            rule_class(name)
    install(site, "yet-more-rules", "twin = more_rules:Twin", "topk = more_rules:Twin")
    with pytest.raises(InputError, match=r"the rule 'twin' is defined by .*-rules and by .*-rules: uninstall all but"):
        rule_class("twin")
    with pytest.raises(InputError, match="the rule 'topk' of yet-more-rules has the name of another one"):
        rule_class("topk")


def test_a_rule_that_registers_itself_may_be_an_entry_point_too(site: Path) -> None:
    """As when a notebook's rule, with its decorator, moves into a package."""
    install(site, "own-rules", "both = own_rules:Both")
    (site / "own_rules.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass
            from sae import TopK, register_rule

            @register_rule
            @dataclass(frozen=True)
            class Both(TopK):
                name = "both"
            """
        )
    )
    first = rule_class("both")
    assert first.__module__ == "own_rules"
    assert rule_class("both") is first
    assert register_rule(first) is first
    assert rule_names().count("both") == 1
