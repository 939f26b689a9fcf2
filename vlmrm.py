"""Vision-language models are zero-shot reward models: a sentence becomes a reward, and SAC turns it into motion.

    python vlmrm.py --prompt "a humanoid robot kneeling"

After Rocamonde, Montesinos, Nava, Perez and Lindner, ICLR 2024 (arXiv 2310.12921). With unit vectors from CLIP, s of the
rendered picture of a state, g of the goal prompt and b of a baseline prompt, the reward of that state is

    Eq. 2   R(s) = cos(g, s)
    Eq. 3   R(s) = 1 - 1/2 || alpha proj_L(s) + (1 - alpha) s - g ||^2,   L the line through b and g

where alpha = 0 gives Eq. 2 and alpha = 1 keeps only what lies along the way from baseline to goal.

    Algorithm 1   repeat
                      roll the policy out, taking a picture of every state it reaches        sac.rollout
                      label the pictures with CLIP                                           CLIPReward
                      move the labelled transitions to the replay buffer                     sac.Replay.add
                      update actor, critic and temperature on minibatches                    sac.SAC.update

This file reads in that order: the reward, the tasks, the world and its pictures, training, evaluation, the command line.
"""
import argparse
import copy
import csv
import difflib
import json
import logging
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import gymnasium as gym
import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.functional import normalize
from tqdm import tqdm

import sac
from sac import RunError, UsageError

try:
    import mujoco
    import mujoco.batch
except (AttributeError, ImportError, RuntimeError) as error:  # a library that MUJOCO_GL asks for is missing
    print(f"error: MuJoCo does not load with MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({error}). Unset MUJOCO_GL, or "
          "install what it needs (Debian, Ubuntu: apt install libegl1 libgl1-mesa-dri)", file=sys.stderr)
    sys.exit(2)

os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's software renderer is 1.5 times as fast without helpers of its own
TINY_CLIP = Path(__file__).resolve().parent / "tiny_clip"


# ------------------------------------------------------------------------------------------------- the reward (section 3)

def goal_baseline_reward(s, g, b, alpha):
    """Eq. 3 for state embeddings s (N, D) of unit length, goal g (D,) and baseline b (D,) -> rewards (N,).

    The projection proj_L(s) = g + u (u.(s - g)), with u the unit vector along g - b, keeps the part of s - g along u and
    drops the rest, so that alpha only shrinks the rest: one dot product, no (D, D) matrix. alpha in [0, 1]; 0 is the cosine.
    """
    u = normalize(g - b, dim=0)                                                                     # (D,)
    e = s - g                                                                                       # (N, D)
    along = e @ u                                                                                   # (N,)
    rest = e - along[:, None] * u                                                                   # (N, D)
    return 1 - (along.square() + (1 - alpha) ** 2 * rest.square().sum(-1)) / 2                      # (N,)


class CLIPReward(nn.Module):
    """Rewards of pictures: `reward(frames)` with frames uint8 (N, H, W, 3) -> float32 (N,) on `device`.

    prompts, baselines: a string or several, which are embedded, normalised and averaged (as in the original the mean is not
    normalised again: then alpha = 0 is the cosine but for scale and offset). alpha: Eq. 3, in [0, 1].
    clip: "architecture/pretrained tag" of open_clip, or a folder with open_clip_config.json and weights. `image_size` is what
    to render: pictures of that size are not resized. Only the image tower stays, in half precision on CUDA; nothing is
    trained. Raises UsageError for bad prompts, unknown names and missing weights; `random_weights=True` (for tests and
    speed measurements only) asks for an untrained model explicitly.
    """

    def __init__(self, prompts, baselines="a humanoid robot", alpha=0.0, clip=str(TINY_CLIP), device="cpu",
                 random_weights=False):
        super().__init__()
        prompts, baselines = ([text] if isinstance(text, str) else list(text) for text in (prompts, baselines))
        if not prompts or not baselines or not all(text.strip() for text in prompts + baselines):
            raise UsageError("the prompt is empty: describe the goal, for example --prompt \"a humanoid robot kneeling\"")
        if not 0 <= alpha <= 1:
            raise UsageError(f"alpha is {alpha}: give a number from 0 (the cosine) to 1 (only the direction from baseline to goal)")
        model, tokenizer = load_clip(clip, random_weights)
        warn_of_unknown_words(clip, prompts + baselines)
        warn_of_cut_words(tokenizer, prompts + baselines)
        self.alpha, self.chunk = alpha, 256
        for name, texts in (("goal", prompts), ("baseline", baselines)):
            with torch.no_grad():
                embeddings = normalize(model.encode_text(tokenizer(texts)).float(), dim=-1).to(device)  # (texts, D)
            self.register_buffer(f"{name}s", embeddings)
            self.register_buffer(name, embeddings.mean(0))                                          # (D,)
        if alpha > 0 and torch.allclose(self.goal, self.baseline, atol=1e-5):
            raise UsageError("with alpha > 0 the baseline must differ from the prompt: change --baseline or use --alpha 0")
        # float16 errs eight times less than bfloat16, and all that a policy sees may be a spread of 0.03.
        self.half_precision = torch.device(device).type == "cuda"
        self.visual = model.visual.to(device, torch.float16 if self.half_precision else torch.float32)
        self.visual.eval().requires_grad_(False)
        self.visual.output_tokens = False  # CoCa's towers would return more than the embedding
        self.config = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
        self.image_size = int(np.max(self.config.size))
        # The last three steps, for single PIL pictures, are done below for all at once.
        *self.resizing, _, _, _ = open_clip.transform.image_transform_v2(self.config, is_train=False).transforms
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(self.config, name), device=device).view(3, 1, 1))

    def preprocess(self, frames):
        """The model's own open_clip preprocessing, on the device: uint8 (N, H, W, 3) -> float (N, 3, h, w)."""
        x = frames.permute(0, 3, 1, 2)                                                              # (N, 3, H, W)
        for step in self.resizing:
            if isinstance(step, open_clip.transform.ResizeKeepRatio):  # it asks a PIL picture for (width, height)
                size = step.get_params(SimpleNamespace(size=(x.shape[3], x.shape[2])), step.size, step.longest)
                x = TF.resize(x, size, step.interpolation)
            else:
                x = step(x)
        return (x.float() / 255 - self.mean) / self.std                                             # (N, 3, h, w)

    @torch.no_grad()
    def embed(self, frames):
        """frames uint8 (N, H, W, 3) -> unit vectors s (N, D), float32 on the device; `chunk` pictures at a time, half as many
        from now on where the memory of the GPU does not suffice.

        On CUDA this returns before the GPU is done: pinned memory is copied while the CPU goes on.
        """
        vectors = []
        try:
            for part in torch.as_tensor(frames).split(self.chunk):
                part = part.pin_memory() if self.half_precision and not part.is_cuda else part
                x = self.preprocess(part.to(self.goal.device, non_blocking=True))
                vectors.append(self.visual(x.half() if self.half_precision else x).float())
            return normalize(torch.cat(vectors), dim=-1)
        except torch.OutOfMemoryError:
            if self.chunk == 1:
                raise RunError("the GPU's memory does not hold the picture model and one picture: take a smaller --clip") from None
        self.chunk = min(self.chunk, len(frames)) // 2 or 1
        print(f"the GPU's memory is full: from now on {self.chunk} pictures at a time", file=sys.stderr)
        return self.embed(frames)

    def forward(self, frames):
        return goal_baseline_reward(self.embed(frames), self.goal, self.baseline, self.alpha)


class WithCLIPReward(gym.Wrapper):
    """Any Gymnasium environment made with render_mode="rgb_array", with another reward: that of its picture after each step."""

    def __init__(self, env, reward):
        super().__init__(env)
        self.clip_reward = reward

    def step(self, action):
        obs, _, *rest = self.env.step(action)
        return obs, self.clip_reward(np.ascontiguousarray(self.env.render())[None]).item(), *rest


class WithCLIPRewards(gym.vector.VectorWrapper):
    """The same for a vector of environments, whose pictures are encoded together: rewards float32 (num_envs,)."""

    def __init__(self, env, reward):
        super().__init__(env)
        if env.metadata.get("autoreset_mode") == gym.vector.AutoresetMode.SAME_STEP:
            raise UsageError("with autoreset_mode SAME_STEP the last picture of an episode is already the next one's: take NEXT_STEP")
        self.clip_reward = reward

    def step(self, actions):
        obs, _, *rest = self.env.step(actions)
        return obs, self.clip_reward(np.stack(self.env.render())).cpu().numpy(), *rest


def load_clip(clip, random_weights=False):
    """The open_clip model and its own tokenizer, for "architecture/tag" or a folder; never an untrained model by accident."""
    name, _, tag = clip.partition("/")
    if Path(clip).is_dir():
        name, tag = f"local-dir:{clip}", None
    elif name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), 3, 0.3)
        raise UsageError(f"--clip {clip}: no such folder, and open_clip knows no architecture {name!r}; near: {', '.join(near)}")
    elif not random_weights and not open_clip.is_pretrained_cfg(name, tag):
        tags = open_clip.list_pretrained_tags_by_model(name)
        near = difflib.get_close_matches(tag, tags, 5, 0.0)
        raise UsageError(f"--clip {clip}: no pretrained tag {tag!r} for {name}; there are: {', '.join(near)}")
    try:
        logging.disable(logging.ERROR)  # what open_clip logs comes back in the exception
        model = open_clip.create_model(name, None if random_weights else tag, load_weights=not random_weights,
                                       require_pretrained=not random_weights)
        return model.eval(), open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip and the hub raise many kinds; each comes down to one of two causes
        reason = " ".join(str(error).split())[:200]
        if tag is None:
            raise UsageError(f"--clip {clip}: the folder needs open_clip_config.json and open_clip_model.safetensors ({reason})")
        raise UsageError(f"--clip {clip}: its weights could not be fetched from the hub ({reason}). Offline, use "
                         "--clip tiny_clip or a folder with open_clip_config.json and open_clip_model.safetensors")
    finally:
        logging.disable(logging.NOTSET)


def warn_of_unknown_words(clip, texts):
    """A folder's open_clip_config.json may list the `words` that its model was trained on; others mean nothing to it."""
    config = Path(clip) / "open_clip_config.json"
    known = json.loads(config.read_text()).get("words") if config.is_file() else None
    unknown = sorted({word for text in texts for word in re.findall(r"[\w']+", text.lower())} - set(known or ()))
    if known and unknown:
        print(f"warning: {clip} never saw the words: {', '.join(unknown)}. It knows: {' '.join(known)}", file=sys.stderr)


def warn_of_cut_words(tokenizer, texts):
    """A text model reads only so many tokens; words beyond them change nothing, and the person who wrote them should know."""
    for text in texts:
        words, tokens = text.split(), tokenizer([text])
        kept = next((n for n in range(len(words)) if torch.equal(tokenizer([" ".join(words[:n])]), tokens)), len(words))
        if kept < len(words):
            end = " ".join(words[kept:])[:200]
            print(f"warning: the prompt is too long for the text model, which does not see its end: {end!r}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------ the tasks

# What the paper's rater looked for (Table 1, quoted), as facts about the body: world -> (num_envs,) bool.

def kneeling(world):
    """Both knees touch the floor; not losing balance, not in the air. Sitting back on the heels is kneeling, too."""
    # On the knee the shin's front (its x axis) faces down: sitting with the legs crossed or stretched out does not count.
    knees = [(knee_gap(world, side) < 0.015) & (world.axis(f"{side}_shin", "x")[:, 2] < -0.5) for side in SIDES]
    return knees[0] & knees[1] & upright(world)


def lotus(world):
    """Seated; both knees on the floor facing outwards, feet inwards."""
    knees, feet = ([across(world, "pelvis", point(world, side)) * sign for side, sign in SIDES.items()] for point in (knee, foot))
    outwards = [(k > 0.2) & (f < k - 0.1) & (knee_gap(world, side) < 0.1) for k, f, side in zip(knees, feet, SIDES)]
    return seated(world) & upright(world) & outwards[0] & outwards[1]


def standing(world):
    """Stands without falling."""
    return on_feet(world) & (foot_gap(world, "right") < 0.03) & (foot_gap(world, "left") < 0.03)


def arms_raised(world):
    """Stands, both arms raised: both hands above the middle of the head."""
    head = world.point("torso", (0, 0, 0.19))[:, 2]
    return on_feet(world) & (hand(world, "right")[:, 2] > head) & (hand(world, "left")[:, 2] > head)


def splits(world):
    """On the floor, side splits, legs stretched on the floor: knees straight, at least 100 degrees between the thighs."""
    stretched = [(foot_gap(world, side) < 0.1) & (knee_gap(world, side) < 0.1) & (world.angle(f"{side}_knee") > -0.6) for side in SIDES]
    right, left = (world.axis(f"{side}_thigh", "z") for side in SIDES)
    return seated(world) & stretched[0] & stretched[1] & ((right * left).sum(-1) < np.cos(np.radians(100)))


def hands_on_hips(world):
    """Stands, both hands at the base of the hips, not on the chest."""
    near = [np.linalg.norm(hand(world, side) - world.point("pelvis", (0, 0.2 * sign, 0.05)), axis=-1) < 0.15 for side, sign in SIDES.items()]
    return on_feet(world) & near[0] & near[1]


def one_leg(world):
    """One foot only on the floor, balanced."""
    return on_feet(world) & (np.maximum(*(foot_gap(world, side) for side in SIDES)) > 0.1)


def arms_crossed(world):
    """Stands, arms really crossed: in front of the chest, each hand on the other arm's side of the body."""
    chest = world.point("torso")
    crossed = [(across(world, "torso", hand(world, side)) * sign < -0.05) & (np.abs((hand(world, side) - chest)[:, 2]) < 0.25)
               & (((hand(world, side) - chest) * world.axis("torso", "x")).sum(-1) > 0.1) for side, sign in SIDES.items()]
    return on_feet(world) & crossed[0] & crossed[1]


SIDES = {"right": -1, "left": 1}  # the sign of their y in the body's frame, which points left


def knee(world, side):
    """The knee's centre in the world, m, (num_envs, 3)."""
    return world.point(f"{side}_shin")


def foot(world, side):
    """The foot's centre in the world, m, (num_envs, 3)."""
    return world.point(f"{side}_foot", (0, 0, 0.1))


def hand(world, side):
    """The hand's centre in the world, m, (num_envs, 3)."""
    return world.point(f"{side}_lower_arm", (0.18, -0.18 * SIDES[side], 0.18))


def knee_gap(world, side):
    """Distance in m between floor and knee, where the capsules of thigh (radius 0.06) and shin (0.049) meet."""
    thigh_end = (0, -0.01 * SIDES[side], -0.34)
    return np.minimum(world.point(f"{side}_thigh", thigh_end)[:, 2] - 0.06, knee(world, side)[:, 2] - 0.049)


def foot_gap(world, side):
    """Distance in m between floor and foot, a ball of radius 0.075."""
    return foot(world, side)[:, 2] - 0.075


def across(world, body, point):
    """How far a point (num_envs, 3) lies to the left of a body, in m."""
    return ((point - world.point(body)) * world.axis(body, "y")).sum(-1)


def upright(world):
    """The torso is within 37 degrees of the vertical."""
    return world.axis("torso", "z")[:, 2] > 0.8


def on_feet(world):
    """The torso is upright, the pelvis higher than 0.8 m (0.97 m when standing), and a foot on the floor."""
    return upright(world) & (world.point("pelvis")[:, 2] > 0.8) & (np.minimum(*(foot_gap(world, side) for side in SIDES)) < 0.03)


def seated(world):
    """The pelvis, a capsule of radius 0.09, rests on the floor or up to 11 cm above it (it tilts)."""
    return world.point("pelvis")[:, 2] < 0.2


def balanced(world):
    """The pole is within 0.2 rad of the vertical."""
    return np.abs(world.qpos[:, 1]) < 0.2


def at_flag(world):
    """The car is as far up as Gymnasium's goal."""
    return world.obs[:, 0] >= 0.45


class Task(NamedTuple):
    """A goal in words, and in the simulator's terms."""
    prompt: str
    goal: Callable | None = None        # goal(world) -> (num_envs,) bool, what the paper's human rater looked for
    posture: dict = {}                  # how a body that fulfils it may look, see `posture`
    env_id: str = "Humanoid-v5"
    baseline: str = "a humanoid robot"


STAND = dict(hip_y=-5, knee=-12, shoulder1=10)
TASKS = {  # all eight of Table 1; a search over poses found that the model's joints allow each of them
    "kneeling": Task("a humanoid robot kneeling", kneeling, dict(hip_y=-10, knee=-107)),
    "lotus": Task("a humanoid robot seated down, meditating in the lotus position", lotus,
                  dict(pitch=-9, abdomen_y=-71, hip_x=-24, hip_z=-60, hip_y=-2, knee=-160)),
    "standing": Task("a humanoid robot standing up", standing, STAND),
    "arms-raised": Task("a humanoid robot standing up, with both arms raised", arms_raised,
                        STAND | dict(shoulder1=-55, shoulder2=20, elbow=-28)),
    "splits": Task("a humanoid robot practicing gymnastics, doing the side splits", splits,
                   dict(abdomen_y=-27, hip_x=-14, hip_z=-54, hip_y=-68, knee=-10)),
    "hands-on-hips": Task("a humanoid robot standing up with hands on hips", hands_on_hips,
                          STAND | dict(shoulder1=50, shoulder2=-69, elbow=-22)),
    "one-leg": Task("a humanoid robot standing up on one leg", one_leg, dict(
        pitch=25, abdomen_y=-23, hip_x=-10, hip_z=-13, right_hip_y=-45, right_knee=-82, left_hip_y=-22, left_knee=-32)),
    "arms-crossed": Task("a humanoid robot standing up, with its arms crossed", arms_crossed, STAND | dict(
        right_shoulder1=59, right_shoulder2=41, right_elbow=-73, left_shoulder1=52, left_shoulder2=-59, left_elbow=-4)),
    "cartpole": Task("pole vertically upright on top of the cart", balanced, env_id="InvertedPendulum-v5", baseline="pole and cart"),
    "mountaincar": Task("a car at the peak of the mountain, next to the yellow flag", at_flag, env_id="MountainCarContinuous-v0",
                        baseline="a car in the mountain"),
}


def posture(model, height=None, pitch=0, **degrees):
    """The humanoid's state qpos (nq,) by hand: torso height in m (None: the lowest point touches the floor), pitch forward and
    hinges in degrees. "knee" is both knees, "left_knee" one; left shoulders are mirrored."""
    qpos = model.qpos0.copy()
    qpos[3:7] = np.cos(np.radians(pitch) / 2), 0, np.sin(np.radians(pitch) / 2), 0
    for name, angle in degrees.items():
        sides = {name: 1} if name.startswith(("abdomen", "right", "left")) else {f"right_{name}": 1, f"left_{name}": -1 if "shoulder" in name else 1}
        for joint, sign in sides.items():
            qpos[model.joint(joint).qposadr[0]] = np.radians(sign * angle)
    qpos[2] = on_floor(model, qpos) if height is None else height
    return qpos


def on_floor(model, qpos):
    """The torso height in m at which the lowest point of a humanoid in state qpos (nq,) touches the floor."""
    data = mujoco.MjData(model)
    data.qpos[:] = qpos
    mujoco.mj_kinematics(model, data)
    radius, half_length = model.geom_size[1:, 0], model.geom_size[1:, 1]  # capsules and balls; geom 0 is the floor
    return qpos[2] - (data.geom_xpos[1:, 2] - half_length * np.abs(data.geom_xmat[1:, 8]) - radius).min()


# ------------------------------------------------------------------------------------------- the world and its pictures

class Scene(NamedTuple):
    """What Gymnasium's task of the same name consists of, and how it is looked at."""
    xml: str                # one of Gymnasium's own files
    frame_skip: int         # physics steps per environment step
    episode_length: int     # environment steps
    obs_start: int          # observation = qpos[obs_start:] and qvel: the humanoid's x and y are left out
    cameras: dict           # looks -> distance, azimuth, elevation, lookat (free camera)


SCENES = {
    "Humanoid-v5": Scene("humanoid.xml", 5, 100, 2, {
        "paper": (3.5, 180, -10, (0, 0, 1)),
        "original": (4, 90, -20, (0, 0, 2)),
        "plain": (2.3, 125, -15, (0, 0, 0.65))}),
    "InvertedPendulum-v5": Scene("inverted_pendulum.xml", 2, 200, 0, {
        "paper": (2.2, 90, 0, (0, 0, 0.2)),
        "original": (2.04, 90, -45, (0, 0, 0)),
        "plain": (2.2, 90, 0, (0, 0, 0.2))}),
}


class World(gym.vector.VectorEnv):
    """Many simulations of one Gymnasium MuJoCo task, bit for bit, in one process (mujoco.batch), with pictures.

    Simulation i reset with seed s equals Gymnasium's task reset with seed s + i: for the humanoid, Humanoid-v5 that is never
    terminated and observes only qpos[2:] and qvel, 45 numbers. Episodes are `episode_length` steps, then truncated; the
    caller resets. The reward of `step` is 1.0 where `goal(world)` holds, else 0.0. looks: "paper", "original" or "plain".
    """
    metadata = {"render_modes": ["rgb_array"], "autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    render_mode = "rgb_array"

    def __init__(self, env_id="Humanoid-v5", num_envs=32, image_size=224, looks="paper", goal=None,
                 reset_noise_scale=0.01, num_threads=0):
        self.scene, self.num_envs, self.image_size, self.looks = SCENES[env_id], num_envs, image_size, looks
        self.goal, self.reset_noise_scale, self.episode_length = goal, reset_noise_scale, self.scene.episode_length
        self.xml = str(Path(gym.__file__).parent / "envs/mujoco/assets" / self.scene.xml)
        self.model = mujoco.MjModel.from_xml_path(self.xml)
        # Arrays bound to the batch are live views of the simulations: what outlives a step is copied.
        self.batch = mujoco.batch.Batch(self.model, num_envs, num_threads)
        fields = ("qpos", "qvel", "ctrl", "xpos", "xmat")
        self.qpos, self.qvel, self.ctrl, self.xpos, self.xmat = map(self.batch.bind, fields)
        self.elapsed = np.zeros(num_envs, int)
        self.rngs = [gym.utils.seeding.np_random(None)[0] for _ in range(num_envs)]
        low, high = self.model.actuator_ctrlrange.astype(np.float32).T
        self.single_action_space = gym.spaces.Box(low, high)
        self.single_observation_space = gym.spaces.Box(
            -np.inf, np.inf, (self.model.nq - self.scene.obs_start + self.model.nv,), np.float64)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.painter = None

    def observe(self):
        """Observations (num_envs, obs_dim) of the current states, float64."""
        return np.concatenate([self.qpos[:, self.scene.obs_start:], self.qvel], axis=1)  # a copy

    def point(self, body, offset=(0, 0, 0)):
        """Where a point of a body, given in the body's own frame in m, is in the world, (num_envs, 3)."""
        i = self.model.body(body).id
        return self.xpos[:, i] + self.xmat[:, i].reshape(-1, 3, 3) @ np.array(offset)

    def angle(self, joint):
        """A hinge's angle in rad, (num_envs,)."""
        return self.qpos[:, self.model.joint(joint).qposadr[0]]

    def axis(self, body, name):
        """The body frame's axis "x" (front), "y" (left) or "z" (up) in the world, unit vectors (num_envs, 3)."""
        return self.xmat[:, self.model.body(body).id].reshape(-1, 3, 3)[:, :, "xyz".index(name)]

    def reset(self, *, seed=None, options=None):
        ids = np.flatnonzero((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))
        if seed is not None:
            self.rngs = [gym.utils.seeding.np_random(seed + i)[0] for i in range(self.num_envs)]
        self.bits = [rng.bit_generator.state for rng in self.rngs]  # with these `restore` repeats this reset
        # Stage NONE: the state is written below, and forward() computes the rest.
        self.batch.reset(ids, stage=mujoco.mjtStage.mjSTAGE_NONE)
        for i in ids:
            noise = lambda n: self.rngs[i].uniform(-self.reset_noise_scale, self.reset_noise_scale, n)
            self.qpos[i] = self.model.qpos0 + noise(self.model.nq)
            self.qvel[i] = noise(self.model.nv)
        self.batch.forward(ids)
        self.elapsed[ids] = 0
        return self.observe(), {}

    def set_state(self, qpos, qvel=0):
        """Put the simulations into states qpos (num_envs, nq), qvel (num_envs, nv)."""
        self.qpos[:], self.qvel[:] = qpos, qvel
        self.batch.forward()

    def step(self, action):
        self.ctrl[:] = action
        # As after mj_step, xpos and xmat would lag by a substep; the criteria need them at the new state.
        self.batch.step(nstep=self.scene.frame_skip, stage=mujoco.mjtStage.mjSTAGE_POS)
        self.elapsed += 1
        reward = np.zeros(self.num_envs) if self.goal is None else self.goal(self).astype(float)
        truncated = self.elapsed >= self.episode_length
        return self.observe(), reward, np.zeros(self.num_envs, bool), truncated, {}

    def render(self):
        """Pictures of the current states, uint8 (num_envs, image_size, image_size, 3). Physics is not touched."""
        try:
            if not self.painter:
                self.thread = ThreadPoolExecutor(1)  # the OpenGL context belongs to it, and waiting for a thread can end
                self.painter = self.thread.submit(Painter, self.xml, self.scene, self.looks, self.image_size).result(PATIENCE)
            return self.thread.submit(self.painter.paint, self.qpos).result(PATIENCE + self.num_envs)
        except TimeoutError:
            raise RunError(f"the renderer has not answered for {PATIENCE} s. Known causes: too many processes that draw on one GPU (start "
                           "fewer), a driver without EGL (NVIDIA_DRIVER_CAPABILITIES=all), CUDA and EGL on different GPUs "
                           "(MUJOCO_EGL_DEVICE_ID)") from None

    def close_extras(self, **kwargs):
        if self.painter:
            self.thread.submit(self.painter.close).result()
            self.thread.shutdown()
        self.painter = None


# looks="plain", for small picture models: no texture, no shadow, and a colour for each part that a caption may be about.
PLAIN = {"thigh": (0.85, 0.15, 0.1), "shin": (1, 0.6, 0.1), "foot": (0.5, 0.2, 0.6), "uarm": (0.2, 0.7, 0.2), "larm": (0.2, 0.7, 0.2),
         "hand": (0.6, 0.9, 0.3), "head": (0.95, 0.9, 0.8), "floor": (0.75, 0.75, 0.75), "rail": (0.6, 0.6, 0.6), "cart": (0.85, 0.15, 0.1)}


def dress(spec, looks, size):
    """Give the MjSpec of Gymnasium's scene the paper's looks (appendix C.2), or plain ones for a small picture model, or leave it
    as it is but for what a software renderer spends its time on: at 224 x 224 a picture differs by 0.6 of 255 and is drawn 8 times as fast.
    """
    quality = spec.visual.quality
    quality.offsamples, quality.shadowsize, quality.numslices, quality.numstacks = 0, 4 * size, 16, 8
    spec.visual.global_.offwidth = spec.visual.global_.offheight = size  # a larger buffer costs time
    for geom in spec.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_PLANE:
            geom.size[2] = 10  # the grid's spacing: 0.125 would draw 320 x 320 squares
        if looks == "plain":
            geom.material = ""
            geom.rgba = (*next((rgb for part, rgb in PLAIN.items() if part in geom.name), (0.15, 0.3, 0.8)), 1)
        elif looks == "paper" and geom.material == "geom":
            geom.rgba = 1, 1, 1, 1
    if looks == "plain":
        spec.visual.headlight.ambient, spec.visual.headlight.diffuse = [0.45] * 3, [0.55] * 3
        quality.numslices, quality.numstacks = 10, 6
        for light in spec.lights:
            light.active = False
    if looks != "paper":
        return
    for texture in spec.textures:
        if texture.type == mujoco.mjtTexture.mjTEXTURE_SKYBOX:                  # for the paper's picture of a sky
            texture.rgb1, texture.rgb2 = (0.85, 0.92, 1), (0.25, 0.45, 0.8)
        elif texture.name == "texgeom":                                         # brushed metal: white with grey specks
            texture.rgb1, texture.rgb2, texture.markrgb = (0.95, 0.95, 0.95), (0.85, 0.85, 0.85), (0.6, 0.6, 0.65)
            texture.builtin, texture.mark, texture.random = (mujoco.mjtBuiltin.mjBUILTIN_GRADIENT, mujoco.mjtMark.mjMARK_RANDOM, 0.1)
        elif texture.name == "texplane":                                        # tiles: grey squares with light joints
            texture.rgb1, texture.rgb2, texture.markrgb = (0.45, 0.45, 0.47), (0.5, 0.5, 0.52), (0.8, 0.8, 0.8)
            texture.mark = mujoco.mjtMark.mjMARK_EDGE
    for material in spec.materials:
        material.reflectance, material.specular, material.shininess = 0, 1, 1
    for light in spec.lights:
        light.pos, light.dir, light.specular = (0, 0, 4), (0, 0, -1), (0.3, 0.3, 0.3)


PATIENCE = 60  # seconds, and one more per picture, until a renderer that does not answer counts as hanging


class Painter:
    """One OpenGL context that draws states of a scene. Raises UsageError without OpenGL."""

    def __init__(self, xml, scene, looks, size):
        spec = mujoco.MjSpec.from_file(xml)
        dress(spec, looks, size)
        self.model, self.follow = spec.compile(), looks == "plain" and scene.xml == "humanoid.xml"
        self.data, self.scene = mujoco.MjData(self.model), mujoco.MjvScene(self.model, 1000)
        self.camera, self.option, self.perturb = mujoco.MjvCamera(), mujoco.MjvOption(), mujoco.MjvPerturb()
        self.camera.distance, self.camera.azimuth, self.camera.elevation, self.camera.lookat[:] = scene.cameras[looks]
        if looks == "plain":
            self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = self.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        try:
            if sys.platform == "linux" and os.environ.get("MUJOCO_GL", "egl") == "egl":
                from mujoco.egl import GLContext  # renders without a display, on a GPU or in software
            else:
                from mujoco.gl_context import GLContext
            self.gl = GLContext(size, size)
            self.gl.make_current()
            self.context = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:  # the loaders raise AttributeError, ImportError, RuntimeError or mujoco.FatalError
            raise UsageError(f"no OpenGL to draw pictures with ({' '.join(str(error).split())[:150]}). Debian, Ubuntu: apt install "
                             "libegl1 libgl1-mesa-dri; in a container with a GPU: NVIDIA_DRIVER_CAPABILITIES=all; or train "
                             "without pictures: --reward truth") from None
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        self.rect, self.pixels = mujoco.MjrRect(0, 0, size, size), np.empty((size, size, 3), np.uint8)

    def paint(self, states):
        """States qpos (n, nq) -> pictures uint8 (n, size, size, 3)."""
        return np.stack([self.paint_one(qpos) for qpos in states])

    def paint_one(self, qpos):
        self.data.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self.data)  # where the bodies are, and with them lights: all that a picture needs
        mujoco.mj_camlight(self.model, self.data)
        if self.follow:
            self.camera.lookat[:2] = qpos[:2]
        mujoco.mjv_updateScene(self.model, self.data, self.option, self.perturb, self.camera, mujoco.mjtCatBit.mjCAT_ALL, self.scene)
        self.gl.make_current()
        mujoco.mjr_render(self.rect, self.scene, self.context)
        mujoco.mjr_readPixels(self.pixels, None, self.rect, self.context)
        return self.pixels[::-1].copy()  # OpenGL's first row is the bottom one

    def close(self):
        self.context.free()
        self.gl.free()


class Endless(gym.Wrapper):
    """A Gymnasium task stripped of its reward and of its terminations, both of which would tell the agent what the task is; Discrete(n)
    actions become n continuous ones, of which the largest counts."""

    def __init__(self, env):
        super().__init__(env)
        self.discrete = isinstance(env.action_space, gym.spaces.Discrete)
        if self.discrete:
            self.action_space = gym.spaces.Box(-1, 1, (int(env.action_space.n),))

    def step(self, action):
        obs, _, _, truncated, info = self.env.step(self.env.action_space.start + np.argmax(action) if self.discrete else action)
        return obs, 0.0, False, truncated, info


class GymWorld(gym.vector.VectorWrapper):
    """Any other Gymnasium task with vector observations that draws itself, as a World: `Endless` simulations that are truncated
    after `episode_length` steps and drawn as Gymnasium draws them, image_size pixels high if MuJoCo does."""

    def __init__(self, env_id, num_envs, image_size, episode_length, goal=None):
        if sys.platform == "linux" and "DISPLAY" not in os.environ:
            os.environ.setdefault("MUJOCO_GL", "egl")
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # for pygame
        make = lambda **size: sac.make_envs(env_id, num_envs, gym.vector.AutoresetMode.DISABLED, wrappers=(Endless,), render_mode="rgb_array",
                                            max_episode_steps=episode_length, **size)
        try:
            env = make(width=image_size, height=image_size)
        except TypeError:  # not MuJoCo: it has a size of its own
            env = make()
        super().__init__(env)
        self.env_id, self.episode_length, self.goal = env_id, episode_length, goal
        self.reset()  # only then it can be drawn

    @property
    def rngs(self):
        return [env.unwrapped.np_random for env in self.env.envs]

    def reset(self, *, seed=None, options=None):
        self.bits = [rng.bit_generator.state for rng in self.rngs]
        self.obs, info = self.env.reset(seed=seed, options=options)
        return self.obs, info

    def step(self, action):
        self.obs, reward, *rest = self.env.step(action)
        return self.obs, self.goal(self).astype(float) if self.goal else reward, *rest

    def set_state(self, states):
        """Put mountain cars, which observe just their state, into states (num_envs, 2)."""
        self.obs = np.array(states)
        for env, state in zip(self.env.envs, self.obs):
            env.unwrapped.state = state

    def render(self):
        """Pictures of the current states, uint8 (num_envs, height, width, 3)."""
        try:
            return np.stack(self.env.render())
        except (AttributeError, ImportError, RuntimeError, gym.error.DependencyNotInstalled) as error:  # no OpenGL or no pygame
            raise UsageError(f"--env-id {self.env_id} cannot be drawn: {' '.join(str(error).split())}") from None


def make_world(config, num_envs, image_size):
    """The world that a run's configuration asks for."""
    if config.env_id in SCENES:
        return World(config.env_id, num_envs, image_size, config.looks, config.goal, config.reset_noise_scale)
    return GymWorld(config.env_id, num_envs, image_size, config.rollout_steps, config.goal)


# ------------------------------------------------------------------------------------ training: Algorithm 1 and its settings

# Appendix C.2: 32 simulations x 100 steps, then 100 updates, is one iteration.
PAPER = dict(
    clip="ViT-bigG-14/laion2b_s39b_b160k", looks="paper", steps=10_000_000, num_envs=32, rollout_steps=100, updates=100,
    batch_size=512, learning_starts=50_000, replay=1_000_000, gamma=0.95, tau=0.005, actor_tau=1.0, lr=6e-4, lr_decay=False,
    hidden=256, temperature=1.0, layer_norm=False, reward_std=None, reset_noise_scale=0.01, eval_every=128_000)
# Fewer transitions, since each costs a picture (bench/README.md): more updates per transition, an averaged policy that acts,
# fixed scales for observations and rewards, a temperature that is out of the way from the start, layer normalisation in
# the critic, and a learning rate that comes to rest.
FEWER = PAPER | dict(
    updates=400, batch_size=256, learning_starts=6_400, gamma=0.97, actor_tau=0.002, lr=3e-4, lr_decay=True, temperature=0.05,
    layer_norm=True, reward_std=0.3, reset_noise_scale=0.02)
LESSON = dict(clip=str(TINY_CLIP), looks="plain", steps=256_000, replay=300_000, eval_every=12_800)
# The cart-pole and the mountain car. Balancing pays off late: with gamma 0.97 the cart still drifts to the end of the rail.
CLASSIC = dict(
    steps=64_000, num_envs=16, rollout_steps=200, updates=300, batch_size=256, learning_starts=3_200, replay=100_000,
    gamma=0.99, tau=0.01, lr=1e-3, hidden=128, temperature=0.1, layer_norm=True, reward_std=0.3, reset_noise_scale=0.05,
    eval_every=9_600)
TEST_EPISODES = 25  # per call of `evaluate`; they start as differently as in training, humanoids by 2 times Gymnasium's noise
# Seeds apart: + 1,000,000 chooses the best policy, + 2,000,000 tests it, + 3,000,000 is --eval's.


def evaluate(world, policy, label, seed):
    """One deterministic episode per simulation: its CLIP return (the criterion's without `label`) and success, (num_envs,).

    An episode is a success when the criterion holds in at least half of its steps (section 4.3).
    """
    obs, _ = world.reset(seed=seed)
    block, labels, _ = sac.rollout(world, obs, partial(policy.act, deterministic=True), world.episode_length, label)
    rewards = torch.stack(labels).cpu().numpy() if label else block.reward                          # (T, num_envs)
    return rewards.sum(0), block.reward.mean(0) >= 0.5


def film(policy, config, label, folder, size=192, pictures=10):
    """One deterministic episode as film.png, a row of pictures, and film.gif, with the reward as a growing curve (from its lowest
    to its highest) and a green mark while the criterion holds."""
    world, large = (make_world(config, 1, pixels) for pixels in (label.image_size, size))
    images = []

    def look(frames):
        drawn = frames[0]
        if config.env_id in SCENES:  # the same state, drawn for people
            large.set_state(world.qpos)
            drawn = large.render()[0]
        images.append(Image.fromarray(drawn).resize((size * drawn.shape[1] // drawn.shape[0], size)))
        return label(frames)
    obs, _ = world.reset(seed=config.seed)
    block, rewards, _ = sac.rollout(world, obs, partial(policy.act, deterministic=True), world.episode_length, look)
    every = len(images) // pictures
    Image.fromarray(np.concatenate(images[every - 1::every], axis=1)).save(folder / "film.png")
    rewards = torch.cat(rewards).tolist()
    x = np.linspace(5, images[0].width - 5, len(images))
    y = np.interp(rewards, [min(rewards), max(rewards)], [size - 5, size * 0.75])
    for t, image in enumerate(images):
        draw = ImageDraw.Draw(image)
        draw.line([*zip(x[:t + 1], y)], fill="yellow", width=2)
        draw.ellipse((5, 5, 17, 17), fill="lime" if block.reward[t, 0] else "gray")
    images[0].save(folder / "film.gif", save_all=True, append_images=images[1:], duration=30, loop=0)
    world.close()
    large.close()


def learning_curve(folder):
    """curve.png from progress.csv: CLIP return and, where there is a criterion, success of each iteration's episodes against steps."""
    rows = list(csv.DictReader(open(folder / "progress.csv")))
    steps, *curves = ([float(row[name] or "nan") for row in rows] for name in ("step", "return", "success"))
    plot(folder / "curve.png", "steps", steps, {name: curve for name, curve in zip(("return", "success"), curves) if not np.isnan(curve).any()})


def plot(path, x_name, x, curves, width=640, height=240):
    """Draw curves {name: values} against x, each between its own lowest and highest value, which are written beside its name."""
    image = Image.new("RGB", (width, height), "black")
    draw = ImageDraw.Draw(image)
    at = np.interp(x, [min(x), max(x)], [10, width - 10])
    for i, (name, values) in enumerate(curves.items()):
        color = ("white", "lime", "orange", "deepskyblue", "magenta")[i]
        low, high = min(values), max(values)
        draw.line([*zip(at, np.interp(values, [low, high + 1e-9], [height - 25, 20]))], fill=color, width=2)
        draw.text((10 + i * 125, 4), f"{name} {low:.2f} to {high:.2f}", fill=color)
    draw.text((width // 2 - 60, height - 18), f"{x_name} {min(x):g} to {max(x):g}", fill="gray")
    image.save(path)


SAVED = ("prompt", "task", "baseline", "alpha", "env_id", "reward", "seed", *PAPER)  # what config.json holds


def new_folder(config, name=""):
    """runs/<slug of prompt and name>, with a suffix if that exists; --out is taken as it is and must not exist. With config.json."""
    slug = re.sub(r"\W+", "-", f"{config.prompt} {name}".lower()).strip("-")[:60].strip("-") or "run"
    folder = Path(config.out or f"runs/{slug}")
    if config.out and folder.exists():
        raise UsageError(f"--out {folder} exists and is not overwritten: name another folder or remove it")
    names = (folder if i == 1 else folder.with_name(f"{folder.name}-{i}") for i in range(1, 10_000))
    for folder in names:
        try:
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps({name: getattr(config, name) for name in SAVED}, indent=2) + "\n")
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"cannot make the folder {folder}: {error.strerror}. Name another with --out") from None


FORMAT = 3  # of checkpoints


def save(path, content):
    """Write a checkpoint aside, flush it, rename it: at any moment `path` is the old file or the new one, whole.

    True; where it fails (a full disk) the old one stays, one line says so, and training goes on.
    """
    aside = path.with_suffix(".tmp")
    try:
        with open(aside, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        return True
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        aside.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 1e6
        print(f"warning: {path} could not be written ({free:.0f} MB free; {str(error).splitlines()[0]}); the one before stays", file=sys.stderr)


def load(path, put):
    """put(content) of a checkpoint by `save`; UsageError for any other file, of which nothing is executed, or a misfit."""
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        version = content["format"]
    except Exception as error:  # unpickling raises nearly anything
        raise UsageError(f"{path} is missing (a run writes it at its first test), damaged, or no checkpoint of vlmrm.py "
                         f"({type(error).__name__})") from None
    if version != FORMAT:
        raise UsageError(f"{path} has format {version}, this vlmrm.py reads format {FORMAT}: use the version that wrote it")
    try:
        return put(content)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise UsageError(f"{path} does not fit the run's config.json: it is of another task or of other sizes") from None


OPTIMIZERS = "actor_opt", "critic_opt"


def snapshot(now, world, agent, replay, best):
    """All that a run consists of but the replay's rows, copied when sac.train calls `remember`."""
    networks = copy.deepcopy({"agent": agent.state_dict()} | {name: getattr(agent, name).state_dict() for name in OPTIMIZERS})
    return networks | {"step": now["step"], "block": tuple(now["block"]), "reward": torch.as_tensor(now["reward"]),
                       "truth": torch.as_tensor(now["truth"]), "best": float(best),
                       "world": world.bits, "size": replay.size, "next": replay.next, "torch": torch.get_rng_state(),
                       "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []}


def restore(saved, world, agent, replay):
    """The inverse of `snapshot`; returns `saved` without the replay's rows, and what sac.train resumes from."""
    agent.load_state_dict(saved["agent"])
    for name in OPTIMIZERS:
        getattr(agent, name).load_state_dict(copy.deepcopy(saved[name]))  # it would keep, and then change, what it is given
    for store, rows in zip(replay.data, saved.pop("rows")):
        store[:saved["size"]] = rows
    replay.size, replay.next = saved["size"], saved["next"]
    for rng, bits in zip(world.rngs, saved["world"]):
        rng.bit_generator.state = bits
    torch.set_rng_state(saved["torch"])
    torch.cuda.set_rng_state_all(saved["cuda"])
    return saved, {"step": saved["step"], "obs": world.reset()[0], "block": saved["block"], "reward": saved["reward"].numpy(),
                   "truth": saved["truth"].numpy()}


def build(config, num_envs):
    """label (None for --reward truth), world and agent."""
    torch.manual_seed(config.seed)
    label = CLIPReward(config.prompt, config.baseline, config.alpha, config.clip, config.device) if config.reward == "clip" else None
    world = make_world(config, num_envs, label.image_size if label else 64)
    if label:
        label(world.render())  # so that a missing OpenGL or a lack of memory shows before anything is written
    agent = sac.SAC(world.single_observation_space.shape[0], world.single_action_space.shape[0], gamma=config.gamma, tau=config.tau,
                    actor_tau=config.actor_tau, lr=config.lr, device=config.device, hidden=config.hidden,
                    temperature=config.temperature, layer_norm=config.layer_norm)
    return label, world, agent


def announce(config, label):
    """The first lines on the screen: what is about to run."""
    per_iteration, size = config.num_envs * config.rollout_steps, label.image_size if label else 64
    print(f"picture model {config.clip if label else 'none: the criterion itself is the reward'}, pictures {size} x {size}, "
          f"looks {config.looks!r}, device {config.device}, {config.processes} process{'es' * (config.processes > 1)}\n"
          f"{config.num_envs} simulations of {config.env_id}, {per_iteration} transitions per iteration, then {config.updates} "
          f"updates of {config.batch_size} (1 update per {per_iteration / config.updates:.1f} transitions)", flush=True)


def train(config):
    """Train, keeping the policy with the highest return in its own deterministic episodes; then test that one."""
    label, world, agent = build(config, config.num_envs // config.processes)
    torch.manual_seed(config.seed + config.rank)  # processes begin with the same networks and then draw differently
    per_iteration = config.num_envs * config.rollout_steps  # whole episodes
    steps = -(-config.steps // per_iteration) * per_iteration
    replay = sac.Replay(max(config.replay, per_iteration) // config.processes, world.single_observation_space.shape[0],
                        world.single_action_space.shape[0], config.device)
    # memory: the run as it was just before its last replay.add, which is what a checkpoint holds.
    folder, resume, memory, best = config.resume, None, {}, -np.inf
    if folder and (folder / "last.pt").is_file():
        memory, resume = load(folder / "last.pt", lambda saved: restore(saved, world, agent, replay))
        best = memory["best"]
    # Under torchrun every process makes and labels its share of the transitions and of each minibatch.
    iterations = sac.train(world, agent, replay, steps // config.processes, rollout_steps=config.rollout_steps, updates=config.updates,
                           batch_size=config.batch_size // config.processes,
                           learning_starts=min(config.learning_starts, steps // 2) // config.processes, label=label,
                           reward_std=config.reward_std, lr_decay=config.lr_decay, seed=config.seed + config.rank * world.num_envs,
                           remember=lambda now: memory.update(snapshot(now, world, agent, replay, best)), resume=resume)
    if config.rank > 0:
        for _ in iterations:
            pass
        return
    announce(config, label)
    test_world = make_world(config, TEST_EPISODES, label.image_size if label else 64)
    folder, start = folder or new_folder(config), time.time()
    rows = lambda: [store[:memory["size"]].clone() for store in replay.data]  # of a view all of the buffer would be saved
    checkpoint = lambda: config.processes == 1 and save(folder / "last.pt", memory | {"rows": rows()})
    print(f"writing to {folder}", flush=True)
    try:
        with progress(folder, resume["step"] if resume else 0) as file, tqdm(total=steps, unit="step", mininterval=1) as bar:
            for it in iterations:
                step = it["step"] * config.processes
                bar.update(step - bar.n)
                row = {"step": step, "seconds": time.time() - start, "return": it["reward"].sum(0).mean(),
                       "success": (it["truth"].mean(0) >= 0.5).mean() if config.goal else "", "test_return": "", "test_success": ""}
                row |= {name: it.get(name, "") for name in ("temperature", "entropy", "q", "loss_q", "loss_pi")}
                if step % config.eval_every < per_iteration or step == steps:
                    returns, success = evaluate(test_world, it["policy"], label, config.seed + 1_000_000)
                    row |= {"test_return": returns.mean(), "test_success": success.mean() if config.goal else ""}
                    checkpoint()
                    if returns.mean() > best and save(folder / "best.pt", {"step": step, "agent": it["policy"].state_dict()}):
                        best = returns.mean()
                log(row, it["seconds"], file, bar)
    except KeyboardInterrupt:
        if memory:
            checkpoint()
        if config.processes == 1:
            print(f"\nstopped; to go on: python vlmrm.py --resume {folder}", file=sys.stderr)
        raise
    finish(config, folder, label, test_world, agent.policy(), start)


def finish(config, folder, label, world, policy, start):
    """Test the best policy in 100 new episodes; curve, film and the last line on the screen."""
    load(folder / "best.pt", lambda saved: policy.load_state_dict(saved["agent"]))
    results = [evaluate(world, policy, label, config.seed + 2_000_000 + i * TEST_EPISODES) for i in range(4)]
    returns, success = map(np.concatenate, zip(*results))                                           # (100,)
    learning_curve(folder)
    if label:
        film(policy, config, label, folder)
    print(f"best policy, {len(returns)} deterministic episodes: {'CLIP' if label else 'criterion'} return {returns.mean():.2f}"
          + (f", success rate {success.mean():.0%}" if config.goal else "")
          + f", {(time.time() - start) / 60:.1f} minutes; see {folder}", flush=True)


def progress(folder, step):
    """progress.csv, opened to append, with nothing in it but whole rows from before `step`."""
    path = folder / "progress.csv"
    lines = path.read_text().splitlines(keepends=True) if path.exists() and step else []
    path.write_text("".join(line for line in lines if line.endswith("\n") and (line.startswith("step") or int(line.split(",")[0]) < step)))
    return open(path, "a", newline="")


def log(row, seconds, file, bar):
    """One row of progress.csv, and the figures behind the progress bar."""
    writer = csv.DictWriter(file, row, lineterminator="\n")
    if file.tell() == 0:
        writer.writeheader()
    writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    file.flush()
    shares = " ".join(f"{part} {value / sum(seconds.values()):.0%}" for part, value in seconds.items())
    success = f"success {row['success']:.0%}, " if row["success"] != "" else ""
    bar.set_postfix_str(f"return {row['return']:.2f}, {success}{shares}")


# ------------------------------------------------------------------------------- evaluation: the simulator is the judge

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def epic(reward, goal):
    """EPIC distance (section 4.1) between rewards (N,) and the 0/1 criterion (N,): sqrt((1 - Pearson's rho) / 2).

    0 means the same but for scale and offset, 0.71 no relation; nan where either never varies.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.sqrt((1 - np.corrcoef(reward, goal)[0, 1]) / 2))


def auroc(reward, goal):
    """Probability that a goal state's reward is above another state's (ties count half); nan without both kinds."""
    _, inverse, counts = np.unique(reward, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    true, false = goal.sum(), (~goal).sum()
    return float((rank[goal].sum() - true * (true + 1) / 2) / (true * false)) if true and false else float("nan")


def hacked(reward, goal, goal_reward):
    """Share of states that are paid better than `goal_reward` without being goal states. Many: the picture model is fooled; few, and
    few goal states: the optimiser has not got there."""
    return float(((reward > goal_reward) & ~goal).mean())


def evaluate_run(folder, episodes):
    """The best policy of a run in deterministic episodes: one table on the screen, and eval.json in the run's folder."""
    config = read_config(folder)
    if config.goal is None:
        raise UsageError(f"--eval {folder}: the simulator has no criterion for {config.prompt!r}; it judges the prompts of --task {', '.join(TASKS)}")
    config.reward = "clip"
    label, world, agent = build(config, TEST_EPISODES)
    policy = agent.policy()
    load(folder / "best.pt", lambda saved: policy.load_state_dict(saved["agent"]))
    vectors, goals = [], []
    for i in range(-(-episodes // world.num_envs)):
        obs, _ = world.reset(seed=config.seed + 3_000_000 + i * world.num_envs)
        block, labels, _ = sac.rollout(world, obs, partial(policy.act, deterministic=True), world.episode_length, label.embed)
        vectors.append(torch.stack(labels, 1))                                                      # (num_envs, T, D)
        goals.append(block.reward.T > 0)                                                            # (num_envs, T)
    vectors, goals = torch.cat(vectors)[:episodes].flatten(0, 1), np.concatenate(goals)[:episodes]
    fixed = labelled_world(config, label.image_size)
    fixed_goals = label.embed(fixed.render())[torch.as_tensor(config.goal(fixed))]                  # (n, D)
    reward = lambda alpha, s=vectors: goal_baseline_reward(s, label.goal, label.baseline, alpha).cpu().numpy()
    judge = lambda alpha, r, goal: {"alpha": alpha, "epic": epic(r, goal), "auroc": auroc(r, goal),
                                    "hacked": hacked(r, goal, np.median(reward(alpha, fixed_goals)))}
    result = {"episodes": episodes, "success": float((goals.mean(1) >= 0.5).mean()),
              "return": float(reward(config.alpha).sum() / episodes), "goal_states": float(goals.mean()),
              "alphas": [judge(alpha, reward(alpha), goals.flatten()) for alpha in ALPHAS]}
    (folder / "eval.json").write_text(json.dumps(result, indent=2) + "\n")
    film(policy, config, label, folder)
    print(f"{episodes} deterministic episodes: success rate {result['success']:.0%}, CLIP return {result['return']:.2f}, "
          f"goal states {result['goal_states']:.0%} of the steps\nalpha   EPIC  AUROC  hacked")
    for row in result["alphas"]:
        print(f"{row['alpha']:5.2f} {row['epic']:6.3f} {row['auroc']:6.3f} {row['hacked']:7.1%}")


def view(folder):
    """Watch a run's best policy in MuJoCo's own viewer, episode after episode, until its window is closed."""
    config = read_config(folder)
    if config.env_id not in SCENES:
        raise UsageError(f"--view shows {' and '.join(SCENES)}; of {config.env_id} there is {folder}/film.gif")
    config.reward = "truth"  # no picture model is needed
    _, world, agent = build(config, 1)
    model, data = world.model, mujoco.MjData(world.model)
    load(folder / "best.pt", lambda saved: agent.load_state_dict(saved["agent"]))
    try:
        from mujoco.viewer import launch_passive
        viewer = launch_passive(model, data)
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"--view needs a display ({error}); without one look at {folder}/film.gif") from None
    obs, _ = world.reset(seed=config.seed)
    while viewer.is_running():
        obs, _, _, done, _ = world.step(sac.to_env(world, agent.act(obs, deterministic=True)))
        data.qpos[:] = world.qpos[0]
        mujoco.mj_forward(model, data)
        viewer.sync()
        time.sleep(model.opt.timestep * world.scene.frame_skip)
        obs = world.reset()[0] if done.all() else obs


def labelled_states(task, seed=0):
    """States (n, nq) to judge reward models on, the same for everyone: positions and angles of the cart-pole, positions of the
    car; for the humanoid noisy blends of standing and the posture of this task (300) and of all tasks (20 each), on the floor,
    then as they settle without torques, and at last in a random rollout."""
    rng = np.random.default_rng(seed)
    if task == "cartpole":
        return rng.uniform((-1, -1.5), (1, 1.5), (1000, 2))
    if task == "mountaincar":
        return rng.uniform((-1.2, 0), (0.6, 0), (200, 2))
    names = [task] * 300 + [name for name in TASKS if TASKS[name].posture] * 20
    world, start, states = World("Humanoid-v5", len(names)), [], []
    stand = posture(world.model, **STAND)
    for name in names:
        share, noise = min(1, rng.uniform(0, 2)), rng.uniform(0, 0.1)
        qpos = (1 - share) * stand + share * posture(world.model, **TASKS[name].posture) + rng.normal(0, noise, world.model.nq)
        qpos[3:7] /= np.linalg.norm(qpos[3:7])
        qpos[2] = on_floor(world.model, qpos)
        start.append(qpos)
    world.set_state(start)
    for step in range(31):
        if step in (0, 4, 8, 30):
            states.append(world.qpos.copy())
        world.step(rng.uniform(world.action_space.low, world.action_space.high) * (step >= 8))
    return np.concatenate(states)


def labelled_world(config, image_size):
    """One simulation in each of the labelled states of the run's task."""
    states = labelled_states(config.task)
    world = make_world(config, len(states), image_size)
    world.set_state(states)
    return world


def compare_models(config):
    """Figure 4 without training: EPIC distance and AUROC of every picture model, prompt and alpha on labelled_states."""
    goal = config.goal(labelled_world(config, 64))
    print(f"{len(goal)} states, {goal.mean():.0%} of them goal states of {config.task!r}, looks {config.looks!r}\n"
          f"{'EPIC (AUROC) at alpha ' + ', '.join(map(str, ALPHAS)):<62} image tower, prompt")
    for clip in config.clip:
        reward = CLIPReward(config.prompt, config.baseline, clip=clip, device=config.device)
        s, size = reward.embed(labelled_world(config, reward.image_size).render()), sum(p.numel() for p in reward.parameters())
        for prompt, g in zip(config.prompt, reward.goals):
            rewards = (goal_baseline_reward(s, g, reward.baseline, alpha).cpu().numpy() for alpha in ALPHAS)
            print(*(f"{epic(r, goal):.3f} ({auroc(r, goal):.3f})" for r in rewards), f"{Path(clip).name} ({size / 1e6:.2f} M)", prompt, flush=True)


def landscape(config):
    """Figure 2: the reward for each alpha against one joint (rad, or m for the cart), all else as in the task's posture, or against
    the mountain car's position: landscape.csv and .png."""
    reward = CLIPReward(config.prompt, config.baseline, clip=config.clip, device=config.device)
    world, name = make_world(config, 101, reward.image_size), config.landscape
    if config.env_id in SCENES:
        model = world.model
        state = posture(model, **TASKS[config.task].posture) if config.goal and TASKS[config.task].posture else model.qpos0
        axes = {model.joint(i).name: (model.jnt_qposadr[i], *model.jnt_range[i]) for i in range(model.njnt) if model.jnt_limited[i]}
    else:
        state, axes = world.obs[0], {"position": (0, -1.2, 0.6)}
    if name not in axes:
        raise UsageError(f"--landscape {name}: no such joint in {config.env_id}; there are {', '.join(axes)}")
    column, low, high = axes[name]
    x, states = np.linspace(low, high, world.num_envs), np.tile(state, (world.num_envs, 1))
    states[:, column] = x
    if config.env_id == "Humanoid-v5":
        states[:, 2] = [on_floor(model, qpos) for qpos in states]
    world.set_state(states)
    s = reward.embed(world.render())
    curves = {f"alpha {alpha}": goal_baseline_reward(s, reward.goal, reward.baseline, alpha).tolist() for alpha in ALPHAS}
    folder = new_folder(config, name)
    np.savetxt(folder / "landscape.csv", np.column_stack([x, *curves.values()]), "%.6g", ",", header=",".join([name, *curves]), comments="")
    plot(folder / "landscape.png", name, x, curves)
    print(f"wrote {folder}/landscape.csv and landscape.png; highest reward: "
          + ", ".join(f"{name} at {x[np.argmax(values)]:.2f}" for name, values in curves.items()))


def read_config(folder):
    """The configuration of a run; raises UsageError where there is none."""
    try:
        config = argparse.Namespace(**json.loads((folder / "config.json").read_text()))
        missing = set(SAVED) - vars(config).keys()
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{folder} is not a run's folder: its config.json cannot be read ({type(error).__name__}). Give one like "
                         "runs/a-humanoid-robot-kneeling") from None
    if missing:
        raise UsageError(f"{folder}/config.json is not from this vlmrm.py: it lacks {', '.join(sorted(missing))}")
    if Path(config.clip).name == TINY_CLIP.name and not Path(config.clip).is_dir():
        config.clip = str(TINY_CLIP)  # the checkout has moved since
    task = TASKS.get(config.task, Task(config.prompt))
    config.goal = task.goal if config.env_id == task.env_id else None
    config.rank, config.processes, config.resume = 0, 1, None
    config.device = "cuda" if torch.cuda.is_available() else "cpu"
    return config


# ---------------------------------------------------------------------------------------------------------- the command line

def flags():
    """The command line's parser; None where nothing was asked for."""
    p = argparse.ArgumentParser(description="Train a policy on the CLIP reward of a sentence.")
    p.add_argument("--prompt", nargs="+", help='the goal, for example "a humanoid robot kneeling"')
    p.add_argument("--task", choices=TASKS, metavar="TASK", help=f"the goal by name: {', '.join(TASKS)}")
    p.add_argument("--baseline", help="what the picture shows anyway (default: the task's)")
    p.add_argument("--alpha", type=float, default=0.0, help="goal-baseline regularisation, 0 to 1 (default: 0)")
    p.add_argument("--env-id", metavar="ID", help=f"the world: {', '.join(SCENES)}, or any Gymnasium task that draws itself (default: the task's)")
    p.add_argument("--clip", nargs="+", metavar="NAME|FOLDER", help="open_clip architecture/tag, or a folder with config and weights")
    p.add_argument("--looks", choices=("paper", "original", "plain"), help="how the world is drawn")
    p.add_argument("--paper", action="store_true", help="learn with exactly the paper's settings (appendix C.2)")
    p.add_argument("--reward", choices=("clip", "truth"), default="clip", help="truth: train on the task's criterion instead")
    p.add_argument("--steps", type=int, help="transitions in all, rounded up to whole episodes")
    p.add_argument("--num-envs", type=int, help="simulations")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--eval", metavar="RUN", nargs="?", const="", help="do not train: evaluate the best policy of this run's folder; without "
                   "RUN: compare every --clip and every --prompt on fixed states")
    p.add_argument("--landscape", metavar="JOINT", help="do not train: draw the reward against this joint, for example right_knee or hinge")
    p.add_argument("--view", metavar="RUN", type=Path, help="do not train: watch the best policy of this run's folder in MuJoCo's viewer")
    p.add_argument("--episodes", type=int, default=100, help="of --eval (default: 100)")
    p.add_argument("--resume", metavar="RUN", type=Path, help="go on with the run in this folder, to the bit as if it had not been interrupted")
    p.add_argument("--out", help="the run's folder (default: runs/<prompt>)")
    p.error = sac.usage_error
    return p


def parse(argv):
    """The run's configuration: what was asked for explicitly, and beyond that the settings that suit it."""
    args = flags().parse_args(argv)
    if not 1 <= args.episodes <= 100_000:
        raise UsageError(f"--episodes must be at least 1 and at most 100,000, not {args.episodes}")
    modes = [flag for flag in ("eval", "landscape", "resume", "view") if getattr(args, flag) is not None]
    if len(modes) > 1:
        raise UsageError(f"--{' and --'.join(modes)} exclude each other: give one of them")
    if not (args.eval or args.resume or args.view):
        choose_goal(args)
        choose_settings(args)
    elif any(value != flags().get_default(flag) for flag, value in vars(args).items() if flag not in (*modes, "episodes")):
        raise UsageError(f"--{modes[0]} takes everything from the run's folder: give it without other flags")
    return args


def choose_goal(args):
    """What is to be learned where: prompt, baseline, world and criterion, by the task's name or by its prompt."""
    if args.prompt is None and args.task is None:
        raise UsageError('say what to learn: --prompt "a humanoid robot kneeling" or --task kneeling')
    args.task = args.task or next((name for name, task in TASKS.items() if task.prompt in args.prompt), None)
    named = TASKS[args.task] if args.task else Task(None)
    args.prompt = args.prompt or [named.prompt]
    args.env_id = args.env_id or named.env_id
    if args.env_id not in SCENES:
        if args.looks or args.landscape and args.env_id != TASKS["mountaincar"].env_id:
            raise UsageError(f"--{'looks' if args.looks else 'landscape'} is for --env-id {' and '.join(SCENES)}; Gymnasium draws {args.env_id}")
        args.looks = "Gymnasium's own"
    if (args.alpha > 0 or args.landscape is not None) and args.baseline is None and args.env_id != named.env_id:
        raise UsageError(f"with alpha > 0 say what a picture of {args.env_id} shows anyway: --baseline \"a one-legged robot\"")
    args.baseline = named.baseline if args.baseline is None else args.baseline
    args.goal = named.goal if args.env_id == named.env_id else None
    if args.goal is None and (args.eval is not None or args.reward == "truth"):
        raise UsageError(f"--eval and --reward truth need a criterion: add --task {', --task '.join(TASKS)}")


def choose_settings(args):
    """Device, picture model and learning settings: the paper's or those for fewer transitions, or the lesson's without CUDA."""
    args.rank, local_rank, args.processes = (int(os.environ.get(name, i)) for name, i in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    args.device = "cpu"
    if torch.cuda.is_available():
        args.device = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
        if args.processes > 1:
            os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", str(local_rank))  # draw where the picture model is
    args.clip = [str(TINY_CLIP) if clip == "tiny_clip" else clip for clip in args.clip or ()]
    lesson = any(Path(clip).resolve().is_relative_to(TINY_CLIP) for clip in args.clip) or not args.clip and args.device == "cpu"
    settings = (PAPER if args.paper else FEWER) | (LESSON if lesson else {})
    if args.env_id in (TASKS["cartpole"].env_id, TASKS["mountaincar"].env_id):
        settings |= {"rollout_steps": 200} if args.paper else CLASSIC
    args.clip = args.clip or [settings["clip"]]
    vars(args).update({name: value for name, value in settings.items() if getattr(args, name, None) is None})
    if args.eval is None:
        if len(args.prompt) > 1 or len(args.clip) > 1:
            raise UsageError("several --prompt or --clip are for comparing them: --eval without a run's folder. Train with one of "
                             "each; a sentence goes in quotes: --prompt \"a humanoid robot kneeling\"")
        args.prompt, args.clip = args.prompt[0], args.clip[0]
    if lesson and args.rank == 0 and args.eval is None and args.landscape is None:
        print("lesson: tiny_clip and settings that end in minutes. The paper's run needs a CUDA GPU: --clip " + PAPER["clip"])
    for flag, least, most in (("steps", 1, 10 ** 10), ("num_envs", 1, 4096), ("seed", 0, 2 ** 31)):
        if not least <= getattr(args, flag) <= most:
            raise UsageError(f"--{flag.replace('_', '-')} must be at least {least} and at most {most:,}, not {getattr(args, flag)}")
    if args.num_envs % args.processes:
        raise UsageError(f"--num-envs {args.num_envs} does not divide among {args.processes} processes: take a multiple of {args.processes}")


def main(argv=None):
    """The command line."""
    config = parse(argv)
    if config.resume:
        if "WORLD_SIZE" in os.environ:
            raise UsageError("--resume is for runs of one process, not under torchrun")
        folder, config = config.resume, read_config(config.resume)
        config.resume = folder
    elif config.view:
        return view(config.view)
    elif config.eval:
        return evaluate_run(Path(config.eval), config.episodes)
    elif config.eval is not None:
        return compare_models(config)
    elif config.landscape is not None:
        return landscape(config)
    if config.processes > 1:
        dist.init_process_group()
    train(config)
    if config.processes > 1:
        dist.barrier()  # one that leaves early would cut off another's last exchange
        dist.destroy_process_group()


if __name__ == "__main__":
    sac.exit_with_one_line(main)
