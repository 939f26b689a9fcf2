"""States of the two worlds that the simulator labels: postures by hand, and `labelled_states`, on
which evaluate.py and compare.py judge rewards."""

import mujoco
import numpy as np
from shared import configure, model_of, vlmrm

STAND = dict(hip_y=-5, knee=-12, shoulder1=10)
POSTURES = {  # task -> how a body that fulfils it may look, for `posture`: degrees
    "kneeling": dict(hip_y=-10, knee=-107),
    "lotus": dict(pitch=-9, abdomen_y=-71, hip_x=-24, hip_z=-60, hip_y=-2, knee=-160),
    "standing": STAND,
    "arms-raised": STAND | dict(shoulder1=-55, shoulder2=20, elbow=-28),
    "splits": dict(abdomen_y=-27, hip_x=-14, hip_z=-54, hip_y=-68, knee=-10),
    "hands-on-hips": STAND | dict(shoulder1=50, shoulder2=-69, elbow=-22),
    "one-leg": dict(pitch=25, abdomen_y=-23, hip_x=-10, hip_z=-13)
    | dict(right_hip_y=-45, right_knee=-82, left_hip_y=-22, left_knee=-32),
    "arms-crossed": STAND
    | dict(right_shoulder1=60, right_shoulder2=15, right_elbow=-62)
    | dict(left_shoulder1=51, left_shoulder2=-60, left_elbow=-14),
}


def posture(model, height=None, pitch=0, **degrees):
    """The humanoid's state qpos (nq,) by hand: torso height in m (None: its lowest point touches
    the floor), pitch forward and hinges in degrees. "knee" is both knees, "left_knee" one; left
    shoulders are mirrored."""
    qpos = model.qpos0.copy()
    qpos[3:7] = np.cos(np.radians(pitch) / 2), 0, np.sin(np.radians(pitch) / 2), 0
    for name, angle in degrees.items():
        joints = {f"right_{name}": 1, f"left_{name}": -1 if "shoulder" in name else 1}
        if name.startswith(("abdomen", "right", "left")):
            joints = {name: 1}
        for joint, sign in joints.items():
            qpos[model.joint(joint).qposadr[0]] = np.radians(sign * angle)
    qpos[2] = on_floor(model, qpos[None])[0] if height is None else height
    return qpos


def on_floor(model, states):
    """The torso heights (n,), m, at which humanoids in states qpos (n, nq) touch the floor."""
    data, heights = mujoco.MjData(model), []  # one for all: a new one takes longer than the rest
    radius, half_length = model.geom_size[1:, :2].T  # of capsules and balls; geom 0 is the floor
    for qpos in states:
        data.qpos[:] = qpos
        mujoco.mj_kinematics(model, data)
        lowest = data.geom_xpos[1:, 2] - half_length * np.abs(data.geom_xmat[1:, 8]) - radius
        heights.append(qpos[2] - lowest.min())
    return np.array(heights)


def settle(model, states, controls, frame_skip=5):
    """From qpos (n, nq) at rest under controls (T, n, nu): all states, (T + 1, n, nq)."""
    controls = np.asarray(controls)
    path = np.empty((len(controls) + 1, *np.shape(states)))
    data = mujoco.MjData(model)
    for i, qpos in enumerate(states):
        mujoco.mj_resetData(model, data)
        data.qpos[:] = path[0, i] = qpos
        mujoco.mj_forward(model, data)
        for t in range(len(controls)):
            data.ctrl[:] = controls[t, i]
            mujoco.mj_step(model, data, frame_skip)
            path[t + 1, i] = data.qpos
    return path


def labelled_states(task, seed=0):
    """States (n, nq) to judge rewards on, the same for everyone: positions (m) and angles (rad) of
    the cart-pole; for the humanoid noisy blends of standing with
    the posture of this task (300) and of every task (20 each), these as they settle, and at last
    under random torques."""
    rng = np.random.default_rng(seed)
    if task == "cartpole":
        return rng.uniform((-1, -1.5), (1, 1.5), (1000, 2))
    model, names = model_of(vlmrm.World(configure(task), 1)), [task] * 300 + [*POSTURES] * 20
    stand, start = posture(model, **STAND), []
    for name in names:
        share, noise = min(1, rng.uniform(0, 2)), rng.uniform(0, 0.1)
        goal = posture(model, **POSTURES[name])
        qpos = (1 - share) * stand + share * goal + rng.normal(0, noise, model.nq)
        qpos[3:7] /= np.linalg.norm(qpos[3:7])
        start.append(qpos)
    start = np.stack(start)
    start[:, 2] = on_floor(model, start)
    low, high = model.actuator_ctrlrange.astype(np.float32).T
    controls = rng.uniform(low, high, (30, len(names), model.nu))
    controls[:8] = 0
    return np.concatenate(settle(model, start, controls)[[0, 4, 8, 30]])


def pictures(world, states):
    """Pictures of states (n, nq), uint8 (n, H, W, 3), drawn by a World's simulations by turns."""
    world.reset()
    frames, velocity = [], np.zeros(model_of(world).nv)
    for i in range(0, len(states), len(world.sims)):
        for sim, state in zip(world.sims, states[i:], strict=False):
            sim.set_state(state, velocity)
        frames.extend(world.render())
    return np.stack(frames[: len(states)])


def embed(reward, cfg, states):
    """A CLIPReward's unit vectors (n, D) of pictures of states (n, nq), in a run's looks and from
    both sides by turns, as its policy is paid."""
    return reward.embed(pictures(vlmrm.World(cfg, 2, reward.image_size), states))
