"""pytest bench: both scripts in miniature, without a GPU."""
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch
os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco
os.environ.setdefault("OMP_NUM_THREADS", "1")

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH))


def test_speed_measures_ways_in_turns(capsys):
    import speed
    import vlmrm
    dress = vlmrm.dress
    speed.sac_updates(1, 8, 4, n=2)
    speed.physics(1, num_envs=2, n=2)
    speed.rendering(1, 16, n=1)
    speed.drawing(1, 16, n=1)
    config = vlmrm.configure(task="kneeling", clip="tiny_clip", num_envs=2, episode_length=2,
                             updates=3, batch_size=4, hidden=8, replay=10)
    label, *others = vlmrm.build(config)
    speed.picture_model(1, label, 2)
    speed.iteration(1, config, label, *others)
    out = capsys.readouterr().out
    ratios = [float(x) for x in re.findall(r"\| ([\d.]+) \|$", out, re.M)]
    assert len(ratios) >= 12 and min(ratios) > 0 and "SAC" in out.splitlines()[-1]
    assert vlmrm.dress is dress  # the patch is undone


SCRIPT = """
import os, gpu, gymnasium, torch._dynamo  # once, before the forks: each takes seconds
def broken(args):
    raise MemoryError("no room")
def killed(args):
    os.kill(os.getpid(), 9)
gpu.main((gpu.machine, gpu.rendering, gpu.updates, gpu.precision, broken, killed))
"""


def test_gpu_prints_a_table_and_goes_on_after_a_failure():
    argv = [sys.executable, "-c", SCRIPT, "--device", "cpu", "--models", "ViT-S-32-alt", "--short"]
    run = subprocess.run(argv, cwd=BENCH, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    head, line, *rows = run.stdout.splitlines()
    assert all(row.count("|") == 3 for row in [head, line, *rows])
    failed = [row for row in rows if "failed" in row]
    assert failed == ["| broken | failed: MemoryError: no room |",
                      "| killed | failed: exit code -9 (-14: too slow) |"]
    assert re.search(r"pictures of 224 x 224 \| [\d,]+/s by \w", run.stdout)
    assert "ViT-S-32-alt, loading" in rows[-2] and re.search(r"pictures/s, \d+%; ", rows[-1])


def test_gpu_asks_of_the_lesson_what_the_program_knows():
    import gpu
    import vlmrm
    asked = vlmrm.parse([*gpu.LESSON[2:], *gpu.SMALL])
    assert asked.pop("out") == "run" and vlmrm.configure(**asked).steps == 400
