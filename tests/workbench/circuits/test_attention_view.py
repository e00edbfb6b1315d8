"""The view of attention beside the text: what is sent is the model's attention, and text stays text."""

import base64
import html

import pytest
import torch

from sae.errors import InputError
from workbench.circuits.attention_view import attention_view
from workbench.circuits.heads import head_on_text
from workbench.models.load import LoadedModel


def test_what_is_sent_is_the_attention_of_every_head(llama_model: LoadedModel) -> None:
    view = attention_view(llama_model, "import json\nimport json", "a1.h2")
    data = view.data()
    n = len(data["tokens"])
    tokens = torch.tensor([[llama_model.bos_id, *llama_model.encode("import json\nimport json")]])
    _, cache = llama_model.bridge.run_with_cache(tokens)
    assert data["head"] == "a1.h2"
    assert len(data["patterns"]) == len(data["heads"]) == 12
    for number, sent in enumerate(data["patterns"]):
        values = list(base64.b64decode(sent))
        expected = cache[f"blocks.{number // 4}.attn.hook_pattern"][0, number % 4]
        for query in range(n):
            row = values[query * (query + 1) // 2 :][: query + 1]
            for key, value in enumerate(row):
                # A whole number of 255ths of the root.
                assert abs(value / 255 - expected[query, key].sqrt().item()) <= 0.5 / 255 + 1e-6


def test_tokens_cannot_become_markup(gpt2_model: LoadedModel) -> None:
    page = attention_view(gpt2_model, "x = '</script><b>'")._repr_html_()
    frame = html.unescape(page)
    assert page.count("<") == 2
    assert frame.count("</script>") == 1


def test_characters_of_several_tokens_read_as_they_were_written(gpt2_model: LoadedModel) -> None:
    text = "x = '日本'"
    view = attention_view(gpt2_model, text)
    assert "".join(view.tokens[1:]) == text
    assert view.text_to(len(view.tokens) - 1) == text
    assert view.text_to(0) == ""
    found = head_on_text(gpt2_model, "a0.h0", text)
    assert "".join(found.tokens[1:]) == text
    # By itself, in a table, a part of a character is its bytes.
    shown = "".join([*found.copies["token"], *found.copies["promotes"], *found.copies["suppresses"]])
    assert "\ufffd" not in shown
    assert "\\xe6" in "".join(found.copies["token"])


def test_long_texts_are_cut_and_unknown_heads_refused(gpt2_model: LoadedModel) -> None:
    view = attention_view(gpt2_model, "a b c d e f g h", most=4)
    assert view.truncated
    assert len(view.tokens) == 4
    with pytest.raises(InputError, match="a9"):
        attention_view(gpt2_model, "a", "a9.h0")
    with pytest.raises(InputError, match="no token"):
        attention_view(gpt2_model, "")
