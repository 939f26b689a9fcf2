"""What stands in for the paper's human rater: whether the state of a simulation fulfils a prompt.

    criteria.goals(model, qpos)["kneeling"]      # (N,) bool, of the humanoid's states qpos (N, 24)
    criteria.met("kneeling", model, next_obs)    # the same from a rollout's observations

The paper's authors looked at videos (Table 1, section 4.3); these are our readings of the prompts.
An episode is a success when its criterion holds in at least half of its steps.
"""

from collections import namedtuple

import mujoco
import numpy as np

HUMANOID, POLE = "Humanoid-v5", "InvertedPendulum-v5"
Task = namedtuple("Task", "prompt baseline env_id", defaults=("a humanoid robot", HUMANOID))
STANDING = "a humanoid robot standing up"
TASKS = {
    "kneeling": Task("a humanoid robot kneeling"),
    "lotus": Task("a humanoid robot seated down, meditating in the lotus position"),
    "standing": Task(STANDING),
    "arms-raised": Task(STANDING + ", with both arms raised"),
    "splits": Task("a humanoid robot practicing gymnastics, doing the side splits"),
    "hands-on-hips": Task(STANDING + " with hands on hips"),
    "one-leg": Task(STANDING + " on one leg"),
    "arms-crossed": Task(STANDING + ", with its arms crossed"),
    "cartpole": Task("pole vertically upright on top of the cart", "pole and cart", POLE),
}


def task_of(prompt, env_id):
    """The name of the task with this prompt, whatever its case and spaces, or None."""
    for name, task in TASKS.items():
        if env_id == task.env_id and prompt.lower().split() == task.prompt.lower().split():
            return name
    return None


# --- a body in N states. All comes twice, for right and left: numbers (N, 2), points (N, 2, 3) in m


def height(x):
    """Of a point above the floor, m; of a direction: 1 is straight up, -1 straight down."""
    return x[..., 2]


def dot(x, y):
    """How far x reaches along the unit vector y; of two unit vectors, their angle's cosine."""
    return (x * y).sum(-1)


class Part:
    """A part of the body: its centre, and unit vectors to its front, outwards and up."""

    def __init__(self, centre, axes):
        self.centre = centre  # (N, 2, 3)
        self.front, left, self.up = np.moveaxis(axes, -1, 0)  # (N, 2, 3) each
        self.out = left * [[-1], [1]]  # the right one's way out is to its right

    def point(self, front, out, up):
        """The point of the part that lies so far, m, from its centre."""
        return self.centre + front * self.front + out * self.out + up * self.up

    def outwards(self, point):
        """How far out a point lies, m; negative: beyond the middle, on the other side."""
        return dot(point - self.centre, self.out)


class Humanoid:
    """Gymnasium's humanoid in states qpos (N, 24); torso and pelvis have two halves."""

    def __init__(self, model, qpos):
        data, centres, axes = mujoco.MjData(model), [], []
        for state in qpos:
            data.qpos[:] = state
            mujoco.mj_kinematics(model, data)
            centres.append(data.xpos.copy())  # (bodies, 3)
            axes.append(data.xmat.reshape(-1, 3, 3).copy())  # columns are front, left, up
        centres, axes = np.stack(centres), np.stack(axes)

        def part(name):
            pair = [model.body(name.format(side)).id for side in ("right", "left")]
            return Part(centres[:, pair], axes[:, pair])

        self.torso, self.pelvis = part("torso"), part("pelvis")
        self.thigh, self.shin = part("{}_thigh"), part("{}_shin")
        self.forearm, self.ankle = part("{}_lower_arm"), part("{}_foot")
        self.hand = self.forearm.point(0.18, -0.18, 0.18)
        self.foot = self.ankle.point(0, 0, 0.1)  # a ball
        self.sole = height(self.foot) - 0.075  # above the floor, m
        thigh_end = self.thigh.point(0, -0.01, -0.34)  # a knee is two capsules, this and the shin
        knee_above, knee_below = height(thigh_end) - 0.06, height(self.shin.centre) - 0.049
        self.knee = np.minimum(knee_above, knee_below)  # above the floor, m


def goals(model, qpos):
    """Which of the eight criteria hold in the humanoid's states qpos (N, 24): task -> (N,) bool."""
    return judge(Humanoid(model, qpos))


def judge(robot):
    """The same of a Humanoid. A condition is (N, 2), for right and left, or (N, 1) for both."""
    torso, pelvis, thigh, shin = robot.torso, robot.pelvis, robot.thigh, robot.shin
    upright = height(torso.up) > 0.8  # 37 degrees from the vertical
    stands = upright & (height(pelvis.centre) > 0.8)  # 0.97 when straight
    touching = robot.sole < 0.03
    on_feet = stands & touching.any(1, keepdims=True)
    one_in_the_air = (robot.sole > 0.1).any(1, keepdims=True)
    kneels = (height(shin.front) < -0.5) & (robot.knee < 0.015)  # front facing down
    seated = height(pelvis.centre) < 0.2  # a capsule of radius 0.09
    knee_out, foot_out = pelvis.outwards(shin.centre), pelvis.outwards(robot.foot)
    crossed = (knee_out > 0.2) & (foot_out < knee_out - 0.1) & (robot.knee < 0.1)
    straight = dot(thigh.up, shin.up) > 0.825  # a knee bent by at most 34.4 degrees
    flat = straight & (robot.sole < 0.1) & (robot.knee < 0.1)
    spread = dot(thigh.up[:, :1], thigh.up[:, 1:]) < -0.1736  # 100 degrees apart
    above_head = height(robot.hand) > height(torso.point(0, 0, 0.19))
    from_hip = robot.hand - pelvis.point(0, 0.2, 0.05)
    from_chest = robot.hand - torso.centre
    at_chest = (dot(from_chest, torso.front) > 0.1) & (abs(height(from_chest)) < 0.25)
    criteria = {
        "kneeling": upright & kneels,
        "lotus": upright & seated & crossed,
        "standing": stands & touching,
        "arms-raised": on_feet & above_head,
        "splits": seated & spread & flat,
        "hands-on-hips": on_feet & (np.linalg.norm(from_hip, axis=-1) < 0.15),
        "one-leg": on_feet & one_in_the_air,
        "arms-crossed": on_feet & at_chest & (torso.outwards(robot.hand) < -0.05),
    }
    return {task: both.all(1) for task, both in criteria.items()}  # of the right and of the left


# --- any task


def holds(task, model, states):
    """Whether a task's criterion holds, (N,) bool, in states qpos (N, nq), m and rad."""
    if task == "cartpole":
        return np.abs(states[:, 1]) < 0.2  # rad from the vertical
    return goals(model, states)[task]


def qpos_of(obs):
    """The humanoid's qpos (N, 24) from observations (N, 45), which hide where on the floor it is:
    here at x = y = 0."""
    return np.pad(obs[:, :22], ((0, 0), (2, 0)))


def met(task, model, obs):
    """Whether a task's criterion holds, (...) bool, in a rollout's observations (..., obs_dim)."""
    flat = obs.reshape(-1, obs.shape[-1])
    states = qpos_of(flat) if TASKS[task].env_id == HUMANOID else flat[:, :2]
    return holds(task, model, states).reshape(obs.shape[:-1])
