"""Figures 4 and 7 without training: how well picture models, prompts and alphas tell goal states
from others, as EPIC distance and AUROC on fixed states that the simulator labels.

    python paper/compare.py --task kneeling
    python paper/compare.py --task kneeling --prompt "a robot on its knees" "kneeling"
    python paper/compare.py --task kneeling --clip tiny_clip tiny_clip/width-8 --looks plain
"""
from pathlib import Path

import shared  # first: it finds vlmrm.py
import sac
import vlmrm
from states import goals, labelled_states, pictures

def compare(task, prompts, baseline, clip, looks, states):
    """One row for each prompt: looks, picture model, its image tower's parameters, prompt, and an
    (EPIC, AUROC) for each alpha."""
    s, rows = None, []
    for prompt in prompts:
        config = shared.configure(task, prompt=prompt, baseline=baseline, clip=clip, looks=looks)
        reward = vlmrm.CLIPReward(prompt, config.baseline, clip=config.clip, device=shared.device())
        if s is None:
            world = vlmrm.World(config, 1, reward.image_size)
            goal, s = goals(world, states), reward.embed(pictures(world, states))  # (n,), (n, D)
        numbers = []
        for alpha in shared.ALPHAS:
            r = vlmrm.goal_baseline_reward(s, reward.goal, reward.baseline, alpha).cpu().numpy()
            numbers.append((shared.epic(r, goal), shared.auroc(r, goal)))
        size = sum(p.numel() for p in reward.parameters())
        rows.append((config.looks, Path(config.clip).name, size, prompt, numbers))
    return rows

def main(argv=None):
    """The command line."""
    parser = shared.flags(__doc__)
    parser.add_argument("--task", required=True, choices=shared.TASKS)
    parser.add_argument("--prompt", nargs="+", help="one or several (default: the task's)")
    parser.add_argument("--baseline", help="default: the task's")
    parser.add_argument("--clip", nargs="+", default=[None], help="one or several, as in vlmrm.py")
    parser.add_argument("--looks", choices=shared.LOOKS, help="default: as in vlmrm.py")
    args = parser.parse_args(argv)
    prompts = args.prompt or [shared.configure(args.task).prompt]
    states = labelled_states(args.task)
    share = goals(vlmrm.World(shared.configure(args.task), 1), states).mean()
    print(f"{len(states)} states, {share:.0%} of them goal states of {args.task!r}")
    print(f"{'EPIC (AUROC) at alpha ' + ', '.join(map(str, shared.ALPHAS)):<69} "
          "looks, image tower, prompt")
    for clip in args.clip:
        rows = compare(args.task, prompts, args.baseline, clip, args.looks, states)
        for looks, name, size, prompt, numbers in rows:
            cells = "  ".join(f"{epic:.3f} ({auroc:.3f})" for epic, auroc in numbers)
            print(f"{cells}  {looks} {name} ({size / 1e6:.2f} M) {prompt}", flush=True)

if __name__ == "__main__":
    sac.run(main)
