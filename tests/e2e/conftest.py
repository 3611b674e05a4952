"""Servers that several tests share. Each ends with the proof that it leaves nothing behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tests.contract import neural
from tests.e2e.browser import Browser
from tests.e2e.process import ServerProcess
from tests.e2e.scripted import ScriptedServer
from tests.e2e.wire import assert_idle, complete
from tests.tiny import byte_tokenizer, save_tiny, tiny_model
from tests.tiny_drafts import tiny_spec, tiny_tensors
from training.checkpoint import save_zlab

# Chunks and a pool that are small against the load of some tests: they go through chunked prefill and preemption.
TINY_SETTINGS = ("kv.memory=6MiB", "scheduler.max_batched_tokens=128", "scheduler.max_queued_requests=300")
# For slow clients that the tests play; long enough for honest ones on a busy machine.
SHORT_TIMES = ("server.header_timeout=4", "server.body_timeout=2")

LIKED = "x" * 20  # a prompt whose greedy answer has one token many times


def setting_arguments(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama with one token per byte and a context of 512."""
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block-diffusion draft for that llama, in its authors' form, that drafts one token over and over.

    What its layers add is nothing, so it says its own mask; and that is the token which the llama likes best.
    """
    folder, model = tmp_path_factory.mktemp("drafts") / "Tiny-DFlash-b6", tiny_model("llama")
    ids = byte_tokenizer().encode(LIKED).ids
    with torch.inference_mode():
        for _ in range(40):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    favourite = Counter(ids[-40:]).most_common(1)[0][0]
    spec = tiny_spec(model.config, max_position_embeddings=512, mask_token_id=favourite)
    tensors = tiny_tensors(spec)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    save_zlab(folder, spec, tensors, {"num_target_layers": model.config.num_hidden_layers})
    return folder


@pytest.fixture(scope="session")
def demo() -> Iterator[ServerProcess]:
    """`configs/demo.yaml`, as `make serve` starts it."""
    with ServerProcess("--config", "configs/demo.yaml") as server:
        yield server.wait_ready()
        server.assert_clean_end()


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(str(tiny_folder), *setting_arguments(*TINY_SETTINGS, *SHORT_TIMES)) as server:
        yield server.wait_ready()
        server.assert_clean_end()


@pytest.fixture(scope="session")
def drafting(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The same model, exact, always with drafts of random weights, and a pool too small for a dozen long answers."""
    config, folder = AutoConfig.from_pretrained(tiny_folder), tmp_path_factory.mktemp("drafts") / "draft"
    settings = setting_arguments("models.0.quant=none", "kv.memory=3MiB", "scheduler.max_batched_tokens=64")
    settings += setting_arguments("models.0.draft.adaptive=false", "scheduler.lag=1")
    with ServerProcess(str(tiny_folder), "--draft", str(neural.save_dflash(config, folder)), *settings) as server:
        yield server.wait_ready()
        assert_idle(server.url)
        server.assert_clean_end()


@pytest.fixture(scope="session")
def keyed(tiny_folder: Path) -> Iterator[ServerProcess]:
    """The same model with lag 1, behind the key `sk-right`, for at most 40 connections."""
    settings = (*TINY_SETTINGS, "scheduler.lag=1", "server.api_key=sk-right", "server.max_connections=40")
    with ServerProcess(str(tiny_folder), *setting_arguments(*settings)) as server:
        yield server.wait_ready()
        server.assert_clean_end()


@pytest.fixture(scope="session")
def scripted_server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def scripted(scripted_server: ScriptedServer) -> Iterator[ScriptedServer]:
    """A real server whose model says what the test wants it to (`scripted.engine.answer`)."""
    engine = scripted_server.engine
    usual = engine.answer
    yield scripted_server
    engine.answer, engine.refusal = usual, None
    engine.flowing.set()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def unharmed(tiny: ServerProcess) -> Iterator[None]:
    """After the test the same engine process answers as before, and nothing is left in it."""
    engine, before = tiny.engine_pid, complete(tiny.url, "as ever", max_tokens=3)
    yield
    assert_idle(tiny.url)
    assert complete(tiny.url, "as ever", max_tokens=3) == before
    assert tiny.engine_pid == engine
