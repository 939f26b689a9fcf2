"""Tests by oracles (other libraries, closed forms, Gymnasium) and short real runs. Run: pytest"""
import copy, csv, json, os, pickle, random, re, shlex, shutil, signal, subprocess, sys, time
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: CLIP in float32, and the lesson's settings
os.environ.setdefault("OMP_NUM_THREADS", "1")  # these networks are too small for more
os.environ.setdefault("MUJOCO_GL", "egl")
import gymnasium as gym
import mujoco, open_clip, pytest, sac, torch, vlmrm
import numpy as np
from gymnasium.utils.env_checker import check_env
from PIL import Image
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from sac import UsageError
from vlmrm import TINY_CLIP, CLIPReward, World, goal_baseline_reward

HERE = Path(__file__).resolve().parent
README = (HERE / "README.md").read_text()
KNEELING, CARTPOLE = vlmrm.TASKS["kneeling"], vlmrm.TASKS["cartpole"]
KNEELS = CLIPReward(KNEELING.prompt)
UPRIGHT = CLIPReward(CARTPOLE.prompt, CARTPOLE.baseline)
SHORT = ("--steps 40 --num-envs 2 --episode-length 10 --updates 2 --batch-size 16 "
         "--learning-starts 20").split()

class Toy(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    def __init__(self, render_mode=None, action=gym.spaces.Box(-2, 3), obs=(2,), end=0, draws=True):
        self.render_mode, self.end, self.draws = render_mode, end, draws  # no width
        self.action_space = action
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, obs)
    def observe(self):
        return np.full(self.observation_space.shape, self.x, np.float32)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.time = self.np_random.uniform(-0.1, 0.1), 0
        return self.observe(), {}
    def step(self, action):
        assert self.action_space.contains(action), action
        self.time, self.x, self.action = self.time + 1, self.x + 0.1 * np.mean(action), action
        return self.observe(), 0.0, False, 0 < self.end <= self.time, {}
    def render(self):
        frame = np.zeros((64, 64, 3), np.uint8)
        frame[:, int(32 + 8 * self.x) % 64] = 255
        return frame if self.draws else None

for toy, arguments in {
        "Endless": {}, "Scalar": dict(action=gym.spaces.Box(-2, 3, ())), "Truncates": dict(end=3),
        "Matrix": dict(action=gym.spaces.Box(-2, 3, (2, 2))),
        "Row": dict(action=gym.spaces.Box(-2, 3, (1, 3))),
        "Integer": dict(action=gym.spaces.Box(-100, 100, (1,), np.int8)),
        "Several": dict(action=gym.spaces.MultiDiscrete([2, 3])), "Image": dict(obs=(8, 8, 3)),
        "Fixed": dict(action=gym.spaces.Box(1, 1)), "Blank": dict(draws=False)}.items():
    gym.register(f"{toy}-v0", Toy, kwargs=arguments)
gym.register("Undrawn-v0", lambda: Toy())  # a constructor without render_mode

configure = partial(vlmrm.configure, clip="tiny_clip")

def progress(folder):
    path = Path(folder) / "progress.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []

def spawn(*argv, cwd, **env):
    """A new Python without open_clip, whose import takes seconds, and truth does without."""
    (cwd / "stub").mkdir(exist_ok=True)
    (cwd / "stub/open_clip.py").touch()
    env = os.environ | env | {"PYTHONPATH": f"{cwd}/stub:{HERE}"}
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # also in background
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed)

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
    kept = {(name.split(".")[0], p.requires_grad) for name, p in reward.named_parameters()}
    assert kept == {("visual", False)}

@pytest.mark.parametrize("shape, dtype", [
    ((2, 64, 64, 3), "float32"), ((2, 64, 64, 3), "bool"), ((2, 64, 64, 3), "int64"),
    ((2, 64, 64, 1), "uint8"), ((2, 64, 64), "uint8"), ((64, 64, 3), "uint8"),
    ((2, 64, 64, 4), "uint8"), ((2, 3, 64, 64), "uint8"), ((2,), "object")])
def test_wrong_pictures_are_refused_in_the_same_line(shape, dtype):
    line = re.escape(f"pictures must be uint8 (N, H, W, 3), 0 to 255, not {dtype} {shape}")
    with pytest.raises(UsageError, match=f"^{line}$"):
        KNEELS(np.zeros(shape, dtype))

def test_a_reward_can_be_pickled_copied_and_loaded():
    frames = random_pictures(3, 64, 64)
    expected, other = KNEELS(frames), copy.deepcopy(UPRIGHT)
    assert not torch.equal(other(frames), expected)
    other.load_state_dict(KNEELS.state_dict())
    for same in (pickle.loads(pickle.dumps(KNEELS)), copy.deepcopy(KNEELS), other):
        assert torch.equal(same(frames), expected)

def test_words_that_the_model_never_saw_are_named(capsys):
    CLIPReward(KNEELING.prompt.upper())
    assert capsys.readouterr().err == ""
    CLIPReward("a humanoid robot juggling flamingos")
    assert "never saw flamingos, juggling, only " in capsys.readouterr().err

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

def test_any_environment_gets_the_reward_of_its_picture_and_passes_gymnasiums_check():
    env, envs = vlmrm.WithCLIPReward(make(), UPRIGHT), vlmrm.WithCLIPRewards(make(2), UPRIGHT)
    env.reset(seed=0)
    envs.reset(seed=0)
    for _ in range(3):
        reward, rewards = env.step(np.array([1.0]))[1], envs.step(np.array([[1.0], [-1.0]]))[1]
    expected = UPRIGHT(np.stack(envs.render())).numpy()
    assert isinstance(reward, float) and rewards.dtype == np.float32 and rewards.shape == (2,)
    assert [reward, *rewards] == pytest.approx([expected[0], *expected], abs=1e-5)
    assert abs(rewards[0] - rewards[1]) > 1e-4
    again = gym.make(env.spec)
    again.reset(seed=0)
    reward = again.step(np.array([1.0]))[1]
    assert reward == pytest.approx(UPRIGHT(again.render()[None]).item(), abs=1e-5)
    check_env(again, skip_render_check=True)

@pytest.mark.parametrize("n, asked", [
    (0, dict(render_mode="rgb_array_list")), *((n, dict(render_mode=None)) for n in (0, 2)),
    (2, dict(vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}))])
def test_environments_that_do_not_draw_each_step_are_refused_when_wrapped(n, asked):
    with pytest.raises(UsageError, match='InvertedPendulum.*render_mode="rgb_array"'):
        (vlmrm.WithCLIPRewards if n else vlmrm.WithCLIPReward)(make(n, **asked), UPRIGHT)

def test_the_readmes_example_with_stable_baselines3_runs():
    pytest.importorskip("stable_baselines3")
    example = re.search(r"(    .*\n|\n)*    .*WithCLIPReward.*\.learn\(50_000\)\n", README)[0]
    exec("if True:\n" + example.replace("50_000", "110"), {})

# --- the worlds, their pictures and criteria
FLAGS = {f"include_{part}_in_observation": False
         for part in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")}
WORLDS = {"Humanoid-v5": FLAGS | dict(terminate_when_unhealthy=False), "Hopper-v5": {},
          "InvertedPendulum-v5": {}}

@pytest.mark.parametrize("env_id", WORLDS)
def test_world_equals_gymnasium_bit_for_bit_and_pictures_leave_it_alone(env_id):
    world = World(configure(env_id=env_id, prompt="a robot"), 2, 32)
    theirs = [gym.make(env_id, **WORLDS[env_id]).unwrapped for _ in range(2)]
    ones = np.ones(theirs[0].action_space.shape, np.float32)
    theirs = [gym.wrappers.RescaleAction(env, -ones, ones) for env in theirs]
    world.action_space.seed(0)
    for seed in (17, 0):
        obs = world.reset(seed=seed)[0]
        expected = [env.reset(seed=seed + i)[0] for i, env in enumerate(theirs)]
        for _ in range(60):
            np.testing.assert_array_equal(obs, expected)
            action = world.action_space.sample()
            obs, reward, terminated, truncated, _ = world.step(action)
            expected = [env.step(a)[0] for env, a in zip(theirs, action)]
            world.render()
            world.judge()
            assert not (reward.any() or terminated.any() or truncated.any())
        np.testing.assert_array_equal(world.states(), [env.unwrapped.data.qpos for env in theirs])

def humanoid(looks="plain"):
    """A world; states of kneeling, kneeling in the air, standing, standing in the air, lying."""
    world = World(configure(task="kneeling", looks=looks), 1)
    world.reset(seed=0)
    model = world.sims[0].model
    columns = [model.joint(f"{side}_{joint}").qposadr[0]
               for joint in ("hip_y", "knee") for side in ("left", "right")]
    states = np.tile(model.qpos0, (5, 1))
    states[:, 2] = 0.84, 1.2, 1.27, 1.5, 0.1  # height, m
    states[:2, columns] = np.radians([-10, -10, -107, -107])
    states[2:4, columns] = np.radians([-5, -5, -12, -12])
    states[4, 3:7] = 0.5 ** 0.5, 0, 0.5 ** 0.5, 0
    return world, states

def test_criteria_and_looks_on_states_by_hand():
    world, states = humanoid()
    goals = vlmrm.Humanoid(world.sims[0].model, states).goals()
    assert set(goals) == {*vlmrm.TASKS} - {"cartpole"}
    assert goals["kneeling"].tolist() == world.judge(states).tolist() == [1, 0, 0, 0, 0]
    assert goals["standing"].tolist() == [0, 0, 1, 0, 0]
    assert not any(goals[name].any() for name in ("lotus", "splits", "one-leg", "arms-crossed"))
    cart = World(configure(task="cartpole"), 1)
    assert cart.judge(np.array([[0, 0.0], [0, 0.5], [0.5, -0.199]])).tolist() == [1, 0, 1]
    for looks in ("paper", "plain", "original"):  # all of which show the robot move
        frames = humanoid(looks)[0].render(states).astype(int)
        assert frames.shape == (5, 64, 64, 3) and np.abs(frames[0] - frames[2]).mean() > 1

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

def test_discrete_actions_are_the_largest_of_continuous_ones():
    world, theirs = World(configure(env_id="CartPole-v1", prompt="a"), 1), gym.make("CartPole-v1")
    assert np.array_equal(world.reset(seed=0)[0][0], theirs.reset(seed=0)[0])
    for scores, action in (([0.1, 0.3], 1), ([0.9, -0.2], 0), ([-0.9, -0.2], 1)):
        assert np.array_equal(world.step(np.array([scores]))[0][0], theirs.step(action)[0])

@pytest.mark.parametrize("toy", ["Scalar", "Matrix", "Row", "Truncates"])
def test_actions_of_any_shape_reach_the_environment_in_its_own_units_and_past_its_end(toy):
    world = World(configure(env_id=f"{toy}-v0", prompt="a cart", episode_length=5), 2)
    shape = world.action_space.shape
    flat = np.linspace(-1, 1, np.prod(shape), dtype=np.float32).reshape(2, -1)
    action = vlmrm.rollout(world, lambda obs: flat, 0, None, vlmrm.Clock())[1]
    assert action.shape == (5, *shape) and not np.any(world.step(action[0])[2:4])
    for sim, row in zip(world.sims, flat.reshape(shape)):
        assert sim.time == 6
        np.testing.assert_allclose(sim.action, row * 2.5 + 0.5, atol=1e-6)

def test_tiny_clip_is_small_half_precision_and_prefers_true_captions():
    from safetensors.torch import load_file
    weights = TINY_CLIP / "open_clip_model.safetensors"
    dtypes = {x.dtype for x in load_file(weights).values() if x.is_floating_point()}
    assert weights.stat().st_size <= 8e6 and dtypes == {torch.float16}
    world, states = humanoid()
    assert KNEELS(world.render(states[[2, 0]])).diff() > 0.1
    poles = World(configure(task="cartpole"), 1).render(np.array([[0.2, 0.0], [0.2, 0.4]]))
    assert UPRIGHT(poles).diff() < 0

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
    assert (x @ y - x.double() @ y.double()).abs().max() < 2e-4  # bfloat16 would be off by 0.1

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

def test_twin_critic_equals_two_separate_networks():
    critic, batch = sac.Critic(3, 2, hidden=8, layer_norm=True), batch_of(6)
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
    agent.set_lr(0.01, 0.02)
    assert [g["lr"] for g in agent.actor_opt.param_groups] == [0.01, 3e-4]  # the temperature's
    metrics = agent.update(batch_of(32))
    assert all(not value.requires_grad and value.ndim == 0 for value in metrics.values())
    assert metrics["entropy"] > -2 and agent.log_temperature < 0  # it falls: entropy above target
    for name, p in agent.named_parameters():
        assert not torch.equal(before[name], p), name
    for slow, fast, tau in (("target_critic", "critic", 0.1), ("policy", "actor", 0.2)):
        for name, p in agent.get_submodule(fast).named_parameters():
            moved = before[f"{slow}.{name}"].lerp(p, tau)
            assert_close(agent.get_parameter(f"{slow}.{name}"), moved)
    assert (agent.act(obs, deterministic=True) == agent.policy(obs)[0].tanh().numpy()).all()

def test_scales_standardise_observations_and_rewards():
    torch.manual_seed(0)
    agent = sac.SAC(3, 2)
    batch = batch_of(500, obs=5 + 2 * torch.randn(500, 3), reward=0.3 + 0.03 * torch.randn(500),
                     terminated=torch.ones(500))
    agent.fit_scales(batch.obs.reshape(10, 50, 3), batch.reward.reshape(10, 50), 0.5)
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
    zeros = sac.Transitions(*np.zeros((2, 2, 1)), np.zeros(2), np.zeros((2, 1)), np.zeros(2))
    for name, x in zeros._asdict().items():
        with pytest.raises(UsageError, match=f"^{name} is not finite"):
            replay.add(*zeros._replace(**{name: np.full_like(x, np.nan)}))
    with pytest.raises(ValueError, match="6 transitions in a replay of 5"):
        replay.add(*(np.concatenate([x] * 3) for x in zeros))

def test_sac_learns_to_hold_the_pole_and_always_ends_with_the_mean_return(capsys, monkeypatch):
    monkeypatch.setattr(sac, "SAC", partial(sac.SAC, hidden=64))
    monkeypatch.setattr(sac, "range", lambda n: range(100 if n == 1000 else n), raising=False)
    sac.main(["--env-id", "InvertedPendulum-v5", "--steps", "900"])
    line, score = capsys.readouterr().out.splitlines()[-1].rsplit(" ", 1)
    assert line == "mean return over 20 deterministic episodes:"
    assert float(score) > 45  # untrained: below 25
    sac.main(["--env-id", "Endless-v0", "--steps", "50"])
    assert capsys.readouterr().out.endswith("episodes: 0.0\n")  # a task that never ends

# --- the whole program
@pytest.mark.parametrize("line, message", [
    ("--prompt ' '", "give --prompt"), ("--task flying", "kneeling, lotus"),
    ("--clip ViT-bigG-41/laion2b", "near: ViT-bigG-14"), ("--clip garbled", "does not load"),
    ("--clip weightless", "open_clip_model.safetensors"), ("--clip ''", "does not load"),
    ("--alpha 1.5", "--alpha 1.5"), ("--prompt 'A humanoid robot' --alpha 0.5", "must differ"),
    ("--env-id Hopper-v5 --alpha 0.5", "--baseline"), ("--num-envs -2", "--num-envs -2"),
    ("--lr nan", "--lr nan"), ("--lr inf", "--lr inf"), ("--replay 9999999999", "smaller --clip"),
    ("--seed -1", "--seed -1"), ("--steps many", "'many'"), ("--looks nice", "plain"),
    ("--reward truth", "--task"), ("--env-id Antt-v5", "Antt"), ("--env-id Fixed-v0", "float Box"),
    ("--out weightless", "not overwritten"), ("--out garbled/config.json/run", "Not a directory"),
    ("--env-id Integer-v0", "float Box"), ("--env-id Several-v0", "MultiDiscrete"),
    ("--env-id Image-v0", "vector observations"), ("--env-id Blank-v0", "pictures must be"),
    ("--env-id Undrawn-v0", "render_mode"), ("--resume missing", "is not a run's folder"),
    ("--resume garbled", "is not a run's folder"), ("--resume x --steps 5", "without other flags"),
    ("sac.py --env-id CartPole-v1", "Box"), ("sac.py --env-id Pendulumm-v1", "Pendulum"),
    ("sac.py --env-id Integer-v0", "float Box"), ("sac.py --steps 0", "--steps")])
def test_bad_input_is_one_line_and_exit_code_2(line, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY_CLIP, "garbled")
    Path("garbled/open_clip_model.safetensors").write_bytes(b"PK" * 100)
    Path("garbled/config.json").write_text("{{")
    Path("weightless").mkdir()
    shutil.copy(TINY_CLIP / "open_clip_config.json", "weightless")
    before = sorted(tmp_path.rglob("*"))
    argv = shlex.split(line) if "--resume" in line else ["--prompt", "x", *shlex.split(line)]
    main = partial(sac.main, argv[3:]) if "sac.py" in line else partial(vlmrm.main, argv)
    with pytest.raises(SystemExit) as stop:
        sac.run(main)
    line, = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning: ")]
    assert stop.value.code == 2 and "error: " in line and message in line
    assert sorted(tmp_path.rglob("*")) == before

@pytest.mark.parametrize("argv, expected", [
    (["--clip", str(TINY_CLIP)], dict(looks="plain", steps=192_000, updates=400, task="kneeling")),
    (["--paper", "--lr", "0.1"], dict(
        clip="tiny_clip", looks="plain", updates=100, batch_size=512, gamma=0.95, lr=0.1,
        learning_starts=50_000, actor_tau=1.0, layer_norm=0, tau=0.005)),
    (["--paper", "--clip", "ViT-bigG-14/laion2b_s39b_b160k"], dict(
        looks="paper", steps=10_000_000, num_envs=32, reward_std=0.0, lr=6e-4)),
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

def test_training_end_to_end_with_pictures_of_the_states_reached(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vlmrm.main(["--prompt", "a humanoid robot kneeling", *SHORT])
    for prompt in ("A humanoid robot kneeling ", "a humanoid  robot kneeling"):
        vlmrm.main(["--prompt", prompt, "--reward", "truth", *SHORT])
    vlmrm.main(["--task", "cartpole", *SHORT, *"--out runs/cart --steps 120 --test-every 2".split(),
                *"--updates 20 --lr 0.03 --hidden 256".split()])
    names = [f"a-humanoid-robot-kneeling{i}" for i in ("", "-2", "-3")]
    assert sorted(os.listdir("runs")) == [*names, "cart"]
    for folder in Path("runs").iterdir():
        rows = progress(folder)
        columns = "step seconds return success test q loss_q loss_pi entropy temperature"
        assert " ".join(rows[0]) == columns and rows[1]["step"] == "40"
        assert float(rows[-1]["loss_q"]) > 0 and 0 <= float(rows[-1]["success"]) <= 1
        config = json.loads((folder / "config.json").read_text())
        assert config == asdict(vlmrm.Config(**config)) and config["batch_size"] == 16
        assert (folder / "film.gif").exists() == (config["reward"] == "clip")
    assert Image.open("runs/cart/film.png").size == (1920, 192)
    assert Image.open("runs/cart/film.gif").n_frames == 10
    out = capsys.readouterr().out
    assert len(re.findall("episodes: CLIP return .* success", out)) == out.count("true return") == 2
    assert "lesson" in out and " 10.0 per update" in out and not list(tmp_path.rglob("*.tmp"))
    obs, action, reward, next_obs, terminated = torch.load("runs/cart/last.pt")["replay"]
    assert len(reward) == 120 and not terminated.any() and reward.std() > 0.02
    for start in range(0, 120, 20):  # of an iteration: 10 steps of 2 simulations
        assert torch.equal(obs[start + 2:start + 20], next_obs[start:start + 18])
    frames = World(configure(task="cartpole"), 1).render(next_obs[:, :2].double().numpy())
    assert_close(reward, UPRIGHT(frames), atol=2e-3, rtol=0)  # what is stored is float32
    policy, cfg, rows = sac.Actor(4, 1), vlmrm.read_config(Path("runs/cart")), progress("runs/cart")
    assert len({row["test"] for row in rows}) == 4 and {row["test"] for row in rows[::2]} == {"nan"}
    best = max(rows[1::2], key=lambda row: float(row["test"]))  # that policy is kept
    seed = int(np.random.SeedSequence((0, int(best["step"]) - 20, 0)).generate_state(1)[0])
    policy.load_state_dict(torch.load("runs/cart/best.pt"))
    assert_close(policy.obs_mean, obs[:20].mean(0))  # of the first iteration, whose actions
    space, first = World(cfg, 2).action_space, np.random.SeedSequence((0, 0, 0))  # are random
    space.seed(int(first.generate_state(1)[0]))
    assert_close(action[:2], torch.from_numpy(space.sample()))
    act = partial(policy.act, deterministic=True)
    reward = vlmrm.rollout(World(cfg, 2), act, seed, UPRIGHT, vlmrm.Clock())[2]
    assert reward.sum(0).mean() == pytest.approx(float(best["test"]), abs=1e-3)

# --- interrupted, and resumed
TRUTH = ["--task", "cartpole", "--reward", "truth"]
LONGER = [*TRUTH, *SHORT, *"--episode-length 40 --steps 1200 --updates 10 --replay 900".split()]

def assert_same_run(a, b):
    """Equal to the bit, but for the seconds."""
    first, second = ([row | {"seconds": ""} for row in progress(x)] for x in (a, b))
    assert first == second and float(first[-1]["loss_q"]) > 0
    for name in ("last.pt", "best.pt"):
        x, y = (torch.load(Path(folder) / name, weights_only=True) for folder in (a, b))
        x, y = (tree_leaves({k: v for k, v in z.items() if k != "rows"}) for z in (x, y))
        assert len(x) == len(y) > 6
        assert all(torch.equal(p, q) if torch.is_tensor(p) else p == q for p, q in zip(x, y))

def test_killed_or_stopped_at_any_moment_it_ends_as_if_it_were_not(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    argv = [*LONGER, "--out", str(killed)]
    vlmrm.main([*argv[:-1], str(whole)])
    for how in (signal.SIGKILL, signal.SIGINT):
        rows = len(progress(killed))
        process = spawn(HERE / "vlmrm.py", *argv, cwd=tmp_path)
        while len(progress(killed)) <= rows:  # then the first iteration is saved
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))
        assert process.poll() is None, "it had ended before it could be interrupted"
        process.send_signal(how)
        err = process.communicate(timeout=5)[1]
        assert process.returncode == (-9 if how == signal.SIGKILL else 130)
        assert how == signal.SIGKILL or err.endswith(f"--resume {killed}\n")
        argv = ["--resume", str(killed)]
    vlmrm.main(argv)
    assert_same_run(whole, killed)

@pytest.mark.parametrize("moment, world", [
    (1, TRUTH), (45, TRUTH), (35, ["--env-id", "Truncates-v0", "--prompt", "a cart"])])
def test_interrupted_between_updates_it_ends_the_same(moment, world, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", iter(range(0, 10 ** 9, 200)).__next__)  # all is saved
    whole, stopped = str(tmp_path / "whole"), str(tmp_path / "stopped")
    argv = [*world, *SHORT, "--steps", "120", "--updates", "10", "--replay", "30", "--out"]
    vlmrm.main([*argv, whole])
    update, calls = sac.SAC.update, iter(range(1, 1000))
    def interrupted(*args):
        call = next(calls)
        if call == moment:
            signal.raise_signal(signal.SIGTERM)
        if call == moment + 3:
            raise BrokenPipeError  # as | head -1 does, in the iteration with which it resumed
        return update(*args)
    monkeypatch.setattr(sac.SAC, "update", interrupted)
    monkeypatch.setattr("os._exit", sys.exit)
    for start in ([*argv, stopped], ["--resume", stopped]):
        with pytest.raises(SystemExit, match="130"):
            sac.run(partial(vlmrm.main, start))
    vlmrm.main(["--resume", stopped])
    assert_same_run(whole, stopped)

class Malice:
    def __reduce__(self):
        return Path.touch, (Path("hacked"),)

def test_files_of_others_are_refused_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vlmrm.main([*TRUTH, *SHORT, "--out", "run"])
    last = Path("run/last.pt")
    whole, saved = last.read_bytes(), torch.load(last, weights_only=True)
    for content in (b"", b"PK", whole[:2000], [1], {"step": 3}, saved | {"agent": Malice()},
                    saved | {"agent": sac.SAC(4, 1).state_dict()}, saved | {"replay": []}):
        torch.save(content, last)
        if isinstance(content, bytes):
            last.write_bytes(content)
        with pytest.raises(UsageError, match="last.pt is damaged or another run's"):
            vlmrm.main(["--resume", "run"])
    assert not Path("hacked").exists()

def test_without_opengl_it_imports_and_says_what_to_install(tmp_path):
    draw = "import sac, vlmrm as v; sac.run(v.World(v.Config(task='kneeling'), 1).render)"
    process = spawn("-c", draw, cwd=tmp_path, MUJOCO_GL="foo")
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "error: no OpenGL" in err and "apt install libegl1" in err
    assert err.count("\n") == 1

HALVES = """
import torch, sac, vlmrm
from torch import distributed as dist
torch.manual_seed(0)
batch = sac.Transitions(torch.randn(64, 3), torch.rand(64, 2), torch.randn(64),
                        torch.randn(64, 3), torch.ones(64))  # an end: nothing is random
alone, agent, rank = sac.SAC(3, 2, hidden=16), sac.SAC(3, 2, hidden=16), vlmrm.RANK
agent.load_state_dict(alone.state_dict())
alone.update_critic(batch)
dist.init_process_group("gloo", f"file://{__file__}.meeting", rank=rank, world_size=2)
half = sac.Transitions(*(x[32 * rank:32 * rank + 32] for x in batch))
agent.update_critic(half)
torch.testing.assert_close(agent.critic.state_dict(), alone.critic.state_dict(), atol=1e-6, rtol=0)
torch.manual_seed(rank)
agent.fit_scales(half.obs, half.reward, 0.3)
agent.update(half)
for x in (*agent.parameters(), *agent.buffers()):
    first = x.detach().clone()
    dist.broadcast(first, 0)
    assert torch.equal(x, first)
dist.destroy_process_group()
sac.run(vlmrm.main)
"""

def test_processes_that_cannot_share_evenly_are_refused(monkeypatch):
    monkeypatch.setattr(vlmrm, "PROCESSES", 3)
    with pytest.raises(UsageError, match="processes: .*--num-envs"):
        vlmrm.main(["--prompt", "a humanoid robot kneeling"])

def test_two_processes_make_the_step_of_the_whole_minibatch_and_one_run(tmp_path):
    (tmp_path / "halves.py").write_text(HALVES)
    argv = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "halves.py", *TRUTH, *SHORT]
    process = spawn(*argv, cwd=tmp_path)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    folder, = (tmp_path / "runs").iterdir()
    assert float(progress(folder)[1]["loss_q"]) > 0 and out.count("success rate") == 1

@pytest.mark.parametrize("command", sorted(set(re.findall(
    r"(?<![\w/])python ((?:vlmrm|sac)\.py (?!--help)[^`\n|]*)", README))))
def test_every_command_of_the_readme_runs_in_short(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_clip, names = vlmrm.load_clip, ["/".join(x) for x in open_clip.list_pretrained()]
    monkeypatch.setattr(vlmrm, "load_clip", lambda clip, dtype: load_clip(  # without downloads
        str(TINY_CLIP) if clip in names else clip, dtype))
    monkeypatch.setattr(sac, "make_envs", partial(sac.make_envs, max_episode_steps=20))
    program, *argv = shlex.split(command, comments=True)
    if program == "sac.py":
        sac.main([*argv, "--steps", "100"])
    else:
        if "--resume" in argv:
            vlmrm.main([*TRUTH, *SHORT, "--out", argv[1]])
        vlmrm.main(argv if "--resume" in argv else [*argv, *SHORT])
        path, = Path().rglob("progress.csv")
        assert float(progress(path.parent)[-1]["loss_q"]) > 0
