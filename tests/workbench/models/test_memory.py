"""Long work that memory cannot hold is one line before it starts, with the estimate and what to do."""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pandas as pd
import pytest

from sae import SAE, InputError, TopK, TrainConfig
from sae.transcoder import Transcoder
from sae.transcoder_set import TranscoderSet
from workbench import HarvestConfig, Workspace
from workbench.catalog.results import Result
from workbench.circuits.attention_saes import report_dfa
from workbench.circuits.task import Task
from workbench.features.explanations.language_models import LocalModel
from workbench.features.index.build import build_index
from workbench.models import memory
from workbench.models.load import LoadedModel, load_model
from workbench.models.memory import attention_bytes, logit_bytes
from workbench.sparsity.calibration import calibrate
from workbench.sparsity.neurons import view_neuron
from workbench.text.corpora import Corpus, open_corpus, streamed

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


def sparsity(
    part: str, space: Workspace, model: LoadedModel, corpus: Corpus | str = "python-stdlib", **settings: Any
) -> Result:
    """A part of a sparsity report of the demo model."""
    if part == "sae":
        settings["saes"] = {"s": space.sae("s")}
    return space.sparsity_part(part, part, model, open_corpus(corpus), **settings)


WORK: list[tuple[str, Callable[[Workspace, LoadedModel], Any]]] = [
    ("indexing 4,096 rows", lambda space, model: build_index(space, "s", model=model, device="cpu")),
    ("evaluating 1 SAE on 65,536 tokens in", lambda space, model: space.evaluate(["s"], model=model)),
    ("EAP", lambda space, model: space.circuit(model, Task("induction"), "eap")),
    ("ablation", lambda space, model: space.circuit(model, Task("induction"), "ablation")),
    ("measuring MLPs", lambda space, model: sparsity("measure", space, model)),
    ("enforcing sparsity", lambda space, model: sparsity("enforce", space, model)),
    ("measuring attention", lambda space, model: sparsity("attention", space, model)),
    ("restricting heads", lambda space, model: sparsity("heads", space, model)),
    ("measuring core neurons", lambda space, model: sparsity("predict", space, model)),
    ("measuring SAE codes", lambda space, model: sparsity("sae", space, model)),
    ("scoring heads on rows of 65 tokens", lambda space, model: space.heads("heads", model)),
    ("scoring heads on 8 needle tests", lambda space, model: space.retrieval("needles", model, needles=8)),
    ("comparing edge methods on 32 prompts", lambda space, model: space.agreement(model, Task("induction"))),
    ("reading a prompt of 5 tokens", lambda space, model: space.prompt("s", "x = 1", model=model)),
    ("steering a prompt of 5 tokens", lambda space, model: space.steer("s", 1, "x = 1", model=model)),
    ("counting 64 features beside 2 concepts", lambda space, model: space.concepts("s", table=table(space))),
    ("calibrating on 1,024 tokens", lambda space, model: calibrate(model, open_corpus("python-stdlib"))),
    ("looking at a neuron", lambda space, model: view_neuron(model, open_corpus("python-stdlib"), 0, 1)),
    ("attribution on a text of 5 tokens", lambda space, model: split(space, model)),
    ("the graph of a prompt of 5 tokens", lambda space, model: graph(space, model)),
    ("the weights of demo take", lambda space, model: LocalModel("demo", device="cpu")),
]


def table(space: Workspace) -> pd.DataFrame:
    """Two concepts on the harvest's rows."""
    rows = [row for (row,) in space.sql("SELECT row FROM tokens WHERE flags = 0 LIMIT 1000", "h").rows]
    return pd.DataFrame({"row": rows, "concept": ["odd" if row % 2 else "even" for row in rows]})


@pytest.mark.parametrize(("what", "work"), WORK, ids=[what for what, _ in WORK])
def test_work_beyond_memory_is_refused_before_it_starts(
    what: str, work: Callable[[Workspace, LoadedModel], Any], space: Workspace, demo: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ran: list[object] = []
    monkeypatch.setattr(memory, "free_bytes", lambda place: 1)
    handle = demo.bridge.blocks[0].original_component.register_forward_hook(lambda *_: ran.append(1))
    line = r"(needs at least|take) .* GB.* and 0\.0 GB are free on cpu: (use|index|free)"
    with handle, pytest.raises(InputError, match=line) as caught:
        work(space, demo)
    assert str(caught.value).startswith(what)
    assert "\n" not in str(caught.value)
    assert not ran


def split(space: Workspace, model: LoadedModel) -> Result:
    attention = SAE(model.info.d_attention, 64, TopK(4), hook_name="blocks.1.attn.hook_z")
    return report_dfa(space, "dfa", model, ("attention", attention), "x = 1", feature=0)


def graph(space: Workspace, model: LoadedModel) -> Result:
    if not space.transcoder_sets():
        width, coders = model.info.d_model, {}
        for layer in range(model.info.n_layers):
            hooks = {"hook_name": f"blocks.{layer}.mlp.hook_in", "target_hook_name": f"blocks.{layer}.hook_mlp_out"}
            coders[layer] = Transcoder(width, width, 64, TopK(4), model_name="demo", **hooks)
        space.add_transcoders("t", TranscoderSet(coders), [{}] * model.info.n_layers)
    return space.graph("graph", model, "x = 1", transcoders="t")


LONG: list[tuple[str, Callable[[Workspace, LoadedModel, Corpus], Any]]] = [
    ("evaluate", lambda space, model, text: space.evaluate(["s"], model=model, corpus=text, max_tokens=10**10)),
    *(
        (part, lambda space, model, text, part=part: sparsity(part, space, model, text, max_tokens=10**10))
        for part in ("enforce", "attention", "heads", "sae")
    ),
]


@pytest.mark.parametrize("work", [work for _, work in LONG], ids=[part for part, _ in LONG])
def test_more_tokens_than_memory_holds_are_refused_before_a_stream_is_read(
    work: Callable[[Workspace, LoadedModel, Corpus], Any], space: Workspace, demo: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    read: list[int] = []

    class Endless:
        def __iter__(self) -> Iterator[dict[str, str]]:
            for number in count():
                read.append(number)
                assert len(read) < 100, "the stream is read"
                yield {"text": f"x = {number}"}

    monkeypatch.setattr(memory, "free_bytes", lambda place: 10**11)
    line = r"10,000,000,000 tokens in contexts of 256 needs at least [1-4]\d\d\.\d GB and 100\.0 GB are free on cpu: u"
    with pytest.raises(InputError, match=line):
        work(space, demo, streamed("endless", Endless(), "text", "1"))


def test_what_fits_is_not_refused(space: Workspace, demo: LoadedModel) -> None:
    assert build_index(space, "s", model=demo, device="cpu").tokens > 0
    assert attention_bytes(demo, 2, 10) == 2 * 2 * demo.info.n_heads * 100 * 4
    assert logit_bytes(demo, 2, 10) == 20 * demo.info.d_vocab * 4
