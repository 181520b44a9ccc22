"""A dataset's summary as a table, and its distributions as a picture."""

from os import PathLike

import numpy as np
from rich.table import Table
from rich.text import Text

from modip_sb3.datasets.offline import OfflineDataset
from modip_sb3.datasets.summary import DatasetSummary, Spread


def summary_table(summary: DatasetSummary) -> Table:
    """
    The numbers as a table.

    :param summary: Of ``summarize``.
    :return: What ``rich.print`` shows.
    """
    fault = (summary.fault or "the data fits the environment").removeprefix(f"Offline dataset {summary.source}: ")
    rows = {"environment": summary.env_id or "unknown"}
    rows |= {f"observations {key}".strip(): space for key, space in summary.observations.items()}
    rows |= {
        "actions": summary.actions,
        "episodes": f"{summary.num_episodes:,}",
        "transitions": f"{summary.num_transitions:,}",
        "lengths": _spread(summary.lengths, ",.0f"),
        "returns": _spread(summary.returns, ",.1f"),
    }
    if summary.scores is not None:
        rows["normalised scores"] = _spread(summary.scores, ".1f")
    rows |= {
        "terminations": f"{summary.num_terminated:,} episodes",
        "time limits": f"{summary.num_truncated:,} episodes",
        "NaN or infinite": ", ".join(f"{name}: {count:,}" for name, count in summary.non_finite.items()) or "none",
        "action saturation": f"{summary.saturation:.1%} of all entries at the bounds of the {summary.bounds}",
        "check": fault,
    }
    table = Table(title=Text(summary.source), show_header=False)
    for label, value in rows.items():
        table.add_row(label, Text(value))
    return table


def _spread(spread: Spread | None, form: str) -> str:
    if spread is None:
        return "none is finite"
    return ", ".join(f"{name} {format(value, form)}" for name, value in vars(spread).items())


def plot_dataset(dataset: OfflineDataset, path: str | PathLike[str]) -> None:
    """
    Draw the returns, the lengths, the returns over the course of the dataset, and the distribution of the actions.

    :param dataset: Any data; what is not finite is left out.
    :param path: The picture to write, in a format that its suffix names.
    :raises ImportError: If matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (return_axis, length_axis), (course_axis, action_axis) = figure.subplots(2, 2)
    figure.suptitle(dataset.source)
    with np.errstate(invalid="ignore"):  # rewards of both infinities
        returns = dataset.episode_returns
    finite = np.isfinite(returns)
    return_axis.hist(returns[finite], bins=50)
    return_axis.set(xlabel="return", ylabel="episodes")
    length_axis.hist(dataset.episode_lengths, bins=50)
    length_axis.set(xlabel="steps", ylabel="episodes")
    course_axis.plot(np.flatnonzero(finite), returns[finite], ".", markersize=3)
    course_axis.set(xlabel="episode", ylabel="return")
    shares, edges = _action_shares(dataset.actions.reshape(dataset.num_transitions, -1))
    dimensions = np.arange(len(shares) + 1) - 0.5
    mesh = action_axis.pcolormesh(dimensions, edges, shares.T)
    action_axis.set(xlabel="action dimension", ylabel="action")
    action_axis.locator_params(axis="x", integer=True)
    figure.colorbar(mesh, ax=action_axis, label="share")
    figure.savefig(path, dpi=120)


def check_matplotlib() -> None:
    """
    To be asked before the work of loading what is to be drawn.

    :raises ImportError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('Plots need matplotlib, which is missing: pip install "modip-sb3[plots]".') from error


def _action_shares(actions: np.ndarray, num_bins: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Histograms of the finite actions ``(A, bins)``, each summing to one, and their common edges ``(bins + 1,)``."""
    columns = [column[np.isfinite(column)] for column in actions.T]
    filled = [column for column in columns if len(column) > 0]
    low = min((column.min() for column in filled), default=0.0)
    high = max((column.max() for column in filled), default=1.0)
    edges = np.histogram_bin_edges([low, high], num_bins)
    counts = np.array([np.histogram(column, edges)[0] for column in columns])
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), edges
