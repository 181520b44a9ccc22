"""The figures of a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modip_sb3.benchmark.statistics import Estimate

Colors = Mapping[str, Any]


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f'The report needs matplotlib ({error}): run pip install "modip-sb3[benchmark]".') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def make_colors(entries: Sequence[str]) -> Colors:
    """
    :param entries: names of rows
    :return: a colour for each, the same in all figures
    """
    palette = _pyplot().get_cmap("tab10" if len(entries) <= 10 else "tab20")
    return {entry: palette(index) for index, entry in enumerate(entries)}


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    _pyplot().close(figure)


def plot_curves(
    curves: Mapping[str, Mapping[str, tuple[np.ndarray, Estimate]]],
    ylabels: Mapping[str, str],
    xlabel: str,
    colors: Colors,
    path: Path,
) -> None:
    """
    :param curves: for each environment and row, where it was measured ``(P,)`` and what was found ``(P,)``
    :param ylabels: what was measured in each environment
    :param xlabel: what is counted on the x axis
    :param colors: of the rows
    :param path: a PNG file
    """
    figure, grid = _pyplot().subplots(1, len(curves), figsize=(1.5 + 5 * len(curves), 4), squeeze=False)
    for axes, (env, rows) in zip(grid[0], curves.items(), strict=True):
        for entry, (x, estimate) in rows.items():
            marker = "o" if np.ptp(x) == 0 else None  # a clone, over wall time
            axes.plot(x, estimate.value, color=colors[entry], label=entry, marker=marker)
            axes.fill_between(x, estimate.low, estimate.high, color=colors[entry], alpha=0.2, linewidth=0)
        axes.set(title=env, xlabel=xlabel, ylabel=ylabels[env])
        axes.locator_params(axis="x", nbins=6)  # more would touch each other
        axes.grid(alpha=0.3)
    handles = {label: handle for axes in grid[0] for handle, label in zip(*axes.get_legend_handles_labels())}  # noqa: B905
    grid[0][-1].legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    _save(figure, path)


def plot_profiles(
    thresholds: np.ndarray, profiles: Mapping[str, Estimate], xlabel: str, colors: Colors, path: Path
) -> None:
    """
    :param thresholds: ``(T,)``
    :param profiles: share of runs above each ``(T,)``
    :param xlabel: what the thresholds are
    :param colors: of the rows
    :param path: a PNG file
    """
    figure, axes = _pyplot().subplots(figsize=(6.5, 4))
    for entry, profile in profiles.items():
        axes.plot(thresholds, profile.value, color=colors[entry], label=entry)
        axes.fill_between(thresholds, profile.low, profile.high, color=colors[entry], alpha=0.15, linewidth=0)
    axes.set(xlabel=xlabel, ylabel="share of runs above", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    _save(figure, path)


def plot_intervals(estimates: Mapping[str, Estimate], xlabel: str, colors: Colors, path: Path) -> None:
    """
    :param estimates: of each row
    :param xlabel: what was estimated
    :param colors: of the rows
    :param path: a PNG file
    """
    figure, axes = _pyplot().subplots(figsize=(6.5, 1 + 0.4 * len(estimates)))
    for row, (entry, estimate) in enumerate(estimates.items()):
        axes.barh(row, estimate.high - estimate.low, 0.6, estimate.low, color=colors[entry], alpha=0.5)
        axes.vlines(estimate.value, row - 0.3, row + 0.3, color="black")
    axes.set_yticks(range(len(estimates)), list(estimates))
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", alpha=0.3)
    _save(figure, path)


def plot_lines(x: np.ndarray, lines: Mapping[str, np.ndarray], xlabel: str, ylabel: str, path: Path) -> None:
    """
    :param x: ``(N,)``
    :param lines: values by name ``(N,)``
    :param xlabel: what x is
    :param ylabel: what the values are
    :param path: a PNG file
    """
    figure, axes = _pyplot().subplots(figsize=(6.5, 4))
    for name, values in lines.items():
        axes.plot(x, values, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_ylim(0, 1.1 * max(values.max() for values in lines.values()))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)
