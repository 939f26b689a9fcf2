"""Learning curves of one or several runs: columns of their progress.csv against the steps.

    python paper/curve.py runs/a-humanoid-robot-kneeling
    python paper/curve.py runs/* --columns return success q temperature --out curves.png

Writes curve.png into the first run's folder, or what --out names.
"""
import csv
from pathlib import Path

import shared  # first: it finds vlmrm.py
import numpy as np
import sac

LABELS = {
    "return": "CLIP return per episode",
    "success": "share of episodes\nthat succeed",
    "test": "CLIP return per\nepisode without exploration",
    "seconds": "seconds",
    "q": "mean Q (of scaled rewards)",
    "loss_q": "critics' loss",
    "loss_pi": "actor's loss",
    "entropy": "entropy (nats)",
    "temperature": "temperature"}

def read(run):
    """Columns of a run's progress.csv by name, each (iterations,)."""
    try:
        names, *rows = csv.reader((run / "progress.csv").read_text().splitlines())
        return dict(zip(names, np.array(rows, float).T, strict=True))
    except (OSError, ValueError) as error:
        raise sac.UsageError(f"{run} has no progress.csv to draw ({error})") from None

def main(argv=None):
    """The command line."""
    parser = shared.flags(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders, like runs/...")
    parser.add_argument("--columns", nargs="+", default=["return", "success"], choices=LABELS,
                        metavar="COLUMN", help=f"of {', '.join(LABELS)}; default: return success")
    parser.add_argument("--out", type=Path, help="the picture (default: RUN/curve.png)")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "curve.png"
    tables = {str(run): read(run) for run in args.runs}
    figure, axes = shared.chart(len(args.columns))
    for axis, column in zip(axes, args.columns):
        for name, table in tables.items():
            if column not in table:
                raise sac.UsageError(f"{name}: its progress.csv has no column {column}")
            known = np.isfinite(table[column])  # tests come every few iterations
            axis.plot(table["step"][known], table[column][known], label=name)
        axis.set_ylabel(LABELS[column])
        if column == "success":
            axis.set_ylim(-0.05, 1.05)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[0].set_title("Learning curves (exploring policy)")
    axes[-1].set_xlabel("environment steps")
    figure.savefig(out)
    print(f"wrote {out}")

if __name__ == "__main__":
    sac.run(main)
