"""Tables of everything pluggable: name -> "module:Attribute", imported on first use.

Adding a part is one file and one line here; contract tests are parametrised over these tables. Nothing is
discovered by scanning, so a broken file fails loudly and by name.
"""

from __future__ import annotations

from importlib import import_module

from engine.errors import ConfigError

PIPELINES = {
    "autoregressive": "engine.pipelines.autoregressive:AutoregressivePipeline",
    "speculative": "engine.pipelines.speculative:SpeculativePipeline",
    "masked_diffusion": "engine.pipelines.masked_diffusion:MaskedDiffusionPipeline",
    "dual_diffusion": "engine.pipelines.dual_diffusion:DualDiffusionPipeline",
}
# Around a pipeline whose steps can be launched before the last one's results are read.
RUNNING_AHEAD = {"uniform": "engine.pipelines.uniform:UniformPipeline"}
ATTENTION = {
    "sdpa": "engine.attention.sdpa:SdpaAttention",
    "triton_paged": "engine.attention.triton_paged:TritonPagedAttention",  # what `auto` takes on CUDA devices
    "flash": "engine.attention.flash:FlashAttention",  # only if asked for by name
    "paged_cpu": "engine.attention.paged_cpu:PagedCpuAttention",
}
DRAFTERS = {
    "ngram": "engine.drafters.ngram:NgramDrafter",
    "dflash": "engine.drafters.dflash:DFlashDrafter",
    "eagle3": "engine.drafters.eagle3:Eagle3Drafter",
}
# Drafters with a network: `load(folder, host)` of models.draft_host; they take the network over its pool.
DRAFT_MODELS = {
    "dflash": "engine.models.dflash.model:load",
    "eagle3": "engine.models.eagle3.model:load",
}
VERIFIERS = {
    "strict": "engine.verifiers.strict:StrictVerifier",
    "rejection": "engine.verifiers.rejection:RejectionVerifier",
    "block": "engine.verifiers.block:BlockVerifier",
    "ensemble": "engine.verifiers.ensemble:EnsembleVerifier",
    "diversed": "engine.verifiers.diversed:DiversedVerifier",
    "bounded": "engine.verifiers.bounded:BoundedVerifier",
    "lenient": "engine.verifiers.lenient:LenientVerifier",
    "typical": "engine.verifiers.typical:TypicalVerifier",
    "top_k_gap": "engine.verifiers.top_k_gap:TopKGapVerifier",
}
RULES = {
    "quota": "engine.unmasking.quota:QuotaRule",
    "random": "engine.unmasking.random:RandomRule",
    "entropy": "engine.unmasking.entropy:EntropyRule",
    "margin": "engine.unmasking.margin:MarginRule",
    "threshold": "engine.unmasking.threshold:ThresholdRule",
    "factor": "engine.unmasking.factor:FactorRule",
    "factor_compat": "engine.unmasking.factor_compat:FactorCompatRule",
    "frechet": "engine.unmasking.frechet:FrechetRule",
    "dynamic": "engine.unmasking.dynamic:DynamicRule",
}
WORKERS = {
    "local": "engine.runtime.worker:LocalWorker",
}
# What records the operations of steps for an operator.
PROFILERS = {"torch": "engine.runtime.profiling:TorchTrace"}


def resolve(table: dict[str, str], name: str, what: str) -> object:
    """Import the attribute that `table` holds under `name`. Raises ConfigError naming the known choices."""
    if name not in table:
        raise ConfigError(f"unknown {what} {name!r}; known: {', '.join(sorted(table))}")
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
