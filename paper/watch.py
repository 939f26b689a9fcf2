"""A run's best policy in MuJoCo's own viewer, episode after episode, until its window is closed.

    python paper/watch.py runs/a-humanoid-robot-kneeling
"""
import os
import sys
import time
from pathlib import Path

import shared  # first: it finds vlmrm.py
import mujoco.viewer
import sac
import vlmrm

def main(argv=None):
    """The command line."""
    parser = shared.flags(__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, like runs/...")
    args = parser.parse_args(argv)
    config = vlmrm.read_config(args.run)
    world = vlmrm.World(config, 1)
    policy, sim = shared.best_policy(args.run, config, world), world.sims[0]
    if not hasattr(sim, "fullpath"):
        raise sac.UsageError(f"{config.env_id} is not MuJoCo's; look at {args.run}/film.gif")
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        raise sac.UsageError(f"the viewer needs a display; without one look at {args.run}/film.gif")
    obs, _ = world.reset(seed=config.seed)
    viewer = mujoco.viewer.launch_passive(sim.model, sim.data)
    step = 0
    while viewer.is_running():
        action = policy.act(obs, deterministic=True)
        obs = world.step(action.reshape(world.action_space.shape))[0]
        viewer.sync()
        time.sleep(sim.dt)
        step += 1
        if step % config.episode_length == 0:
            obs, _ = world.reset()

if __name__ == "__main__":
    sac.run(main)
