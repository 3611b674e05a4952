"""Configuration: frozen dataclasses, read once from one YAML file. Unknown keys are errors that name the key.

The `server` section belongs to the HTTP side and is passed through unread (`server/settings.py` checks it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from engine.config_values import apply_override, build, find_paths, show
from engine.diffusion import BLOCK_LENGTHS, CACHES, MAX_DRAFTER_STEPS, VERIFIES
from engine.errors import ConfigError
from engine.thinking import FORMS

QUANTS = ("auto", "none", "fp16", "int8", "int4", "fp8")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES = ("auto", "fp32", "fp16", "fp8_e4m3")
GRAPHS = ("auto", "off", "eager")
CACHE_DIR = "~/.cache/slipstream"
TOOL_PARSERS = ("auto", "none", "hermes", "llama3_json", "mistral", "pythonic")
LOAD_FORMATS = ("safetensors", "dummy")
DIFFUSION_PIPELINES = ("masked_diffusion", "dual_diffusion")
MAX_CANVAS = 1 << 20  # tokens
UNTRAINED_DRAFTERS = ("ngram",)  # those that have no checkpoint
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int | None:
    """Bytes of "512MiB", "2 GB" or "1048576" (all units are powers of 1024); None for an empty string."""
    if not text.strip():
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{text!r} is not a size such as 512MiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _last_part(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_knobs(key: str, knobs: Mapping[str, float]) -> None:
    for name, value in knobs.items():
        _require(type(value) in (int, float), f"models.{key}.{name}: expected a number, got {show(value)}")


def _choice(key: str, value: str, known: tuple[str, ...]) -> None:
    _require(value in known, f"models.{key}: {value!r} is not one of {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """Who drafts for a model that is served by a speculative pipeline."""

    drafter: str = "auto"  # a name in registry.DRAFTERS; auto: what the checkpoint is for, or ngram without one
    path: str = ""  # the draft network's checkpoint, for drafters that have one: a folder or a hub id
    max_draft: int | None = None  # most tokens of one draft; requests may ask for fewer. None: what the drafter offers
    tree: int = 0  # most nodes of a draft tree, grown where it pays; 0: chains only
    adaptive: bool = True  # draft and verify as much as pays; false: the whole of every draft, always
    sample: bool = False  # draw drafts of requests with a temperature, for verifiers that weigh laws (rejection)

    def __post_init__(self) -> None:
        most = self.max_draft
        _require(most is None or 0 < most <= 64, f"models.draft.max_draft: {most} is not in 1 to 64")
        _require(0 <= self.tree <= 256, f"models.draft.tree: {self.tree} is not in 0 to 256")
        if self.drafter == "auto" and not self.path:
            object.__setattr__(self, "drafter", "ngram")
        if self.drafter in UNTRAINED_DRAFTERS:
            _require(not self.path, f"models.draft.path: the drafter {self.drafter!r} reads no checkpoint")
            _require(not self.tree, f"models.draft.tree: the drafter {self.drafter!r} drafts no trees")

    @property
    def name(self) -> str:
        """The checkpoint's name without its folders; empty where there is none."""
        return _last_part(self.path)


@dataclass(frozen=True, slots=True)
class VerifierConfig:
    """Which drafted tokens stand where a request does not say otherwise, and how far requests may go."""

    name: str = "strict"
    knobs: Mapping[str, float] = field(default_factory=dict)  # of this verifier; checked when the model is loaded
    head: str = ""  # the trained head of `diversed`: a folder
    max_bias: float = 1.0  # ceiling: most that any request may move a token's law, in total variation

    def __post_init__(self) -> None:
        _require(0 <= self.max_bias <= 1, f"models.verifier.max_bias: {self.max_bias} is not in [0, 1]")
        _check_knobs("verifier.knobs", self.knobs)


@dataclass(frozen=True, slots=True)
class DiffusionConfig:
    """How a masked-diffusion model is decoded where a request does not say; what is left open is the checkpoint's."""

    rule: str = ""  # a name in registry.RULES
    knobs: Mapping[str, float] = field(default_factory=dict)  # of this rule; checked when the model is loaded
    cache: str = ""  # none, prefix or dual for full attention, block or dual for block-causal models
    block_length: int | None = None  # tokens; block-causal models have their own
    canvas: int = 256  # tokens of an answer whose request does not say max_tokens; rounded up to a block
    steps: int | None = None  # of a whole canvas, for rules with a schedule; None: one token a step
    drafter: str = ""  # dual_diffusion: the fast model's folder or hub id; empty: the served model drafts for itself
    drafter_steps: int = 16  # dual_diffusion: denoise steps between two verify steps, at most
    verify: str = "confidence"  # dual_diffusion: trust, exact, confidence, both or masked_copy
    verify_threshold: float = 0.9  # what a drafted token's probability must be to stand
    # What the checkpoint does not say, or says wrongly:
    mask_id: int | None = None
    attention: str = ""  # full or block_causal
    shift: bool | None = None

    def __post_init__(self) -> None:
        _check_knobs("diffusion.knobs", self.knobs)
        bounds = {"canvas": MAX_CANVAS, "steps": MAX_CANVAS, "drafter_steps": MAX_DRAFTER_STEPS}
        for name, most in {**bounds, "block_length": BLOCK_LENGTHS[1]}.items():
            value = getattr(self, name)
            _require(value is None or 1 <= value <= most, f"models.diffusion.{name}: {value} is not in 1 to {most}")
        fits = self.steps is None or self.steps <= self.canvas
        _require(fits, f"models.diffusion.steps: {self.steps} is more than the canvas has tokens ({self.canvas})")
        threshold = self.verify_threshold
        _require(0 <= threshold <= 1, f"models.diffusion.verify_threshold: {threshold} is not in [0, 1]")
        _require(self.mask_id is None or self.mask_id >= 0, f"models.diffusion.mask_id: {self.mask_id} is no token id")
        _choice("diffusion.verify", self.verify, VERIFIES)
        if self.attention:
            _choice("diffusion.attention", self.attention, tuple(CACHES))
        if self.cache:
            _choice("diffusion.cache", self.cache, tuple(dict.fromkeys(sum(CACHES.values(), ()))))

    @property
    def drafts(self) -> bool:
        """Is anything said of drafting and verifying?"""
        names, plain = ("drafter", "drafter_steps", "verify", "verify_threshold"), DiffusionConfig()
        return any(getattr(self, name) != getattr(plain, name) for name in names)

    @property
    def drafter_name(self) -> str:
        """The name of the drafter's checkpoint without its folders; empty where there is none."""
        return _last_part(self.drafter)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One served model, run by one engine process."""

    path: str = "demo"  # Hugging Face folder, GGUF file, hub id, or "demo"
    id: str = ""  # name in the API; default: last part of the path
    pipeline: str = "autoregressive"
    device: str = "auto"  # cpu, cuda or cuda:N; auto: cuda where there is one
    dtype: str = "auto"  # of weights, activations and KV; auto: float32 on a CPU, else the checkpoint's own 16 bits
    # Linear layers on a CPU in float32: exact (none), or their weights packed to fp16, int8 or int4 with the output
    # head in int8; auto: fp16 there, else none
    quant: str = "auto"
    attention: str = "auto"  # a name in registry.ATTENTION; auto: the fastest that runs on the device
    # Decoding steps on a GPU: captured at the start and launched without waiting for results (auto), not so (off), or
    # launched so and not captured (eager, for finding faults; any device)
    graphs: str = "auto"
    load_format: str = "safetensors"  # dummy: random weights of the configuration's shape, to measure with
    # Of the memory that the engine processes of this server may use together, and of its CPU cores where there are
    # several; default: all, and of several models each an even part of what the others leave.
    memory_share: float | None = None
    max_model_len: int | None = None  # default: what the model declares, cut to what the KV pool can hold
    draft: DraftConfig | None = None
    verifier: VerifierConfig = VerifierConfig()
    diffusion: DiffusionConfig | None = None
    # In which form it calls tools; auto: as the chat template says, hermes where it says nothing; none: no tools
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"  # a name in thinking.FORMS; auto: as the tokenizer or the chat template says; none

    def __post_init__(self) -> None:
        speculative, denoises = self.pipeline == "speculative", self.pipeline in DIFFUSION_PIPELINES
        hint = "it denoises" if denoises else "say `pipeline: speculative`, or --draft"
        _require(speculative or not self.draft, f"models.draft: the pipeline {self.pipeline!r} does not draft; {hint}")
        _require(not speculative or self.draft is not None, "models.draft: the speculative pipeline needs a drafter")
        needed = speculative or self.verifier == VerifierConfig()
        _require(needed, f"models.verifier: the pipeline {self.pipeline!r} verifies nothing; {hint}")
        fitting = denoises or self.pipeline == "autoregressive" or self.diffusion is None
        hint = "leave it out, or say `pipeline: masked_diffusion`"
        _require(fitting, f"models.diffusion: the pipeline {self.pipeline!r} does not denoise; {hint}")
        fitting = self.pipeline == "dual_diffusion" or self.diffusion is None or not self.diffusion.drafts
        hint = "drafter, drafter_steps, verify and verify_threshold are for `pipeline: dual_diffusion`"
        _require(fitting, f"models.diffusion: the pipeline {self.pipeline!r} does not draft; {hint}")
        _choice("quant", self.quant, QUANTS)
        _choice("dtype", self.dtype, DTYPES)
        _choice("load_format", self.load_format, LOAD_FORMATS)
        _choice("graphs", self.graphs, GRAPHS)
        _choice("tool_parser", self.tool_parser, TOOL_PARSERS)
        _choice("reasoning_parser", self.reasoning_parser, ("auto", "none", *FORMS))
        known = "auto, cpu, cuda, cuda:N"
        _require(bool(_DEVICE.fullmatch(self.device)), f"models.device: {self.device!r} is not one of {known}")
        _require(0 < self.share <= 1, f"models.memory_share: {self.memory_share} is not in (0, 1]")
        _require(self.max_model_len is None or self.max_model_len > 1, "models.max_model_len: must be above 1")

    @property
    def share(self) -> float:
        return 1.0 if self.memory_share is None else self.memory_share

    @property
    def name(self) -> str:
        return self.id or _last_part(self.path).removesuffix(".gguf")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_num_seqs: int = 64  # sequences that run in one step
    max_batched_tokens: int = 512  # tokens that one step may feed: the chunk size of a long prefill
    max_queued_requests: int = 1024  # waiting in the front process and engine together; more is a 503
    max_queued_tokens: int = 4_194_304  # prompt tokens of those
    lag: int = 0  # results may come this many steps late (0 or 1)
    stall_seconds: float = 120.0  # work queued and no step for this long is a hang, for /health

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_batched_tokens", "max_queued_requests", "max_queued_tokens"):
            _require(getattr(self, name) > 0, f"scheduler.{name}: must be above 0")
        _require(self.lag in (0, 1), f"scheduler.lag: {self.lag} is not 0 or 1")
        _require(self.stall_seconds > 0, "scheduler.stall_seconds: must be above 0")


@dataclass(frozen=True, slots=True)
class KVConfig:
    block_size: int = 16  # tokens per block
    # auto: the model's; fp16 under weights in int8 or int4. fp32, fp16: for models in float32 on a CPU
    dtype: str = "auto"
    memory: str = ""  # size of the pool, as "512MiB"; empty: what is free after the weights, at most 4 GiB
    utilization: float = 0.9  # share of the machine's memory that may be used when `memory` is empty
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        _require(self.block_size > 0, "kv.block_size: must be above 0")
        _require(self.dtype in KV_DTYPES, f"kv.dtype: {self.dtype!r} is not one of {', '.join(KV_DTYPES)}")
        _require(0 < self.utilization <= 1, f"kv.utilization: {self.utilization} is not in (0, 1]")
        parse_size(self.memory)

    @property
    def memory_bytes(self) -> int | None:
        return parse_size(self.memory)


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    replicas: int = 1
    tensor: int = 1
    # CPU threads of each engine process; default: the physical cores, which several divide by their memory shares
    threads: int | None = None

    def __post_init__(self) -> None:
        _require(self.replicas == 1, "parallel.replicas: only 1 is supported in this version")
        _require(self.tensor == 1, "parallel.tensor: only 1 is supported in this version")
        _require(self.threads is None or self.threads > 0, "parallel.threads: must be above 0")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What one engine process is started with."""

    model: ModelConfig = field(default_factory=ModelConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    kv: KVConfig = field(default_factory=KVConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engines: int = 1  # of this server: how many share the machine
    cache_dir: str = ""  # where packed weights are kept between starts; empty: nowhere

    @property
    def cache_folder(self) -> Path | None:
        return Path(self.cache_dir).expanduser() if self.cache_dir else None

    @property
    def core_share(self) -> float:
        """Of the CPU cores: all for the only engine, whatever memory it may take."""
        return self.model.share if self.engines > 1 else 1.0


@dataclass(frozen=True, slots=True)
class Config:
    """A whole configuration file."""

    models: tuple[ModelConfig, ...] = (ModelConfig(),)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    kv: KVConfig = field(default_factory=KVConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    server: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        _require(bool(names), "models: at least one model is needed")
        _require(len(set(names)) == len(names), f"models: two entries share one id: {', '.join(names)}")
        given = [model.memory_share for model in self.models if model.memory_share is not None]
        total = round(sum(given), 9)
        _require(total <= 1, f"models: the memory shares add up to {total:g}, above 1")
        fits = total < 1 or len(given) == len(names)
        _require(fits, f"models: the memory shares add up to {total:g} and leave nothing for the models without one")

    def engines(self) -> tuple[EngineConfig, ...]:
        """One engine configuration per served model, each with a memory share where there are several."""
        count, models = len(self.models), self.models
        if count > 1:
            given = [model.memory_share for model in models if model.memory_share is not None]
            rest = (1.0 - sum(given)) / max(1, count - len(given))
            models = tuple(m if m.memory_share is not None else replace(m, memory_share=rest) for m in models)
        return tuple(EngineConfig(model, self.scheduler, self.kv, self.parallel, count) for model in models)


def load(path: str | Path | None = None, overrides: tuple[str, ...] = ()) -> Config:
    """Read a YAML file (or the defaults) and apply `key.path=value` overrides, for example `models.0.quant=none`.

    Relative paths of models and drafts in the file are looked for in its folder, then in the folder above that, and
    last, as those of overrides, in the working directory.
    Raises ConfigError for a file that is missing or no mapping, an unknown key, or a value of the wrong type.
    """
    data: object = {}
    if path is not None:
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the top level must be a mapping")
    if path is not None:
        find_paths(data, Path(path).resolve().parent)
    for override in overrides:
        apply_override(data, override)
    return build(Config, data, "")
