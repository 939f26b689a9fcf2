"""pytest bench: the scripts in miniature, without a GPU."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when first imported, also for test_vlmrm.py
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch
os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco
os.environ.setdefault("OMP_NUM_THREADS", "1")

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH))


@pytest.mark.parametrize(
    "name, text, fault",
    [
        ("x.py", "def f():\n" + 39 * "    x = (1,)  # one\n\n"[:-1], ""),
        ("x.py", "def f():\n" + 40 * "    x = 1\n", "x.py:1 f: 125 tokens, 41 lines"),
        ("sac.py", 1301 * "+x", "sac.py: 2602 tokens, 1 lines"),
    ],
)
def test_tokens_finds_what_is_too_long(name, text, fault):
    import tokens

    faults = "".join(tokens.fault(*size) for size in tokens.measure(name, text))
    assert faults.partition(";")[0] == fault


def test_speed_measures_ways_in_turns(capsys, monkeypatch):
    import speed

    monkeypatch.setattr(speed, "ROUNDS", 1)
    speed.sac_updates("products", 4, hidden=8, n=2)
    speed.physics(num_envs=2, n=2)
    speed.rendering("plain", 16, n=1)
    small = {"num_envs": 2, "episode_length": 2, "updates": 3, "batch_size": 4, "replay": 10}
    cfg = speed.vlmrm.configure(prompt="kneeling", clip="tiny_clip", **small)
    parts = speed.vlmrm.build(cfg)
    speed.picture_model(speed.vlmrm.CLIPReward("kneeling"), 2)
    speed.iteration(cfg, *parts)
    speed.busy_machine(cfg, *parts, n=1)
    out = capsys.readouterr().out
    ratios = [float(x) for x in re.findall(r"\| ([\d.]+) \|$", out, re.M)]
    assert len(ratios) >= 7 and min(ratios) > 0  # 8 with stable-baselines3
    assert re.search(r"physics \d+%, drawing \d+%, CLIP \d+%, SAC \d+%", out)


def test_a_picture_is_one_vector_also_of_coca(monkeypatch):
    import open_clip
    import torch
    from speed import vlmrm

    both = dict(width=64, layers=1, output_tokens=True)
    text = dict(width=64, layers=1, heads=1, context_length=76)
    eyes = both | dict(image_size=64, patch_size=32, attentional_pool=True)
    coca = open_clip.CoCa(8, text, text | both | dict(embed_cls=True), eyes)
    coca.visual.preprocess_cfg, theirs = {"size": 64}, copy.deepcopy(coca)
    parts = coca, open_clip.get_tokenizer("coca_ViT-B-32")
    monkeypatch.setattr(vlmrm, "load_clip", lambda *args: parts)
    reward, frames = vlmrm.CLIPReward("a dog"), torch.randint(256, (3, 64, 64, 3)).byte()
    s, g = theirs.encode_image(reward.preprocess(frames)), theirs.encode_text(parts[1](["a dog"]))
    torch.testing.assert_close(reward(frames), torch.cosine_similarity(s, g))  # Eq. 2


SCRIPT = """
import os, gpu, gymnasium, open_clip, torch._dynamo  # once, before the forks: each takes seconds
def broken(args):
    raise MemoryError("no room")
def killed(args):
    os.kill(os.getpid(), 9)
gpu.main((gpu.machine, gpu.rendering, gpu.updates, gpu.precision, broken, killed))
import vlmrm
assert vlmrm.parse([*gpu.LESSON, *gpu.SMALL])["out"] == "run"  # what the part `lesson` calls
"""


def test_gpu_prints_a_table_and_goes_on_after_a_failure():
    argv = [sys.executable, "-c", SCRIPT, "--device", "cpu", "--models", "ViT-S-32-alt", "--short"]
    out = subprocess.check_output(argv, cwd=BENCH, text=True, timeout=120)
    rows = out.splitlines()
    assert all(row.count("|") == 3 for row in rows)
    assert [row for row in rows if "failed" in row] == [
        "| broken | failed: MemoryError: no room |",
        "| killed | failed: exit code -9 (-14: too slow) |",
    ]
    assert re.search(r"pictures of 224 x 224 \| [\d,]+/s by \w", out)
    assert re.search(r"rewards .* and CPU: (0e\+00|\de-0[6-9]) off", out)  # two copies and one
    assert "ViT-S-32-alt, loading" in rows[-3] and re.search(r"pictures/s, \d+% of", rows[-1])
