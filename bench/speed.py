"""How fast it is: ratios measured side by side in one run, so that they mean something anywhere.

    pip install --no-deps stable-baselines3 && pip install cloudpickle       # only for its rows
    python bench/speed.py                                    # about 6 minutes on 2 slow cores

Ways of doing the same thing take turns; rates are medians over the rounds. It prints the table of
bench/README.md. On CUDA the picture model is ViT-bigG-14 in half precision with random weights
(good for speed and for nothing else), otherwise tiny_clip.
"""
import argparse, copy, statistics, sys, time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sac
import vlmrm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

def seconds(work, *args):
    start = time.perf_counter()
    work(*args)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start

def repeat(n, work, *args):
    for _ in range(n):
        work(*args)

def compare(title, unit, rounds, n, ways):
    """A row for each way but the first: median rates of n units, after a warm-up, and the ratio."""
    rates = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, work in ways.items():
            rates[name].append(n / seconds(work))
    (_, ours), *others = [(name, statistics.median(x[1:])) for name, x in rates.items()]
    for name, other in others:
        row = title, f"{ours:,.1f} {unit}", f"{other:,.1f} {unit}, {name}", f"{ours / other:.2f}"
        print(f"| {' | '.join(row)} |", flush=True)

def full_replay(size=20_000):
    """A replay of the humanoid's sizes, full of noise."""
    replay = sac.Replay(size, 45, 17, DEVICE)
    noise = torch.randn(size, 45), torch.rand(size, 17) * 2 - 1, torch.randn(size)
    replay.add(*noise, torch.randn(size, 45), torch.zeros(size))
    return replay

def sac_updates(rounds, hidden, batch_size, n=50):
    """Updates of ours and of stable-baselines3: the same networks, batch size and threads."""
    agent, replay = sac.SAC(45, 17, hidden=hidden, device=DEVICE), full_replay()

    def updates(ours, products):
        products()
        if ours:
            repeat(n, lambda: agent.update(replay.sample(batch_size)))
        else:
            model.train(n, batch_size)
    ways = {"ours": partial(updates, True, sac.use_onednn),
            "ours with torch's own products": partial(updates, True, torchs_products)}
    if find_spec("stable_baselines3"):
        import stable_baselines3
        env = gym.wrappers.DtypeObservation(gym.make("Humanoid-v5", **vlmrm.HUMANOID), np.float32)
        model = stable_baselines3.SAC("MlpPolicy", env, buffer_size=2000, learning_starts=2000,
                                      device=DEVICE, policy_kwargs={"net_arch": [hidden, hidden]})
        model.learn(1000)  # fills the buffer
        ways["stable-baselines3"] = partial(updates, False, torchs_products)
        ways["stable-baselines3 with our products"] = partial(updates, False, sac.use_onednn)
    compare(f"SAC, {hidden} hidden units, batch {batch_size}", "updates/s", rounds, n, ways)
    sac.use_onednn()

def torchs_products():
    """Undo sac.use_onednn()."""
    torch.backends.mkldnn.matmul.fp32_precision = "none"

def physics(rounds, num_envs=32, n=100):
    """Steps of Gymnasium's environments one after the other, as we use them, and in processes."""
    world = vlmrm.World(vlmrm.Config(task="kneeling"), num_envs)
    processes = gym.make_vec("Humanoid-v5", num_envs, "async", **vlmrm.HUMANOID)
    processes = gym.wrappers.vector.RescaleAction(processes, np.float32(-1), np.float32(1))
    actions = np.random.default_rng(0).uniform(-1, 1, (n, num_envs, 17)).astype(np.float32)

    def steps(env):
        env.reset(seed=0)
        for action in actions:
            env.step(action)
    ways = {"ours": partial(steps, world), "AsyncVectorEnv": partial(steps, processes)}
    compare(f"physics, {num_envs} humanoids", "steps/s", rounds, n * num_envs, ways)
    processes.close()

def rendering(rounds, size, n=10):
    """Pictures of ours in each of the looks, and of Gymnasium's own renderer."""
    theirs = gym.make("Humanoid-v5", render_mode="rgb_array", width=size, height=size)
    theirs.reset(seed=0)
    theirs.render()

    def pictures():  # else it draws, quickly, into whatever context was used last
        theirs.unwrapped.mujoco_renderer._get_viewer("rgb_array").make_context_current()
        repeat(n, theirs.render)
    for looks in ("plain", "paper", "original"):
        world = vlmrm.World(vlmrm.Config(task="kneeling", looks=looks), n, size)
        world.reset(seed=0)
        ways = {"ours": world.render, "Gymnasium's renderer": pictures}
        compare(f"{size} x {size}, {looks} looks", "pictures/s", rounds, n, ways)
    theirs.close()

def drawing(rounds, size, n=4):
    """What each economy of `dress` saves: the paper's looks with it taken back."""
    finer = {"a shadow map of 4096": dict(shadowsize=4096), "4 samples a pixel": dict(offsamples=4),
             "28 x 16 segments": dict(numslices=28, numstacks=16)}
    finer["all three, MuJoCo's settings"] = {k: v for x in finer.values() for k, v in x.items()}
    dress, ways = vlmrm.dress, {}
    for name, quality in {"ours": {}, **finer}.items():
        def as_fine(spec, *args):
            dress(spec, *args)
            for setting, value in quality.items():
                setattr(spec.visual.quality, setting, value)
        vlmrm.dress = as_fine
        world = vlmrm.World(vlmrm.Config(task="kneeling", looks="paper"), n, size)
        world.reset(seed=0)
        world.open_renderer()
        ways[name] = world.render
    vlmrm.dress = dress
    compare(f"{size} x {size}, the paper's looks", "pictures/s", rounds, n, ways)

def picture_model(rounds, reward, n):
    """uint8 pictures to rewards; open_clip's own way to do it; the tower alone, the limit."""
    shape = n, reward.image_size, reward.image_size, 3
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    ready = reward.preprocess(torch.from_numpy(frames))

    @torch.no_grad()
    def the_plain_way():
        x = torch.stack([reward.transform(Image.fromarray(frame)) for frame in frames])
        with torch.autocast(DEVICE):
            s = torch.nn.functional.normalize(reward.visual(x.to(DEVICE, reward.dtype)).float(), dim=-1)
        vlmrm.goal_baseline_reward(s, reward.goal, reward.baseline, 0.0).cpu()
    ways = {"ours": lambda: reward(frames).cpu(), "PIL's transform and autocast": the_plain_way,
            "the bare image tower, the limit": torch.no_grad()(partial(reward.visual, ready))}
    compare(f"pictures to rewards, {n} at a time", "pictures/s", rounds, n, ways)

def iteration(rounds, config, label, world, agent, replay):
    """Whole iterations of Algorithm 1 against the same parts alone, each at its best."""
    policy, clock = copy.deepcopy(agent.policy).cpu(), vlmrm.Clock()

    def update():
        agent.update(replay.sample(config.batch_size))

    def whole():
        clock.now = time.perf_counter()
        episodes = vlmrm.rollout(world, policy.act, 0, label, clock)
        replay.add(*episodes[:4], terminated=np.zeros(episodes[2].shape))
        repeat(config.updates, update)
        clock.lap("SAC")
    whole()
    clock.clear()
    (obs, _), frames = world.reset(), world.render()
    action = np.zeros((config.num_envs, *world.single_action_space.shape), np.float32)
    each = (policy.act, obs), (world.step, action), (world.judge,), (world.render,), (label, frames)
    ways = [whole, partial(repeat, config.updates, update),
            *(partial(repeat, config.episode_length, *part) for part in each)]
    times = np.array([[seconds(work) for work in ways] for _ in range(rounds)])  # (rounds, ways)
    whole, best = np.median(times[:, 0]), times[:, 1:].min(0).sum()
    inside = ", ".join(f"{part} {s / clock.total():.0%}" for part, s in clock.items())
    title = f"{config.num_envs} x {config.episode_length} transitions, {config.updates} updates"
    print(f"| an iteration: {title} | {whole:.2f} s | {best:.2f} s, its parts, each at its best | "
          f"{best / whole:.2f} |\n\nInside the iteration: {inside}")

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", default="ViT-bigG-14/random" if DEVICE == "cuda" else "tiny_clip")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU"
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.clip}\n\n"
          "| what | ours | the other | ratio |\n|---|---|---|---|", flush=True)
    sac_updates(args.rounds, 256, 256)
    sac_updates(args.rounds, 256, 512)
    physics(args.rounds)
    rendering(args.rounds, 64)
    rendering(args.rounds, 224)
    drawing(args.rounds, 224)
    config = vlmrm.configure(task="kneeling", clip=args.clip)
    label, *others = vlmrm.build(config)
    picture_model(args.rounds, label, 64)
    iteration(args.rounds, config, label, *others)

if __name__ == "__main__":
    main()
