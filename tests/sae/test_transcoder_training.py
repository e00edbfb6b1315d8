"""Training transcoders: what they learn, scales that fold, sets on one stream, resuming to the same bits."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae import InputError, SparseCode, Transcoder, checkpoint
from sae.config import TrainConfig
from sae.rules import BatchTopK, GradientTopK, JumpReLU, ReLU, Rule, TopK
from sae.source import Pair, Rows
from sae.state import TrainingState
from sae.training import train

D_IN, D_OUT, F = 16, 10, 96
CONFIG = TrainConfig(
    name="a", total_tokens=150 * 256, batch_size=256, d_sae=F, rule=TopK(8), lr=3e-3, dead_after_tokens=20 * 256
)


class MLPs:
    """x of known sparse directions and y a fixed MLP of x plus an offset, with a layer for each pair; in units where
    neither has the norm that training wants."""

    def __init__(self, layers: int = 1, linear: float = 0.0) -> None:
        self.position = 0
        self.pairs = [Pair(f"in.{i}", f"out.{i}", D_IN, D_OUT) for i in range(layers)]
        generator = torch.Generator().manual_seed(3)
        self.directions = torch.nn.functional.normalize(torch.randn(40, D_IN, generator=generator), dim=1)
        self.writes = torch.randn(layers, 40, D_OUT, generator=generator)
        self.linear = linear * torch.randn(layers, D_OUT, D_IN, generator=generator)

    def _rows(self, n: int, seed: int, gradients: bool = False) -> Sequence[Rows]:
        generator = torch.Generator().manual_seed(seed)
        active = torch.rand(n, 40, generator=generator) < 0.06
        strength = active * (0.5 + torch.rand(n, 40, generator=generator))
        x = 5 * strength @ self.directions + 2
        made = []
        for write, linear in zip(self.writes, self.linear, strict=True):
            y = 0.02 * (strength @ write + x @ linear.T) + 0.3
            made.append(Rows(x, y, torch.randn(n, D_OUT, generator=generator) if gradients else None))
        return made

    def next_rows(self, n: int, *, gradients: bool = False) -> Sequence[Rows]:
        self.position += 1
        return self._rows(n, 1000 + self.position, gradients)

    def sample_rows(self, n: int) -> Sequence[Rows]:
        return self._rows(min(n, 2048), 0)

    def held_out(self) -> Sequence[Rows]:
        return self._rows(2000, 1)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def fvu(coder: Transcoder, rows: Rows) -> float:
    assert rows.target is not None
    error = (rows.target - coder(rows.x)).square().sum()
    return float(error / (rows.target - rows.target.mean(0)).square().sum())


def trained(config: TrainConfig, source: MLPs, **options: Any) -> Transcoder:
    coder = train([config], source, **options)[0].sae
    assert isinstance(coder, Transcoder)
    return coder


def test_it_learns_what_an_mlp_writes_better_than_a_frozen_decoder() -> None:
    coder, frozen = (
        trained(replace(CONFIG, frozen_decoder=frozen), MLPs(), model_name="m") for frozen in (False, True)
    )
    rows = MLPs().held_out()[0]
    assert fvu(coder, rows) < 0.37
    assert fvu(frozen, rows) > 1.25 * fvu(coder, rows)
    assert (coder.hook_name, coder.target_hook_name, coder.model_name) == ("in.0", "out.0", "m")
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(F), rtol=0, atol=1e-6)


def test_a_skip_takes_the_linear_part() -> None:
    source = MLPs(linear=1.0)
    rows = source.held_out()[0]
    without, with_skip = (fvu(trained(replace(CONFIG, skip=skip), MLPs(linear=1.0)), rows) for skip in (False, True))
    assert with_skip < 0.5 * without


@pytest.mark.parametrize("rule", [TopK(4), BatchTopK(4), JumpReLU(), ReLU(), GradientTopK(4)], ids=lambda r: r.name)
def test_both_scales_are_folded_into_what_is_returned(rule: Rule) -> None:
    """The finished transcoder on raw x gives what the one in training gives on scaled x, over the output scale."""
    source = MLPs(linear=0.3)
    sample = source.sample_rows(2048)[0]
    state = TrainingState(replace(CONFIG, rule=rule, skip=True), source.pairs[0], torch.device("cpu"))
    state.initialise(sample.x, sample.target)
    assert state.input_scale != state.output_scale
    assert isinstance(state.sae, Transcoder)
    assert state.sae.W_skip is not None
    with torch.no_grad():
        state.sae.W_skip.normal_(generator=torch.Generator().manual_seed(0))
        state.sae.b_enc.add_(0.1)
    finished = state.finish(model_name="", sample=source.next_rows(4096, gradients=True)[0])
    assert isinstance(finished, Transcoder)
    x = source.held_out()[0].x
    code = finished.encode(x)
    for name, threshold in finished.state.items():
        if name == "threshold":
            state.sae.state["threshold"].copy_(threshold * state.output_scale)
    inside = state.sae.encode(x * state.input_scale)
    assert agreement(code, inside, state.output_scale) > 0.999
    z = x * state.input_scale @ state.sae.W_enc + state.sae.b_enc
    torch.testing.assert_close((x @ finished.W_enc + finished.b_enc) * state.output_scale, z, rtol=1e-4, atol=1e-4)
    expected = state.sae.predict(x * state.input_scale, inside) / state.output_scale
    shrunk = replace(inside, values=inside.values / state.output_scale)
    torch.testing.assert_close(finished.predict(x, shrunk), expected, rtol=1e-4, atol=1e-5)


def agreement(code: SparseCode, inside: SparseCode, scale: Tensor) -> float:
    """Share of entries of which both codes say the same (rounding may turn a tie)."""
    one, other = code.to_dense() * scale, inside.to_dense()
    return float(torch.isclose(one, other, rtol=1e-3, atol=1e-4).float().mean())


def test_pre_activations_start_around_zero_and_b_dec_in_the_middle_of_the_target() -> None:
    sample = MLPs().sample_rows(2048)[0]
    assert sample.target is not None
    state = TrainingState(replace(CONFIG, b_dec_init="mean"), MLPs().pairs[0], torch.device("cpu"))
    state.initialise(sample.x, sample.target)
    z = sample.x * state.input_scale @ state.sae.W_enc + state.sae.b_enc
    torch.testing.assert_close(z.mean(0), torch.zeros(F), rtol=0, atol=1e-4)
    torch.testing.assert_close(state.sae.b_dec.detach(), sample.target.mean(0) * state.output_scale)
    for rows, scale in ((sample.x, state.input_scale), (sample.target, state.output_scale)):
        norm = (rows * scale).norm(dim=1).mean()
        torch.testing.assert_close(norm, torch.tensor(rows.shape[1] ** 0.5))


def test_each_of_a_set_is_the_one_trained_alone() -> None:
    configs = [replace(CONFIG, name=f"l{i}", total_tokens=20 * 256) for i in range(3)]
    together = train(configs, MLPs(3), pairs=[0, 1, 2])
    assert [result.sae.hook_name for result in together if result.sae] == ["in.0", "in.1", "in.2"]
    for i, config in enumerate(configs):
        alone = train([config], MLPs(3), pairs=[i])[0].sae
        assert together[i].sae is not None
        assert alone is not None
        assert alone.fingerprint() == together[i].sae.fingerprint()


@pytest.mark.parametrize("rule", [BatchTopK(4), JumpReLU()], ids=lambda rule: rule.name)
def test_a_resumed_run_ends_in_the_same_bits(rule: Rule, tmp_path: Path) -> None:
    config = replace(CONFIG, rule=rule, skip=True, total_tokens=30 * 256)
    whole = trained(config, MLPs())

    class Killed(Exception):
        pass

    def kill(metrics: Any) -> None:
        if metrics.step == 17:
            raise Killed

    with pytest.raises(Killed):
        trained(config, MLPs(), checkpoint_dir=tmp_path, checkpoint_seconds=0, on_metrics=kill)
    assert checkpoint.tokens_done(tmp_path) == 16 * 256
    resumed = trained(config, MLPs(), checkpoint_dir=tmp_path, resume=True)
    assert resumed.fingerprint() == whole.fingerprint()
    other = MLPs()
    other.pairs = [replace(other.pairs[0], d_out=3)]
    with pytest.raises(InputError, match="another width"):
        trained(config, other, checkpoint_dir=tmp_path, resume=True)


def test_an_sae_has_no_skip(planted) -> None:
    with pytest.raises(InputError, match="a: a skip goes past the features to another activation: give a target"):
        train([replace(CONFIG, skip=True)], planted())
