"""Learning curves of one or several runs: columns of their progress.csv against the steps.

    python paper/curve.py runs/a-humanoid-robot-kneeling
    python paper/curve.py runs/* --columns return q temperature --out curves.png

Writes curve.png into the first run's folder, or what --out names.
"""

import sys
from pathlib import Path

import numpy as np
import shared

import sac
import vlmrm

LABELS = {
    "return": "return per episode",
    "test": "return per episode\nwithout exploration",
    "q": "mean Q\n(of scaled rewards)",
    "loss_q": "critics' loss",
    "loss_pi": "actor's loss",
    "entropy": "entropy (nats)",
    "temperature": "temperature",
}


def read(run):
    """Columns of a run's progress.csv by name, each (iterations,), of its whole rows."""
    text = (run / "progress.csv").read_text()
    names, *rows = text[: text.rfind("\n")].splitlines()
    rows = [row for row in rows if row.count(",") == names.count(",")]
    table = np.genfromtxt(rows, delimiter=",", ndmin=2)
    return dict(zip(names.split(","), table.T, strict=True))


def read_all(runs):
    """folder -> columns, of those that are runs; the others are named."""
    tables = {}
    for run in runs:
        try:
            tables[run] = read(run)
        except (OSError, ValueError) as error:
            print(f"skipped: {run} has no progress.csv to draw ({error})", file=sys.stderr)
    if not tables:
        raise sac.UsageError("no run to draw: name a folder, like runs/...")
    return tables


def name_of(run):
    """For the legend."""
    try:
        return f"{run.name}, seed {vlmrm.read_config(run).seed}"
    except sac.UsageError:  # of older code
        return run.name


def draw(tables, columns):
    """The figure: a chart for each column, a curve for each run."""
    figure, axes = shared.chart(len(columns))
    for axis, column in zip(axes, columns, strict=True):
        for run, table in tables.items():
            if column not in table:
                raise sac.UsageError(f"{run}: its progress.csv has no column {column}")
            known = np.isfinite(table[column])  # tests come every few iterations
            axis.plot(table["step"][known], table[column][known], ".-", label=name_of(run))
        axis.set_ylabel(LABELS[column])
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[-1].set_xlabel("environment steps")
    return figure


def main(argv=None):
    """The command line."""
    parser = shared.flags(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders, like runs/...")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=["return", "test"],
        choices=LABELS,
        metavar="COLUMN",
        help=f"of {', '.join(LABELS)}; default: return test",
    )
    parser.add_argument("--out", type=Path, help="the picture (default: RUN/curve.png)")
    args = parser.parse_args(argv)
    tables = read_all(args.runs)
    out = args.out or next(iter(tables)) / "curve.png"
    figure = draw(tables, args.columns)
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise sac.UsageError(f"{out} cannot be drawn ({error})") from error
    print(f"wrote {out}")


if __name__ == "__main__":
    sac.run(main)
