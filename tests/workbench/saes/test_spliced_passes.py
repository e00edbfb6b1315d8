"""Ablations: contexts that have the same left are run once where that changes nothing, and give what each gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.models import contexts
from workbench.models.contexts import context_batches
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel, load_model
from workbench.saes.spliced_passes import Ablation, clean_pass, spliced_pass
from workbench.text.corpora import open_corpus

CONTEXT, TOKENS = 16, 640


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long documents and short ones: BOS begins contexts, and stands within some."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        lines = "".join(f"    value = value + {number + line}\n" for line in range(1 + number % 7))
        (folder / f"{number}.txt").write_text(f"def function_{number}(value):\n{lines}")
    return folder


def reads_tokens_again(model: LoadedModel) -> None:
    """The last block of this model adds the tokens' embeddings once more."""
    seen: list[Tensor] = []
    model.bridge.embed.original_component.register_forward_hook(lambda _, args, output: seen.append(output))

    def added(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0] + seen[-1], *args[1:]

    model.bridge.blocks[-1].original_component.register_forward_pre_hook(added)


@pytest.mark.parametrize(
    ("hook", "again", "spared"),
    [
        ("blocks.1.hook_resid_post", False, True),
        ("blocks.0.hook_resid_pre", False, True),
        ("blocks.1.hook_resid_mid", False, True),
        ("blocks.1.hook_mlp_out", False, False),
        ("blocks.0.hook_resid_post", True, False),
    ],
)
def test_ablated_contexts_are_those_that_are_run_one_by_one(
    hook: str, again: bool, spared: bool, tiny_gpt2: Path, corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(contexts.BATCH_TOKENS, "cpu", 4 * CONTEXT)
    model = load_model(str(tiny_gpt2), device="cpu")
    if again:
        reads_tokens_again(model)
    place, vector = resolve_hook(model, hook), torch.randn(model.info.d_model)
    ablation, run, contexts_in_all, mixed = Ablation(model, place, vector), [], 0, False
    corpus = open_corpus(str(corpus_folder))
    for batch in context_batches(model, corpus, "heldout", max_tokens=TOKENS, context_len=CONTEXT):
        contexts_in_all += len(batch.tokens)
        clean = clean_pass(model, batch, [place], None)
        embed = model.bridge.embed.original_component
        counter = embed.register_forward_hook(lambda _, args, __: run.append(len(args[0])))
        found = ablation.predicted(batch, clean)
        counter.remove()
        expected = spliced_pass(model, batch, clean.blocks, place, vector.expand_as)
        torch.testing.assert_close(torch.stack(list(found.logits)), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.stack(list(found.log_z)), expected.logsumexp(dim=-1), rtol=1e-5, atol=1e-5)
        mixed |= bool(batch.ordinary[:, 1:].all(dim=1).any()) and not bool(batch.ordinary[:, 1:].all())
    assert mixed
    assert (sum(run) < 0.8 * contexts_in_all) == spared
