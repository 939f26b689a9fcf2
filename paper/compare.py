"""Figures 4 and 7 without training: how well picture models, prompts and alphas tell goal states
from others, as EPIC distance and AUROC on fixed states that the simulator labels.

    python paper/compare.py --task kneeling
    python paper/compare.py --task kneeling --prompt "a robot on its knees" "kneeling"
    python paper/compare.py --task kneeling --clip tiny_clip --looks paper
"""

from dataclasses import replace

import criteria
import shared
from states import embed, labelled_states

import sac
import vlmrm


def compare(cfg, prompts, states, goal):
    """A line for each prompt: an EPIC (AUROC) for each alpha, looks, picture model, the size of its
    image tower in parameters."""
    s = None
    for prompt in prompts:
        reward = shared.clip_reward(replace(cfg, prompt=prompt))
        s = embed(reward, cfg, states) if s is None else s  # (n, D)
        cells = []
        for alpha in shared.ALPHAS:
            r = shared.rewards(reward, s, alpha)
            cells.append(f"{shared.epic(r, goal):.3f} ({shared.auroc(r, goal):.3f})")
        size = sum(p.numel() for p in reward.parameters()) / 1e6
        yield f"{'  '.join(cells)}  {cfg.looks} {cfg.clip} ({size:.2f} M) {prompt}"


def main(argv=None):
    """The command line."""
    parser = shared.picture_flags(__doc__)
    parser.add_argument("--prompt", nargs="+", help="one or several (default: the task's)")
    parser.add_argument("--clip", nargs="+", default=[None], help="one or several, as in vlmrm.py")
    args = parser.parse_args(argv)
    states = labelled_states(args.task)
    world = vlmrm.World(shared.configure(args.task), 1)
    goal = criteria.holds(args.task, shared.model_of(world), states)
    print(f"{len(states)} states, {goal.mean():.0%} of them goal states of {args.task!r}")
    head = f"EPIC (AUROC) at alpha {', '.join(map(str, shared.ALPHAS))}"
    print(f"{head:<69} looks, image tower, prompt")
    for clip in args.clip:
        cfg = shared.configure(args.task, baseline=args.baseline, clip=clip, looks=args.looks)
        for line in compare(cfg, args.prompt or [cfg.prompt], states, goal):
            print(line, flush=True)


if __name__ == "__main__":
    sac.run(main)
