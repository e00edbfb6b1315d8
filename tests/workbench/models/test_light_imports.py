"""What transformers and TransformerLens import for others waits until somebody needs it, and is the real thing then."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from workbench.models import light_imports
from workbench.models.light_imports import Later

MODULE = """
class Base:
    kind = "real"
    def __init__(self, value=0):
        self.value = value
def double(value):
    return 2 * value
"""


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that is imported later."""
    name = "a_package_that_waits"
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(light_imports, "LATER", (name,))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def taken(package: str, importer: str) -> dict[str, Any]:
    """Names of a module called `importer` that takes all of the package's inside the context."""
    names: dict[str, Any] = {"__name__": importer, "__package__": ""}
    with light_imports.light_imports():
        exec(f"from {package} import Base, double", names)
    return names


def test_a_name_taken_by_the_two_libraries_waits_for_its_first_use(waiting: str) -> None:
    names = taken(waiting, "transformers.somewhere")
    assert not isinstance(3, names["Base"])
    assert waiting not in sys.modules
    assert names["double"](4) == 8
    assert waiting in sys.modules


def test_a_stand_in_does_what_the_class_does(waiting: str) -> None:
    base = taken(waiting, "transformer_lens.somewhere")["Base"]
    made = base(3)
    assert made.value == 3
    assert base.kind == "real"
    assert isinstance(made, base)
    assert not isinstance(3, base)

    class Child(base):  # type: ignore[misc]
        pass

    assert Child(5).value == 5
    assert issubclass(Child, base)
    assert Child.__mro__[1] is sys.modules[waiting].Base


def test_others_get_the_real_thing_inside_and_all_do_afterwards(waiting: str) -> None:
    assert not isinstance(taken(waiting, "somebody.else")["Base"], Later)
    del sys.modules[waiting]
    names: dict[str, Any] = {"__name__": "transformers.somewhere", "__package__": ""}
    exec(f"from {waiting} import Base", names)
    assert not isinstance(names["Base"], Later)


@pytest.mark.slow
def test_a_loaded_model_and_training_have_loaded_none_of_it_and_it_is_there_for_whoever_asks() -> None:
    code = """
import sys
import torch
from sae import TopK
from sae.config import TrainConfig
from sae.plain_step import PlainStep
from sae.state import TrainingState
from workbench.models.load import load_model
model = load_model("demo")
config = TrainConfig(name="a", d_sae=64, rule=TopK(4), batch_size=64, total_tokens=64)
PlainStep(TrainingState(config, 16, torch.device("cpu")))(torch.randn(64, 16), 0)
assert not {"torch._dynamo", "accelerate", "datasets", "scipy", "torch.distributed.checkpoint"} & set(sys.modules)
import datasets, scipy.optimize
from transformer_lens.utilities import tokenize_and_concatenate
rows = tokenize_and_concatenate(datasets.Dataset.from_dict({"text": ["def f(x):"] * 40}), model.tokenizer, max_length=8)
assert isinstance(rows, datasets.Dataset) and len(rows)
from transformers.loss import loss_for_object_detection
assert list(loss_for_object_detection.linear_sum_assignment([[0, 1], [1, 0]])[1]) == [0, 1]
tokens = torch.tensor([[0, 5, 7]])
compiled = torch.compile(model.hf, backend="eager")
assert torch.allclose(compiled(tokens).logits, model.hf(tokens).logits, atol=1e-5)
assert torch._dynamo.__name__ == "torch._dynamo" and torch._dynamo.utils.counters
"""
    subprocess.run([sys.executable, "-c", code], check=True)
