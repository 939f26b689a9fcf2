"""Training with perfect sight, without pictures: on the simulator's own log-odds of the prompt
(truth.py), or on the criterion itself, 0 or 1. What fails here is no fault of the picture model.

    python paper/sight.py --task kneeling
    python paper/sight.py --task one-leg --reward criterion --steps 256000 --seed 1

Its other flags are those of vlmrm.py that are about learning. The folder, runs/sight-TASK, is a
run's: evaluate.py says what tiny_clip would have paid for these policies. Do not go on with it by
vlmrm.py --resume, which would add rewards from pictures.
"""

import argparse
from dataclasses import replace

import criteria
import shared
import torch
import truth

import sac
import vlmrm


class Sight(vlmrm.World):
    """A world that shows its states (N, nq) instead of pictures."""

    def render(self):
        return shared.states_of(self)


def teacher(task, reward, model):
    """label(states (N, nq)) -> rewards (N,): "log-odds" or "criterion"."""
    judge = truth.graded if reward == "log-odds" else criteria.holds
    return lambda states: torch.from_numpy(judge(task, model, states).astype("float32"))


def parse(argv):
    """task, reward, the run's folder or None, Config."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    parser.add_argument("--task", choices=criteria.TASKS, default="kneeling")
    parser.add_argument("--reward", choices=("log-odds", "criterion"), default="log-odds")
    args, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print(__doc__)
    asked = vlmrm.parse(rest)
    unknown = {"prompt", "baseline", "alpha", "clip", "looks", "env_id", "resume"} & asked.keys()
    if unknown:
        raise sac.UsageError(f"sight.py takes --task and no {', '.join(sorted(unknown))}")
    out = asked.pop("out", None)
    return args.task, args.reward, out, shared.configure(args.task, clip="tiny_clip", **asked)


def main(argv=None):
    """The command line."""
    task, reward, out, cfg = parse(argv)
    torch.set_num_threads(1)  # as vlmrm.py does for so small networks
    world, tests = Sight(cfg, cfg.num_envs), Sight(cfg, 100)
    label = teacher(task, reward, shared.model_of(world))
    folder = vlmrm.new_folder(replace(cfg, prompt=f"sight {task}"), out)
    vlmrm.train(cfg, folder, label, world, *shared.learner(cfg, world))
    print(f"see {folder}")
    for name, policy in shared.policies(folder, world).items():
        _, r, next_obs = shared.try_out(cfg, tests, policy, label)
        goal = criteria.met(task, shared.model_of(world), next_obs)
        print(
            f"{name} policy, 100 deterministic episodes: {reward} {r.mean():.2f} a step, "
            f"{goal.mean():.0%} of the steps in goal states, "
            f"success rate {shared.success(goal):.0%}"
        )


if __name__ == "__main__":
    sac.run(main)
