"""Figure 2: the reward against one joint, all else as in the task's posture, for five alphas.

    python paper/landscape.py hinge --task cartpole
    python paper/landscape.py right_knee --task kneeling
    python paper/landscape.py position --task mountaincar     (needs pygame)

Writes landscape.csv and landscape.png into a new folder, runs/landscape-... or --out.
"""
from pathlib import Path

import shared  # first: it finds vlmrm.py
import mujoco
import numpy as np
import sac
import vlmrm
from states import POSTURES, on_floor, pictures, posture

def along(config, joint, points=101):
    """States (points, nq) along a joint's range, its values (points,) and the name of its unit."""
    if config.env_id == shared.CAR.env_id:
        if joint != "position":
            raise sac.UsageError(f"{joint}: of the mountain car there is only position")
        x = np.linspace(-1.2, 0.6, points)
        return np.stack([x, np.zeros(points)], 1), x, "Gymnasium's units"
    model, task = vlmrm.World(config, 1).sims[0].model, config.task
    names = [model.joint(i).name for i in np.flatnonzero(model.jnt_limited)]
    if joint not in names:
        raise sac.UsageError(f"{joint}: no such joint in {config.env_id}; there are "
                             f"{', '.join(names)}")
    how = model.joint(joint)
    state = posture(model, **POSTURES[task]) if task in POSTURES else model.qpos0
    x, states = np.linspace(*how.range, points), np.tile(state, (points, 1))
    states[:, how.qposadr[0]] = x
    if task in POSTURES:
        states[:, 2] = [on_floor(model, qpos) for qpos in states]
    return states, x, "rad" if how.type[0] == mujoco.mjtJoint.mjJNT_HINGE else "m"

def draw(joint, unit, x, curves, config, path):
    """The picture: one curve for each alpha."""
    figure, (axes,) = shared.chart()
    for alpha, rewards in curves.items():
        axes.plot(x, rewards, label=alpha)
    axes.set(xlabel=f"{joint} ({unit})", ylabel="CLIP reward")
    axes.set_title(f'"{config.prompt}"\nbaseline "{config.baseline}"', fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="Eq. 3 with")
    figure.savefig(path)

def main(argv=None):
    """The command line."""
    parser = shared.flags(__doc__)
    parser.add_argument("joint", help="a joint of the body; a wrong name lists them")
    parser.add_argument("--task", required=True, choices=shared.TASKS)
    parser.add_argument("--prompt", help="default: the task's")
    parser.add_argument("--baseline", help="default: the task's")
    parser.add_argument("--clip", help="as in vlmrm.py")
    parser.add_argument("--looks", choices=shared.LOOKS, help="default: as in vlmrm.py")
    parser.add_argument("--out", type=Path, help="default: runs/landscape-TASK-JOINT")
    args = vars(parser.parse_args(argv))
    joint, out = args.pop("joint"), args.pop("out")
    out = out or Path(f"runs/landscape-{args['task']}-{joint}")
    if out.exists():
        raise sac.UsageError(f"{out} exists and is not overwritten: name another folder by --out")
    config = shared.configure(**args)
    states, x, unit = along(config, joint)
    reward = vlmrm.CLIPReward(config.prompt, config.baseline, clip=config.clip,
                              device=shared.device())
    s = reward.embed(pictures(vlmrm.World(config, 1, reward.image_size), states))
    curves = {}
    for alpha in shared.ALPHAS:
        r = vlmrm.goal_baseline_reward(s, reward.goal, reward.baseline, alpha)
        curves[f"alpha {alpha}"] = r.cpu().numpy()
    out.mkdir(parents=True)
    np.savetxt(out / "landscape.csv", np.column_stack([x, *curves.values()]), "%.6g", ",",
               header=",".join([joint, *curves]), comments="")
    draw(joint, unit, x, curves, config, out / "landscape.png")
    best = ", ".join(f"{name} at {x[np.argmax(r)]:.2f}" for name, r in curves.items())
    print(f"wrote {out}/landscape.csv and landscape.png; highest reward: {best}")

if __name__ == "__main__":
    sac.run(main)
