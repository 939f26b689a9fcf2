"""Vision-language models are zero-shot reward models: a sentence becomes a reward for SAC.

    python vlmrm.py --prompt "a humanoid robot kneeling"

After Rocamonde et al., ICLR 2024 (arXiv 2310.12921). With CLIP's unit vectors s of the rendered
state, g of the goal prompt and b of a baseline prompt, the reward of the state is

    Eq. 2   R(s) = cos(g, s)
    Eq. 3   R(s) = 1 - 1/2 || alpha proj_L(s) + (1 - alpha) s - g ||^2,  L the line through b and g

where alpha = 0 gives Eq. 2 and alpha = 1 keeps only what lies along the way from baseline to goal.
"""
import argparse, copy, datetime, difflib, inspect, json, logging, math, os, re, sys, time
from collections import Counter, namedtuple
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
import gymnasium as gym
import numpy as np
import open_clip
import torch
from PIL import Image
from torch import distributed as dist, nn
from tqdm import tqdm
import sac
from sac import UsageError

os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa in software: 1.5 times as fast in one thread
if sys.platform == "linux" and "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")
try:
    import mujoco
except (AttributeError, RuntimeError):  # no OpenGL; the first picture will say so
    os.environ["MUJOCO_GL"] = "off"
    import mujoco
TINY_CLIP = Path(__file__).resolve().parent / "tiny_clip"  # a lesson, no evidence about CLIP
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun

# --- the reward (section 3)
def goal_baseline_reward(s, g, b, alpha):
    """Eq. 3 for unit vectors s (N, D), g (D,), b (D,) -> rewards (N,). proj_L(s) - g is the part of
    e = s - g along g - b; of the rest, alpha in [0, 1] leaves 1 - alpha."""
    u = nn.functional.normalize(g - b, dim=0)    # (D,)
    e = s - g                      # (N, D)
    along = e @ u                  # (N,)
    rest = e - along[:, None] * u  # (N, D)
    return 1 - (along.square() + (1 - alpha) ** 2 * rest.square().sum(-1)) / 2

class CLIPReward(nn.Module):
    """reward(frames): pictures uint8 (N, H, W, 3) -> float32 (N,) on `device`. prompts, baselines:
    one or several, whose unit vectors are averaged. clip: open_clip's "architecture/pretrained tag"
    ("random": untrained), or a folder with config and weights. Draw at `image_size`."""
    def __init__(self, prompts, baselines="a humanoid robot", alpha=0.0, clip="tiny_clip",
                 device="cpu"):
        super().__init__()
        prompts, baselines = ([x] if isinstance(x, str) else list(x) for x in (prompts, baselines))
        if not (prompts and baselines and all(map(str.strip, prompts + baselines))):
            raise UsageError('the prompt is empty: try "a humanoid robot kneeling"')
        if not 0 <= alpha <= 1:
            raise UsageError(f"alpha must be from 0 to 1, not {alpha}")
        clip = str(TINY_CLIP if clip == "tiny_clip" else clip)
        self.dtype = torch.float16 if "cuda" in str(device) else torch.float32
        model, tokenizer = load_clip(clip, self.dtype)
        warn_of_unknown(clip, prompts + baselines)
        model.to(device).eval().requires_grad_(False)
        for name, texts in (("goal", prompts), ("baseline", baselines)):
            vectors = model.encode_text(tokenizer(texts).to(device)).float()  # (texts, D)
            self.register_buffer(name, nn.functional.normalize(vectors, dim=-1).mean(0))  # (D,)
        if alpha > 0 and torch.allclose(self.goal, self.baseline, atol=1e-5):
            raise UsageError("with alpha > 0 --baseline and --prompt must differ")
        self.alpha, self.visual = alpha, model.visual  # only the image tower stays
        self.visual.output_tokens = False  # of CoCa
        config = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
        self.transform = open_clip.transform.image_transform_v2(config, is_train=False)
        self.size = tuple(np.broadcast_to(config.size, 2).tolist())
        self.image_size = max(self.size)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(config, name), device=device))
    def train(self, mode=True):
        return super().train(False)  # in training mode batch normalisation is another reward
    def preprocess(self, frames):
        """As open_clip does it for this model: uint8 (N, H, W, 3) -> (N, 3, h, w)."""
        if tuple(frames.shape[1:3]) == self.size:
            x = (frames.to(self.mean.device) / 255 - self.mean) / self.std
            return x.permute(0, 3, 1, 2).to(self.dtype)
        pictures = [self.transform(Image.fromarray(frame)) for frame in frames.cpu().numpy()]
        return torch.stack(pictures).to(self.mean.device, self.dtype)
    @torch.no_grad()
    def embed(self, frames):
        """Pictures uint8 (N, H, W, 3), array or tensor -> unit vectors s (N, D), float32."""
        if not torch.is_tensor(frames):
            frames = np.ascontiguousarray(frames)  # torch refuses a flip's negative strides
        if "uint8" not in str(frames.dtype) or frames.ndim != 4 or frames.shape[3] != 3:
            raise UsageError("pictures must be uint8 (N, H, W, 3), 0 to 255, not "
                             f"{frames.dtype} {tuple(frames.shape)}")
        parts = map(self.preprocess, torch.as_tensor(frames).split(256))
        return nn.functional.normalize(torch.cat([self.visual(x) for x in parts]).float(), dim=-1)
    def forward(self, frames):
        return goal_baseline_reward(self.embed(frames), self.goal, self.baseline, self.alpha)

def load_clip(clip, dtype=torch.float32):
    """open_clip's model and its tokenizer; never an untrained one by accident."""
    names = ["/".join(pair) for pair in open_clip.list_pretrained()]
    name, _, tag = clip.partition("/")
    if Path(clip).is_dir():
        name, tag = f"local-dir:{clip}", None
    elif clip not in names and tag != "random":
        near = ", ".join(difflib.get_close_matches(clip, names, 5, 0.0))
        raise UsageError(f"--clip {clip}: no folder and no pretrained model; near: {near}")
    logging.disable(logging.ERROR)  # its exception says it, too
    torch.set_default_dtype(dtype)  # float32 takes 10 GB on the host for ViT-bigG-14
    try:
        tokenizer, trained = open_clip.get_tokenizer(name), tag != "random"
        quick = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)  # as trained
        return open_clip.create_model(name, tag if trained else None, force_quick_gelu=quick,
                                      require_pretrained=trained), tokenizer
    except Exception as error:
        raise UsageError(f"--clip {clip} does not load: {str(error)[:200]}. Offline: tiny_clip or "
                         "a folder with open_clip_config.json, open_clip_model.safetensors")
    finally:
        logging.disable(logging.NOTSET)
        torch.set_default_dtype(torch.float32)

def warn_of_unknown(clip, texts):
    """A folder's config may list the words that its model has seen."""
    path = Path(clip, "open_clip_config.json")
    known = json.loads(path.read_text()).get("words", []) if path.is_file() else []
    unknown = set(re.findall(r"[\w']+", " ".join(texts).lower())) - set(known)
    if known and unknown:
        print(f"warning: {clip} never saw {', '.join(sorted(unknown))}, only {' '.join(known)}: "
              "take a pretrained --clip", file=sys.stderr)

class WithCLIPReward(gym.wrappers.TransformReward):
    """A Gymnasium environment with another reward: that of its picture after each step."""
    def __init__(self, env, reward):
        gym.utils.RecordConstructorArgs.__init__(self, reward=reward, _disable_deepcopy=True)
        super().__init__(drawing(env), lambda _: reward(np.asarray(env.render())[None]).item())

class WithCLIPRewards(gym.wrappers.vector.TransformReward):
    """The same for a vector of environments, encoded together: rewards float32 (num_envs,)."""
    def __init__(self, env, reward):
        super().__init__(drawing(env), lambda _: reward(np.asarray(env.render())).cpu().numpy())

def drawing(env):
    """env; UsageError if it draws nothing, or only after resetting itself (SAME_STEP)."""
    if env.render_mode != "rgb_array" or "SAME" in str(env.metadata.get("autoreset_mode")):
        raise UsageError(f'{env}: make it with render_mode="rgb_array", not SAME_STEP')
    return env

# --- the tasks (Table 1)
Task = namedtuple("Task", "prompt env_id baseline", defaults=("Humanoid-v5", "a humanoid robot"))
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
    "cartpole": Task("pole vertically upright on top of the cart", "InvertedPendulum-v5",
                     "pole and cart")}
# A body's frame (..., 3, 4), m: rows are the world's axes, columns the body's front, left, up and
# centre; frame @ (x, y, z, 1) is the body's point x, y, z in the world.
X, Y, Z, CENTRE = range(4)
MIRROR = np.array([[[1, -1, 1, 1]], [[1, 1, 1, 1]]])  # a right limb's Y points outwards, too

class Humanoid:
    """Bodies in states qpos (N, nq), for the eight criteria. Only --reward truth trains on them."""
    def __init__(self, model, qpos):
        data, frames = mujoco.MjData(model), []
        for state in qpos:
            data.qpos[:] = state
            mujoco.mj_kinematics(model, data)  # of this very state: a step leaves them one behind
            frames.append(np.c_[data.xmat.reshape(-1, 3, 3), data.xpos[..., None]])
        frames = np.stack(frames)  # (N, bodies, 3, 4)
        self.torso, self.pelvis = (frames[:, [model.body(x).id]] for x in ("torso", "pelvis"))
        self.thigh, self.shin, self.foot, self.arm = (  # right and left: (N, 2, 3, 4)
            frames[:, [model.body(f"{side}_{limb}").id for side in ("right", "left")]] * MIRROR
            for limb in ("thigh", "shin", "foot", "lower_arm"))
        self.hands, self.feet = self.arm @ (0.18, -0.18, 0.18, 1), self.foot @ (0, 0, 0.1, 1)
        self.foot_gap = self.feet[..., Z] - 0.075  # above the floor; a foot is a ball: (N, 2)
        thigh_end = self.thigh @ (0, -0.01, -0.34, 1)  # a knee is two capsules
        self.knee_gap = np.minimum(thigh_end[..., Z] - 0.06, self.shin[..., Z, CENTRE] - 0.049)
    def outwards(self, frame, points):
        """How far points (N, 2, 3) of right and left are on their own side of a body: (N, 2)."""
        return ((points - frame[..., CENTRE]) * frame[..., Y]).sum(-1) * (-1, 1)
    def goals(self):
        """Task -> (N,) bool: our reading of the prompts; the paper asked a person."""
        torso, pelvis, thigh, shin = self.torso, self.pelvis, self.thigh, self.shin
        upright = torso[:, 0, Z, Z] > 0.8  # 37 degrees from vertical
        tall = upright & (pelvis[:, 0, Z, CENTRE] > 0.8)  # 0.97 when standing
        on_feet = tall & (self.foot_gap < 0.03).any(1)
        seated = pelvis[:, 0, Z, CENTRE] < 0.2  # a capsule of radius 0.09
        on_knees = (shin[..., Z, X] < -0.5) & (self.knee_gap < 0.015)
        knees, feet = self.outwards(pelvis, shin[..., CENTRE]), self.outwards(pelvis, self.feet)
        crossed = (knees > 0.2) & (feet < knees - 0.1) & (self.knee_gap < 0.1)
        straight = (thigh[..., Z] * shin[..., Z]).sum(-1) > 0.825  # bent by at most 34.4 degrees
        flat = straight & (self.foot_gap < 0.1) & (self.knee_gap < 0.1)
        spread = (thigh[:, 0, :, Z] * thigh[:, 1, :, Z]).sum(-1) < -0.1736  # 100 degrees apart
        to_hips = np.linalg.norm(self.hands - (pelvis * MIRROR) @ (0, 0.2, 0.05, 1), axis=-1)
        reach = self.hands - torso[..., CENTRE]
        across = self.outwards(torso, self.hands) < -0.05
        in_front = ((reach * torso[..., X]).sum(-1) > 0.1) & (abs(reach[..., Z]) < 0.25)
        return {
            "kneeling": upright & on_knees.all(1),
            "lotus": upright & seated & crossed.all(1),
            "standing": on_feet & (self.foot_gap < 0.03).all(1),
            "arms-raised": on_feet & (self.hands > torso @ (0, 0, 0.19, 1))[..., Z].all(1),
            "splits": seated & spread & flat.all(1),
            "hands-on-hips": on_feet & (to_hips < 0.15).all(1),
            "one-leg": on_feet & (self.foot_gap.max(1) > 0.1),
            "arms-crossed": on_feet & (in_front & across).all(1)}

# --- the world and its pictures
HUMANOID = {f"include_{part}_in_observation": False  # the 45 numbers that remain are the state
            for part in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")}
HUMANOID["terminate_when_unhealthy"] = False
CAMERAS = {  # others: Gymnasium's
    "Humanoid-v5 paper": dict(distance=3.5, azimuth=180, elevation=-10, lookat=(0, 0, 1)),
    "Humanoid-v5 plain": dict(distance=2.3, azimuth=125, elevation=-15, lookat=(0, 0, 0.65)),
    "InvertedPendulum-v5 plain": dict(distance=2.2, azimuth=90, elevation=0, lookat=(0, 0, 0.2))}
CAMERAS["InvertedPendulum-v5 paper"] = CAMERAS["InvertedPendulum-v5 plain"]
TEXTURES = {  # of "paper": a sky, metal with specks, tiles with joints
    "": dict(rgb1=(0.85, 0.92, 1), rgb2=(0.25, 0.45, 0.8)),
    "texgeom": dict(rgb1=(0.95,) * 3, rgb2=(0.85,) * 3, markrgb=(0.6, 0.6, 0.65), random=0.1,
                    builtin=1, mark=3),  # gradient, specks
    "texplane": dict(rgb1=(0.45, 0.45, 0.47), rgb2=(0.5, 0.5, 0.52), markrgb=(0.8,) * 3, mark=1)}
COLOURS = {  # of "plain": what captions name
    "thigh": (0.85, 0.15, 0.1), "shin": (1, 0.6, 0.1), "foot": (0.5, 0.2, 0.6),
    "arm": (0.2, 0.7, 0.2), "hand": (0.6, 0.9, 0.3), "head": (0.95, 0.9, 0.8),
    "floor": (0.75,) * 3, "rail": (0.6,) * 3, "cart": (0.85, 0.15, 0.1), "": (0.15, 0.3, 0.8)}

def dress(spec, looks, size):
    """Give an MjSpec the looks (paper: appendix C.2), with cheap edges and shadows: 8 times as fast
    in software, pixels off by 0.6 of 255."""
    quality, paper, plain = spec.visual.quality, looks == "paper", looks == "plain"
    quality.offsamples, quality.shadowsize = 0, 4 * size
    quality.numslices, quality.numstacks = (10, 6) if plain else (16, 8)
    spec.visual.global_.offwidth = spec.visual.global_.offheight = size
    if plain:
        spec.visual.headlight.ambient, spec.visual.headlight.diffuse = (0.45,) * 3, (0.55,) * 3
    for geom in spec.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_PLANE:
            geom.size[2] = 10  # the grid's spacing: 0.125 would draw 320 x 320 squares
        if paper and geom.material == "geom":
            geom.rgba = 1, 1, 1, 1
        if plain:
            geom.material = ""
            part = next(part for part in COLOURS if part in geom.name)  # "" is in every name
            geom.rgba = *COLOURS[part], 1
    for light in spec.lights:
        light.active = not plain
        if paper:
            light.pos, light.dir, light.specular = (0, 0, 4), (0, 0, -1), (0.3,) * 3
    for texture in spec.textures if paper else ():
        for name, value in TEXTURES.get(texture.name, {}).items():
            setattr(texture, name, value)
    for material in spec.materials if paper else ():
        material.reflectance, material.specular, material.shininess = 0, 1, 1

class Endless(gym.Wrapper):
    """Hides end and reward: they tell the task. Discrete(n) becomes n numbers; the largest acts."""
    def __init__(self, env):
        super().__init__(env)
        if isinstance(env.action_space, gym.spaces.Discrete):
            self.action_space = gym.spaces.Box(-1, 1, (int(env.action_space.n),))
    def step(self, action):
        if isinstance(self.env.action_space, gym.spaces.Discrete):
            action = self.env.action_space.start + np.argmax(action)
        return self.env.step(action)[0], 0.0, False, False, {}

class World(gym.vector.VectorWrapper):
    """Gymnasium's simulations, drawn and judged together; MuJoCo's states are qpos (N, nq)."""
    def __init__(self, cfg, num_envs, image_size=64):
        args = HUMANOID if cfg.env_id == "Humanoid-v5" else {}
        super().__init__(sac.make_envs(cfg.env_id, num_envs, render_mode="rgb_array",
                                       max_episode_steps=-1, wrappers=(Endless,), **args))
        self.cfg, self.image_size, self.renderer = cfg, image_size, None
        self.sims = [env.unwrapped for env in self.unwrapped.envs]
    def states(self):
        return np.stack([sim.data.qpos for sim in self.sims])
    def judge(self, states=None):
        """Whether the task's criterion, if any, holds in the states (or now), (N,) bool."""
        if not self.cfg.task:
            return np.zeros(self.num_envs, bool)
        states = self.states() if states is None else states
        if self.cfg.task == "cartpole":
            return np.abs(states[:, 1]) < 0.2  # rad from the vertical
        return Humanoid(self.sims[0].model, states).goals()[self.cfg.task]
    def render(self, states=None):
        """Pictures of the states (or now), uint8 (N, H, W, 3)."""
        if not hasattr(self.sims[0], "fullpath"):  # not MuJoCo's
            return np.asarray(self.env.render())
        if self.renderer is None:
            self.open_renderer()
        frames = []
        for state in self.states() if states is None else states:
            self.data.qpos[:] = state
            mujoco.mj_kinematics(self.model, self.data)
            mujoco.mj_camlight(self.model, self.data)
            if self.view == "Humanoid-v5 plain":  # the camera follows the torso
                self.camera.lookat[:2] = self.data.xpos[1, :2]
            self.renderer.update_scene(self.data, self.camera)
            frames.append(self.renderer.render())
        return np.stack(frames)
    def open_renderer(self):
        looks, sim, size = self.cfg.looks, self.sims[0], self.image_size
        spec, self.view = mujoco.MjSpec.from_file(sim.fullpath), f"{self.cfg.env_id} {looks}"
        dress(spec, looks, size)
        self.model, self.camera = spec.compile(), mujoco.MjvCamera()
        self.data = mujoco.MjData(self.model)
        camera = CAMERAS.get(self.view) or sim.mujoco_renderer.default_cam_config or {}
        for name, value in camera.items():
            setattr(self.camera, name, value)
        try:
            self.renderer = mujoco.Renderer(self.model, size, size)
        except Exception as error:
            raise UsageError("no OpenGL: unset MUJOCO_GL, apt install libegl1 libgl1-mesa-dri, in "
                             f"containers NVIDIA_DRIVER_CAPABILITIES=all ({error})")

# --- Algorithm 1
@dataclass
class Config:
    """The settings of a run: config.json, and the command line's flags."""
    prompt: str = ""  # the goal in words
    task: str = ""  # the goal by name, with its criterion
    baseline: str = ""  # what the picture shows anyway
    alpha: float = 0.0  # of Eq. 3, 0 to 1
    env_id: str = ""  # any Gymnasium task that draws itself
    clip: str = "ViT-bigG-14/laion2b_s39b_b160k"  # open_clip architecture/tag, or a folder
    looks: str = "paper"  # paper, plain or original (Gymnasium's), of MuJoCo tasks
    reward: str = "clip"  # clip, or truth: the task's criterion, without pictures
    seed: int = 0  # of all randomness
    steps: int = 10_000_000  # transitions, in whole iterations
    num_envs: int = 32  # simulations; an iteration is one episode of each
    episode_length: int = 100  # environment steps
    test_every: int = 40  # iterations; the policy with the best test is kept
    updates: int = 400  # per iteration; many: pictures cost (paper: 100)
    batch_size: int = 256  # transitions per update (paper: 512)
    learning_starts: int = 6400  # transitions before updates (paper: 50,000)
    replay: int = 1_000_000  # transitions kept
    gamma: float = 0.97  # discount per step (paper: 0.95)
    tau: float = 0.005  # of the target critic, per update
    actor_tau: float = 0.002  # of the averaged actor, which acts (paper: 1)
    lr: float = 3e-4  # of actor and temperature (paper: 6e-4)
    critic_lr: float = 1e-3  # of the critic (paper: 6e-4)
    lr_end: float = 0.1  # share of the actor's lr, critic_lr, actor_tau at the end (paper: 1)
    hidden: int = 256  # units per layer
    temperature: float = 0.05  # the first entropy coefficient (paper: 1)
    layer_norm: int = 1  # in the critic (paper: 0)
    reward_std: float = 0.3  # of scaled rewards; obs get 1 (paper: 0, both as they are)
    def __post_init__(self):
        """Fill in from the task, named by --task or by its prompt."""
        names = {fold(task.prompt): name for name, task in TASKS.items()}
        self.task = self.task or names.get(fold(self.prompt), "")
        if self.task not in (*TASKS, ""):
            raise UsageError(f"--task is one of {', '.join(TASKS)}")
        task = TASKS.get(self.task, Task(self.prompt))
        if self.env_id not in ("", task.env_id):  # another world: no criterion
            self.task = ""
            if self.alpha > 0:  # and no baseline; alpha = 0 uses none
                task = task._replace(baseline="")
        self.prompt = self.prompt or task.prompt
        self.env_id = self.env_id or task.env_id
        self.baseline = self.baseline or task.baseline
        if not fold(self.prompt) or not fold(self.baseline):
            raise UsageError(f"give --prompt and --baseline, or --task: {', '.join(TASKS)}")
        rewards = ("clip", "truth") if self.task else ("clip",)
        if self.looks not in ("paper", "plain", "original") or self.reward not in rewards:
            raise UsageError("--looks paper, plain, original; --reward clip or, with --task, truth")
        for name, value in asdict(self).items():
            most = 1 if name in ("alpha", "gamma", "tau", "actor_tau", "lr_end") else 1e10
            least = 0 if name in ("alpha", "seed", "layer_norm", "reward_std") else 1e-10
            if not isinstance(value, str) and not least <= value <= most:
                raise UsageError(f"--{name.replace('_', '-')} {value}: from {least} to {most:g}")

PAPER = dict(updates=100, batch_size=512, learning_starts=50_000, gamma=0.95, actor_tau=1.0,
             lr=6e-4, critic_lr=6e-4, lr_end=1.0, temperature=1.0, layer_norm=0, reward_std=0.0)
LESSON = dict(looks="plain", steps=192_000, test_every=2)
CARTPOLE = dict(steps=48_000, num_envs=16, episode_length=200, updates=300, learning_starts=3200,
                gamma=0.99, tau=0.01, actor_tau=0.01, lr=1e-3, hidden=128)

class Clock(Counter):
    """Seconds of each part; lap(part) adds those since the lap before."""
    def lap(self, part):
        before, self.now = self.now, time.perf_counter()
        self[part] += self.now - before

def rollout(world, policy, seed, label, clock):
    """An episode of each simulation: obs, action, reward, next_obs and goal, (T, N, ...) each.
    Random actions without policy; reward = label(pictures of next_obs), else the goal."""
    steps, (obs, _), space = [], world.reset(seed=seed), world.action_space
    space.seed(seed)
    clock.now = time.perf_counter()
    for _ in tqdm(range(world.cfg.episode_length), "rollout", leave=False, delay=3):
        action = policy(obs).reshape(space.shape) if policy else space.sample()
        clock.lap("SAC")
        next_obs = world.step(action)[0]
        goal = reward = world.judge()
        clock.lap("physics")
        if label:
            frames = world.render()  # of next_obs, (N, H, W, 3)
            clock.lap("rendering")
            reward = label(frames)  # (N,), not awaited: a GPU encodes while the CPU simulates
            clock.lap("CLIP")
        steps.append((obs, action, torch.as_tensor(reward), next_obs, goal))
        obs = next_obs
    obs, action, reward, next_obs, goal = zip(*steps)
    reward = torch.stack(reward).cpu()  # waits for the GPU
    clock.lap("CLIP")
    return [np.stack(x) for x in (obs, action, reward, next_obs, goal)]

def train(cfg, folder, label, world, agent, replay):
    """Algorithm 1, from last.pt on if there is one."""
    step, best, rows = resume(folder, agent, replay) if RANK == 0 else (0, 0, [])
    start = time.time() - (rows[-1][1] if rows else 0)  # rows: step, seconds, ...
    starts, clock, saved = min(cfg.learning_starts, cfg.steps // 2), Clock(), 0
    metrics = dict.fromkeys("q loss_q loss_pi entropy temperature".split(), math.nan)
    policy = copy.deepcopy(agent.policy).cpu()  # there it never waits for a GPU's pictures
    bar = tqdm(total=cfg.steps, initial=step, unit="step", disable=RANK > 0)
    while step < cfg.steps:
        seed = int(np.random.SeedSequence((cfg.seed, step, RANK)).generate_state(1)[0])
        torch.manual_seed(seed)  # so --resume repeats it to the bit
        # Roll the policy out, with a picture of every state reached, and label these with CLIP.
        act = policy.act if step >= starts else None
        obs, action, reward, next_obs, goal = rollout(world, act, seed, label, clock)
        if step == 0 and cfg.reward_std > 0:
            agent.fit_scales(obs, reward, cfg.reward_std)
        # Move the labelled transitions to the replay buffer. A time limit is no true end.
        replay.add(obs, action, reward, next_obs, terminated=np.zeros(reward.shape))
        step += cfg.num_envs * cfg.episode_length
        # Update actor, critic and temperature on minibatches.
        share = 1 + (cfg.lr_end - 1) * min(1, step / cfg.steps)  # falls from 1 to lr_end
        agent.set_lr(cfg.lr * share, cfg.critic_lr * share)
        agent.actor_tau = cfg.actor_tau * share
        for _ in range(cfg.updates if step >= starts else 0):
            metrics = agent.update(replay.sample(cfg.batch_size // PROCESSES))
        policy.load_state_dict(agent.policy.state_dict())
        clock.lap("SAC")
        if RANK > 0:
            continue
        test = math.nan
        if (len(rows) + 1) % cfg.test_every == 0 or step >= cfg.steps:
            act = partial(policy.act, deterministic=True)
            test = float(rollout(world, act, seed, label, clock)[2].sum(0).mean())
        row = {"step": step, "seconds": time.time() - start, "return": reward.sum(0).mean(),
               "success": (goal.mean(0) >= 0.5).mean(), "test": test, **metrics}
        rows.append([float(x) for x in row.values()])
        if test > best:  # the policy with the best test is kept, as in the paper
            best = test
            save(policy.state_dict(), folder / "best.pt")
        if PROCESSES == 1 and (time.time() > saved + 120 or step >= cfg.steps):
            used = [x[:replay.size].to("cpu", copy=True) for x in replay.data]  # a view saves all
            save({"agent": agent.state_dict(), "replay": used, "next": replay.next, "step": step,
                  "best": best, "rows": rows}, folder / "last.pt")
            saved = time.time()
        np.savetxt(folder / "progress.csv", rows, "%.6g", ",", header=",".join(row), comments="")
        shares = " ".join(f"{part} {s / clock.total():.0%}" for part, s in clock.items())
        bar.set_postfix_str(f"return {row['return']:.2f}, success {row['success']:.0%}, {shares}")
        bar.update(step - bar.n)
    if RANK == 0:
        finish(cfg, folder, label, policy, start)

def finish(cfg, folder, label, policy, start):
    """Test the best policy and film it. Success: the goal holds in half of an episode's steps."""
    policy.load_state_dict(torch.load(folder / "best.pt", weights_only=True))
    act = partial(policy.act, deterministic=True)
    n = min(100, math.ceil(cfg.steps / cfg.episode_length))
    world, seed = World(cfg, n, getattr(label, "image_size", 64)), cfg.seed + 1_000_000
    _, _, reward, _, goal = rollout(world, act, seed, label, Clock())
    if label:
        film = rollout(World(cfg, 1, 192), act, seed, torch.from_numpy, Clock())[2][:, 0]  # images
        first, *others = map(Image.fromarray, film)
        first.save(folder / "film.gif", save_all=True, append_images=others, duration=30, loop=0)
        Image.fromarray(np.concatenate(film[::1 + len(film) // 11], 1)).save(folder / "film.png")
    success = f"success rate {(goal.mean(0) >= 0.5).mean():.0%}" if cfg.task else "no criterion"
    name, minutes = "CLIP" if label else "true", (time.time() - start) / 60
    print(f"best policy, {n} deterministic episodes: {name} return {reward.sum(0).mean():.2f}, "
          f"{success}, {minutes:.1f} minutes; see {folder}", flush=True)

def build(cfg):
    """label (or None), world, agent, replay; nothing is written yet."""
    torch.manual_seed(cfg.seed)  # all processes begin with the same networks
    sac.use_onednn()
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    args = cfg.prompt, cfg.baseline, cfg.alpha, cfg.clip, device
    label = CLIPReward(*args) if cfg.reward == "clip" else None  # another reward model goes here
    world = World(cfg, cfg.num_envs // PROCESSES, getattr(label, "image_size", 64))
    obs, _ = world.reset()
    if label:
        label(world.render())  # what is missing shows now
    sizes = obs.shape[1], math.prod(world.single_action_space.shape)
    agent = sac.SAC(*sizes, gamma=cfg.gamma, tau=cfg.tau, lr=cfg.lr, device=device,
                    hidden=cfg.hidden, temperature=cfg.temperature, layer_norm=cfg.layer_norm)
    n = cfg.num_envs * cfg.episode_length
    print(f"{cfg.num_envs} x {cfg.env_id}, {world.image_size} px, {cfg.clip} on {device}; "
          f"{n} transitions an iteration, {n / cfg.updates} per update", flush=True)
    return label, world, agent, sac.Replay(max(cfg.replay, n) // PROCESSES, *sizes, device)

def resume(folder, agent, replay):
    """step, best and rows of last.pt, if the run has begun; nothing in it is executed."""
    if not (folder / "progress.csv").exists():
        return 0, -math.inf, []
    try:
        saved = torch.load(folder / "last.pt", weights_only=True, map_location="cpu")
        agent.load_state_dict(saved["agent"])
        replay.add(*saved["replay"])
        replay.next = saved["next"]
        return saved["step"], saved["best"], saved["rows"]
    except Exception as error:
        raise UsageError(f"{folder}/last.pt is damaged or another run's ({error})")

def save(content, path):
    """The file is the old one or the new one, whole, at any moment."""
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)

# --- the command line
def fold(text):
    """Prompts that differ only in case and spaces are one."""
    return " ".join(text.lower().split())

def configure(paper=False, **asked):
    """What is asked for; else what suits task, picture model and machine."""
    clip = asked.setdefault("clip", Config.clip if torch.cuda.is_available() else "tiny_clip")
    settings = LESSON if "tiny_clip" in Path(clip).parts else {}
    if settings:
        print("lesson: tiny_clip knows humanoid, pole and mountain car only (GPUs: "
              f"{torch.cuda.device_count()}); real: --clip {Config.clip}")
    if Config(**asked).env_id == TASKS["cartpole"].env_id:
        settings = settings | ({"episode_length": 200} if paper else CARTPOLE)
    return Config(**settings | (PAPER if paper else {}) | asked)

def new_folder(cfg, out):
    """runs/<prompt>, then -2, -3, or `out`, which must not exist; with config.json."""
    slug, number = re.sub(r"\W+", "-", fold(cfg.prompt))[:60], 1
    folder = Path(out or f"runs/{slug}")
    while folder.exists():
        if out:
            raise UsageError(f"--out {out} exists and is not overwritten: name another")
        number += 1
        folder = Path(f"runs/{slug}-{number}")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(asdict(cfg), indent=2) + "\n")
    return folder

def read_config(folder):
    """Of a run."""
    try:
        return Config(**json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{folder} is not a run's folder ({error})")

def parse(argv):
    """One flag for each setting, with its comment as help."""
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS)
    for field in fields(Config):
        parser.add_argument("--" + field.name.replace("_", "-"), type=field.type,
                            help=f"{comments[field.name]} (default: {field.default})")
    parser.add_argument("--paper", action="store_true", help="learn as in appendix C.2")
    parser.add_argument("--out", help="the run's folder (default: runs/<prompt>)")
    parser.add_argument("--resume", help="a run's folder")
    return vars(parser.parse_args(argv))

def main(argv=None):
    """Train."""
    asked = parse(argv)
    folder, out = asked.pop("resume", None), asked.pop("out", None)
    if folder and (asked or out or PROCESSES > 1):
        raise UsageError("--resume goes without other flags and without torchrun")
    cfg = read_config(Path(folder)) if folder else configure(**asked)
    if PROCESSES > 1:
        gpu, gpus = int(os.environ.get("LOCAL_RANK", RANK)), torch.cuda.device_count()
        if 0 < gpus <= gpu or cfg.num_envs % PROCESSES or cfg.batch_size % PROCESSES:
            raise UsageError("processes: at most one a GPU; --num-envs, --batch-size: multiples")
        if gpus:
            torch.cuda.set_device(gpu)
        dist.init_process_group(timeout=datetime.timedelta(days=1))
    try:
        parts = build(cfg)
        if RANK == 0:
            folder = Path(folder) if folder else new_folder(cfg, out)
        train(cfg, folder, *parts)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in repr(error).lower():
            raise
        raise UsageError(f"take a smaller --clip or --replay ({error})")
    except KeyboardInterrupt:
        if PROCESSES == 1 and folder:
            print(f"stopped; to go on: python vlmrm.py --resume {folder}", file=sys.stderr)
        raise
    if PROCESSES > 1:
        dist.barrier()  # one that leaves early would cut off the others
        dist.destroy_process_group()

if __name__ == "__main__":
    sac.run(main)
