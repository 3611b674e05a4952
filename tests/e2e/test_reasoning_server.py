"""A model that thinks, served by the real command: budgets, effort, and grammars behind the thought."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.e2e.conftest import setting_arguments
from tests.e2e.process import ServerProcess
from tests.e2e.wire import Json, assert_idle, error_of, post
from tests.tiny import _COMMON, VOCAB, byte_tokenizer

CHAT = "/v1/chat/completions"
BEGIN, END = VOCAB, VOCAB + 1
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if open is not defined or open %}<think>\n{% endif %}{% endif %}"
)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}


def save_thinker(folder: Path) -> Path:
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    config = LlamaConfig(**{**_COMMON, "vocab_size": VOCAB + 2, "num_hidden_layers": 2}, head_dim=16)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.12)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<think>", "</think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = save_thinker(tmp_path_factory.mktemp("models") / "thinker")
    settings = ("models.0.pipeline=speculative", "models.0.draft.drafter=ngram", "models.0.draft.adaptive=false")
    with ServerProcess(str(folder), *setting_arguments(*settings, "models.0.quant=none")) as server:
        yield server.wait_ready()
        assert_idle(server.url)
        server.assert_clean_end()


def chat(server: ServerProcess, **fields: Any) -> Json:
    """The first choice, with its usage."""
    body = {"messages": [{"role": "user", "content": "hi hi hi"}], "max_tokens": 40, "return_token_ids": True, **fields}
    response = post(server.url, CHAT, body)
    assert response.status_code == 200, response.text
    answer = response.json()
    return {**answer["choices"][0], "usage": answer["usage"]}


@pytest.mark.parametrize("budget", [0, 1, 9])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_budget_ends_the_thought_with_drafts_and_without(
    thinker: ServerProcess, budget: int, temperature: float
) -> None:
    asked = {"thinking_token_budget": budget, "temperature": temperature, "seed": 5, "ignore_eos": True}
    banned = {"logit_bias": {str(END): -100}}  # it would not end by itself
    drafted = chat(thinker, **asked, **banned)
    plain = chat(thinker, **asked, **banned, speculation={"enabled": False})
    assert drafted["token_ids"] == plain["token_ids"] and len(plain["token_ids"]) == 40
    assert plain["token_ids"].index(END) == budget
    assert plain["usage"]["completion_tokens_details"]["reasoning_tokens"] <= budget
    assert ("reasoning" in plain["message"]) <= (budget > 0)
    free = chat(thinker, temperature=temperature, seed=5, ignore_eos=True, **banned)
    assert free["token_ids"][:budget] == plain["token_ids"][:budget] and END not in free["token_ids"]
    assert free["message"]["content"] == "" and free["message"]["reasoning"]
    assert free["usage"]["completion_tokens_details"]["reasoning_tokens"] >= 36


def test_a_stream_tells_the_same_through_the_sdk(thinker: ServerProcess) -> None:
    asked: Any = {"temperature": 0, "extra_body": {"thinking_token_budget": 12, "ignore_eos": True}, "max_tokens": 30}
    messages: Any = [{"role": "user", "content": "so"}]
    with OpenAI(base_url=f"{thinker.url}/v1", api_key="any") as client:
        whole = client.chat.completions.create(model="thinker", messages=messages, **asked)
        message: Any = whole.choices[0].message
        told: dict[str, str] = {"content": "", "reasoning": "", "reasoning_content": ""}
        for chunk in client.chat.completions.create(model="thinker", messages=messages, stream=True, **asked):
            for name in told:
                told[name] += getattr(chunk.choices[0].delta, name, None) or ""
    assert told == {name: getattr(message, name) for name in told}
    assert message.reasoning and message.content
    details = whole.usage.completion_tokens_details if whole.usage else None
    assert details is not None and 0 < (details.reasoning_tokens or 0) <= 12


def test_effort_none_ends_the_thought_at_once(thinker: ServerProcess) -> None:
    for fields in ({"reasoning_effort": "none"}, {"reasoning": {"enabled": False}}, {"enable_thinking": False}):
        choice = chat(thinker, temperature=0, **fields)
        assert choice["token_ids"][0] == END and "reasoning" not in choice["message"]
        assert choice["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("bias", [100, -100])
def test_a_form_holds_behind_the_thought(thinker: ServerProcess, opened: bool, bias: int) -> None:
    """`bias` makes a model whose prompt opens no span do so by itself, or not."""
    for temperature in (0, 0.9):
        asked = {"response_format": FORMAT, "chat_template_kwargs": {"open": opened}, "thinking_token_budget": 6}
        asked |= {"temperature": temperature, "seed": 3, "max_tokens": 300}
        asked |= {"logit_bias": {str(BEGIN): bias}} if not opened else {}
        choice = chat(thinker, **asked)
        assert choice["token_ids"] == chat(thinker, **asked, speculation={"enabled": False})["token_ids"]
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        thinks = opened or bias > 0
        assert (END in choice["token_ids"]) == thinks
        assert (choice["token_ids"][0] == BEGIN) == (thinks and not opened)


def test_completions_have_budgets_too(thinker: ServerProcess) -> None:
    body = {"prompt": ["x", "x<think>", "x<think>y</think>"], "max_tokens": 9, "temperature": 0, "ignore_eos": True}
    asked = {**body, "thinking_token_budget": 3, "return_token_ids": True, "logit_bias": {str(BEGIN): -100}}
    choices = post(thinker.url, "/v1/completions", asked).json()["choices"]
    assert choices[1]["token_ids"][3] == END
    plain = post(thinker.url, "/v1/completions", {**asked, "thinking_token_budget": None}).json()["choices"]
    assert [choices[i]["token_ids"] for i in (0, 2)] == [plain[i]["token_ids"] for i in (0, 2)]


def test_a_model_without_thoughts_says_so(tiny: ServerProcess) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "thinking_token_budget": 5}
    assert error_of(post(tiny.url, CHAT, body))["param"] == "thinking_token_budget"
