"""Figures of a page, drawn by bokeh."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lipcore.report.binned import Binned
from lipcore.report.html import number

#: Told apart by colour-blind people too (Okabe and Ito), and by the dashes.
COLORS = ("#0072b2", "#c77c00", "#007a5a", "#a8457d", "#3a3a3a")
DASHES = ("solid", "dashed", "dotted", "dotdash", "dashdot")
ALARM = "#d55e00"
_LEFT = 150  # pixels before the axis, the same everywhere, so that steps stand under each other
_NAMED = 16  # pixels for the name of the axis of steps
_MOST_ALARMS = 200
_DENSE = 600  # points of a line


def check_installed() -> None:
    """Raise an ImportError that names the extra where bokeh is missing."""
    try:
        import bokeh  # noqa: F401
    except ImportError as error:
        raise ImportError('the report needs bokeh; run: pip install "lipcore[report]"') from error


class Plots:
    """Figures that share the axis of steps, and the script that draws them.

    Args:
        first, last: the steps of the axis.
        alarms: steps that are marked in every figure.
    """

    def __init__(self, first: int, last: int, alarms: Sequence[int] = ()) -> None:
        from bokeh.models import Range1d

        margin = max(1, last - first) * 0.01
        bounds = (first - margin - 0.5, last + margin + 0.5)
        self._steps = Range1d(*bounds, bounds=bounds)
        self._alarms = list(alarms)[:_MOST_ALARMS]
        self._figures: dict[str, Any] = {}

    def lines(
        self, key: str, lines: Sequence[tuple[str, Binned, int]], label: str, *, height: int = 150, log: bool = True
    ) -> None:
        """Add a figure of lines with bands from the least to the greatest value.

        Args:
            key: the figure's name in the page.
            lines: name, numbers and column of each.
            label: of the vertical axis.
            log: draw it on a logarithmic axis where all numbers are positive and far apart.
        """
        from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter, Range1d

        positive = log and _wants_log(lines)
        ends = [array[:, column] for _, numbers, column in lines for array in (numbers.low, numbers.high)]
        figure = self._figure(key, label, height, log=positive)
        if not any(numbers.count[:, column].any() for _, numbers, column in lines):
            figure.y_range = Range1d(0, 1)  # bokeh warns of one that it can make of nothing
        elif not positive and _thousands(ends):
            figure.yaxis.formatter = NumeralTickFormatter(format="0,0.[00]")  # as the axis of steps has them
        if positive:
            _tick_logarithms(figure, _positive(ends))
        _draw_gaps(figure, lines[0][1], lines[0][2])
        for i, (name, numbers, column) in enumerate(lines):
            source = ColumnDataSource(drawn_columns(numbers, column, positive=positive), name=f"{key}-{i}")
            color = COLORS[i % len(COLORS)]
            dash = DASHES[i % len(DASHES)] if numbers.bins <= _DENSE else "solid"  # dashes of points are a fog
            legend = {"legend_label": name} if len(lines) > 1 else {}
            if _spread(numbers, column):
                _draw_band(figure, source, color)
            drawn = figure.line("end", "mean", source=source, color=color, line_dash=dash, line_width=1.6, **legend)
            _draw_single_points(figure, source, color)
            steps = ("steps", "@begin to @end") if numbers.width > 1 else ("step", "@end")
            tips = [steps, (name if len(lines) > 1 else "mean", "@mean{%.4g}")]
            tips += [("least, greatest", "@low{%.4g}, @high{%.4g}")] if _spread(numbers, column) else []
            formats = {f"@{name}": "printf" for name in ("mean", "low", "high")}
            figure.add_tools(HoverTool(renderers=[drawn], mode="vline", tooltips=tips, formatters=formats))
        if len(lines) > 1:
            _legend_above(figure)

    def against(
        self, key: str, lines: Sequence[tuple[str, Any, Any, Any]], label: str, axis: str, *, falls: bool
    ) -> None:
        """Add a figure of curves over an axis of its own.

        Args:
            lines: name, x, y and steps of each.
            label, axis: of the vertical and the horizontal axis.
            falls: x becomes smaller in the course of training, which goes from left to right.
        """
        from bokeh.models import BasicTickFormatter, ColumnDataSource, DataRange1d, HoverTool

        every = np.concatenate([y[np.isfinite(y)] for _, _, y, _ in lines])
        log = bool(len(every) and every.min() > 0 and every.max() > 30 * every.min())
        along = np.concatenate([x for _, x, _, _ in lines])
        log_along = bool(falls and len(along) and along.min() > 0 and along.max() > 10 * along.min())
        figure = self._figure(key, label, 220, log=log, alarms=False, log_steps=log_along)
        if axis != "step":
            figure.x_range = DataRange1d(flipped=falls)
            figure.xaxis.axis_label = axis
            if log_along:
                _tick_logarithms(figure, along, "x")
            else:
                figure.xaxis.formatter = BasicTickFormatter()
        if log:
            _tick_logarithms(figure, every)
        for i, (name, x, y, steps) in enumerate(lines):
            there = np.isfinite(y) & np.isfinite(x)
            columns = {"end": steps, "x": x, "low": y, "mean": y, "high": y}
            data = {column: np.asarray(array)[there].astype(np.float32) for column, array in columns.items()}
            source = ColumnDataSource(data, name=f"{key}-{i}")
            dash = DASHES[i % len(DASHES)] if len(steps) <= _DENSE else "solid"  # dashes of points are a fog
            look = {"color": COLORS[i % len(COLORS)], "line_dash": dash, "line_width": 1.8}
            drawn = figure.line("x", "mean", source=source, legend_label=name, **look)
            tips = [("step", "@end{0,0}"), (label, "@mean{%.4g}"), (axis, "@x{%.4g}")]
            formats = {"@mean": "printf", "@x": "printf"}
            figure.add_tools(HoverTool(renderers=[drawn], mode="mouse", tooltips=tips, formatters=formats))
        _legend_above(figure)

    def band(self, key: str, low: Binned, middle: Binned, high: Binned, column: int, label: str) -> None:
        """Add a figure of a line and the interval around it."""
        from bokeh.models import ColumnDataSource

        lines = [("", low, column), ("", middle, column), ("", high, column)]
        log = _wants_log(lines)
        figure = self._figure(key, label, 150, log=log)
        if log:
            _tick_logarithms(figure, _positive([one.mean[:, column] for one in (low, middle, high)]))
        own = drawn_columns(middle, column, positive=log)
        for name, one in (("low", low), ("high", high)):
            values = dict(zip(one.ends.tolist(), one.mean[:, column].tolist(), strict=True))
            own[name] = np.array([values.get(end, math.nan) for end in own["end"].tolist()], np.float32)
        known = np.isfinite(own["low"]) & np.isfinite(own["high"])
        area = ColumnDataSource({name: own[name][known] for name in ("end", "low", "high")})
        figure.varea("end", "low", "high", source=area, color=COLORS[0], alpha=0.25)
        source = ColumnDataSource(own, name=f"{key}-0")
        figure.line("end", "mean", source=source, color=COLORS[0], line_width=1.6)
        _draw_single_points(figure, source, COLORS[0])

    def map(self, key: str, names: Sequence[str], marks: Sequence[tuple[int, int]], *, height: int) -> None:
        """Add an empty map with a row per name, from top to bottom, which the page's own script colours.

        Args:
            marks: step and row of what is marked.
        """
        from bokeh.models import ColumnDataSource, FixedTicker, Range1d

        rows = len(names)
        figure = self._figure(key, "", height, log=False, alarms=False)
        figure.y_range = Range1d(0, rows, bounds=(0, rows))
        image = ColumnDataSource({"image": [np.zeros((1, 1), np.uint32)], "x": [0.0], "w": [1.0]}, name=f"{key}-image")
        figure.image_rgba("image", "x", 0, "w", rows, source=image)
        every = max(1, math.ceil(rows * 13 / max(height - 40, 1)))
        ticks = {rows - row - 0.5: names[row] for row in range(0, rows, every)}
        figure.yaxis.ticker = FixedTicker(ticks=list(ticks))
        figure.yaxis.major_label_overrides = dict(ticks.items())
        figure.grid.visible = False
        marked = {"x": [step for step, _ in marks], "y": [rows - row - 0.5 for _, row in marks]}
        look = {"fill_color": None, "line_color": "#ffffff", "line_width": 4, "size": 13}
        source = ColumnDataSource(marked)
        figure.scatter("x", "y", source=source, marker="circle", **look)
        figure.scatter("x", "y", source=source, marker="circle", **(look | {"line_color": ALARM, "line_width": 2}))
        at = ColumnDataSource({"x": [], "y": []}, name=f"{key}-cursor")
        figure.scatter("x", "y", source=at, marker="square", fill_color=None, line_color="#000000", size=11)

    def chosen(self, key: str, label: str, end: Any, low: Any, mean: Any, high: Any, span: Any) -> None:
        """Add the figure of the row that is chosen in a map, which the page's own script changes; `span` holds the
        positive numbers of all rows."""
        from bokeh.models import ColumnDataSource, Range1d

        figure = self._figure(key, label, 150, log=bool((high > 0).any()))
        if not (high > 0).any():
            figure.y_range = Range1d(0, 1)
        else:
            _tick_logarithms(figure, span)
        columns = {"low": low, "mean": mean, "high": high, "floor": np.where(low > 0, low, high)}
        data = {name: one.astype(np.float32) for name, one in columns.items()}
        source = ColumnDataSource(data | {"end": end}, name=f"{key}-0")
        _draw_band(figure, source, COLORS[0])
        figure.line("end", "mean", source=source, color=COLORS[0], line_width=1.6)

    def _figure(
        self, key: str, label: str, height: int, *, log: bool, alarms: bool = True, log_steps: bool = False
    ) -> Any:
        from bokeh.models import ColumnDataSource, NumeralTickFormatter
        from bokeh.plotting import figure

        made = figure(
            name=key,
            height=height + _NAMED,
            sizing_mode="stretch_width",
            x_range=self._steps,
            y_axis_type="log" if log else "linear",
            x_axis_type="log" if log_steps else "linear",
            tools="xpan,xbox_zoom,reset,save",
            active_drag="xbox_zoom",
            toolbar_location="right",
            min_border_left=_LEFT,
            output_backend="canvas",
        )
        made.toolbar.logo = None
        made.toolbar.autohide = True
        made.xaxis.axis_label, made.xaxis.axis_label_standoff = "step", 0
        if not log_steps:
            made.xaxis.formatter = NumeralTickFormatter(format="0,0")
        made.yaxis.axis_label = label or None
        made.axis.axis_label_text_font_style = "normal"
        made.axis.axis_label_text_font_size = made.axis.major_label_text_font_size = "12px"
        made.axis.minor_tick_line_color = None
        made.grid.grid_line_alpha = 0.4
        made.outline_line_color = None
        if alarms and self._alarms:
            made.vspan("x", source=ColumnDataSource({"x": self._alarms}), color=ALARM, line_width=1.5, line_dash="4 3")
        self._figures[key] = made
        return made

    def script(self) -> Any:
        """Return what bokeh's embed_items() takes, as JSON has it: each figure in the element "plot-<key>"."""
        from bokeh.core.json_encoder import serialize_json
        from bokeh.document import Document

        document = Document(title="lipcore")
        for figure in self._figures.values():
            document.add_root(figure)
        roots = {figure.id: f"plot-{key}" for key, figure in self._figures.items()}
        item = {"docid": "run", "roots": roots, "root_ids": list(roots)}
        return json.loads(serialize_json({"docs": {"run": document.to_json(deferred=False)}, "items": [item]}))


def _draw_gaps(figure: Any, numbers: Binned, column: int) -> None:
    """Draw the steps grey in which a number is NaN or infinite."""
    from bokeh.models import ColumnDataSource

    bins = np.flatnonzero(numbers.lost[:, column] > 0)
    if not len(bins):
        return
    stretches = np.split(bins, np.flatnonzero(np.diff(bins) > 1) + 1)[:500]
    left = [numbers.first + numbers.width * int(some[0]) - 0.5 for some in stretches]
    right = [float(numbers.ends[some[-1]]) + 0.5 for some in stretches]
    figure.vstrip("left", "right", source=ColumnDataSource({"left": left, "right": right}), color="#d0d0d0", alpha=0.7)


def _draw_single_points(figure: Any, source: Any, color: str) -> None:
    """Draw the points that have no neighbour as such: a line does not show them."""
    from bokeh.models import ColumnDataSource

    there = np.pad(np.isfinite(source.data["mean"]), 1)
    alone = np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:])
    if len(alone):
        points = ColumnDataSource({name: source.data[name][alone] for name in ("end", "mean")})
        figure.scatter("end", "mean", source=points, color=color, size=5)


def _draw_band(figure: Any, source: Any, color: str) -> None:
    """Draw the band from the least to the greatest value, with its edges: a bin of one pixel is seen by them."""
    low = "floor" if "floor" in source.data else "low"
    figure.varea("end", low, "high", source=source, color=color, alpha=0.2)
    for edge in (low, "high"):
        figure.line("end", edge, source=source, color=color, alpha=0.6, line_width=0.8)


def _tick_logarithms(figure: Any, values: Any, along: str = "y") -> None:
    """Mark a logarithmic axis at powers of ten, or between them where there are few; bokeh's own marks run into each
    other, or are few."""
    from bokeh.models import FixedTicker

    if not len(values):
        return
    low, high = (math.log10(end) for end in (values.min(), values.max()))
    between = (1, 2, 5) if high - low < 1.2 else (1, 3) if high - low < 2.5 else (1,)
    every = max(1, round((high - low) / 5))
    powers = [power for power in range(math.floor(low) - 1, math.ceil(high) + 2) if power % every == 0]
    ticks = [factor * 10.0**power for power in powers for factor in between]
    axis, grid = (figure.yaxis, figure.ygrid) if along == "y" else (figure.xaxis, figure.xgrid)
    axis.ticker = FixedTicker(ticks=ticks)
    axis.major_label_overrides = {tick: number(tick) for tick in ticks}
    grid.ticker = FixedTicker(ticks=ticks)


def _positive(arrays: Sequence[Any]) -> Any:
    values = np.concatenate(arrays)
    return values[np.isfinite(values) & (values > 0)]


def _legend_above(figure: Any) -> None:
    figure.legend.orientation = "horizontal"
    figure.legend.padding = figure.legend.margin = 2
    figure.legend.spacing = 14
    figure.legend.background_fill_alpha = 0.6
    figure.legend.border_line_color = None
    figure.legend.label_text_font_size = "11px"
    figure.add_layout(figure.legend[0], "above")


def library() -> str:
    """Return bokeh's JavaScript, as it lies in the package."""
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)


def _spread(numbers: Binned, column: int) -> bool:
    return bool((numbers.low[:, column] < numbers.high[:, column]).any())


def _thousands(ends: Sequence[Any]) -> bool:
    every = np.concatenate(ends)
    every = every[np.isfinite(every)]
    # Closer ones have more decimal places than the format.
    return bool(1000 <= np.abs(every).max(initial=0.0) < 1e9 and np.ptp(every) >= 1)


def _wants_log(lines: Sequence[tuple[str, Binned, int]]) -> bool:
    low = [numbers.low[:, column] for _, numbers, column in lines]
    high = [numbers.high[:, column] for _, numbers, column in lines]
    lows, highs = (np.concatenate(arrays) for arrays in (low, high))
    lows, highs = lows[np.isfinite(lows)], highs[np.isfinite(highs)]
    if not len(lows) or lows.min() < 0:
        return False
    positive = lows[lows > 0]
    return bool(len(positive) > 0.9 * len(lows) and highs.max() > 30 * positive.min())


def drawn_columns(numbers: Binned, column: int, *, positive: bool) -> dict[str, Any]:
    """Return what is drawn of a place: the bins that have anything, NaN where that is not finite, which is a gap.

    On an axis of `positive` numbers the band goes down to "floor": the least positive number, where "low" has none.
    """
    there = np.flatnonzero(numbers.count[:, column] + numbers.lost[:, column] > 0)
    arrays = {"low": numbers.low, "mean": numbers.mean, "high": numbers.high}
    found: dict[str, Any] = {name: array[there, column].astype(np.float32) for name, array in arrays.items()}
    found["begin"] = (numbers.first + numbers.width * there).astype(np.int32)
    found["end"] = numbers.ends[there].astype(np.int32)
    low = found["low"]
    if positive and (low <= 0).any():
        found["floor"] = np.where(low <= 0, low[low > 0].min(initial=np.inf), low)
    return found
