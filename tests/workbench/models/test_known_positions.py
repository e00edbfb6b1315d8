"""What the bare model's pass asks the device."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from workbench.models.capture import values_at
from workbench.models.hooks import resolve_hooks
from workbench.models.known_positions import known_positions
from workbench.models.load import LoadedModel

HOOK = "blocks.1.hook_resid_post"


class Asked(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("pad_token_id", [None, 3])
def test_a_pass_waits_for_nothing_and_computes_the_same(gpt2_model: LoadedModel, pad_token_id: int | None) -> None:
    hooks, tokens = resolve_hooks(gpt2_model, [HOOK]), torch.tensor([[0, 5, 6, 7], [0, 8, 9, 3]])
    before, gpt2_model.hf.config.pad_token_id = gpt2_model.hf.config.pad_token_id, pad_token_id
    try:
        with torch.no_grad(), Asked() as plain:
            expected = gpt2_model.hf(tokens, use_cache=False, output_hidden_states=True).hidden_states[2]
        with torch.no_grad(), Asked() as asked:
            found = values_at(gpt2_model, tokens, hooks)[HOOK]
    finally:
        gpt2_model.hf.config.pad_token_id = before
    assert asked.count == 0 < plain.count, "transformers asks, and we do not"
    assert torch.equal(found, expected)


def test_others_are_answered_as_ever() -> None:
    packed, answers = torch.tensor([[0, 1, 2, 0, 1]]), []

    def ask() -> None:
        answers.append(masking_utils.find_packed_sequence_indices(packed))

    with known_positions():
        ask()
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    ask()
    assert [answer is None for answer in answers] == [True, False, False]
    assert answers[1].tolist() == answers[2].tolist() == [[0, 0, 0, 1, 1]]
