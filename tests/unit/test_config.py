"""Configuration files: what is accepted, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import Config, DiffusionConfig, KVConfig, ModelConfig, load, parse_size
from engine.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "a file with spaces.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_defaults_serve_the_demo_model() -> None:
    (engine,) = load().engines()
    model = engine.model
    assert (model.path, model.name) == ("demo", "demo")
    assert (model.device, model.dtype, model.quant, model.attention) == ("auto",) * 4
    assert load() == Config()


def test_a_whole_file(tmp_path: Path) -> None:
    config = load(
        written(
            tmp_path,
            """
            models:
              - {id: a, path: /models/a, memory_share: 0.5, quant: none}
              - {path: org/B-GGUF/b.gguf, memory_share: 0.5, max_model_len: 100}
            scheduler: {max_num_seqs: 3, lag: 1, stall_seconds: 5}
            kv: {memory: 64MiB, prefix_cache: false}
            parallel: {threads: 2}
            server: {port: 9000, anything: [1, 2]}
            """,
        )
    )
    assert [engine.model.name for engine in config.engines()] == ["a", "b"]
    assert all(engine.scheduler.max_num_seqs == 3 and engine.scheduler.lag == 1 for engine in config.engines())
    assert config.scheduler.stall_seconds == 5.0 and isinstance(config.scheduler.stall_seconds, float)
    assert (config.kv.memory_bytes, config.kv.prefix_cache, config.parallel.threads) == (64 * MIB, False, 2)
    assert config.server == {"port": 9000, "anything": [1, 2]}


def test_models_without_a_share_divide_what_the_others_leave(tmp_path: Path) -> None:
    (alone,) = load().engines()
    assert (alone.model.share, alone.core_share, alone.engines) == (1.0, 1.0, 1)
    (small,) = load(overrides=("models.0.memory_share=0.25",)).engines()
    assert (small.model.share, small.core_share) == (0.25, 1.0), "less memory is no reason for fewer cores"
    two = load(written(tmp_path, "models: [{path: a}, {path: b}]")).engines()
    assert [(e.model.share, e.core_share, e.engines) for e in two] == [(0.5, 0.5, 2)] * 2
    three = load(written(tmp_path, "models: [{path: a}, {path: b, memory_share: 0.5}, {path: c}]")).engines()
    assert [e.core_share for e in three] == [0.25, 0.5, 0.25]


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    assert load(written(tmp_path, "# nothing\n")) == Config()


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_shipped_file_loads(file: Path) -> None:
    assert load(file).engines()


def test_overrides_reach_every_depth_and_win_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "models: [{path: demo, quant: fp16}]\nkv: {block_size: 8}")
    overrides = ("models.0.quant=none", "models.0.id=x", "kv.memory=1GiB", "server.port=1", "kv.prefix_cache=false")
    config = load(path, overrides)
    assert config.models == (ModelConfig(path="demo", id="x", quant="none"),)
    assert config.kv == KVConfig(block_size=8, memory="1GiB", prefix_cache=False)
    assert config.server == {"port": 1}


def test_overrides_work_without_a_file() -> None:
    assert load(None, ("models.0.path=/m", "parallel.threads=null")).models[0].path == "/m"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modles: []", "modles: unknown key; known: kv, models, parallel, scheduler, server"),
        ("models: []", "at least one model"),
        ("models: demo", "models: expected a list, got str 'demo'"),
        ("models: [{path: 3}]", "models.0.path: expected str, got int 3"),
        ("models: [{path: a}, {path: b, quantt: none}]", "models.1.quantt: unknown key"),
        ("models: [{reasoning_parser: r2}]", "models.reasoning_parser: 'r2' is not one of auto, none, think, "),
        ("models: [{quant: int3}]", "models.quant: 'int3' is not one of auto, none, fp16, int8, int4, fp8"),
        ("models: [{dtype: half}]", "models.dtype: 'half' is not one of auto, float32, bfloat16, float16"),
        ("models: [{device: gpu}]", "models.device: 'gpu' is not one of auto, cpu, cuda, cuda:N"),
        ("models: [{device: 'cuda:'}]", "models.device: 'cuda:' is not one of"),
        ("models: [{load_format: pickle}]", "models.load_format: 'pickle' is not one of safetensors, dummy"),
        ("models: [{path: a}, {path: x/a}]", "two entries share one id: a, a"),
        ("models: [{path: a, memory_share: 0.7}, {path: b, memory_share: 0.5}]", "the memory shares add up to 1.2"),
        ("models: [{path: a, memory_share: 1}, {path: b}]", "add up to 1 and leave nothing for the models without one"),
        ("models: [{memory_share: 0}]", "models.memory_share: 0.0 is not in (0, 1]"),
        ("scheduler: {max_num_seqs: 0}", "scheduler.max_num_seqs: must be above 0"),
        ("scheduler: {max_num_seqs: true}", "scheduler.max_num_seqs: expected int, got bool True"),
        ("scheduler: {max_num_seqs: 2.0}", "scheduler.max_num_seqs: expected int, got float 2.0"),
        ("scheduler: {lag: 2}", "scheduler.lag: 2 is not 0 or 1"),
        ("scheduler: 3", "scheduler: expected a mapping, got int 3"),
        ("kv: {memory: 3 apples}", "'3 apples' is not a size such as 512MiB"),
        ("kv: {prefix_cache: 1}", "kv.prefix_cache: expected bool, got int 1"),
        ("parallel: {threads: 0}", "parallel.threads: must be above 0"),
        ("parallel: {tensor: 2}", "parallel.tensor: only 1 is supported"),
        ("server: 8000", "server: expected a mapping"),
        ("- a\n- b", "the top level must be a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(written(tmp_path, text))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kv.block_size", "expected key=value"),
        ("=3", "expected key=value"),
        ("kv.size=3", "kv.size: unknown key"),
        ("models.7.path=a", "models.7.path: there is no '7'"),
        ("models.7=a", "models.7: no such key"),
        ("kv.memory.x=a", "kv.memory.x"),
        ("kv.memory=[", "'[' is not valid YAML"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(None, ("kv.memory=1GiB", override))
    assert message in str(raised.value)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no/such/file\.yaml: No such file"):
        load("no/such/file.yaml")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", None),
        (" ", None),
        ("512MiB", 512 * MIB),
        ("2 GB", 2 << 30),
        ("1.5k", 1536),
        ("1048576", MIB),
        ("1T", 1 << 40),
    ],
)
def test_sizes(text: str, size: int | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["MiB", "-1G", "1 G B", "1e9", "0x10", "1PiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


# ---- drafts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draft", "drafter", "name"),
    [
        ("{}", "ngram", ""),
        ("{drafter: auto}", "ngram", ""),
        ("{path: org/Some-Draft}", "auto", "Some-Draft"),
        ("{path: /drafts/one/, drafter: dflash, tree: 32, sample: true}", "dflash", "one"),
    ],
)
def test_drafters(tmp_path: Path, draft: str, drafter: str, name: str) -> None:
    model = load(written(tmp_path, f"models: [{{pipeline: speculative, draft: {draft}}}]")).models[0]
    assert model.draft is not None and (model.draft.drafter, model.draft.name) == (drafter, name)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{draft: {}}", "models.draft: the pipeline 'autoregressive' does not draft; say `pipeline: speculative`"),
        ("{pipeline: speculative}", "models.draft: the speculative pipeline needs a drafter"),
        ("{verifier: {name: rejection}}", "models.verifier: the pipeline 'autoregressive' verifies nothing"),
        ("{pipeline: speculative, draft: {max_draft: 0}}", "models.draft.max_draft: 0 is not in 1 to 64"),
        ("{pipeline: speculative, draft: {max_draft: 65}}", "models.draft.max_draft: 65 is not in 1 to 64"),
        ("{pipeline: speculative, draft: {path: a, tree: 257}}", "models.draft.tree: 257 is not in 0 to 256"),
        ("{pipeline: speculative, draft: {tree: 8}}", "models.draft.tree: the drafter 'ngram' drafts no trees"),
        (
            "{pipeline: speculative, draft: {drafter: ngram, path: a}}",
            "models.draft.path: the drafter 'ngram' reads no checkpoint",
        ),
        ("{pipeline: speculative, draft: {drafters: a}}", "models.0.draft.drafters: unknown key"),
    ],
)
def test_drafts_that_cannot_be(tmp_path: Path, model: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(written(tmp_path, f"models: [{model}]"))
    assert message in str(raised.value)


# ---- diffusion -------------------------------------------------------------------------------------------


def test_what_is_said_of_diffusion(tmp_path: Path) -> None:
    text = (
        "{rule: frechet, knobs: {delta: 0.25}, cache: dual, steps: 8, drafter: org/Fast-7B/, verify: both, shift: true}"
    )
    model = load(written(tmp_path, f"models: [{{pipeline: dual_diffusion, diffusion: {text}}}]")).models[0]
    assert model.diffusion == DiffusionConfig(
        rule="frechet", knobs={"delta": 0.25}, cache="dual", steps=8, drafter="org/Fast-7B/", verify="both", shift=True
    )
    assert model.diffusion.drafter_name == "Fast-7B"


@pytest.mark.parametrize("pipeline", ["autoregressive", "masked_diffusion", "dual_diffusion"])
def test_a_checkpoint_may_say_itself_that_it_denoises(tmp_path: Path, pipeline: str) -> None:
    for text in ("null", "{}", "{rule: quota, mask_id: 0, attention: full}"):
        load(written(tmp_path, f"models: [{{pipeline: {pipeline}, diffusion: {text}}}]"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{pipeline: speculative, draft: {}, diffusion: {}}",
         "diffusion: the pipeline 'speculative' does not denoise; leave"),
        ("{pipeline: masked_diffusion, draft: {}}",
         "draft: the pipeline 'masked_diffusion' does not draft; it denoises"),
        ("{pipeline: dual_diffusion, verifier: {name: block}}",
         "verifier: the pipeline 'dual_diffusion' verifies nothing; it denoises"),
        *((f"{{pipeline: {pipeline}, diffusion: {{{text}}}}}",
           f"diffusion: the pipeline '{pipeline}' does not draft; drafter, drafter_steps, verify and verify_threshold")
          for pipeline in ("masked_diffusion", "autoregressive")
          for text in ("drafter: a", "drafter_steps: 2", "verify: exact", "verify_threshold: 0.5")),
        ("{diffusion: {canvas: 0}}", "diffusion.canvas: 0 is not in 1 to 1048576"),
        ("{diffusion: {steps: 0}}", "diffusion.steps: 0 is not in 1 to 1048576"),
        ("{diffusion: {steps: 300}}", "diffusion.steps: 300 is more than the canvas has tokens (256)"),
        ("{diffusion: {block_length: 1025}}", "diffusion.block_length: 1025 is not in 1 to 1024"),
        ("{pipeline: dual_diffusion, diffusion: {drafter_steps: 1025}}",
         "diffusion.drafter_steps: 1025 is not in 1 to 1024"),
        ("{pipeline: dual_diffusion, diffusion: {verify: twice}}",
         "diffusion.verify: 'twice' is not one of trust, exact,"),
        ("{pipeline: dual_diffusion, diffusion: {verify_threshold: .nan}}",
         "diffusion.verify_threshold: nan is not in [0, 1]"),
        ("{diffusion: {mask_id: -1}}", "diffusion.mask_id: -1 is no token id"),
        ("{diffusion: {attention: causal}}", "diffusion.attention: 'causal' is not one of full, block_causal"),
        ("{diffusion: {cache: radix}}", "diffusion.cache: 'radix' is not one of none, prefix, dual, block"),
        ("{diffusion: {knobs: {delta: fast}}}", "diffusion.knobs.delta: expected a number, got str 'fast'"),
        ("{diffusion: {rules: quota}}", "0.diffusion.rules: unknown key; known: attention, block_length, cache,"),
    ],
)  # fmt: skip
def test_denoising_that_cannot_be(tmp_path: Path, model: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(written(tmp_path, f"models: [{model}]"))
    assert str(raised.value).startswith(f"models.{message}")


def test_paths_are_looked_for_beside_the_file_then_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a checkout, where configs/ and checkpoints/ are siblings; what is found nowhere is left as it is."""
    configs, elsewhere = tmp_path / "configs", tmp_path / "elsewhere"
    for folder in (configs / "near", configs / "both", tmp_path / "both", tmp_path / "checkpoints" / "d", elsewhere):
        folder.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    text = (
        "models: [{path: PATH, pipeline: speculative, draft: {path: DRAFT}, verifier: {name: diversed, head: DRAFT}}]"
    )
    for path, draft, expected in (
        ("near", "checkpoints/d", (configs / "near", tmp_path / "checkpoints/d")),
        ("both", "../checkpoints/d/", (configs / "both", tmp_path / "checkpoints/d")),
        ("org/name", "~/x", ("org/name", "~/x")),
        (tmp_path / "near", "./near", (tmp_path / "near", configs / "near")),
    ):
        file = configs / "a.yaml"
        one = text.replace("PATH", str(path)).replace("DRAFT", draft)
        file.write_text(one)
        for where in (file, Path("../configs/a.yaml")):
            model = load(where).models[0]
            assert model.draft is not None and (model.path, model.draft.path) == tuple(map(str, expected))
            assert model.verifier.head == model.draft.path
        file.write_text(f"models: [{{pipeline: dual_diffusion, diffusion: {{drafter: {draft}}}}}]")
        diffusion = load(file).models[0].diffusion
        assert diffusion is not None and diffusion.drafter == str(expected[1])
        file.write_text(one)
    # Overrides come from the command line, whose paths are those of the working directory.
    model = load(file, ("models.0.path=near", "models.0.draft.path=both")).models[0]
    assert model.draft is not None and (model.path, model.draft.path) == ("near", "both")


@pytest.mark.parametrize(
    "text",
    [
        "models: 3",
        "models: [3]",
        "models: [{path: 3}]",
        "models: [{draft: x}]",
        "models: [{verifier: [x]}]",
        "models: [{diffusion: [x]}]",
    ],
)
def test_paths_of_a_wrong_file_are_no_worse_than_the_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        load(written(tmp_path, text))
