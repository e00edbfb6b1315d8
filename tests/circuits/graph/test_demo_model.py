"""What graphs are exact about, on the demo model with its bundled transcoders in float64."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from circuits.graph import attribute
from circuits.graph.adjoint import sources_of
from circuits.graph.frozen import freeze
from sae.transcoder_set import load_transcoders
from workbench.models.bundled import demo_model_dir, demo_transcoders_dir

from ..conftest import boot
from .conftest import Case
from .test_exactness import (
    test_a_changed_feature_moves_every_later_node_by_its_column as check_columns,
)
from .test_exactness import (
    test_edges_and_bias_add_up_to_every_pre_activation as check_sums,
)
from .test_exactness import (
    test_edges_are_those_of_autograd_with_patterns_and_denominators_detached as check_autograd,
)
from .test_exactness import (
    test_leaves_hold_the_probabilities_with_biases_among_them as check_leaves,
)


@pytest.fixture(scope="module")
def demo() -> Case:
    folder = demo_model_dir()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    bridge = boot("gpt2", model, folder)
    coders = {layer: coder.double() for layer, coder in load_transcoders(demo_transcoders_dir()).coders.items()}
    bos = bridge.tokenizer.bos_token_id
    tokens = torch.tensor([bos, *bridge.tokenizer("values = [1, 2, 3").input_ids])
    graph = attribute(bridge, tokens, coders, bos_id=bos)
    return Case("demo", bridge, tokens, coders, graph, sources_of(freeze(bridge, tokens), coders, bos))


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check_sums, id="sums"),
        pytest.param(lambda case: check_columns(case, -3.0), id="columns"),
        pytest.param(check_leaves, id="leaves"),
        pytest.param(check_autograd, id="autograd", marks=pytest.mark.slow),
    ],
)
def test_the_demo_model_is_exact_too(demo: Case, check: Callable[[Case], None]) -> None:
    check(demo)
