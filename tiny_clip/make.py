"""Makes tiny_clip, a small CLIP that knows two worlds, from captions that simulators decide.

    pip install -r requirements.txt
    python tiny_clip/make.py    # two hours on 2 cores with bfloat16, 20 GB; overwrites its weights

Pictures show states of random rollouts, of poses dropped on the floor, of poses near kneeling, of
bodies on the way to each task's posture and of policies that learn on the simulator's judgement.
From there, for each task, limbs climb to what the simulator says is truer, and on the way there is
seen what is right, in many ways, and what is nearly so; the truest are shown with one limb moved,
too, and as they fall. So a first model is trained. Then policies learn on it as in a lesson, limbs
climb from what these visit, also by the model's own reward, and training goes on with all of that,
with true captions: exactly the pictures that fooled the model. Last, policies learn on it once
more, only to say how well it judges them.

Every picture is compared with every caption (the sigmoid loss of SigLIP, arXiv 2303.15343). How
true a caption is of a state is a log-odds in [-5.5, 1] that falls smoothly with the distance from
the pose it names, as captioners agree less and less: the cosine learns this slope, and a policy can
climb it.
"""

import copy
import functools
import json
import random
import sys
import tempfile
from pathlib import Path

import mujoco
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "paper"))
import criteria
import curve
import shared
import sight
import states as labelled
from shared import sac, vlmrm
from truth import CONCEPTS as CONCEPT_OF
from truth import FALSE, TRUE, graded, log_odds

HERE = Path(__file__).resolve().parent
SIZE = 64
CONFIG = json.loads((HERE / "open_clip_config.json").read_text())  # the model's shape
WORLDS = {criteria.HUMANOID: "kneeling", criteria.POLE: "cartpole"}
SIGHT = 32_000  # steps of each policy that learns on the simulator's judgement
ROUNDS = (4000, 0), (7000, 32_000), (7000, 32_000), (14_000, 64_000)  # steps of fit, of learn
PICTURES = 8_000  # of each kind and task
TASKS = list(labelled.POSTURES)  # the eight of Table 1
BY_ARM = "arms-raised", "hands-on-hips", "arms-crossed"
ARM, LEG = ("shoulder1", "shoulder2", "elbow"), ("hip_x", "hip_z", "hip_y", "knee")

ROBOT = [
    "a humanoid robot {}",
    "a humanoid robot {}",
    "a robot {}",
    "humanoid robot {}",
    "the humanoid robot is {}",
    "a picture of a humanoid robot {}",
]
PLAIN = ["{}", "{}", "a picture of {}"]
CART = ["{}", "{}", "a {}", "a picture of a {}"]
CAPTIONS = {  # concept -> templates, phrases
    "kneeling": (
        ROBOT,
        [
            "kneeling",
            "kneeling",
            "kneeling down",
            "on its knees",
            "on both knees",
            "kneeling on the floor",
            "kneeling upright on both knees",
        ],
    ),
    "one knee": (ROBOT, ["on one knee", "kneeling on one knee"]),
    "standing": (ROBOT, ["standing up", "standing", "standing upright", "standing on both legs"]),
    "lotus": (
        ROBOT,
        [
            "seated down, meditating in the lotus position",
            "meditating in the lotus position",
            "in the lotus position",
            "sitting with its legs crossed",
            "meditating",
        ],
    ),
    "arms-raised": (
        ROBOT,
        [
            "standing up, with both arms raised",
            "standing up with arms raised",
            "standing with both arms raised",
        ],
    ),
    "splits": (
        ROBOT,
        [
            "practicing gymnastics, doing the side splits",
            "doing the side splits",
            "doing the splits",
            "practicing gymnastics",
        ],
    ),
    "hands-on-hips": (
        ROBOT,
        [
            "standing up with hands on hips",
            "standing with its hands on the hips",
            "with hands on hips",
        ],
    ),
    "one-leg": (
        ROBOT,
        [
            "standing up on one leg",
            "standing on one leg",
            "balancing on one leg",
            "standing on one foot",
        ],
    ),
    "arms-crossed": (
        ROBOT,
        [
            "standing up, with its arms crossed",
            "standing with arms crossed",
            "with its arms crossed",
        ],
    ),
    "kneeling, arms up": (ROBOT, ["kneeling, with both arms raised", "kneeling with arms raised"]),
    "arms up": (
        ROBOT,
        ["with both arms raised", "raising its arms", "with its hands above the head"],
    ),
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
    "upright": (
        CART,
        [
            "pole vertically upright on top of the cart",
            "pole upright on a cart",
            "balanced pole on the cart",
        ],
    ),
    "leaning left": (CART, ["pole leaning to the left", "pole falling left on the cart"]),
    "leaning right": (CART, ["pole leaning to the right", "pole falling right on the cart"]),
    "hanging": (CART, ["pole lying on the rail", "fallen pole and cart"]),
    "cart left": (CART, ["cart on the left", "cart at the left end of the rail"]),
    "cart right": (CART, ["cart on the right", "cart at the right end of the rail"]),
    "cartpole": (PLAIN, ["pole and cart", "a cart with a pole", "a pole on a cart"]),
}
CONCEPTS = list(CAPTIONS)

# ---- the states ----


def new_world(env_id):
    """Two simulations, seen by turns, one in a mirror, with pictures for the model."""
    return vlmrm.World(shared.configure(WORLDS[env_id], clip="tiny_clip"), 2, SIZE)


def judge(env_id, states):
    """Log-odds of every concept for states (n, nq): (n, concepts), float32. The other world's
    concepts are false."""
    known = log_odds(env_id, shared.model_of(new_world(env_id)), states)
    false = np.full(len(states), FALSE)
    return np.stack([known.get(c, false) for c in CONCEPTS], 1).astype(np.float32)


def pictures(env_id, states):
    """(frames uint8 (n, SIZE, SIZE, 3), truth (n, concepts)) of states (n, nq)."""
    frames = labelled.pictures(new_world(env_id), states)
    return frames, judge(env_id, states)


def drop(model, qpos, rng, steps):
    """Put poses (n, nq) on the floor and let them move under random torques; states on the way."""
    qpos[:, 2] = 1.5
    body = criteria.Humanoid(model, qpos)
    parts = body.torso, body.pelvis, body.shin, body.ankle, body.forearm
    lowest = np.concatenate([criteria.height(part.centre) for part in parts], 1).min(1)
    qpos[:, 2] -= lowest - 0.08
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
    angles = np.stack([rng.normal(0, deviation, n) for deviation in (yaw, pitch, roll)], 1)
    turned = np.empty((n, 4))
    for quaternion, angle in zip(turned, angles, strict=True):
        mujoco.mju_euler2Quat(quaternion, angle, "zyx")
    return turned, angles[:, 1]


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


def random_states(rng, n=48):
    """Random rollouts from standing, random poses, poses near kneeling, and bodies on the way to
    each task's posture, each dropped on the floor, (many, nq)."""
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


def shake(model, qpos, rng, hinges, tilts):
    """States qpos (n, nq) with noise on hinges and on the quaternion, normal with these deviations,
    each a number or (n, 1), and then put on the floor."""
    qpos, (low, high) = qpos.copy(), model.jnt_range[1:].T
    noise = rng.normal(size=qpos.shape)
    qpos[:, 7:] = np.clip(qpos[:, 7:] + hinges * noise[:, 7:], low, high)
    qpos[:, 3:7] += tilts * noise[:, 3:7]
    qpos[:, 3:7] /= np.linalg.norm(qpos[:, 3:7], axis=1, keepdims=True)
    qpos[:, 2] = labelled.on_floor(model, qpos)
    return qpos


def limbs_of(task, model):
    """Where the hinges are that matter to a task, of the right and of the left limb: columns of
    qpos (2, hinges), and their ranges (2, hinges, 2), rad."""
    hinges = ARM if task in BY_ARM else LEG
    limbs = [[model.joint(f"{side}_{x}") for x in hinges] for side in ("right", "left")]
    where = np.array([[x.qposadr[0] for x in limb] for limb in limbs])
    return where, np.array([[x.range for x in limb] for limb in limbs])


def move_limb(task, model, qpos, rng, steps, tilts):
    """Bodies qpos (n, nq) of which one limb each is anywhere or, as often, a little further, normal
    with deviation steps, rad; where it is a leg, tilted as shake does it, and on the floor."""
    (where, ranges), n = limbs_of(task, model), len(qpos)
    side, new, row = rng.integers(2, size=n), qpos.copy(), np.arange(n)[:, None]
    column, (low, high) = where[side], np.moveaxis(ranges[side], -1, 0)  # (n, hinges) each
    near = np.clip(qpos[row, column] + steps * rng.normal(size=low.shape), low, high)
    new[row, column] = np.where(rng.random((n, 1)) < 0.5, rng.uniform(low, high), near)
    return new if task in BY_ARM else shake(model, new, rng, 0, tilts)


def climb(task, model, qpos, rng, score, proposals):
    """From bodies qpos (n, nq), a little shaken, move the arms or the legs that matter to a task:
    one limb at a time, kept when score(states), (n,), rises. All states on the way, (many, nq).
    By the log-odds they show many ways to a pose, of which one policy finds one; by a model's
    reward, what it is sure of, rightly or wrongly."""
    n = len(qpos)
    qpos = shake(model, qpos, rng, rng.choice([0, 0.02, 0.1], (n, 1)), 0.01)
    best, seen = score(qpos), [qpos.copy()]
    for _ in range(proposals):
        steps, tilts = rng.choice([0.05, 0.2], (n, 1)), rng.choice([0, 0.03], (n, 1))
        new = move_limb(task, model, qpos, rng, steps, tilts)
        value = score(new)
        better = value > best
        qpos[better], best[better] = new[better], value[better]
        seen.append(qpos[better])
    return np.concatenate(seen)


def draw_lots(rng, states, n):
    """At most n of states (many, nq)."""
    return states[rng.permutation(len(states))[:n]]


def evenly(task, model, states, rng, n):
    """At most n of states (many, nq): a third each true, nearly true, and far from the pose."""
    kind = np.digitize(graded(task, model, states), (-1.5, 0))  # (many,)
    return np.concatenate([draw_lots(rng, states[kind == i], n // 3) for i in range(3)])


class Watched(vlmrm.World):
    """A world that remembers the states that it showed, and may show these instead of pictures."""

    def __init__(self, cfg, draws):
        super().__init__(cfg, cfg.num_envs, SIZE)
        self.draws, self.seen = draws, []

    def render(self):
        self.seen.append(shared.states_of(self))  # (num_envs, nq)
        return super().render() if self.draws else self.seen[-1]


def policy_states(job, folder):
    """PICTURES states (n, nq) that SAC visits while it learns as in a lesson of so many steps, also
    in its tests, on the model in `folder` (None: on the simulator's judgement): job = (seed, task,
    steps)."""
    seed, task, steps = job
    torch.set_num_threads(1)  # two of these run side by side
    cfg = shared.configure(task, clip="tiny_clip", seed=seed, steps=steps)
    world = Watched(cfg, draws=bool(folder))
    label = sight.teacher(task, "log-odds", shared.model_of(world))
    if folder:
        label = vlmrm.CLIPReward(cfg.prompt, clip=str(folder))
    with tempfile.TemporaryDirectory() as run:
        vlmrm.train(cfg, Path(run), label, world, *shared.learner(cfg, world))  # Algorithm 1
        tests = curve.read(Path(run))["test"]
        tests = tests[~np.isnan(tests)].round(1).tolist()
    print(f"    {task}, seed {seed}, returns in tests: {tests}", flush=True)
    return draw_lots(np.random.default_rng(seed), np.concatenate(world.seen), PICTURES)


def task_pictures(job, folder):
    """Pictures, with their truth, of states that were visited, of limbs that climb from these and
    from everyone's, and of the truest of all, falling and with one limb moved: job = (seed, task,
    states (n, nq), everyone's). They climb by the log-odds and, if there is a model in `folder`
    already (None: there is not), by its reward."""
    seed, task, visited, everyone = job
    torch.set_num_threads(1)
    rng, world = np.random.default_rng(seed), new_world(criteria.HUMANOID)
    model, states = shared.model_of(world), [visited]
    climbs = [(PICTURES // 2, 150, lambda x: graded(task, model, x))]
    if folder:
        reward = vlmrm.CLIPReward(criteria.TASKS[task].prompt, clip=str(folder))

        def paid(x):  # from both sides, as a policy is on average
            return reward(labelled.pictures(world, np.repeat(x, 2, 0))).view(-1, 2).mean(1).numpy()

        climbs.append((PICTURES // 10, 60, paid))
    for n, proposals, score in climbs:
        bodies = np.concatenate([draw_lots(rng, x, n // 2) for x in (visited, everyone)])
        moved = climb(task, model, bodies, rng, score, proposals)
        states.append(evenly(task, model, moved, rng, PICTURES))
    known = np.concatenate(states)
    best = known[np.argsort(-graded(task, model, known))[:PICTURES]]
    states.append(move_limb(task, model, best, rng, 0.4, 0))  # one side right, the other not
    states.append(drop(model, draw_lots(rng, best, PICTURES // 3), rng, 12))
    return pictures(criteria.HUMANOID, np.concatenate(states))


# ---- the training ----


def new_model():
    """An untrained model, as CONFIG describes it."""
    model = open_clip.CLIP(**json.loads(json.dumps(CONFIG["model_cfg"])))
    return model.to(memory_format=torch.channels_last)  # a step takes .6 to .9 of the time


@functools.cache
def tokenizer():
    """tokenizer()(texts) -> tokens (n, context_length)."""
    length = CONFIG["model_cfg"]["text_cfg"]["context_length"]
    return open_clip.SimpleTokenizer(context_length=length)


def normalize(frames):
    """Pictures uint8 (n, SIZE, SIZE, 3) -> the image tower's input, (n, 3, SIZE, SIZE)."""
    mean, std = (CONFIG["preprocess_cfg"][x][0] for x in ("mean", "std"))  # of any colour
    return (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255 - mean) / std


def weights():
    """How much each concept counts in the loss, (concepts,)."""
    goals = {CONCEPT_OF.get(task, task) for task in criteria.TASKS}
    return torch.tensor([4.0 if c in goals else 1.0 for c in CONCEPTS])


def fit(model, frames, truth, steps, lr, rng, batch_size=64):
    """Sigmoid contrastive training: every picture of the batch against one caption per concept."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05)
    weight = weights()
    model.train()
    bar = tqdm(range(steps), mininterval=5)
    for _ in bar:
        rows = rng.integers(len(frames), size=batch_size)
        captions = [random.choice(t).format(random.choice(p)) for t, p in CAPTIONS.values()]
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
            batch = np.stack([frames[i] for i in rows])  # uint8 (batch, SIZE, SIZE, 3)
            image = model.encode_image(normalize(batch)).float()  # AMX: 2 times, else 1.3
        image = F.normalize(image, dim=-1)  # (batch, 64)
        text = model.encode_text(tokenizer()(captions), normalize=True)  # (concepts, 64)
        logits = model.logit_scale.exp() * image @ text.T + model.logit_bias  # (batch, concepts)
        target = torch.sigmoid(torch.from_numpy(truth[rows]))
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        loss = (loss * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
    model.eval()


def save(model):
    """HERE, the folder that vlmrm.py loads; `words` are what it may be asked about."""
    texts = [
        template.format(phrase).lower()
        for templates, phrases in CAPTIONS.values()
        for template in templates
        for phrase in phrases
    ]
    words = sorted({word.strip(",.") for text in texts for word in text.split()})
    content = CONFIG | {"words": words}
    (HERE / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n")
    state = {k: v.contiguous() for k, v in copy.deepcopy(model).half().state_dict().items()}
    save_file(state, HERE / "open_clip_model.safetensors")


def report(concept, frames, truth):
    """How well the saved model judges pictures that it was not trained on."""
    goal = truth[:, CONCEPTS.index(concept)]
    s = vlmrm.CLIPReward(criteria.TASKS[concept].prompt, clip=str(HERE))(frames).numpy()
    label = goal > TRUE - 1.0
    print(
        f"  {concept}, states of a policy unseen: {len(frames)} pictures, {label.mean():.3f} "
        f"true, AUROC {shared.auroc(s, label):.3f}, correlation with the log-odds "
        f"{np.corrcoef(s, goal)[0, 1]:.3f}",
        flush=True,
    )


def main(argv=None):
    """The command line."""
    shared.flags(__doc__).parse_args(argv)
    random.seed(0)
    torch.manual_seed(0)
    rng, model = np.random.default_rng(0), new_model()
    with shared.pool(2) as pool:
        make(model, rng, pool)


def learn(pool, number, steps, folder):
    """What a policy of each task visits, a list of (n, nq), as policy_states says."""
    jobs = [(100 * number + i, task, steps) for i, task in enumerate(TASKS)]
    return list(pool.map(functools.partial(policy_states, folder=folder), jobs))


def make(model, rng, pool):
    """Train the model in rounds, on more pictures each, and save it."""
    states = draw_lots(rng, random_states(rng), 4 * PICTURES)
    sets = [pole_pictures(rng), pictures(criteria.HUMANOID, states)]
    print("policies that learn on the simulator's judgement:", flush=True)
    visited = learn(pool, 0, SIGHT, None)
    for number, (steps, lesson) in enumerate(ROUNDS):
        everyone, known = np.concatenate([states, *visited]), HERE if number else None
        shown = functools.partial(task_pictures, folder=known)
        jobs = [(100 * number + i, task, visited[i], everyone) for i, task in enumerate(TASKS)]
        sets += pool.map(shown, jobs)
        frames = torch.utils.data.ConcatDataset([x for x, _ in sets])  # joined they would be twice
        truth = np.concatenate([y for _, y in sets])
        print(f"training on {len(frames)} pictures", flush=True)
        fit(model, frames, truth, steps, 1.5e-3, rng)
        save(model)
        if not lesson:
            continue
        print("policies that learn on its reward, unseen by it:", flush=True)
        visited = learn(pool, number + 1, lesson, HERE)
        for task, seen in zip(TASKS, visited, strict=True):
            report(task, *pictures(criteria.HUMANOID, seen))


def pole_pictures(rng):
    """9,000 pictures of the cart-pole, with their truth."""
    angle = np.clip(rng.normal(0, rng.choice([0.1, 0.5, 1.2], 9000)), -1.6, 1.6)
    return pictures(criteria.POLE, np.stack([rng.uniform(-1, 1, 9000), angle], 1))


if __name__ == "__main__":
    sac.run(main)
