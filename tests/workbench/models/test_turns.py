"""Threads that use one model: each computes what it computes alone."""

import copy
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuits.graph import attribute
from circuits.passes import answer_logits
from circuits.resume import recorded_block, resumed_after
from circuits.turns import take_turns, turn_of
from sae.rules import TopK
from sae.transcoder import Transcoder
from workbench import LoadedModel, OwnModel, load_model
from workbench.circuits.attention_view import attention_view
from workbench.features.prompts import read_prompt
from workbench.features.steering import Edit, steer
from workbench.models.capture import capture, hooked

PROMPTS = ("def add(a, b):\n    return", "import os")


@pytest.fixture(scope="module")
def model(tiny_gpt2: Path) -> LoadedModel:
    return load_model(str(tiny_gpt2), device="cpu")


@pytest.fixture(scope="module")
def coder(model: LoadedModel) -> Transcoder:
    made = Transcoder(
        32, 32, 40, TopK(3), hook_name="blocks.1.mlp.hook_in", target_hook_name="blocks.1.hook_mlp_out",
        model_name=model.info.name,
    )  # fmt: skip
    for number, parameter in enumerate(made.parameters()):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return made.requires_grad_(False)


def test_threads_that_read_steer_and_attribute_find_what_one_alone_finds(model: LoadedModel, coder: Transcoder) -> None:
    verbs: list[Callable[[str], Tensor]] = [
        lambda text: attribute(model.bridge, text, {1: coder}, max_features=20).edges,
        lambda text: torch.tensor(read_prompt(model, coder, text).activation),
        lambda text: torch.tensor(
            model.encode(steer(model, coder, Edit(3), text, unit={3: 2.0}, new_tokens=4).steered)
        ),
        lambda text: attention_view(model, text).patterns,
        lambda text: answer_logits(model.bridge, tokens_of(model, text), torch.tensor([1]), [("hook_embed", halved)]),
        lambda text: model.hf(tokens_of(model, text), use_cache=False).logits,
    ]
    asked = [(verb, text) for verb in verbs for text in PROMPTS]
    with torch.no_grad():
        alone = [verb(text) for verb, text in asked]

    def work(seed: int) -> None:
        order = random.Random(seed).sample(range(len(asked)), len(asked))
        with torch.no_grad():
            for number in order:
                verb, text = asked[number]
                torch.testing.assert_close(verb(text), alone[number], rtol=0, atol=0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def steered(model: LoadedModel, coder: Transcoder, text: str) -> str:
    return steer(model, coder, Edit(3), text, unit={3: 2.0}, new_tokens=3).steered


def tokens_of(model: LoadedModel, text: str) -> Tensor:
    return torch.tensor([model.begun(model.encode(text))])


def halved(value: Tensor, hook: Any) -> Tensor:
    return value / 2


def halving(model: LoadedModel) -> AbstractContextManager[Any]:
    name = "hook_embed" if "hook_embed" in model.bridge.hook_dict else "embedding"
    return model.bridge.hooks(fwd_hooks=[(name, halved)])


def watching(model: LoadedModel) -> AbstractContextManager[Any]:
    return hooked(model, [next(iter(model.checks.hooks.values()))], lambda hook, value: None)


def replacing(model: LoadedModel) -> AbstractContextManager[Any]:
    tokens = torch.tensor([[1, 2, 3]])
    with recorded_block(model.bridge, 0) as output:
        model.bridge(tokens + 5)
    return resumed_after(model.bridge, 0, output[0])


def own_model() -> LoadedModel:
    """A module with nothing of a transformer."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)).requires_grad_(False)
    return load_model(OwnModel(module, d_vocab=9, n_ctx=20, hooks={"embedding": "0"}), device="cpu")


@pytest.mark.parametrize(
    ("own", "inside"), [(False, halving), (False, watching), (False, replacing), (True, halving), (True, watching)]
)
def test_a_pass_waits_until_the_hooks_of_another_thread_are_out(
    model: LoadedModel, own: bool, inside: Callable[[LoadedModel], AbstractContextManager[Any]]
) -> None:
    used = own_model() if own else model
    tokens = torch.tensor([[1, 2, 3]])
    hook = next(iter(used.checks.hooks.values()))
    passes: list[Callable[[], Tensor]] = [
        lambda: used.bridge(tokens, return_type="logits"),
        lambda: used.hf(tokens, use_cache=False).logits,
        lambda: capture(used, tokens, [hook]).activations[hook.name],
    ]
    with torch.no_grad():
        alone = [run() for run in passes]
        found: list[Tensor] = []

        def others() -> None:
            with torch.no_grad():
                found.extend(run() for run in passes)

        with inside(used):
            thread = threading.Thread(target=others)
            thread.start()
            thread.join(0.05)
            assert not found
            # This thread goes on.
            used.bridge(tokens, return_type="logits")
        thread.join()
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_pass_that_fails_or_is_interrupted_lets_others_go_on(model: LoadedModel) -> None:
    def fail(value: Tensor, hook: Any) -> None:
        raise KeyboardInterrupt

    tokens = torch.tensor([[1, 2, 3]])
    with pytest.raises(KeyboardInterrupt), model.bridge.hooks(fwd_hooks=[("hook_embed", fail)]):
        model.bridge(tokens)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: model.bridge(tokens)).result(timeout=10) is not None


def test_a_copy_of_a_model_runs_itself(model: LoadedModel) -> None:
    tokens = torch.tensor([[1, 2, 3]])
    before = model.hf(tokens).logits
    copied = copy.deepcopy(model.hf)
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert not copied(tokens).logits.any()
    assert replace(model, hf=copied).hf(tokens).logits.shape == before.shape
    torch.testing.assert_close(model.hf(tokens).logits, before, rtol=0, atol=0)


def test_a_module_whose_forward_was_replaced_runs_and_waits() -> None:
    """As torch.compile and accelerate do; what they put there is no method."""
    module = nn.Linear(2, 2)
    module.forward = lambda x: 2 * x
    take_turns(module)
    ones = torch.ones(1, 2)
    torch.testing.assert_close(module(ones), 2 * ones)
    with ThreadPoolExecutor(1) as pool:
        with turn_of(module):
            waiting = pool.submit(module, ones)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
        torch.testing.assert_close(waiting.result(timeout=10), 2 * ones)
