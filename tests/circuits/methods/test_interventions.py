"""Interventions and attributions against one-at-a-time loops and identities."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from circuits.ablation import ablate_heads, head_means
from circuits.attribution import logit_attribution
from circuits.eap import attribute_edges
from circuits.edges import patched_logits, read_through, written
from circuits.faithfulness import faithfulness_curve
from circuits.metrics import answer_log_probability, logit_difference, probability_difference
from circuits.nodes import graph_of
from circuits.passes import answer_logits
from circuits.patching import patch_activations
from circuits.path_patching import patch_edges, patch_paths
from circuits.prompts import PromptSet, from_ids
from sae.errors import InputError


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    """Random prompts of one length, several answers a prompt."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 100, (2, 5, 9), generator=generator)
    answers = torch.randint(1, 100, (5, 4), generator=generator)
    clean, corrupted = ([[0, *row] for row in part.tolist()] for part in ids)
    right = [row[: 1 + i % 2] for i, row in enumerate(answers.tolist())]
    return from_ids("random", clean, corrupted, right, answers[:, 2:].tolist(), 0)


def run(bridge: Any, tokens: torch.Tensor, hooks: list[Any], prompts: PromptSet) -> torch.Tensor:
    with torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
        logits = bridge(tokens)
    return logit_difference(logits[torch.arange(len(tokens)), prompts.last], prompts)


def test_metrics_equal_their_definitions(prompts: PromptSet) -> None:
    logits = torch.randn(5, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probabilities = logits.softmax(1)
    for i in range(5):
        right, wrong = ([t for t in row[i].tolist() if t >= 0] for row in (prompts.answers, prompts.wrong))
        difference = sum(logits[i, t] for t in right) / len(right) - sum(logits[i, t] for t in wrong) / len(wrong)
        torch.testing.assert_close(logit_difference(logits, prompts)[i], difference)
        total = sum(probabilities[i, t] for t in right)
        torch.testing.assert_close(answer_log_probability(logits, prompts)[i].exp(), total)
        torch.testing.assert_close(
            probability_difference(logits, prompts)[i], total - sum(probabilities[i, t] for t in wrong)
        )


def test_padding_changes_no_logits(random_model: Any) -> None:
    rows = [[0, 5, 6, 7], [0, 8, 9, 10, 11, 12]]
    set_ = from_ids("padded", rows, [[0, 5, 9, 7], [0, 8, 9, 10, 13, 12]], [[1], [2]], [[3], [4]], 0)
    logits = answer_logits(random_model, set_.clean, set_.last)
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i], random_model(torch.tensor([row]))[0, -1], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patching_equals_a_loop_over_heads(random_model: Any, prompts: PromptSet, direction: Any) -> None:
    scores = patch_activations(random_model, prompts, direction=direction, batch_size=3)
    base, other = (prompts.corrupted, prompts.clean) if direction == "denoise" else (prompts.clean, prompts.corrupted)
    _, cache = random_model.run_with_cache(other)
    before = run(random_model, base, [], prompts).mean()
    for name in scores.nodes:
        layer, head = int(name[1]), int(name[-1])

        def put(value: torch.Tensor, hook: Any, head: int = head) -> torch.Tensor:
            value = value.clone()
            value[:, :, head] = cache[hook.name][:, :, head]
            return value

        after = run(random_model, base, [(f"blocks.{layer}.attn.hook_z", put)], prompts).mean()
        effect = after - before if direction == "denoise" else before - after
        assert scores[name] == pytest.approx(effect.item(), abs=2e-6)


def test_patching_the_first_stream_restores_the_clean_run_exactly(random_model: Any, prompts: PromptSet) -> None:
    scores = patch_activations(random_model, prompts, site="resid_pre")
    assert scores["resid0"] == pytest.approx(scores.clean - scores.corrupted, abs=1e-9)
    whole = [patch_activations(random_model, prompts, site=site, by_position=True) for site in ("mlp_out", "attn_out")]
    assert all(len(scores.nodes) == 3 * 10 for scores in whole)
    by_position = patch_activations(random_model, prompts, site="resid_pre", by_position=True)
    # The token that differs nowhere, BOS, has nothing to bring.
    assert by_position["resid0@0"] == pytest.approx(0, abs=1e-6)
    assert by_position["resid2@9"] != pytest.approx(0, abs=1e-3)


def test_ablation_equals_a_loop_over_heads(random_model: Any, prompts: PromptSet) -> None:
    _, cache = random_model.run_with_cache(prompts.clean)
    means = head_means(random_model, prompts, batch_size=2)
    before = run(random_model, prompts.clean, [], prompts).mean()
    for kind in ("zero", "mean-over-positions"):
        scores = ablate_heads(random_model, prompts, kind=kind, batch_size=2)
        for name in scores.nodes:
            layer, head = int(name[1]), int(name[-1])
            hook_name = f"blocks.{layer}.attn.hook_z"
            # BOS, position 0, is no part of the mean.
            mean = cache[hook_name][:, 1:, head].mean(dim=(0, 1))
            torch.testing.assert_close(means[hook_name][head], mean)

            def put(value: torch.Tensor, hook: Any, head: int = head, new: Any = mean) -> torch.Tensor:
                value = value.clone()
                value[:, :, head] = 0 if kind == "zero" else new  # noqa: B023
                return value

            after = run(random_model, prompts.clean, [(hook_name, put)], prompts).mean()
            assert scores[name] == pytest.approx((before - after).item(), abs=2e-6)


def test_resampling_takes_every_prompt_from_another(random_model: Any, prompts: PromptSet) -> None:
    two = prompts[:2]
    scores = ablate_heads(random_model, two, kind="resample")
    swapped = PromptSet("swapped", two.clean, two.clean.flip(0), two.last, two.answers, two.wrong)
    expected = patch_activations(random_model, swapped, direction="noise")
    torch.testing.assert_close(scores.scores, expected.scores, atol=1e-6, rtol=0)


def test_logit_attribution_terms_add_up(random_model: Any, prompts: PromptSet) -> None:
    found = logit_attribution(random_model, prompts, batch_size=2)
    torch.testing.assert_close(found.values.sum(dim=1), found.difference, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.difference, run(random_model, prompts.clean, [], prompts), atol=2e-5, rtol=1e-5)
    # A head's term against the definition, in double precision.
    _, cache = random_model.run_with_cache(prompts.clean)
    z = cache["blocks.1.attn.hook_z"][:, -1, 2].double()
    out = z @ random_model.blocks[1].attn.W_O[2].double()
    norm = random_model.ln_final.original_component
    x = cache["ln_final.hook_in"][:, -1].double()
    scale = (x.var(dim=1, unbiased=False) + norm.eps).sqrt()
    normed = (out - out.mean(dim=1, keepdim=True)) / scale[:, None] * norm.weight.double()
    vocab = normed @ random_model.unembed.original_component.weight.double().T
    expected = logit_difference(vocab, prompts)
    index = found.terms.index("a1.h2")
    torch.testing.assert_close(found.values[:, index].double(), expected, atol=1e-5, rtol=1e-4)


def test_logit_attribution_equals_transformer_lens(random_model: Any, prompts: PromptSet) -> None:
    """TransformerLens attributes to heads in its cache; it leaves the final LayerNorm's gain to us."""
    found = logit_attribution(random_model, prompts)
    _, cache = random_model.run_with_cache(prompts.clean)
    stack = cache.stack_head_results(layer=-1, pos_slice=-1)
    scaled = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
    W = random_model.unembed.original_component.weight
    ours = found.values[:, [found.terms.index(f"a{i // 4}.h{i % 4}") for i in range(12)]]
    gain = random_model.ln_final.original_component.weight
    theirs = torch.stack([logit_difference(part * gain @ W.T, prompts) for part in scaled], dim=1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_patching_every_edge_gives_the_other_run_and_none_this_one(bridge: Any, tokens: torch.Tensor) -> None:
    graph, last, others = graph_of(bridge), torch.tensor([11, 11, 11]), tokens.flip(0)
    with torch.no_grad():
        clean, other = answer_logits(bridge, tokens, last), answer_logits(bridge, others, last)
        full = bridge(tokens)[:, -1]
    torch.testing.assert_close(clean, full, atol=1e-5, rtol=1e-5)
    alternative = written(bridge, others)
    assert torch.equal(patched_logits(bridge, tokens, last, alternative, 0 * graph.exists), clean)
    torch.testing.assert_close(
        patched_logits(bridge, tokens, last, alternative, graph.exists), other, atol=1e-5, rtol=1e-5
    )
    _, cache = bridge.run_with_cache(tokens)
    x = cache["blocks.1.hook_resid_pre"][:, :, None]
    for part in "qkv":
        value = cache[f"blocks.1.attn.{part}.hook_out"]
        torch.testing.assert_close(
            read_through(bridge, 1, part, x.expand(-1, -1, value.shape[2], -1)), value, atol=1e-5, rtol=1e-4
        )


def test_an_edge_is_patched_as_by_hand(random_model: Any, prompts: PromptSet) -> None:
    """m0 -> a2.h1<q>: the queries of one head computed from a stream in which m0's output is the corrupted one."""
    scores = patch_edges(random_model, prompts, ["m0->a2.h1<q>", "input->logits"])
    _, clean = random_model.run_with_cache(prompts.clean)
    _, other = random_model.run_with_cache(prompts.corrupted)
    block = random_model.blocks[2]
    x = clean["blocks.2.hook_resid_pre"] + other["blocks.0.hook_mlp_out"] - clean["blocks.0.hook_mlp_out"]
    queries = block.attn.q.original_component(block.ln1.original_component(x)).unflatten(2, (4, 8))

    def put(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value.clone()
        value[:, :, 1] = queries[:, :, 1]
        return value

    before = run(random_model, prompts.clean, [], prompts).mean()
    after = run(random_model, prompts.clean, [("blocks.2.attn.q.hook_out", put)], prompts).mean()
    assert scores["m0->a2.h1<q>"] == pytest.approx((before - after).item(), abs=2e-6)
    change = other["blocks.0.hook_resid_pre"] - clean["blocks.0.hook_resid_pre"]
    after = run(random_model, prompts.clean, [("ln_final.hook_in", lambda v, hook: v + change)], prompts).mean()
    assert scores["input->logits"] == pytest.approx((before - after).item(), abs=2e-6)


def test_edges_patched_from_their_reader_on_are_those_of_whole_passes(bridge: Any, tokens: torch.Tensor) -> None:
    """A reader of every kind, on every architecture, against `patched_logits`, which runs the whole model."""
    graph, last, others = graph_of(bridge), torch.tensor([11, 10, 11]), tokens.flip(0)
    answers = torch.tensor([[3]] * len(tokens))
    prompts = PromptSet("any", tokens, others, last, answers, answers + 1)
    edges = [
        *("input->a0.h0<q>", "a0.h1->a1.h0<k>", "m0->a2.h1<v>", "a1.h2->m2", "input->m0", "m1->logits"),
        *([] if graph.parallel else ["a1.h0->m1"]),
    ]
    scores = patch_edges(bridge, prompts, edges, rows_at_once=5)
    alternative, asked = written(bridge, others), torch.zeros_like(graph.exists)
    clean = logit_difference(answer_logits(bridge, tokens, last), prompts).mean()
    for edge in edges:
        mask = torch.zeros(graph.exists.shape)
        mask[graph.edge(edge)] = 1
        patched = logit_difference(patched_logits(bridge, tokens, last, alternative, mask), prompts).mean()
        assert scores[edge] == pytest.approx(float(clean - patched), abs=5e-6)
        asked[graph.edge(edge)] = True
    assert not scores.scores[~asked].any()


def test_a_path_of_the_last_layers_heads_to_the_logits_is_the_edge_and_the_path_through_its_mlp(
    random_model: Any, prompts: PromptSet
) -> None:
    paths = patch_paths(random_model, prompts)
    patched = patch_activations(random_model, prompts, direction="noise")
    for head in range(4):
        assert paths[f"a2.h{head}"] == pytest.approx(patched[f"a2.h{head}"], abs=2e-6)
    queries = patch_paths(random_model, prompts, receivers=["a1.h0<q>"])
    assert queries["a1.h1"] == 0


def test_edge_sums_are_the_gradients_of_node_outputs(random_model: Any, prompts: PromptSet) -> None:
    """The attribution of a writer from its own gradient, one backward pass by hand."""
    scores = attribute_edges(random_model, prompts, variant="eap", batch_size=2).nodes()
    _, clean = random_model.run_with_cache(prompts.clean)
    _, other = random_model.run_with_cache(prompts.corrupted)
    for name, hook_name in {"m1": "blocks.1.hook_mlp_out", "input": "blocks.0.hook_resid_pre"}.items():
        probe = torch.zeros_like(clean[hook_name], requires_grad=True)
        with random_model.hooks(fwd_hooks=[(hook_name, lambda v, hook, probe=probe: v + probe)]):
            value = logit_difference(random_model(prompts.clean)[:, -1], prompts).mean()
        (gradient,) = torch.autograd.grad(value, probe)
        expected = (gradient * (clean[hook_name] - other[hook_name])).sum().item()
        assert scores[name] == pytest.approx(expected, abs=1e-5)
    probe = torch.zeros_like(clean["blocks.1.attn.hook_z"], requires_grad=True)
    with random_model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda v, hook: v + probe)]):
        value = logit_difference(random_model(prompts.clean)[:, -1], prompts).mean()
    (gradient,) = torch.autograd.grad(value, probe)
    change = clean["blocks.1.attn.hook_z"] - other["blocks.1.attn.hook_z"]
    for head, expected in enumerate((gradient * change).sum(dim=(0, 1, 3)).tolist()):
        assert scores[f"a1.h{head}"] == pytest.approx(expected, abs=1e-5)


def test_attribution_patching_takes_two_forward_passes_and_one_backward(
    random_model: Any, prompts: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards, backwards = [], []
    handle = random_model.blocks[0].original_component.register_forward_hook(lambda *_: forwards.append(1))
    grad = torch.autograd.grad

    def counted(outputs: Any, inputs: Any, *args: Any) -> Any:
        # Pulling a gradient through one LayerNorm and projection has a single input; a pass back has all readers.
        backwards.append(isinstance(inputs, list))
        return grad(outputs, inputs, *args)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    attribute_edges(random_model, prompts, variant="eap")
    handle.remove()
    assert len(forwards) == 2
    assert sum(backwards) == 1


def test_integrated_gradients_at_the_input_are_complete(random_model: Any, prompts: PromptSet) -> None:
    errors = []
    for steps in (4, 64):
        scores = attribute_edges(random_model, prompts, variant="ig-inputs", steps=steps)
        errors.append(abs(scores.nodes()["input"] - (scores.clean - scores.corrupted)))
    assert errors[1] < 2e-3 * abs(scores.clean - scores.corrupted)
    assert errors[1] < errors[0]


def test_integrated_gradients_at_activations_are_exact_patching_of_the_node(
    random_model: Any, prompts: PromptSet
) -> None:
    prompts = prompts[:2]
    scores = attribute_edges(random_model, prompts, variant="ig-activations", steps=24).nodes()
    patched = patch_activations(random_model, prompts, site="mlp_out", direction="noise")
    for layer in range(3):
        assert scores[f"m{layer}"] == pytest.approx(patched[f"m{layer}"], abs=2e-3)
    patched = patch_activations(random_model, prompts, site="attn_out", direction="noise")
    for layer in range(3):
        total = sum(scores[f"a{layer}.h{head}"] for head in range(4))
        assert total == pytest.approx(patched[f"a{layer}"], abs=2e-3)


def test_on_a_linear_model_attribution_equals_patching_every_edge(linear_model: Any, prompts: PromptSet) -> None:
    two = prompts[:2]
    exact = patch_edges(linear_model, two)
    for variant in ("eap", "ig-inputs"):
        found = attribute_edges(linear_model, two, variant=variant, steps=2)
        torch.testing.assert_close(found.scores, exact.scores, atol=1e-6, rtol=1e-5)
    assert exact.scores.abs().max() > 0.1


def test_the_mean_is_taken_by_position_where_positions_correspond(random_model: Any, prompts: PromptSet) -> None:
    _, cache = random_model.run_with_cache(prompts.clean)
    before = run(random_model, prompts.clean, [], prompts).mean()
    scores = ablate_heads(random_model, prompts, batch_size=2)
    assert scores.method == "ablation (mean by position)"
    for name in scores.nodes:
        layer, head = int(name[1]), int(name[-1])

        def put(value: torch.Tensor, hook: Any, head: int = head) -> torch.Tensor:
            value = value.clone()
            value[:, :, head] = cache[hook.name][:, :, head].mean(dim=0)
            return value

        after = run(random_model, prompts.clean, [(f"blocks.{layer}.attn.hook_z", put)], prompts).mean()
        assert scores[name] == pytest.approx((before - after).item(), abs=2e-6)
    over = ablate_heads(random_model, prompts, kind="mean-over-positions")
    assert (over.scores - scores.scores).abs().max() > 1e-3
    rows = prompts.clean.tolist()
    lengths = from_ids("lengths", [rows[0], rows[1][:-2]], [rows[2], rows[3][:-2]], [[1], [2]], [[3], [4]], 0)
    assert ablate_heads(random_model, lengths).method == "ablation (mean over positions)"
    with pytest.raises(InputError, match="a mean by position needs at least two prompts, all of one length"):
        ablate_heads(random_model, lengths, kind="mean-by-position")


def test_there_are_no_shares_of_a_behaviour_that_is_not_there(random_model: Any, prompts: PromptSet) -> None:
    """A share of a negative difference has the wrong sign, and so has every faithfulness."""
    scores = attribute_edges(random_model, prompts)
    there = prompts if scores.clean > scores.corrupted else exchanged(prompts)
    missing = exchanged(there)
    nodes = patch_activations(random_model, missing)
    assert nodes.clean < nodes.corrupted
    assert nodes.table().share.isna().all()
    assert nodes.table().score.notna().all()
    curve = faithfulness_curve(random_model, missing, attribute_edges(random_model, missing), fractions=(0.1, 1.0))
    assert np.isnan([*curve.faithfulness, *curve.completeness, curve.cpr, curve.cmd]).all()
    assert curve.note.startswith(f"the model does not do the task: the metric is {curve.clean:.3g} on clean and ")
    curve = faithfulness_curve(random_model, there, attribute_edges(random_model, there), fractions=(1.0,))
    assert curve.faithfulness == pytest.approx([1.0], abs=1e-4)
    assert curve.note == ""
    shares = patch_activations(random_model, there).table()
    assert shares.share.notna().all()


def exchanged(prompts: PromptSet) -> PromptSet:
    return replace(prompts, clean=prompts.corrupted, corrupted=prompts.clean)


def test_bad_input_is_one_clear_line(random_model: Any, prompts: PromptSet) -> None:
    with pytest.raises(InputError, match=r"unknown site 'neuron'"):
        patch_activations(random_model, prompts, site="neuron")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown ablation"):
        ablate_heads(random_model, prompts, kind="none")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="resampling needs at least two prompts"):
        ablate_heads(random_model, prompts[:1], kind="resample")
    with pytest.raises(InputError, match=r"no receiver 'a7.h0<q>'"):
        patch_paths(random_model, prompts, receivers=["a7.h0<q>"])
    with pytest.raises(InputError, match=r"no edge 'm2->a0.h0<q>': m2 runs after"):
        patch_edges(random_model, prompts, ["m2->a0.h0<q>"])
    with pytest.raises(InputError, match=r"no head 'a3.h0': it has a0.h0 to a2.h3"):
        graph_of(random_model).head("a3.h0")
    with pytest.raises(InputError, match="at least one step"):
        attribute_edges(random_model, prompts, steps=0)
    with pytest.raises(InputError, match="10 and 9 tokens"):
        from_ids("x", [[0] * 10], [[0] * 9], [[1]], [[2]], 0)


def test_sweeps_equal_full_passes_on_every_architecture(bridge: Any, tokens: torch.Tensor) -> None:
    prompts = from_ids("three", tokens.tolist(), tokens.roll(1, 0).tolist(), [[1], [2], [3]], [[4], [5], [6]], 0)[:2]
    scores = ablate_heads(bridge, prompts, kind="zero")
    before = run(bridge, prompts.clean, [], prompts).mean()
    for layer, head in ((0, 1), (2, 3)):

        def silence(value: torch.Tensor, hook: Any, head: int = head) -> torch.Tensor:
            value = value.clone()
            value[:, :, head] = 0
            return value

        after = run(bridge, prompts.clean, [(f"blocks.{layer}.attn.hook_z", silence)], prompts).mean()
        assert scores[f"a{layer}.h{head}"] == pytest.approx((before - after).item(), abs=1e-5)
    found = logit_attribution(bridge, prompts)
    torch.testing.assert_close(found.values.sum(dim=1), found.difference, atol=5e-5, rtol=1e-4)
    edges = attribute_edges(bridge, prompts, variant="ig-inputs", steps=32)
    assert edges.nodes()["input"] == pytest.approx(edges.clean - edges.corrupted, rel=0.05, abs=0.02)
