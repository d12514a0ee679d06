"""Draws groups of runs as matplotlib figures. Nothing is written to disk here."""

import collections
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from halrp_jax import metrics
from halrp_jax.reports import paper, records, tables
from halrp_jax.reports.records import Group, Run

_MARKERS = "osD^v<>Pp*Xhd8H"
_HALRP = "black"
_PER_ROW = 4  # axes in a row of a figure
_READABLE = 12  # most tasks for which the accuracies are written into the squares


class Picture(NamedTuple):
  """A figure with its caption."""

  name: str  # name of its file without the suffix
  caption: str
  figure: Figure


class Panel(NamedTuple):
  """The groups that are drawn together: one per method."""

  name: str  # part of the names of its figures' files
  title: str
  groups: dict[str, Group]  # label -> group


def draw(groups: list[Group], catalogue: paper.Catalogue) -> list[Picture]:
  """Draws all figures for which the groups have the numbers."""
  pictures: list[Picture] = []
  for panel in panels(groups, catalogue):
    for make in (matrices, growth, tradeoff, by_task, forgetting_by_order, ranks, time, memory):
      if (figure := make(panel)) is not None:
        name = f"{make.__name__.replace('_', '-')}-{panel.name}"
        pictures.append(Picture(name, f"{_CAPTIONS[make.__name__]}: {panel.title}", figure))
  return pictures + forgetting(groups, catalogue) + lambdas(groups)


_CAPTIONS = {
  "matrices": "Accuracy on every task after every task, one run each",
  "growth": "Growth of the model (paper Fig. 3a), mean over runs",
  "tradeoff": "Accuracy against size, mean over runs with standard errors",
  "by_task": "Accuracy of every task, mean and range over the orders (the range is the OPD)",
  "forgetting_by_order": "Backward transfer by order (paper Fig. 5 and 6)",
  "ranks": "Chosen ranks, one run each",
  "time": "Accumulated training time (paper Fig. 3b), mean over runs",
  "memory": "Peak memory while a task is learned (paper Fig. 7), mean over runs",
}


def panels(groups: list[Group], catalogue: paper.Catalogue) -> list[Panel]:
  """Chooses the groups that are drawn together.

  There is one panel per benchmark, network and fraction of the training images, with one group per
  method. The setting of the config file and its variants (`records.VARIANTS`) come first, then
  other settings. Among several, the one with most runs is chosen. The labels name what differs from
  the config file.
  """
  found: dict[tuple[str, str, float, bool], dict[str, list[Group]]] = {}
  for group in groups:
    key = (group.benchmark, group.network, group.fraction, group.partial)
    found.setdefault(key, {}).setdefault(group.method, []).append(group)
  result: list[Panel] = []
  for (benchmark, network, fraction, partial), by_method in sorted(found.items()):
    chosen: dict[str, Group] = {}
    for method in _in_order(by_method):
      candidates = [(tables.difference(g, catalogue), g) for g in by_method[method]]
      difference, group = min(
        candidates,
        key=lambda x: (x[0] not in records.VARIANTS, -len(x[1].runs), x[0] != "", len(x[0])),
      )
      chosen[_label(method, difference)] = group
    title = f"{benchmark}, {network}, {100 * fraction:g} % of the images"
    name = f"{benchmark}-{network}-{100 * fraction:g}"
    if partial:
      title, name = f"{title}, PARTIAL DATA", f"{name}-partial"
    result.append(Panel(name.replace("_", "-"), title, chosen))
  return result


def _in_order(names: Iterable[str]) -> list[str]:
  """Returns names of methods sorted: the paper's methods in its order, then others by name."""
  known = list(paper.LABELS)
  return sorted(names, key=lambda n: (known.index(n) if n in known else len(known), n))


# --- drawing --------------------------------------------------------------------------


def _style(group: Group) -> dict[str, Any]:
  """Returns colour and marker of a method, which are the same in all figures."""
  known = list(paper.LABELS)
  i = known.index(group.method) if group.method in known else len(known)
  color = _HALRP if group.method == "halrp" else colormaps["tab20"](i % 20)
  return {"color": color, "marker": _MARKERS[i % len(_MARKERS)]}


def _single(width: float = 7.5, height: float = 4.2) -> tuple[Figure, Axes]:
  """Makes a figure with a single set of axes. Sizes are in inches."""
  figure = Figure((width, height), layout="constrained")
  return figure, figure.subplots()


def _legend(figure: Figure, axes: Axes) -> None:
  """Draws the legend beside the axes and makes the figure high enough for it."""
  handles, labels = axes.get_legend_handles_labels()
  lines = sum(label.count("\n") + 1 for label in labels)
  figure.set_figheight(max(figure.get_figheight(), 0.3 + 0.14 * lines + 0.06 * len(labels)))
  figure.legend(handles, labels, loc="outside right upper", fontsize=8)


def _grid(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
  """Makes a figure with `count` axes in rows. Sizes of one set of axes are in inches."""
  columns = min(count, _PER_ROW)
  rows = -(-count // columns)
  figure = Figure((width * columns + 0.8, height * rows + 0.4), layout="constrained")
  axes = list(figure.subplots(rows, columns, squeeze=False).flat)
  for spare in axes[count:]:
    spare.set_axis_off()
  return figure, axes[:count]


def _heat(
  axes: Axes,
  values: np.ndarray,
  decimals: int,
  write: bool,
  *,
  vmin: float | None = None,
  vmax: float | None = None,
  cmap: str | None = None,
) -> AxesImage:
  """Draws a matrix as coloured squares, NaN white.

  Args:
    axes: where to draw.
    values: the matrix.
    decimals: decimals of the numbers in the squares.
    write: whether the numbers are written into the squares.
    vmin: value of the first colour; None: the smallest one of the matrix.
    vmax: value of the last colour; None: the largest one of the matrix.
    cmap: name of matplotlib's colour map; None: its default.
  """
  shown = np.ma.masked_invalid(values)
  image = axes.imshow(shown, aspect="auto", vmin=vmin, vmax=vmax, cmap=cmap)
  if write:
    for (y, x), value in np.ndenumerate(values):
      if np.isfinite(value):
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
        colour = "white" if dark else "black"
        text = f"{value:z.{decimals}f}"
        axes.text(x, y, text, ha="center", va="center", fontsize=6, color=colour)
  return image


def _ticks(count: int) -> list[int]:
  """Returns the indices, out of `count`, of at most ten ticks."""
  return list(range(0, count, -(-count // 10)))


def _scale_sizes(axis: XAxis | YAxis) -> None:
  """Makes the axis of model sizes logarithmic if they differ by a factor of 3 or more."""
  low, high = axis.get_data_interval()
  if high < 3 * low:
    return
  axis.axes.set(**{f"{axis.axis_name}scale": "log"})
  axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axis.set_major_formatter("{x:g}")
  axis.set_minor_formatter(NullFormatter())


def _count_tasks(axes: Axes) -> None:
  """Labels the x axis as the number of tasks learned."""
  axes.set_xlabel("tasks learned")
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _label(method: str, difference: str) -> str:
  """Returns the name of a method with short lines for what differs from its config file."""
  label = paper.LABELS.get(method, method)
  keys = [key.removeprefix("method.") for key in difference.split(", ") if key]
  keys = keys if len(keys) <= 2 else [f"{len(keys)} other keys"]
  return "\n".join([label, *(f"({k})" for k in keys)])


# --- figures of one panel -------------------------------------------------------------


def matrices(panel: Panel) -> Figure:
  """Draws the accuracy matrix of one run per method."""
  figure, axes = _grid(len(panel.groups), 3.0, 2.9)
  runs = {label: group.runs[0] for label, group in panel.groups.items()}
  top = np.nanmax([np.nanmax(run.accuracy) for run in runs.values()])
  low = np.nanmin([np.nanmin(run.accuracy) for run in runs.values()])
  image: AxesImage | None = None
  for ax, (label, run) in zip(axes, runs.items(), strict=True):
    count = len(run.task_ids)
    image = _heat(ax, run.accuracy, 0, count <= _READABLE, vmin=low, vmax=top)
    ax.set_title(f"{label}, order {_short_order(run)}", fontsize=8)
    ax.set_xticks(_ticks(count), [str(i + 1) for i in _ticks(count)], fontsize=7)
    ax.set_yticks(_ticks(count), [str(i + 1) for i in _ticks(count)], fontsize=7)
    ax.set_xlabel("tested on task (as trained)", fontsize=7)
    ax.set_ylabel("after task", fontsize=7)
  assert image is not None  # a panel has at least one group
  figure.colorbar(image, ax=axes, label="accuracy (%)")
  return figure


def _short_order(run: Run) -> str:
  """Returns the task order of a run as a short text."""
  order = run.record["order"]
  return order if len(order) < 12 else "as listed"


def growth(panel: Panel) -> Figure:
  """Draws the model size over the number of tasks learned."""
  figure, axes = _single()
  for label, group in panel.groups.items():
    curves = [1 + np.array(run.record["increment"]) for run in group.runs]
    _line(axes, group, label, np.mean(curves, 0))
  _scale_sizes(axes.yaxis)
  _count_tasks(axes)
  axes.set_ylabel("model size (base network = 1)")
  axes.grid(alpha=0.3, which="both")
  _legend(figure, axes)
  return figure


def _line(axes: Axes, group: Group, label: str, values: np.ndarray) -> None:
  """Draws values over the tasks, or a single value (of joint training) at the last task."""
  count = len(group.runs[0].task_ids)
  x = range(1, count + 1) if len(values) == count else [count]
  every = -(-count // 20)
  axes.plot(x, values, label=label, markersize=4, markevery=every, **_style(group))


def tradeoff(panel: Panel) -> Figure:
  """Draws the average accuracy over the model size, a point per method."""
  figure, axes = _single()
  for label, group in panel.groups.items():
    accuracy = records.number(group, "accuracy")
    size = records.number(group, "increment")
    assert accuracy is not None and size is not None  # every record has them
    axes.errorbar(
      1 + size.value,
      accuracy.value,
      yerr=accuracy.error or 0.0,
      xerr=size.error or 0.0,
      label=label,
      linestyle="none",
      markersize=7,
      **_style(group),
    )
  _scale_sizes(axes.xaxis)
  axes.set_xlabel("model size after the last task (base network = 1)")
  axes.set_ylabel("average accuracy (%)")
  axes.grid(alpha=0.3, which="both")
  _legend(figure, axes)
  return figure


def by_task(panel: Panel) -> Figure | None:
  """Draws mean and range of each task's accuracy over the orders; None for a single order."""
  groups = {label: g for label, g in panel.groups.items() if g.num_orders > 1}
  if not groups:
    return None
  count = max(len(g.runs[0].task_ids) for g in groups.values())
  figure, axes = _single(min(max(7.5, 0.1 * count * len(groups) + 3), 20))
  for i, (label, group) in enumerate(groups.items()):
    final = records.by_order(group)
    mean = final.mean(0)
    x = np.arange(len(mean)) + 0.7 * ((i + 0.5) / len(groups) - 0.5)
    errors = [mean - final.min(0), final.max(0) - mean]
    text = f"{label}\nMOPD {metrics.mopd(final):.2f}, AOPD {metrics.aopd(final):.2f}"
    axes.errorbar(x, mean, errors, label=text, linestyle="none", markersize=4, **_style(group))
  ids = sorted(next(iter(groups.values())).runs[0].task_ids)
  axes.set_xticks(_ticks(count), [str(ids[i]) for i in _ticks(count)])
  axes.set_xlabel("task (original id)")
  axes.set_ylabel("accuracy after the last task (%)")
  axes.grid(alpha=0.3, axis="y")
  _legend(figure, axes)
  return figure


def forgetting_by_order(panel: Panel) -> Figure | None:
  """Draws the backward transfer of each method and order; None for a single order."""
  names = {run.task_ids: _short_order(run) for g in panel.groups.values() for run in g.runs}
  orders = sorted(names, key=lambda order: names[order])
  rows = {label: _bwt_row(group, orders) for label, group in panel.groups.items()}
  rows = {label: row for label, row in rows.items() if np.isfinite(row).any()}
  if len(orders) < 2 or not rows:
    return None
  values = np.array(list(rows.values()))
  figure, axes = _single(1.1 * len(orders) + 4.5, 0.4 * len(rows) + 1.5)
  limit = max(np.nanmax(np.abs(values)), 0.5)
  image = _heat(axes, values, 2, True, cmap="RdBu", vmin=-limit, vmax=limit)
  axes.set_xticks(range(len(orders)), [names[order] for order in orders])
  axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
  axes.set_xlabel("order")
  figure.colorbar(image, ax=axes, label="BWT (points)")
  return figure


def _bwt_row(group: Group, orders: list[tuple[int, ...]]) -> list[float]:
  """Returns the mean backward transfer over the seeds of each order.

  It is NaN where the order was not run or the backward transfer is not defined.
  """
  row: list[float] = []
  for order in orders:
    runs = [run for run in group.runs if run.task_ids == order]
    values = [value for run in runs if (value := metrics.bwt(run.accuracy)) is not None]
    is_known = bool(values) and len(values) == len(runs)
    row.append(float(np.mean(values)) if is_known else np.nan)
  return row


def ranks(panel: Panel) -> Figure | None:
  """Draws the ranks by layer and task for the methods that choose ranks; None if none does."""
  runs = {label: group.runs[0] for label, group in panel.groups.items()}
  chosen = {label: run for label, run in runs.items() if any(run.record.get("ranks") or [])}
  if not chosen:
    return None
  layers = {label: list(next(filter(None, run.record["ranks"]))) for label, run in chosen.items()}
  rows = max(map(len, layers.values()))
  figure, axes = _grid(len(chosen), 5.5, 0.35 * rows + 1.4)
  for ax, (label, run) in zip(axes, chosen.items(), strict=True):
    found = [r or {} for r in run.record["ranks"]]
    values = np.array([[r.get(name, np.nan) for r in found] for name in layers[label]], float)
    image = _heat(ax, values, 0, len(found) <= 20, cmap="viridis", vmin=0)
    ax.set_yticks(range(len(layers[label])), layers[label], fontsize=7)
    ax.set_xticks(_ticks(len(found)), [str(i + 1) for i in _ticks(len(found))])
    ax.set_xlabel("task (as trained)")
    ax.set_title(f"{label}, order {_short_order(run)}", fontsize=8)
    figure.colorbar(image, ax=ax, label="rank")
  return figure


def time(panel: Panel) -> Figure | None:
  """Draws the accumulated training time in units of STL's first task.

  Only runs on the same kind of device as STL's are drawn; None if STL was not run.
  """
  base = next((g for g in panel.groups.values() if g.method == "stl"), None)
  if base is None:
    return None
  device = base.runs[0].record["device"]
  first = [records.training_seconds(r)[0] for r in base.runs if r.record["device"] == device]
  unit = float(np.mean(first))
  if unit <= 0:
    return None
  figure, axes = _single()
  for label, group in panel.groups.items():
    runs = [r for r in group.runs if r.record["device"] == device]
    if runs:
      curves = [np.cumsum(records.training_seconds(r)) / unit for r in runs]
      _line(axes, group, label, np.mean(curves, 0))
  _count_tasks(axes)
  axes.set_ylabel("training and selection time\n(STL's first task = 1)")
  axes.set_title(device, fontsize=8)
  axes.grid(alpha=0.3)
  _legend(figure, axes)
  return figure


def memory(panel: Panel) -> Figure | None:
  """Draws the peak memory of each task for the runs that measured it; None if none did."""
  figure, axes = _single()
  for label, group in panel.groups.items():
    curves = [run.record["memory_bytes"] for run in group.runs if "memory_bytes" in run.record]
    if curves:
      _line(axes, group, label, np.mean(curves, 0) / 2**30)
  if not axes.lines:
    return None
  _count_tasks(axes)
  axes.set_ylabel("peak memory (GiB)")
  axes.set_ylim(bottom=0)
  axes.grid(alpha=0.3)
  _legend(figure, axes)
  return figure


# --- figures of several panels --------------------------------------------------------


def forgetting(groups: list[Group], catalogue: paper.Catalogue) -> list[Picture]:
  """Draws backward transfer by method and fraction of the training images, a figure per benchmark.

  Source: paper, Fig. 2.
  """
  bars: dict[tuple[str, str], dict[tuple[float, str], records.Number]] = collections.defaultdict(
    dict
  )
  for panel in panels(groups, catalogue):
    for label, group in panel.groups.items():
      if (number := records.number(group, "bwt")) is not None and not group.partial:
        bars[group.benchmark, group.network][group.fraction, label] = number
  pictures = []
  for (benchmark, network), found in bars.items():
    title = "Backward transfer by fraction of the training images (paper Fig. 2), mean over runs"
    name = f"forgetting-{benchmark}-{network}".replace("_", "-")
    caption = f"{title}: {benchmark}, {network}"
    pictures.append(Picture(name, caption, _bars(found)))
  return pictures


def _bars(found: dict[tuple[float, str], records.Number]) -> Figure:
  """Draws bars from {(fraction of the training images, label of the method): number}."""
  labels = list(dict.fromkeys(label for _, label in found))
  fractions = sorted({fraction for fraction, _ in found})
  figure, axes = _single(max(7.5, 0.55 * len(labels) + 3))
  width = 0.8 / len(fractions)
  for k, fraction in enumerate(fractions):
    numbers = {i: found[fraction, x] for i, x in enumerate(labels) if (fraction, x) in found}
    axes.bar(
      [i + (k + 0.5) * width - 0.4 for i in numbers],
      [n.value for n in numbers.values()],
      width,
      yerr=[n.error or 0.0 for n in numbers.values()],
      label=f"{100 * fraction:g} %",
      color=colormaps["viridis"](0.15 + 0.7 * k / max(len(fractions) - 1, 1)),
    )
  axes.axhline(0, color="black", linewidth=0.8)
  axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)
  axes.set_xlabel("method")
  axes.set_ylabel("BWT (points)")
  axes.grid(alpha=0.3, axis="y")
  figure.legend(title="images", loc="outside right upper", fontsize=8)
  return figure


def lambdas(groups: list[Group]) -> list[Picture]:
  """Draws HALRP's metrics over lambda_0 and lambda_1 where both were varied (paper, Fig. 4)."""
  families: dict[tuple, list[Group]] = collections.defaultdict(list)
  for group in groups:
    if group.method == "halrp":
      rest = {k: v for k, v in group.setting.items() if k not in ("method.l1", "method.l2")}
      families[(*group[1:5], tuple(sorted(rest.items())))].append(group)
  pictures = []
  for (benchmark, network, fraction, *_), found in families.items():
    l1 = sorted({g.setting["method.l1"] for g in found})
    l2 = sorted({g.setting["method.l2"] for g in found})
    if len(l1) > 1 and len(l2) > 1:
      share = f"{100 * fraction:g}"
      name = f"lambda-{benchmark}-{network}-{share}".replace("_", "-")
      where = f"{benchmark}, {network}, {share} % of the images"
      caption = f"HALRP by lambda_0 and lambda_1 (paper Fig. 4): {where}"
      pictures.append(Picture(name, caption, _surfaces(found, l1, l2)))
  return pictures


def _surfaces(groups: list[Group], l1: list[float], l2: list[float]) -> Figure:
  """Draws ACC, MOPD and AOPD of runs with the given values of lambda_0 (l1) and lambda_1 (l2)."""
  figure, axes = _grid(3, 3.6, 2.8)
  titles = {"accuracy": "ACC (%)", "mopd": "MOPD (points)", "aopd": "AOPD (points)"}
  for ax, (metric, title) in zip(axes, titles.items(), strict=True):
    values = np.full((len(l2), len(l1)), np.nan)
    for group in groups:
      if (number := records.number(group, metric)) is not None:
        y, x = l2.index(group.setting["method.l2"]), l1.index(group.setting["method.l1"])
        values[y, x] = number.value
    ax.set_title(title if np.isfinite(values).any() else f"{title}: needs two orders")
    image = _heat(ax, values, 2, True, cmap="viridis" if metric == "accuracy" else "viridis_r")
    ax.set_xticks(range(len(l1)), [f"{x:g}" for x in l1], fontsize=7)
    ax.set_yticks(range(len(l2)), [f"{x:g}" for x in l2], fontsize=7)
    ax.set_xlabel("lambda_0 (L1)")
    ax.set_ylabel("lambda_1 (L2)")
    if np.isfinite(values).any():
      figure.colorbar(image, ax=ax)
  return figure
