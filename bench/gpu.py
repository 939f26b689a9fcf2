"""For the day when a GPU is at hand: does all of it work there, and how fast? Each part has its own
process: what fails or hangs there is a row, and the rest goes on. Within 10 minutes:

    python bench/gpu.py > table.md                               # a table for bench/README.md
    python bench/gpu.py --device cpu --models ViT-B-32 --short   # tries this script itself
"""
import argparse, copy, multiprocessing, os, resource, signal, subprocess, sys, tempfile, time
from functools import partial
from importlib.util import find_spec

import open_clip, torch.utils.flop_counter  # slow, so once; but no CUDA, no OpenGL before a fork

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [f"{ROOT}/bench", ROOT]
MODELS = "ViT-bigG-14", "ViT-H-14", "ViT-SO400M-14-SigLIP2", "ViT-L-14"
FORK = multiprocessing.get_context("fork")
GPU = "nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader".split()
LESSON = [sys.executable, f"{ROOT}/vlmrm.py", *"--task cartpole --clip tiny_clip --out run".split()]
SMALL = "--num-envs 2 --episode-length 10 --learning-starts 20 --updates 2 --steps 400".split()

def row(what, value):
    print(f"| {what} | {' '.join(str(value).split())[:300]} |", flush=True)

def output(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout

def machine(args):
    import vlmrm
    row("torch, open_clip, MuJoCo", [x.__version__ for x in (torch, open_clip, vlmrm.mujoco)])
    row("GPU, memory, driver", output(*GPU) if args.device == "cuda" else "not used")

def rendering(args):
    import speed, vlmrm, OpenGL.GL as GL
    world = vlmrm.World(vlmrm.Config(task="kneeling"), 2 if args.short else 32, 224)
    rate = world.num_envs / min(speed.seconds(world.render) for _ in range(5))
    row("pictures of 224 x 224", f"{rate:,.0f}/s by {GL.glGetString(GL.GL_RENDERER).decode()}")

def updates(args):
    import sac, speed
    agent, replay = sac.SAC(45, 17, device=args.device), speed.full_replay()
    n, used, start = 1 if args.short else 100, [], time.time()
    for _ in range(40):
        speed.seconds(speed.repeat, n, lambda: agent.update(replay.sample(256)))
        used.append(torch.cuda.memory_reserved() / 2 ** 20)
    row(f"40 x {n} SAC updates of 256", f"{40 * n / (time.time() - start):.0f}/s; GPU memory "
        f"{used[2]:.0f} MiB{', failed: it grows' * (used[-1] > used[2])}, at last {used[-1]:.0f}")

def lesson(args):
    first = subprocess.Popen(LESSON + (SMALL if args.short else []))
    while first.poll() is None and not os.path.exists("run/last.pt"):
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    assert first.wait() == 130, f"exit code {first.returncode}, not 130"
    row("cart-pole, interrupted and resumed", output(*LESSON[:2], "--resume", "run"))

def torchrun(args):
    launcher = LESSON[0], "-m", "torch.distributed.run", "--standalone"
    row("torchrun, one process", output(*launcher, *LESSON[1:], *SMALL))

def precision(args):
    import vlmrm
    for clip in ("tiny_clip", f"{args.models[-1]}/random"):
        full = vlmrm.CLIPReward("a humanoid robot kneeling", clip=clip).to(args.device)
        half = copy.deepcopy(full)
        half.visual, half.dtype = half.visual.half(), torch.float16  # as CLIPReward does on CUDA
        world = vlmrm.World(vlmrm.Config(task="kneeling", looks="plain"), 1, full.image_size)
        states = world.states() + torch.randn(4 if args.short else 200, 24).numpy() / 5
        a, b = (reward(world.render(states)) for reward in (full, half))
        row(f"{clip}, {len(a)} rewards +- {a.std():.0e}", f"float16: {(a - b).abs().max():.0e} off")

def model(args, name):
    import speed, vlmrm
    if "SigLIP2" in name and not find_spec("transformers"):
        return row(name, "skipped: its tokenizer needs the package transformers")
    start, (n, steps, size) = time.time(), (2, 2, 256) if args.short else (32, 20, 8192)
    reward = vlmrm.CLIPReward("a humanoid robot", clip=f"{name}/random", device=args.device)
    host, gpu = resource.getrusage(resource.RUSAGE_SELF), torch.cuda.max_memory_allocated()
    row(f"{name}, loading", f"{time.time() - start:.0f} s with random weights; host memory at most "
        f"{host.ru_maxrss / 2 ** 20:.1f} GiB, GPU memory {gpu / 2 ** 30:.1f}")
    x = torch.randn(n, 3, *reward.size).to(args.device, reward.dtype)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        reward.visual(x[:1].clone().requires_grad_())  # fused, without gradients, it does not count
    square, flop = torch.randn(size, size).to(x), counter.get_total_flops()
    world = vlmrm.World(vlmrm.Config(task="kneeling", episode_length=steps), n, reward.image_size)
    works = (partial(speed.repeat, steps, torch.mm, square, square),
             torch.no_grad()(partial(speed.repeat, steps, reward.visual, x)),
             partial(vlmrm.rollout, world, vlmrm.sac.Actor(45, 17).act, 0, reward, vlmrm.Clock()))
    product, *rates = (steps / min(speed.seconds(work) for _ in range(2)) for work in works)
    peak = 2 * size ** 3 * product  # FLOP/s
    row(f"{name}, tower; whole loop; their shares of a product's {peak / 1e12:.2f} TFLOP/s",
        "; ".join(f"{n * x:,.1f} pictures/s, {n * x * flop / peak:.0%}" for x in rates))

def guarded(args, name, part):
    signal.alarm(max(1, min(200, int(args.end - time.time()))))  # the end, should it hang
    os.chdir(tempfile.mkdtemp())
    try:
        torch.zeros(1, device=args.device)  # it must not fall back to the CPU
        part(args)
    except Exception as error:
        row(name, f"failed: {type(error).__name__}: {error}")

def main(parts=(machine, rendering, updates, lesson, torchrun, precision)):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args(namespace=argparse.Namespace(end=time.time() + 590))
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
