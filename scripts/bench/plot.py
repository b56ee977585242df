"""The figure of a benchmark: ratios over rows, a panel per pair of engines, a line per model and length profile."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any


MARKERS = {"uniform": "o", "longtail": "s"}
COLUMNS = 3
Points = dict[int, dict[str, float]]  # spread of a ratio by rows


def series(results: Sequence[dict[str, Any]]) -> dict[str, dict[tuple[str, str], Points]]:
    """Points by pair of engines and by (model, dtype and device; profile). The later of two equal ones counts."""
    panels: dict[str, dict[tuple[str, str], Points]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        work = result["workload"]
        line = f"{work['model']} {work['dtype']}, {work['device']}", work["length_profile"]
        for pair, values in result["ratios"].items():
            panels[pair][line][work["lengths"]["rows"]] = values
    return panels


def plot(results: Sequence[dict[str, Any]], out: Path) -> None:
    """Draws medians; bars show the range over repeats. Models share a colour over panels, profiles a marker."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = series(results)
    models = sorted({model for lines in panels.values() for model, _ in lines})
    colours = dict(zip(models, cycle(plt.rcParams["axes.prop_cycle"].by_key()["color"]), strict=False))
    columns, rows_of_panels = min(COLUMNS, len(panels)), -(-len(panels) // COLUMNS)
    size = max(5.0, 3.4 * columns), 3.2 * rows_of_panels + 0.8
    figure, grid = plt.subplots(rows_of_panels, columns, figsize=size, layout="constrained", squeeze=False)
    axes = grid.flatten()[: len(panels)]
    for unused in grid.flatten()[len(panels) :]:
        unused.axis("off")
    for axis, (pair, lines) in zip(axes, panels.items(), strict=True):
        for (model, profile), points in sorted(lines.items()):
            rows = sorted(points)
            middle = [points[n]["median"] for n in rows]
            below = [points[n]["median"] - points[n]["min"] for n in rows]
            above = [points[n]["max"] - points[n]["median"] for n in rows]
            axis.errorbar(
                rows,
                middle,
                yerr=[below, above],
                capsize=3,
                color=colours[model],
                marker=MARKERS.get(profile, "d"),
                linestyle="--" if profile == "longtail" else "-",
                label=f"{model}, {profile}",
            )
        axis.axhline(1.0, color="0.6", linewidth=1)
        axis.set_xscale("log", base=2)
        ticks = sorted({n for points in lines.values() for n in points})
        axis.set_xticks(ticks, labels=[str(n) for n in ticks])
        axis.minorticks_off()
        axis.set(title=pair.replace("/", " ÷ "), xlabel="rows", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("times faster")
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    figure.suptitle(_title(results), fontsize=9)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def _title(results: Sequence[dict[str, Any]]) -> str:
    hardware = [result["provenance"]["hardware"] for result in results]
    machines = {h["cpu"] if h["gpu"] is None else h["gpu"]["name"] for h in hardware}
    synthetic = sorted({s for r in results if (s := r["provenance"]["synthetic_acceptance"]) is not None})
    drafts = f"synthetic acceptance {', '.join(map(str, synthetic))}" if synthetic else "measured acceptance"
    return f"{', '.join(sorted(machines))}; {drafts}"
