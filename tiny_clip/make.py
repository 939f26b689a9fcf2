"""Makes tiny_clip: a small CLIP that knows our three worlds, trained on captions that the simulator's state decides.

    pip install pygame              # Gymnasium draws the mountain car with it
    python tiny_clip/make.py        # about 27 minutes on 2 slow cores; writes open_clip_config.json and the weights

Pictures show states from random rollouts, from poses dropped on the floor, from poses near kneeling, and from policies
while they learn: first on the simulator's own judgement, then on the picture model itself, so that the model sees, with
true captions, exactly the pictures by which a policy would fool it.

Every picture is compared with every caption (the sigmoid loss of SigLIP, arXiv 2303.15343). How true a caption is of a
state is a log-odds in [-4, 2.5] that falls smoothly with the distance from the pose it names, as captioners agree less
and less: the cosine learns this slope, and a policy can climb it.
"""
import argparse
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
sys.path.insert(0, str(HERE.parent))
import sac
import vlmrm

SIZE = 64
CONFIG = {
    "model_cfg": {
        "embed_dim": 64, "init_logit_scale": 2.3, "init_logit_bias": -1.0,
        "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2}},
    "preprocess_cfg": {"mean": [0.4, 0.4, 0.4], "std": [0.3, 0.3, 0.3], "interpolation": "bicubic", "resize_mode": "squash"}}
TRUE, FALSE = 2.5, -4.0
STEPS = 3400  # of training, 192 pictures each


# ------------------------------------------------------------------------------------- what is true of a state, and how much

def above(x, limit, slope):
    """0 where x <= limit, then falling with `slope` per unit: how far a state misses a condition."""
    return -slope * np.maximum(0, x - limit)


def below(x, limit, slope):
    return above(-x, -limit, slope)


def knee(world, side):
    """How far a knee is from being knelt on: above the floor, or with the shin's front not facing down."""
    hover = 1 - np.exp(-np.maximum(0, vlmrm.knee_gap(world, side) - 0.01) / 0.15)
    return -hover + above(world.axis(f"{side}_shin", "x")[:, 2], -0.6, 0.8)


def sides(miss):
    """The sum of a condition's miss over right (-1) and left (1)."""
    return sum(miss(side, sign) for side, sign in vlmrm.SIDES.items())


def humanoid_truth(world):
    """concept -> log-odds (num_envs,)"""
    up, front = world.axis("torso", "z")[:, 2], world.axis("torso", "x")[:, 2]
    torso, pelvis = world.point("torso")[:, 2], world.point("pelvis")[:, 2]
    right, left = knee(world, "right"), knee(world, "left")
    upright = below(up, 0.85, 5)
    shins = world.point("right_shin")[:, 2], world.point("left_shin")[:, 2]
    lowest_knee, highest_knee = np.minimum(*shins), np.maximum(*shins)
    hand, gap, sole = vlmrm.hand, vlmrm.knee_gap, vlmrm.foot_gap
    low_hand = np.minimum(hand(world, "right")[:, 2], hand(world, "left")[:, 2]) - torso
    outwards = lambda body, point, sign: vlmrm.across(world, body, point) * sign
    forwards = lambda point: ((point - world.point("torso")) * world.axis("torso", "x")).sum(-1)
    # Knees down, torso and pelvis upright, and not sunk back onto the floor; the criterion itself makes a step at the end.
    kneeling = (0.5 * (right + left) + 0.5 * np.minimum(right, left) + below(up, 0.85, 3.5) + below(torso, 0.7, 3.5)
                + below(world.axis("pelvis", "z")[:, 2], 0.7, 2) - 0.7 * ~vlmrm.kneeling(world))
    one_knee = np.maximum(right, left) + below(highest_knee, 0.25, 8) + upright
    standing = below(torso, 1.2, 6) + below(up, 0.9, 6)
    arms_up = below(low_hand, 0.15, 6)
    seated = above(pelvis, 0.15, 3) + below(up, 0.85, 4)
    thighs = (world.axis("right_thigh", "z") * world.axis("left_thigh", "z")).sum(-1)  # cosine of the angle between them
    lotus = seated + sides(lambda side, sign: above(gap(world, side), 0.08, 2) + below(outwards("pelvis", vlmrm.knee(world, side), sign), 0.25, 4)
                           + above(outwards("pelvis", vlmrm.foot(world, side), sign) - outwards("pelvis", vlmrm.knee(world, side), sign), -0.15, 4))
    splits = seated + above(thighs, -0.25, 1.2) + 0.5 * sides(
        lambda side, _: above(sole(world, side), 0.08, 3) + above(gap(world, side), 0.08, 3) + below(world.angle(f"{side}_knee"), -0.5, 1))
    on_hips = sides(lambda side, sign: above(np.linalg.norm(hand(world, side) - world.point("pelvis", (0, 0.2 * sign, 0.05)), axis=-1), 0.1, 4))
    crossed = sides(lambda side, sign: above(outwards("torso", hand(world, side), sign), -0.1, 4) + below(forwards(hand(world, side)), 0.14, 4)
                    + above(np.abs(hand(world, side)[:, 2] - torso), 0.2, 4))
    soles = sole(world, "right"), sole(world, "left")
    one_leg = below(pelvis, 0.85, 6) + below(up, 0.85, 5) + below(np.maximum(*soles), 0.14, 15) + above(np.minimum(*soles), 0.02, 8)
    step = lambda name: -0.7 * ~vlmrm.TASKS[name].goal(world)  # what the criterion itself adds to the slope
    truth = {
        "kneeling": kneeling,
        "one knee": one_knee,
        "standing": standing,
        "lotus": lotus + step("lotus"),
        "arms-raised": standing + arms_up + step("arms-raised"),
        "splits": splits + step("splits"),
        "hands-on-hips": standing + on_hips + step("hands-on-hips"),
        "one-leg": one_leg + step("one-leg"),
        "arms-crossed": standing + crossed + step("arms-crossed"),
        "kneeling, arms up": np.minimum(kneeling, arms_up),
        "arms up": arms_up,
        "on all fours": np.maximum(right, left) + above(np.abs(up), 0.5, 5) + above(front, -0.7, 5) + above(low_hand + torso, 0.15, 6),
        "face down": above(torso, 0.2, 12) + above(front, -0.8, 5),
        "on its back": above(torso, 0.2, 12) + below(front, 0.8, 5),
        "on its side": above(torso, 0.3, 12) + above(np.abs(up), 0.4, 5) + above(np.abs(front), 0.4, 5),
        "sitting": above(pelvis, 0.2, 12) + below(up, 0.8, 5) + np.where(vlmrm.kneeling(world), -2, 0),
        "crouching": above(pelvis, 0.6, 8) + below(lowest_knee, 0.15, 12) + below(up, 0.7, 5),
        "leaning forward": above(front, -0.4, 6),
        "leaning back": below(front, 0.4, 6),
        "low": above(torso, 0.6, 6),
        "humanoid": np.zeros(world.num_envs),
    }
    return {name: np.clip(TRUE + value, FALSE, TRUE) for name, value in truth.items()}


def cartpole_truth(world):
    angle, cart = world.qpos[:, 1], world.qpos[:, 0]
    truth = {
        "upright": above(np.abs(angle), 0.02, 9),
        "leaning left": above(angle, -0.3, 8),
        "leaning right": below(angle, 0.3, 8),
        "hanging": below(np.abs(angle), 1.2, 8),
        "cart left": above(cart, -0.3, 8),
        "cart right": below(cart, 0.3, 8),
        "cartpole": np.zeros(world.num_envs),
    }
    return {name: np.clip(TRUE + value, FALSE, TRUE) for name, value in truth.items()}


def mountaincar_truth(x):
    """The same for a car at positions x (n,), of which the valley is at -0.52 and the flag at 0.45."""
    truth = {
        "at the flag": below(x, 0.45, 2.5),
        "in the valley": above(np.abs(x + 0.52), 0.1, 6),
        "on the left hill": above(x, -0.9, 6),
        "mountaincar": np.zeros(len(x)),
    }
    return {name: np.clip(TRUE + value, FALSE, TRUE) for name, value in truth.items()}


ROBOT = ["a humanoid robot {}", "a humanoid robot {}", "a robot {}", "humanoid robot {}", "the humanoid robot is {}", "a picture of a humanoid robot {}"]
PLAIN = ["{}", "{}", "a picture of {}"]
CART = ["{}", "{}", "a {}", "a picture of a {}"]
CAPTIONS = {  # concept -> templates, phrases
    "kneeling": (ROBOT, ["kneeling", "kneeling", "kneeling down", "on its knees", "on both knees", "kneeling on the floor",
                         "kneeling upright on both knees"]),
    "one knee": (ROBOT, ["on one knee", "kneeling on one knee"]),
    "standing": (ROBOT, ["standing up", "standing", "standing upright", "standing on both legs"]),
    "lotus": (ROBOT, ["seated down, meditating in the lotus position", "meditating in the lotus position", "in the lotus position",
                      "sitting with its legs crossed", "meditating"]),
    "arms-raised": (ROBOT, ["standing up, with both arms raised", "standing up with arms raised", "standing with both arms raised"]),
    "splits": (ROBOT, ["practicing gymnastics, doing the side splits", "doing the side splits", "doing the splits", "practicing gymnastics"]),
    "hands-on-hips": (ROBOT, ["standing up with hands on hips", "standing with its hands on the hips", "with hands on hips"]),
    "one-leg": (ROBOT, ["standing up on one leg", "standing on one leg", "balancing on one leg", "standing on one foot"]),
    "arms-crossed": (ROBOT, ["standing up, with its arms crossed", "standing with arms crossed", "with its arms crossed"]),
    "kneeling, arms up": (ROBOT, ["kneeling, with both arms raised", "kneeling with arms raised"]),
    "arms up": (ROBOT, ["with both arms raised", "raising its arms", "with its hands above the head"]),
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
    "upright": (CART, ["pole vertically upright on top of the cart", "pole upright on a cart", "balanced pole on the cart"]),
    "leaning left": (CART, ["pole leaning to the left", "pole falling left on the cart"]),
    "leaning right": (CART, ["pole leaning to the right", "pole falling right on the cart"]),
    "hanging": (CART, ["pole lying on the rail", "fallen pole and cart"]),
    "cart left": (CART, ["cart on the left", "cart at the left end of the rail"]),
    "cart right": (CART, ["cart on the right", "cart at the right end of the rail"]),
    "cartpole": (PLAIN, ["pole and cart", "a cart with a pole", "a pole on a cart"]),
    "at the flag": (PLAIN, ["a car at the peak of the mountain, next to the yellow flag", "a car at the peak of the mountain",
                            "a car next to the yellow flag", "a car on top of the mountain"]),
    "in the valley": (PLAIN, ["a car in the valley", "a car at the bottom of the valley"]),
    "on the left hill": (PLAIN, ["a car on the left hill", "a car on the left side of the mountain"]),
    "mountaincar": (PLAIN, ["a car in the mountain", "a car on a mountain", "a car and a mountain"]),
}
CONCEPTS = list(CAPTIONS)


# ------------------------------------------------------------------------------------------------------------- the states

def judge(env_id, qpos):
    """Log-odds of every concept for the states `qpos` (n, nq): (n, concepts). The other worlds' concepts are false."""
    world, rows = vlmrm.World(env_id, 256), []
    for part in np.split(qpos, range(256, len(qpos), 256)):
        world.set_state(np.resize(part, (256, part.shape[1])))
        truth = humanoid_truth(world) if env_id == "Humanoid-v5" else cartpole_truth(world)
        rows.append(np.stack([truth.get(c, np.full(256, FALSE)) for c in CONCEPTS], 1)[:len(part)])
    return np.concatenate(rows).astype(np.float32)


def pictures(env_id, qpos, looks="plain"):
    """(frames uint8 (n, SIZE, SIZE, 3), truth (n, concepts)) of the states `qpos`."""
    world, frames = vlmrm.World(env_id, 100, SIZE, looks), []
    for part in np.split(qpos, range(100, len(qpos), 100)):
        world.set_state(np.resize(part, (100, part.shape[1])))
        frames.append(world.render()[:len(part)])
    world.close()
    return np.concatenate(frames), judge(env_id, qpos)


def mountaincar_pictures(x):
    """The same for Gymnasium's mountain car at positions x (n,), as CLIPReward would resize them."""
    world, frames = vlmrm.GymWorld("MountainCarContinuous-v0", 1, SIZE, 200), []
    for position in x:
        world.env.envs[0].unwrapped.state = np.array([position, 0])
        frames.append(np.asarray(Image.fromarray(world.render()[0]).resize((SIZE, SIZE), Image.BICUBIC)))
    truth = mountaincar_truth(x)
    return np.stack(frames), np.stack([truth.get(c, np.full(len(x), FALSE)) for c in CONCEPTS], 1).astype(np.float32)


def drop(world, qpos, rng, steps):
    """Put poses on the floor and let them move under random torques; the states on the way, (n, nq)."""
    qpos[:, 2] = 1.5
    world.set_state(qpos)
    lowest = np.min([world.point(b)[:, 2] for b in ("torso", "pelvis", "right_shin", "left_shin", "right_foot", "left_foot",
                                               "right_lower_arm", "left_lower_arm")], 0)
    qpos[:, 2] -= lowest - 0.08
    world.set_state(qpos)
    states, action = [], 0
    for step in range(steps):
        if step % 4 == 0:
            states.append(world.qpos.copy())
        if step % 5 == 0:
            action = rng.uniform(-0.4, 0.4, world.ctrl.shape) * rng.uniform(0, 1, (world.num_envs, 1))
        world.step(action)
    return np.concatenate(states)


def tilt(rng, n, yaw, pitch, roll):
    """Quaternions (n, 4) of random yaw, then pitch (positive: forward), then roll, normal with these deviations in rad."""
    def about(axis, angle):
        q = np.zeros((n, 4))
        q[:, 0], q[:, axis] = np.cos(angle / 2), np.sin(angle / 2)
        return q
    def times(p, q):
        a, b, c, d = p.T
        e, f, g, h = q.T
        return np.stack([a*e - b*f - c*g - d*h, a*f + b*e + c*h - d*g, a*g - b*h + c*e + d*f, a*h + b*g - c*f + d*e], 1)
    y, p, r = (rng.normal(0, s, n) for s in (yaw, pitch, roll))
    return times(times(about(3, y), about(2, p)), about(1, r)), p


def random_states(rng, n=64):
    """Random rollouts from standing, random poses, and poses near kneeling, each dropped on the floor."""
    world, states = vlmrm.World("Humanoid-v5", n), []
    model = world.model
    low, high = model.jnt_range[1:].T
    joint = {model.joint(i).name: 6 + i for i in range(1, model.njnt)}  # name -> index in qpos
    tasks = [name for name, task in vlmrm.TASKS.items() if task.posture] * 5
    for kind in ["stand"] * 12 + ["pose"] * 24 + ["kneel"] * 40 + tasks:
        qpos = np.tile(model.qpos0, (n, 1))
        pose = rng.uniform(low, high, (n, len(low)))
        if kind == "pose":
            qpos[:, 7:] = pose * rng.uniform(0, 1, (n, 1))
            qpos[:, 3:7], _ = tilt(rng, n, 0.8, rng.choice([0.3, 0.8, 1.5]), rng.choice([0.2, 0.8]))
        elif kind == "kneel":
            qpos[:, 7:] = pose * rng.uniform(0.1, 0.6, (n, 1))
            qpos[:, 3:7], pitch = tilt(rng, n, 0.5, 0.3, 0.15)
            for side in ("right", "left"):  # hips anywhere between upright and sitting on the heels, shins level, then noise
                hip = np.radians(rng.uniform(-80, 15, n))
                if side == "left" and rng.uniform() < 0.7:
                    hip = qpos[:, joint["right_hip_y"]] + rng.normal(0, 0.1, n)
                bend = pitch + hip - np.pi / 2 + rng.normal(0, rng.choice([0.05, 0.3, 0.6]), n)
                qpos[:, joint[f"{side}_hip_y"]] = hip
                qpos[:, joint[f"{side}_knee"]] = np.clip(bend, np.radians(-158), np.radians(-4))
        elif kind == "stand":
            qpos[:, 7:] += rng.normal(0, 0.1, qpos[:, 7:].shape)
        else:  # on the way from standing to a task's posture, and there
            share = np.minimum(1, rng.uniform(0, 1.5, (n, 1)))
            qpos = (1 - share) * qpos + share * vlmrm.posture(model, **vlmrm.TASKS[kind].posture)
            qpos[:, 7:] += rng.normal(0, 1, qpos[:, 7:].shape) * rng.choice([0.02, 0.1, 0.3], (n, 1))
            qpos[:, 3:7] += rng.normal(0, 0.03, (n, 4))
            qpos[:, 3:7] /= np.linalg.norm(qpos[:, 3:7], axis=1, keepdims=True)
        states.append(drop(world, qpos, rng, {"stand": 100, "pose": 40}.get(kind, 24)))
    return np.concatenate(states)


def policy_pictures(job, looks, folder):
    """Pictures, with their truth, of states that SAC visits while it learns: job = (seed, iterations, how many, concept, judge).

    It learns on the simulator's log-odds of `concept` or, where judge is "clip", on the picture model in `folder`.
    """
    seed, iterations, n, concept, judge = job
    torch.set_num_threads(1)  # two of these run side by side
    torch.manual_seed(seed)
    world = vlmrm.World("Humanoid-v5", 32, SIZE, looks, reset_noise_scale=0.03, num_threads=1)
    label, world.goal = None, lambda world: humanoid_truth(world)[concept]
    if judge == "clip":
        world.goal, label = vlmrm.TASKS[concept].goal, vlmrm.CLIPReward(vlmrm.TASKS[concept].prompt, clip=str(folder))
    states, step = [], world.step

    def recording(action):
        result = step(action)
        states.append(world.qpos.copy())
        return result
    world.step = recording
    agent = sac.SAC(45, 17, gamma=0.97, tau=0.01, lr=6e-4, hidden=128, temperature=0.05, layer_norm=True)
    for it in sac.train(world, agent, sac.Replay(200_000, 45, 17), 3200 * iterations, rollout_steps=100, updates=400,
                        batch_size=256, learning_starts=6400, label=label, reward_std=0.3, seed=seed):
        if it["step"] % 16_000 == 0:
            print(f"    {concept}, seed {seed}, {it['step']:7d} transitions, reward {it['reward'].mean():.3f}, truth {it['truth'].mean():.3f}", flush=True)
    world.close()
    states = np.concatenate(states)
    rows = np.random.default_rng(seed).choice(len(states), min(n, len(states)), replace=False)
    return pictures("Humanoid-v5", states[rows], looks)


# ------------------------------------------------------------------------------------------------------------ the training

def new_model():
    return open_clip.CLIP(**json.loads(json.dumps(CONFIG["model_cfg"])))


def normalize(frames):
    mean, std = (torch.tensor(CONFIG["preprocess_cfg"][k]).view(3, 1, 1) for k in ("mean", "std"))
    return (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255 - mean) / std


def fit(model, frames, truth, steps, lr, rng, batch=192):
    """Sigmoid contrastive training: every picture of the batch against one caption per concept."""
    tokenize = open_clip.SimpleTokenizer(context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"])
    decay = [p for p in model.parameters() if p.ndim >= 2]
    other = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}], lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05)
    weight = torch.tensor([8.0 if c == "kneeling" else 4.0 if c in ("upright", "at the flag") else 2.0 if c in vlmrm.TASKS else 1.0 for c in CONCEPTS])
    model.train()
    start, mean_loss = time.time(), 0
    for step in range(1, steps + 1):
        rows = rng.integers(len(frames), size=batch)
        captions = [random.choice(t).format(random.choice(p)) for t, p in CAPTIONS.values()]
        image = model.encode_image(normalize(frames[rows]), normalize=True)                     # (batch, 64)
        text = model.encode_text(tokenize(captions), normalize=True)                            # (concepts, 64)
        logits = model.logit_scale.exp() * image @ text.T + model.logit_bias                    # (batch, concepts)
        target = torch.sigmoid(torch.from_numpy(truth[rows]))
        loss = (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        mean_loss += (loss.item() - mean_loss) / min(step, 100)
        if step % 200 == 0:
            print(f"    step {step}/{steps}, loss {mean_loss:.4f}, scale {model.logit_scale.exp():.1f}, "
                  f"{step * batch / (time.time() - start):.0f} pictures/s", flush=True)
    model.eval()


def save(model, folder):
    words = sorted({w.strip(",.") for t, p in CAPTIONS.values() for x in t for y in p for w in x.format(y).lower().split()})
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG | {"words": words}, indent=2) + "\n")
    save_file({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")


@torch.no_grad()
def score(model, frames, prompt):
    tokenize = open_clip.SimpleTokenizer(context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"])
    text = model.encode_text(tokenize([prompt]), normalize=True)[0]
    return np.concatenate([(model.encode_image(normalize(part), normalize=True) @ text).numpy()
                           for part in np.split(frames, range(500, len(frames), 500))])


def report(model, concept, frames, truth):
    goal = truth[:, CONCEPTS.index(concept)]
    s = score(model, frames, vlmrm.TASKS[concept].prompt)
    label = goal > TRUE - 1.0
    print(f"  {concept}, states of a policy unseen: {len(frames)} pictures, {label.mean():.3f} true, AUROC {vlmrm.auroc(s, label):.3f}, "
          f"correlation with the log-odds {np.corrcoef(s, goal)[0, 1]:.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--siblings", type=int, nargs="+", default=[], help="also make models of these widths (tiny_clip's is 16) from "
                        "the same pictures, in tiny_clip/width-...: for comparisons")
    parser.add_argument("--looks", choices=("plain", "paper", "original"), default="plain", help="how the pictures are drawn; other than "
                        "plain makes another model, in tiny_clip/looks-...")
    args = parser.parse_args()
    looks, folder = args.looks, HERE if args.looks == "plain" else HERE / f"looks-{args.looks}"
    sac.use_onednn()
    start = time.time()
    clock = lambda text: print(f"[{(time.time() - start) / 60:5.1f} min] {text}", flush=True)
    random.seed(0)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
    clock("pictures of policies that learn on the simulator's judgement, of random rollouts and poses, of the cart-pole")
    others = [name for name, task in vlmrm.TASKS.items() if task.posture and name != "kneeling"]
    job = functools.partial(policy_pictures, looks=looks, folder=folder)
    jobs = pool.map(job, [(101, 32, 24_000, "kneeling", "truth"), (102, 32, 24_000, "kneeling", "truth")]
                    + [(103 + i, 14, 5_000, concept, "truth") for i, concept in enumerate(["one knee", "crouching", "sitting", *others])])
    fooled = [(201, 28, 24_000, "kneeling", "clip"), (202, 28, 24_000, "kneeling", "clip")] + [
        (203 + i, 16, 5_000, concept, "clip") for i, concept in enumerate(others)]
    states = random_states(rng)
    cart = np.stack([rng.uniform(-1, 1, 9000), np.clip(rng.normal(0, rng.choice([0.1, 0.5, 1.2], 9000)), -1.6, 1.6)], 1)
    sets = [pictures("Humanoid-v5", states[rng.choice(len(states), 40_000, replace=False)], looks), pictures("InvertedPendulum-v5", cart, looks),
            mountaincar_pictures(rng.uniform(-1.2, 0.6, 5000)), *jobs]
    model = new_model()
    for steps, jobs in ((STEPS // 2, fooled), (STEPS // 2, ())):
        frames, truth = map(np.concatenate, zip(*sets))
        clock(f"training on {len(frames)} pictures")
        fit(model, frames, truth, steps, 1.5e-3, rng)
        save(model, folder)
        if jobs:
            clock("policies that learn on the picture model")
            new = list(pool.map(job, jobs))
            for (*_, concept, _), (frames, truth) in zip(jobs, new):
                report(model, concept, frames, truth)
            sets += new
    for width in args.siblings:
        clock(f"training width {width} on {len(frames)} pictures")
        CONFIG["model_cfg"]["vision_cfg"]["width"] = width
        model = new_model()
        fit(model, frames, truth, STEPS, 1.5e-3, rng)
        save(model, folder / f"width-{width}")
    clock("done")


if __name__ == "__main__":
    main()
