"""One frame of text: the server's line, then a block for each model, as full as there is room for."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from server.top.samples import Look
from server.top.view import Denoising, Drafting, ModelView, Quantiles

EIGHTHS = " ▁▂▃▄▅▆▇█"
PLAIN_EIGHTHS = "  ..::##"
CHART_ROWS = 4
COLUMN = 4  # of the chart: a bar, and room for its number
COLOURS = {"good": "32", "bad": "1;31", "warn": "33", "title": "1", "dim": "2", "bar": "36"}

Span = tuple[str, str]  # text, and a name of COLOURS or ""
Line = list[Span]


class Detail(IntEnum):
    """How much of a model is shown."""

    LEAST = 0  # one line
    SHORT = 1  # what every model has
    BARS = 2  # and drafting in few lines
    FULL = 3  # and the chart


@dataclass(frozen=True, slots=True)
class Screen:
    width: int = 80
    height: int = 24
    colours: bool = False
    blocks: bool = True  # may draw with more than ASCII


def frame(url: str, look: Look | None, models: Sequence[ModelView], notice: str, clock: str, screen: Screen) -> str:
    """Lines that fit the screen, joined by line feeds. `notice` is shown in place of the server's state."""
    head: Line = [("slipstream top ", "title"), (f"{_clean(url)}  ", "")]
    head += [(notice, "bad")] if notice or look is None else _state(look)
    lines = [head, [(f"{clock}  q leaves", "dim"), *(_load(look) if look is not None else [])]]
    lines += _fitting(models, screen.height - len(lines), screen)
    eighths = EIGHTHS if screen.blocks else PLAIN_EIGHTHS
    shown = lines[: screen.height]
    text = "\n".join(_paint(_cut(line, screen.width), screen.colours) for line in shown)
    return text if screen.blocks else text.translate(_ascii(eighths))


def _ascii(eighths: str) -> dict[int, str]:
    return {**{ord(EIGHTHS[i]): eighths[min(i, len(eighths) - 1)] for i in range(len(EIGHTHS))}, ord("…"): "~"}


def _fitting(models: Sequence[ModelView], room: int, screen: Screen) -> list[Line]:
    """The blocks of all models in the richest detail that fits; the first ones, where not even the least does."""
    for detail in sorted(Detail, reverse=True):
        lines = [line for model in models for line in block(model, detail, screen)]
        if len(lines) <= room:
            return lines
    lines = [line for model in models for line in block(model, Detail.LEAST, screen)]
    hidden = len(models) - max(room - 1, 0)
    return [*lines[: max(room - 1, 0)], [(f"… and {hidden} more models", "dim")]]


def block(model: ModelView, detail: Detail, screen: Screen) -> list[Line]:
    name: Line = [(_clean(model.name)[:24], "title"), (" ok " if model.healthy else " NOT HEALTHY ", _mark(model))]
    if detail is Detail.LEAST:
        return [[*name, (f" {_requests(model)}  KV {model.kv_usage:.0%}  out {model.generated_tokens:,.0f}/s", "")]]
    lines: list[Line] = [[], [*name, (f" {_requests(model)}  KV ", ""), *_bar(model.kv_usage, 20, screen)]]
    lines.append(
        [
            (f" tokens/s   in {model.prompt_tokens:8,.1f} ({model.cached_tokens:,.1f} cached)", ""),
            (f"   out {model.generated_tokens:8,.1f}", "title"),
            (f"   prefix hits {_share(model.prefix_hits)}", ""),
        ]
    )
    first, between = _times(model.first_token), _times(model.between_tokens)
    lines.append([(f" latency    first token {first}   between tokens {between}", ""), ("   (50 / 95 %)", "dim")])
    lines.append(
        [
            (f" requests/s {model.finished:.2f}", ""),
            (f"  failed {model.failed:.2f}", "bad" if model.failed else ""),
            (f"  refused {model.refused:.2f}", "warn" if model.refused else ""),
            (f"  preempted {model.preempted:.2f}", "warn" if model.preempted else ""),
        ]
    )
    lines.append([(f" steps      {_times(model.step)}   {_number(model.tokens_per_step)} tokens each", "")])
    if detail >= Detail.BARS:
        lines += _drafting(model.drafting, detail, screen) if model.drafting is not None else []
        lines += _denoising(model.denoising) if model.denoising is not None else []
    return lines


def _state(look: Look) -> Line:
    if look.status == "ok":
        state: Span = ("draining", "warn") if look.draining else ("ready" if look.ready else "not ready", "good")
        return [state]
    return [(f"{look.status}: {_clean(look.reason)}", "bad")]


def _load(look: Look) -> Line:
    limited = [(f"   refused by limits so far: {look.limited:,.0f}", "warn")] if look.limited else []
    return [(f"   requests being answered: {look.server_load}", ""), *limited]


def _drafting(drafting: Drafting, detail: Detail, screen: Screen) -> list[Line]:
    lines: list[Line] = [
        [
            (f" drafts     tokens a round {_number(drafting.tokens)}", "title"),
            (f"   acceptance {_share(drafting.acceptance)}", ""),
            *([] if drafting.positions else [("   nothing was drafted", "dim")]),
        ]
    ]
    places = drafting.positions[: (screen.width - 12) // COLUMN]
    if places and detail is Detail.FULL:
        lines += [[(" " * 12 + row, "bar")] for row in _chart(places)]
        lines.append([(" % by place " + "".join(f"{share * 100:<{COLUMN}.0f}" for share in places), "dim")])
    elif places:
        lines.append([(" by place   ", ""), ("".join(_eighth(share) * 2 + " " for share in places), "bar")])
    if drafting.verifiers:
        head = f" {'verifier':<12}{'rounds/s':>10}{'acceptance':>12}{'tokens/round':>14}{'bias/token':>12}"
        lines.append([(head, "dim")])
    for row in drafting.verifiers:
        numbers = f"{row.rounds:10.1f}{row.acceptance:>12.0%}{row.tokens:14.2f}{row.bias:12.4f}"
        lines.append([(f" {_clean(row.name):<12}{numbers}", "")])
    return lines


def _denoising(denoising: Denoising) -> list[Line]:
    return [
        [
            (f" diffusion  tokens a forward {_number(denoising.tokens_per_forward)}", "title"),
            (f"   a step {_number(denoising.tokens_per_step)}   forwards/s {denoising.forwards:.1f}", ""),
        ],
        [
            (f"            positions a token {_number(denoising.positions_per_token)}", ""),
            (f"   remasked {_share(denoising.remasked)}", ""),
        ],
    ]


def _chart(shares: Sequence[float]) -> Iterable[str]:
    """Bars of eighths, top row first."""
    for row in reversed(range(CHART_ROWS)):
        filled = (min(max(share * CHART_ROWS - row, 0.0), 1.0) for share in shares)
        yield "".join(f"{_eighth(part) * 2:<{COLUMN}}" for part in filled).rstrip()


def _eighth(share: float) -> str:
    return EIGHTHS[round(min(max(share, 0.0), 1.0) * 8)]


def _bar(share: float, width: int, screen: Screen) -> Line:
    filled = round(min(max(share, 0.0), 1.0) * width)
    full, empty = ("█", "░") if screen.blocks else ("#", ".")
    colour = "bad" if share > 0.95 else "warn" if share > 0.8 else "bar"
    return [(full * filled, colour), (empty * (width - filled), "dim"), (f" {share:.0%}", "")]


def _mark(model: ModelView) -> str:
    return "good" if model.healthy else "bad"


def _requests(model: ModelView) -> str:
    return f"running {model.running}  waiting {model.waiting}"


def _times(found: Quantiles) -> str:
    if found.half is None or found.most is None:
        return "-"
    digits = 1 if found.most < 0.1 else 0
    return f"{found.half * 1000:,.{digits}f} / {found.most * 1000:,.{digits}f} ms"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _clean(text: str) -> str:
    """A server's word without what would move the cursor."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _cut(line: Line, width: int) -> Line:
    """As much of a line as `width` columns hold."""
    kept: Line = []
    for text, colour in line:
        taken = ""
        for char in text:
            width -= 2 if unicodedata.east_asian_width(char) in "WF" else 1
            if width < 0:
                return [*kept, (taken, colour)]
            taken += char
        kept.append((taken, colour))
    return kept


def _paint(line: Line, colours: bool) -> str:
    return "".join(
        f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if colours and colour and text else text for text, colour in line
    ).rstrip()
