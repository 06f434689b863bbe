"""What do the numbers look like?

Matplotlib draws, without its pyplot: no window, no backend to choose, and no figure that stays in memory. It is imported where it
is used, for it is slow to import and only needed here. The same numbers give the same bytes: no dates, no random ids, and none of
the user's own settings.
"""

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bit_mixup.errors import ConfigError
from bit_mixup.storage import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bit_mixup.calibration import ReliabilityBins

# Hues of Okabe and Ito, which the colour-blind can tell apart; hatching tells the gaps apart without any colour.
BAR = "#56B4E9"
OVER, UNDER = ("#D55E00", "#F9DCC8"), ("#0072B2", "#E3F0F8")  # edge and face
TITLE_WIDTH = 64  # letters that fit on a line
RESOLUTION = 150  # dots per inch of a PNG
DRAWN_STEPS = 2_000
_CURVES = ("step", "loss", "excess_loss", "lr")
_THEME = {
    "#000000": "currentColor", "#ffffff": "var(--page)", "#dddddd": "var(--line)", "#cccccc": "var(--line)",
    "#777777": "var(--grey)", "#56b4e9": "var(--bar)",
    "#d55e00": "var(--bad)", "#f9dcc8": "var(--over)", "#0072b2": "var(--good)", "#e3f0f8": "var(--under)",
}  # fmt: skip
METADATA = {"png": {"Software": None}, "svg": {"Creator": None, "Date": None}}  # what would change with version and time


@contextmanager
def _settings() -> Iterator[None]:
    """Matplotlib's own defaults with ours on top, whatever the user's configuration; put back afterwards."""
    if find_spec("matplotlib") is None:
        raise ConfigError("drawing needs matplotlib, which is not installed: `pip install matplotlib`.")
    from matplotlib import style

    ours = {"font.size": 9.0, "hatch.linewidth": 0.6, "svg.hashsalt": "bit_mixup"}
    with style.context(["default", ours]):
        yield


def reliability_diagram(bins: "ReliabilityBins", *, title: str) -> "Figure":
    """Accuracy against confidence, above a histogram of confidence; 6 x 6 inches.

    A black line marks the accuracy of a bin, and the hatched gap reaches from there to its mean confidence, which lies near the
    diagonal. The bin of confidence 1 has no width and is drawn as part of the bin before it.

    Args:
        bins: one prediction at least.
        title: plain text; $ and < mean nothing. It takes up to three lines, and what is longer is cut.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    with _settings():
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        figure = Figure(figsize=(6, 6), layout=ConstrainedLayoutEngine(rect=(0, 0.09, 1, 0.91)))
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        bars, width = _bars(bins), bins.edges[1]
        _draw_accuracy(above, bars, width=width)
        _draw_counts(below, bars, width=width)
        above.set_title(_plain(title), loc="left", parse_math=False)
        # Below both, where room was left, for no corner is without bars. A legend that the layout makes room for is elsewhere by
        # a hair when the figure is drawn again.
        figure.legend(*above.get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False)
    return figure


def _plain(title: str) -> str:
    """A title in lines, without control characters. Matplotlib's own wrapping would read formulas into the dollar signs."""
    printable = "".join(letter if letter.isprintable() else " " for letter in title)
    return textwrap.fill(printable, width=TITLE_WIDTH, max_lines=3, placeholder=" ...")


def _bars(bins: "ReliabilityBins") -> npt.NDArray[np.float64]:
    """Left edge, count, mean confidence and accuracy of the bars, (4, bars); bins without predictions have no bar."""
    count = np.array(bins.count)
    sums = count * np.array([bins.confidence, bins.accuracy], dtype=float)
    table = np.vstack([count, np.where(count, sums, 0.0)])
    table[:, -2] += table[:, -1]  # the bin of confidence 1
    left, (count, confidence, accuracy) = np.array(bins.edges[:-1]), table[:, :-1]
    full = count > 0
    return np.stack([left[full], count[full], confidence[full] / count[full], accuracy[full] / count[full]])


def _draw_accuracy(axes: "Axes", bars: npt.NDArray[np.float64], *, width: float) -> None:
    """Bars up to the accuracy, the gaps from there to confidence, and the diagonal."""
    left, _, confidence, accuracy = bars
    axes.bar(left, np.minimum(accuracy, confidence), width, align="edge", color=BAR, edgecolor="white", linewidth=0.8)
    kinds = [
        (OVER, "////", "confidence above accuracy", confidence > accuracy),
        (UNDER, "....", "confidence below accuracy", confidence < accuracy),
    ]
    for (edge, face), hatch, label, chosen in kinds:
        if chosen.any():
            axes.bar(
                left[chosen], (confidence - accuracy)[chosen], width, bottom=accuracy[chosen], align="edge", label=label,
                facecolor=face, edgecolor=edge, hatch=hatch, linewidth=0.8,
            )  # fmt: skip
    axes.hlines(accuracy, left, left + width, color="black", linewidth=2.2, label="accuracy")
    axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="calibrated")
    axes.set(ylim=(0, 1.02), ylabel="accuracy")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)


def _draw_counts(axes: "Axes", bars: npt.NDArray[np.float64], *, width: float) -> None:
    """A histogram of confidence, with the number of predictions on each bar."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    left, count, _, _ = bars
    drawn = axes.bar(left, count, width, align="edge", color="#777777", edgecolor="white", linewidth=0.8)
    axes.bar_label(drawn, [f"{size:.0f}" if size < 10_000 else f"{size / 1000:.0f}k" for size in count], fontsize=7, padding=1)
    axes.set(xlim=(0, 1), ylim=(0, 1.2 * count.max()), xlabel="confidence", ylabel="predictions")
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def training_curves(rows: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]] = ()) -> "Figure":
    """Loss and rate of each step, one above the other; 8 x 4.5 inches.

    A thin line is the loss of a step, a thick one its mean over the last 2 % of the run; of long runs 2,000 steps are drawn.

    Args:
        rows: of `metrics.jsonl`, one at least.
        scores: of `scores.jsonl`; the test loss, where it was measured on the way.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    steps, loss, excess, rate = (np.array([row[name] for row in rows], dtype=float) for name in _CURVES)
    kept = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), DRAWN_STEPS)).astype(int))
    mixed = bool((np.abs(loss - excess) > 1e-6).any())
    with _settings():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        shown_losses = [(loss, UNDER[0], "loss")] + ([(excess, OVER[0], "loss less the entropy of its labels")] if mixed else [])
        for values, colour, label in shown_losses:
            above.plot(steps[kept], values[kept], color=colour, linewidth=0.5, alpha=0.35)
            above.plot(
                steps[kept], _running_mean(values, max(1, len(values) // 50))[kept], color=colour, linewidth=1.8, label=label
            )
        if scores:
            done, nll = ([score[name] for score in scores] for name in ("step", "nll"))
            above.plot(done, nll, color="black", marker="o", markersize=3, linewidth=1, label="test loss")
        above.set(ylabel="nats", ylim=(min(0.0, float(excess.min())), None))
        above.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
        below.plot(steps[kept], rate[kept], color="#777777", linewidth=1.5)
        below.set(xlabel="step", ylabel="rate", ylim=(0, None))
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (above, below):
            axes.grid(axis="y", color="#dddddd", linewidth=0.8)
            axes.set_axisbelow(True)
    return figure


def _running_mean(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """Mean of each value and those before it, `width` in all, or as many as there are."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a figure whole or not at all, making its folder if need be.

    Args:
        figure: any figure of matplotlib's.
        path: ends in .png or .svg.

    Raises:
        ConfigError: another suffix, or matplotlib is not installed.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in METADATA:
        raise ConfigError(f"{path} is no name for a figure; it must end in .png or .svg.")
    write_bytes(path, _rendered(figure, kind))


def figure_svg(figure: "Figure", *, themed: bool = False) -> str:
    """A figure as an <svg> element to put into an HTML page; letters are drawn as shapes and need no font.

    Args:
        figure: any figure of matplotlib's.
        themed: take the page's colours: its text colour for black, and its variables (`page.css`) for all others.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    document = _rendered(figure, "svg").decode("utf-8")
    element = document[document.index("<svg") :]  # a page may not hold the XML declaration and document type before it
    if themed:
        for colour, variable in _THEME.items():
            element = element.replace(f": {colour}", f": {variable}").replace(f'fill="{colour}"', f'style="fill: {variable}"')
    return element


def _rendered(figure: "Figure", kind: str) -> bytes:
    """A file's content; `kind` is "png" or "svg"."""
    with _settings(), io.BytesIO() as file:
        figure.savefig(file, format=kind, dpi=RESOLUTION, metadata=METADATA[kind])
        return file.getvalue()
