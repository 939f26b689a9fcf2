"""How true a caption is of a state: log-odds from -5.5 to 1 that fall smoothly with the distance
from the pose it names, as captioners agree less and less. tiny_clip learned them (make.py), and
sight.py trains on them. The numbers are our choice; 1 at the goal, where the sigmoid loss is
steep, so that the last centimetres count in it."""

import numpy as np
from criteria import HUMANOID, TASKS, Humanoid, dot, height, judge

TRUE, FALSE = 1.0, -5.5
CONCEPTS = {"cartpole": "upright"}  # of another task: its name


def above(x, limit, slope):
    """0 where x <= limit, then falling by `slope` per unit, and at first four times as fast: how
    far a state misses a condition. The last centimetres decide, so they have the steepest slope."""
    miss = slope * np.maximum(0, x - limit)
    return -miss - 0.3 * (1 - np.exp(-10 * miss))


def below(x, limit, slope):
    """0 where x >= limit, then falling with `slope` per unit."""
    return above(-x, -limit, slope)


def heights(robot):
    """Of the torso's up and front, -1 to 1, and of torso and pelvis, m: (N,) each."""
    torso, pelvis = robot.torso, robot.pelvis
    return (height(x)[:, 0] for x in (torso.up, torso.front, torso.centre, pelvis.centre))


def seated(robot):
    """The pelvis low and the torso upright, (N,)."""
    up, _, _, pelvis = heights(robot)
    return above(pelvis, 0.18, 10) + below(up, 0.85, 4)


def knelt_on(robot):
    """A knee on the floor, the shin's front facing down, (N, 2)."""
    hover = 1 - np.exp(-np.maximum(0, robot.knee - 0.01) / 0.15)
    return above(height(robot.shin.front), -0.6, 0.8) - hover


def kneeling(robot):
    """On both knees, torso and pelvis upright, and not sunk back onto the floor, (N,)."""
    up, _, torso, _ = heights(robot)
    knee, pelvis_up = knelt_on(robot), height(robot.pelvis.up)[:, 0]
    upright = below(up, 0.85, 3.5) + below(torso, 0.7, 3.5) + below(pelvis_up, 0.7, 2)
    return 0.5 * knee.sum(1) + 0.5 * knee.min(1) + upright


def lotus(robot):
    """Seated, knees down and outwards, feet further inwards and in front, but not far, (N,). The
    pelvis has to tilt back for it, to 80 degrees; if it rolls on, the knees rise."""
    knee = robot.pelvis.outwards(robot.shin.centre)
    foot = robot.pelvis.outwards(robot.foot)
    ahead = dot(robot.foot - robot.pelvis.centre, robot.torso.front)
    legs = above(robot.knee, 0.07, 12) + below(knee, 0.22, 4) + above(foot - knee, -0.13, 4)
    feet = below(ahead, 0.0, 6) + above(ahead, 0.18, 6)
    rolled = below(height(robot.pelvis.up)[:, 0], 0.1, 6)
    low = above(height(robot.pelvis.centre)[:, 0], 0.18, 10)  # again: it is not to sit on its feet
    return seated(robot) + rolled + low + (legs + feet).sum(1)


def splits(robot):
    """Seated, thighs apart, legs straight and on the floor, (N,)."""
    apart = dot(robot.thigh.up[:, 0], robot.thigh.up[:, 1])  # cosine
    bend = np.arccos(np.clip(dot(robot.thigh.up, robot.shin.up), -1, 1))  # rad
    legs = above(robot.sole, 0.06, 3) + above(robot.knee, 0.06, 3) + above(bend, 0.4, 1)
    return seated(robot) + above(apart, -0.35, 1.2) + 0.5 * legs.sum(1)


def crossed(robot):
    """Hands before the chest, each on the other arm's side, (N,)."""
    from_chest = robot.hand - robot.torso.centre
    ahead = dot(from_chest, robot.torso.front)
    across = above(robot.torso.outwards(robot.hand), -0.12, 4)
    forwards = below(ahead, 0.14, 4)
    near = -2 * np.maximum(0, ahead - 0.4)  # an arm stretched forwards is not crossed
    return (across + forwards + near + above(np.abs(height(from_chest)), 0.2, 4)).sum(1)


def humanoid(robot):
    """concept -> how far a criteria.Humanoid misses it, (N,), at most 0."""
    goal, (up, _, torso, pelvis) = judge(robot), heights(robot)
    upright = below(torso, 1.2, 6) + below(up, 0.9, 6)
    arms_up = below(height(robot.hand).min(1) - torso, 0.3, 5)
    to_hips = np.linalg.norm(robot.hand - robot.pelvis.point(0, 0.2, 0.05), axis=-1)
    balanced = below(pelvis, 0.85, 6) + below(up, 0.85, 5)
    one_foot = below(robot.sole.max(1), 0.18, 12) + above(robot.sole.min(1), 0.02, 8)
    miss = {
        "kneeling": kneeling(robot),
        "lotus": lotus(robot),
        "standing": upright + above(robot.sole.max(1), 0.02, 6),
        "arms-raised": upright + arms_up,
        "splits": splits(robot),
        "hands-on-hips": upright + above(to_hips, 0.06, 3).sum(1),
        "one-leg": balanced + one_foot,
        "arms-crossed": upright + crossed(robot),
    }
    miss = {name: x - 0.7 * ~goal[name] for name, x in miss.items()}  # the criterion: a step
    miss["arms up"] = arms_up
    miss["kneeling, arms up"] = np.minimum(miss["kneeling"], arms_up)
    return miss | others(robot, goal["kneeling"])


def others(robot, kneels):
    """The same of concepts that are no task; kneels, (N,) bool, is no sitting."""
    up, front, torso, pelvis = heights(robot)
    knee, shin, low_hand = (
        knelt_on(robot).max(1),
        height(robot.shin.centre),
        height(robot.hand).min(1),
    )
    level, aslant = above(np.abs(up), 0.5, 5), above(np.abs(up), 0.4, 5)
    squat = above(pelvis, 0.6, 8) + below(shin.min(1), 0.15, 12)
    return {
        "one knee": knee + below(shin.max(1), 0.25, 8) + below(up, 0.85, 5),
        "on all fours": knee + level + above(front, -0.7, 5) + above(low_hand, 0.15, 6),
        "face down": above(torso, 0.2, 12) + above(front, -0.8, 5),
        "on its back": above(torso, 0.2, 12) + below(front, 0.8, 5),
        "on its side": above(torso, 0.3, 12) + aslant + above(np.abs(front), 0.4, 5),
        "sitting": above(pelvis, 0.2, 12) + below(up, 0.8, 5) - 2 * kneels,
        "crouching": squat + below(up, 0.7, 5),
        "leaning forward": above(front, -0.4, 6),
        "leaning back": below(front, 0.4, 6),
        "low": above(torso, 0.6, 6),
        "humanoid": 0 * torso,
    }


def cartpole(states):
    """The same for a cart-pole in states (N, 2): the cart's place, m, and the pole's angle, rad."""
    cart, angle = states.T
    return {
        "upright": above(np.abs(angle), 0.02, 9),
        "leaning left": above(angle, -0.3, 8),
        "leaning right": below(angle, 0.3, 8),
        "hanging": below(np.abs(angle), 1.2, 8),
        "cart left": above(cart, -0.3, 8),
        "cart right": below(cart, 0.3, 8),
        "cartpole": 0 * cart,
    }


def log_odds(env_id, model, states):
    """concept -> log-odds (N,), of all that is said about a world in states (N, nq)."""
    miss = humanoid(Humanoid(model, states)) if env_id == HUMANOID else cartpole(states)
    scale = TRUE - FALSE  # far from the pose there is still a slope
    return {concept: FALSE + scale * np.exp(x / scale) for concept, x in miss.items()}


def graded(task, model, states):
    """A task's log-odds in states (N, nq), (N,)."""
    return log_odds(TASKS[task].env_id, model, states)[CONCEPTS.get(task, task)]
