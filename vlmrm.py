"""Vision-language models are zero-shot reward models: a sentence becomes a reward for SAC.

    python vlmrm.py --prompt "a humanoid robot kneeling"

After Rocamonde et al., ICLR 2024 (arXiv 2310.12921). With CLIP's unit vectors s of the rendered
state, g of the goal prompt and b of a baseline prompt, the reward of the state is

    Eq. 2   R(s) = cos(g, s)
    Eq. 3   R(s) = 1 - 1/2 || alpha proj_L(s) + (1 - alpha) s - g ||^2,  L the line through b and g

where alpha = 0 gives Eq. 2 and alpha = 1 keeps only what lies along the way from baseline to goal.
Algorithm 1 repeats: roll the policy out, with a picture of every state that it reaches; label the
pictures with R; move the labelled transitions to the replay buffer; update on minibatches.
"""

import argparse
import copy
import difflib
import json
import logging
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import gymnasium as gym
import imageio
import numpy as np
import open_clip
import torch
from PIL import Image, ImageColor
from torch import nn
from torch.nn.functional import normalize
from tqdm import tqdm

import sac
from sac import UsageError

os.environ.setdefault("LP_NUM_THREADS", "0")  # OpenGL in software: 1.5 times as fast in one thread
if sys.platform == "linux" and "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")
try:
    from gymnasium.envs.mujoco import MujocoEnv
except (AttributeError, RuntimeError):  # no OpenGL: the first picture will say so
    os.environ["MUJOCO_GL"] = "off"
    from gymnasium.envs.mujoco import MujocoEnv
TINY_CLIP = Path(__file__).resolve().parent / "tiny_clip"  # a lesson, no evidence about CLIP


# --- the reward (section 3)
def goal_baseline_reward(s, g, b, alpha):
    """Eq. 3 for unit vectors s (N, D), g (D,), b (D,), alpha from 0 to 1 -> (N,). g is on L: of e,
    proj_L(s) - g is the part along u; of the rest, at right angles to it, 1 - alpha is left."""
    u = normalize(g - b, dim=0)  # (D,)
    e = s - g  # (N, D)
    along = e @ u  # (N,)
    rest = e - along[:, None] * u  # (N, D)
    return 1 - (along.square() + (1 - alpha) ** 2 * rest.square().sum(-1)) / 2


class CLIPReward(nn.Module):
    """reward(frames): pictures uint8 (N, H, W, 3), 0 to 255 -> float32 (N,); others: UsageError.
    prompts, baselines: one or several, whose unit vectors are averaged. clip: open_clip's name/tag,
    or a folder with config and weights. Draw at `image_size`: other sizes are resized, and what is
    not square is squashed, since a crop could cut off the goal."""

    def __init__(
        self, prompts, baselines="a humanoid robot", alpha=0.0, clip="tiny_clip", device="cpu"
    ):
        super().__init__()
        prompts, baselines = (np.atleast_1d(x).tolist() for x in (prompts, baselines))
        if not (prompts and baselines and all(map(str.strip, prompts + baselines))):
            raise UsageError('a prompt is empty: try --prompt "a humanoid robot kneeling"')
        if not 0 <= alpha <= 1:
            raise UsageError(f"alpha must be from 0 to 1, not {alpha}")
        self.alpha = alpha
        clip = str(TINY_CLIP if clip == "tiny_clip" else clip)
        self.dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        model, tokenizer = load_clip(clip, self.dtype)
        warn_of_unread(clip, tokenizer, prompts + baselines)
        model.to(device).eval().requires_grad_(False)
        for name, texts in (("goal", prompts), ("baseline", baselines)):
            vectors = normalize(model.encode_text(tokenizer(texts).to(device)).float(), dim=-1)
            self.register_buffer(name, normalize(vectors.mean(0), dim=0))  # (texts, D) -> (D,)
        if alpha > 0 and torch.allclose(self.goal, self.baseline):
            raise UsageError("with alpha > 0 --baseline and --prompt must differ")
        self.visual = model.visual  # only this image tower stays
        self.visual.output_tokens = False  # CoCa's would give all patches, too
        config = open_clip.transform.PreprocessCfg(**self.visual.preprocess_cfg)
        config.resize_mode = "squash"  # for square pictures the same as the others
        self.transform = open_clip.transform.image_transform_v2(config, is_train=False)
        self.size = tuple(np.broadcast_to(config.size, 2).tolist())  # height, width
        self.image_size = max(self.size)  # pixels
        mean_std = torch.tensor([config.mean, config.std], dtype=torch.float32, device=device)
        self.register_buffer("mean_std", mean_std)  # (2, 3)

    def train(self, mode=True):
        """Always eval mode: training mode's batch normalisation would change the reward."""
        return super().train(False)

    def preprocess(self, frames):
        """As open_clip does it for this model: uint8 (N, H, W, 3) -> (N, 3, h, w)."""
        if frames.shape[1:3] == self.size:
            mean, std = self.mean_std
            x = (frames.to(mean.device).float() / 255 - mean) / std
            return x.permute(0, 3, 1, 2).to(self.dtype)
        pictures = [self.transform(Image.fromarray(frame)) for frame in frames.cpu().numpy()]
        return torch.stack(pictures).to(self.goal.device, self.dtype)

    @torch.no_grad()
    def embed(self, frames):
        """Pictures uint8 (N, H, W, 3), array or tensor -> unit vectors s (N, D), float32."""
        if not torch.is_tensor(frames):
            frames = np.ascontiguousarray(frames)  # torch refuses a flip's negative strides
        if "uint8" not in str(frames.dtype) or frames.shape[3:] != (3,):
            raise UsageError(f"pictures are uint8 (N, H, W, 3), not {frames.dtype} {frames.shape}")
        parts = map(self.preprocess, torch.as_tensor(frames).split(256))  # for memory's sake
        return normalize(torch.cat([self.visual(x) for x in parts]).float(), dim=-1)

    def forward(self, frames):
        """Pictures uint8 (N, H, W, 3) -> rewards (N,)."""
        return goal_baseline_reward(self.embed(frames), self.goal, self.baseline, self.alpha)


def split_reward(reward, devices):
    """The same reward from copies on several GPUs, among which pictures are split."""
    copies = [reward, *(copy.deepcopy(reward).to(device) for device in devices[1:])]

    def label(frames):
        parts = zip(copies, np.array_split(frames, len(copies)), strict=True)
        return torch.cat([one(part).to(devices[0]) for one, part in parts])  # all GPUs at work

    label.image_size = reward.image_size
    return label


def load_clip(clip, dtype=torch.float32):
    """open_clip's model and its tokenizer; never an untrained one by accident."""
    names = ["/".join(pair) for pair in open_clip.list_pretrained()]
    name, _, tag = clip.partition("/")
    if Path(clip).is_dir():
        name, tag = f"local-dir:{clip}", None
    elif clip not in names and tag != "random":
        raise UsageError(
            f"--clip {clip}: no folder, no pretrained model; no GPU? copy tiny_clip from vlmrm's "
            f"repository; near: {', '.join(difflib.get_close_matches(clip, names, 5, 0.0))}"
        )
    default, disabled = torch.get_default_dtype(), logging.root.manager.disable
    torch.set_default_dtype(dtype)  # float32 takes 10 GB on the host for ViT-bigG-14
    logging.disable(logging.ERROR)  # errors are raised as well
    try:
        quick, trained = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"), tag != "random"
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # "random": the same network each time
            model = open_clip.create_model(
                name, tag if trained else None, force_quick_gelu=quick, require_pretrained=trained
            )
        return model, open_clip.get_tokenizer(name)
    except Exception as error:  # of many kinds
        raise UsageError(
            f"--clip {clip} does not load: {str(error)[:200]}; "
            "offline: tiny_clip or a folder like it"
        ) from error
    finally:
        torch.set_default_dtype(default)
        logging.disable(disabled)


def warn_of_unread(clip, tokenizer, texts):
    """Name words past the model's context, and words not among those that its folder lists."""
    path, context = Path(clip, "open_clip_config.json"), tokenizer.context_length
    known = path.read_text() if path.is_file() else ""  # its "words" are those that it learned
    for text in texts:
        words = read = text.split()
        while len(tokenizer(" ".join(read), 999)[0, context:].unique()) > 1:  # more than padding
            read = read[:-1]
        unread = words[len(read) :]
        if '"words"' in known:
            unread += [x for x in read if f'"{x.strip(",.").lower()}"' not in known]
        if unread:
            why = "too long, or words never learned"
            print(f"warning: {clip} does not read {' '.join(unread)}: {why}", file=sys.stderr)


class WithCLIPReward(gym.wrappers.TransformReward):
    """A Gymnasium environment with another reward: that of its picture after each step."""

    def __init__(self, env, reward):
        gym.utils.RecordConstructorArgs.__init__(self, reward=reward, _disable_deepcopy=True)
        super().__init__(drawing(env), lambda _: reward(draw(env)[None]).item())


class WithCLIPRewards(gym.wrappers.vector.TransformReward):
    """The same for a vector of environments, encoded together: rewards float32 (num_envs,)."""

    def __init__(self, envs, reward):
        super().__init__(drawing(envs), lambda _: reward(draw_all(envs)).cpu().numpy())


def drawing(env):
    """env; UsageError if it draws nothing, or only after resetting itself (SAME_STEP)."""
    if env.render_mode != "rgb_array" or "SAME_STEP" in str(env.metadata):
        raise UsageError(f'{env}: make it with render_mode="rgb_array", not SAME_STEP')
    return env


KEPT = []  # all viewers, also others'; at its end one would free textures in the current context


def draw(env):
    """What env shows now, uint8 (H, W, 3), in its own OpenGL context: Gymnasium takes any one's."""
    viewer = getattr(getattr(env.unwrapped, "mujoco_renderer", None), "viewer", None)
    if viewer:
        type(viewer).__del__ = lambda viewer: KEPT.append(viewer)
        viewer.make_context_current()
    return env.render()


def draw_all(envs):
    """What each of a vector of environments shows now, uint8 (N, H, W, 3)."""
    sims = getattr(envs.unwrapped, "envs", None)  # else they are in processes of their own
    return np.stack([draw(sim) for sim in sims] if sims else envs.render())


# --- the world and its pictures
HUMANOID = """include_cinert_in_observation include_cvel_in_observation
include_qfrc_actuator_in_observation include_cfrc_ext_in_observation
terminate_when_unhealthy"""  # the 45 numbers that remain are the state, but for where it stands
HUMANOID = dict.fromkeys(HUMANOID.split(), False)
PLAIN = dict(distance=2.8, elevation=-15, lookat=(0, 0, 0.75))  # x, y, azimuth: World.render
CAMERAS = {  # of the tasks and looks that are dressed; all else is as Gymnasium draws it
    "Humanoid-v5 plain": PLAIN,
    "Humanoid-v5 paper": dict(distance=3.5, azimuth=180, elevation=-10, lookat=(0, 0, 1)),
    "InvertedPendulum-v5 plain": dict(distance=2.2, azimuth=90, elevation=0, lookat=(0, 0, 0.2)),
}
COLOURS = {  # of "plain", by a part of the geom's name: what captions name; left from right
    "": "#264dcc",
    "thigh": "#d9261a",
    "shin": "#ff991a",
    "foot": "#803399",
    "left_shin": "#fff24d",
    "arm": "#33b333",
    "left_larm": "#33cccc",
    "hand": "#99e64d",
    "head": "#f2e6cc",
    "floor": "#bfbfbf",
    "rail": "#999999",
    "cart": "#d9261a",
}


def dress(model, looks, size, mirrored):
    """Give a MuJoCo model the looks, with cheap edges and shadows. Nothing of this is physics.
    mirrored: 0, or 1, with the left limbs' colours on the right."""
    quality = model.vis.quality
    quality.offsamples, quality.shadowsize = 0, 4 * size
    quality.numslices, quality.numstacks = 10, 6
    model.geom_size[:, 2] = 10  # the floor's grid; capsules and balls have no third size
    if looks == "paper":  # appendix C.2: white metal, tiles, a sky, no reflections
        model.geom_rgba[model.geom_matid >= 0] = 1
        model.mat_reflectance[:] = 0
        texels = model.tex_data.reshape(-1, 3)  # a view of Gymnasium's sky, metal and tiles
        texels[:] = 128 + texels.mean(1, keepdims=True) / 2  # grey, and lighter
        texels[: 6 * 100 * 100] += np.uint8([0, 30, 60])  # the sky, a cube: blue
    else:
        model.geom_matid[:], model.light_active[:] = -1, 0
        model.vis.headlight.ambient, model.vis.headlight.diffuse = 0.45, 0.55
        for i in range(model.ngeom):
            for part, colour in COLOURS.items():
                if part.replace("left", "right", mirrored) in model.geom(i).name:
                    model.geom_rgba[i, :3] = np.divide(ImageColor.getrgb(colour), 255)


class Endless(gym.Wrapper):
    """Hides a task's end and reward, which tell what to do, and its info."""

    def reset(self, **kwargs):
        return self.env.reset(**kwargs)[0], {}

    def step(self, action):
        return self.env.step(action)[0], 0.0, False, False, {}


class World(gym.vector.VectorWrapper):
    """Gymnasium's simulations of a task, for actions in [-1, 1], and what they show."""

    def __init__(self, cfg, num_envs, image_size=64):
        args = dict(render_mode="rgb_array", wrappers=(Endless,))
        args |= HUMANOID if cfg.env_id == "Humanoid-v5" else {}
        super().__init__(sac.make_envs(cfg.env_id, num_envs, **args))
        self.cfg, self.sims = cfg, [env.unwrapped for env in self.unwrapped.envs]
        self.camera = CAMERAS.get(f"{cfg.env_id} {cfg.looks}")
        self.sides = 1 + (
            self.camera is PLAIN and not re.search(r"(?i)\b(left|right)\b", cfg.prompt)
        )
        self.one_viewer = type(self.sims[0]).render is MujocoEnv.render  # else they draw themselves
        self.reset(seed=0)
        for i, sim in enumerate(self.sims if self.one_viewer else ()):
            renderer, buffer = sim.mujoco_renderer, sim.model.vis.global_
            renderer.width = renderer.height = buffer.offwidth = buffer.offheight = image_size
            free = {"lookat": np.median(sim.data.geom_xpos, 0)}  # Gymnasium's, with seed 0 for all
            renderer.default_cam_config = free | (self.camera or renderer.default_cam_config or {})
            if self.camera:
                dress(sim.model, cfg.looks, image_size, i % self.sides)

    def render(self):
        """Pictures of all simulations as they are now, uint8 (N, H, W, 3). In "plain" looks every
        second humanoid is a mirror image, seen from its other side, unless the prompt tells left
        from right: what seems right from one side only does not pay."""
        if not self.one_viewer:
            return draw_all(self.env)
        first, frames = self.sims[0], []
        viewer = first.mujoco_renderer.viewer or open_viewer(first)
        for i, sim in enumerate(self.sims):
            viewer.model, viewer.data = sim.model, sim.data  # the first's viewer draws them all
            sign = 1 - i % self.sides * 2  # -1 in the mirror
            if self.camera is PLAIN:
                viewer.cam.lookat[:2], viewer.cam.azimuth = sim.data.qpos[:2], 155 * sign
            frames.append(draw(first)[:, ::sign])
        return np.stack(frames)


def open_viewer(sim):
    """Gymnasium's viewer, which opens with the first picture; UsageError without OpenGL."""
    try:
        sim.render()
        return sim.mujoco_renderer.viewer
    except Exception as error:  # of a kind for each OpenGL library
        raise UsageError(
            "no OpenGL: set MUJOCO_GL=egl (DISPLAY may name a screen that is gone), apt install "
            f"libegl1 libgl1-mesa-dri, in containers NVIDIA_DRIVER_CAPABILITIES=all ({error})"
        ) from error


# --- Algorithm 1
def setting(default, text):
    """A field of Config, with the help text of its flag."""
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """The settings of a run: config.json, and the command line's flags."""

    prompt: str = setting("", "the goal in words")
    baseline: str = setting("a humanoid robot", "what the picture shows anyway, for alpha > 0")
    alpha: float = setting(0.0, "of Eq. 3, 0 to 1")
    clip: str = setting("ViT-bigG-14/laion2b_s39b_b160k", "open_clip architecture/tag, or a folder")
    env_id: str = setting("Humanoid-v5", "any Gymnasium task that draws itself")
    looks: str = setting("paper", "paper (Humanoid-v5), plain (InvertedPendulum-v5 too), original")
    seed: int = setting(0, "of all randomness")
    steps: int = setting(10_000_000, "transitions, in whole iterations")
    num_envs: int = setting(32, "simulations; an iteration is one episode of each")
    episode_length: int = setting(100, "environment steps")
    test_every: int = setting(20, "iterations from test to test; then all is saved, too")
    updates: int = setting(500, "per iteration; many, since pictures cost (paper: 100)")
    critic_steps: int = setting(2, "of the critic in an update (paper: 1)")
    batch_size: int = setting(256, "transitions per gradient step (paper: 512)")
    learning_starts: int = setting(6400, "transitions before updates (paper: 50,000)")
    replay: int = setting(1_000_000, "transitions kept")
    gamma: float = setting(0.97, "discount per step (paper: 0.95)")
    window: int = setting(3000, "updates that the tested policy averages, at most half (paper: 0)")
    lr: float = setting(3e-4, "of actor and temperature (paper: 6e-4)")
    critic_lr: float = setting(1e-3, "of the critic (paper: 6e-4)")
    hidden: int = setting(256, "units per layer")
    temperature: float = setting(0.05, "the first entropy coefficient (paper: 1)")
    layer_norm: int = setting(1, "in the critic (paper: 0)")
    reward_std: float = setting(0.3, "of scaled rewards (paper: 0, they and obs as they are)")

    def __post_init__(self):
        self.learning_starts = min(self.learning_starts, self.steps // 2 or 1)
        if self.alpha > 0 and self.baseline == Config.baseline and "Humanoid" not in self.env_id:
            raise UsageError(f"--alpha needs a --baseline: what a picture of {self.env_id} shows")
        if self.looks not in "paper plain original".split():
            raise UsageError(f"--looks is paper, plain or original, not {self.looks}")
        for name, value in asdict(self).items():
            least = 0 if name in "alpha seed layer_norm reward_std window".split() else 1e-10
            most = 1 if name == "gamma" else 1e8
            if not isinstance(value, str) and not least <= value <= most:
                raise UsageError(f"--{name.replace('_', '-')} {value}: from {least} to {most}")


LESSON = dict(looks="plain", steps=64_000, test_every=4)
CARTPOLE = dict(
    baseline="pole and cart", steps=64_000, num_envs=16, episode_length=200, test_every=2
)
PAPER = dict(updates=100, batch_size=512, learning_starts=50_000, gamma=0.95, layer_norm=0)
PAPER |= dict(critic_steps=1, lr=6e-4, critic_lr=6e-4, temperature=1, window=0, reward_std=0)


def rollout(world, policy, seed, label):
    """An episode of each simulation: obs, action, reward, next_obs, arrays (T, N, ...) each.
    Random actions where policy is None; reward = label(pictures of next_obs)."""
    steps, (obs, _), space = [], world.reset(seed=seed), world.action_space
    space.seed(seed)
    for _ in range(world.cfg.episode_length):
        action = policy(obs).reshape(space.shape) if policy else space.sample()
        next_obs = world.step(action)[0]
        reward = label(world.render())  # (N,); a GPU encodes while the CPU simulates on
        steps.append((obs, action, reward, next_obs))
        obs = next_obs
    columns = list(zip(*steps, strict=True))
    columns[2] = torch.stack(columns[2]).cpu()  # rewards; waits for the GPU
    return [np.stack(x) for x in columns]


def train(cfg, folder, label, world, agent, replay):
    """Algorithm 1, from last.pt on if there is one. At the end `agent.policy` is the best one."""
    run = resume(cfg, folder, agent, replay)
    save(folder / "config.json", json.dumps(asdict(cfg), indent=2))
    actor = copy.deepcopy(agent.actor).cpu()  # on a GPU an action would wait for the pictures
    metrics = [math.nan] * 5
    bar = tqdm(total=cfg.steps, initial=run.step, unit="step")
    while run.step < cfg.steps:
        seed = cfg.seed * 10**9 + run.step
        torch.manual_seed(seed)  # so --resume repeats an iteration to the bit
        # Roll the actor out, with a picture of every state reached, and label these with CLIP.
        actor.load_state_dict(agent.actor.state_dict())
        act = actor.act if run.step >= cfg.learning_starts else None
        obs, action, reward, next_obs = rollout(world, act, seed, label)
        if run.step == 0 and cfg.reward_std > 0:
            agent.fit_scales(obs, reward, cfg.reward_std)
        # Move the labelled transitions to the replay buffer. A time limit is no true end.
        obs, next_obs = map(agent.actor.standardise, (obs, next_obs))
        replay.add(obs, action, reward, next_obs, terminated=0 * reward)
        run.step += reward.size
        # Update actor, critic and temperature on minibatches.
        for _ in range(cfg.updates if run.step >= cfg.learning_starts else 0):
            batches = [replay.sample(cfg.batch_size) for _ in range(cfg.critic_steps)]
            metrics = agent.update(*batches).values()
        # Now and then test the averaged actor, keep the best, and save all.
        tested = (len(run.rows) + 1) % cfg.test_every == 0 or run.step >= cfg.steps
        test = mean_return(world, agent.policy, seed, label) if tested else math.nan
        run.rows.append([float(x) for x in (run.step, reward.sum(0).mean(), test, *metrics)])
        if test > run.best:
            run.best, run.policy = test, copy.deepcopy(agent.policy.state_dict())
        if tested:
            checkpoint(cfg, folder, run, agent, replay)
        bar.set_postfix_str(f"return {run.rows[-1][1]:.2f}, best test {run.best:.2f}")
        bar.update(reward.size)
    agent.policy.load_state_dict(run.policy)


def mean_return(world, policy, seed, label):
    """The mean over an episode of each simulation, without exploration, of the sum of rewards."""
    return float(
        rollout(world, partial(policy.act, deterministic=True), seed, label)[2].sum(0).mean()
    )


def checkpoint(cfg, folder, run, agent, replay):
    """last.pt, which with config.json is all that is needed to go on, best.pt, progress.csv."""
    state = {"config": asdict(cfg), "run": vars(run), "agent": agent.state_dict()}
    state["replay"] = [x.cpu() for x in replay.rows(torch.arange(replay.size))]
    save(folder / "best.pt", run.policy)
    names = "step,return,test,q,loss_q,loss_pi,entropy,temperature"
    np.savetxt(folder / "progress.csv", run.rows, "%.10g", ",", header=names, comments="")
    save(folder / "last.pt", state)


def resume(cfg, folder, agent, replay):
    """The state of the run: that of last.pt, loaded without executing anything, or a new one."""
    path = folder / "last.pt"
    run = argparse.Namespace(step=0, best=-math.inf, policy={}, rows=[])
    if not path.exists():
        return run
    try:
        saved = torch.load(path, map_location="cpu")
        agent.load_state_dict(saved["agent"])
        replay.add(*(x[-replay.capacity :] for x in saved["replay"]))
        changed = dict(asdict(cfg).items() - saved["config"].items())
        run = argparse.Namespace(**saved["run"])
    except Exception as error:  # torch raises many kinds
        raise UsageError(f"{path} is damaged or another run's ({str(error)[:200]})") from error
    if changed.keys() & "prompt baseline alpha looks clip env_id reward_std temperature".split():
        raise UsageError(f"{path} began with other settings; for {changed} start a new run")
    if changed:
        print(f"changed after {run.step} transitions: {changed}")
    return run


def save(path, content):
    """Text, or what torch saves. `path` is the old file or the new one, whole, at any moment."""
    new = path.with_suffix(".tmp")
    try:
        new.write_text(content) if isinstance(content, str) else torch.save(content, new)
        new.replace(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's, of the disk
        new.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written; is the disk full? ({error})") from error


def finish(cfg, folder, label, policy, began):
    """Test the best policy once more, on 100 episodes, and film one."""
    seed, act = cfg.seed + 1_000_000, partial(policy.act, deterministic=True)
    test = mean_return(World(cfg, 100, label.image_size), policy, seed, label)
    film = rollout(World(cfg, 1, 192), act, seed, torch.from_numpy)[2][:, 0]  # no rewards, pictures
    imageio.mimsave(folder / "film.gif", film, duration=30, loop=0)
    imageio.imwrite(folder / "film.png", np.concatenate(film[:: 1 + len(film) // 11], 1))
    print(
        f"best policy, 100 deterministic episodes: CLIP return {test:.2f}, "
        f"{(time.monotonic() - began) / 60:.1f} minutes; see {folder}; "
        f"success rate: python paper/evaluate.py {folder}"
    )


def build(cfg):
    """label, world, agent, replay; nothing is written yet."""
    if "tiny_clip" in cfg.clip:
        torch.set_num_threads(1)  # a second one gains little, and loses much beside another program
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    # Another reward model goes here: pictures -> tensor (N,), and `image_size`, at which to draw.
    label = CLIPReward(cfg.prompt, cfg.baseline, cfg.alpha, cfg.clip, devices[0])
    label = split_reward(label, devices)
    world = World(cfg, cfg.num_envs, label.image_size)
    label(world.render())  # fails here if OpenGL or pictures are missing
    n = cfg.num_envs * cfg.episode_length
    print(
        f"{cfg.clip}{' (a lesson)' if 'tiny_clip' in cfg.clip else ''} on {' '.join(devices)}, "
        f"{label.image_size} px; {cfg.num_envs} x {cfg.env_id}, {n} transitions an iteration, "
        f"{cfg.updates / n:.2g} updates per transition"
    )
    torch.manual_seed(cfg.seed)
    sizes = world.single_observation_space.shape[0], math.prod(world.single_action_space.shape)
    names = "gamma lr critic_lr window hidden temperature layer_norm".split()
    agent = sac.SAC(*sizes, device=devices[0], **{name: getattr(cfg, name) for name in names})
    return label, world, agent, sac.Replay(max(cfg.replay, n), *sizes, devices[0])


# --- the command line
def configure(paper=False, **asked):
    """What is asked for; else the paper's settings; else what suits task, model and machine."""
    settings = {"clip": Config.clip if torch.cuda.is_available() else "tiny_clip"} | asked
    if "tiny_clip" in settings["clip"]:
        settings |= LESSON
    if settings.get("env_id") == "InvertedPendulum-v5":
        settings |= CARTPOLE
    if paper:
        settings |= PAPER
    return Config(**settings | asked)


def new_folder(cfg, out):
    """Makes runs/<prompt>, then -2, -3, or `out`, which must not exist."""
    name = re.sub(r"\W+", "-", cfg.prompt.lower())[:60]
    folder, number = Path(out or f"runs/{name}"), 1
    while folder.exists() and not out:
        number += 1
        folder = Path(f"runs/{name}-{number}")
    try:
        folder.mkdir(parents=True)  # now: of two runs that start at once one fails
        return folder
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made anew: name another ({error})") from error


def read_config(folder, **asked):
    """The settings of a run's folder, and what is asked for beside them."""
    try:
        return Config(**json.loads((folder / "config.json").read_text()) | asked)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{folder} is not a run's folder, or a flag is wrong ({error})") from error


def parse(argv):
    """What is asked for: a flag for each setting."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS)
    here = configure()
    for x in fields(Config):
        text = f"{x.metadata['help']} (default: {getattr(here, x.name)})"
        parser.add_argument(f"--{x.name.replace('_', '-')}", type=x.type, help=text)
    parser.add_argument("--paper", action="store_true", help="learn as in appendix C.2")
    parser.add_argument("--out", help="the run's folder (default: runs/<prompt>)")
    parser.add_argument("--resume", type=Path, help="a run's folder: go on; more --steps, say")
    return vars(parser.parse_args(argv))


def main(argv=None):
    """Train."""
    asked = parse(argv)
    folder = asked.pop("resume", None)
    out = None if folder else asked.pop("out", None)
    cfg = read_config(folder, **asked) if folder else configure(**asked)
    began = time.monotonic()
    try:
        label, world, agent, replay = build(cfg)
        folder = folder or new_folder(cfg, out)
        print(f"{folder}; when stopped, go on with: python vlmrm.py --resume {folder}")
        train(cfg, folder, label, world, agent, replay)
        finish(cfg, folder, label, agent.policy, began)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UsageError(f"out of memory: a smaller --clip or --replay ({error})") from error


if __name__ == "__main__":
    sac.run(main)
