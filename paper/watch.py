"""A run's best policy in MuJoCo's own viewer, episode after episode, until its window is closed.

python paper/watch.py runs/a-humanoid-robot-kneeling
"""

import os
import sys
import time
from pathlib import Path

import mujoco.viewer
import shared

import sac
import vlmrm


def main(argv=None):
    """The command line."""
    parser = shared.flags(__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, like runs/...")
    args = parser.parse_args(argv)
    cfg = vlmrm.read_config(args.run)
    world = vlmrm.World(cfg, 1)
    policy, sim = shared.policies(args.run, world)["kept"], world.sims[0]
    if not hasattr(sim, "data"):
        raise sac.UsageError(f"{cfg.env_id} is not MuJoCo's; look at {args.run}/film.gif")
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        raise sac.UsageError(f"the viewer needs a display; without one look at {args.run}/film.gif")
    obs, _ = world.reset(seed=cfg.seed)
    viewer = mujoco.viewer.launch_passive(sim.model, sim.data)
    step = 0
    while viewer.is_running():
        action = policy.act(obs, deterministic=True)
        obs = world.step(action.reshape(world.action_space.shape))[0]
        viewer.sync()
        time.sleep(sim.dt)
        step += 1
        if step % cfg.episode_length == 0:
            obs, _ = world.reset()


if __name__ == "__main__":
    sac.run(main)
