"""Tests by oracles (other libraries, closed forms, Gymnasium) and short real runs. Run: pytest"""

import copy
import csv
import json
import logging
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: CLIP in float32, and the lesson's settings
os.environ.setdefault("OMP_NUM_THREADS", "1")  # these networks are too small for more
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded

import gymnasium as gym
import numpy as np
import open_clip
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.nn.functional import mse_loss, normalize
from torch.testing import assert_close

import sac
import vlmrm
from sac import UsageError
from vlmrm import CARTPOLE, LESSON, PAPER, TINY_CLIP, CLIPReward, MujocoEnv, World

HERE = Path(__file__).resolve().parent
README = (HERE / "README.md").read_text()
KNEELING = "a humanoid robot kneeling"
upright = partial(CLIPReward, "pole vertically upright on top of the cart", "pole and cart")
UPRIGHT = upright()
PENDULUM = "InvertedPendulum-v5"
SHORT = """--steps 40 --num-envs 2 --episode-length 10 --updates 3 --batch-size 16
--learning-starts 20""".split()
configure = partial(vlmrm.configure, clip="tiny_clip")
multiprocessing.set_forkserver_preload(["vlmrm"])  # imported once


def random_pictures(n, height, width):
    """Noise, in which missing antialiasing shows: uint8 (n, height, width, 3)."""
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)


# --- the reward


@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 0.9, 1])
def test_reward_equals_the_matrix_form_of_eq_3(alpha):
    torch.manual_seed(0)
    s, g, b = normalize(torch.randn(52, 32).double(), dim=-1).split([50, 1, 1])
    d = (g - b).T
    proj = g + (s - g) @ (d @ d.T / (d.T @ d))  # onto the line through b and g
    expected = 1 - 0.5 * (alpha * proj + (1 - alpha) * s - g).square().sum(-1)
    got = vlmrm.goal_baseline_reward(s.float(), g[0].float(), b[0].float(), alpha)
    assert_close(got.double(), expected, atol=1e-5, rtol=0)
    if alpha == 0:  # Eq. 2
        assert_close(expected, torch.cosine_similarity(s, g))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_preprocessing_is_the_models_own_and_no_part_of_a_wide_picture_is_cut(mode, tmp_path):
    folder = shutil.copytree(TINY_CLIP, tmp_path / "clip")
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    settings = config["preprocess_cfg"] = dict(
        resize_mode=mode, mean=[0.1, 0.2, 0.3], std=[0.3] * 3
    )
    path.write_text(json.dumps(config))
    reward = CLIPReward(KNEELING, clip=folder)
    own = open_clip.create_model_from_pretrained(f"local-dir:{folder}")[1]
    squash = PreprocessCfg(**settings | dict(resize_mode="squash"), size=64)
    whole = image_transform_v2(squash, is_train=False)
    for width, transform in ((64, own), (48, own), (400, own), (600, whole)):
        frames = random_pictures(3, min(width, 400), width)
        theirs = [transform(Image.fromarray(frame)) for frame in frames]
        assert_close(reward.preprocess(torch.from_numpy(frames)), torch.stack(theirs))


def test_clip_reward_equals_open_clip_step_by_step():
    prompts, baseline = [KNEELING, "a picture of a yellow hill"], "a humanoid robot"
    reward = CLIPReward(prompts, baseline, alpha=0.3)
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{TINY_CLIP}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{TINY_CLIP}")
    frames = random_pictures(300, 64, 64)  # more than are encoded at once
    with torch.no_grad():
        pictures = torch.stack([transform(Image.fromarray(frame)) for frame in frames])
        s = model.eval().encode_image(pictures, normalize=True)
        *g, b = model.encode_text(tokenizer([*prompts, baseline]), normalize=True)
    g = (g[0] + g[1]) / (g[0] + g[1]).norm()
    got = reward(frames)
    assert not got.requires_grad
    assert_close(reward.embed(frames), s, atol=1e-5, rtol=0)
    assert_close(got, vlmrm.goal_baseline_reward(s, g, b, 0.3), atol=1e-5, rtol=0)
    assert torch.equal(reward(frames[:, ::-1]), reward(frames[:, ::-1].copy()))  # any strides


def test_a_random_model_is_the_same_each_time_always_in_eval_mode_and_only_its_image_tower():
    reward, again = (CLIPReward("a dog", clip="RN50-quickgelu/random") for _ in range(2))
    frames = random_pictures(2, reward.image_size, 224)
    expected = reward(frames)
    torch.nn.Sequential(again).train()  # it has batch normalisation
    assert torch.equal(again(frames), expected)
    assert {name.split(".")[0] for name, _ in reward.named_parameters()} == {"visual"}


def test_a_reward_does_not_depend_on_the_callers_settings_and_leaves_them():
    frames = random_pictures(2, 80, 80)
    expected = UPRIGHT(frames)
    torch.set_default_dtype(torch.float64)
    logging.disable(7)
    try:
        assert_close(upright()(frames), expected)
        assert torch.get_default_dtype() == torch.float64 and logging.root.manager.disable == 7
    finally:
        torch.set_default_dtype(torch.float32)
        logging.disable(0)


def test_a_reward_can_be_pickled_and_split_among_devices():
    frames, same, seen = random_pictures(5, 64, 64), pickle.loads(pickle.dumps(UPRIGHT)), []
    expected = UPRIGHT(frames)
    same.visual.register_forward_pre_hook(lambda tower, x: seen.append((tower, len(x[0]))))
    assert_close(vlmrm.split_reward(same, ["cpu", "cpu"])(frames), expected)
    assert [n for _, n in seen] == [3, 2] and len({tower for tower, _ in seen}) == 2


@pytest.mark.parametrize(
    "kind", ["float32 2 64 64 3", "uint8 64 64 3", "uint8 2 64 64 4", "uint8 2 3 64 64", "object 2"]
)
def test_wrong_pictures_are_refused_in_one_line(kind):
    dtype, *shape = kind.split()
    frames = np.zeros([int(n) for n in shape], dtype)
    with pytest.raises(UsageError, match=r"^pictures are uint8 \(N, H, W, 3\).* not " + dtype):
        vlmrm.split_reward(UPRIGHT, ["cpu"])(frames)


def test_words_that_the_model_does_not_read_are_named_in_one_line(capsys):
    CLIPReward([KNEELING.upper(), "robot, " * 11])  # all that fits
    assert capsys.readouterr().err == ""
    for prompt, unread in (
        ("a humanoid robot juggling flamingos", "juggling flamingos"),
        (KNEELING + " and standing" * 10 + " on one leg", " on one leg"),
        ("robot " * 21 + "humanoid", "does not read humanoid:"),  # "human" fits
    ):
        CLIPReward(prompt)
        line = capsys.readouterr().err
        assert line.startswith("warning: ") and unread in line
        assert line.count("\n") == 1 and "kneeling" not in line


def test_copied_alone_it_says_where_tiny_clip_is_to_be_had(tmp_path):
    alone = runpy.run_path(shutil.copy(HERE / "vlmrm.py", tmp_path))
    with pytest.raises(UsageError, match="tiny_clip from vlmrm's repository"):
        alone["main"](["--prompt", KNEELING])


# --- any environment with a reward of its picture


class Toy(gym.Env):
    """A column of light; observed: x in millionths, a clock, a constant."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def __init__(self, render_mode=None, shape=()):
        self.render_mode, self.side = render_mode, 64
        self.action_space = gym.spaces.Box(-2, 3, shape)

    def observe(self):
        info = {"history": np.zeros(self.np_random.integers(1, 9))}  # of changing length
        return np.array([1e-6 * self.x, 1.7e9 + self.time, 5.0]), info

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.time = self.np_random.uniform(-0.1, 0.1), 0
        return self.observe()

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time, self.x = self.time + 1, self.x + 0.1 * np.mean(action)
        obs, info = self.observe()
        return obs, 0.0, False, False, info

    def render(self):
        frame = np.zeros((self.side, self.side, 3), np.uint8)
        frame[:, int(32 + 8 * self.x) % self.side] = 255
        return frame


gym.register("Scalar-v0", Toy)
gym.register("Matrix-v0", Toy, kwargs={"shape": (2, 2)})


def make(n=0, env_id=PENDULUM, mode="sync", **asked):
    asked = dict(render_mode="rgb_array", width=80, height=80) | asked
    return gym.make_vec(env_id, n, mode, **asked) if n else gym.make(env_id, **asked)


def wrap(n, **asked):
    return (vlmrm.WithCLIPRewards if n else vlmrm.WithCLIPReward)(make(n, **asked), UPRIGHT)


def push(env, disturb=int):
    """The rewards of three steps."""
    env.reset(seed=0)
    rewards = []
    for force in (1.0, -1.0, 1.0):
        disturb()
        rewards.append(env.step(np.full(env.action_space.shape, force, np.float32))[1])
    return np.stack(rewards)


@pytest.mark.parametrize("n", [0, 2])
def test_rewards_are_the_same_alone_and_while_others_draw_in_the_process(n):
    alone = wrap(2, mode="async", vector_kwargs={"context": "forkserver"})  # in their own processes
    expected = push(alone)[:, : max(1, n)]
    alone.close(terminate=True)
    world, others = World(configure(), 1, 32), [make(env_id="Hopper-v5") for _ in range(4)]
    for env in (world, *others):
        env.reset()
        env.render()

    def disturb():
        others.pop()  # collected while another's context is current
        world.render()

    rewards = push(wrap(n), disturb)
    assert np.ptp(expected) > 1e-4
    np.testing.assert_allclose(rewards.reshape(expected.shape), expected, atol=1e-5)


def test_a_wrapped_environment_passes_gymnasiums_check_and_can_be_made_again():
    env = wrap(0)
    again = gym.make(env.spec)
    np.testing.assert_array_equal(push(again), push(env))
    check_env(again, skip_render_check=True)


SAME_STEP = dict(vector_kwargs={"autoreset_mode": "SameStep"})


@pytest.mark.parametrize("n, asked", [(0, {"render_mode": None}), (2, SAME_STEP)])
def test_environments_that_do_not_draw_each_step_alike_are_refused(n, asked):
    with pytest.raises(UsageError, match='InvertedPend.*"rgb_array", not SAME_STEP'):
        wrap(n, **asked)


def test_the_readmes_example_with_stable_baselines3_runs():
    pytest.importorskip("stable_baselines3")
    example = re.search(r"(    .*\n|\n)*    .*WithCLIPReward.*\.learn\([\d_]+\)\n", README)[0]
    exec("if True:\n" + re.sub(r"learn\(.*", "learn(110)", example), {})


# --- the world is Gymnasium's, and so are its pictures

WORLDS = "Ant HalfCheetah Hopper InvertedDoublePendulum InvertedPendulum Humanoid Reacher".split()


@pytest.mark.parametrize("name", [*WORLDS, "Humanoid plain", "Humanoid paper"])
def test_world_equals_gymnasium_bit_for_bit_and_so_do_undressed_pictures(name):
    name, looks = f"{name} original".split()[:2]
    env_id, asked = f"{name}-v5", vlmrm.HUMANOID if name == "Humanoid" else {}
    world = World(configure(env_id=env_id, looks=looks), 2, 48)
    world.action_space.seed(0)
    actions = [world.action_space.sample() for _ in range(25)]
    got, frames = [world.reset(seed=7)[0]], [world.render()]
    for action in actions:
        obs, *nothing, _ = world.step(action)
        assert not np.any(nothing)  # no reward, and no end
        got.append(obs)
    frames.append(world.render())
    for i in range(2):
        theirs = make(env_id=env_id, width=48, height=48, **asked)
        theirs = gym.wrappers.RescaleAction(theirs, np.float32(-1), np.float32(1))
        theirs.reset(seed=0)
        theirs.render()  # its camera looks at the middle of the first state that it draws, for good
        expected, pictures = [theirs.reset(seed=7 + i)[0]], [theirs.render()]
        expected += [theirs.step(action[i])[0] for action in actions]
        pictures.append(theirs.render())
        np.testing.assert_array_equal(np.stack(got)[:, i], expected)
        same = np.array_equal(np.stack(frames)[:, i], pictures)
        assert same == (looks == "original") and np.std(frames) > 3


XML = """<mujoco><worldbody><light pos="0 0 3"/><camera name="top" pos="0 0 4"/>
<body><joint name="x" type="slide" axis="1 0 0"/><geom size=".2"/></body>
<body name="goal" mocap="true"><geom size=".3" rgba="1 0 0 1"/></body><site name="mark" size=".3"/>
</worldbody><actuator><motor joint="x" ctrlrange="-1 1"/></actuator></mujoco>"""


class Goals(MujocoEnv):
    """A ball; goals of three kinds, seen from above."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(self, path, **asked):
        space = gym.spaces.Box(-np.inf, np.inf, (1,))
        super().__init__(path, 10, space, camera_name="top", width=48, height=48, **asked)

    def reset_model(self):
        self.set_state(self.init_qpos, self.init_qvel)
        self.data.mocap_pos[0, 0], self.model.site_pos[0, 0] = self.np_random.uniform(-1, 1, 2)
        self.model.geom_rgba[1, :3] = self.np_random.uniform(size=3)
        return self.data.qpos

    def step(self, action):
        self.do_simulation(action, self.frame_skip)
        return self.data.qpos, 0.0, False, False, {}


class Mirror(Goals):
    def render(self):
        return super().render()[:, ::-1]


@pytest.mark.parametrize("kind", [Goals, Mirror])
def test_pictures_show_goals_cameras_and_own_drawings_as_gymnasium_does(kind, tmp_path):
    path = tmp_path / "goals.xml"
    path.write_text(XML)
    gym.register(f"{kind.__name__}-v0", kind, kwargs={"path": str(path)})
    world = World(configure(env_id=f"{kind.__name__}-v0"), 2, 48)
    theirs = [gym.make(f"{kind.__name__}-v0", render_mode="rgb_array") for _ in range(2)]
    path.unlink()
    for seed in (3, 5):
        world.reset(seed=seed)
        world.step(np.ones((2, 1), np.float32))
        frames = world.render()
        for i, env in enumerate(theirs):
            env.reset(seed=seed + i)
            env.step(np.ones(1))
            np.testing.assert_array_equal(vlmrm.draw(env), frames[i])
        assert np.abs(frames[0].astype(int) - frames[1]).mean() > 1


# --- SAC


def batch_of(n, **others):
    """n transitions of 3 observations and 2 actions; none is a true end."""
    obs, action = torch.randn(2, n, 3), torch.rand(n, 2)
    batch = sac.Transitions(obs[0], action, torch.randn(n), obs[1], torch.zeros(n))
    return batch._replace(**others)


def test_logp_equals_torch_distributions_and_is_finite_where_tanh_saturates():
    torch.manual_seed(0)
    actor, obs = sac.Actor(5, 3).double(), torch.randn(200, 5).double()
    action, logp = actor.sample(obs)
    mean, log_std = actor(obs)
    normal = torch.distributions.Normal(mean, log_std.exp())
    tanh = torch.distributions.TanhTransform()
    oracle = torch.distributions.TransformedDistribution(normal, tanh)
    assert_close(logp, oracle.log_prob(action).sum(-1), atol=1e-6, rtol=1e-6)
    actor.float().net[-1].bias.data[:3] = 30  # the mean: tanh is 1 in float32
    action, logp = actor.sample(obs.float())
    assert (action == 1).all() and logp.isfinite().all() and (logp > 50).all()


def test_faster_products_keep_the_precision_of_float32():
    sac.use_onednn()
    x, y = torch.randn(2, 256, 256)
    assert (x @ y - x.double() @ y.double()).abs().max() < 2e-4  # bfloat16 would be off by 0.1


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_update_equals_the_docstrings_formulas_by_autograd():
    torch.manual_seed(0)
    agent = sac.SAC(3, 2, gamma=0.9, tau=0.1, layer_norm=True, temperature=0.7)
    end = torch.arange(32) % 2  # half of them go on, as at a time limit
    batches, hand = [batch_of(32, terminated=end) for _ in range(3)], copy.deepcopy(agent)
    adam = torch.optim.Adam(hand.critic.parameters(), 1e-3)
    torch.manual_seed(1)
    metrics = agent.update(*batches)
    torch.manual_seed(1)
    for batch in batches:
        action, logp = hand.actor.sample(batch.next_obs)
        next_v = torch.minimum(*hand.target_critic(batch.next_obs, action)) - 0.7 * logp
        y = (batch.reward + 0.9 * (1 - end) * next_v).detach()
        x = torch.cat([batch.obs, batch.action], -1)
        loss_q = 0.5 * sum(mse_loss(q(x)[:, 0], y) for q in (hand.critic.q1, hand.critic.q2))
        descend(adam, loss_q)
        sac.follow(hand.target_critic, hand.critic, 0.1)
    action, logp = hand.actor.sample(batch.obs)
    loss_pi = (0.7 * logp - torch.minimum(*hand.critic(batch.obs, action))).mean()
    descend(torch.optim.Adam(hand.actor.parameters(), 3e-4), loss_pi)
    hand.log_temperature.data -= 3e-4  # the entropy is above its target
    hand.policy.load_state_dict(hand.actor.state_dict())
    for name, p in hand.named_parameters():
        assert_close(agent.get_parameter(name), p, atol=2e-6, rtol=0)
    for name, loss in (("loss_q", loss_q), ("loss_pi", loss_pi)):
        assert_close(metrics[name], loss.detach())


@pytest.mark.parametrize("window", [0, 3, 100])
def test_the_policy_is_an_average_of_all_actors(window):
    agent, average = sac.SAC(3, 2, window=window, hidden=8), 0
    for update in range(1, 9):
        agent.update(batch_of(8))
        weight = agent.actor.net[0].weight.detach()
        average += (weight - average) / max(1, min(window, update / 2))
    assert_close(agent.policy.net[0].weight.data, average)


def test_scales_standardise_observations_and_rewards():
    torch.manual_seed(0)
    agent, x = sac.SAC(3, 2), torch.randn(10, 50).double()
    obs = torch.stack([1e-6 * x, 1.7e9 + 0.1 * x.cumsum(0), 0 * x + 5], -1)
    reward = 0.3 + 0.03 * torch.randn(500)
    agent.fit_scales(obs, reward, 0.5)
    for actor in (agent.actor, agent.policy):
        scaled = actor.standardise(obs.numpy()).flatten(0, 1)
        assert_close(scaled.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
        assert_close(scaled.std(0), torch.tensor([1.0, 1.0, 0.0]))
        assert actor.standardise(obs + 2)[0, 0, 2] == 2  # what never varied keeps its unit
        acted = actor.act(obs.flatten(0, 1), deterministic=True)
        assert_close(torch.tensor(acted), actor(scaled)[0].tanh().detach())
    target = agent.q_target(batch_of(500, reward=reward, terminated=torch.ones(500)))
    assert abs(target.mean()) < 1e-4 and target.std().item() == pytest.approx(0.5, abs=0.01)


def test_replay_wraps_around_and_refuses_what_does_not_fit_or_is_not_finite():
    replay = sac.Replay(5, 1, 1)
    for start in (0, 3, 6):
        x = np.arange(start, start + 3.0)
        replay.add(x[:, None], x[:, None] / 10, x, x[:, None] + 1, x * 0)
    assert replay.rows(torch.arange(5)).reward.tolist() == [4, 5, 6, 7, 8]
    sample = replay.sample(100)
    assert set(sample.reward.tolist()) == {4, 5, 6, 7, 8}
    assert torch.equal(sample.next_obs, sample.obs + 1)
    for name in sac.Transitions._fields:
        block = replay.sample(3)._replace(**{name: np.full(3, np.nan)})
        with pytest.raises(UsageError, match=f"^{name} is not finite"):
            replay.add(*block)
    with pytest.raises(ValueError, match="6 transitions in a replay of 5"):
        replay.add(*np.zeros((5, 6)))


def test_sac_learns_to_hold_the_pole_and_ends_with_the_mean_return(capsys, monkeypatch):
    monkeypatch.setattr(sac, "SAC", partial(sac.SAC, hidden=64))
    sac.main(["--env-id", PENDULUM, "--steps", "900"])
    line, score = capsys.readouterr().out.splitlines()[-1].rsplit(" ", 1)
    assert line == "mean return over 20 deterministic episodes:"
    assert float(score) > 45  # untrained: below 25


# --- the whole program


BAD = """
--prompt ' '                                  | try --prompt
--clip ViT-bigG-41/laion2b                    | near: ViT-bigG-14/
--clip ViT-B-32/laion2b_s34b_b79k             | ffline: tiny_clip
--clip folder                                 | does not load
--alpha 1.5                                   | alpha
--prompt 'A humanoid robot' --alpha 0.5       | must differ
--env-id Hopper-v5 --alpha 0.5                | --baseline
--num-envs -2                                 | --num-envs -2
--lr nan                                      | --lr nan
--gamma 1.01                                  | from 1e-10 to 1
--replay 9999999999                           | --replay 9999999999
--steps many                                  | 'many'
--looks nice                                  | plain
--env-id Antt-v5                              | Antt
--env-id CartPole-v1                          | as in Pendulum-v1
--env-id Blackjack-v1                         | as in Pendulum-v1
--env-id nowhere:Mine-v0                      | nowhere
--env-id Humanoid-v3                          | gymnasium-robotics
--out folder                                  | File exists
--out folder/config.json/run                  | cannot be made
--resume missing                              | is not a run's folder
--resume folder                               | is not a run's folder
sac.py --env-id CartPole-v1                   | as in Pendulum-v1
sac.py --env-id Pendulumm-v1                  | Pendulum
sac.py --steps 0                              | --steps 0
"""


@pytest.mark.parametrize("row", BAD.strip().splitlines())
def test_bad_input_is_one_line_and_exit_code_2(row, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY_CLIP, "folder")
    Path("folder/open_clip_model.safetensors").write_bytes(b"PK" * 100)
    Path("folder/config.json").write_text("{{")
    before = sorted(tmp_path.rglob("*"))
    line, message = row.split("|")
    argv = shlex.split(line)
    run = partial(vlmrm.main, ["--prompt", "a cart", *SHORT, *argv])
    main = partial(sac.main, argv[1:]) if "sac.py" in line else run
    with pytest.raises(SystemExit, match="2"):
        sac.run(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: " in line and message.strip() in line
    assert sorted(tmp_path.rglob("*")) == before


LAPTOP = LESSON | {"clip": "tiny_clip"}


@pytest.mark.parametrize(
    "line, gpu, expected",
    [
        ("", 0, LAPTOP),
        ("", 1, {}),
        ("--clip tiny_clip --env-id Humanoid-v4 --alpha 0.1", 1, LAPTOP | {"alpha": 0.1}),
        (f"--env-id {PENDULUM} --gamma 0.5", 0, LAPTOP | CARTPOLE | {"gamma": 0.5}),
        ("--paper --batch-size 9", 0, LAPTOP | PAPER | {"batch_size": 9}),
        (f"--paper --env-id {PENDULUM}", 1, CARTPOLE | PAPER),
    ],
)
def test_settings_are_presets_that_explicit_flags_win_over(
    line, gpu, expected, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("COLUMNS", "200")
    cfg = vlmrm.configure(**vlmrm.parse(line.split()))
    assert cfg == vlmrm.Config(env_id=cfg.env_id, **expected)
    assert cfg.learning_starts <= cfg.steps / 2  # else it would never learn, in silence
    # Of several tests the best policy is kept.
    assert cfg.steps / cfg.num_envs / cfg.episode_length / cfg.test_every >= 5
    with pytest.raises(SystemExit, match="0"):
        vlmrm.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for x in fields(vlmrm.Config):
        flag = f"--{x.name.replace('_', '-')} {x.name.upper()} {x.metadata['help']}"
        assert f"{flag} (default: {getattr(vlmrm.configure(), x.name)})" in text


CART = ["--env-id", PENDULUM, "--prompt", "pole upright", *SHORT]
TOY = SHORT + "--env-id Matrix-v0 --prompt cart --test-every 1".split()


@pytest.fixture
def brief(tmp_path, monkeypatch):
    """In a folder of its own, without the last test and the film."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vlmrm, "finish", lambda *args: None)


def run(*argv):
    """The flags of a list, and of a line."""
    vlmrm.main([*argv[:-1], *argv[-1].split()])


def progress(folder):
    path = Path(folder) / "progress.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def learned(folder):
    return float(progress(folder)[-1]["loss_q"]) > 0


def load(folder, name="last.pt"):
    return torch.load(f"{folder}/{name}")


def test_training_end_to_end_with_pictures_of_the_states_reached(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(*CART, "--steps 120 --test-every 2 --updates 20 --lr 0.03")
    last, folder = capsys.readouterr().out.splitlines()[-1], Path("runs/pole-upright")
    assert last.startswith("best policy, 100 deterministic episodes: CLIP return ")
    names = "best.pt config.json film.gif film.png last.pt progress.csv"
    assert sorted(os.listdir(folder)) == names.split()
    cfg, rows = vlmrm.read_config(folder), progress(folder)
    assert [row["step"] for row in rows] == "20 40 60 80 100 120".split()
    stored = sac.Transitions(*load(folder)["replay"])
    assert learned(folder) and not stored.terminated.any()
    label, world, policy = CLIPReward(cfg.prompt), World(cfg, 2), sac.Actor(4, 1)
    policy.load_state_dict(load(folder, "best.pt"))
    for i in range(0, 120, 2):  # an iteration: 10 steps of 2 simulations
        obs, action, reward, next_obs, _ = (x[i : i + 2] for x in stored)
        if i % 20 == 0:
            x = world.reset(seed=i)[0]
        assert_close(obs, policy.standardise(x))
        x = world.step(action.numpy())[0]
        assert_close(next_obs, policy.standardise(x))
        assert_close(reward, label(world.render()))
    best = max(rows[1::2], key=lambda row: float(row["test"]))  # that policy is kept
    test = vlmrm.mean_return(world, policy, int(best["step"]) - 20, label)
    assert test == pytest.approx(float(best["test"]), abs=1e-5)
    assert_close(stored.obs[:20].std(0), torch.ones(4))  # of the first iteration
    for number in "23":  # made at once, also for runs that start together
        assert str(vlmrm.new_folder(cfg, None)) == f"{folder}-{number}"


# --- interrupted, and resumed


def assert_same_run(a, b):
    """Equal to the bit."""
    assert progress(a) == progress(b) and learned(a)
    for name in ("last.pt", "best.pt"):
        x, y = load(a, name), load(b, name)
        assert x.pop("config", 0) == y.pop("config", 0)
        assert_close(dict(x), dict(y), rtol=0, atol=0, equal_nan=True)


def test_killed_or_stopped_at_any_moment_it_ends_as_if_it_were_not(brief):
    argv = [*CART, *"--test-every 1 --steps 400 --replay 200 --looks original --out".split()]
    run(*argv, "whole")
    start = [*argv, "killed"]
    for how in (signal.SIGKILL, signal.SIGTERM):
        rows = len(progress("killed"))
        program = partial(sac.run, partial(vlmrm.main, start))
        process = multiprocessing.get_context("forkserver").Process(target=program)
        process.start()
        while len(progress("killed")) <= rows:
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(random.random() / 5)
        os.kill(process.pid, how)
        process.join(60)
        assert process.exitcode == (-9 if how == 9 else 130)
        start = ["--resume", "killed"]
    vlmrm.main(start)
    assert_same_run("whole", "killed")


@pytest.mark.parametrize(
    "toy, moment, error", [("Matrix", 1, KeyboardInterrupt), ("Scalar", 8, BrokenPipeError)]
)
def test_interrupted_between_updates_it_ends_the_same(toy, moment, error, brief, monkeypatch):
    flags, update = f"--env-id {toy}-v0 --steps 120 --replay 30 --out ", sac.SAC.update
    run(*TOY, flags + "whole")

    def interrupted(agent, *batches):
        assert len(batches) == vlmrm.Config.critic_steps
        if agent.updates == moment:
            raise error  # as Ctrl-C or | head do
        return update(agent, *batches)

    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit, match="130"), monkeypatch.context() as patch:
        patch.setattr(sac.SAC, "update", interrupted)
        sac.run(partial(run, *TOY, flags + "stopped"))
    run("--resume stopped")
    assert_same_run("whole", "stopped")


def test_a_run_goes_on_from_last_pt_alone_longer_and_with_another_replay(brief, capsys):
    run(*TOY, "--steps 80 --replay 50 --out run")  # the ring has wrapped
    for replay, steps, kept, size in ((100, 120, 50, 90), (60, 140, 40, 60)):
        Path("run/progress.csv").unlink()
        Path("run/best.pt").unlink()
        old = load("run")["replay"]
        run(f"--resume run --replay {replay} --steps {steps}")
        assert f"'replay': {replay}" in capsys.readouterr().out
        assert progress("run")[4]["step"] == "100"
        for x, y in zip(old, load("run")["replay"], strict=True):
            assert len(y) == size and torch.equal(y[:kept], x[-kept:])
    saved = load("run")
    saved["run"]["step"] = 1_000_164
    torch.save(saved, "run/last.pt")
    run("--resume run --steps 1000184")
    assert progress("run")[-1]["step"] == "1000184"


class Malice:
    def __reduce__(self):
        return Path.touch, (Path("hacked"),)


def test_files_of_others_are_refused_and_run_nothing(brief):
    run(*TOY, "--out run")
    for other in f"prompt pole|clip {TINY_CLIP}|reward-std 1|temperature 1".split("|"):
        with pytest.raises(UsageError, match="other settings; for .* start a new run"):
            run(f"--resume run --{other}")
    last, saved = Path("run/last.pt"), load("run")
    for changed in ({"agent": Malice()}, {"replay": []}, None):
        torch.save(saved | changed, last) if changed else last.write_bytes(b"PK")
        with pytest.raises(UsageError, match="last.pt is damaged or another run's"):
            run("--resume run")
    assert not Path("hacked").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("failed writing")])
def test_a_full_disk_is_one_line_and_leaves_the_old_file_whole(error, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    vlmrm.save(path, {"step": 1})

    def half(content, file):
        Path(file).write_bytes(b"PK")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(UsageError, match="last.pt cannot be written; is the disk full"):
        vlmrm.save(path, {"step": 2})
    assert torch.load(path) == {"step": 1} and os.listdir(path.parent) == ["last.pt"]


@pytest.mark.parametrize(
    "error", [RuntimeError, OSError, ImportError, MemoryError, torch.OutOfMemoryError]
)
def test_only_out_of_memory_becomes_a_line_and_other_errors_stay(error, brief, monkeypatch, capsys):
    def fail(*args):
        raise error

    monkeypatch.setattr(Toy, "step", fail)
    line = "error: out of memory" if "Memory" in error.__name__ else ""
    with pytest.raises(SystemExit if line else error):
        sac.run(partial(run, *TOY, "--out run"))
    assert line in capsys.readouterr().err


# --- programs of their own


def spawn(*argv, cwd, **env):
    argv = [sys.executable, *map(str, argv)]
    return subprocess.run(argv, cwd=cwd, env=os.environ | env, capture_output=True, text=True)


@pytest.mark.parametrize("backend", ["foo", "glfw"])
def test_without_opengl_it_imports_and_says_what_helps(backend, tmp_path):
    draw = "import sys; sys.modules['open_clip'] = sys; import sac, vlmrm as v; "
    draw += "sac.run(v.World(v.Config(), 1).render)"
    env = dict(MUJOCO_GL=backend, DISPLAY=":99", PYTHONPATH=str(HERE), PYTHONWARNINGS="ignore")
    process = spawn("-c", draw, cwd=tmp_path, **env)
    line = process.stderr.splitlines()[0]
    assert process.returncode == 2 and line.startswith("error: no OpenGL: set MUJOCO_GL=egl"), line


def test_a_task_of_ones_own_a_plain_terminal_and_another_jobs_variables(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.envs.mujoco.inverted_pendulum_v5 import InvertedPendulumEnv\n"
        "gym.register('Mine-v0', InvertedPendulumEnv)\n"
    )
    argv = [HERE / "vlmrm.py", "--env-id", "mine:Mine-v0", "--prompt", "Männchen", *SHORT]
    argv += "--num-envs 10 --episode-length 2".split()
    env = dict(PYTHONIOENCODING="ascii", RANK="1", WORLD_SIZE="2")
    process = spawn(*argv, cwd=tmp_path, **env)
    assert process.returncode == 0, process.stderr
    assert "see runs/m\\xe4nnchen" in process.stdout.splitlines()[-1]
    assert learned(tmp_path / "runs/männchen")


COMMANDS = r"(?<![\w/])python ((?:vlmrm|sac)\.py (?!--help)[^`\n|#]*)"


@pytest.mark.parametrize("command", sorted(set(re.findall(COMMANDS, README))))
def test_every_command_of_the_readme_runs_in_short(command, brief, monkeypatch):
    tiny = vlmrm.load_clip(str(TINY_CLIP))
    monkeypatch.setattr(vlmrm, "load_clip", lambda *args: copy.deepcopy(tiny))  # without downloads
    monkeypatch.setattr(sac, "make_envs", partial(sac.make_envs, max_episode_steps=20))
    program, *argv = shlex.split(command)
    if program == "sac.py":
        return sac.main([*argv, "--steps", "100"])
    if "--resume" in argv:
        vlmrm.main([*CART, "--steps", "20", "--out", argv[argv.index("--resume") + 1]])
    vlmrm.main([*argv, *SHORT])
    (folder,) = Path("runs").iterdir()
    assert learned(folder)
