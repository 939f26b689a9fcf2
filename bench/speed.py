"""How fast it is, in ratios measured side by side in one run, so that they mean something on any machine.

    pip install --no-deps stable-baselines3 && pip install cloudpickle       # only for the SAC row
    python bench/speed.py                                                   # about 5 minutes on 2 slow cores

Ways of doing the same thing take turns; rates are medians over the rounds. On CUDA the picture model is ViT-bigG-14 with
random weights (good for speed and for nothing else), otherwise tiny_clip.
"""
import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("MUJOCO_GL", "egl")  # Gymnasium's own renderer would ask for a window
import sac
import vlmrm

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def rate(work):
    """Units per second of work(), which returns how many units it did; the GPU is waited for."""
    start = time.perf_counter()
    units = work()
    if CUDA:
        torch.cuda.synchronize()
    return units / (time.perf_counter() - start)


def compare(title, unit, rounds, **ways):
    """Print the median rate of each way (after one warm-up round) and its ratio to that of the last; return the rates."""
    rates = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, work in ways.items():
            rates[name].append(rate(work))
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    *_, reference = medians.values()
    for name, value in medians.items():
        print(f"{title:<44} {name:<26} {value:10.1f} {unit:<10} {value / reference:6.2f} x", flush=True)
    return medians


class Sized(gym.Env):
    """A task of the humanoid's sizes that does nothing: only what SAC costs is measured."""
    observation_space = gym.spaces.Box(-np.inf, np.inf, (45,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (17,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(45, np.float32), {}

    def step(self, action):
        return np.random.standard_normal(45).astype(np.float32), 0.0, False, False, {}


def sac_updates(rounds, hidden, batch_size, n=50):
    """Gradient updates of ours and of stable-baselines3, as it comes and with our matrix products: same networks, batch size, threads."""
    agent, replay = sac.SAC(45, 17, hidden=hidden, device=DEVICE), sac.Replay(20_000, 45, 17, DEVICE)
    replay.add(torch.randn(20_000, 45), torch.rand(20_000, 17) * 2 - 1, torch.randn(20_000), torch.randn(20_000, 45), torch.zeros(20_000))

    torchs_own = lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "none")

    def ours(products):
        products()
        for _ in range(n):
            agent.update(replay.sample(batch_size))
        return n
    ways = {"ours": lambda: ours(sac.use_onednn), "ours, torch's own products": lambda: ours(torchs_own)}
    try:
        import stable_baselines3
        model = stable_baselines3.SAC("MlpPolicy", Sized(), buffer_size=20_000, learning_starts=0, device=DEVICE,
                                      policy_kwargs={"net_arch": [hidden, hidden]})
        model.learn(1)  # sets up the logger
        for _ in range(2_000):
            model.replay_buffer.add(*np.random.standard_normal((2, 1, 45)), np.random.uniform(-1, 1, (1, 17)),
                                    np.zeros(1), np.zeros(1), [{}])

        def theirs(products):
            products()
            model.train(n, batch_size)
            return n
        ways |= {"stable-baselines3, oneDNN": lambda: theirs(sac.use_onednn), "stable-baselines3": lambda: theirs(torchs_own)}
    except ImportError:
        print("stable-baselines3 is not installed: its SAC row is left out")
    compare(f"(a) SAC, {hidden} hidden units, batch {batch_size}", "updates/s", rounds, **ways)


def physics(rounds, num_envs=32, n=100):
    """Environment steps of World and of Gymnasium's AsyncVectorEnv, random actions."""
    world = vlmrm.World("Humanoid-v5", num_envs)
    theirs = gym.make_vec("Humanoid-v5", num_envs, "async", terminate_when_unhealthy=False, **{
        f"include_{part}_in_observation": False for part in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")})

    def steps(env):
        env.reset(seed=0)
        actions = np.random.default_rng(0).uniform(-0.4, 0.4, (n, num_envs, 17)).astype(np.float32)
        for action in actions:
            env.step(action)
        return n * num_envs
    compare("(b) humanoid, 32 simulations", "steps/s", rounds, ours=lambda: steps(world), AsyncVectorEnv=lambda: steps(theirs))
    theirs.close()


def rendering(rounds, size, n=20):
    """Pictures of ours in each of the looks, and of Gymnasium's own renderer."""
    theirs = gym.make("Humanoid-v5", render_mode="rgb_array", width=size, height=size)
    theirs.reset(seed=0)

    def gymnasium():
        for _ in range(n):
            theirs.render()
        return n
    worlds = {looks: vlmrm.World("Humanoid-v5", n, size, looks) for looks in ("plain", "paper", "original")}
    for world in worlds.values():
        world.reset(seed=0)
    ours = {f"ours, {looks}": lambda world=world: len(world.render()) for looks, world in worlds.items()}
    compare(f"(b) pictures of {size} x {size}", "frames/s", rounds, **ours, gymnasium=gymnasium)
    theirs.close()


def drawing(rounds, size, n=4):
    """What drawing the paper's looks spends its time on: our settings with each economy taken back, down to MuJoCo's defaults."""
    finer = {"shadow map of 4096": dict(shadowsize=4096), "4 samples a pixel": dict(offsamples=4), "28 x 16 segments": dict(numslices=28, numstacks=16)}
    finer = {"ours": {}} | finer | {"all three: MuJoCo's": {k: v for part in finer.values() for k, v in part.items()}}
    world, dress, ways = vlmrm.World("Humanoid-v5", 1), vlmrm.dress, {}
    for name, quality in finer.items():
        def as_fine(*args, quality=quality):
            dress(*args)
            for setting, value in quality.items():
                setattr(args[0].visual.quality, setting, value)
        vlmrm.dress = as_fine
        painter = vlmrm.Painter(world.xml, world.scene, "paper", size)
        ways[name] = lambda painter=painter: len(painter.paint(np.tile(world.model.qpos0, (n, 1))))
    vlmrm.dress = dress
    compare(f"(b) paper's looks, {size} x {size}", "frames/s", rounds, **ways)


def picture_model(rounds, reward, clip, n):
    """uint8 pictures -> rewards; the image tower alone on ready tensors (the limit); PIL and autocast, one by one."""
    frames = np.random.default_rng(0).integers(0, 256, (n, reward.image_size, reward.image_size, 3), np.uint8)
    ready = reward.preprocess(torch.from_numpy(frames).to(DEVICE))
    ready = ready.half() if CUDA else ready
    plain = vlmrm.CLIPReward("a robot", clip=clip, device="cpu", random_weights=CUDA)
    plain.to(DEVICE)
    transform = vlmrm.open_clip.transform.image_transform_v2(plain.config, is_train=False)

    def the_plain_way():
        with torch.no_grad(), torch.autocast(DEVICE):
            x = torch.stack([transform(Image.fromarray(frame)) for frame in frames]).to(DEVICE)
            s = vlmrm.normalize(plain.visual(x).float(), dim=-1)
        return len(vlmrm.goal_baseline_reward(s, plain.goal, plain.baseline, 0.0).cpu())

    def tower():
        with torch.no_grad():
            return len(reward.visual(ready))
    return compare(f"(c) {n} pictures at a time", "frames/s", rounds, ours=lambda: len(reward(frames)), tower=tower,
                   **{"PIL, autocast": the_plain_way})


def iteration(rounds, reward, settings):
    """Whole iterations of Algorithm 1, with the time spent in each part, against the same parts alone at their best."""
    num_envs, num_steps, updates, batch_size = (settings[k] for k in ("num_envs", "rollout_steps", "updates", "batch_size"))
    world = vlmrm.World("Humanoid-v5", num_envs, reward.image_size, settings["looks"])
    agent = sac.SAC(45, 17, hidden=settings["hidden"], layer_norm=settings["layer_norm"], device=DEVICE)
    replay = sac.Replay(100_000, 45, 17, DEVICE)
    loop = sac.train(world, agent, replay, 10**9, rollout_steps=num_steps, updates=updates, batch_size=batch_size,
                     learning_starts=0, label=reward)
    next(loop)
    policy, frames, action = agent.policy(), world.render(), np.zeros((num_envs, 17), np.float32)
    parts = {"act": lambda: policy.act(world.observe()), "physics": lambda: world.step(action), "rendering": world.render,
             "CLIP": lambda: reward(frames)}

    def steps(work):
        for _ in range(num_steps):
            work()
        return 1
    seconds = {name: [] for name in (*parts, "SAC", "whole")}
    for _ in range(rounds):
        for name, work in parts.items():
            seconds[name].append(1 / rate(lambda: steps(work)))
        seconds["SAC"].append(1 / rate(lambda: len(sac.update_many(agent, replay, batch_size, updates)) > 0))
        seconds["whole"].append(1 / rate(lambda: next(loop) is not None))
    inside, whole = next(loop)["seconds"], statistics.median(seconds.pop("whole"))
    best = {name: min(values) for name, values in seconds.items()}
    print(f"(d) an iteration of {num_envs * num_steps} transitions and {updates} updates: {whole:.2f} s, {num_envs * num_steps / whole:.0f} "
          "transitions/s; inside it: " + ", ".join(f"{part} {value / sum(inside.values()):.0%}" for part, value in inside.items()))
    print("    parts alone, best of the rounds: " + ", ".join(f"{part} {value:.2f} s" for part, value in best.items())
          + f"; their sum is {sum(best.values()) / whole:.2f} of the whole, the slowest {max(best.values()) / whole:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", default="ViT-bigG-14/" if CUDA else str(vlmrm.TINY_CLIP), help="picture model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name() if CUDA else f'CPU, {torch.get_num_threads()} threads'}, torch {torch.__version__}")
    reward = vlmrm.CLIPReward("a humanoid robot kneeling", clip=args.clip, device=DEVICE, random_weights=CUDA)
    settings = vlmrm.FEWER | (vlmrm.LESSON if args.clip == str(vlmrm.TINY_CLIP) else {})
    sac_updates(args.rounds, 256, 256)
    sac_updates(args.rounds, 256, 512)
    physics(args.rounds)
    rendering(args.rounds, 64)
    rendering(args.rounds, 224)
    drawing(args.rounds, 224)
    picture_model(args.rounds, reward, args.clip, 64)
    iteration(args.rounds, reward, settings)
    if CUDA:
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB; half-precision matmul {matmul_rate() / 1e12:.0f} TFLOP/s")


def matmul_rate(n=8192):
    """Half-precision floating point operations per second of a large matrix product."""
    x = torch.randn(n, n, device=DEVICE, dtype=torch.float16)

    def work():
        for _ in range(20):
            x @ x
        return 20 * 2 * n ** 3
    rate(work)
    return rate(work)


if __name__ == "__main__":
    main()
