"""What is seen in the terminal, as lines of a width."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from rich.text import Text

from lipcore.cli.top.reading import Layer, Line, Seen
from lipcore.report.alarms_told import told
from lipcore.report.html import in_words, number, printable, shortened_name

_BARS, _ASCII = "▁▂▃▄▅▆▇█", ".:-=+*#@"
_NAME, _NUMBER = 18, 12
_ROOMY = 10  # lines: parts are kept apart by empty ones
_HOT = math.log(3.0)  # a layer this far from what is usual is marked
_ALARM, _SOFT, _STRONG = "bold red", "dim", "bold"


def lines_of(seen: Seen, width: int, height: int, *, ascii_only: bool = False, live: bool = True) -> list[Text]:
    """Return at most so many lines of at most so many characters."""
    lines = [_head(seen, width), Text()]
    if seen.trouble:
        lines.append(Text(seen.trouble, _ALARM))
    elif not seen.step:
        lines.append(Text("Nothing was recorded yet: this run has no step."))
    if seen.lines and seen.covered.several:
        part = f"; norms are of {seen.covered.model}" if seen.covered.partial else ""
        lines.append(Text(f"of {seen.covered.whose}{part}", _SOFT))
    lines += [_line(line, width, ascii_only) for line in seen.lines]
    lines += [Text(seen.whole)] if seen.whole else []
    foot = [Text("q or Ctrl-C ends this; the training goes on", _SOFT)] if live else []
    events = _events(seen, width)
    room = height - len(lines) - len(foot)
    between = [Text()] if room >= _ROOMY else []
    room -= 2 * len(between)
    most = min(len(events), max(1, room // 3))
    layers = _layers(seen, width, room - most, ascii_only)
    most = max(most, room - len(layers))
    lines += [*between, *layers] if layers else []
    lines += [*between, *events[:most]]
    lines = lines[: max(1, height - len(foot))] + foot
    for line in lines:
        line.plain = printable(line.plain)
        line.truncate(width, overflow="crop" if ascii_only else "ellipsis")
        line.no_wrap = True
    return lines[:height]


def _head(seen: Seen, width: int) -> Text:
    state = "being written" if seen.being_written else "not being written now"
    rate = "" if math.isnan(seen.rate) else f"  {number(seen.rate)} steps/s"
    again = f"  {seen.restarts} restart{'s' * (seen.restarts > 1)}" if seen.restarts else ""
    rest = f"  step {seen.step:,}{rate}{again}  {state}"
    left = Text.assemble((shortened_name(seen.name, max(8, width - len(rest) - 10)), _STRONG), rest)
    clock = time.strftime("%H:%M:%S")
    gap = width - len(left) - len(clock)
    return left + Text(" " * gap + clock, _SOFT) if gap >= 2 else left


def _line(line: Line, width: int, ascii_only: bool) -> Text:
    finite = math.isfinite(line.last)
    value = number(line.last) if finite else "not finite"
    bars = spark(line.values, width - _NAME - _NUMBER - 2, ascii_only=ascii_only)
    return Text.assemble(
        f"{shortened_name(line.name, _NAME - 1):<{_NAME}}",
        (f"{value:>{_NUMBER}}  ", _STRONG if finite else _ALARM),
        (bars, "cyan"),
    )


def _layers(seen: Seen, width: int, most: int, ascii_only: bool) -> list[Text]:
    if not seen.layers or most < 2:
        return []
    name = max(12, min(30, width // 3))
    head = f"{'hottest layers':<{name}}{'update/weight':>14}{'usual':>10}{'furthest':>11}  "
    lines = [Text(f"{head}last steps", _SOFT)]
    shown = seen.layers[: most - 1]
    lines += [_layer(layer, name, width - len(head), ascii_only) for layer in shown]
    rest = len(seen.layers) - len(shown)
    if rest:
        lines[0].append(f" (and {rest} more)", _SOFT)
    return lines


def _layer(layer: Layer, name: int, width: int, ascii_only: bool) -> Text:
    lost, hot = layer.times == math.inf, layer.heat > _HOT
    times = "not finite" if lost else "" if math.isnan(layer.usual) else f"{number(layer.times)} x"
    last = number(layer.last) if math.isfinite(layer.last) else "not finite"
    usual = number(layer.usual) if math.isfinite(layer.usual) else ""
    return Text.assemble(
        f"{shortened_name(layer.name, name - 1):<{name}}{last:>14}{usual:>10}",
        (f"{times:>11}  ", _ALARM if lost or hot else ""),
        (spark(layer.values, width, ascii_only=ascii_only), "cyan"),
    )


def _events(seen: Seen, width: int) -> list[Text]:
    alarms = sum(event.kind == "alarm" for event in seen.events)
    count = f"{alarms} alarm{'s' * (alarms != 1)}" if seen.alarms_on or alarms else "alarms are off"
    lines = [Text(count, _ALARM if alarms else _SOFT)]
    for event in seen.events:
        place = str(event.data.get("place", "")) if event.kind == "alarm" else event.kind
        text = told(event) if event.kind == "alarm" else event.text
        where = "" if place in ("", "total") else f"  {shortened_name(in_words(place), 24)}"
        lines.append(Text(f"step {event.step:,}{where}: {text}"))
    return lines


def spark(values: Any, width: int, *, ascii_only: bool = False) -> str:
    """Return numbers as bars, the newest at the right: the mean of each bin, by logarithms where all are positive and
    far apart; "x" where one is not finite.

    >>> spark(np.array([1.0, 2, 3, 4, 5, 6, 7, 8]), 8)
    '▁▂▃▄▅▆▇█'
    >>> spark(np.array([1.0, np.nan, 100.0, 1.0]), 4, ascii_only=True)
    '.x@.'
    """
    if width < 1 or not len(values):
        return ""
    bars = _ASCII if ascii_only else _BARS
    pieces = np.array_split(np.asarray(values, np.float64), min(width, len(values)))
    means = [float(piece[np.isfinite(piece)].mean()) if np.isfinite(piece).any() else math.nan for piece in pieces]
    lost = [not np.isfinite(piece).all() for piece in pieces]
    known = np.array([mean for mean in means if not math.isnan(mean)])
    if not len(known):
        return "x" * len(pieces)
    log = known.min() > 0 and known.max() > 10 * known.min()
    low, high = (math.log(end) if log else end for end in (known.min(), known.max()))
    shown = []
    for mean, gone in zip(means, lost, strict=True):
        if gone or math.isnan(mean):
            shown.append("x")
            continue
        at = 0.0 if high == low else ((math.log(mean) if log else mean) - low) / (high - low)
        shown.append(bars[min(len(bars) - 1, int(at * len(bars)))])
    return "".join(shown)
