"""Figure 2: the reward against one joint, all else as in the task's posture, for five alphas.

    python paper/landscape.py hinge --task cartpole
    python paper/landscape.py right_knee --task kneeling

Writes landscape.csv and landscape.png into a new folder, runs/landscape-... or --out.
"""

from pathlib import Path

import mujoco
import numpy as np
import shared
from states import POSTURES, on_floor, pictures, posture

import sac
import vlmrm


def along(task, joint, points=101):
    """States (points, nq) along a joint's range, its values (points,) and the name of its unit."""
    model = shared.model_of(vlmrm.World(shared.configure(task), 1))
    names = [model.joint(i).name for i in np.flatnonzero(model.jnt_limited)]
    if joint not in names:
        raise sac.UsageError(f"{joint}: no such joint; there are {', '.join(names)}")
    how = model.joint(joint)
    state = posture(model, **POSTURES[task]) if task in POSTURES else model.qpos0
    x, states = np.linspace(*how.range, points), np.tile(state, (points, 1))
    states[:, how.qposadr[0]] = x
    if task in POSTURES:
        states[:, 2] = on_floor(model, states)
    return states, x, "rad" if how.type[0] == mujoco.mjtJoint.mjJNT_HINGE else "m"


def draw(label, x, curves, title, path):
    """The picture: one curve for each alpha."""
    figure, (axes,) = shared.chart()
    for alpha, r in curves.items():
        axes.plot(x, r, label=alpha)
    axes.set(xlabel=label, ylabel="CLIP reward")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="Eq. 3 with")
    figure.savefig(path)


def main(argv=None):
    """The command line."""
    parser = shared.picture_flags(__doc__)
    parser.add_argument("joint", help="a joint of the body; a wrong name lists them")
    parser.add_argument("--prompt", help="default: the task's")
    parser.add_argument("--clip", help="as in vlmrm.py")
    parser.add_argument("--out", type=Path, help="default: runs/landscape-TASK-JOINT")
    args = vars(parser.parse_args(argv))
    joint, out, task = args.pop("joint"), args.pop("out"), args["task"]
    out = out or Path(f"runs/landscape-{task}-{joint}")
    if out.exists():
        raise sac.UsageError(f"{out} exists and is not overwritten: name another folder by --out")
    cfg = shared.configure(**args)
    states, x, unit = along(task, joint)
    reward = shared.clip_reward(cfg)
    s = reward.embed(pictures(vlmrm.World(cfg, 1, reward.image_size), states))
    curves = {f"alpha {alpha}": shared.rewards(reward, s, alpha) for alpha in shared.ALPHAS}
    out.mkdir(parents=True)
    table, header = np.column_stack([x, *curves.values()]), ",".join([joint, *curves])
    np.savetxt(out / "landscape.csv", table, "%.6g", ",", header=header, comments="")
    title = f'"{cfg.prompt}"\nbaseline "{cfg.baseline}"'
    draw(f"{joint} ({unit})", x, curves, title, out / "landscape.png")
    best = ", ".join(f"{name} at {x[np.argmax(r)]:.2f}" for name, r in curves.items())
    print(f"wrote {out}/landscape.csv and landscape.png; highest reward: {best}")


if __name__ == "__main__":
    sac.run(main)
