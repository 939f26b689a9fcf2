"""Tests against oracles: other libraries, closed forms, Gymnasium's own environments, and short
real runs. Run: pytest"""
import copy, csv, json, os, pickle, random, re, shlex, shutil, signal, subprocess, sys, time
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from textwrap import dedent

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: CLIP in float32, and the lesson's settings
os.environ.setdefault("OMP_NUM_THREADS", "1")  # these networks are too small for more
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
import gymnasium as gym
import mujoco
import numpy as np
import open_clip
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from PIL import Image
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import sac
import vlmrm
from sac import UsageError
from vlmrm import TINY_CLIP, CLIPReward, World, goal_baseline_reward

HERE = Path(__file__).resolve().parent
README = (HERE / "README.md").read_text()
KNEELING, CARTPOLE = vlmrm.TASKS["kneeling"], vlmrm.TASKS["cartpole"]
kneeling = CLIPReward(KNEELING.prompt)
upright = CLIPReward(CARTPOLE.prompt, CARTPOLE.baseline)
SHORT = ("--steps 80 --num-envs 2 --episode-length 10 --updates 2 --batch-size 16 "
         "--learning-starts 20").split()

class Toy(gym.Env):
    """A bar moves by the mean action. At `end` it truncates itself, and may refuse to go on."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    def __init__(self, render_mode=None, action=gym.spaces.Box(-2, 3), obs=(2,), end=10 ** 9,
                 refuses=False, draws=True, nan_at=None):  # width is unknown to it
        self.render_mode, self.end, self.refuses, self.nan_at = render_mode, end, refuses, nan_at
        self.draws, self.action_space = draws, action
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, obs)
    def observe(self):
        x = np.nan if self.time == self.nan_at else self.x
        return np.full(self.observation_space.shape, x, np.float32)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.time = self.np_random.uniform(-0.1, 0.1), 0
        return self.observe(), {}
    def step(self, action):
        assert self.action_space.contains(action), action
        if self.refuses and self.time >= self.end:
            raise RuntimeError("the episode is over")
        self.time, self.x, self.action = self.time + 1, self.x + 0.1 * np.mean(action), action
        return self.observe(), 0.0, False, self.time >= self.end, {}
    def render(self):
        frame = np.zeros((64, 64, 3), np.uint8)
        frame[:, int(32 + 8 * self.x) % 64] = 255
        return frame if self.draws else None

for toy, arguments in {
        "Endless": {}, "Scalar": dict(action=gym.spaces.Box(-2, 3, ())),
        "Matrix": dict(action=gym.spaces.Box(-2, 3, (2, 2))),
        "Row": dict(action=gym.spaces.Box(-2, 3, (1, 3))),
        "Integer": dict(action=gym.spaces.Box(-100, 100, (1,), np.int8)),
        "Several": dict(action=gym.spaces.MultiDiscrete([2, 3])), "Image": dict(obs=(8, 8, 3)),
        "Truncates": dict(end=3), "Refuses": dict(end=3, refuses=True),
        "Blank": dict(draws=False), "NaN": dict(nan_at=4)}.items():
    gym.register(f"{toy}-v0", Toy, kwargs=arguments)
gym.register("Undrawn-v0", lambda: Toy())  # a constructor without render_mode

def configure(task="", **asked):
    return vlmrm.configure(task=task, clip="tiny_clip", **asked)

def toy_world(toy, num_envs=1):
    world = World(configure(env_id=f"{toy}-v0", prompt="a cart"), num_envs)
    world.reset(seed=0)
    return world

def progress(folder):
    path = Path(folder) / "progress.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []

def spawn(*argv, cwd, stderr=subprocess.PIPE, **env):
    """A process that heeds Ctrl-C, to which a suite in the background is deaf."""
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=cwd, env=os.environ | env,
                            stdout=subprocess.PIPE, stderr=stderr, text=True, preexec_fn=heed)

def refusal_of(main, capsys):
    """The one line with which it ends."""
    with pytest.raises(SystemExit) as stop:
        sac.run(main)
    text = capsys.readouterr().err
    line, = [line for line in text.splitlines() if "error: " in line]
    assert stop.value.code == 2 and "Traceback" not in text
    return line

# --- the reward

def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)

@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 0.9, 1])
def test_reward_equals_the_matrix_form_of_eq_3(alpha):
    torch.manual_seed(0)
    s, g, b = unit(50, 32), unit(32), unit(32)
    d = (g - b)[:, None]
    proj = g + (s - g) @ (d @ d.T / (d.T @ d))  # onto the affine line through b and g
    expected = 1 - 0.5 * (alpha * proj + (1 - alpha) * s - g).square().sum(-1)
    got = goal_baseline_reward(s.float(), g.float(), b.float(), alpha)
    assert_close(got.double(), expected, atol=1e-5, rtol=0)
    for baseline in (b, g):  # which alpha = 0 ignores
        assert_close(goal_baseline_reward(s, g, baseline, 0.0), torch.cosine_similarity(s, g[None]))

def random_pictures(n, height, width):
    """Noise, in which missing antialiasing shows, and a sharp edge: uint8 (n, height, width, 3)."""
    frames = np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)
    frames[:, height // 3:height // 2, width // 4:width // 2] = 255 * (np.arange(3) == 1)
    return frames

@pytest.mark.parametrize("config", [
    dict(resize_mode="shortest"),
    dict(resize_mode="squash", interpolation="bilinear", mean=[0.5] * 3, std=[0.5] * 3),
    dict(resize_mode="longest", mean=[0.1, 0.2, 0.3], std=[0.3, 0.2, 0.1])])
def test_preprocessing_equals_open_clips_own(tmp_path, config):
    folder = shutil.copytree(TINY_CLIP, tmp_path / "clip")
    written = json.loads((folder / "open_clip_config.json").read_text())
    written["preprocess_cfg"] |= config
    (folder / "open_clip_config.json").write_text(json.dumps(written))
    reward = CLIPReward(KNEELING.prompt, clip=folder)
    transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")[1]
    for size in ((64, 64), (224, 224), (48, 48), (120, 161)):
        frames = random_pictures(3, *size)
        theirs = torch.stack([transform(Image.fromarray(frame)) for frame in frames])
        assert_close(reward.preprocess(torch.from_numpy(frames)), theirs)

def test_clip_reward_equals_open_clip_step_by_step():
    prompts, baseline = [KNEELING.prompt, "a robot on both knees"], KNEELING.baseline
    reward = CLIPReward(prompts, baseline, alpha=0.3)
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{TINY_CLIP}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{TINY_CLIP}")
    frames = random_pictures(300, 64, 64)  # more than are encoded at once
    with torch.no_grad():
        pictures = torch.stack([transform(Image.fromarray(frame)) for frame in frames])
        s = model.eval().encode_image(pictures, normalize=True)
        g = model.encode_text(tokenizer(prompts), normalize=True).mean(0)
        b = model.encode_text(tokenizer([baseline]), normalize=True)[0]
    got = reward(frames)
    assert got.shape == (300,) and got.dtype == torch.float32 and not got.requires_grad
    assert_close(reward.embed(frames), s, atol=1e-5, rtol=0)
    assert_close(got, goal_baseline_reward(s, g, b, 0.3), atol=1e-5, rtol=0)
    for view in (frames[:9, ::-1], frames[:9, :, ::-1], frames[:9:2]):  # strides of all kinds
        assert torch.equal(reward(view), reward(view.copy()))

def test_only_the_image_tower_stays_with_nothing_to_train_in_eval_mode_for_good():
    torch.manual_seed(0)
    reward = CLIPReward("a dog", clip="RN50-quickgelu/random")  # batch normalisation, no weights
    frames = random_pictures(2, reward.image_size, 224)
    expected = reward(frames)
    torch.nn.Sequential(reward).train()
    assert torch.equal(reward(frames), expected) and expected.isfinite().all()
    assert {name.split(".")[0] for name, _ in reward.named_parameters()} == {"visual"}
    assert not any(p.requires_grad for p in reward.parameters())

@pytest.mark.parametrize("shape, dtype", [
    ((2, 64, 64, 3), "float32"), ((2, 64, 64, 3), "bool"), ((2, 64, 64, 3), "int64"),
    ((2, 64, 64, 1), "uint8"), ((2, 64, 64), "uint8"), ((64, 64, 3), "uint8"),
    ((2, 64, 64, 4), "uint8"), ((2, 3, 64, 64), "uint8"), ((2,), "object")])
def test_wrong_pictures_are_refused_in_the_same_line(shape, dtype):
    line = re.escape(f"pictures must be uint8 (N, H, W, 3), 0 to 255, not {dtype} {shape}")
    with pytest.raises(UsageError, match=f"^{line}$"):
        kneeling(np.zeros(shape, dtype))

def test_a_reward_can_be_pickled_copied_and_loaded():
    frames = random_pictures(3, 64, 64)
    expected, other = kneeling(frames), copy.deepcopy(upright)
    assert not torch.equal(other(frames), expected)
    other.load_state_dict(kneeling.state_dict())
    for same in (pickle.loads(pickle.dumps(kneeling)), copy.deepcopy(kneeling), other):
        assert torch.equal(same(frames), expected)

def test_words_and_worlds_that_the_model_never_saw_are_named(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vlmrm.build(configure("kneeling"))
    assert capsys.readouterr().err == ""
    vlmrm.build(configure(env_id="Endless-v0", prompt="a humanoid robot juggling flamingos"))
    words, worlds = capsys.readouterr().err.splitlines()
    assert "never saw flamingos, juggling, only" in words
    assert "never saw Endless-v0, only Humanoid-v5" in worlds

@pytest.mark.parametrize("clip, message", [
    ("ViT-bigG-41/laion2b", "near: ViT-bigG-14/"), ("RN50-quickgelu/", "near: RN50-quickgelu/"),
    ("ViT-B-32/laion2b_s34b_b79k", "download.*Offline: tiny_clip"),
    ("ViT-B-16-SigLIP2/webli", "transformers")])
def test_a_model_that_cannot_be_had_is_one_line_that_says_why(clip, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # spares 45 s of retries
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if not installed
    with pytest.raises(UsageError, match=message):
        CLIPReward("a dog", clip=clip)
    assert torch.get_default_dtype() == torch.float32

def make(n=0, env_id=CARTPOLE.env_id, **asked):
    asked = dict(render_mode="rgb_array", width=80, height=80) | asked
    return gym.make_vec(env_id, n, "sync", **asked) if n else gym.make(env_id, **asked)

def test_any_environment_gets_the_reward_of_its_picture():
    env, envs = vlmrm.WithCLIPReward(make(), upright), vlmrm.WithCLIPRewards(make(2), upright)
    env.reset(seed=0)
    envs.reset(seed=0)
    for _ in range(3):
        reward, rewards = env.step(np.array([1.0]))[1], envs.step(np.array([[1.0], [-1.0]]))[1]
    expected = upright(np.stack(envs.render())).numpy()
    assert isinstance(reward, float) and rewards.dtype == np.float32 and rewards.shape == (2,)
    assert [reward, *rewards] == pytest.approx([expected[0], *expected], abs=1e-5)
    assert abs(rewards[0] - rewards[1]) > 1e-4

def test_a_wrapped_environment_is_made_again_and_checked_by_gymnasium():
    env = vlmrm.WithCLIPReward(make(), upright)
    again = gym.make(env.spec)
    env.reset(seed=3)
    again.reset(seed=3)
    assert again.step(np.array([1.0]))[1] == env.step(np.array([1.0]))[1]
    check_env(env, skip_render_check=True)

SAME_STEP = dict(vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP})

@pytest.mark.parametrize("n, asked", [(0, dict(render_mode=None)), (2, dict(render_mode=None)),
                                      (0, dict(render_mode="rgb_array_list")), (2, SAME_STEP)])
def test_environments_that_do_not_draw_each_step_are_refused_when_wrapped(n, asked):
    wrapper = vlmrm.WithCLIPRewards if n else vlmrm.WithCLIPReward
    with pytest.raises(UsageError, match='InvertedPendulum.*render_mode="rgb_array"'):
        wrapper(make(n, **asked), upright)

def test_the_readmes_example_with_stable_baselines3_runs():
    pytest.importorskip("stable_baselines3")
    example = re.search(r"((?:    .*\n|\n)*    .*\.learn\(50_000\)\n)", README).group(1)
    assert "WithCLIPReward" in example
    exec(dedent(example).replace("50_000", "110"), {})

# --- the worlds, their pictures and criteria

FLAGS = dict(terminate_when_unhealthy=False, include_cinert_in_observation=False,
             include_cvel_in_observation=False, include_qfrc_actuator_in_observation=False,
             include_cfrc_ext_in_observation=False)
WORLDS = {"Humanoid-v5": FLAGS | dict(reset_noise_scale=0.02), "Hopper-v5": {},
          "InvertedPendulum-v5": dict(reset_noise_scale=0.05)}

@pytest.mark.parametrize("env_id", WORLDS)
def test_world_equals_gymnasium_bit_for_bit_and_pictures_leave_it_alone(env_id):
    world = World(configure(env_id=env_id, prompt="a robot"), 2, 32)
    theirs = [gym.make(env_id, **WORLDS[env_id]).unwrapped for _ in range(2)]
    rng = np.random.default_rng(0)
    for seed in (17, 0):
        obs = world.reset(seed=seed)[0]
        expected = [env.reset(seed=seed + i)[0] for i, env in enumerate(theirs)]
        for _ in range(60):
            np.testing.assert_array_equal(obs, expected)
            action = rng.uniform(-1, 1, (2, *theirs[0].action_space.shape))
            action = sac.to_env(world.single_action_space, action)
            obs, reward, terminated, truncated, _ = world.step(action)
            expected = [env.step(a)[0] for env, a in zip(theirs, action)]
            world.render()
            world.judge()
            assert not (reward.any() or terminated.any() or truncated.any())
        np.testing.assert_array_equal(world.states(), [env.data.qpos for env in theirs])

def posture(model, height, pitch=0.0, **degrees):
    """qpos of a humanoid whose limbs are alike."""
    qpos = model.qpos0.copy()
    qpos[2:7] = height, np.cos(pitch / 2), 0, np.sin(pitch / 2), 0
    for joint, angle in degrees.items():
        for side in ("right", "left"):
            qpos[model.joint(f"{side}_{joint}").qposadr[0]] = np.radians(angle)
    return qpos

def humanoid(looks="plain", size=64):
    """A world; qpos of kneeling, kneeling in the air, standing, standing in the air, lying."""
    world = World(configure("kneeling", looks=looks), 1, size)
    world.reset(seed=0)
    knees, straight = dict(hip_y=-10, knee=-107), dict(hip_y=-5, knee=-12)
    poses = [(0.84, 0, knees), (1.2, 0, knees), (1.27, 0, straight), (1.5, 0, straight),
             (0.1, np.pi / 2, {})]
    model = world.sims[0].model
    return world, np.stack([posture(model, h, pitch, **how) for h, pitch, how in poses])

def test_criteria_on_states_by_hand():
    world, states = humanoid()
    goals = vlmrm.Humanoid(world.sims[0].model, states).goals()
    assert set(goals) == {*vlmrm.TASKS} - {"cartpole"}
    assert goals["kneeling"].tolist() == world.judge(states).tolist() == [1, 0, 0, 0, 0]
    assert goals["standing"].tolist() == [0, 0, 1, 0, 0]
    assert not any(goals[name].any() for name in ("lotus", "splits", "one-leg", "arms-crossed"))
    cart = World(configure("cartpole"), 1)
    assert cart.judge(np.array([[0, 0.0], [0, 0.5], [0.5, -0.199]])).tolist() == [1, 0, 1]

def test_pictures_and_judgement_are_of_the_new_state():
    world, _ = humanoid()
    for _ in range(25):
        world.step(world.action_space.sample())
    sim, frame = world.sims[0], world.render()[0]
    for model in (sim.model, world.model):
        data = mujoco.MjData(model)
        data.qpos[:] = sim.data.qpos
        mujoco.mj_forward(model, data)
        torso = data.body("torso")
        assert np.abs(sim.data.body("torso").xpos - torso.xpos).max() > 1e-9  # a step leaves these
        ours = vlmrm.Humanoid(sim.model, world.states()).torso[0, 0]
        np.testing.assert_allclose(ours, np.c_[torso.xmat.reshape(3, 3), torso.xpos], atol=1e-12)
    world.camera.lookat[:2] = torso.xpos[:2]
    world.renderer.update_scene(data, world.camera)
    np.testing.assert_array_equal(world.renderer.render(), frame)

@pytest.mark.parametrize("env_id", WORLDS)
def test_original_looks_are_gymnasiums(env_id):
    theirs, states, frames = make(env_id=env_id, width=96, height=96), [], []
    theirs.reset(seed=0)
    for steps in (0, 20):  # standing, and where the body has fallen to
        theirs.unwrapped.do_simulation(theirs.action_space.high, 5 * steps)
        states.append(theirs.unwrapped.data.qpos.copy())
        frames.append(theirs.render())
    world = World(configure(env_id=env_id, prompt="a robot", looks="original"), 1, 96)
    difference = np.abs(world.render(np.stack(states)).astype(int) - frames)
    assert difference.mean((1, 2, 3)).max() < 1 and np.std(frames) > 10  # edges are coarser

@pytest.mark.parametrize("looks", vlmrm.LOOKS)
def test_every_look_shows_the_robot_move(looks):
    world, states = humanoid(looks)
    frames = world.render(states).astype(int)
    assert frames.shape == (5, 64, 64, 3) and np.abs(frames[0] - frames[2]).mean() > 1

def test_discrete_actions_are_the_largest_of_continuous_ones():
    world = World(configure(env_id="CartPole-v1", prompt="a pole"), 1)
    theirs = gym.make("CartPole-v1")
    assert np.array_equal(world.reset(seed=0)[0][0], theirs.reset(seed=0)[0])
    for scores, action in (([0.1, 0.3], 1), ([0.9, -0.2], 0), ([-0.9, -0.2], 1)):
        assert np.array_equal(world.step(np.array([scores]))[0][0], theirs.step(action)[0])

@pytest.mark.parametrize("toy, times", [("Truncates", [1, 2, 3, 4]), ("Refuses", [1, 2, 3, 0, 1])])
def test_a_task_with_an_end_goes_on_or_begins_again(toy, times):
    world = toy_world(toy)
    for expected in times:
        _, _, terminated, truncated, _ = world.step(np.zeros((1, 1), np.float32))
        assert world.sims[0].time == expected and not terminated[0] and not truncated[0]
    with pytest.raises(AssertionError):  # an error that no end explains
        world.step(np.full((1, 1), 9, np.float32))

@pytest.mark.parametrize("toy", ["Scalar", "Matrix", "Row"])
def test_actions_of_any_shape_reach_the_environment_in_its_own_units(toy):
    world = toy_world(toy, 2)
    shape = world.single_action_space.shape
    action = np.linspace(-1, 1, int(2 * np.prod(shape)), dtype=np.float32).reshape(2, -1)
    world.step(sac.to_env(world.single_action_space, action))
    for sim, row in zip(world.sims, action):
        np.testing.assert_allclose(sim.action, (row * 2.5 + 0.5).reshape(shape), atol=1e-6)

def test_tiny_clip_is_small_half_precision_and_prefers_true_captions():
    from safetensors.torch import load_file
    weights = TINY_CLIP / "open_clip_model.safetensors"
    dtypes = {x.dtype for x in load_file(weights).values() if x.is_floating_point()}
    assert weights.stat().st_size <= 8e6 and dtypes == {torch.float16}
    world, states = humanoid()
    rewards = kneeling(world.render(states))
    assert rewards[0] > rewards[2] + 0.1
    cart = World(configure("cartpole"), 1)
    rewards = upright(cart.render(np.array([[0.2, 0.0], [0.2, 0.4], [0.2, -1.0]])))
    assert rewards[0] > rewards[1] > rewards[2] - 0.05

# --- SAC

def batch_of(n, **others):
    """n transitions of 3 observations and 2 actions; none is a true end."""
    batch = sac.Transitions(torch.randn(n, 3), torch.rand(n, 2), torch.randn(n), torch.randn(n, 3),
                            torch.zeros(n))
    return batch._replace(**others)

def test_logp_equals_torch_distributions_and_is_finite_where_tanh_saturates():
    torch.manual_seed(0)
    actor, obs = sac.Actor(5, 3).double(), torch.randn(200, 5, dtype=torch.float64)
    action, logp = actor.sample(obs)
    mean, log_std = actor(obs)
    oracle = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.TanhTransform())
    assert_close(logp, oracle.log_prob(action).sum(-1), atol=1e-6, rtol=1e-6)
    actor = sac.Actor(2, 1)
    actor.net[-1].bias.data.copy_(torch.tensor([30.0, -1.0]))  # mean 30: tanh is 1 in float32
    action, logp = actor.sample(torch.zeros(4, 2))
    assert (action == 1).all() and logp.isfinite().all() and (logp > 50).all()

def test_faster_products_keep_the_precision_of_float32():
    sac.use_onednn()
    x, y = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ y.double()  # bfloat16 would be off by 0.1
    assert_close((x @ y).double(), expected, atol=2e-4, rtol=0)

def test_q_target_by_hand_for_a_terminated_and_a_truncated_transition():
    torch.manual_seed(0)
    agent = sac.SAC(3, 2, gamma=0.9, temperature=0.5)
    batch = batch_of(2, reward=torch.tensor([1.0, 2.0]), terminated=torch.tensor([1.0, 0.0]))
    torch.manual_seed(5)
    target = agent.q_target(batch)
    torch.manual_seed(5)
    action, logp = agent.actor.sample(batch.next_obs)
    q = agent.target_critic(batch.next_obs, action)
    by_hand = 2.0 + 0.9 * (min(q[0, 1].item(), q[1, 1].item()) - 0.5 * logp[1].item())
    assert target.tolist() == pytest.approx([1.0, by_hand], rel=1e-5)

@pytest.mark.parametrize("layer_norm", [False, True])
def test_twin_critic_equals_two_separate_networks(layer_norm):
    critic, batch = sac.Critic(3, 2, hidden=8, layer_norm=layer_norm), batch_of(6)
    for k, q in enumerate(critic(batch.obs, batch.action)):
        x = torch.cat([batch.obs, batch.action], -1)
        for layer in critic.net:
            twin = isinstance(layer, sac.TwinLinear)
            x = x @ layer.weight[k] + layer.bias[k, 0] if twin else layer(x)
        assert_close(q, x[:, 0])

def test_update_moves_every_part_and_targets_by_tau():
    torch.manual_seed(0)
    agent, obs = sac.SAC(3, 2, tau=0.1, actor_tau=0.2), torch.randn(5, 3)
    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    metrics = agent.update(batch_of(32))
    assert all(not value.requires_grad and value.ndim == 0 for value in metrics.values())
    assert metrics["entropy"] > -2 and agent.log_temperature < 0  # it falls: entropy above target
    for name, p in agent.named_parameters():
        assert not torch.equal(before[name], p), name
        for slow, fast, tau in (("target_critic", "critic", 0.1), ("policy", "actor", 0.2)):
            if name.startswith(slow):
                p_fast = agent.get_parameter(name.replace(slow, fast))
                assert_close(p, before[name].lerp(p_fast, tau))
    mean = agent.policy(obs)[0].tanh().numpy()
    np.testing.assert_array_equal(agent.act(obs, deterministic=True), mean)

HALF = """
import sys, torch, sac
from torch import distributed as dist
torch.manual_seed(0)
batch = sac.Transitions(torch.randn(64, 3), torch.rand(64, 2), torch.randn(64),
                        torch.randn(64, 3), torch.ones(64))  # an end: nothing is random
alone, agent, rank = sac.SAC(3, 2, hidden=16), sac.SAC(3, 2, hidden=16), int(sys.argv[1])
agent.load_state_dict(alone.state_dict())
alone.update_critic(batch)
dist.init_process_group("gloo", f"file://{sys.argv[2]}/meeting", rank=rank, world_size=2)
half = sac.Transitions(*(x[32 * rank:32 * rank + 32] for x in batch))
agent.update_critic(half)
for p, q in zip(agent.critic.parameters(), alone.critic.parameters()):
    torch.testing.assert_close(p, q, atol=1e-6, rtol=0)
torch.manual_seed(rank)
agent.fit_scales(half, 0.3)
agent.update(half)
for x in (*agent.parameters(), *agent.buffers()):
    first = x.detach().clone()
    dist.broadcast(first, 0)
    assert torch.equal(x, first)
"""

def test_two_processes_with_half_a_minibatch_each_make_the_step_of_the_whole(tmp_path):
    both = [spawn("-c", HALF, rank, tmp_path, cwd=HERE) for rank in range(2)]
    for process in both:
        assert process.wait(timeout=120) == 0, process.stderr.read()

def test_scales_standardise_observations_and_rewards():
    torch.manual_seed(0)
    agent = sac.SAC(3, 2)
    batch = batch_of(500, obs=5 + 2 * torch.randn(500, 3), reward=0.3 + 0.03 * torch.randn(500),
                     terminated=torch.ones(500))
    agent.fit_scales(batch, 0.5)
    reward, scaled = agent.q_target(batch), (batch.obs - batch.obs.mean(0)) / batch.obs.std(0)
    assert abs(reward.mean()) < 1e-4 and reward.std().item() == pytest.approx(0.5, abs=0.01)
    x = torch.cat([scaled, batch.action], -1).expand(2, 500, 5)
    for actor, critic in ((agent.actor, agent.critic), (agent.policy, agent.target_critic)):
        assert_close(actor(batch.obs)[0], actor.net(scaled)[:, :2])
        assert_close(critic(batch.obs, batch.action), critic.net(x)[..., 0])

def test_replay_wraps_around_and_refuses_what_does_not_fit_or_is_not_finite():
    replay = sac.Replay(5, 1, 1)
    for start in (0, 3, 6):
        x = np.arange(start, start + 3, dtype=np.float64)
        replay.add(x[:, None], x[:, None] / 10, x, x[:, None] + 1, x * 0)
    assert sorted(replay.data.reward.tolist()) == [4, 5, 6, 7, 8] and replay.size == 5
    sample = replay.sample(100)
    assert_close(sample.obs[:, 0], sample.reward)
    assert_close(sample.next_obs[:, 0], sample.reward + 1)
    for n, value, message in ((6, 0, "replay of 5"), (2, np.nan, "reward is not finite")):
        with pytest.raises(ValueError, match=message):
            replay.add(*np.zeros((2, n, 1)), np.full(n, value), np.zeros((n, 1)), np.zeros(n))

def test_sac_learns_to_hold_the_pole_and_says_so_in_its_last_line(capsys, monkeypatch):
    monkeypatch.setattr(sac, "SAC", partial(sac.SAC, hidden=64))
    sac.main(["--env-id", "InvertedPendulum-v5", "--steps", "1200"])
    line = capsys.readouterr().out.splitlines()[-1]
    score = re.fullmatch(r"mean return over 20 deterministic episodes: ([\d.]+)", line).group(1)
    assert float(score) > 45  # untrained: below 25

def test_sac_ends_with_a_task_that_never_does(capsys, monkeypatch):
    monkeypatch.setattr(sac, "range", lambda n: range(min(n, 50)), raising=False)  # of 1000 steps
    sac.main(["--env-id", "Endless-v0", "--steps", "50"])
    assert capsys.readouterr().out.endswith("episodes: 0.0\n")

@pytest.mark.parametrize("argv, message", [
    (["--env-id", "CartPole-v1"], "Box"), (["--env-id", "Pendulumm-v1"], "Pendulum"),
    (["--env-id", "Integer-v0"], "float Box"), (["--steps", "0"], "--steps")])
def test_sac_command_line_bad_input(argv, message, capsys):
    assert message in refusal_of(partial(sac.main, argv), capsys)

# --- the whole program

@pytest.mark.parametrize("line, message", [
    ("--prompt ' '", "give --prompt"), ("--task flying", "kneeling, lotus"),
    ("--clip ViT-bigG-41/laion2b", "near: ViT-bigG-14"), ("--clip garbled", "does not load"),
    ("--clip weightless", "open_clip_model.safetensors"), ("--clip ''", "does not load"),
    ("--alpha 1.5", "--alpha 1.5"), ("--prompt 'A humanoid robot' --alpha 0.5", "must differ"),
    ("--env-id Hopper-v5 --alpha 0.5", "--baseline"), ("--num-envs -2", "--num-envs -2"),
    ("--lr nan", "--lr nan"), ("--seed -1", "--seed -1"), ("--steps many", "int value: 'many'"),
    ("--looks nice", "plain"), ("--reward truth", "--task"), ("--env-id Antt-v5", "Antt"),
    ("--out weightless", "not overwritten"), ("--out file/run", "Not a directory"),
    ("--env-id Integer-v0", "float Box"), ("--env-id Several-v0", "MultiDiscrete"),
    ("--env-id Image-v0", "vector observations"), ("--env-id Blank-v0", "pictures must be"),
    ("--env-id Undrawn-v0", "render_mode"), ("--resume missing", "is not a run's folder"),
    ("--resume garbled", "is not a run's folder"), ("--resume x --steps 5", "without other flags")])
def test_bad_input_is_one_line_and_exit_code_2(line, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY_CLIP, "garbled")
    Path("garbled/open_clip_model.safetensors").write_bytes(b"PK" * 100)
    Path("garbled/config.json").write_text("{{")
    Path("weightless").mkdir()
    shutil.copy(TINY_CLIP / "open_clip_config.json", "weightless")
    Path("file").touch()
    before = sorted(tmp_path.rglob("*"))
    prompt = [] if "--resume" in line else ["--prompt", "x"]
    assert message in refusal_of(partial(vlmrm.main, [*prompt, *shlex.split(line)]), capsys)
    assert sorted(tmp_path.rglob("*")) == before

@pytest.mark.parametrize("argv, expected", [
    ([], dict(clip="tiny_clip", looks="plain", steps=256_000, updates=400, task="kneeling")),
    (["--paper", "--lr", "0.1"], dict(
        clip="tiny_clip", looks="plain", updates=100, batch_size=512, gamma=0.95, lr=0.1,
        learning_starts=50_000, actor_tau=1.0, layer_norm=0, tau=0.005)),
    (["--paper", "--clip", "ViT-bigG-14/laion2b_s39b_b160k"], dict(
        looks="paper", steps=10_000_000, num_envs=32, reset_noise_scale=0.01, lr=6e-4)),
    (["--clip", str(TINY_CLIP), "--looks", "paper"], dict(looks="paper", steps=256_000)),
    (["--clip", "ViT-B-32/laion2b_s34b_b79k", "--steps", "5"], dict(looks="paper", steps=5)),
    (["--env-id", "InvertedPendulum-v5"], dict(num_envs=16, gamma=0.99, task="")),
    (["--prompt", "Pole vertically  upright on top of the CART\n"], dict(
        task="cartpole", env_id="InvertedPendulum-v5", baseline="pole and cart")),
    (["--task", "cartpole", "--paper"], dict(episode_length=200, gamma=0.95, num_envs=32))])
def test_settings_follow_from_the_flags(argv, expected):
    config = asdict(vlmrm.configure(**vlmrm.parse(["--prompt", KNEELING.prompt, *argv])))
    assert {name: config[name] for name in expected} == expected

def test_every_setting_is_a_flag_with_a_comment(capsys):
    with pytest.raises(SystemExit, match="0"):
        vlmrm.main(["--help"])
    text, names = capsys.readouterr().out, [field.name for field in fields(vlmrm.Config)]
    flags = [f"--{name.replace('_', '-')}" for name in names]
    assert all(re.search(rf"{flag} [A-Z_]+\s+\w", text) for flag in flags)
    assert list(vlmrm.parse([f"{flag}=1" for flag in flags])) == names

def test_training_end_to_end_and_runs_beside_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vlmrm.main(["--prompt", "a humanoid robot kneeling", *SHORT])
    vlmrm.main(["--task", "kneeling", "--reward", "truth", *SHORT])
    vlmrm.main(["--prompt", "A humanoid robot kneeling ", "--looks=paper", *SHORT])
    vlmrm.main(["--task", "cartpole", "--alpha", "0.5", *SHORT, "--out", "cart"])
    names = "runs/a-humanoid-robot-kneeling{0} runs/{0}-2 runs/{0}-3 cart"
    for folder in map(Path, names.format("a-humanoid-robot-kneeling").split()):
        rows = progress(folder)
        assert " ".join(rows[0]) == ("step seconds return success q loss_q loss_pi entropy "
                                     "temperature")
        assert [row["step"] for row in rows] == ["20", "40", "60", "80"]
        assert float(rows[-1]["loss_q"]) > 0 and 0 <= float(rows[-1]["success"]) <= 1
        config = json.loads((folder / "config.json").read_text())
        assert config == asdict(vlmrm.Config(**config)) and config["updates"] == 2
        assert (folder / "film.gif").exists() == (config["reward"] == "clip")
    assert Image.open("cart/film.png").size == (1920, 192)
    assert Image.open("cart/film.gif").n_frames == 10
    out = capsys.readouterr().out
    assert len(re.findall("best policy, 8 .* episodes: CLIP return .* success rate", out)) == 4
    assert "lesson" in out and "10.0 per update" in out and not list(tmp_path.rglob("*.tmp"))

def test_training_labels_with_the_picture_of_the_state_that_was_reached(tmp_path):
    vlmrm.main(["--task", "cartpole", *SHORT, "--out", str(tmp_path / "cart")])
    data = torch.load(tmp_path / "cart/last.pt", weights_only=True)["replay"]
    obs, action, reward, next_obs, terminated = data
    assert len(reward) == 80 and not terminated.any()
    for start in range(0, 80, 20):  # of an iteration: 10 steps of 2 simulations
        assert torch.equal(obs[start + 2:start + 20], next_obs[start:start + 18])
    frames = World(configure("cartpole"), 1, 64).render(next_obs[:, :2].double().numpy())
    # Stored observations are float32, so a few pixels may differ by one step of brightness.
    assert_close(reward, upright(frames), atol=2e-3, rtol=0)
    assert reward.std() > 0.02

def test_a_state_that_is_not_finite_ends_the_run_in_one_line(tmp_path, capsys):
    argv = ["--env-id", "NaN-v0", "--prompt", "a cart", *SHORT, "--out", str(tmp_path / "toy")]
    assert "next_obs is not finite" in refusal_of(partial(vlmrm.main, argv), capsys)
    assert not (tmp_path / "toy/last.pt").exists()

# --- interrupted, and resumed

TRUTH = ["--task", "cartpole", "--reward", "truth"]
LONGER = ("--num-envs 2 --episode-length 40 --steps 2000 --updates 40 --batch-size 64 --hidden 32 "
          "--learning-starts 160 --replay 900").split()

@pytest.fixture
def in_one_process(monkeypatch):
    """A run is locked until its process ends; here several go on with it in one."""
    monkeypatch.setattr("fcntl.flock", lambda *_: None)

def assert_same_run(a, b):
    """Equal to the bit, but for the seconds."""
    first, second = ([row | {"seconds": ""} for row in progress(x)] for x in (a, b))
    assert first == second and float(first[-1]["loss_q"]) > 0
    for name in ("last.pt", "best.pt"):
        x, y = (torch.load(Path(folder) / name, weights_only=True) for folder in (a, b))
        x.pop("rows", None), y.pop("rows", None)
        x, y = tree_leaves(x), tree_leaves(y)
        assert len(x) == len(y) > 6
        assert all(torch.equal(p, q) if torch.is_tensor(p) else p == q for p, q in zip(x, y))

def test_killed_or_stopped_at_any_moment_it_ends_as_if_it_were_not(tmp_path, in_one_process):
    whole, killed, argv = tmp_path / "whole", tmp_path / "killed", [*TRUTH, *LONGER, "--out"]
    vlmrm.main([*argv, str(whole)])
    argv += [killed]
    for how in (signal.SIGKILL, signal.SIGTERM, "close", signal.SIGKILL):
        rows = len(progress(killed))
        stderr = subprocess.STDOUT if how == "close" else subprocess.PIPE
        process = spawn(HERE / "vlmrm.py", *argv, cwd=tmp_path, stderr=stderr)
        process.stdout.readline()
        while len(progress(killed)) <= rows:  # then it has saved
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        assert process.poll() is None, "it had ended before it could be interrupted"
        process.stdout.close() if how == "close" else process.send_signal(how)
        assert process.wait(timeout=5) == (-9 if how == signal.SIGKILL else 130)
        argv = ["--resume", killed]
    vlmrm.main(["--resume", str(killed)])
    assert_same_run(whole, killed)

@pytest.mark.parametrize("moment, world", [(1, TRUTH), (35, TRUTH), (65, TRUTH), (
    25, ["--env-id", "Truncates-v0", "--prompt", "a cart"])])
def test_interrupted_between_any_two_updates_it_goes_on_to_the_bit(
        moment, world, tmp_path, monkeypatch, in_one_process):
    whole, stopped = str(tmp_path / "whole"), str(tmp_path / "stopped")
    argv = [*world, *SHORT, "--steps", "200", "--updates", "10", "--replay", "70", "--out"]
    vlmrm.main([*argv, whole])
    update, count = sac.SAC.update, 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count in (moment, moment + 3):
            raise KeyboardInterrupt
        return update(*args)
    monkeypatch.setattr(sac.SAC, "update", interrupted)
    for start in ([*argv, stopped], ["--resume", stopped]):  # in the iteration that it resumed
        with pytest.raises(KeyboardInterrupt):
            vlmrm.main(start)
    vlmrm.main(["--resume", stopped])
    assert_same_run(whole, stopped)

def test_ctrl_c_says_how_to_go_on_and_a_running_run_is_not_resumed_beside_itself(tmp_path):
    folder = tmp_path / "runs/pole-vertically-upright-on-top-of-the-cart"
    argv = [*TRUTH, *LONGER, "--updates", "100000"]
    process = spawn(HERE / "vlmrm.py", *argv, cwd=tmp_path)
    while not progress(folder):  # after the next rollout it learns for long
        assert process.poll() is None
        time.sleep(0.05)
    with pytest.raises(UsageError, match="another process writes to"):
        vlmrm.main(["--resume", str(folder)])
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=5)[1]
    assert process.returncode == 130 and "Traceback" not in err
    assert f"python vlmrm.py --resume runs/{folder.name}\n" in err and (folder / "last.pt").exists()

class Malice:
    def __reduce__(self):
        return Path.touch, (Path("hacked"),)

def test_files_of_others_are_refused_and_run_nothing(tmp_path, monkeypatch, in_one_process):
    monkeypatch.chdir(tmp_path)
    vlmrm.main([*TRUTH, *SHORT, "--out", "run"])
    last = Path("run/last.pt")
    whole, saved = last.read_bytes(), torch.load(last, weights_only=True)
    others = sac.SAC(4, 1, hidden=16).state_dict()
    for content in (b"", b"PK", whole[:2000], [1], {"step": 3}, saved | {"agent": Malice()},
                    saved | {"agent": others}, saved | {"replay": saved["replay"][:4]}):
        if isinstance(content, bytes):
            last.write_bytes(content)
        else:
            torch.save(content, last)
        with pytest.raises(UsageError, match="last.pt is damaged or another run's"):
            vlmrm.main(["--resume", "run"])
    assert not Path("hacked").exists()

@pytest.mark.parametrize("hide, gl", [("sys.modules['OpenGL'] = None", "egl"), ("", "foo")])
def test_without_opengl_it_imports_and_says_what_to_install(hide, gl, tmp_path):
    code = f"import sys; {hide}\nimport sac, vlmrm; print('imported')\nsac.run(vlmrm.main)"
    process = spawn("-c", code, "--task", "kneeling", cwd=tmp_path, MUJOCO_GL=gl, PYTHONPATH=HERE)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out.startswith("imported") and "libegl1" in err
    assert err.count("\n") == 1 and not list(tmp_path.iterdir())

def test_torchrun_trains_together_and_writes_one_folder(tmp_path):
    argv = ["-m", "torch.distributed.run", "--nproc-per-node", "2", HERE / "vlmrm.py"]
    process = spawn(*argv, "--task", "cartpole", *SHORT, cwd=tmp_path)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    folder, = (tmp_path / "runs").iterdir()
    assert [row["step"] for row in progress(folder)] == ["20", "40", "60", "80"]
    assert float(progress(folder)[-1]["loss_q"]) > 0 and out.count("success rate") == 1

@pytest.mark.parametrize("command", sorted(set(re.findall(
    r"(?<![\w/])python ((?:vlmrm|sac)\.py [^`\n|]*)", README))))
def test_every_command_of_the_readme_runs_in_short(command, tmp_path, monkeypatch, in_one_process):
    monkeypatch.chdir(tmp_path)
    load_clip, names = vlmrm.load_clip, ["/".join(x) for x in open_clip.list_pretrained()]

    def load_without_download(clip, dtype):
        return load_clip(str(TINY_CLIP) if clip in names else clip, dtype)
    monkeypatch.setattr(vlmrm, "load_clip", load_without_download)
    monkeypatch.setattr(sac, "make_envs", partial(sac.make_envs, max_episode_steps=20))
    program, *argv = shlex.split(command, comments=True)
    if program == "sac.py":
        sac.main([*argv, "--steps", "300"])
    elif "--help" in argv:
        with pytest.raises(SystemExit, match="0"):
            vlmrm.main(argv)
    elif "--resume" in argv:
        vlmrm.main(["--task", "kneeling", *SHORT, "--out", argv[1 + argv.index("--resume")]])
        vlmrm.main(argv)
    else:
        vlmrm.main([*argv, *SHORT])
        path, = Path().rglob("progress.csv")
        assert float(progress(path.parent)[-1]["loss_q"]) > 0
