"""Tests of the scripts of this folder and of tiny_clip/make.py: closed forms, poses by hand, and
short real runs. Run: pytest paper"""

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # read when first imported, also for test_vlmrm.py
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: CLIP in float32, and the lesson's settings
os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco
import mujoco
import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="pip install -r paper/requirements.txt")
import compare
import criteria
import curve
import evaluate
import landscape
import shared
import sight
import table1
import truth
import watch
from PIL import Image
from shared import sac, vlmrm
from states import POSTURES, STAND, labelled_states, on_floor, pictures, posture, settle

README = (Path(__file__).parent / "README.md").read_text()
KNEEL, LOTUS, ARMS_UP, SPLITS = (
    POSTURES[x] for x in ("kneeling", "lotus", "arms-raised", "splits")
)
HIPS, ONE_LEG, CROSSED = (POSTURES[x] for x in ("hands-on-hips", "one-leg", "arms-crossed"))
SHORT = (
    "--steps 40 --num-envs 2 --episode-length 10 --updates 2 --batch-size 16 --learning-starts 20 "
    "--out"
).split()


MIRROR = {
    f"{x}_{hinge}": f"{y}_{hinge}"
    for x, y in (("right", "left"), ("left", "right"))
    for hinge in ("hip_y", "knee")
}


@pytest.fixture(scope="module")
def humanoid():
    return vlmrm.World(shared.configure("kneeling"), 1, 64)


@pytest.fixture(scope="module")
def model(humanoid):
    return shared.model_of(humanoid)


def run(task, folder):
    """A short run of a task; the README says how such a command looks."""
    prompt, baseline, env_id = criteria.TASKS[task]
    goal = ["--env-id", env_id, "--prompt", prompt.upper(), "--baseline", baseline]
    vlmrm.main([*goal, *SHORT, str(folder)])
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run("cartpole", tmp_path_factory.mktemp("runs") / "cart")


# ---- rewards beside labels ----


def test_epic_auroc_and_hacked_against_closed_forms_and_counting():
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
    assert shared.hacked(reward, goal, 0.5) == ((reward > 0.5) * (1 - goal)).mean()


# ---- states and criteria ----


@pytest.mark.parametrize("how", [KNEEL, LOTUS, STAND, dict(pitch=80)])
def test_postures_touch_the_floor_as_mujoco_sees_it(how, model):
    touching, data = [], mujoco.MjData(model)
    for gap in (-0.001, 0.001):
        data.qpos[:] = posture(model, **how)
        data.qpos[2] += gap
        mujoco.mj_forward(model, data)
        touching.append(any(0 in contact.geom and contact.dist < 0 for contact in data.contact))
    assert touching == [True, False]


FULFILS = {  # task -> what it looks like -> a posture
    "kneeling": {
        "upright": KNEEL,
        "on the heels": KNEEL | dict(hip_y=-60, knee=-157),
        "leaning a little": KNEEL | dict(pitch=20, hip_y=-30),
    },
    "lotus": {"": LOTUS},
    "standing": {"": STAND, "what the arms do is free": ARMS_UP},
    "arms-raised": {"": ARMS_UP},
    "splits": {"": SPLITS},
    "hands-on-hips": {"": HIPS},
    "one-leg": {"": ONE_LEG},
    "arms-crossed": {"": CROSSED},
}
FAILS = {
    "kneeling": {
        "standing": KNEEL | dict(hip_y=0, knee=-5),
        "in the air": KNEEL | dict(height=1.2),
        "on one knee": KNEEL | dict(left_hip_y=-90, left_knee=-90),
        "fallen forward": KNEEL | dict(pitch=80, hip_y=-90),
        "legs stretched out": KNEEL | dict(hip_y=-90, knee=-5),
        "fallen back": KNEEL | dict(pitch=-60, hip_y=30),
    },
    "lotus": {
        "in the air": LOTUS | dict(height=0.6),
        "legs stretched": SPLITS,
        "knees ahead": LOTUS | dict(hip_z=0, hip_x=0),
        "lying": LOTUS | dict(pitch=-60),
    },
    "standing": {
        "in the air": STAND | dict(height=1.4),
        "falling": STAND | dict(pitch=50),
        "squatting": dict(hip_y=-90, knee=-120),
        "on one leg": ONE_LEG,
    },
    "arms-raised": {
        "arms down": STAND,
        "one arm": ARMS_UP | dict(left_shoulder1=0),
        "in the air": ARMS_UP | dict(height=1.5),
    },
    "splits": {
        "legs forward": SPLITS | dict(hip_z=0),
        "knees bent": SPLITS | dict(knee=-90),
        "in the air": SPLITS | dict(height=0.8),
        "legs crossed": LOTUS,
    },
    "hands-on-hips": {
        "arms down": STAND,
        "before the chest": CROSSED,
        "one hand": HIPS | dict(right_shoulder1=0),
    },
    "one-leg": {
        "on both": STAND,
        "jumping": ONE_LEG | dict(height=1.4),
        "falling": ONE_LEG | dict(pitch=70),
    },
    "arms-crossed": {
        "arms down": STAND,
        "on the hips": HIPS,
        "one arm": CROSSED | dict(left_shoulder1=0, left_shoulder2=0),
        "hands meet": STAND | dict(shoulder1=60, elbow=-10),
    },
}


@pytest.mark.parametrize("task", FULFILS)
def test_criteria_on_poses_by_hand(task, humanoid, model):
    for expected, poses in ((True, FULFILS[task]), (False, FAILS[task])):
        for why, how in poses.items():
            qpos = posture(model, **how)
            assert criteria.goals(model, qpos[None])[task].tolist() == [expected], why
            # An observation is enough, wherever the robot stands.
            qpos[:2] = 3, -2
            humanoid.sims[0].set_state(qpos, np.zeros(model.nv))
            obs = np.tile(humanoid.sims[0]._get_obs(), (2, 3, 1))
            assert (criteria.met(task, model, obs) == np.full((2, 3), expected)).all(), why


def test_criterion_of_the_pole():
    pole = np.array([[0, 0.0, 9, 9], [0, 0.5, 0, 0], [0.5, -0.199, 0, 9]])
    assert criteria.met("cartpole", None, pole).tolist() == [True, False, True]


def test_a_task_is_known_by_its_prompt_and_world():
    for name, task in criteria.TASKS.items():
        spelled = "  " + task.prompt.title().replace(" ", "  ")
        assert criteria.task_of(spelled, task.env_id) == name
        assert criteria.task_of(task.prompt, "Ant-v5") is None
        assert shared.configure(name).env_id == task.env_id
    assert criteria.task_of("a humanoid robot kneeling down", criteria.HUMANOID) is None


SUMS = {  # of the states before they settle
    "lotus": -1814.298770,
    "one-leg": -402.534890,
    "cartpole": 33.310257,
}


@pytest.mark.parametrize("task", SUMS)
def test_labelled_states_are_the_same_for_everyone_and_of_both_kinds(task, model, monkeypatch):
    monkeypatch.setattr("states.settle", lambda model, start, controls: np.stack([start] * 31))
    states = labelled_states(task)[:460]
    assert states.sum() == pytest.approx(SUMS[task], abs=1e-5)
    assert 0.05 < criteria.holds(task, model, states).mean() < 0.7


def test_settling_is_gymnasiums_physics(humanoid):
    humanoid.reset(seed=0)
    sim, actions = humanoid.sims[0], np.random.default_rng(0).uniform(-0.4, 0.4, (4, 1, 17))
    start = shared.states_of(humanoid)
    sim.set_state(start[0], np.zeros(23))
    path = settle(sim.model, np.tile(start, (2, 1)), np.tile(actions, (1, 2, 1)))
    assert (path[:, 0] == path[:, 1]).all()  # the second body, too, starts at rest
    path = path[:, :1]
    for action, expected in zip(np.float32(actions / 0.4), path[1:], strict=True):  # of its range
        humanoid.step(action)
        np.testing.assert_allclose(shared.states_of(humanoid), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("prompt", "same"),
    [
        ("a humanoid robot standing upright on one leg", [0, 1, 2]),
        ("a humanoid robot standing on its right leg", [0, 2, 3]),
        ("Left leg up", [0, 2, 3]),
    ],
)
def test_every_second_simulation_is_in_a_mirror_unless_the_prompt_says_left(model, prompt, same):
    other = {MIRROR.get(name, name): angle for name, angle in ONE_LEG.items()}
    right, left = (posture(model, **how) for how in (ONE_LEG, other))  # on this leg, and on that
    world = vlmrm.World(shared.configure("kneeling", prompt=prompt), 2, 64)
    frames = pictures(world, [right, left, right, right, left]).astype(float)
    differences = np.array([np.abs(frames[0] - frame).mean() for frame in frames])
    assert differences[same].max() < 0.1 and np.delete(differences, same).min() > 1


# ---- the scripts ----


@pytest.mark.parametrize(
    "task, prompts",
    [
        ("cartpole", ["balanced pole on the cart", "fallen pole and cart"]),
        ("kneeling", ["a humanoid robot kneeling", "a robot on its knees"]),
    ],
)
def test_compared_rows_are_the_clip_reward_beside_the_label(task, prompts, capsys, monkeypatch):
    states = labelled_states(task)[::10]
    monkeypatch.setattr(compare, "labelled_states", {task: states}.get)
    compare.main(["--task", task, "--clip", "tiny_clip", "tiny_clip", "--prompt", *prompts])
    rows = [line for line in capsys.readouterr().out.splitlines() if "tiny_clip" in line]
    assert len(rows) == 4 and rows[:2] == rows[2:]
    world = vlmrm.World(shared.configure(task), 2, 64)  # every second state from the other side
    goal = criteria.holds(task, shared.model_of(world), states)
    for row, prompt in zip(rows[:2], prompts, strict=True):
        assert row.endswith(prompt)
        reward = vlmrm.CLIPReward(prompt, criteria.TASKS[task].baseline, 0.5)
        r = reward(pictures(world, states)).numpy()
        expected = f"{shared.epic(r, goal):.3f} ({shared.auroc(r, goal):.3f})"
        assert row.split("  ")[2] == expected


def test_landscape_is_the_reward_along_a_joint(tmp_path, monkeypatch, humanoid, model):
    monkeypatch.chdir(tmp_path)
    landscape.main(["left_knee", "--task", "kneeling"])
    folder = Path("runs/landscape-kneeling-left_knee")
    knee = np.genfromtxt(folder / "landscape.csv", delimiter=",", names=True)
    assert len(knee) == 101 and Image.open(folder / "landscape.png").width == 700
    how = KNEEL | dict(left_knee=np.degrees(knee["left_knee"][70]))
    frames = pictures(humanoid, posture(model, **how)[None])
    expected = vlmrm.CLIPReward(criteria.TASKS["kneeling"].prompt, alpha=0.75)(frames).item()
    assert knee["alpha_075"][70] == pytest.approx(expected, abs=1e-4)


def by_hand(folder, policy, noise):
    """CLIP return, share of goal states and of successes of 3 deterministic episodes of a pole."""
    cfg = vlmrm.read_config(folder)
    reward = vlmrm.CLIPReward(cfg.prompt, cfg.baseline, clip=cfg.clip)
    world = vlmrm.World(cfg, 3, reward.image_size)
    for sim in world.sims:
        sim._reset_noise_scale = noise
    obs, _ = world.reset(seed=1_000_000)
    assert 0.3 * noise < np.abs(obs).max() <= noise
    rewards, held = [], []
    for _ in range(cfg.episode_length):
        obs = world.step(policy.act(obs, deterministic=True))[0]
        rewards.append(reward(world.render()).numpy())
        held.append(np.abs(obs[:, 1]) < 0.2)
    rewards, held = np.stack(rewards), np.stack(held)
    return rewards.sum(0).mean(), held.mean(), (held.mean(0) >= 0.5).mean()


# An untrained network is the same one again.
@pytest.mark.parametrize("clip, steps", [("tiny_clip", 10), ("ViT-S-32-alt/random", 2)])
def test_evaluation_is_of_the_kept_and_of_the_last_policy(
    clip, steps, trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(evaluate, "labelled_states", lambda task: labelled_states(task)[::20])
    folder = shutil.copytree(trained, tmp_path / "run")
    cfg = replace(vlmrm.read_config(folder), clip=clip, episode_length=steps)
    (folder / "config.json").write_text(json.dumps(vars(cfg)))
    last = shared.policies(folder, vlmrm.World(cfg, 1))["last"]
    kept = sac.Actor(4, 1, cfg.hidden)
    torch.save(kept.state_dict(), folder / "best.pt")
    agent = torch.load(folder / "last.pt")["agent"]
    assert all(value.equal(agent[f"policy.{name}"]) for name, value in last.state_dict().items())
    evaluate.main([str(folder), "--episodes", "3", "--reset-noise", "0.2"])
    result = json.loads((folder / "eval.json").read_text())
    lines = capsys.readouterr().out.splitlines()[-2:]
    for line, name, policy in zip(lines, ("kept", "last"), (kept, last), strict=True):
        got = result[name]
        numbers = [got["return"], got["goal_states"], got["success"]]
        assert numbers == pytest.approx(by_hand(folder, policy, 0.2), abs=1e-3)
        assert line.startswith(f"{name} policy, 3 deterministic episodes: CLIP return")
        assert line.endswith(f"success rate {got['success']:.0%}")
        assert [row["alpha"] for row in got["alphas"]] == [0, 0.25, 0.5, 0.75, 1]
    assert Image.open(folder / "film-judged.gif").n_frames == steps


@contextlib.contextmanager
def pool(processes):
    """In this process."""

    def submit(f, *args):
        future = Future()
        future.set_result(f(*args))
        return future

    yield SimpleNamespace(map=map, submit=submit)


def test_table1_learns_once_and_shows_what_evaluation_finds(tmp_path, monkeypatch, capsys):
    def judged(args):  # evaluate.py has tests of its own
        kept = {"success": 0.9, "goal_states": 0.5, "hacked": 0.06, "auroc": 0.9876, "return": 12.3}
        kept["success"] -= 0.2 * (args.reset_noise == 0.05) + 0.5 * (args.run.name == "one-leg-4")
        assert args.run.parent == tmp_path and args.episodes == 100
        return {"kept": kept, "last": kept | {"success": kept["success"] - 0.1}}

    monkeypatch.setattr(shared, "pool", pool)
    monkeypatch.setattr(evaluate, "evaluate", judged)
    monkeypatch.setattr(vlmrm, "finish", lambda cfg, folder, *_: (folder / "film.png").touch())
    argv = [str(tmp_path), "--tasks", "one-leg", "--seeds", "3", "4", *SHORT[:-1]]
    table1.main(argv)
    folder, rows = tmp_path / "one-leg-3", (tmp_path / "table.md").read_text()
    cfg = vlmrm.read_config(folder)
    assert (cfg.prompt, cfg.seed, cfg.steps) == (criteria.TASKS["one-leg"].prompt, 3, 40)
    assert rows.splitlines()[-1].startswith("| `one-leg` | 90%, 40% | 80%, 30% | 70%, 20% | 50%,")
    assert rows.splitlines()[-1].endswith("| 6%, 6% | 0.988, 0.988 | 12.30, 12.30 |")
    assert capsys.readouterr().out.endswith(rows) and (folder / "last.pt").exists()

    asked = []
    monkeypatch.setattr(vlmrm, "main", asked.append)
    table1.main(argv)  # all is learned
    (folder / "film.png").unlink()
    table1.main([*argv, "--paper"])  # as if it had been interrupted
    assert asked == [["--resume", str(folder), *SHORT[:-1]]]  # config.json knows of --paper
    assert (tmp_path / "table.md").read_text() == rows
    with pytest.raises(sac.UsageError, match="takes --tasks and no prompt"):
        table1.parse([str(tmp_path), "--prompt", "x"])
    with pytest.raises(sac.UsageError, match="--jobs must be at least 1, not 0"):
        table1.parse([str(tmp_path), "--jobs", "0"])


def test_when_table1_is_stopped_no_lesson_goes_on(tmp_path):
    argv = [Path(table1.__file__), tmp_path, "--jobs", "1", *SHORT[:-1], "--steps", "9999999"]
    how = dict(start_new_session=True, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it, for all
    program = subprocess.Popen([sys.executable, *argv], **how)
    try:
        until = time.monotonic() + 100
        while not (tmp_path / "kneeling-0/config.json").exists() and time.monotonic() < until:
            time.sleep(0.1)
        assert (tmp_path / "kneeling-0/config.json").exists()
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does
        said = program.communicate(timeout=30)[1]  # ends when no process has stderr open
        assert program.returncode == 130 and "Traceback" not in said
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)


def test_table1_has_the_seeds_of_a_task_side_by_side():
    rows = table1.table({("b", 0): ["1%", "2%"], ("a", 0): ["3%", "4%"], ("b", 1): ["5%", "6%"]})
    assert rows.splitlines()[2:] == ["| `b` | 1%, 5% | 2%, 6% |", "| `a` | 3% | 4% |"]


def test_success_is_the_goal_in_half_of_the_steps():
    goal = np.array([[True, True], [True, False], [False, False], [False, False]])
    assert shared.success(goal) == 0.5


@pytest.mark.parametrize("reward", ["log-odds", "criterion"])
def test_perfect_sight_teaches_what_the_simulator_knows(reward, tmp_path, capsys, model):
    folder = tmp_path / "sight"
    sight.main(["--task", "cartpole", "--reward", reward, *SHORT, str(folder)])
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(("kept", "last"), lines[-2:], strict=True):
        assert re.fullmatch(f"{name} policy, 100 deterministic .*, success rate \\d+%", line)
    saved = torch.load(folder / "last.pt")
    mean, std = saved["agent"]["actor.obs_mean"], saved["agent"]["actor.obs_std"]
    _, _, r, next_obs, _ = saved["replay"]  # standardised
    angle = (next_obs * std + mean)[:, 1].abs()
    miss = 9 * (angle - 0.02).clamp(min=0)
    miss += 0.3 * (1 - torch.exp(-10 * miss))
    graded = 6.5 * torch.exp(-miss / 6.5) - 5.5
    expected = graded if reward == "log-odds" else angle < 0.2
    torch.testing.assert_close(r, expected.float(), atol=1e-4, rtol=0)
    label = sight.teacher("lotus", reward, model)
    good, bad = label(np.stack([posture(model, **LOTUS), model.qpos0])).tolist()
    assert (good > 0 and bad < -4) if reward == "log-odds" else (good, bad) == (1, 0)


def test_learning_curves_are_drawn_of_what_there_is(trained, tmp_path, capsys):
    other = shutil.copytree(trained, tmp_path / "other")
    (tmp_path / "no-run").mkdir()
    text = (trained / "progress.csv").read_text()
    rows = [*text.splitlines()[:2], "40,1.5", "60"]  # header, a whole row, parts of rows
    (other / "progress.csv").write_text("\n".join(rows))
    curve.main([str(tmp_path / "no-run"), str(other), str(trained)])
    assert "skipped: " in capsys.readouterr().err
    curve.main([str(trained), "--columns", "q", "--out", str(tmp_path / "q.png")])
    two, one = Image.open(other / "curve.png"), Image.open(tmp_path / "q.png")
    assert (two.size, one.size) == ((700, 600), (700, 350)) and np.asarray(two).std() > 10
    figure = curve.draw(curve.read_all([trained, other]), ["return", "test"])
    whole, part = figure.axes[0].lines
    assert whole.get_xdata().tolist() == [20, 40] and part.get_xdata().tolist() == [20]
    assert part.get_marker() == "." and part.get_label() == "other, seed 0"


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
    world = vlmrm.World(vlmrm.read_config(trained), 1)
    policy = shared.policies(trained, world)["kept"]
    obs, _ = world.reset(seed=0)
    for step, qpos in enumerate(seen):
        obs = world.step(policy.act(obs, deterministic=True))[0]
        assert np.array_equal(qpos, shared.states_of(world)[0])
        if step == 9:
            obs, _ = world.reset()


@pytest.mark.parametrize(
    "main, argv, message",
    [
        (evaluate.main, "nowhere", "not a run's folder"),
        (evaluate.main, "RUN --episodes 0", "from 1 to"),
        (evaluate.main, "RUN --reset-noise -1", "from 0 to"),
        (evaluate.main, "UNTRAINED", "best.pt and last.pt"),
        (evaluate.main, "OTHER", "no criterion for 'a cart'"),
        (watch.main, "RUN", "display"),
        (curve.main, "nowhere", "no run to draw"),
        (curve.main, "RUN --out curve.xyz", "cannot be drawn"),
        (landscape.main, "tail --task kneeling", "right_knee"),
        (landscape.main, "hinge --task cartpole --out .", "not overwritten"),
        (sight.main, "--task lotus --prompt cart", "no prompt"),
    ],
)
def test_bad_input_is_one_line(main, argv, message, trained, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    config = json.loads((trained / "config.json").read_text())
    folders = {"RUN": trained, "UNTRAINED": tmp_path / "untrained", "OTHER": tmp_path / "other"}
    for name, prompt in (("UNTRAINED", config["prompt"]), ("OTHER", "a cart")):
        folders[name].mkdir()
        (folders[name] / "config.json").write_text(json.dumps(config | {"prompt": prompt}))
    with pytest.raises(sac.UsageError, match=message) as error:
        main([str(folders.get(x, x)) for x in argv.split()])
    assert "\n" not in str(error.value)


# ---- tiny_clip/make.py, and the commands of the README ----

ARM, LEG = ("shoulder", "elbow"), ("hip", "knee")


@pytest.fixture
def make(monkeypatch):
    monkeypatch.syspath_prepend(vlmrm.TINY_CLIP)
    import make

    return make


def test_captions_are_true_where_the_criterion_holds(make, model):
    poses = np.stack([posture(model, **how) for how in POSTURES.values()])
    stand = poses[list(POSTURES).index("standing")]
    odds = make.judge("Humanoid-v5", poses)
    halfway = make.judge("Humanoid-v5", (poses + stand) / 2)
    goals = criteria.goals(model, poses)
    for i, task in enumerate(POSTURES):
        column = make.CONCEPTS.index(task)
        nearly = 1.1 if task == "one-leg" else 0.3  # by hand a foot is lifted by 15 cm only
        assert odds[i, column] == odds[:, column].max() > truth.TRUE - nearly
        assert (odds[~goals[task], column] <= truth.TRUE - 0.7 + 1e-6).all()
        if task != "standing":  # which is itself the start
            assert halfway[i, column] < odds[i, column] - 0.7
    assert (odds[:, make.CONCEPTS.index("upright")] == truth.FALSE).all()


def falls(x):
    """How far a caption falls: by what is missed times its slope, and more where that begins."""
    return -x - 0.3 * (1 - math.exp(-10 * x))


def no_lotus(robot):
    """What a lotus misses with its feet too far ahead, or one behind: it lifts pelvis and knees."""
    pelvis, legs = robot.pelvis.centre[0, 0], 0
    for knee, foot in zip(robot.knee[0], robot.foot[0], strict=True):
        ahead = (foot - pelvis) @ robot.torso.front[0, 0]
        legs += falls(12 * max(0, knee - 0.07)) + falls(6 * max(0, ahead - 0.18, -ahead))
    return legs + 2 * falls(10 * (pelvis[2] - 0.18)) - 0.7  # and is no goal state


def left_hip(robot):
    return robot.pelvis.point(0, 0.2, 0.05)[0, 1]


@pytest.mark.parametrize(
    "task, how, expected",
    [
        ("standing", {}, lambda robot: 0),
        (
            "standing",
            dict(left_hip_y=-40, left_knee=-80, height=1.28),
            lambda robot: falls(6 * (robot.sole.max() - 0.02)) - 0.7,  # and is no goal state
        ),
        (
            "lotus",
            dict(pitch=-15),  # the pelvis rolls back
            lambda robot: falls(6 * (0.1 - robot.pelvis.up[0, 0, 2])),
        ),
        ("lotus", dict(knee=-130), no_lotus),
        ("lotus", dict(left_hip_y=20, left_hip_z=35), no_lotus),
        (
            "hands-on-hips",
            dict(left_shoulder1=-35),
            lambda robot: falls(3 * (math.dist(robot.hand[0, 1], left_hip(robot)) - 0.06)),
        ),
    ],
)
def test_captions_fall_with_what_a_state_misses(task, how, expected, model):
    pose = posture(model, **POSTURES[task] | how)[None]
    odds = truth.graded(task, model, pose)[0]
    assert 6.5 * math.log((odds + 5.5) / 6.5) == pytest.approx(
        expected(criteria.Humanoid(model, pose)), abs=1e-6
    )


@pytest.mark.parametrize("ahead, miss", [(0.3, 0), (0.5, -0.2), (0.1, falls(4 * 0.04))])
def test_crossed_arms_are_neither_stretched_nor_in_the_chest(ahead, miss):
    torso = criteria.Part(np.zeros((1, 2, 3)), np.tile(np.eye(3), (1, 2, 1, 1)))
    hand = np.array([[[ahead, 0.2, 0], [ahead, -0.2, 0]]])  # each on the other side
    assert truth.crossed(SimpleNamespace(torso=torso, hand=hand)) == pytest.approx([2 * miss])


@pytest.mark.parametrize("task, limb", [("arms-crossed", ARM), ("one-leg", LEG)])
def test_limbs_climb_to_a_pose_that_the_criterion_knows(task, limb, make, model):
    start = np.tile(posture(model, **POSTURES["standing"]), (20, 1))
    rng = np.random.default_rng(0)
    seen = make.climb(task, model, start, rng, partial(truth.graded, task, model), 150)
    moves = [i for i in range(model.njnt) if any(x in model.joint(i).name for x in limb)]
    low, high = model.jnt_range[moves].T
    hinges = seen[:, model.jnt_qposadr[moves]]
    assert ((low <= hinges) & (hinges <= high)).all()
    stays = np.setdiff1d(np.arange(7, model.nq), model.jnt_qposadr[moves])
    assert np.abs(seen[:, stays] - start[0, stays]).max() < 0.5  # a little shaken: .1 rad
    height = on_floor(model, seen[::100])
    assert task == "arms-crossed" or np.allclose(seen[::100, 2], height)
    done = seen[criteria.goals(model, seen)[task]]
    assert len(done) > 20 and (done[:, model.jnt_qposadr[moves]].std(0) > 0.1).all()  # many ways
    odds = truth.graded(task, model, make.evenly(task, model, seen, rng, 30))
    assert (odds >= 0).sum() == 10 >= (odds < -1.5).sum() > 0


@pytest.mark.parametrize("task, limb", [("hands-on-hips", ARM), ("lotus", LEG)])
def test_one_limb_of_a_body_moves_anywhere_or_a_little(task, limb, make, model):
    start = np.tile(posture(model, **POSTURES[task]), (400, 1))
    moved = make.move_limb(task, model, start, np.random.default_rng(0), 0.01, 0)
    sides = []
    for side in ("right", "left"):
        names = tuple(f"{side}_{x}" for x in limb)
        own = [i for i in range(model.njnt) if model.joint(i).name.startswith(names)]
        sides.append(np.abs(moved - start)[:, model.jnt_qposadr[own]].max(1))
    right, left = sides
    assert (np.minimum(right, left) == 0).all() and (np.maximum(right, left) > 0).all()
    assert 150 < (right > 0).sum() < 250 and 150 < (right + left < 0.05).sum() < 250
    height = on_floor(model, moved)
    assert task == "hands-on-hips" or np.allclose(moved[:, 2], height)
    others = np.abs(moved - start)[:, 3:10].max()  # where the torso faces, the abdomen
    assert others < 1e-9


JUDGES = pytest.mark.parametrize(
    "task, folder", [("one-leg", None), ("arms-raised", vlmrm.TINY_CLIP)]
)


@pytest.fixture
def asked(make, monkeypatch):
    """For how many steps lessons were asked for that have 12."""
    asked, configure = [], shared.configure

    def short(task, **others):
        asked.append(others.pop("steps", None))
        return configure(task, **others, num_envs=2, episode_length=3, updates=1, steps=12)

    monkeypatch.setattr(shared, "configure", short)
    monkeypatch.setattr(make, "PICTURES", 20)
    return asked


def judgement(make, task, folder, states):
    """What is shown of states to whoever pays for them, and what it pays."""
    if not folder:
        return states, make.judge("Humanoid-v5", states)[:, make.CONCEPTS.index(task)]
    frames = pictures(make.new_world("Humanoid-v5"), states)
    return frames, vlmrm.CLIPReward(criteria.TASKS[task].prompt, clip="tiny_clip")(frames)


@JUDGES
def test_make_collects_what_a_policy_sees(task, folder, make, asked, monkeypatch):
    labels, train = [], vlmrm.train
    monkeypatch.setattr(vlmrm, "train", lambda *a: (labels.append(a[2]), train(*a)))
    visited = make.policy_states((7, task, 32_000), folder)
    assert asked[0] == 32_000  # 12 and 2 episodes of the test: 18 states, and each once
    assert len(np.unique(visited, axis=0)) == len(visited) == 18
    shown, paid = judgement(make, task, folder, visited)
    np.testing.assert_allclose(labels[0](shown), paid, atol=1e-5)


@JUDGES
def test_make_shows_what_was_visited_and_what_climbs_from_there(
    task, folder, make, asked, monkeypatch
):
    visited = make.policy_states((7, task, 32_000), folder)
    scores, best, dropped = [], [], []
    climb, move_limb, drop = make.climb, make.move_limb, make.drop

    def short_climb(task, model, qpos, rng, score, proposals):
        scores.append(score)
        return climb(task, model, qpos, rng, score, 10)

    def watched(task, model, qpos, rng, steps, tilts):
        best.append(truth.graded(task, model, qpos))
        return move_limb(task, model, qpos, rng, steps, tilts)

    def watched_drop(model, qpos, rng, steps):
        dropped.extend(truth.graded(task, model, qpos))
        return drop(model, qpos, rng, steps)

    for name, value in dict(climb=short_climb, move_limb=watched, drop=watched_drop).items():
        monkeypatch.setattr(make, name, value)
    frames, odds = make.task_pictures((7, task, visited, visited + 0.001), folder)
    assert len(frames) > 18 and frames.shape[1:] == (64, 64, 3)
    assert (odds[:18] == make.judge("Humanoid-v5", visited)).all()  # as they were visited
    assert odds.shape[0] == len(frames) and all(frame.std() > 10 for frame in frames)
    known = odds[:-38, make.CONCEPTS.index(task)]  # then 20 with one limb moved, 6 that fall
    np.testing.assert_allclose(np.sort(known)[-20:], np.sort(best[-1]), atol=1e-5)
    assert len(dropped) == 6 and np.isin(dropped, best[-1]).all()
    _, odds = judgement(make, task, None, visited)
    np.testing.assert_allclose(scores[0](visited), odds, atol=1e-5)
    if folder:  # from this side, and from the other
        one, other = (judgement(make, task, folder, np.roll(visited, x, 0))[1] for x in (0, 1))
        mean = (one + other.roll(-1)) / 2
        np.testing.assert_allclose(scores[1](visited), mean, atol=1e-5)
    assert len(scores) == (2 if folder else 1)


def noise(make):
    """40 pictures and their truth."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (40, make.SIZE, make.SIZE, 3), np.uint8)
    return frames, rng.uniform(-4, 2.5, (40, len(make.CONCEPTS))).astype(np.float32)


def test_make_runs_from_pictures_to_a_folder(make, tmp_path, monkeypatch, capsys):
    (frames, odds), asked, fit = noise(make), [], make.fit

    def policy_states(job, folder):
        assert folder == (tmp_path if (tmp_path / "open_clip_config.json").exists() else None)
        asked.append(job[-1])
        return np.full((30, 24), job[0])

    def task_pictures(job, folder):
        seed, task, visited, everyone = job  # 30 states for each of 8 tasks, 99 random ones
        assert make.TASKS[seed % 100] == task and len(everyone) == 339
        assert seed < 100 if folder is None else folder == tmp_path
        assert (visited == (seed - 100 if seed // 100 == 1 else seed)).all()  # the last policies'
        return np.roll(frames, seed, 0), np.roll(odds, seed, 0)

    def short_fit(net, seen, known, *how):
        for i in range(0, len(seen), 29):  # each picture beside its own truth
            assert (known[i] == odds[(seen[i] == frames).all((1, 2, 3))]).all()
        before = [p.detach().clone() for p in net.parameters()]
        fit(net, seen, known, *how, batch_size=8)
        pairs = zip(net.parameters(), before, strict=True)
        assert not any((p == q).all() for p, q in pairs if p.ndim > 1)  # all learns

    monkeypatch.setattr(shared, "pool", pool)
    short = dict(policy_states=policy_states, task_pictures=task_pictures, fit=short_fit)
    short |= dict(SIGHT=16, ROUNDS=((4, 0), (4, 32), (4, 64)), HERE=tmp_path, PICTURES=30)
    short |= dict(pole_pictures=lambda *_: (frames, odds), pictures=lambda *_: (frames, odds))
    short |= dict(random_states=lambda rng: np.zeros((99, 24)))
    for name, value in short.items():
        monkeypatch.setattr(make, name, value)
    make.main([])
    assert asked == [16] * 8 + [32] * 8 + [64] * 8
    out = capsys.readouterr().out  # 40 of each task three times, of the pole, at random
    assert "training on 1040 pictures" in out and "one-leg, states of a policy unseen: 40" in out
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert config == json.loads((vlmrm.TINY_CLIP / "open_clip_config.json").read_text())
    made, ours = (vlmrm.CLIPReward("a robot", clip=str(x)) for x in (tmp_path, "tiny_clip"))
    assert not torch.allclose(made(frames), ours(frames))


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
    scripts = {
        x.__name__: x for x in (evaluate, compare, landscape, curve, watch, sight, table1, make)
    }
    with pytest.raises(StopIteration):
        scripts[Path(program).stem].main(argv)
