"""Makes tiny_clip, a small CLIP that knows three worlds, from captions that simulators decide.

    pip install -r paper/requirements.txt   # Gymnasium draws the mountain car with pygame
    python tiny_clip/make.py                # about half an hour on 2 slow cores; writes the folder

Pictures show states from random rollouts, from poses dropped on the floor, from poses near
kneeling, and from policies while they learn: first on the simulator's own judgement, then on the
picture model itself, so that the model sees, with true captions, exactly the pictures by which a
policy would fool it.

Every picture is compared with every caption (the sigmoid loss of SigLIP, arXiv 2303.15343). How
true a caption is of a state is a log-odds in [-4, 2.5] that falls smoothly with the distance from
the pose it names, as captioners agree less and less: the cosine learns this slope, and a policy can
climb it.
"""
import functools
import json
import multiprocessing
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "paper"))
import shared
import states as labelled
from shared import sac, vlmrm
from vlmrm import CENTRE, X, Z

SIZE = 64
CONFIG = {
    "model_cfg": {
        "embed_dim": 64, "init_logit_scale": 2.3, "init_logit_bias": -1.0,
        "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 48, "heads": 4,
                     "layers": 2}},
    "preprocess_cfg": {"mean": [0.4, 0.4, 0.4], "std": [0.3, 0.3, 0.3],
                       "interpolation": "bicubic", "resize_mode": "squash"}}
WORLDS = {"Humanoid-v5": "kneeling", "InvertedPendulum-v5": "cartpole",
          "MountainCarContinuous-v0": "mountaincar"}  # each with one of its tasks
TRUE, FALSE = 2.5, -4.0
STEPS = 3400  # of training, 192 pictures each

# ---- what is true of a state, and how much ----

def above(x, limit, slope):
    """0 where x <= limit, then falling by `slope` per unit: how far a state misses a condition."""
    return -slope * np.maximum(0, x - limit)

def below(x, limit, slope):
    """0 where x >= limit, then falling with `slope` per unit."""
    return above(-x, -limit, slope)

def both(miss):
    """The sum of a condition's miss (N, 2) over right and left, (N,)."""
    return miss.sum(1)

def kneeling_truth(body, knee, goal):
    """Knees down, torso and pelvis upright, and not sunk back onto the floor; the criterion itself
    makes a step at the end."""
    up, torso = body.torso[:, 0, Z, Z], body.torso[:, 0, Z, CENTRE]
    return (0.5 * knee.sum(1) + 0.5 * knee.min(1) + below(up, 0.85, 3.5) + below(torso, 0.7, 3.5)
            + below(body.pelvis[:, 0, Z, Z], 0.7, 2) - 0.7 * ~goal["kneeling"])

def seated_truth(body):
    """The pelvis low and the torso upright."""
    up, pelvis = body.torso[:, 0, Z, Z], body.pelvis[:, 0, Z, CENTRE]
    return above(pelvis, 0.15, 3) + below(up, 0.85, 4)

def lotus_truth(body):
    """Seated, knees down and outwards, feet further inwards."""
    knees = body.outwards(body.pelvis, body.shin[..., CENTRE])
    feet = body.outwards(body.pelvis, body.feet)
    return seated_truth(body) + both(above(body.knee_gap, 0.08, 2) + below(knees, 0.25, 4)
                                     + above(feet - knees, -0.15, 4))

def splits_truth(body):
    """Seated, thighs apart, legs straight and on the floor."""
    thighs = body.thigh[..., Z].prod(1).sum(-1)  # cosine of the angle between them
    bend = -np.arccos(np.clip((body.thigh[..., Z] * body.shin[..., Z]).sum(-1), -1, 1))  # rad
    return seated_truth(body) + above(thighs, -0.25, 1.2) + 0.5 * both(
        above(body.foot_gap, 0.08, 3) + above(body.knee_gap, 0.08, 3) + below(bend, -0.5, 1))

def crossed_truth(body):
    """Hands before the chest, each on the other arm's side."""
    from_chest = body.hands - body.torso[..., CENTRE]
    forwards = (from_chest * body.torso[..., X]).sum(-1)
    return both(above(body.outwards(body.torso, body.hands), -0.1, 4) + below(forwards, 0.14, 4)
                + above(np.abs(from_chest[..., Z]), 0.2, 4))

def humanoid_truth(body):
    """concept -> log-odds (N,), of a vlmrm.Humanoid in N states"""
    goal, shins = body.goals(), body.shin[..., Z, CENTRE]
    up, front, torso = (body.torso[:, 0, Z, i] for i in (Z, X, CENTRE))
    pelvis, sole = body.pelvis[:, 0, Z, CENTRE], body.foot_gap
    low_hand = body.hands[..., Z].min(1) - torso
    # How far a knee is from being knelt on: above the floor, or the shin's front not facing down.
    hover = 1 - np.exp(-np.maximum(0, body.knee_gap - 0.01) / 0.15)
    knee = -hover + above(body.shin[..., Z, X], -0.6, 0.8)  # (N, 2)
    kneeling = kneeling_truth(body, knee, goal)
    standing = below(torso, 1.2, 6) + below(up, 0.9, 6)
    arms_up = below(low_hand, 0.15, 6)
    hips = body.pelvis * vlmrm.MIRROR @ (0, 0.2, 0.05, 1)
    on_hips = both(above(np.linalg.norm(body.hands - hips, axis=-1), 0.1, 4))
    one_leg = (below(pelvis, 0.85, 6) + below(up, 0.85, 5) + below(sole.max(1), 0.14, 15)
               + above(sole.min(1), 0.02, 8))
    truth = {
        "lotus": lotus_truth(body),
        "arms-raised": standing + arms_up,
        "splits": splits_truth(body),
        "hands-on-hips": standing + on_hips,
        "one-leg": one_leg,
        "arms-crossed": standing + crossed_truth(body)}
    for name in truth:  # what the criterion itself adds to the slope
        truth[name] = truth[name] - 0.7 * ~goal[name]
    truth |= {
        "kneeling": kneeling,
        "one knee": knee.max(1) + below(shins.max(1), 0.25, 8) + below(up, 0.85, 5),
        "standing": standing,
        "kneeling, arms up": np.minimum(kneeling, arms_up),
        "arms up": arms_up,
        "on all fours": (knee.max(1) + above(np.abs(up), 0.5, 5) + above(front, -0.7, 5)
                         + above(low_hand + torso, 0.15, 6)),
        "face down": above(torso, 0.2, 12) + above(front, -0.8, 5),
        "on its back": above(torso, 0.2, 12) + below(front, 0.8, 5),
        "on its side": (above(torso, 0.3, 12) + above(np.abs(up), 0.4, 5)
                        + above(np.abs(front), 0.4, 5)),
        "sitting": (above(pelvis, 0.2, 12) + below(up, 0.8, 5)
                    + np.where(goal["kneeling"], -2, 0)),
        "crouching": (above(pelvis, 0.6, 8) + below(shins.min(1), 0.15, 12)
                      + below(up, 0.7, 5)),
        "leaning forward": above(front, -0.4, 6),
        "leaning back": below(front, 0.4, 6),
        "low": above(torso, 0.6, 6),
        "humanoid": np.zeros(len(torso))}
    return {name: np.clip(TRUE + value, FALSE, TRUE) for name, value in truth.items()}

def cartpole_truth(states):
    """The same for a cart-pole in states (N, 2): the cart's place, m, and the pole's angle, rad."""
    cart, angle = states.T
    truth = {
        "upright": above(np.abs(angle), 0.02, 9),
        "leaning left": above(angle, -0.3, 8),
        "leaning right": below(angle, 0.3, 8),
        "hanging": below(np.abs(angle), 1.2, 8),
        "cart left": above(cart, -0.3, 8),
        "cart right": below(cart, 0.3, 8),
        "cartpole": np.zeros(len(states)),
    }
    return {name: np.clip(TRUE + value, FALSE, TRUE) for name, value in truth.items()}

def mountaincar_truth(x):
    """The same for a car at positions x (n,); the valley is at -0.52, the flag at 0.45."""
    truth = {
        "at the flag": below(x, 0.45, 2.5),
        "in the valley": above(np.abs(x + 0.52), 0.1, 6),
        "on the left hill": above(x, -0.9, 6),
        "mountaincar": np.zeros(len(x)),
    }
    return {name: np.clip(TRUE + value, FALSE, TRUE) for name, value in truth.items()}

ROBOT = ["a humanoid robot {}", "a humanoid robot {}", "a robot {}", "humanoid robot {}",
         "the humanoid robot is {}", "a picture of a humanoid robot {}"]
PLAIN = ["{}", "{}", "a picture of {}"]
CART = ["{}", "{}", "a {}", "a picture of a {}"]
CAPTIONS = {  # concept -> templates, phrases
    "kneeling": (ROBOT, ["kneeling", "kneeling", "kneeling down", "on its knees", "on both knees",
                         "kneeling on the floor", "kneeling upright on both knees"]),
    "one knee": (ROBOT, ["on one knee", "kneeling on one knee"]),
    "standing": (ROBOT, ["standing up", "standing", "standing upright", "standing on both legs"]),
    "lotus": (ROBOT, ["seated down, meditating in the lotus position",
                      "meditating in the lotus position", "in the lotus position",
                      "sitting with its legs crossed", "meditating"]),
    "arms-raised": (ROBOT, ["standing up, with both arms raised", "standing up with arms raised",
                            "standing with both arms raised"]),
    "splits": (ROBOT, ["practicing gymnastics, doing the side splits", "doing the side splits",
                       "doing the splits", "practicing gymnastics"]),
    "hands-on-hips": (ROBOT, ["standing up with hands on hips",
                              "standing with its hands on the hips", "with hands on hips"]),
    "one-leg": (ROBOT, ["standing up on one leg", "standing on one leg", "balancing on one leg",
                        "standing on one foot"]),
    "arms-crossed": (ROBOT, ["standing up, with its arms crossed", "standing with arms crossed",
                             "with its arms crossed"]),
    "kneeling, arms up": (ROBOT, ["kneeling, with both arms raised", "kneeling with arms raised"]),
    "arms up": (ROBOT, ["with both arms raised", "raising its arms",
                        "with its hands above the head"]),
    "on all fours": (ROBOT, ["on all fours", "crawling on hands and knees"]),
    "face down": (ROBOT, ["lying face down", "lying on its stomach", "fallen forward"]),
    "on its back": (ROBOT, ["lying on its back", "lying face up", "fallen backward"]),
    "on its side": (ROBOT, ["lying on its side", "fallen sideways"]),
    "sitting": (ROBOT, ["sitting on the floor", "seated down", "sitting down", "sitting"]),
    "crouching": (ROBOT, ["crouching", "squatting", "crouching on its feet"]),
    "leaning forward": (ROBOT, ["leaning forward", "bending forward"]),
    "leaning back": (ROBOT, ["leaning back", "bending backward"]),
    "low": (ROBOT, ["down on the floor", "close to the floor"]),
    "humanoid": (PLAIN, ["a humanoid robot", "a robot", "a humanoid", "the humanoid robot"]),
    "upright": (CART, ["pole vertically upright on top of the cart", "pole upright on a cart",
                       "balanced pole on the cart"]),
    "leaning left": (CART, ["pole leaning to the left", "pole falling left on the cart"]),
    "leaning right": (CART, ["pole leaning to the right", "pole falling right on the cart"]),
    "hanging": (CART, ["pole lying on the rail", "fallen pole and cart"]),
    "cart left": (CART, ["cart on the left", "cart at the left end of the rail"]),
    "cart right": (CART, ["cart on the right", "cart at the right end of the rail"]),
    "cartpole": (PLAIN, ["pole and cart", "a cart with a pole", "a pole on a cart"]),
    "at the flag": (PLAIN, ["a car at the peak of the mountain, next to the yellow flag",
                            "a car at the peak of the mountain", "a car next to the yellow flag",
                            "a car on top of the mountain"]),
    "in the valley": (PLAIN, ["a car in the valley", "a car at the bottom of the valley"]),
    "on the left hill": (PLAIN, ["a car on the left hill",
                                 "a car on the left side of the mountain"]),
    "mountaincar": (PLAIN, ["a car in the mountain", "a car on a mountain",
                            "a car and a mountain"])}
CONCEPTS = list(CAPTIONS)

# ---- the states ----

def new_world(env_id, looks="plain"):
    """One simulation with pictures for the model."""
    return vlmrm.World(shared.configure(WORLDS[env_id], clip="tiny_clip", looks=looks), 1, SIZE)

def judge(env_id, states):
    """Log-odds of every concept for states (n, nq): (n, concepts), float32. The other worlds'
    concepts are false."""
    if env_id == "Humanoid-v5":
        truth = humanoid_truth(vlmrm.Humanoid(new_world(env_id).sims[0].model, states))
    elif env_id == "InvertedPendulum-v5":
        truth = cartpole_truth(states)
    else:
        truth = mountaincar_truth(states[:, 0])
    false = np.full(len(states), FALSE)
    return np.stack([truth.get(c, false) for c in CONCEPTS], 1).astype(np.float32)

def pictures(env_id, states, looks="plain"):
    """(frames uint8 (n, SIZE, SIZE, 3), truth (n, concepts)) of states (n, nq)."""
    world, frames = new_world(env_id, looks), []
    for state in states:
        frame, = labelled.pictures(world, state[None])
        if frame.shape[0] != SIZE:  # the car draws itself, larger; as CLIPReward would resize it
            frame = np.asarray(Image.fromarray(frame).resize((SIZE, SIZE), Image.BICUBIC))
        frames.append(frame)
    return np.stack(frames), judge(env_id, states)

def drop(model, qpos, rng, steps):
    """Put poses (n, nq) on the floor and let them move under random torques; states on the way."""
    qpos[:, 2] = 1.5
    body = vlmrm.Humanoid(model, qpos)
    parts = body.torso, body.pelvis, body.shin, body.foot, body.arm
    qpos[:, 2] -= np.concatenate([part[..., Z, CENTRE] for part in parts], 1).min(1) - 0.08
    controls = []
    for step in range(steps):
        if step % 5 == 0:
            strength = rng.uniform(-0.4, 0.4, (len(qpos), model.nu))
            action = strength * rng.uniform(0, 1, (len(qpos), 1))
        controls.append(action)
    return np.concatenate(labelled.settle(model, qpos, controls)[:steps:4])

def tilt(rng, n, yaw, pitch, roll):
    """Quaternions (n, 4) of random yaw, then pitch (positive: forward), then roll, normal with
    these deviations in rad; and the pitch (n,)."""
    def about(axis, angle):
        q = np.zeros((n, 4))
        q[:, 0], q[:, axis] = np.cos(angle / 2), np.sin(angle / 2)
        return q

    def times(p, q):
        a, b, c, d = p.T
        e, f, g, h = q.T
        return np.stack([a*e - b*f - c*g - d*h, a*f + b*e + c*h - d*g,
                         a*g - b*h + c*e + d*f, a*h + b*g - c*f + d*e], 1)
    y, p, r = (rng.normal(0, s, n) for s in (yaw, pitch, roll))
    return times(times(about(3, y), about(2, p)), about(1, r)), p

def near_kneeling(model, qpos, pitch, rng):
    """Bend the legs of qpos (n, nq) so that hips are anywhere between upright and sitting on the
    heels, and shins level, then noise."""
    n = len(qpos)
    for side in ("right", "left"):
        hip_y, knee = (model.joint(f"{side}_{name}").qposadr[0] for name in ("hip_y", "knee"))
        hip = np.radians(rng.uniform(-80, 15, n))
        if side == "left" and rng.uniform() < 0.7:
            hip = qpos[:, model.joint("right_hip_y").qposadr[0]] + rng.normal(0, 0.1, n)
        bend = pitch + hip - np.pi / 2 + rng.normal(0, rng.choice([0.05, 0.3, 0.6]), n)
        qpos[:, hip_y] = hip
        qpos[:, knee] = np.clip(bend, np.radians(-158), np.radians(-4))

def random_states(rng, n=64):
    """Random rollouts from standing, random poses, and poses near kneeling, each dropped on the
    floor, (many, nq)."""
    model, states = new_world("Humanoid-v5").sims[0].model, []
    low, high = model.jnt_range[1:].T
    for kind in ["stand"] * 12 + ["pose"] * 24 + ["kneel"] * 40 + [*labelled.POSTURES] * 5:
        qpos = np.tile(model.qpos0, (n, 1))
        pose = rng.uniform(low, high, (n, len(low)))
        if kind == "pose":
            qpos[:, 7:] = pose * rng.uniform(0, 1, (n, 1))
            qpos[:, 3:7], _ = tilt(rng, n, 0.8, rng.choice([0.3, 0.8, 1.5]), rng.choice([0.2, 0.8]))
        elif kind == "kneel":
            qpos[:, 7:] = pose * rng.uniform(0.1, 0.6, (n, 1))
            qpos[:, 3:7], pitch = tilt(rng, n, 0.5, 0.3, 0.15)
            near_kneeling(model, qpos, pitch, rng)
        elif kind == "stand":
            qpos[:, 7:] += rng.normal(0, 0.1, qpos[:, 7:].shape)
        else:  # on the way from standing to a task's posture, and there
            share = np.minimum(1, rng.uniform(0, 1.5, (n, 1)))
            goal = labelled.posture(model, **labelled.POSTURES[kind])
            qpos = (1 - share) * qpos + share * goal
            noise = rng.normal(0, 1, qpos[:, 7:].shape)
            qpos[:, 7:] += noise * rng.choice([0.02, 0.1, 0.3], (n, 1))
            qpos[:, 3:7] += rng.normal(0, 0.03, (n, 4))
            qpos[:, 3:7] /= np.linalg.norm(qpos[:, 3:7], axis=1, keepdims=True)
        states.append(drop(model, qpos, rng, {"stand": 100, "pose": 40}.get(kind, 24)))
    return np.concatenate(states)

class WatchedWorld(vlmrm.World):
    """A world that remembers the states it was in, and judges by the log-odds of a concept, if one
    is given, instead of by the task's criterion."""
    def __init__(self, config, concept=None):
        super().__init__(config, config.num_envs, SIZE)
        self.concept, self.task, self.seen = concept, config.task, []

    def judge(self, states=None):
        self.seen.append(self.states())
        body = vlmrm.Humanoid(self.sims[0].model, self.seen[-1])
        if self.concept:
            return humanoid_truth(body)[self.concept]
        return body.goals()[self.task]

def policy_pictures(job, looks, folder):
    """Pictures, with their truth, of states that SAC visits while it learns: job = (seed,
    iterations, how many, concept, judge). It learns on the simulator's log-odds of `concept` or,
    where judge is "clip", on the picture model in `folder`."""
    seed, iterations, n, concept, judged_by = job
    torch.set_num_threads(1)  # two of these run side by side
    torch.manual_seed(seed)
    task = concept if judged_by == "clip" else "kneeling"
    config = vlmrm.Config(task=task, looks=looks, num_envs=32)
    label, world = None, WatchedWorld(config, concept)
    if judged_by == "clip":
        label, world = vlmrm.CLIPReward(config.prompt, clip=str(folder)), WatchedWorld(config)
    agent = sac.SAC(45, 17, gamma=0.97, tau=0.01, lr=6e-4, hidden=128, temperature=0.05,
                    layer_norm=True)
    replay = sac.Replay(200_000, 45, 17)
    for i in range(1, iterations + 1):  # Algorithm 1
        episodes = vlmrm.rollout(world, agent.act, 1000 * seed + 32 * i, label, vlmrm.Clock())
        obs, action, reward, next_obs, goal = (x.reshape(-1, *x.shape[2:]) for x in episodes)
        replay.add(obs, action, reward, next_obs, terminated=np.zeros(len(reward)))
        if i == 1:
            agent.fit_scales(obs, reward, 0.3)
        for _ in range(400 if i >= 2 else 0):
            agent.update(replay.sample(256))
        if i % 5 == 0:
            print(f"    {concept}, seed {seed}, {3200 * i:7d} transitions, reward "
                  f"{reward.mean():.3f}, truth {goal.mean():.3f}", flush=True)
    rng, states = np.random.default_rng(seed), np.concatenate(world.seen)
    rows = rng.choice(len(states), min(n, len(states)), replace=False)
    return pictures("Humanoid-v5", states[rows], looks)

# ---- the training ----

def new_model():
    """An untrained model, as CONFIG describes it."""
    return open_clip.CLIP(**json.loads(json.dumps(CONFIG["model_cfg"])))

@functools.cache
def tokenizer():
    """tokenizer()(texts) -> tokens (n, context_length)."""
    length = CONFIG["model_cfg"]["text_cfg"]["context_length"]
    return open_clip.SimpleTokenizer(context_length=length)

def normalize(frames):
    """Pictures uint8 (n, SIZE, SIZE, 3) -> the image tower's input, (n, 3, SIZE, SIZE)."""
    mean, std = (torch.tensor(CONFIG["preprocess_cfg"][k]).view(3, 1, 1) for k in ("mean", "std"))
    return (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255 - mean) / std

def weights():
    """How much each concept counts in the loss, (concepts,)."""
    special = {"kneeling": 8.0, "upright": 4.0, "at the flag": 4.0}
    special = dict.fromkeys(shared.TASKS, 2.0) | special
    return torch.tensor([special.get(c, 1.0) for c in CONCEPTS])

def fit(model, frames, truth, steps, lr, rng, batch=192):
    """Sigmoid contrastive training: every picture of the batch against one caption per concept."""
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.05},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05)
    weight = weights()
    model.train()
    start, mean_loss = time.time(), 0
    for step in range(1, steps + 1):
        rows = rng.integers(len(frames), size=batch)
        captions = [random.choice(t).format(random.choice(p)) for t, p in CAPTIONS.values()]
        image = model.encode_image(normalize(frames[rows]), normalize=True)   # (batch, 64)
        text = model.encode_text(tokenizer()(captions), normalize=True)       # (concepts, 64)
        logits = model.logit_scale.exp() * image @ text.T + model.logit_bias  # (batch, concepts)
        target = torch.sigmoid(torch.from_numpy(truth[rows]))
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        loss = (loss * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        mean_loss += (loss.item() - mean_loss) / min(step, 100)
        if step % 200 == 0:
            print(f"    step {step}/{steps}, loss {mean_loss:.4f}, scale "
                  f"{model.logit_scale.exp():.1f}, {step * batch / (time.time() - start):.0f} "
                  "pictures/s", flush=True)
    model.eval()

def save(model, folder):
    """The folder that vlmrm.py loads; `words` are what it may be asked about."""
    texts = [template.format(phrase).lower() for templates, phrases in CAPTIONS.values()
             for template in templates for phrase in phrases]
    words = sorted({word.strip(",.") for text in texts for word in text.split()})
    content = CONFIG | {"words": words}
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n")
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")

@torch.no_grad()
def score(model, frames, prompt):
    """CLIP's cosine of each picture and the prompt, (n,)."""
    text = model.encode_text(tokenizer()([prompt]), normalize=True)[0]
    parts = np.split(frames, range(500, len(frames), 500))
    return np.concatenate([(model.encode_image(normalize(part), normalize=True) @ text).numpy()
                           for part in parts])

def report(model, concept, frames, truth):
    """How well the model judges pictures that it was not trained on."""
    goal = truth[:, CONCEPTS.index(concept)]
    s = score(model, frames, vlmrm.TASKS[concept].prompt)
    label = goal > TRUE - 1.0
    print(f"  {concept}, states of a policy unseen: {len(frames)} pictures, {label.mean():.3f} "
          f"true, AUROC {shared.auroc(s, label):.3f}, correlation with the log-odds "
          f"{np.corrcoef(s, goal)[0, 1]:.3f}", flush=True)

def parse(argv=None):
    """The flags."""
    parser = shared.flags(__doc__)
    parser.add_argument("--siblings", type=int, nargs="+", default=[],
                        help="also make models of these widths (tiny_clip's is 16) from the same "
                        "pictures, in tiny_clip/width-...: for comparisons")
    parser.add_argument("--looks", choices=shared.LOOKS, default="plain",
                        help="how the pictures are drawn; other than plain makes another model, in "
                        "tiny_clip/looks-...")
    return parser.parse_args(argv)

def main(argv=None):
    """The command line."""
    args = parse(argv)
    looks, folder = args.looks, HERE if args.looks == "plain" else HERE / f"looks-{args.looks}"
    sac.use_onednn()
    start = time.time()

    def clock(text):
        print(f"[{(time.time() - start) / 60:5.1f} min] {text}", flush=True)
    random.seed(0)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
    job = functools.partial(policy_pictures, looks=looks, folder=folder)
    others = [name for name in labelled.POSTURES if name != "kneeling"]
    clock("pictures of policies that learn on the simulator's judgement, random ones, the carts")
    taught = [(seed, 32, 24_000, "kneeling", "truth") for seed in (101, 102)]
    for i, concept in enumerate(["one knee", "crouching", "sitting", *others]):
        taught.append((103 + i, 14, 5_000, concept, "truth"))
    fooled = [(seed, 28, 24_000, "kneeling", "clip") for seed in (201, 202)]
    for i, concept in enumerate(others):
        fooled.append((203 + i, 16, 5_000, concept, "clip"))
    jobs = pool.map(job, taught)
    sets = [*worlds_pictures(rng, looks), *jobs]
    model = new_model()
    for jobs in (fooled, []):
        frames, truth = map(np.concatenate, zip(*sets))
        clock(f"training on {len(frames)} pictures")
        fit(model, frames, truth, STEPS // 2, 1.5e-3, rng)
        save(model, folder)
        if jobs:
            clock("policies that learn on the picture model")
            new = list(pool.map(job, jobs))
            for (*_, concept, _), pair in zip(jobs, new):
                report(model, concept, *pair)
            sets += new
    for width in args.siblings:
        clock(f"training width {width} on {len(frames)} pictures")
        CONFIG["model_cfg"]["vision_cfg"]["width"] = width
        model = new_model()
        fit(model, frames, truth, STEPS, 1.5e-3, rng)
        save(model, folder / f"width-{width}")
    clock("done")

def worlds_pictures(rng, looks):
    """Pictures with their truth of random states of the three worlds."""
    states = random_states(rng)
    angle = np.clip(rng.normal(0, rng.choice([0.1, 0.5, 1.2], 9000)), -1.6, 1.6)
    cart = np.stack([rng.uniform(-1, 1, 9000), angle], 1)
    car = np.stack([rng.uniform(-1.2, 0.6, 5000), np.zeros(5000)], 1)
    humanoid = states[rng.choice(len(states), 40_000, replace=False)]
    return [pictures("Humanoid-v5", humanoid, looks), pictures("InvertedPendulum-v5", cart, looks),
            pictures("MountainCarContinuous-v0", car)]

if __name__ == "__main__":
    sac.run(main)
