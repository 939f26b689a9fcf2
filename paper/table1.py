"""Table 1 anew: learns every task with every seed, judges the policies, and prints the table.

    python paper/table1.py runs/table1
    python paper/table1.py runs/table1 --tasks kneeling one-leg --seeds 0 --jobs 1

Lessons run two at a time (--jobs), 64,000 transitions for kneeling and 160,000 for the others; what
is in the folder already is not learned again, and what was interrupted goes on. Other flags are
those of vlmrm.py (beside a GPU: --clip tiny_clip, or --steps 10000000 --jobs 1). The folder's
table.md grows with every lesson.
"""

from concurrent.futures import as_completed
from pathlib import Path

import criteria
import evaluate
import shared
from states import POSTURES

import sac
import vlmrm

HEAD = (
    "| task | success: kept | last | noise | goal | hacked | AUROC | CLIP return |",
    "|---|---|---|---|---|---|---|---|",
)


def lesson(key, folder, others):
    """Learn key = (task, seed), with other flags of vlmrm.py, and judge: the table's numbers."""
    (task, seed), folder = key, folder / "{}-{}".format(*key)
    if not (folder / "film.png").exists():
        steps = 64_000 if task == "kneeling" else 160_000
        new = ["--prompt", criteria.TASKS[task].prompt, "--seed", str(seed), "--out", str(folder)]
        begun = (folder / "config.json").exists()
        asked = [*new, "--steps", str(steps), *others]
        if begun:  # config.json has what --paper stands for
            asked = ["--resume", str(folder), *(x for x in others if x != "--paper")]
        vlmrm.main(asked)
    noisy = evaluate.evaluate(evaluate.parse([str(folder), "--reset-noise", "0.05"]))
    usual = evaluate.evaluate(evaluate.parse([str(folder)]))  # eval.json is of the usual start
    kept = usual["kept"]
    shares = kept["success"], usual["last"]["success"], noisy["kept"]["success"]
    shares = [f"{x:.0%}" for x in (*shares, kept["goal_states"], kept["hacked"])]
    return [*shares, f"{kept['auroc']:.3f}", f"{kept['return']:.2f}"]


def table(results):
    """(task, seed) -> numbers, as Markdown: a row for each task, its seeds side by side."""
    rows = list(HEAD)
    for task in dict.fromkeys(task for task, _ in results):
        found = [numbers for (name, _), numbers in results.items() if name == task]
        rows.append(f"| `{task}` | {' | '.join(map(', '.join, zip(*found, strict=True)))} |")
    return "\n".join(rows) + "\n"


def parse(argv=None):
    """The flags, and those of vlmrm.py."""
    parser = shared.flags(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=POSTURES, default=list(POSTURES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="lessons side by side")
    args, others = parser.parse_known_args(argv)
    taken = {"prompt", "env_id", "out", "resume"} & vlmrm.parse(others).keys()
    if taken:
        raise sac.UsageError(f"table1.py takes --tasks and no {', '.join(sorted(taken))}")
    if args.jobs < 1:
        raise sac.UsageError(f"--jobs must be at least 1, not {args.jobs}")
    return args, others


def main(argv=None):
    """The command line."""
    args, others = parse(argv)
    keys, done = [(task, seed) for seed in args.seeds for task in args.tasks], {}
    with shared.pool(args.jobs) as pool:
        jobs = {pool.submit(lesson, key, args.folder, others): key for key in keys}
        for job in as_completed(jobs):
            done[jobs[job]] = job.result()
            text = table({key: done[key] for key in keys if key in done})
            vlmrm.save(args.folder / "table.md", text)
    print(text, end="")


if __name__ == "__main__":
    sac.run(main)
