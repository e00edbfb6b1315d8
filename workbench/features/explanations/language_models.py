"""The language models that explain features: one on this machine, or one behind an OpenAI-compatible address.

A server of one's own (vLLM, llama.cpp, Ollama) and hosted models speak the same protocol; the key, where one is
needed, is read from the environment variable OPENAI_API_KEY.
"""

import os
from typing import Any, Protocol

from sae.errors import InputError
from workbench.disk.extras import require

KEY = "OPENAI_API_KEY"


class PromptTooLongError(InputError):
    """A prompt that does not fit into a model's context."""


class LanguageModel(Protocol):
    """What answers a prompt."""

    name: str
    """Stored with every explanation."""

    def complete(self, prompt: str, max_tokens: int) -> str:
        """The answer to a prompt, at most so many tokens, greedily.

        Raises:
            PromptTooLongError: a prompt that does not fit: fewer examples are shown.
            InputError: a server that does not answer.
        """
        ...


class LocalModel:
    """A Hugging Face causal model on this machine; one with a chat template is asked through it.

    Args:
        source: a local folder, a name on the hub, or `demo`.
        device: `auto`, `cpu`, `cuda`, ...

    Raises:
        InputError: nothing that can be loaded there, or weights that the device cannot hold.
    """

    def __init__(self, source: str, device: str = "auto") -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        from workbench.models.checkpoints import from_pretrained, locate, weight_files
        from workbench.models.devices import choose_device
        from workbench.models.memory import check_weights_fit

        self.name = source
        place = choose_device(device)
        location, _ = locate(source)
        self.tokenizer: Any = from_pretrained(AutoTokenizer, location, source)
        stored = getattr(from_pretrained(AutoConfig, location, source), "dtype", None) or torch.float32
        dtype = torch.float32 if place.type == "cpu" else stored
        check_weights_fit(source, weight_files(location, source), stored, dtype, place)
        model = from_pretrained(AutoModelForCausalLM, location, source, dtype=dtype, use_safetensors=True)
        self.model: Any = model.to(place).eval()

    def complete(self, prompt: str, max_tokens: int) -> str:
        """The answer to a prompt, greedily. Raises PromptTooLongError when both do not fit into the context."""
        import torch

        if self.tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        # `verbose`: too long a prompt is told of below.
        ids = self.tokenizer(
            prompt, return_tensors="pt", verbose=False, add_special_tokens=not self.tokenizer.chat_template
        )
        length, most = ids["input_ids"].shape[1], getattr(self.model.config, "max_position_embeddings", None)
        if most is not None and length + max_tokens > most:
            raise PromptTooLongError(
                f"a prompt of {length} tokens and {max_tokens} of answer do not fit into the context of {self.name}, "
                f"{most} tokens: take a model with a longer one"
            )
        with torch.inference_mode():
            made = self.model.generate(
                **ids.to(self.model.device), max_new_tokens=max_tokens, do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
            )  # fmt: skip
        return str(self.tokenizer.decode(made[0, length:], skip_special_tokens=True))


class Endpoint:
    """A model behind an address that speaks OpenAI's chat protocol; needs the extra `autointerp`.

    Args:
        url: of the API, such as `http://localhost:8000/v1`.
        model: its name there.

    Raises:
        InputError: an address that is none, or the package `openai` is not installed.
    """

    def __init__(self, url: str, model: str) -> None:
        require("openai", "asking a server")
        import openai

        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url!r} is no address: expected one such as http://localhost:8000/v1")
        self.name, self.url, self._errors = model, url, openai.OpenAIError
        self._client = openai.OpenAI(base_url=url, api_key=os.environ.get(KEY) or "none", max_retries=3)

    def complete(self, prompt: str, max_tokens: int) -> str:
        """The answer to a prompt, at temperature 0. Raises InputError when the server does not answer."""
        try:
            answer = self._client.chat.completions.create(
                model=self.name, messages=[{"role": "user", "content": prompt}], max_tokens=max_tokens, temperature=0
            )
        except self._errors as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{self.url} does not answer as {self.name}: {reason}") from None
        return (answer.choices[0].message.content if answer.choices else None) or ""
