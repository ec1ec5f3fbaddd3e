"""Pictures of the delta flow and of saturation (matplotlib, the extra "plots")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jbackprop.diagnose.flow import DeltaFlow
from jbackprop.diagnose.units import SaturationTable


def figure(
    columns: int = 1, width: float = 5.0, height: float = 3.6, rows: int = 1
) -> tuple[Any, Any]:
    """A figure with axes of this size beside each other, row by row, drawn without a screen.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'jbackprop[plots]'") from error
    fig = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False).ravel()


def plot_flow(axes: Any, flows: Mapping[str, DeltaFlow]) -> None:
    """Draw the norm of the delta by layer, one line for each flow, on matplotlib axes."""
    for name, flow in flows.items():
        norms = list(flow.norms.values())
        axes.semilogy(range(1, len(norms) + 1), norms, marker="o", markersize=3, label=name)
    axes.set_xlabel("layer with weights, from the input")
    axes.set_ylabel("mean norm of delta")
    if any(flows):
        axes.legend()


def plot(flow: DeltaFlow, units: SaturationTable | None = None) -> Any:
    """Picture the delta flow, and beside it the saturated and dead units.

    Args:
        flow: from `delta_norms`.
        units: from `saturation`; left out without it.

    Returns:
        A matplotlib figure: `figure.savefig("deltas.png")`.

    Raises:
        TypeError: what the two did not give.
        ImportError: matplotlib is missing; the message says how to install it.
    """
    if not isinstance(flow, DeltaFlow):
        raise TypeError(f"flow must be what delta_norms gives, not {type(flow).__name__}")
    if units is not None and not isinstance(units, SaturationTable):
        raise TypeError(f"units must be what saturation gives, not {type(units).__name__}")
    fig, axes = figure(2 if units else 1)
    plot_flow(axes[0], {"": flow})
    if units:
        places = range(len(units))
        axes[1].bar(places, [100 * s.saturated for s in units], 0.8, label="saturated")
        axes[1].bar(places, [100 * s.dead for s in units], 0.5, label="dead")
        axes[1].set_xticks(list(places), [s.path for s in units], rotation=60, fontsize="small")
        axes[1].set_ylabel("% of units")
        axes[1].legend()
    return fig
