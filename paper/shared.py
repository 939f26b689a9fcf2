"""What the scripts of this folder share: tasks, a run's policy, a chart, and how to compare a
reward with the simulator's labels. Import it first: it lets Python find vlmrm.py, one folder up."""
import argparse
import contextlib
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

import sac
import vlmrm

LOOKS = "paper", "plain", "original"
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
CAR = vlmrm.Task("a car at the peak of the mountain, next to the yellow flag",
                 "MountainCarContinuous-v0", "a car in the mountain")
TASKS = [*vlmrm.TASKS, "mountaincar"]

def configure(task, **asked):
    """The vlmrm.Config of a task in TASKS. Of `asked` what is None counts as not asked for."""
    asked = {name: value for name, value in asked.items() if value is not None}
    goal = {"task": task}
    if task == "mountaincar":
        goal = CAR._asdict() | {"episode_length": 200}
    with contextlib.redirect_stdout(None):  # what it says is about training
        return vlmrm.configure(**goal | asked)

def flags(doc):
    """A parser that says what is wrong in one line; its --help shows the script's docstring."""
    return argparse.ArgumentParser(usage=argparse.SUPPRESS, description=doc,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)

def chart(rows=1):
    """A matplotlib figure and its axes, one below the other."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise sac.UsageError("no matplotlib: pip install -r paper/requirements.txt") from None
    figure = Figure((7, 1 + 2.5 * rows), dpi=100, layout="constrained")
    return figure, figure.subplots(rows, squeeze=False, sharex=True)[:, 0]

def device():
    """Where picture models run."""
    return "cuda" if torch.cuda.is_available() else "cpu"

def best_policy(folder, config, world):
    """The policy of a run with the highest CLIP return: a sac.Actor on the CPU."""
    sizes = world.single_observation_space.shape[0], math.prod(world.single_action_space.shape)
    policy = sac.Actor(*sizes, config.hidden)
    try:
        policy.load_state_dict(torch.load(folder / "best.pt", weights_only=True))
    except Exception as error:  # torch raises many kinds
        raise sac.UsageError(f"{folder}/best.pt does not load ({error})") from None
    return policy

def epic(reward, goal):
    """EPIC distance (section 4.1) between rewards (N,) and labels (N,) bool, sqrt((1 - rho) / 2)
    with Pearson's rho: 0 the same but for scale and offset, 0.71 unrelated; nan where either never
    varies."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.sqrt((1 - np.corrcoef(reward, goal)[0, 1]) / 2))

def auroc(reward, goal):
    """Probability that a goal state's reward is above another state's; ties count half; nan
    without both kinds. Rewards (N,), goal (N,) bool."""
    _, inverse, counts = np.unique(reward, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    true, false = goal.sum(), (~goal).sum()
    if not true or not false:
        return math.nan
    return float((rank[goal].sum() - true * (true + 1) / 2) / (true * false))

def hacked(reward, goal, goal_reward):
    """Share of states that are paid better than `goal_reward` without being goal states. Many: the
    picture model is fooled; few, and few goal states: the optimiser has not got there."""
    return float(((reward > goal_reward) & ~goal).mean())
