"""Served diffusion models as the front process knows them, without torch: cards like those of the real rules."""

from __future__ import annotations

from dataclasses import replace

from engine.diffusion import BLOCK_CAUSAL, FULL, VERIFIES, DiffusionInfo, DiffusionParams, DiffusionSpec, RuleCard
from engine.verification import Knob

MASK, STOP = 90, 91
RULES = (
    RuleCard("quota", "as many as the schedule says", scheduled=True),
    RuleCard("threshold", "all that are likely enough", (Knob("threshold", 0.9, 0.0, 2.0, "least probability"),)),
    RuleCard("factor", "together while sure enough", (Knob("factor", 1.0, 0.0, 64.0, "most error"),)),
    RuleCard("frechet", "by a bound on all of them", (Knob("delta", 0.25, -8.0, 8.0, "margin"),)),
    RuleCard("dynamic", "likely ones and a quota", (Knob("threshold", 0.85, 0.0, 2.0, "exceed"),), scheduled=True),
)
LLADA = DiffusionSpec(FULL, MASK, 8, stop_ids=(STOP,), family="LLaDA")
SDAR = DiffusionSpec(BLOCK_CAUSAL, MASK, 4, rule="dynamic", family="SDAR")
# What settle_server makes of them without any settings, in steps of 48 tokens.
FULL_INFO = DiffusionInfo(
    spec=LLADA,
    defaults=DiffusionParams("threshold", (("threshold", 0.9),), "none", 8, 40),
    rules=RULES,
    max_canvas=48,
    caches=("none", "prefix", "dual"),
)
BLOCK_INFO = DiffusionInfo(
    spec=SDAR,
    defaults=DiffusionParams("dynamic", (("threshold", 0.85),), "block", 4, 256),
    rules=RULES,
    caches=("block", "dual"),
    block_lengths=(4, 4),
)
DUAL_INFO = replace(
    FULL_INFO,
    defaults=replace(FULL_INFO.defaults, cache="dual", drafter_steps=16, verify="confidence", verify_threshold=0.9),
    verifies=VERIFIES,
    caches=("dual",),
)
