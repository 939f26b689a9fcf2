"""How fast it is: ratios measured side by side in one run, so that they mean something anywhere.

    pip install --no-deps stable-baselines3 && pip install cloudpickle       # only for its rows
    python bench/speed.py                                    # about 4 minutes on 2 cores

Ways of doing the same thing take turns; rates are medians over the rounds. It prints the table of
bench/README.md. On CUDA the picture model is ViT-bigG-14 in half precision with random weights
(good for speed and for nothing else), otherwise tiny_clip.
"""

import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sac
import vlmrm

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CLIP = "ViT-bigG-14/random" if CUDA else "tiny_clip"
ROUNDS = 5
THREADS = torch.get_num_threads()  # vlmrm.build takes one for the lesson
OTHER_PROGRAM = "import torch; x = torch.rand(999, 999); print(flush=True)\nwhile True: x @ x"


def seconds(work):
    start = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def repeat(n, work):
    for _ in range(n):
        work()


def row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def compare(title, unit, n, ways):
    """A row for each way but "ours": median rates of n units, after a warm-up, and the ratio."""
    times = [[seconds(work) for work in ways.values()] for _ in range(ROUNDS + 1)]
    rates = dict(zip(ways, n / np.median(times[1:], 0), strict=True))
    ours = rates.pop("ours")
    for name, rate in rates.items():
        row(title, f"{ours:,.1f} {unit}", f"{rate:,.1f} {unit}, {name}", f"{ours / rate:.2f}")


def full_replay(size=20_000):
    """A replay of the humanoid's sizes, full of noise."""
    replay = sac.Replay(size, 45, 17, DEVICE)
    obs, action, reward = torch.randn(size, 45), torch.rand(size, 17), torch.randn(size)
    replay.add(obs, action, reward, obs, torch.zeros(size))
    return replay


def sac_updates(products, batch_size, hidden=256, n=50):
    """Updates of ours and of stable-baselines3: same networks, batch size, products and threads."""
    agent, replay = sac.SAC(45, 17, hidden=hidden, device=DEVICE), full_replay()
    ways = {"ours": partial(repeat, n, lambda: agent.update(replay.sample(batch_size)))}
    if find_spec("stable_baselines3"):
        import stable_baselines3

        env = gym.wrappers.DtypeObservation(gym.make("Humanoid-v5", **vlmrm.HUMANOID), np.float32)
        args = {"learning_starts": 2000, "policy_kwargs": {"net_arch": [hidden, hidden]}}
        model = stable_baselines3.SAC("MlpPolicy", env, device=DEVICE, **args)
        model.learn(1000)  # fills the buffer
        ways["stable-baselines3"] = partial(model.train, n, batch_size)
    compare(f"SAC, batch {batch_size}, {products}", "updates/s", n, ways)


def physics(num_envs=32, n=100):
    """Steps of Gymnasium's environments one after the other, as we use them, and in processes."""
    processes = gym.make_vec("Humanoid-v5", num_envs, "async", **vlmrm.HUMANOID)
    ways = {"ours": vlmrm.World(vlmrm.Config(), num_envs), "AsyncVectorEnv": processes}
    for name, env in ways.items():
        env.reset(seed=0)
        ways[name] = partial(repeat, n, lambda env=env: env.step(env.action_space.sample()))
    compare(f"physics, {num_envs} humanoids", "steps/s", n * num_envs, ways)
    processes.close()


def rendering(looks, size, n=10):
    """Pictures of ours and of Gymnasium's own renderer."""
    world = vlmrm.World(vlmrm.Config(looks=looks), n, size)
    world.reset(seed=0)
    theirs = gym.make("Humanoid-v5", render_mode="rgb_array", width=size, height=size)
    theirs.reset(seed=0)
    their_pictures = partial(repeat, n, lambda: vlmrm.draw(theirs))
    ways = {"ours": world.render, "Gymnasium's renderer": their_pictures}
    compare(f"{size} x {size}, {looks} looks", "pictures/s", n, ways)


def noise(label, n):
    """n pictures of the model's size."""
    return torch.randint(256, (n, label.image_size, label.image_size, 3), dtype=torch.uint8)


def picture_model(label, n):
    """uint8 pictures to rewards; the image tower alone, the limit."""
    frames = noise(label, n)
    bare = torch.no_grad()(partial(label.visual, label.preprocess(frames)))
    ways = {"ours": lambda: label(frames).cpu(), "the bare image tower, the limit": bare}
    compare(f"pictures to rewards, {n} at a time", "pictures/s", n, ways)


def iteration(cfg, label, world, agent, replay):
    """Whole iterations of Algorithm 1, and the shares of their parts (each waits for the GPU)."""
    spent = Counter()

    def timed(part, work, *args):
        result = []
        spent[part] += seconds(lambda: result.append(work(*args)))
        return result[0]

    def whole():
        block = vlmrm.rollout(world, agent.act, 0, partial(timed, "CLIP", label))
        replay.add(*block, terminated=np.zeros(block[0].shape[:2]))
        for _ in range(cfg.updates):
            batches = [replay.sample(cfg.batch_size) for _ in range(cfg.critic_steps)]
            timed("SAC", agent.update, *batches)

    world.step = partial(timed, "physics", world.step)
    world.render = partial(timed, "drawing", world.render)
    times = [seconds(whole) for _ in range(ROUNDS)]
    shares = ", ".join(f"{part} {s / sum(times):.0%}" for part, s in spent.items())
    title = f"{cfg.num_envs} x {cfg.episode_length} transitions, {cfg.updates} updates"
    row(title, f"{np.median(times):.2f} s", shares, "")


def busy_machine(cfg, label, world, agent, replay, n=10):
    """Rollouts and updates in one thread and in all, alone and beside another program in all."""
    other = subprocess.Popen([sys.executable, "-c", OTHER_PROGRAM], stdout=subprocess.PIPE)
    other.stdout.readline()
    other.send_signal(signal.SIGSTOP)
    world.cfg = replace(cfg, episode_length=n)
    works = {
        "steps of all": partial(vlmrm.rollout, world, agent.act, 0, label),
        "updates": partial(repeat, n, lambda: agent.update(replay.sample(cfg.batch_size))),
    }

    def beside(work):
        other.send_signal(signal.SIGCONT)
        work()
        other.send_signal(signal.SIGSTOP)

    try:
        for threads in (1, THREADS):
            torch.set_num_threads(threads)
            for unit, work in works.items():
                ways = {"ours": work, "beside another program": partial(beside, work)}
                compare(f"{unit}, {threads} threads", f"{unit}/s", n, ways)
    finally:
        other.kill()


def main():
    device = torch.cuda.get_device_name() if CUDA else "no GPU"
    print(f"{device}, torch {torch.__version__}, {THREADS} threads, {CLIP}\n")
    row("what", "ours", "the other", "ratio")
    row(*["---"] * 4)
    sac_updates("torch's products", 256)
    sac.use_onednn()
    sac_updates("our products", 256)
    sac_updates("our products", 512)
    physics()
    for looks, size in (("plain", 64), ("plain", 224), ("paper", 224)):
        rendering(looks, size)
    cfg = vlmrm.configure(prompt="a humanoid robot kneeling", clip=CLIP)
    picture_model(vlmrm.CLIPReward("a humanoid robot", clip=CLIP, device=DEVICE), 64)
    parts = vlmrm.build(cfg)
    iteration(cfg, *parts)
    busy_machine(cfg, *parts)


if __name__ == "__main__":
    main()
