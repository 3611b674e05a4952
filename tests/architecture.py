"""The house rules of docs/architecture.md as functions over a source tree; `tests/unit/test_architecture.py` runs them.

Imports are read from the syntax tree, inside functions too: a late import is still an arrow. What stands under
`if TYPE_CHECKING:` is a name for the reader and no arrow.
"""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("server", "engine", "training", "benchmarks")
LIMITS = {"file": 350, "function": 50, "class": 200, "__init__ assignments": 25}
# (file, limit) -> (moved limit, reason).
MOVED_LIMITS: dict[tuple[str, str], tuple[int, str]] = {
    ("engine/protocols.py", "file"): (560, "the one home of all contracts"),
    ("engine/types.py", "file"): (560, "the one home of all shared data: a second file would only add a place to look"),
}

_CONTRACTS = (
    "engine.types",
    "engine.config",
    "engine.errors",
    "engine.protocols",
    "engine.verification",
    "engine.diffusion",
    "engine.records",
    "engine.grammar",
    "engine.thinking",
    "engine.reading",
)
# Room -> the first-party modules it may import; the longest matching room decides, and a room may import itself.
# "engine.x." stands for everything in engine.x; without the dot it is that module alone.
ARROWS: dict[str, tuple[str, ...]] = {
    "server": (*_CONTRACTS, "engine.async_engine", "engine.tokenizer."),
    "engine": (),
    "engine.types": (
        *("engine.verification", "engine.diffusion", "engine.records", "engine.grammar", "engine.thinking"),
        "engine.reading",
    ),
    "engine.grammar": (),
    "engine.thinking": (),
    "engine.records": (),
    "engine.reading": ("engine.records",),
    "engine.verification": (),
    "engine.diffusion": ("engine.verification",),
    "engine.errors": (),
    "engine.config": ("engine.errors", "engine.config_values", "engine.diffusion", "engine.thinking"),
    "engine.config_values": ("engine.errors",),
    "engine.protocols": ("engine.types", "engine.verification", "engine.diffusion"),
    "engine.registry": ("engine.errors",),
    "engine.speculation": _CONTRACTS,
    "engine.denoising": _CONTRACTS,
    "engine.validate_reading": _CONTRACTS,
    "engine.validate": (
        *(*_CONTRACTS, "engine.speculation", "engine.denoising", "engine.validate_reading"),
        *("engine.tokenizer.repetition", "engine.tokenizer.stop_regex"),
    ),
    "engine.core": (*_CONTRACTS, "engine.scheduling.", "engine.speculation", "engine.denoising"),
    "engine.async_engine": (
        *_CONTRACTS,
        *("engine.core", "engine.cluster.", "engine.front.", "engine.tokenizer.", "engine.hub.", "engine.validate"),
        *("engine.structured.check", "engine.structured.wire"),
    ),
    "engine.llm": (
        *(*_CONTRACTS, "engine.core", "engine.registry", "engine.cluster.", "engine.tokenizer.", "engine.hub."),
        *("engine.validate", "engine.front.", "engine.config_values", "engine.structured."),
    ),
    "engine.front": (*_CONTRACTS, "engine.tokenizer."),
    "engine.scheduling": _CONTRACTS,
    "engine.cluster": (*_CONTRACTS, "engine.core", "engine.registry"),
    "engine.tokenizer": _CONTRACTS,
    "engine.hub": _CONTRACTS,
    "engine.kernels": _CONTRACTS,
    "engine.runtime": (*_CONTRACTS, "engine.kernels.", "engine.structured."),
    "engine.runtime.device_memory": (*_CONTRACTS, "engine.runtime.", "engine.models."),
    "engine.runtime.runner": (*_CONTRACTS, "engine.runtime.", "engine.models."),
    "engine.runtime.weights": (*_CONTRACTS, "engine.runtime.", "engine.models."),
    "engine.runtime.devices": (*_CONTRACTS, "engine.registry", "engine.runtime.", "engine.kernels."),
    "engine.runtime.building": (*_CONTRACTS, "engine.runtime.", "engine.models."),
    "engine.runtime.packing": (*_CONTRACTS, "engine.runtime.", "engine.models.", "engine.kernels."),
    "engine.runtime.stored_parts": (*_CONTRACTS, "engine.runtime.", "engine.models.", "engine.kernels."),
    "engine.runtime.stored_backbone": (*_CONTRACTS, "engine.runtime.", "engine.models."),
    "engine.runtime.weight_store": (*_CONTRACTS, "engine.runtime.", "engine.models.", "engine.kernels."),
    "engine.runtime.loading": (*_CONTRACTS, "engine.runtime.", "engine.models.", "engine.hub.diffusion"),
    "engine.runtime.assembly": (
        *(*_CONTRACTS, "engine.registry", "engine.runtime.", "engine.speculation"),
        "engine.structured.",
    ),
    "engine.runtime.denoising": (*_CONTRACTS, "engine.runtime.", "engine.hub."),
    "engine.runtime.drafts": (*_CONTRACTS, "engine.registry", "engine.runtime.", "engine.models.", "engine.hub."),
    "engine.runtime.running_ahead": (*_CONTRACTS, "engine.registry", "engine.runtime.", "engine.models."),
    "engine.runtime.worker": (
        *(*_CONTRACTS, "engine.registry", "engine.runtime.", "engine.models.", "engine.hub.", "engine.structured."),
    ),
    "engine.attention": (
        *(*_CONTRACTS, "engine.runtime.batch", "engine.runtime.kv_cache", "engine.runtime.transfer"),
        "engine.kernels.",
    ),
    "engine.models": (*_CONTRACTS, "engine.runtime.batch", "engine.runtime.kv_cache", "engine.kernels."),
    **dict.fromkeys(
        ("engine.models.program", "engine.models.program_parts"),
        (
            *(*_CONTRACTS, "engine.models.", "engine.kernels.", "engine.runtime.kv_cache"),
            "engine.runtime.linear",
        ),
    ),
    "engine.models.draft_files": (*_CONTRACTS, "engine.models.", "engine.hub.resolve"),
    "engine.models.fingerprint": (*_CONTRACTS, "engine.models.", "engine.hub.resolve"),
    "engine.pipelines": (
        *(*_CONTRACTS, "engine.runtime.batch", "engine.runtime.sampler", "engine.runtime.rng"),
        *("engine.runtime.truncation", "engine.kernels.certainty", "engine.structured."),
    ),
    "engine.pipelines.uniform": (*_CONTRACTS, "engine.pipelines.", "engine.runtime.", "engine.structured."),
    "engine.drafters": (*_CONTRACTS, "engine.kernels."),
    "engine.verifiers": _CONTRACTS,
    "engine.unmasking": _CONTRACTS,
    "engine.structured": (*_CONTRACTS, "engine.tokenizer."),
    "training": ("engine.",),
    "benchmarks": ("engine.", "training.tasks."),
    "benchmarks.front_server": ("benchmarks.", "engine.", "server.cli"),  # it is the server, with a watch
    "benchmarks.serve": ("benchmarks.", "server.settings"),  # the API key may stand in the environment
}

_TENSOR_ROOMS = tuple(
    f"engine.{room}."
    for room in (
        "runtime",
        "attention",
        "kernels",
        "models",
        "pipelines",
        "drafters",
        "verifiers",
        "unmasking",
        "structured",
    )
)
# Third-party package -> where it may be imported.
HOMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "pydantic", "pydantic_settings"), ("server.", "benchmarks.")),
    # benchmarks.agreement compares with the reference implementation, which is transformers itself.
    # benchmarks.step_* are run by the tensor side's own means; benchmarks.step names them once torch may be imported.
    **dict.fromkeys(
        ("torch", "triton", "transformers"),
        (
            *(*_TENSOR_ROOMS, "training.", "benchmarks.agreement", "benchmarks.fusion", "benchmarks.matrix"),
            "benchmarks.attention",
            "benchmarks.host_rig",
            *(f"benchmarks.step_{part}" for part in ("cases", "ceilings", "parts", "graphs")),
            *(
                "benchmarks.quality",
                "benchmarks.quality_measures",
                "benchmarks.performance_products",
                "benchmarks.performance_peaks",
            ),
            "benchmarks.diffusion_products",
        ),
    ),
    "flash_attn": ("engine.attention.flash",),
    "flash_attn_interface": ("engine.attention.flash",),
    "prometheus_client": ("server.",),
    "opentelemetry": ("server.otel",),
}
ENVIRONMENT_READERS = ("server.settings", "engine.cluster.process")
PRINTERS = ("server.cli", "server.client", "server.startup", "benchmarks.", "training.")
SEALED_CLASSES = ("EngineCore", "AsyncEngine", "LLM", "Scheduler")
FILLED_INITS = ("server/routes/__init__.py",)
BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")  # where statements hold others
SUSPICIOUS = ("environ", "getenv", "putenv", "print")  # what only an expression can be guilty of


@dataclass(frozen=True)
class Source:
    """One parsed file. `module` is its dotted name, `path` relative to the tree.

    `statements`: all of them, each with whether it can run, as the bodies of `if TYPE_CHECKING:` do not. Expressions
    are worth a walk only where the text holds one of `SUSPICIOUS`: that takes a tenth of the time.
    """

    module: str
    path: str
    lines: int
    tree: ast.Module
    statements: tuple[tuple[ast.AST, bool], ...]
    suspicious: bool


def sources(root: Path) -> list[Source]:
    """Every Python file of the packages below `root`."""
    gc.disable()  # none of a million nodes is garbage: looking for some would take twice as long as parsing
    try:
        return list(_parsed(root))
    finally:
        gc.enable()


def _parsed(root: Path) -> Iterator[Source]:
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            path = file.relative_to(root).as_posix()
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            text = file.read_text(encoding="utf-8")
            tree = ast.parse(text, path)
            suspicious = any(word in text for word in SUSPICIOUS)
            yield Source(module, path, text.count("\n"), tree, tuple(_statements(tree)), suspicious)


def _statements(tree: ast.AST, runs: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every statement, handler and case, each before what is inside it."""
    typing = isinstance(tree, ast.If) and ast.unparse(tree.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    for block in BLOCKS:
        children = getattr(tree, block, ())
        if isinstance(children, list):
            for child in children:
                inside = runs and not (typing and block == "body")
                yield child, inside
                yield from _statements(child, inside)


def within(module: str, places: tuple[str, ...]) -> bool:
    """Is `module` one of `places`, or below one that ends in a dot?"""
    return any(
        f"{module}." == place or module == place or (place[-1] == "." and module.startswith(place)) for place in places
    )


def imports(source: Source, known: frozenset[str]) -> Iterator[str]:
    """The modules that running `source` can import, dotted. `known` tells a submodule from an attribute."""
    for node, runs in source.statements:
        if not runs:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                is_package = source.path.endswith("__init__.py")
                parts = source.module.split(".")
                kept = parts[: len(parts) - node.level + is_package]
                module = ".".join([*kept, *([module] if module else [])])
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                yield submodule if submodule in known else module


def arrow_violations(files: list[Source]) -> Iterator[str]:
    """Imports between rooms that the design has no arrow for, and third-party packages outside their home."""
    known = frozenset(source.module for source in files)
    for source in files:
        room = max((r for r in ARROWS if within(source.module, (r, f"{r}."))), key=len)
        itself = (room, *(() if room == "engine" else (f"{room}.",)))
        for target in imports(source, known):
            package = target.partition(".")[0]
            if package in PACKAGES:
                if target not in PACKAGES and not within(target, (*itself, *ARROWS[room])):
                    yield f"{source.path}: {room} may not import {target}"
            elif not within(source.module, HOMES.get(package, (source.module,))):
                yield f"{source.path}: {package} is imported outside its home"


def size_violations(files: list[Source]) -> Iterator[str]:
    """Files, functions, classes and constructors over their limit."""
    for source in files:
        yield from _over(source, "file", source.path, source.lines)
        for node, _ in source.statements:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _over(source, "function", node.name, _length(node))
                if node.name == "__init__":
                    yield from _over(source, "__init__ assignments", node.name, _attributes_set(node))
            elif isinstance(node, ast.ClassDef):
                yield from _over(source, "class", node.name, _length(node))


def habit_violations(files: list[Source]) -> Iterator[str]:
    """Environment reads, prints, `global`, mixins, subclasses of the engine, and filled `__init__.py` files."""
    for source in files:
        if source.path.endswith("__init__.py") and source.tree.body and source.path not in FILLED_INITS:
            yield f"{source.path}: this __init__.py must be empty"
        nodes = ast.walk(source.tree) if source.suspicious else (node for node, _ in source.statements)
        for node in nodes:
            if isinstance(node, ast.stmt | ast.expr) and (habit := _bad_habit(node, source.module)):
                yield f"{source.path}:{node.lineno}: {habit}"


def _bad_habit(node: ast.stmt | ast.expr, module: str) -> str:
    """What is wrong with one node of `module`; empty if nothing is."""
    if _reads_environment(node) and not within(module, ENVIRONMENT_READERS):
        return "the environment is read outside server/settings.py"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
        return "" if within(module, PRINTERS) else "print"
    if isinstance(node, ast.Global):
        return f"a module global that mutates: {', '.join(node.names)}"
    if isinstance(node, ast.ClassDef):
        bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        if any("mixin" in name.lower() for name in (node.name, *bases)):
            return f"{node.name} is a mixin"
        if bases & set(SEALED_CLASSES):
            return f"{node.name} is a subclass of the engine"
    return ""


def _over(source: Source, limit: str, name: str, size: int) -> Iterator[str]:
    allowed, _ = MOVED_LIMITS.get((source.path, limit), (LIMITS[limit], ""))
    if size > allowed:
        yield f"{source.path}: {limit} {name} has {size}, the limit is {allowed}"


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _attributes_set(init: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many `self.x = ...` a constructor holds."""
    targets: list[ast.expr] = []
    for node in ast.walk(init):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                targets.extend(target.elts if isinstance(target, ast.Tuple) else [target])
        elif isinstance(node, ast.AnnAssign):
            targets.append(node.target)
    return sum(isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id == "self" for t in targets)


def _reads_environment(node: ast.AST) -> bool:
    names = {"environ", "environb", "getenv", "putenv"}
    if isinstance(node, ast.Attribute):
        return node.attr in names and isinstance(node.value, ast.Name) and node.value.id == "os"
    return isinstance(node, ast.ImportFrom) and node.module == "os" and any(a.name in names for a in node.names)
