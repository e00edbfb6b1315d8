"""Long work that memory cannot hold is one line before it starts, with the estimate and what to do."""

from collections.abc import Callable
from typing import Any

import pytest

from sae import InputError, TopK, TrainConfig
from workbench import HarvestConfig, Workspace
from workbench.circuits.task import Task
from workbench.features.index.build import build_index
from workbench.models import memory
from workbench.models.load import LoadedModel, load_model
from workbench.models.memory import attention_bytes, logit_bytes

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory, demo: LoadedModel) -> Workspace:
    space = Workspace(tmp_path_factory.mktemp("memory"))
    space.harvest("h", HarvestConfig(model="demo", corpus="python-stdlib", hooks=(HOOK,), max_tokens=4096), model=demo)
    space.train("s", "h", [TrainConfig(name="s", rule=TopK(4), d_sae=64, total_tokens=2048, batch_size=512)])
    return space


WORK: list[tuple[str, Callable[[Workspace, LoadedModel], Any]]] = [
    ("indexing 4,096 rows", lambda space, model: build_index(space, "s", model=model, device="cpu")),
    ("evaluating 1 SAE on contexts of 256 tokens", lambda space, model: space.evaluate(["s"], model=model)),
    ("EAP", lambda space, model: space.circuit(model, Task("induction"), "eap")),
    ("ablation", lambda space, model: space.circuit(model, Task("induction"), "ablation")),
    ("scoring heads on rows of 65 tokens", lambda space, model: space.heads("heads", model)),
]


@pytest.mark.parametrize(("what", "work"), WORK, ids=[what.split()[0] for what, _ in WORK])
def test_work_beyond_memory_is_refused_before_it_starts(
    what: str, work: Callable[[Workspace, LoadedModel], Any], space: Workspace, demo: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ran: list[object] = []
    monkeypatch.setattr(memory, "free_bytes", lambda place: 1)
    handle = demo.bridge.blocks[0].original_component.register_forward_hook(lambda *_: ran.append(1))
    line = r"needs at least .* GB and 0\.0 GB are free on cpu: (use|index)"
    with handle, pytest.raises(InputError, match=line) as caught:
        work(space, demo)
    assert str(caught.value).startswith(what)
    assert "\n" not in str(caught.value)
    assert not ran


def test_what_fits_is_not_refused(space: Workspace, demo: LoadedModel) -> None:
    assert build_index(space, "s", model=demo, device="cpu").tokens > 0
    assert attention_bytes(demo, 2, 10) == 2 * 2 * demo.info.n_heads * 100 * 4
    assert logit_bytes(demo, 2, 10) == 20 * demo.info.d_vocab * 4
