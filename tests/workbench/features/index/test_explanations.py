"""Explanations: what a language model is asked, how its answers are scored, and where they show."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sae.errors import InputError
from workbench import Workspace
from workbench.cli.main import run
from workbench.features.explanations.language_models import Endpoint, LocalModel, PromptTooLongError
from workbench.features.explanations.report import cleaned, decided, explain_features, marked
from workbench.features.index.feature import Example
from workbench.features.index.query import FeatureIndex

DEAD = 3


class Answering:
    """A language model that answers texts by a function and remembers every prompt."""

    def __init__(self, answer: Callable[[str], str], name: str = "answering") -> None:
        self.name, self.answer, self.prompts = name, answer, list[str]()

    def complete(self, prompt: str, max_tokens: int) -> str:
        self.prompts.append(prompt)
        if "<<" in prompt:
            return '\n "Odd words." \nand so on'
        return self.answer(prompt.split("Here is a text:\n\n")[1].split("\n\nDoes the text")[0])


@pytest.fixture
def busiest(space: Workspace) -> int:
    table = FeatureIndex.open(space, "s").table()
    return int(table.loc[table["firings"].between(30, 200), "feature"].iloc[0])


@pytest.fixture(autouse=True)
def nothing_stored(space: Workspace) -> None:
    (space.path / "results" / "explanations" / "s.duckdb").unlink(missing_ok=True)


def test_tokens_on_which_a_feature_fires_are_marked() -> None:
    example = Example(0, "d", 0, 2.0, ["a", " b", " c", "d"], [0.0, 1.0, 2.0, -1.0], 2)
    assert marked(example, 1) == "a<< b c>>d"
    assert marked(example, -1) == "a b c<<d>>"


@pytest.mark.parametrize(
    ("answer", "clean"),
    [('\n "Odd words." \nand', "Odd words"), ("", ""), ("\n \n", ""), ("**x**", "x"), ("a" * 300, "a" * 200)],
)
def test_an_explanation_is_the_first_line_of_an_answer(answer: str, clean: str) -> None:
    assert cleaned(answer) == clean


@pytest.mark.parametrize(
    ("answer", "verdict"), [("Yes.", True), (" **no**", False), ("NO", False), ("maybe", None), ("", None)]
)
def test_answers_are_yes_no_or_unclear(answer: str, verdict: bool | None) -> None:
    assert decided(answer) is verdict


def test_silent_examples_are_texts_without_the_feature(space: Workspace, busiest: int) -> None:
    index = FeatureIndex.open(space, "s")
    found = index.silent_examples(busiest, 5, seed=1)
    assert 0 < len(found) <= 5
    assert found == index.silent_examples(busiest, 5, seed=1)
    firing = {row for (row,) in index._query("SELECT row FROM feature_activations WHERE feature = ?", busiest)}
    for example in found:
        first = example.row - example.peak
        assert firing.isdisjoint(range(first, first + len(example.tokens)))


def test_the_score_is_balanced_accuracy(space: Workspace, busiest: int) -> None:
    index = FeatureIndex.open(space, "s")
    feature = index.feature(busiest)
    firing = {"".join(example.tokens) for group in feature.groups for example in group.examples}
    cases: list[tuple[Callable[[str], str], tuple[float, float, float, int]]] = [
        (lambda text: "yes" if text in firing else "no", (1, 1, 1, 0)),
        (lambda text: "Yes!", (0.5, 1, 0, 0)),
        (lambda text: "no" if text in firing else "maybe", (0, 0, 0, -1)),
    ]
    for number, (answer, (score, right, rejected, unclear)) in enumerate(cases):
        model = Answering(answer, f"model {number}")
        table = explain_features(space, "s", [busiest], model, examples=3, texts=4).table("features")
        assert len(table) == number + 1, "other models' explanations stay"
        row = table[table["model"] == model.name].iloc[0]
        assert (row["explanation"], row["model"]) == ("Odd words", f"model {number}")
        assert (row["score"], row["fires_right"], row["silent_right"]) == (score, right, rejected)
        silent = len(index.silent_examples(busiest, 4, seed=busiest))
        assert row["texts"] == 4 + silent
        assert row["unclear"] == (silent if unclear else 0)
        asked = [prompt for prompt in model.prompts if "<<" in prompt]
        assert len(asked) == 1, "what made the explanation"
        assert asked[0].count("Text ") == 3
        assert marked(feature.groups[0].examples[0], 1) in asked[0]
        assert all("responds to: Odd words\n" in prompt for prompt in model.prompts[1:])


def test_a_model_explains_once_and_another_one_again(space: Workspace, busiest: int) -> None:
    first = Answering(lambda text: "yes")
    steps: list[tuple[int, int]] = []
    explain_features(space, "s", [busiest, DEAD, busiest], first, texts=0, on_progress=lambda *step: steps.append(step))
    assert steps == [(1, 2), (2, 2)]
    assert len(first.prompts) == 1, "dead features are passed over"
    explain_features(space, "s", [busiest], first, texts=0)
    assert len(first.prompts) == 1
    told = FeatureIndex.open(space, "s").feature(busiest).explanation
    assert told is not None
    assert (told.explanation, told.score) == ("Odd words", None)
    explain_features(space, "s", [busiest], Answering(lambda text: "yes", "other"))
    told_by = FeatureIndex.open(space, "s").feature(busiest).explanations
    assert [(one.model, one.score) for one in told_by] == [("other", 0.5), (first.name, None)]


def test_a_good_explanation_labels_the_feature_and_a_bad_one_shows(space: Workspace, busiest: int) -> None:
    feature = FeatureIndex.open(space, "s").feature(busiest)
    firing = {"".join(example.tokens) for group in feature.groups for example in group.examples}
    explain_features(space, "s", [busiest], Answering(lambda text: "yes", "worse"))
    index = FeatureIndex.open(space, "s")
    assert busiest not in index.titles()
    assert "detection 0.50, chance 0.50" in index.feature(busiest).to_html()
    explain_features(space, "s", [busiest], Answering(lambda text: "yes" if text in firing else "no"))
    index = FeatureIndex.open(space, "s")
    assert index.titles()[busiest] == index.feature(busiest).name == "Odd words"
    assert index.search("odd w")["feature"].tolist() == [busiest]
    html = index.feature(busiest).to_html()
    assert html.index("detection 1.00, chance 0.50") < html.index("detection 0.50, chance 0.50")


def test_dead_features_alone_and_wrong_numbers_are_refused(space: Workspace, busiest: int) -> None:
    model = Answering(lambda text: "yes")
    with pytest.raises(InputError, match="none of these features of s fires"):
        explain_features(space, "s", [DEAD], model)
    with pytest.raises(InputError, match="feature 999 does not exist"):
        explain_features(space, "s", [999], model)
    with pytest.raises(InputError, match="at least one example"):
        explain_features(space, "s", [busiest], model, examples=0)
    assert not model.prompts


def test_fewer_examples_are_shown_where_all_do_not_fit(space: Workspace, busiest: int) -> None:
    class Narrow(Answering):
        def complete(self, prompt: str, max_tokens: int) -> str:
            if prompt.count("Text ") > 3:
                raise PromptTooLongError("too long")
            return super().complete(prompt, max_tokens)

    model = Narrow(lambda text: "yes")
    explain_features(space, "s", [busiest], model, examples=8, texts=0)
    assert [prompt.count("Text ") for prompt in model.prompts] == [2]
    model = Narrow(lambda text: "yes", "none")
    model.complete = lambda prompt, max_tokens: LocalModel.complete(demo, "word " * 600, 8)  # type: ignore[method-assign]
    demo = LocalModel("demo", device="cpu")
    with pytest.raises(PromptTooLongError, match="do not fit"):
        explain_features(space, "s", [busiest], model, texts=0)


@pytest.fixture(scope="module")
def demo_model() -> LocalModel:
    return LocalModel("demo", device="cpu")


@pytest.fixture
def server(demo_model: LocalModel) -> Iterator[str]:
    """The demo model behind OpenAI's chat protocol."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = demo_model.complete(asked["messages"][0]["content"], asked["max_tokens"])
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            body = {
                "id": "1", "object": "chat.completion", "created": 0, "model": asked["model"], "choices": [choice]
            }  # fmt: skip
            answer = json.dumps(body if self.path == "/v1/chat/completions" else {}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.shutdown()
    httpd.server_close()


def test_a_model_answers_alike_here_and_behind_an_address(demo_model: LocalModel, server: str) -> None:
    pytest.importorskip("openai")
    prompt = "import os\nimport "
    here = demo_model.complete(prompt, 8)
    assert here
    assert Endpoint(server, "served").complete(prompt, 8) == here
    assert "import os" not in here, "the answer alone"


def test_prompts_that_do_not_fit_and_silent_servers_get_one_line(demo_model: LocalModel) -> None:
    with pytest.raises(InputError, match="do not fit into the context of demo, 512 tokens"):
        demo_model.complete("word " * 600, 8)
    pytest.importorskip("openai")
    with pytest.raises(InputError, match="does not answer as gone"):
        Endpoint("http://127.0.0.1:9/v1", "gone").complete("x", 1)
    with pytest.raises(InputError, match="'nowhere' is no address"):
        Endpoint("nowhere", "gone")
    with pytest.raises(InputError, match="no model folder at /nowhere"):
        LocalModel("/nowhere")


def test_the_command_explains_features_of_a_list(
    space: Workspace, busiest: int, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["explain", "s", "--workspace", str(space.path), "--device", "cpu"]
    asked = [*common, "--model", "demo", "--feature", str(busiest), "--examples", "2", "--texts", "2"]
    assert run([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["feature"] for row in found] == [busiest]
    assert found[0]["explanation"]
    assert run(asked) == 0
    assert "in the words of demo" in capsys.readouterr().out
    assert run(["feature", "s", str(busiest), "--workspace", str(space.path)]) == 0
    assert "explained by demo" in capsys.readouterr().out
    for arguments, message in (
        (["--model", "demo"], "with --feature or --list, or ask for --all"),
        (["--model", "demo", "--list", "none"], "no list"),
        (["--model", "/nowhere", "--feature", "1"], "no model folder"),
        (["--model", "", "--feature", "1"], "the model has no name"),
        (["--model", "demo", "--feature", "1", "--all"], "leave --feature and --list out"),
    ):
        assert run([*common, *arguments]) == 2
        assert message in capsys.readouterr().err
