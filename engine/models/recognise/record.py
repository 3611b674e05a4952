"""One forward pass of a model, watched."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from engine.models.context import ForwardContext
from engine.models.recognise.contexts import RecordingContext
from engine.models.recognise.trace import Call, Trace


def record(model: nn.Module, run: Callable[[ForwardContext], object], context: ForwardContext) -> Trace:
    """The trace of one `run` over `context`."""
    trace = Trace()
    hooks = []
    for name, module in model.named_modules():

        def enter(_: nn.Module, __: tuple[object, ...], name: str = name) -> None:
            trace.running.append(name)

        def leave(
            _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object, name: str = name
        ) -> None:
            trace.running.pop()
            trace.calls.setdefault(name, []).append(Call(args, kwargs, output))

        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        run(RecordingContext(context, trace))
    finally:
        for hook in hooks:
            hook.remove()
    return trace
