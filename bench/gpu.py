"""For the day when a GPU is at hand: does all of it work there, and how fast? Each part has its own
process: what fails or hangs there is a row, and the rest goes on. Within 10 minutes:

    python bench/gpu.py > table.md                               # a table for bench/README.md
    python bench/gpu.py --device cpu --models ViT-B-32 --short   # tries this script itself
"""

import argparse
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.utils.flop_counter

# CUDA and OpenGL bear no fork: they come with `import vlmrm`, in the process of each part.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [f"{ROOT}/bench", str(ROOT)]
MODELS = "ViT-bigG-14", "ViT-H-14", "ViT-SO400M-14-SigLIP2", "ViT-L-14"
FORK = multiprocessing.get_context("fork")
PROGRAM = sys.executable, f"{ROOT}/vlmrm.py"
LESSON = "--prompt upright --env-id InvertedPendulum-v5 --clip tiny_clip --out run".split()
SMALL = "--num-envs 2 --episode-length 10 --learning-starts 20 --updates 2 --steps 400".split()


def row(what, value):
    print(f"| {what} | {' '.join(str(value).split())[:300]} |", flush=True)


def fastest(n, work):
    """n units per second, the best of three times."""
    import speed

    return n / min(speed.seconds(work) for _ in range(3))


def machine(args):
    row("versions", [f"{x} {version(x)}" for x in ("torch", "open_clip_torch", "mujoco")])
    row("GPUs", [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())])


def rendering(args):
    from OpenGL import GL
    from speed import vlmrm

    world = vlmrm.World(vlmrm.Config(), 2 if args.short else 32, 224)
    world.reset(seed=0)
    rate = fastest(world.num_envs, world.render)
    row("pictures of 224 x 224", f"{rate:,.0f}/s by {GL.glGetString(GL.GL_RENDERER).decode()}")


def updates(args):
    import speed

    agent, replay = speed.sac.SAC(45, 17, device=args.device), speed.full_replay()
    n = 9 if args.short else 999
    work = partial(speed.repeat, n, lambda: agent.update(replay.sample(256)))
    speed.seconds(work)
    before = torch.cuda.memory_reserved()
    rate, more = fastest(n, work), torch.cuda.memory_reserved() - before
    row("SAC updates of 256", f"{rate:.0f}/s; GPU memory +{more} bytes")


def lesson(args):
    first = subprocess.Popen([*PROGRAM, *LESSON, *(SMALL if args.short else [])], stdout=2)
    while first.poll() is None and not os.path.exists("run/last.pt"):
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    assert first.wait() == 130, first.returncode
    last = subprocess.check_output([*PROGRAM, "--resume", "run"], text=True)
    row("cart-pole, interrupted and resumed", last.splitlines()[-1])


def precision(args):
    """As training does it, in half precision and split among all GPUs, and as the CPU does it."""
    import vlmrm

    first, cpu = (
        vlmrm.CLIPReward("a humanoid robot kneeling", device=x) for x in (args.devices[0], "cpu")
    )
    ways = vlmrm.split_reward(first, args.devices), cpu
    world, frames = vlmrm.World(vlmrm.Config(looks="plain"), 1, cpu.image_size), []
    sim, rng = world.sims[0], np.random.default_rng(0)
    for _ in range(4 if args.short else 200):
        sim.set_state(sim.init_qpos + rng.normal(0, 0.2, sim.model.nq), sim.init_qvel)
        frames += list(world.render())
    a, b = (reward(frames).cpu() for reward in ways)
    off = (a - b).abs().max()
    row(f"{len(a)} rewards +- {a.std():.0e}", f"{args.devices} and CPU: {off:.0e} off")


def model(args, name):
    from speed import noise, repeat, vlmrm

    n, steps, size = (2, 2, 256) if args.short else (32, 20, 8192)
    start = time.monotonic()
    first = args.devices[0]
    tower = vlmrm.CLIPReward("a humanoid robot", clip=f"{name}/random", device=first)
    label = vlmrm.split_reward(tower, args.devices)
    took, gpu = time.monotonic() - start, torch.cuda.max_memory_allocated() / 2**30
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row(f"{name}, loading", f"{took:.0f} s; at most {host:.1f} GiB, on the GPU {gpu:.1f}")
    x = tower.preprocess(noise(label, n))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        tower.visual(x[:1].clone().requires_grad_())  # fused, without gradients, it does not count
    square = torch.randn(size, size).to(x)
    peak = fastest(2 * size**3 * steps, partial(repeat, steps, lambda: square @ square))  # FLOP/s
    share = counter.get_total_flops() / peak
    world = vlmrm.World(vlmrm.Config(episode_length=steps), n, label.image_size)
    ways = {
        "its tower": torch.no_grad()(partial(repeat, steps, lambda: tower.visual(x))),
        "rollout": partial(vlmrm.rollout, world, None, 0, label),
    }
    for way, work in ways.items():
        rate = fastest(n * steps, work)
        used = f"{rate * share:.0%} of a product's {peak / 1e12:.2f} TFLOP/s"
        row(f"{name}, {way}", f"{rate:,.1f} pictures/s, {used}")


def guarded(args, name, part):
    signal.alarm(max(1, min(200, int(args.end - time.time()))))  # the end, should it hang
    os.chdir(tempfile.mkdtemp())
    try:
        torch.zeros(1, device=args.device)  # it must not fall back to the CPU
        args.devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu", "cpu"]
        part(args)
    except Exception as error:
        row(name, f"failed: {type(error).__name__}: {error}")


def main(parts=(machine, rendering, updates, lesson, precision)):
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    args.end = time.time() + 590
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    parts = {f.__name__: f for f in parts} | {x: partial(model, name=x) for x in args.models}
    print("| what | measured |\n|---|---|", flush=True)
    for name, part in parts.items():
        process = FORK.Process(target=guarded, args=(args, name, part))
        process.start()
        process.join()
        if process.exitcode != 0:
            row(name, f"failed: exit code {process.exitcode} (-14: too slow)")


if __name__ == "__main__":
    main()
