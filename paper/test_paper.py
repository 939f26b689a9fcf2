"""Tests of the scripts of this folder and of tiny_clip/make.py: closed forms, poses by hand, and
short real runs. Run: pytest paper"""
import argparse
import json
import math
import os
import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: CLIP in float32, and the lesson's settings
os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco
import mujoco
import numpy as np
import pytest
pytest.importorskip("matplotlib", reason="pip install -r paper/requirements.txt")
from PIL import Image

import shared
import compare
import curve
import evaluate
import landscape
import watch
from shared import sac, vlmrm
from states import POSTURES, STAND, goals, labelled_states, pictures, posture, settle

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
KNEEL, LOTUS, ARMS_UP, SPLITS, HIPS, ONE_LEG, CROSSED = (POSTURES[name] for name in (
    "kneeling", "lotus", "arms-raised", "splits", "hands-on-hips", "one-leg", "arms-crossed"))
TINY_RUN = ("--task cartpole --steps 40 --num-envs 2 --episode-length 10 --updates 2 "
            "--batch-size 16 --learning-starts 20 --out").split()

@pytest.fixture(scope="module")
def humanoid():
    return vlmrm.World(shared.configure("kneeling"), 1, 64)

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "cart"
    vlmrm.main([*TINY_RUN, str(folder)])
    return folder

# ---- rewards beside labels ----

def test_epic_and_auroc_against_closed_forms_and_counting():
    rng = np.random.default_rng(0)
    goal, reward = rng.random(200) < 0.3, rng.integers(0, 9, 200) / 9.0
    assert shared.epic(3 * goal - 1.0, goal) == pytest.approx(0, abs=1e-6)
    assert shared.epic(-2.0 * goal, goal) == pytest.approx(1)
    # For standardised rewards EPIC is half their root mean square distance.
    a, b = ((x - x.mean()) / x.std() for x in (reward, goal.astype(float)))
    assert shared.epic(reward, goal) == pytest.approx(np.sqrt(((a - b) ** 2).mean()) / 2)
    pairs = [(a > b) + 0.5 * (a == b) for a in reward[goal] for b in reward[~goal]]
    assert shared.auroc(reward, goal) == pytest.approx(np.mean(pairs))
    assert math.isnan(shared.epic(reward, goal & False))
    assert math.isnan(shared.auroc(reward, goal & False))

def test_hacked_counts_what_is_paid_better_without_being_a_goal():
    goal = np.array([True, False, False, False, True])
    assert shared.hacked(np.arange(1, 6), goal, 2) == 0.4

# ---- states and criteria ----

@pytest.mark.parametrize("how", [KNEEL, LOTUS, STAND, dict(pitch=80)])
def test_postures_touch_the_floor_as_mujoco_sees_it(how, humanoid):
    model, touching = humanoid.sims[0].model, []
    data = mujoco.MjData(model)
    for gap in (-0.001, 0.001):
        data.qpos[:] = posture(model, **how)
        data.qpos[2] += gap
        mujoco.mj_forward(model, data)
        touching.append(any(0 in contact.geom and contact.dist < 0 for contact in data.contact))
    assert touching == [True, False]

@pytest.mark.parametrize("task, expected, how, why", [
    ("kneeling", True, KNEEL, "upright"),
    ("kneeling", True, KNEEL | dict(hip_y=-60, knee=-157), "on the heels"),
    ("kneeling", True, KNEEL | dict(pitch=20, hip_y=-30), "leaning a little"),
    ("kneeling", False, KNEEL | dict(hip_y=0, knee=-5), "standing"),
    ("kneeling", False, KNEEL | dict(height=1.2), "in the air"),
    ("kneeling", False, KNEEL | dict(left_hip_y=-90, left_knee=-90), "on one knee"),
    ("kneeling", False, KNEEL | dict(pitch=80, hip_y=-90), "fallen forward"),
    ("kneeling", False, KNEEL | dict(hip_y=-90, knee=-5), "legs stretched out"),
    ("kneeling", False, KNEEL | dict(pitch=-60, hip_y=30), "fallen back"),
    ("standing", True, STAND, ""),
    ("standing", True, ARMS_UP, "what the arms do is free"),
    ("standing", False, STAND | dict(height=1.4), "in the air"),
    ("standing", False, STAND | dict(pitch=50), "falling"),
    ("standing", False, dict(hip_y=-90, knee=-120), "squatting"),
    ("standing", False, ONE_LEG, "on one leg"),
    ("arms-raised", True, ARMS_UP, ""),
    ("arms-raised", False, STAND, "arms down"),
    ("arms-raised", False, ARMS_UP | dict(left_shoulder1=0), "one arm"),
    ("arms-raised", False, ARMS_UP | dict(height=1.5), "in the air"),
    ("lotus", True, LOTUS, ""),
    ("lotus", False, LOTUS | dict(height=0.6), "in the air"),
    ("lotus", False, SPLITS, "legs stretched"),
    ("lotus", False, LOTUS | dict(hip_z=0, hip_x=0), "knees ahead"),
    ("lotus", False, LOTUS | dict(pitch=-60), "lying"),
    ("splits", True, SPLITS, ""),
    ("splits", False, SPLITS | dict(hip_z=0), "legs forward"),
    ("splits", False, SPLITS | dict(knee=-90), "knees bent"),
    ("splits", False, SPLITS | dict(height=0.8), "in the air"),
    ("splits", False, LOTUS, "legs crossed"),
    ("hands-on-hips", True, HIPS, ""),
    ("hands-on-hips", False, STAND, "arms down"),
    ("hands-on-hips", False, CROSSED, "before the chest"),
    ("hands-on-hips", False, HIPS | dict(right_shoulder1=0), "one hand"),
    ("one-leg", True, ONE_LEG, ""),
    ("one-leg", False, STAND, "on both"),
    ("one-leg", False, ONE_LEG | dict(height=1.4), "jumping"),
    ("one-leg", False, ONE_LEG | dict(pitch=70), "falling"),
    ("arms-crossed", True, CROSSED, ""),
    ("arms-crossed", False, STAND, "arms down"),
    ("arms-crossed", False, HIPS, "on the hips"),
    ("arms-crossed", False, CROSSED | dict(left_shoulder1=0, left_shoulder2=0), "one arm"),
    ("arms-crossed", False, STAND | dict(shoulder1=60, elbow=-10), "hands meet"),
])
def test_criteria_on_poses_by_hand(task, expected, how, why, humanoid):
    model = humanoid.sims[0].model
    result = vlmrm.Humanoid(model, posture(model, **how)[None]).goals()
    assert result[task].tolist() == [expected], why

def test_criteria_of_pole_and_car():
    pole, car = (vlmrm.World(shared.configure(task), 1) for task in ("cartpole", "mountaincar"))
    assert goals(pole, np.array([[0, 0.0], [0, 0.5], [0.5, -0.199]])).tolist() == [1, 0, 1]
    assert goals(car, np.array([[-0.5, 0], [0.44, 0.02], [0.46, 0]])).tolist() == [0, 0, 1]

AT_E0C5F54 = {  # sum of the states before they settle, at that commit
    "lotus": -1806.312258, "one-leg": -394.548378, "cartpole": 33.310257, "mountaincar": -43.974550}

@pytest.mark.parametrize("task", AT_E0C5F54)
def test_labelled_states_are_the_same_for_everyone_and_of_both_kinds(task, monkeypatch):
    monkeypatch.setattr("states.settle", lambda model, start, controls: np.stack([start] * 31))
    states = labelled_states(task)[:460]
    assert states.sum() == pytest.approx(AT_E0C5F54[task], abs=1e-5)
    assert 0.05 < goals(vlmrm.World(shared.configure(task), 1), states).mean() < 0.7

def test_settling_is_gymnasiums_physics(humanoid):
    humanoid.reset(seed=0)
    sim, actions = humanoid.sims[0], np.random.default_rng(0).uniform(-0.4, 0.4, (4, 1, 17))
    start = humanoid.states()
    sim.set_state(start[0], np.zeros(23))
    path = settle(sim.model, start, actions)
    for action, expected in zip(np.float32(actions / 0.4), path[1:]):  # of its range
        humanoid.step(action)
        np.testing.assert_allclose(humanoid.states(), expected, atol=1e-6)

# ---- the scripts ----

def test_compared_rows_are_the_clip_reward_beside_the_label(capsys, monkeypatch):
    states = labelled_states("cartpole")[::10]
    monkeypatch.setattr(compare, "labelled_states", {"cartpole": states}.get)
    prompts = ["balanced pole on the cart", "fallen pole and cart"]
    compare.main(["--task", "cartpole", "--clip", "tiny_clip", "tiny_clip", "--prompt", *prompts])
    rows = [line for line in capsys.readouterr().out.splitlines() if "tiny_clip" in line]
    assert len(rows) == 4 and rows[:2] == rows[2:]
    world = vlmrm.World(shared.configure("cartpole"), 1, 64)
    frames, goal = world.render(states), np.abs(states[:, 1]) < 0.2
    for row, prompt in zip(rows, prompts):
        assert row.endswith(prompt)
        reward = vlmrm.CLIPReward(prompt, "pole and cart", 0.5)(frames).numpy()
        expected = f"{shared.epic(reward, goal):.3f} ({shared.auroc(reward, goal):.3f})"
        assert row.split("  ")[2] == expected

def test_landscape_is_the_reward_along_a_joint(tmp_path, monkeypatch, humanoid):
    monkeypatch.chdir(tmp_path)
    landscape.main(["left_knee", "--task", "kneeling"])
    folder = Path("runs/landscape-kneeling-left_knee")
    knee = np.genfromtxt(folder / "landscape.csv", delimiter=",", names=True)
    assert len(knee) == 101 and Image.open(folder / "landscape.png").width == 700
    how = KNEEL | dict(left_knee=np.degrees(knee["left_knee"][70]))
    frames = humanoid.render(posture(humanoid.sims[0].model, **how)[None])
    expected = vlmrm.CLIPReward(vlmrm.TASKS["kneeling"].prompt, alpha=0.75)(frames).item()
    assert knee["alpha_075"][70] == pytest.approx(expected, abs=1e-4)

def test_car_is_drawn_where_it_is_put():
    pytest.importorskip("pygame")
    world = vlmrm.World(shared.configure("mountaincar"), 1)
    left, flag, again = pictures(world, np.array([[-0.5, 0], [0.45, 0], [0.45, 0.01]]))
    assert (left != flag).any() and (flag == again).all()

def test_evaluation_of_a_run_is_its_policys(trained, capsys):
    evaluate.main([str(trained), "--episodes", "3"])
    result = json.loads((trained / "eval.json").read_text())
    assert "3 deterministic episodes" in capsys.readouterr().out
    assert Image.open(trained / "film-judged.gif").n_frames == 10
    assert [row["alpha"] for row in result["alphas"]] == [0, 0.25, 0.5, 0.75, 1]
    config = vlmrm.read_config(trained)
    world, reward = vlmrm.World(config, 3, 64), vlmrm.CLIPReward(config.prompt, config.baseline)
    policy = shared.best_policy(trained, config, world)
    obs, _ = world.reset(seed=3_000_000)
    rewards, held = [], []
    for _ in range(10):
        action = policy.act(obs, deterministic=True)
        obs = world.step(action)[0]
        rewards.append(reward(world.render()).numpy())
        held.append(np.abs(obs[:, 1]) < 0.2)
    rewards, held = np.stack(rewards), np.stack(held)
    assert result["return"] == pytest.approx(rewards.sum(0).mean(), abs=1e-3)
    assert result["success"] == pytest.approx((held.mean(0) >= 0.5).mean())
    assert result["goal_states"] == pytest.approx(held.mean())
    s = np.ones((2, 4, 64), np.float32) / 8
    by_hand = np.array([[True, True, False, False], [True, False, False, False]])
    judged = evaluate.judge(config, reward, s, by_hand)
    assert judged["success"] == 0.5 and judged["goal_states"] == 3 / 8  # half the steps suffice

def test_a_run_of_the_mountain_car_is_judged_by_its_position(tmp_path, monkeypatch):
    pytest.importorskip("pygame")
    car = ["--env-id", shared.CAR.env_id, "--prompt", shared.CAR.prompt]
    vlmrm.main([*car, *TINY_RUN[2:], str(tmp_path / "car")])
    monkeypatch.setattr(evaluate, "goals", lambda world, states: abs(states[:, 0] + 0.5) < 0.2)
    evaluate.main([str(tmp_path / "car"), "--episodes", "2"])
    result = json.loads((tmp_path / "car/eval.json").read_text())
    assert result["success"] == result["goal_states"] == 1  # it starts in the valley

def test_learning_curves_are_drawn(trained, tmp_path):
    curve.main([str(trained)])
    curve.main([str(trained), str(trained), "--columns", "q", "--out", str(tmp_path / "q.png")])
    two, one = Image.open(trained / "curve.png"), Image.open(tmp_path / "q.png")
    assert (two.size, one.size) == ((700, 600), (700, 350)) and np.asarray(two).std() > 10
    assert list(curve.read(trained)["step"]) == [20, 40]

def test_watching_shows_the_policys_states(trained, monkeypatch):
    seen = []

    class Viewer:  # in place of the window
        def __init__(self, model, data):
            self.data = data

        def is_running(self):
            return len(seen) < 12  # more than one episode

        def sync(self):
            seen.append(self.data.qpos.copy())
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("mujoco.viewer.launch_passive", Viewer)
    watch.main([str(trained)])
    config = vlmrm.read_config(trained)
    world = vlmrm.World(config, 1)
    policy = shared.best_policy(trained, config, world)
    obs, _ = world.reset(seed=0)
    for step, qpos in enumerate(seen):
        action = policy.act(obs, deterministic=True)
        obs = world.step(action)[0]
        assert np.array_equal(qpos, world.states()[0])
        if step == 9:
            obs, _ = world.reset()

@pytest.mark.parametrize("main, argv, message", [
    (evaluate.main, ["nowhere"], "not a run's folder"),
    (evaluate.main, ["RUN", "--episodes", "0"], "from 1 to"),
    (watch.main, ["RUN"], "display"),
    (curve.main, ["nowhere"], "no progress.csv"),
    (landscape.main, ["tail", "--task", "kneeling"], "right_knee"),
    (landscape.main, ["hinge", "--task", "cartpole", "--out", "."], "not overwritten"),
])
def test_bad_input_is_one_line(main, argv, message, trained, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(sac.UsageError, match=message) as error:
        main([x.replace("RUN", str(trained)) for x in argv])
    assert "\n" not in str(error.value)

def test_a_prompt_without_criterion_is_not_judged(trained, tmp_path):
    config = json.loads((trained / "config.json").read_text())
    config |= {"task": "", "prompt": "a cart"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(sac.UsageError, match="no criterion for 'a cart'"):
        evaluate.main([str(tmp_path)])

# ---- tiny_clip/make.py, and the commands of the README ----

@pytest.fixture
def make(monkeypatch):
    monkeypatch.syspath_prepend(vlmrm.TINY_CLIP)
    import make
    return make

def test_make_trains_and_saves_a_folder_that_loads_as_any_other(tmp_path, make, humanoid):
    names = ["kneeling", "standing", "lotus", "splits"]
    poses = [posture(humanoid.sims[0].model, **POSTURES[name]) for name in names]
    frames, truth = make.pictures("Humanoid-v5", np.stack(poses * 3))
    best = [make.CONCEPTS[i] for i in truth[:4, :9].argmax(1)]
    assert best == names and (truth[:, make.CONCEPTS.index("at the flag")] == make.FALSE).all()
    model, rng = make.new_model(), np.random.default_rng(0)
    before = [p.detach().clone() for p in model.parameters()]
    make.fit(model, frames, truth, 2, 1e-3, rng, batch=8)
    assert not any((p == q).all() for p, q in zip(model.parameters(), before) if p.ndim > 1)
    make.save(model, tmp_path / "clip")
    written = json.loads((tmp_path / "clip/open_clip_config.json").read_text())
    assert written == json.loads((vlmrm.TINY_CLIP / "open_clip_config.json").read_text())
    prompt = vlmrm.TASKS["lotus"].prompt
    reward = vlmrm.CLIPReward(prompt, clip=str(tmp_path / "clip"))
    np.testing.assert_allclose(reward(frames), make.score(model, frames, prompt), atol=0.02)

def test_captions_are_as_true_as_they_were(make, humanoid):
    poses = np.stack([posture(humanoid.sims[0].model, **how) for how in POSTURES.values()])
    states = np.concatenate([poses, (poses + poses[2]) / 2])  # and half of the way to standing
    truth = make.judge("Humanoid-v5", states).astype(float)
    checksum = (truth.sum(0) * np.arange(len(make.CONCEPTS))).sum()
    assert checksum == pytest.approx(-21622.27008, abs=1e-3)  # at e0c5f54

@pytest.mark.parametrize("judged_by", ["truth", "clip"])
def test_make_collects_what_a_policy_sees(judged_by, make, monkeypatch):
    class Short(make.WatchedWorld):
        def __init__(self, config, concept=None):
            super().__init__(replace(config, episode_length=3), concept)
    monkeypatch.setattr(make, "WatchedWorld", Short)
    monkeypatch.setattr(sac.SAC, "update", lambda self, batch: None)
    job = (7, 2, 5, "kneeling", judged_by)
    frames, truth = make.policy_pictures(job, "plain", vlmrm.TINY_CLIP)
    assert frames.shape == (5, 64, 64, 3) and truth.shape == (5, len(make.CONCEPTS))
    assert all(frame.std() > 10 for frame in frames) and (frames[0] != frames[1]).any()

def test_make_runs_from_pictures_to_siblings(make, tmp_path, monkeypatch, capsys):
    frames = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8)
    truth = np.random.default_rng(1).uniform(-4, 2.5, (40, len(make.CONCEPTS))).astype(np.float32)
    asked = []

    def policy_pictures(job, looks, folder):
        assert (folder / "open_clip_config.json").exists() or job[-1] == "truth"
        asked.append((job[-1], looks))
        return frames, truth

    class Pool:  # in this process
        def __init__(self, *args):
            self.map = map
    monkeypatch.setattr(make, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(make, "policy_pictures", policy_pictures)
    monkeypatch.setattr(make, "worlds_pictures", lambda rng, looks: [(frames, truth)])
    monkeypatch.setattr(make, "STEPS", 4)
    monkeypatch.setattr(make, "fit", partial(make.fit, batch=8))
    monkeypatch.setattr(make, "HERE", tmp_path)
    monkeypatch.setitem(make.CONFIG["model_cfg"]["vision_cfg"], "width", 8)
    make.main(["--looks", "paper", "--siblings", "12"])
    assert asked.count(("truth", "paper")) == 12 and asked.count(("clip", "paper")) == 9
    out = capsys.readouterr().out
    assert "training on 520 pictures" in out and "training on 880 pictures" in out
    assert "one-leg, states of a policy unseen: 40 pictures" in out
    small, large = (sum(p.numel() for p in vlmrm.load_clip(str(folder))[0].visual.parameters())
                    for folder in (tmp_path / "looks-paper", tmp_path / "looks-paper/width-12"))
    assert small < large

COMMANDS = sorted(set(re.findall(r"python ((?:paper/|tiny_clip/|)\w+\.py [^`\n]*)", README)))

@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_understood(command, make, monkeypatch):
    """Training is tested in test_vlmrm.py, the scripts above: here only that each is understood."""
    program, *argv = shlex.split(command)
    if program == "vlmrm.py":
        asked = vlmrm.parse(argv)
        asked.pop("out", None)
        assert vlmrm.configure(**asked).steps > 0
        return
    parse_args = argparse.ArgumentParser.parse_args

    def and_stop(parser, argv=None, namespace=None):
        parse_args(parser, argv, namespace)
        raise StopIteration
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", and_stop)
    scripts = {"evaluate": evaluate, "compare": compare, "landscape": landscape, "curve": curve,
               "watch": watch, "make": make}
    with pytest.raises(StopIteration):
        scripts[Path(program).stem].main(argv)
