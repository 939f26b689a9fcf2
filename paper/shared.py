"""What the scripts of this folder share: settings, a run's policies, a chart, and how to compare a
reward with the simulator's labels. It lets Python find vlmrm.py, one folder up."""

import argparse
import contextlib
import inspect
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import criteria

import sac
import vlmrm

TEST_SEED = 1_000_000  # after a run's own seed: the episodes of its last line
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def configure(task, **asked):
    """The vlmrm.Config of a task in criteria.TASKS. Of `asked` None counts as not asked for."""
    asked = {name: value for name, value in asked.items() if value is not None}
    return vlmrm.configure(**criteria.TASKS[task]._asdict() | asked)


def task_of(cfg, folder):
    """The name of a run's task; UsageError if its prompt has no criterion."""
    task = criteria.task_of(cfg.prompt, cfg.env_id)
    if task is None:
        raise sac.UsageError(
            f"{folder}: the simulator has no criterion for {cfg.prompt!r} in {cfg.env_id}, only "
            "for the prompts in paper/criteria.py"
        )
    return task


def model_of(world):
    """The MuJoCo model of a world's simulations."""
    return world.sims[0].model


def states_of(world):
    """qpos of all simulations as they are now, (N, nq)."""
    return np.stack([sim.data.qpos for sim in world.sims])


@contextlib.contextmanager
def pool(processes):
    """Quiet processes that end with the `with` block, however that is left, also by Ctrl-C."""
    os.environ["TQDM_DISABLE"] = "1"  # read when they import tqdm
    workers = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), sac.use_onednn)
    try:
        yield workers
        workers.shutdown()
    finally:
        for process in multiprocessing.active_children():
            process.terminate()


def flags(doc):
    """A parser that says what is wrong in one line; its --help shows the script's docstring."""
    return argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def picture_flags(doc):
    """The same with what chooses a task and its picture model."""
    parser = flags(doc)
    parser.add_argument("--task", required=True, choices=criteria.TASKS)
    parser.add_argument("--baseline", help="default: the task's")
    parser.add_argument("--looks", help="default: as in vlmrm.py")
    return parser


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


def clip_reward(cfg):
    """The vlmrm.CLIPReward of a run's settings."""
    if "tiny_clip" in cfg.clip:
        torch.set_num_threads(1)  # as vlmrm.py does
    return vlmrm.CLIPReward(cfg.prompt, cfg.baseline, cfg.alpha, cfg.clip, device())


def sizes(world):
    """Of an observation and an action."""
    return world.single_observation_space.shape[0], math.prod(world.single_action_space.shape)


def learner(cfg, world):
    """agent, replay, with the settings of vlmrm.py."""
    torch.manual_seed(cfg.seed)
    names = inspect.signature(sac.SAC).parameters.keys() & asdict(cfg).keys()
    settings = {name: getattr(cfg, name) for name in names}
    agent = sac.SAC(*sizes(world), device=device(), **settings)
    iteration = cfg.num_envs * cfg.episode_length
    return agent, sac.Replay(min(cfg.replay, cfg.steps) + iteration, *sizes(world), device())


def policies(folder, world):
    """A run's policies: "kept", that with the best test, and "last", both sac.Actor, CPU."""
    found = {}
    try:
        load = partial(torch.load, weights_only=True, map_location="cpu")
        agent = load(folder / "last.pt", mmap=True)["agent"]  # without reading the replay
        last = {k.removeprefix("policy."): v for k, v in agent.items() if k.startswith("policy.")}
        for name, weights in (("kept", load(folder / "best.pt")), ("last", last)):
            found[name] = sac.Actor(*sizes(world), world.cfg.hidden)
            found[name].load_state_dict(weights)
    except Exception as error:  # torch raises many kinds
        raise sac.UsageError(f"{folder}: best.pt and last.pt do not load ({error})") from error
    return found


def try_out(cfg, world, policy, label):
    """A deterministic episode of each simulation: action, label(pictures of the states reached) and
    next_obs, (T, N, ...) each."""
    act = partial(policy.act, deterministic=True)
    return vlmrm.rollout(world, act, cfg.seed + TEST_SEED, label)[1:]


def rewards(reward, s, alpha):
    """A CLIPReward's rewards (N,) at another alpha, of unit vectors s (N, D)."""
    s = torch.as_tensor(s).to(reward.goal.device)
    return vlmrm.goal_baseline_reward(s, reward.goal, reward.baseline, alpha).cpu().numpy()


def success(goal):
    """Share of episodes whose criterion held, (T, N) bool, in at least half of the steps."""
    return float((goal.mean(0) >= 0.5).mean())


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
