"""Tests against oracles: other libraries, closed forms, Gymnasium's own environments, and short real runs. Run: pytest"""
import csv
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import mujoco
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import sac
import vlmrm
from vlmrm import STAND, TASKS, TINY_CLIP, CLIPReward, RunError, UsageError, World, goal_baseline_reward, posture

HERE = Path(__file__).parent
WORLDS = {  # our world -> the Gymnasium task that it must equal bit for bit
    "Humanoid-v5": dict(terminate_when_unhealthy=False, include_cinert_in_observation=False, include_cvel_in_observation=False,
                        include_qfrc_actuator_in_observation=False, include_cfrc_ext_in_observation=False),
    "InvertedPendulum-v5": {},
}
KNEEL, LOTUS, ARMS_UP, SPLITS, HIPS, ONE_LEG, CROSSED = (TASKS[name].posture for name in (
    "kneeling", "lotus", "arms-raised", "splits", "hands-on-hips", "one-leg", "arms-crossed"))


# ---------------------------------------------------------------------------------------------------------------- the reward

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
    assert got.shape == (50,)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


def test_reward_with_alpha_0_is_the_cosine_even_if_goal_is_baseline():
    torch.manual_seed(1)
    s, g, b = unit(20, 16), unit(16), unit(16)
    for baseline in (b, g):
        torch.testing.assert_close(goal_baseline_reward(s, g, baseline, 0.0), torch.cosine_similarity(s, g[None]), atol=1e-6, rtol=0)


def clip_folder(path, **preprocess):
    """A copy of tiny_clip with other preprocessing: a second and third model."""
    shutil.copytree(TINY_CLIP, path, ignore=shutil.ignore_patterns("*.py", "*.md", "__pycache__"))
    config = json.loads((path / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= preprocess
    (path / "open_clip_config.json").write_text(json.dumps(config))
    return str(path)


def random_pictures(n, height, width, seed=0):
    """Noise, in which missing antialiasing shows, plus a sharp edge: uint8 (n, height, width, 3)."""
    frames = np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)
    frames[:, height // 3:height // 2, width // 4:width // 2] = 255 * (np.arange(3) == 1)
    return frames


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (48, 48), (120, 161)])
@pytest.mark.parametrize("config", [dict(resize_mode="shortest"), dict(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5], resize_mode="squash", interpolation="bilinear"),
                                    dict(mean=[0.1, 0.2, 0.3], std=[0.3, 0.2, 0.1], resize_mode="longest")])
def test_preprocessing_equals_open_clips_own(tmp_path, config, size):
    folder = clip_folder(tmp_path / "clip", **config)
    reward = CLIPReward("a humanoid robot kneeling", clip=folder)
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    frames = random_pictures(3, *size)
    ours = reward.preprocess(torch.from_numpy(frames))
    theirs = torch.stack([transform(Image.fromarray(frame)) for frame in frames])
    assert ours.shape == theirs.shape
    std = torch.tensor(model.visual.preprocess_cfg["std"]).view(3, 1, 1)  # differences before normalisation
    difference = ((ours - theirs) * std).abs()
    assert difference.max() < 1 / 255 if size == (64, 64) else difference.mean() < 2 / 255


def test_clip_reward_equals_open_clip_step_by_step():
    prompts, baselines = ["a humanoid robot kneeling", "a robot on both knees"], "a humanoid robot"
    reward = CLIPReward(prompts, baselines, alpha=0.3)
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{TINY_CLIP}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{TINY_CLIP}")
    frames = random_pictures(5, 64, 64)
    with torch.no_grad():
        s = model.encode_image(torch.stack([transform(Image.fromarray(frame)) for frame in frames]), normalize=True)
        g = model.encode_text(tokenizer(prompts), normalize=True).mean(0)
        b = model.encode_text(tokenizer([baselines]), normalize=True)[0]
    got = reward(frames)
    assert got.shape == (5,) and got.dtype == torch.float32 and not got.requires_grad
    torch.testing.assert_close(got, goal_baseline_reward(s, g, b, 0.3), atol=1e-5, rtol=0)
    reward.chunk = 2
    torch.testing.assert_close(reward.embed(frames), s, atol=1e-5, rtol=0)


def test_a_full_gpu_halves_the_chunk_once_and_for_all(capsys):
    reward = CLIPReward("a humanoid robot kneeling")
    frames, visual = random_pictures(40, 64, 64), reward.visual

    def small_memory(x):
        if len(x) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return visual(x)
    expected = reward(frames)
    del reward.visual
    reward.visual = small_memory
    torch.testing.assert_close(reward(frames), expected, atol=1e-5, rtol=0)
    assert reward.chunk == 10 and capsys.readouterr().err.count("from now on") == 2
    reward(frames)
    assert capsys.readouterr().err == ""


def test_clip_reward_keeps_only_the_image_tower_and_nothing_to_train():
    reward = CLIPReward("a humanoid robot kneeling")
    assert reward.image_size == 64
    assert {name.split(".")[0] for name, _ in reward.named_parameters()} == {"visual"}
    assert not any(p.requires_grad for p in reward.parameters()) and not reward.visual.training


@pytest.fixture
def egl(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")  # Gymnasium's own renderer would ask for a window


POLE = "InvertedPendulum-v5", "pole vertically upright on top of the cart", "pole and cart"


def test_any_environment_gets_the_reward_of_its_picture(egl):
    env_id, *prompts = POLE
    reward = CLIPReward(*prompts)
    env = vlmrm.WithCLIPReward(gym.make(env_id, render_mode="rgb_array", width=80, height=80), reward)
    envs = vlmrm.WithCLIPRewards(gym.make_vec(env_id, 2, "sync", render_mode="rgb_array", width=80, height=80), reward)
    env.reset(seed=0), envs.reset(seed=0)
    for _ in range(3):
        got, rewards = env.step(np.array([1.0]))[1], envs.step(np.array([[1.0], [-1.0]]))[1]
    assert got == pytest.approx(reward(env.render().copy()[None]).item(), abs=1e-5) == pytest.approx(rewards[0], abs=1e-5)
    assert rewards.shape == (2,) and rewards.dtype == np.float32 and rewards[0] != rewards[1] and isinstance(got, float)
    same_step = dict(autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    with pytest.raises(UsageError, match="take NEXT_STEP"):
        vlmrm.WithCLIPRewards(gym.make_vec(env_id, 2, "sync", vector_kwargs=same_step), reward)


def test_the_readmes_example_with_stable_baselines3_runs(egl):
    pytest.importorskip("stable_baselines3")
    example = re.search(r"((?:    .*\n|\n)*    .*\.learn\(.*\n)", (HERE / "README.md").read_text()).group(1)
    assert "WithCLIPReward" in example
    exec(textwrap.dedent(example).replace("50_000", "110"), {})


def test_words_that_the_model_never_saw_are_named(capsys):
    CLIPReward("a humanoid robot juggling flamingos")
    assert "never saw the words: flamingos, juggling" in capsys.readouterr().err
    CLIPReward("a humanoid robot kneeling")
    assert capsys.readouterr().err == ""


def test_words_beyond_the_text_models_length_are_named(capsys):
    CLIPReward("robot " * 22 + "on its knees")  # tiny_clip reads 24 tokens: start, 22 words, end
    assert "does not see its end: 'on its knees'" in capsys.readouterr().err
    CLIPReward("robot " * 22)
    assert capsys.readouterr().err == ""


def test_tiny_clip_is_small_half_precision_and_prefers_true_captions():
    from safetensors.torch import load_file
    weights = TINY_CLIP / "open_clip_model.safetensors"
    assert weights.stat().st_size <= 8e6
    assert {tensor.dtype for tensor in load_file(weights).values() if tensor.is_floating_point()} == {torch.float16}
    world = World("Humanoid-v5", 3, 64, "plain")
    world.set_state(np.stack([posture(world.model, **how) for how in (KNEEL, dict(hip_y=-60, knee=-157), STAND)]))
    rewards = CLIPReward(TASKS["kneeling"].prompt)(world.render())
    assert min(rewards[0], rewards[1]) > rewards[2] + 0.1
    cart = World("InvertedPendulum-v5", 3, 64, "plain")
    cart.set_state(np.array([[0.2, 0.0], [0.2, 0.4], [0.2, -1.0]]))
    rewards = CLIPReward(TASKS["cartpole"].prompt, TASKS["cartpole"].baseline)(cart.render())
    assert rewards[0] > rewards[1] > rewards[2] - 0.05


# ----------------------------------------------------------------------------------------------------------------- the world

@pytest.mark.parametrize("env_id", WORLDS)
@pytest.mark.parametrize("seed", [0, 17])
def test_world_equals_gymnasium_bit_for_bit(env_id, seed):
    world = World(env_id, 3)
    theirs = [gym.make(env_id, **WORLDS[env_id]).unwrapped for _ in range(3)]
    rng = np.random.default_rng(seed)
    for episode_seed in (seed, None):  # the second episode goes on with the simulations' own random streams
        obs, _ = world.reset(seed=episode_seed)
        expected = [env.reset(seed=None if episode_seed is None else seed + i)[0] for i, env in enumerate(theirs)]
        np.testing.assert_array_equal(obs, expected)
        for _ in range(100):
            action = rng.uniform(world.action_space.low, world.action_space.high).astype(np.float32)
            obs, _, terminated, truncated, _ = world.step(action)
            np.testing.assert_array_equal(obs, [env.step(a)[0] for env, a in zip(theirs, action)])
            np.testing.assert_array_equal(world.qpos, [env.data.qpos for env in theirs])
            np.testing.assert_array_equal(world.qvel, [env.data.qvel for env in theirs])
        assert not terminated.any() and truncated.all() == (world.scene.episode_length == 100)
    assert world.single_action_space == theirs[0].action_space
    assert world.single_observation_space == theirs[0].observation_space


@pytest.mark.parametrize("env_id", WORLDS)
def test_one_and_two_threads_give_the_same_bits_and_pictures_leave_physics_alone(env_id):
    one, two = World(env_id, 4, num_threads=1), World(env_id, 4, 32, "plain", num_threads=2)
    rng = np.random.default_rng(0)
    one.reset(seed=3), two.reset(seed=3)
    for _ in range(60):
        action = rng.uniform(one.action_space.low, one.action_space.high)
        a, b = one.step(action), two.step(action)
        two.render()
        np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(one.qpos, two.qpos)


def test_resetting_some_simulations_leaves_the_others_alone():
    world = World(num_envs=3)
    world.reset(seed=0)
    for _ in range(5):
        obs = world.step(world.action_space.sample())[0]
    after, _ = world.reset(options={"reset_mask": np.array([False, True, False])})
    np.testing.assert_array_equal(after[[0, 2]], obs[[0, 2]])
    assert (after[1] != obs[1]).all() and world.elapsed.tolist() == [5, 0, 5]


def test_last_picture_is_of_the_last_state_and_observations_match_states():
    world, states = World("InvertedPendulum-v5", 2, 64, "plain"), []
    step = world.step

    def recording(action):
        result = step(action)
        states.append((world.qpos.copy(), world.qvel.copy()))
        return result
    world.step = recording
    obs, _ = world.reset(seed=0)
    block, frames, obs = sac.rollout(world, obs, lambda obs: np.full((2, 1), 0.1, np.float32), 201, lambda frames: frames)
    other = World("InvertedPendulum-v5", 2, 64, "plain")
    for t in (0, 7, 199, 200):  # 199 is the last state before the reset
        other.set_state(*states[t])
        np.testing.assert_array_equal(block.next_obs[t], other.observe())
        np.testing.assert_array_equal(frames[t], other.render())
    assert not np.array_equal(block.next_obs[199], block.obs[200])  # the reset one begins the next episode
    assert block.terminated.sum() == 0
    np.testing.assert_array_equal(block.obs[1:200], block.next_obs[:199])


@pytest.mark.parametrize("env_id", WORLDS)
def test_original_looks_are_gymnasiums(env_id, egl):
    world, theirs = World(env_id, 1, 96, "original"), gym.make(env_id, render_mode="rgb_array", width=96, height=96)
    theirs.reset(seed=0)
    for steps in (0, 40):  # standing, and where the body has fallen to
        theirs.unwrapped.do_simulation(world.single_action_space.high, 5 * steps)
        world.set_state(theirs.unwrapped.data.qpos[None])
        assert np.abs(world.render()[0].astype(int) - theirs.render()).mean() < 1  # edges are not smoothed, shadows are coarser


@pytest.mark.parametrize("looks", ["paper", "original", "plain"])
def test_every_look_shows_the_robot_move(looks):
    world = World("Humanoid-v5", 2, 64, looks)
    world.set_state(np.stack([posture(world.model, **how) for how in (KNEEL, STAND)]))
    kneeling, standing = world.render().astype(int)
    assert kneeling.shape == (64, 64, 3) and np.abs(kneeling - standing).mean() > 1


@pytest.mark.parametrize("expected, how", [
    (True, dict()), (True, dict(hip_y=-60, knee=-157)), (True, dict(pitch=20, hip_y=-30)),  # upright, on the heels, leaning a little
    (False, dict(hip_y=0, knee=-5)), (False, dict(height=1.2)),                             # standing, kneeling in the air
    (False, dict(left_hip_y=-90, left_knee=-90)), (False, dict(pitch=80, hip_y=-90)),       # on one knee, fallen forward
    (False, dict(hip_y=-90, knee=-5)), (False, dict(pitch=-60, hip_y=30)),                  # legs stretched out, fallen back
])
def test_kneeling_criterion_on_poses_by_hand(expected, how):
    world = World(num_envs=1)
    world.set_state(posture(world.model, **(KNEEL | how))[None])
    assert TASKS["kneeling"].goal(world).tolist() == [expected]


@pytest.mark.parametrize("task, expected, how", [
    ("standing", True, STAND), ("standing", True, ARMS_UP),
    ("standing", False, STAND | dict(height=1.4)), ("standing", False, STAND | dict(pitch=50)),             # in the air, falling
    ("standing", False, dict(hip_y=-90, knee=-120)), ("standing", False, ONE_LEG),              # squatting, on one leg
    ("arms-raised", True, ARMS_UP), ("arms-raised", False, STAND),
    ("arms-raised", False, ARMS_UP | dict(left_shoulder1=0)), ("arms-raised", False, ARMS_UP | dict(height=1.5)),  # one arm, in the air
    ("lotus", True, LOTUS), ("lotus", False, LOTUS | dict(height=0.6)), ("lotus", False, SPLITS),           # in the air, legs stretched
    ("lotus", False, LOTUS | dict(hip_z=0, hip_x=0)), ("lotus", False, LOTUS | dict(pitch=-60)),                     # knees ahead, lying
    ("splits", True, SPLITS), ("splits", False, SPLITS | dict(hip_z=0)), ("splits", False, SPLITS | dict(knee=-90)),  # forward, bent
    ("splits", False, SPLITS | dict(height=0.8)), ("splits", False, LOTUS),                                 # in the air
    ("hands-on-hips", True, HIPS), ("hands-on-hips", False, STAND), ("hands-on-hips", False, CROSSED),      # before the chest
    ("hands-on-hips", False, HIPS | dict(right_shoulder1=0)),                                               # one hand only
    ("one-leg", True, ONE_LEG), ("one-leg", False, STAND),
    ("one-leg", False, ONE_LEG | dict(height=1.4)), ("one-leg", False, ONE_LEG | dict(pitch=70)),           # jumping, falling
    ("arms-crossed", True, CROSSED), ("arms-crossed", False, STAND), ("arms-crossed", False, HIPS),
    ("arms-crossed", False, CROSSED | dict(left_shoulder1=0, left_shoulder2=0)),                            # one arm across
    ("arms-crossed", False, STAND | dict(shoulder1=60, elbow=-10)),                                         # hands meet, arms do not cross
])
def test_criteria_on_poses_by_hand(task, expected, how):
    world = World(num_envs=1)
    world.set_state(posture(world.model, **how)[None])
    assert TASKS[task].goal(world).tolist() == [expected]


@pytest.mark.parametrize("how", [KNEEL, LOTUS, STAND, dict(pitch=80)])
def test_postures_touch_the_floor_as_mujoco_sees_it(how):
    model = World(num_envs=1).model
    data, touching = mujoco.MjData(model), []
    for gap in (-0.001, 0.001):
        data.qpos[:] = posture(model, **how)
        data.qpos[2] += gap
        mujoco.mj_forward(model, data)
        touching.append(any(0 in contact.geom and contact.dist < 0 for contact in data.contact))
    assert touching == [True, False]


def test_any_other_task_equals_gymnasiums_without_reward_and_end(egl):
    world, theirs = vlmrm.GymWorld("Hopper-v5", 2, 48, 30), gym.make("Hopper-v5", terminate_when_unhealthy=False)
    assert np.array_equal(world.reset(seed=3)[0][1], theirs.reset(seed=4)[0])
    rng = np.random.default_rng(0)
    for t in range(30):
        action = rng.uniform(-1, 1, (2, 3)).astype(np.float32)
        obs, reward, terminated, truncated, _ = world.step(action)
        assert np.array_equal(obs[1], theirs.step(action[1])[0]) and not reward.any() and not terminated.any() and truncated.all() == (t == 29)
    assert world.render().shape == (2, 48, 48, 3) and world.render().std() > 5
    first, _ = world.reset()
    bits = world.bits
    world.reset()
    for rng, state in zip(world.rngs, bits):
        rng.bit_generator.state = state
    assert np.array_equal(world.reset()[0], first)


def test_mountain_car_stands_where_it_is_put_and_is_judged_there():
    pytest.importorskip("pygame", reason="Gymnasium draws the mountain car with pygame")
    world, theirs = (vlmrm.make_world(vlmrm.parse(["--task", "mountaincar"]), 3, 64), gym.make("MountainCarContinuous-v0", render_mode="rgb_array"))
    theirs.reset(seed=0)
    theirs.unwrapped.state = np.array([0.44, 0.02])
    world.set_state([(-0.5, 0), (0.44, 0.02), (0.44, 0.02)])
    assert TASKS["mountaincar"].goal(world).tolist() == [False, False, False] and np.array_equal(world.render()[1], theirs.render())
    assert not np.array_equal(world.render()[0], world.render()[1])
    obs, reward, terminated, _, _ = world.step(np.array([[1], [1], [1]]))
    assert reward.tolist() == [0, 1, 1] and np.array_equal(obs[1], theirs.step(np.array([1]))[0]) and not terminated.any()


def test_without_pygame_it_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(UsageError, match="pip install .*classic.control"):
        vlmrm.main(["--task", "mountaincar", "--out", str(tmp_path / "run")])
    assert not list(tmp_path.iterdir())


def test_discrete_actions_are_the_largest_of_continuous_ones():
    world, theirs = vlmrm.GymWorld("CartPole-v1", 2, 48, 20), gym.make("CartPole-v1")
    world.reset(seed=0), theirs.reset(seed=0)
    assert world.single_action_space.shape == (2,)
    for _ in range(5):
        assert np.array_equal(world.step(np.array([[0.1, 0.3], [0.9, -0.2]]))[0][0], theirs.step(1)[0])


def test_another_task_trains_end_to_end(egl, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for settings in (vlmrm.PAPER, vlmrm.FEWER):
        monkeypatch.setitem(settings, "rollout_steps", 10)
        monkeypatch.setitem(settings, "updates", 2)
    monkeypatch.setattr(vlmrm, "TEST_EPISODES", 1)
    vlmrm.main(["--env-id", "Hopper-v5", "--prompt", "a robot", "--steps", "40", "--num-envs", "2", "--out", "hop"])
    progress = list(csv.DictReader(open("hop/progress.csv")))
    assert len(progress) == 2 and float(progress[-1]["loss_q"]) > 0 and progress[-1]["success"] == ""
    assert Image.open("hop/film.png").size == (1920, 192) and "success" not in capsys.readouterr().out


def test_view_shows_the_policys_states(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vlmrm.CLASSIC, "updates", 1)
    monkeypatch.setattr(vlmrm, "TEST_EPISODES", 1)
    vlmrm.main(["--task", "cartpole", "--steps", "400", "--num-envs", "1", "--out", "cart"])
    seen = []

    class Viewer:  # in place of the window
        def __init__(self, model, data):
            self.data = data

        def is_running(self):
            return len(seen) < 3

        def sync(self):
            seen.append(self.data.qpos.copy())
    monkeypatch.setattr("mujoco.viewer.launch_passive", Viewer)
    vlmrm.main(["--view", "cart"])
    world, policy = World("InvertedPendulum-v5", 1, reset_noise_scale=0.05), sac.SAC(4, 1, hidden=128, layer_norm=True)
    policy.load_state_dict(torch.load("cart/best.pt", weights_only=True)["agent"])
    obs, _ = world.reset(seed=0)
    for qpos in seen:
        obs, *_ = world.step(sac.to_env(world, policy.act(obs, deterministic=True)))
        assert np.array_equal(qpos, world.qpos[0])


def test_balanced_criterion_is_the_reward_of_step():
    world = World("InvertedPendulum-v5", 3, goal=TASKS["cartpole"].goal)
    world.reset(seed=0)
    world.set_state(np.array([[0, 0.0], [0, 0.5], [0.5, -0.199]]))
    assert TASKS["cartpole"].goal(world).tolist() == [True, False, True]
    assert world.step(np.zeros((3, 1)))[1].tolist() == [1, 0, 0]  # the third falls across the limit in this step


# ----------------------------------------------------------------------------------------------------------------------- SAC

def test_logp_equals_torch_distributions():
    torch.manual_seed(0)
    actor, obs = sac.Actor(5, 3).double(), torch.randn(200, 5, dtype=torch.float64)
    action, logp = actor.sample(obs)
    mean, log_std = actor(obs)
    oracle = torch.distributions.TransformedDistribution(torch.distributions.Normal(mean, log_std.exp()),
                                                         torch.distributions.TanhTransform(cache_size=0))
    assert logp.shape == (200,) and action.abs().max() <= 1
    torch.testing.assert_close(logp, oracle.log_prob(action).sum(-1), atol=1e-6, rtol=1e-6)


def test_logp_stays_finite_where_tanh_saturates():
    actor = sac.Actor(2, 1)
    with torch.no_grad():
        actor.net[-1].bias.copy_(torch.tensor([30.0, -1.0]))  # mean 30: tanh is 1 in float32
    action, logp = actor.sample(torch.zeros(4, 2))
    assert (action == 1).all() and torch.isfinite(logp).all() and (logp > 50).all()


def test_faster_products_keep_the_precision_of_float32():
    sac.use_onednn()
    x, y = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((x @ y).double(), x.double() @ y.double(), atol=2e-4, rtol=0)  # bfloat16 would be off by 0.1


def test_q_target_by_hand_for_a_terminated_and_a_truncated_transition():
    torch.manual_seed(0)
    agent = sac.SAC(3, 2, gamma=0.9, temperature=0.5)
    batch = sac.Transitions(torch.randn(2, 3), torch.rand(2, 2), torch.tensor([1.0, 2.0]), torch.randn(2, 3), torch.tensor([1.0, 0.0]))
    torch.manual_seed(5)
    target = agent.q_target(batch)
    torch.manual_seed(5)
    action, logp = agent.actor.sample(batch.next_obs)
    q = agent.target_critic(batch.next_obs, action)
    assert q.shape == (2, 2) and target.shape == (2,)
    assert target[0].item() == 1.0  # terminated: no bootstrap
    assert target[1].item() == pytest.approx(2.0 + 0.9 * (min(q[0, 1].item(), q[1, 1].item()) - 0.5 * logp[1].item()), rel=1e-5)


def test_a_time_limit_is_stored_as_not_terminated_and_a_true_end_as_terminated():
    env = sac.make_envs("InvertedPendulum-v5", 1, gym.vector.AutoresetMode.DISABLED)  # ends when the pole leans over 0.2 rad
    obs, _ = env.reset(seed=0)
    block, _, _ = sac.rollout(env, obs, lambda obs: np.ones((1, 1), np.float32), 40)
    assert 0 < block.terminated.sum() < 40
    ends = np.abs(block.next_obs[:, 0, 1]) > 0.2
    np.testing.assert_array_equal(block.terminated[:, 0], ends)
    pendulum = sac.make_envs("Pendulum-v1", 1, gym.vector.AutoresetMode.DISABLED)      # only ever ends by its limit of 200 steps
    obs, _ = pendulum.reset(seed=0)
    block, _, _ = sac.rollout(pendulum, obs, lambda obs: np.zeros((1, 1), np.float32), 201)
    assert block.terminated.sum() == 0 and not np.array_equal(block.next_obs[199], block.obs[200])


def test_actions_reach_the_environment_in_its_own_units():
    world = World(num_envs=2)
    low, high = (np.unique(sac.to_env(world, np.full((2, 17), a, np.float32))) for a in (-1, 1))
    assert low == pytest.approx([-0.4]) and high == pytest.approx([0.4])


def test_replay_wraps_around():
    replay = sac.Replay(5, 1, 1)
    for start in (0, 3, 6):
        x = np.arange(start, start + 3, dtype=np.float64)
        replay.add(x[:, None], x[:, None] / 10, x, x[:, None] + 1, x * 0)
    assert sorted(replay.data.reward.tolist()) == [4, 5, 6, 7, 8] and replay.size == 5
    sample = replay.sample(100)
    assert sample.obs.shape == (100, 1) and sample.reward.shape == (100,)
    torch.testing.assert_close(sample.obs[:, 0], sample.reward)
    torch.testing.assert_close(sample.next_obs[:, 0], sample.reward + 1)
    with pytest.raises(ValueError, match="does not fit"):
        replay.add(*(np.zeros((6, 1)),) * 2, np.zeros(6), np.zeros((6, 1)), np.zeros(6))


def test_layers_of_the_twin_critic_equal_two_separate_networks():
    critic = sac.Critic(3, 2, hidden=8)
    obs, action = torch.randn(6, 3), torch.rand(6, 2)
    for k in range(2):
        x = torch.cat([obs, action], -1)
        for layer in critic.net:
            x = torch.nn.functional.linear(x, layer.weight[k].T, layer.bias[k, 0]) if isinstance(layer, sac.TwinLinear) else layer(x)
        torch.testing.assert_close(critic(obs, action)[k], x[:, 0])


def test_update_moves_every_part_and_targets_by_tau():
    torch.manual_seed(0)
    agent = sac.SAC(3, 2, tau=0.1, actor_tau=0.2)
    batch = sac.Transitions(torch.randn(32, 3), torch.rand(32, 2), torch.randn(32), torch.randn(32, 3), torch.zeros(32))
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    metrics = agent.update(batch)
    after = agent.state_dict()
    assert all(not value.requires_grad and value.ndim == 0 for value in metrics.values())
    for name in after:
        assert name.endswith(("_mean", "_std")) or not torch.equal(before[name], after[name]), name
        if name.startswith("target_critic"):
            expected = before[name].lerp(after[name.replace("target_", "")], 0.1)
            torch.testing.assert_close(after[name], expected)
        if name.startswith("mean_actor"):
            torch.testing.assert_close(after[name], before[name].lerp(after[name.replace("mean_", "")], 0.2))


def test_acts_with_the_mean_actor_and_a_policy_stays_as_it_was():
    torch.manual_seed(0)
    agent, obs = sac.SAC(3, 2, lr=0.1), torch.randn(5, 3)
    batch = sac.Transitions(torch.randn(32, 3), torch.rand(32, 2), torch.randn(32), torch.randn(32, 3), torch.zeros(32))
    policy = agent.policy()
    before = agent.act(obs, deterministic=True)
    agent.update(batch)
    np.testing.assert_array_equal(policy.act(obs, deterministic=True), before)
    assert np.abs(agent.act(obs, deterministic=True) - before).max() > 0.01
    np.testing.assert_array_equal(agent.act(obs, deterministic=True), agent.actor(obs)[0].tanh().detach().numpy())  # actor_tau is 1
    agent.mean_actor.net[-1].bias[:2] = 100.0
    np.testing.assert_array_equal(agent.act(obs, deterministic=True), np.ones((5, 2)))


def one_of_two_processes(rank, folder):
    """An agent that learns from half of a minibatch, the other half being the other process's."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    agent, batch = an_agent_and_its_batch()
    half = sac.Transitions(*(x.view(2, 32, -1).squeeze(-1)[rank] for x in batch))
    agent.update_critic(half)
    torch.save(agent.critic.state_dict(), f"{folder}/critic{rank}.pt")
    torch.manual_seed(rank)
    agent.fit_scales(half, 0.3)
    agent.update(half)
    torch.save(agent.state_dict(), f"{folder}/agent{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def an_agent_and_its_batch():
    torch.manual_seed(0)
    agent = sac.SAC(3, 2, hidden=16)
    ends = torch.ones(64)  # the target is the reward: nothing is random
    return agent, sac.Transitions(torch.randn(64, 3), torch.rand(64, 2), torch.randn(64), torch.randn(64, 3), ends)


def test_two_processes_with_half_a_minibatch_each_make_the_step_of_the_whole(tmp_path):
    torch.multiprocessing.spawn(one_of_two_processes, (str(tmp_path),), nprocs=2)
    agent, batch = an_agent_and_its_batch()
    agent.update_critic(batch)
    load = lambda name: torch.load(tmp_path / name, weights_only=True)
    for name, value in agent.critic.state_dict().items():
        torch.testing.assert_close(load("critic0.pt")[name], value, atol=1e-6, rtol=0)
    first, second = load("agent0.pt"), load("agent1.pt")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_temperature_falls_when_entropy_is_above_target():
    torch.manual_seed(0)
    agent = sac.SAC(3, 2, temperature=0.5)
    batch = sac.Transitions(torch.randn(64, 3), torch.rand(64, 2), torch.randn(64), torch.randn(64, 3), torch.zeros(64))
    metrics = agent.update(batch)
    assert metrics["entropy"] > agent.target_entropy and metrics["temperature"] < 0.5


def test_fixed_scales_come_from_the_random_phase():
    agent = sac.SAC(3, 2)
    batch = sac.Transitions(5 + 2 * torch.randn(500, 3), torch.rand(500, 2), 0.3 + 0.03 * torch.randn(500), torch.randn(500, 3), torch.zeros(500))
    agent.fit_scales(batch, 0.5)
    scaled = agent.rescale(batch)
    assert scaled.obs.mean().abs() < 1e-4 and scaled.obs.std().item() == pytest.approx(1, abs=0.01)
    assert scaled.reward.mean().abs() < 1e-4 and scaled.reward.std().item() == pytest.approx(0.5, abs=0.01)


def test_sac_learns_to_hold_the_pole_longer():
    torch.manual_seed(0)
    make = lambda n, mode: sac.make_envs("InvertedPendulum-v5", n, mode)
    score = lambda: sac.evaluate(make(10, gym.vector.AutoresetMode.NEXT_STEP), agent, seed=1).mean()
    agent, replay = sac.SAC(4, 1, lr=2e-3, hidden=64), sac.Replay(1200, 4, 1)
    before = score()
    for _ in sac.train(make(1, gym.vector.AutoresetMode.DISABLED), agent, replay, 1200, rollout_steps=20, updates=20, batch_size=128,
                       learning_starts=400, seed=0):
        pass
    assert before < 25 and score() > 45


# ----------------------------------------------------------------------------------------------------------- the whole program

@pytest.mark.parametrize("argv, message", [
    (["--prompt", ""], "prompt is empty"),
    (["--prompt", "x", "--clip", "ViT-bigG-41/laion2b"], "near: ViT-bigG-14"),
    (["--prompt", "x", "--clip", "ViT-B-32/laion2b"], "laion2b_s34b_b79k"),
    (["--prompt", "x", "--clip", "{tmp}/empty"], "needs open_clip_config.json"),
    (["--prompt", "x", "--clip", "{tmp}/weightless"], "open_clip_model.safetensors"),
    (["--prompt", "x", "--alpha", "1.5"], "alpha is 1.5"),
    (["--prompt", "x", "--alpha", "nan"], "alpha is nan"),
    (["--prompt", "a robot", "--baseline", "a robot", "--alpha", "0.5"], "must differ"),
    (["--prompt", "x", "--steps", "0"], "--steps must be at least 1"),
    (["--prompt", "x", "--num-envs", "-2"], "--num-envs must be at least 1"),
    (["--prompt", "x", "--seed", "-1"], "--seed must be at least 0"),
    (["--task", "kneeling", "--out", "{tmp}/empty"], "exists and is not overwritten"),
    (["--prompt", "x", "--reward", "truth"], "--task kneeling"),
    ([], "--prompt"),
    (["--eval", "{tmp}/empty"], "its config.json cannot be read"),
    (["--eval", "{tmp}/empty", "--episodes", "0"], "--episodes must be"),
    (["--task", "flying"], "invalid choice"),
    (["--task", "kneeling", "--landscape", "tail"], "there are abdomen_z"),
    (["--prompt", "a", "b"], "--eval without a run"),
    (["--eval", "--prompt", "a robot"], "add --task kneeling"),
    (["--task", "kneeling", "--steps", "many"], "invalid int value: 'many'"),
    (["--task", "kneeling", "--steps", "100000000000"], "at most 10,000,000,000"),
    (["--task", "kneeling", "--num-envs", "5000"], "at most 4,096"),
    (["--task", "kneeling", "--num-envs", "1.5"], "invalid int value"),
    (["--task", "kneeling", "--seed", "99999999999"], "--seed must be"),
    (["--task", "kneeling", "--alpha", "-0.1"], "alpha is -0.1"),
    (["--task", "kneeling", "--alpha", "half"], "invalid float value"),
    (["--prompt", " \n\t"], "prompt is empty"),
    (["--task", "kneeling", "--baseline", ""], "prompt is empty"),
    (["--prompt"], "expected at least one argument"),
    (["--task", "kneeling", "--clip", ""], "needs open_clip_config.json"),
    (["--task", "kneeling", "--clip", "{tmp}/missing"], "no such folder"),
    (["--task", "kneeling", "--clip", "{tmp}/garbled"], "needs open_clip_config.json"),
    (["--task", "kneeling", "--clip", "{tmp}/truncated"], "open_clip_model.safetensors"),
    (["--task", "kneeling", "--out", "{tmp}/file/run"], "cannot make the folder"),
    (["--task", "kneeling", "--looks", "nice"], "invalid choice"),
    (["--task", "kneeling", "--reward", "sparse"], "invalid choice"),
    (["--prompt", "x", "--env-id", "Antt-v5"], "Antt"),
    (["--prompt", "x", "--env-id", "Blackjack-v1"], "vector observations"),
    (["--prompt", "x", "--env-id", "Hopper-v5", "--looks", "plain"], "Gymnasium draws Hopper-v5"),
    (["--prompt", "x", "--env-id", "Hopper-v5", "--landscape", "foot_joint"], "--landscape is for"),
    (["--prompt", "x", "--env-id", "Hopper-v5", "--alpha", "0.5"], "--baseline"),
    (["--prompt", "a cart", "--env-id", "InvertedPendulum-v5", "--alpha", "0.5"], "--baseline"),
    (["--prompt", "a cart", "--env-id", "InvertedPendulum-v5", "--landscape", "hinge"], "--baseline"),
    (["--prompt", "A humanoid robot", "--alpha", "1"], "must differ"),
    (["--prompt", "a", "humanoid", "robot"], "in quotes"),
    (["--eval", "{tmp}/old", "--alpha", "0.5"], "without other flags"),
    (["--view", "{tmp}/missing"], "is not a run's folder"),
    (["--view", "{tmp}/old", "--eval", "{tmp}/old"], "exclude each other"),
    (["--task", "kneeling", "--lr", "3"], "unrecognized arguments: --lr 3"),
    (["--task", "kneeling", "--landscape", ""], "there are abdomen_z"),
    (["--eval", "{tmp}/missing"], "is not a run's folder"),
    (["--eval", "{tmp}/garbled"], "is not a run's folder"),
    (["--resume", "{tmp}/missing"], "is not a run's folder"),
    (["--resume", "{tmp}/empty"], "is not a run's folder"),
    (["--resume", "{tmp}/garbled"], "is not a run's folder"),
    (["--resume", "{tmp}/old"], "it lacks actor_tau, alpha"),
    (["--resume", "{tmp}/old", "--steps", "5"], "without other flags"),
    (["--resume", "{tmp}/old", "--eval", "{tmp}/old"], "exclude each other"),
])
def test_bad_input_is_one_line_and_exit_code_2(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "weightless").mkdir()
    shutil.copy(TINY_CLIP / "open_clip_config.json", tmp_path / "weightless")
    shutil.copytree(TINY_CLIP, tmp_path / "truncated")
    (tmp_path / "truncated/open_clip_model.safetensors").write_bytes(b"PK" * 100)
    for name, config in (("garbled", "{{"), ("old", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    (tmp_path / "garbled/open_clip_config.json").write_text("{{")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sac, "exit_at_once", sys.exit)
    with pytest.raises(SystemExit) as stop:
        sac.exit_with_one_line(lambda: vlmrm.main([a.format(tmp=tmp_path) for a in argv]))
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_unreachable_hub_says_what_to_do_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # spares the hub's client its 45 s of retries
    with pytest.raises(UsageError, match="hub.*Offline.*tiny_clip"):
        CLIPReward("x", clip="ViT-B-32/laion2b_s34b_b79k")


def run(*argv, cwd, **env):
    import os
    heed_ctrl_c = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background inherits deafness
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=cwd, env=os.environ | env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c)


def test_random_weights_only_when_asked_for():
    torch.manual_seed(0)
    reward = CLIPReward("a dog", clip="RN50-quickgelu/", random_weights=True)
    assert reward(np.zeros((1, 224, 224, 3), np.uint8)).isfinite().all() and reward.image_size == 224
    with pytest.raises(UsageError, match="no pretrained tag"):
        CLIPReward("a dog", clip="RN50-quickgelu/")


@pytest.mark.parametrize("argv, expected", [(["--task", "kneeling"], "libegl1"), (["--env-id", "Hopper-v5", "--prompt", "a robot"], "cannot be drawn")])
def test_no_opengl_says_what_to_install(argv, expected, tmp_path):
    code = ("import sys, builtins, importlib.abc\n"
            "class Missing(importlib.abc.MetaPathFinder):\n"
            "    def find_spec(self, name, *rest):\n"
            "        if name.startswith('OpenGL'): raise ImportError('libEGL.so.1 not found')\n"
            "sys.meta_path.insert(0, Missing())\n"
            f"sys.path.insert(0, {str(HERE)!r})\n"
            "import sac, vlmrm\n"
            f"sac.exit_with_one_line(lambda: vlmrm.main({argv}))\n")
    process = run("-c", code, cwd=tmp_path, MUJOCO_GL="egl" if "Hopper-v5" in argv else "")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and expected in err and "Traceback" not in err and not list(tmp_path.iterdir())


def test_training_end_to_end_and_a_second_run_beside_the_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for overrides in (vlmrm.LESSON, vlmrm.CLASSIC):
        monkeypatch.setitem(overrides, "updates", 4)
    monkeypatch.setattr(vlmrm, "TEST_EPISODES", 2)
    vlmrm.main(["--prompt", "a humanoid robot kneeling", "--steps", "800", "--num-envs", "2"])
    vlmrm.main(["--task", "kneeling", "--reward", "truth", "--steps", "400", "--num-envs", "2"])
    vlmrm.main(["--task", "cartpole", "--alpha", "0.5", "--steps", "800", "--num-envs", "2", "--out", "cart"])
    first, second, cart = Path("runs/a-humanoid-robot-kneeling"), Path("runs/a-humanoid-robot-kneeling-2"), Path("cart")
    for folder, rows in ((first, 4), (second, 2), (cart, 2)):
        progress = list(csv.DictReader(open(folder / "progress.csv")))
        assert len(progress) == rows and float(progress[-1]["loss_q"]) > 0 and progress[-1]["test_return"]
        assert json.loads((folder / "config.json").read_text())["num_envs"] == 2
        assert torch.load(folder / "best.pt", weights_only=True)["step"] <= int(progress[-1]["step"])
    assert Image.open(first / "film.png").size == (1920, 192)
    assert Image.open(first / "film.gif").n_frames > 50 and Image.open(first / "curve.png").size == (640, 240)
    out = capsys.readouterr().out
    assert out.count("success rate") == 3 and "1 update per" in out and "lesson" in out


def test_epic_and_auroc_against_closed_forms_and_counting():
    rng = np.random.default_rng(0)
    goal, reward = rng.random(200) < 0.3, rng.integers(0, 9, 200) / 9.0
    assert vlmrm.epic(3 * goal - 1.0, goal) == pytest.approx(0, abs=1e-6) and vlmrm.epic(-2.0 * goal, goal) == pytest.approx(1)
    z = lambda x: (x - x.mean()) / x.std()  # for standardised rewards EPIC is half their root mean square distance
    assert vlmrm.epic(reward, goal) == pytest.approx(np.sqrt(((z(reward) - z(goal.astype(float))) ** 2).mean()) / 2)
    pairs = [(a > b) + 0.5 * (a == b) for a in reward[goal] for b in reward[~goal]]
    assert vlmrm.auroc(reward, goal) == pytest.approx(np.mean(pairs))
    assert math.isnan(vlmrm.epic(reward, goal & False)) and math.isnan(vlmrm.auroc(reward, goal & False))
    assert vlmrm.hacked(np.arange(1, 6), np.array([True, False, False, False, True]), 2) == 0.4


def test_eval_of_a_run_prints_a_table_and_writes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vlmrm.CLASSIC, "updates", 2)
    monkeypatch.setattr(vlmrm, "TEST_EPISODES", 2)
    vlmrm.main(["--task", "cartpole", "--steps", "800", "--num-envs", "2", "--out", "cart"])
    vlmrm.main(["--eval", "cart", "--episodes", "3"])
    result = json.loads(Path("cart/eval.json").read_text())
    assert result["episodes"] == 3 and [row["alpha"] for row in result["alphas"]] == [0, 0.25, 0.5, 0.75, 1]
    assert 0 <= result["success"] <= 1 and all(0 <= row["epic"] <= 1 and 0 <= row["auroc"] <= 1 for row in result["alphas"])
    assert "3 deterministic episodes" in capsys.readouterr().out
    config = json.loads(Path("cart/config.json").read_text())
    Path("cart/config.json").write_text(json.dumps(config | {"task": None, "prompt": "a cart"}))
    with pytest.raises(UsageError, match="no criterion for 'a cart'"):
        vlmrm.main(["--eval", "cart"])


@pytest.mark.parametrize("task", TASKS)
def test_labelled_states_are_of_both_kinds(task):
    states = vlmrm.labelled_states(task)
    world = vlmrm.make_world(vlmrm.parse(["--task", task]), len(states), 64)
    world.set_state(states)
    assert 0.05 < TASKS[task].goal(world).mean() < 0.7


def test_labelled_states_are_the_same_for_everyone():
    np.testing.assert_array_equal(vlmrm.labelled_states("one-leg"), vlmrm.labelled_states("one-leg"))


def test_models_and_prompts_are_compared_without_a_run(capsys, monkeypatch):
    vlmrm.main(["--eval", "--task", "cartpole", "--clip", "tiny_clip", "tiny_clip", "--prompt", "balanced pole on the cart", "fallen pole and cart"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "tiny_clip" in line]
    assert len(rows) == 4 and rows[:2] == rows[2:] and rows[0].endswith("balanced pole on the cart")
    world = World("InvertedPendulum-v5", 1000, 64, "plain")
    world.set_state(vlmrm.labelled_states("cartpole"))
    frames, goal = world.render(), TASKS["cartpole"].goal(world)
    for row, prompt in zip(rows, ("balanced pole on the cart", "fallen pole and cart")):
        for i, alpha in ((0, 0.0), (2, 0.5), (4, 1.0)):
            reward = CLIPReward(prompt, "pole and cart", alpha)(frames).numpy()
            assert row.split()[2 * i:2 * i + 2] == [f"{vlmrm.epic(reward, goal):.3f}", f"({vlmrm.auroc(reward, goal):.3f})"]


def test_landscape_is_the_reward_along_a_joint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vlmrm.main(["--landscape", "hinge", "--task", "cartpole"])
    vlmrm.main(["--landscape", "left_knee", "--task", "kneeling", "--out", "knee"])
    pole, knee = (np.genfromtxt(folder / "landscape.csv", delimiter=",", names=True)
                  for folder in (Path("runs/pole-vertically-upright-on-top-of-the-cart-hinge"), Path("knee")))
    assert abs(pole["hinge"][pole["alpha_00"].argmax()]) < 0.1 and len(knee) == 101
    world = World("Humanoid-v5", 1, 64, "plain")
    world.set_state(posture(world.model, **(KNEEL | dict(left_knee=np.degrees(knee["left_knee"][70]))))[None])
    expected = CLIPReward(TASKS["kneeling"].prompt, alpha=0.75)(world.render()).item()
    assert knee["alpha_075"][70] == pytest.approx(expected, abs=1e-4)
    assert Image.open("knee/landscape.png").size == (640, 240)
    vlmrm.main(["--landscape", "hinge", "--task", "kneeling", "--env-id", "InvertedPendulum-v5", "--baseline", "a cart", "--out", "other"])
    assert Path("other/landscape.csv").exists()  # the task's posture is of another body


@pytest.mark.parametrize("argv, expected", [
    ([], dict(clip=str(TINY_CLIP), looks="plain", steps=256_000, updates=400, lr_decay=True)),
    (["--paper"], dict(clip=str(TINY_CLIP), looks="plain", updates=100, batch_size=512, learning_starts=50_000, gamma=0.95, tau=0.005,
                       actor_tau=1.0, lr=6e-4, lr_decay=False, temperature=1.0, layer_norm=False, reward_std=None)),
    (["--paper", "--clip", "ViT-bigG-14/laion2b_s39b_b160k"], dict(looks="paper", steps=10_000_000, num_envs=32, reset_noise_scale=0.01)),
    (["--clip", str(TINY_CLIP / "looks-paper"), "--looks", "paper"], dict(looks="paper", steps=256_000, replay=300_000)),
    (["--clip", "ViT-B-32/laion2b_s34b_b79k", "--steps", "5"], dict(looks="paper", steps=5, updates=400)),
    (["--env-id", "InvertedPendulum-v5", "--steps", "7"], dict(num_envs=16, gamma=0.99, steps=7)),
    (["--task", "cartpole", "--paper"], dict(rollout_steps=200, gamma=0.95, num_envs=32)),
])
def test_settings_follow_from_the_flags(argv, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = vars(vlmrm.parse(["--prompt", "a humanoid robot kneeling", *argv]))
    assert {name: config[name] for name in expected} == expected


def test_training_labels_with_the_picture_of_the_state_that_was_reached():
    world = World("InvertedPendulum-v5", 2, 64, "plain")
    reward = CLIPReward(TASKS["cartpole"].prompt, TASKS["cartpole"].baseline)
    agent, replay = sac.SAC(4, 1, hidden=16), sac.Replay(1000, 4, 1)
    for it in sac.train(world, agent, replay, 400, rollout_steps=200, updates=1, batch_size=16, learning_starts=0,
                        label=reward):
        pass
    check = World("InvertedPendulum-v5", 400, 64, "plain")
    next_obs = replay.data.next_obs[:400].double().numpy()
    check.set_state(next_obs[:, :2], next_obs[:, 2:])
    # Stored observations are float32, so a few pixels may differ by one step of brightness.
    torch.testing.assert_close(replay.data.reward[:400], reward(check.render()), atol=0.02, rtol=0)


README = (HERE / "README.md").read_text()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"(?<!mj)python ((?:vlmrm|sac)\.py [^`\n]*)", README))))
def test_every_command_of_the_readme_runs_in_short(command, tmp_path, monkeypatch, egl):
    monkeypatch.chdir(tmp_path)
    for name, scene in vlmrm.SCENES.items():
        monkeypatch.setitem(vlmrm.SCENES, name, scene._replace(episode_length=10))
    for settings in (vlmrm.PAPER, vlmrm.FEWER, vlmrm.CLASSIC):
        monkeypatch.setitem(settings, "rollout_steps", 10)
        monkeypatch.setitem(settings, "updates", 1)
    monkeypatch.setattr(vlmrm, "TEST_EPISODES", 1)
    monkeypatch.setattr("mujoco.viewer.launch_passive", lambda model, data: SimpleNamespace(is_running=lambda: False))
    shutil.copytree(TINY_CLIP, "tiny_clip")
    for sibling in ("width-8", "width-12", "looks-paper"):
        shutil.copytree(TINY_CLIP, f"tiny_clip/{sibling}", ignore=shutil.ignore_patterns("width-*", "looks-*"), dirs_exist_ok=True)
    monkeypatch.setattr(vlmrm, "TINY_CLIP", tmp_path / "tiny_clip")
    short = ["--steps", "40", "--num-envs", "2"]
    if "runs/" in command:
        vlmrm.main(["--task", "kneeling", *short])
    if "mountaincar" in command:
        pytest.importorskip("pygame")
    program, *argv = shlex.split(command)
    if program == "sac.py":
        sac.main([*argv, "--steps", "300"])
        return
    if "--help" in argv:
        with pytest.raises(SystemExit, match="0"):
            vlmrm.main(argv)
        return
    training = not {"--eval", "--landscape", "--view", "--resume"} & set(argv)
    vlmrm.main([*argv, *short] if training else argv)
    if training:
        folder, = Path("runs").iterdir()
        assert float(list(csv.DictReader(open(folder / "progress.csv")))[-1]["loss_q"]) > 0


def test_make_trains_and_saves_a_folder_that_loads_as_any_other(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TINY_CLIP)
    import make
    world, rng = World("Humanoid-v5", 1), np.random.default_rng(0)
    poses = np.stack([posture(world.model, **TASKS[name].posture) for name in ("kneeling", "standing", "lotus", "splits")] * 3)
    frames, truth = make.pictures("Humanoid-v5", poses)
    assert [make.CONCEPTS[i] for i in truth[:4, :9].argmax(1)] == ["kneeling", "standing", "lotus", "splits"]
    model = make.new_model()
    before = [p.detach().clone() for p in model.parameters()]
    make.fit(model, frames, truth, 2, 1e-3, rng, batch=8)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before) if p.ndim > 1)
    make.save(model, tmp_path / "clip")
    expected = make.score(model, frames, TASKS["lotus"].prompt)
    np.testing.assert_allclose(CLIPReward(TASKS["lotus"].prompt, clip=str(tmp_path / "clip"))(frames), expected, atol=0.02)


def test_the_benchmark_measures_ways_in_turns(egl, monkeypatch, capsys):
    monkeypatch.syspath_prepend(HERE / "bench")
    import speed
    reward = CLIPReward("a robot kneeling")
    speed.sac_updates(1, 8, 4, n=2)
    speed.picture_model(1, reward, str(TINY_CLIP), 2)
    speed.iteration(1, reward, vlmrm.FEWER | dict(looks="plain", num_envs=2, rollout_steps=2, updates=3, batch_size=4, hidden=8))
    out = capsys.readouterr().out
    ratios = [float(ratio) for ratio in re.findall(r"([\d.]+) x$", out, re.M)]
    assert 1.0 in ratios and min(ratios) > 0 and "their sum is" in out


def test_torchrun_trains_together_and_writes_one_folder(tmp_path):
    argv = "-m torch.distributed.run --nproc-per-node 2".split()
    process = run(*argv, HERE / "vlmrm.py", "--task", "cartpole", "--num-envs", "4", "--steps", "800", cwd=tmp_path)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    rows = list(csv.DictReader(open(tmp_path / "runs/pole-vertically-upright-on-top-of-the-cart/progress.csv")))
    assert [row["step"] for row in rows] == ["800"] and float(rows[-1]["loss_q"]) > 0
    assert out.count("success rate") == 1 and "2 processes" in out and len(list((tmp_path / "runs").iterdir())) == 1


def test_same_seed_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vlmrm.CLASSIC, "updates", 4)
    monkeypatch.setattr(vlmrm, "TEST_EPISODES", 2)
    for out in ("a", "b"):
        vlmrm.main(["--task", "cartpole", "--steps", "800", "--num-envs", "2", "--out", out])
    a, b = (torch.load(f"{out}/last.pt", weights_only=True)["agent"] for out in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def small_run(folder):
    """A run of seconds, with a checkpoint every second iteration, that has not begun: its folder with config.json."""
    config = vars(vlmrm.parse(["--task", "cartpole", "--reward", "truth", "--num-envs", "2", "--steps", "3200"])) | dict(
        updates=10, eval_every=800, learning_starts=800, replay=1500)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ("goal", "resume", "eval", "landscape")}))
    return folder


def outcome(folder):
    """What two runs that are equal to the bit have in common: all but the seconds."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(open(folder / "progress.csv"))]
    last, best = (torch.load(folder / name, weights_only=True) for name in ("last.pt", "best.pt"))
    return rows, last["rows"] + list(last["agent"].values()) + list(best["agent"].values())


def assert_same(a, b):
    assert a[0] == b[0] and len(a[1]) == len(b[1]) and all(map(torch.equal, a[1], b[1]))


RESUME = ("import sys, sac, vlmrm\nvlmrm.TEST_EPISODES = 2\n"
          "sac.exit_with_one_line(lambda: vlmrm.main(['--resume', sys.argv[1]]))")


def test_resumed_after_kill_9_and_sigterm_it_ends_as_if_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(vlmrm, "TEST_EPISODES", 2)
    whole, killed = small_run(tmp_path / "whole"), small_run(tmp_path / "killed")
    vlmrm.main(["--resume", str(whole)])
    for stop, after in ((signal.SIGKILL, 2), (signal.SIGTERM, 4)):
        process = run("-c", RESUME, killed, cwd=tmp_path, PYTHONPATH=str(HERE))
        deadline = time.time() + 120
        while time.time() < deadline and process.poll() is None:
            progress = killed / "progress.csv"
            if progress.exists() and len(progress.read_text().splitlines()) > after + 1:
                break
            time.sleep(0.01)
        process.send_signal(stop)
        start = time.time()
        err = process.communicate(timeout=60)[1]
        assert process.returncode != 0, "it had ended before it could be interrupted"
        if stop == signal.SIGTERM:
            assert f"--resume {killed}" in err and "Traceback" not in err and time.time() - start < 5
    vlmrm.main(["--resume", str(killed)])
    assert_same(outcome(killed), outcome(whole))


@pytest.mark.parametrize("moment", [1, 35, 65])
def test_interrupted_between_any_two_updates_it_goes_on_to_the_bit(moment, tmp_path, monkeypatch):
    monkeypatch.setattr(vlmrm, "TEST_EPISODES", 2)
    whole, stopped = small_run(tmp_path / "whole"), small_run(tmp_path / "stopped")
    vlmrm.main(["--resume", str(whole)])
    update, count = sac.SAC.update, 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count in (moment, moment + 3):
            raise KeyboardInterrupt
        return update(*args)
    monkeypatch.setattr(sac.SAC, "update", interrupted)
    for _ in range(2):  # the second time in the iteration with which it resumed
        with pytest.raises(KeyboardInterrupt):
            vlmrm.main(["--resume", str(stopped)])
    vlmrm.main(["--resume", str(stopped)])
    assert_same(outcome(stopped), outcome(whole))


def test_interrupted_while_a_full_replay_overwrites_its_oldest_rows_it_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(vlmrm, "TEST_EPISODES", 2)
    whole, stopped = small_run(tmp_path / "whole"), small_run(tmp_path / "stopped")
    vlmrm.main(["--resume", str(whole)])
    add, count = sac.Replay.add, 0

    def interrupted(*args):
        nonlocal count
        count += 1
        add(*args)
        if count == 6:
            raise KeyboardInterrupt
    monkeypatch.setattr(sac.Replay, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vlmrm.main(["--resume", str(stopped)])
    vlmrm.main(["--resume", str(stopped)])
    assert_same(outcome(stopped), outcome(whole))


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch, capsys):
    path = tmp_path / "last.pt"
    assert vlmrm.save(path, {"step": 1})

    def full(file):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.fsync", full)
    assert not vlmrm.save(path, {"step": 2})
    assert vlmrm.load(path, dict) == {"format": vlmrm.FORMAT, "step": 1} and list(tmp_path.iterdir()) == [path]
    assert "No space left on device" in capsys.readouterr().err


class Malice:
    def __reduce__(self):
        return Path.touch, (Path("hacked"),)


@pytest.mark.parametrize("content, message", [
    (b"", "damaged"), (b"PK", "damaged"), (None, "damaged"), ({"format": 0}, "format 0"), ({"step": 3}, "KeyError"), ([1], "TypeError"),
    ({"format": vlmrm.FORMAT, "agent": Malice()}, "damaged"), ({"format": vlmrm.FORMAT, "agent": {}}, "does not fit"), ({"format": vlmrm.FORMAT}, "does not fit"),
    ({"format": vlmrm.FORMAT, "agent": {"log_temperature": torch.zeros(3)}}, "does not fit"),
])
def test_files_from_others_are_refused_and_run_nothing(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = small_run(tmp_path / "run")
    if isinstance(content, (dict, list)):
        torch.save(content, folder / "last.pt")
    else:
        torch.save({"format": vlmrm.FORMAT, "agent": torch.zeros(1000)}, folder / "last.pt")
        (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:2000] if content is None else content)  # None: truncated
    with pytest.raises(UsageError, match=message):
        vlmrm.main(["--resume", str(folder)])
    assert not Path("hacked").exists()


@pytest.mark.parametrize("broken", ["observation", "reward"])
def test_a_value_that_is_not_finite_is_named_and_never_stored(broken):
    env = sac.make_envs("Pendulum-v1", 3, gym.vector.AutoresetMode.DISABLED)
    step, count = env.step, 0

    def diverging(action):
        nonlocal count
        count += 1
        obs, reward, *rest = step(action)
        if count == 7:
            (obs if broken == "observation" else reward)[2] = np.nan
        return obs, reward, *rest
    env.step = diverging
    replay = sac.Replay(100, 3, 1)
    with pytest.raises(RunError, match=f"{broken} of simulation 2 is not finite in step 2 of the rollout after 15 transitions"):
        list(sac.train(env, sac.SAC(3, 1, hidden=8), replay, 60, rollout_steps=5, updates=1, batch_size=4, learning_starts=10))
    assert replay.size == 15 and all(store.isfinite().all() for store in replay.data)


def test_a_loss_that_is_not_finite_stops_the_run():
    env = sac.make_envs("Pendulum-v1", 3, gym.vector.AutoresetMode.DISABLED)
    agent = sac.SAC(3, 1, hidden=8, lr=1e30)
    with pytest.raises(RunError, match="no longer finite"):
        list(sac.train(env, agent, sac.Replay(100, 3, 1), 60, rollout_steps=5, updates=5, batch_size=4, learning_starts=10))


def test_a_renderer_that_hangs_is_named(tmp_path):
    code = ("import sys, time, sac, vlmrm\nvlmrm.PATIENCE = 1\nvlmrm.Painter.paint = lambda self, states: time.sleep(1000)\n"
            "sac.exit_with_one_line(lambda: vlmrm.main(['--task', 'cartpole', '--num-envs', '1']))")
    process = run("-c", code, cwd=tmp_path, PYTHONPATH=str(HERE))
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "renderer has not answered" in err and "Traceback" not in err and not list(tmp_path.iterdir())


def test_ctrl_c_ends_a_run_whose_renderer_hangs(tmp_path):
    code = ("import sys, time, sac, vlmrm\nvlmrm.Painter.paint = lambda self, states: print('drawing', flush=True) or time.sleep(1000)\n"
            "sac.exit_with_one_line(lambda: vlmrm.main(['--task', 'cartpole', '--num-envs', '1']))")
    process = run("-c", code, cwd=tmp_path, PYTHONPATH=str(HERE))
    while "drawing" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130


def test_mujocos_own_bad_setting_is_one_line(tmp_path):
    process = run(HERE / "vlmrm.py", "--help", cwd=tmp_path, MUJOCO_GL="foo")
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and err.startswith("error: MuJoCo does not load with MUJOCO_GL=foo") and err.count("\n") == 1


def test_ctrl_c_says_how_to_go_on(tmp_path):
    process = run(HERE / "vlmrm.py", "--task", "cartpole", "--num-envs", "2", cwd=tmp_path)
    folder, deadline = tmp_path / "runs/pole-vertically-upright-on-top-of-the-cart", time.time() + 180
    while not (folder / "progress.csv").exists() or len((folder / "progress.csv").read_text().splitlines()) < 2:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=5)
    assert process.returncode == 130 and "--resume runs/" in err and "Traceback" not in err and (folder / "last.pt").exists()


def test_sac_command_line_ends_with_the_mean_return(tmp_path):
    process = run(HERE / "sac.py", "--env-id", "Pendulum-v1", "--steps", "300", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines()[-1].startswith("mean return over 20 deterministic episodes: -")


@pytest.mark.parametrize("argv, message", [(["--env-id", "CartPole-v1"], "Box"), (["--env-id", "Pendulumm-v1"], "Pendulum"),
                                           (["--steps", "0"], "--steps")])
def test_sac_command_line_bad_input(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(sac, "exit_at_once", sys.exit)
    with pytest.raises(SystemExit) as stop:
        sac.exit_with_one_line(lambda: sac.main(argv))
    assert stop.value.code == 2 and message in capsys.readouterr().err
