"""What transformers and TransformerLens import for others waits until somebody needs it, and is the real thing then."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.models import light_imports
from workbench.models.light_imports import Later

MODULE = """
import enum
class Mode(enum.Enum):
    NEAREST = "nearest"
    CUBIC = "cubic"
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


def test_a_package_taken_whole_waits_and_its_constants_are_the_keys_that_the_real_ones_are(waiting: str) -> None:
    names: dict[str, Any] = {"__name__": "transformers.somewhere", "__package__": "transformers"}
    code = f"""
import {waiting} as package
from {waiting} import Mode
number_of = {{Mode.NEAREST: 0, Mode.CUBIC: 1}}
def doubled(base: package.Base | None) -> int:
    return package.double(base.value)
"""
    with light_imports.light_imports():
        exec(code, names)
    assert waiting not in sys.modules
    assert names["doubled"](names["package"].Base(4)) == 8
    real = sys.modules[waiting].Mode
    assert [names["number_of"][mode] for mode in (real.NEAREST, real.CUBIC)] == [0, 1]
    stand_in = next(iter(names["number_of"]))
    assert stand_in == real.NEAREST != real.CUBIC
    assert isinstance(stand_in, real)
    assert stand_in.value == "nearest"
    assert names["package"].Mode is real


def test_a_module_below_a_package_waits(waiting: str, tmp_path: Path) -> None:
    (tmp_path / "a_package_above").mkdir()
    (tmp_path / "a_package_above" / "below.py").write_text(MODULE, encoding="utf-8")
    names: dict[str, Any] = {"__name__": "transformers.somewhere", "__package__": "transformers"}
    with pytest.MonkeyPatch.context() as patch, light_imports.light_imports():
        patch.setattr(light_imports, "LATER", ("a_package_above",))
        exec("import a_package_above.below as below, a_package_above.below", names)
        assert "a_package_above.below" not in sys.modules
    assert names["below"].double(2) == names["a_package_above"].below.double(2) == 4


def test_a_module_beside_the_importer_waits_too(waiting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(light_imports, "LATER", ("transformers.pytorch_utils",))
    monkeypatch.delitem(sys.modules, "transformers.pytorch_utils", raising=False)
    names: dict[str, Any] = {"__name__": "transformers.loss.somewhere", "__package__": "transformers.loss"}
    with light_imports.light_imports():
        exec("from ..pytorch_utils import id_tensor_storage", names)
        assert "transformers.pytorch_utils" not in sys.modules
    assert names["id_tensor_storage"](torch.zeros(3))[0] == torch.device("cpu")


def test_what_is_hidden_is_missing_for_the_two_libraries_alone(waiting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(light_imports, "HIDDEN", waiting)
    with light_imports.light_imports():
        with pytest.raises(ModuleNotFoundError, match="hidden while a model is loaded"):
            exec(f"import {waiting}", {"__name__": "transformer_lens.somewhere", "__package__": ""})
        exec(f"import {waiting}", {"__name__": "somebody.else", "__package__": ""})
    assert waiting in sys.modules


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
left = {
    "torch._dynamo", "accelerate", "datasets", "pandas", "pytest", "scipy", "sympy", "torch.distributed.checkpoint",
    "torch.distributed.tensor", "torchvision",
}
assert not left & set(sys.modules), left & set(sys.modules)
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
