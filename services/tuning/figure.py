"""Figures of a sweep: metrics against a swept field, or metrics of each setting over images seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from services.tuning.grid import format_value, told
from services.tuning.summary import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE = 8.0
"""Ratio of the largest to the smallest number on an axis above which it is logarithmic."""

_STYLES = ("-", "--", ":", "-.")


def against_field(settings: Sequence[Setting], metrics: Sequence[str], title: str) -> np.ndarray:
    """Plot each metric against the first swept field, with a line per combination of the others; (H, W, 3) uint8.

    Marks are means over seeds; shades (or bars, if the values of the field are words) show the range from minimum to
    maximum.

    Args:
        settings: settings of the whole sweep; if only the seed is swept, the plot has one mark.
        metrics: names of the metrics.
        title: title of the figure.
    """
    settings = [setting for setting in settings if setting.runs]
    field = next(iter(settings[0].values), "seed")
    positions, names = _positions([setting.values.get(field) for setting in settings])
    others = [{key: value for key, value in setting.values.items() if key != field} for setting in settings]
    lines = [other for place, other in enumerate(others) if other not in others[:place]]

    def draw(axis: Axes) -> None:
        for place, line in enumerate(lines):
            own = [index for index, other in enumerate(others) if other == line]
            own.sort(key=lambda index: positions[index])
            x = [positions[index] for index in own]
            for number, name in enumerate(metrics):
                runs = [settings[index].metrics[name] for index in own]
                colour = f"C{place * len(metrics) + number}"
                label = " · ".join(word for word in (_plain(name), told(line)) if word)
                means, lows, highs = (np.array([of(values) for values in runs]) for of in (np.mean, min, max))
                if names is None:
                    axis.plot(x, means, "o-", color=colour, label=label, markersize=4)
                    axis.fill_between(x, lows, highs, color=colour, alpha=0.2)
                else:  # words cannot be interpolated
                    axis.plot(x, means, "o", color=colour, label=label)
                    axis.vlines(x, lows, highs, color=colour, alpha=0.5)
        axis.set_xlabel(field)
        if names is None:
            _scale(axis.set_xscale, positions)
            axis.set_xticks(sorted(set(positions)), [f"{value:g}" for value in sorted(set(positions))])
            axis.minorticks_off()
        else:
            axis.set_xticks(range(len(names)), names)
            axis.margins(x=0.3)
        _scale(axis.set_yscale, [v for s in settings for name in metrics for v in s.metrics[name]])

    return _picture(draw, title, metrics)


def over_images(settings: Sequence[Setting], metrics: Sequence[str], title: str) -> np.ndarray:
    """Plot each metric over images seen, with a colour per setting and a line style per metric; (H, W, 3) uint8.

    Lines are means over seeds; shades show the range from minimum to maximum.
    """
    settings = [setting for setting in settings if setting.runs]

    def draw(axis: Axes) -> None:
        for place, setting in enumerate(settings):
            for number, name in enumerate(metrics):
                curves = setting.curves[name]
                points = min(map(len, curves))
                x = [images for images, _ in curves[0][:points]]
                y = np.array([[value for _, value in curve[:points]] for curve in curves])
                label = " · ".join(word for word in (told(setting.values), _plain(name)) if word)
                axis.plot(x, y.mean(0), _STYLES[number % len(_STYLES)], color=f"C{place}", label=label)
                axis.fill_between(x, y.min(0), y.max(0), color=f"C{place}", alpha=0.15, linewidth=0)
        axis.set_xlabel("images seen")
        values = [v for s in settings for name in metrics for curve in s.curves[name] for _, v in curve]
        _scale(axis.set_yscale, values)

    return _picture(draw, title, metrics)


def _positions(values: Sequence[Any]) -> tuple[list[float], list[str] | None]:
    """Return positions on an axis: numbers, and lists of one number, by value; other values by index, with labels."""
    numbers = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in values]
    if all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        return [float(number) for number in numbers], None
    names = list(dict.fromkeys(format_value(value) for value in values))
    return [float(names.index(format_value(value))) for value in values], names


def _scale(set_scale: Any, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) / min(values) >= WIDE:
        set_scale("log")


def _plain(metric: str) -> str:
    return metric.replace("_", " ")


def _picture(draw: Any, title: str, metrics: Sequence[str]) -> np.ndarray:
    # matplotlib is slow to import and needed only at the end of a sweep.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    draw(axis)
    axis.set_ylabel(_plain(metrics[0]) if len(metrics) == 1 else "")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    if len(axis.get_lines()) > 1:
        axis.legend(fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
