"""Soft Actor-Critic (Haarnoja et al. 2018, arXiv 1812.05905) in one file, for any Gymnasium task with Box actions.

    python sac.py --env-id Pendulum-v1 --steps 20000 --seed 0

The agent maximises reward plus `temperature` times entropy. Per minibatch of transitions (s, a, r, s2, terminated):

    critic       Q1, Q2 -> r + gamma (1 - terminated) (min(Q1', Q2')(s2, a2) - temperature logp(a2|s2)),  a2 ~ pi(s2)
    actor        minimise  temperature logp(a|s) - min(Q1, Q2)(s, a),  a ~ pi(s)
    temperature  moves until the mean of -logp is the target entropy, -dim(A)
    targets      Q' <- Q' + tau (Q - Q'), and likewise the averaged policy that acts

Inside SAC actions live in [-1, 1]; they are scaled to the environment's range where they leave (`rollout`).
"""
import argparse
import copy
import math
import os
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


class Transitions(NamedTuple):
    """Rows of (s, a, r, s2, terminated). `terminated` is a true end, never a time limit."""
    obs: torch.Tensor           # (B, obs_dim)
    action: torch.Tensor        # (B, action_dim) in [-1, 1]
    reward: torch.Tensor        # (B,)
    next_obs: torch.Tensor      # (B, obs_dim)
    terminated: torch.Tensor    # (B,) 0.0 or 1.0


class Actor(nn.Module):
    """Squashed Gaussian policy: action = tanh(u), u ~ Normal(mean(obs), std(obs))."""

    def __init__(self, obs_dim, action_dim, hidden=256):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(obs_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                                 nn.Linear(hidden, 2 * action_dim))

    def forward(self, obs):
        """obs (B, obs_dim) -> mean and log_std of the Gaussian before the tanh, (B, action_dim) each."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(-20, 2)  # beyond this range exp() or its gradient is of no use

    def sample(self, obs):
        """obs (B, obs_dim) -> action (B, action_dim) in [-1, 1] and its log-density logp (B,), both differentiable."""
        mean, log_std = self(obs)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        logp = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)  # Normal(mean, std) at u
        # Change of variables: log(1 - tanh(u)^2), in the form that stays exact where tanh saturates.
        logp = logp - 2 * (math.log(2) - u - F.softplus(-2 * u))
        return torch.tanh(u), logp.sum(-1)


def use_onednn():
    """Let oneDNN instead of MKL multiply float32 matrices on a CPU: on AMD processors with AVX-512 at twice the speed.

    The switch is named after bfloat16 because it permits it. oneDNN makes use of that only on processors with AMX, where
    nothing is changed here: products keep the precision of float32.
    """
    if torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported():
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"


class TwinLinear(nn.Module):
    """Two independent linear layers as one batched product: (2, B, n_in) -> (2, B, n_out)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        bound = n_in ** -0.5  # the range of nn.Linear
        self.weight = nn.Parameter(torch.empty(2, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(2, 1, n_out).uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


class Critic(nn.Module):
    """Twin critic. Layer normalisation keeps Q from running away on actions that the replay has never seen."""

    def __init__(self, obs_dim, action_dim, hidden=256, layer_norm=False):
        super().__init__()
        norm = (lambda: nn.LayerNorm(hidden, elementwise_affine=False)) if layer_norm else nn.Identity
        self.net = nn.Sequential(TwinLinear(obs_dim + action_dim, hidden), norm(), nn.ReLU(),
                                 TwinLinear(hidden, hidden), norm(), nn.ReLU(), TwinLinear(hidden, 1))

    def forward(self, obs, action):
        """obs (B, obs_dim), action (B, action_dim) -> Q1 and Q2, (2, B)."""
        x = torch.cat([obs, action], -1)
        return self.net(x.expand(2, *x.shape)).squeeze(-1)  # (2, B): never (2, B, 1), which would broadcast


class Replay:
    """Ring buffer of the last `capacity` transitions, float32 on `device`."""

    def __init__(self, capacity, obs_dim, action_dim, device="cpu"):
        self.capacity, self.size, self.next = capacity, 0, 0
        shapes = Transitions((obs_dim,), (action_dim,), (), (obs_dim,), ())
        self.data = Transitions(*(torch.zeros(capacity, *shape, device=device) for shape in shapes))

    def add(self, obs, action, reward, next_obs, terminated):
        """Append a block of n <= capacity transitions (arrays or tensors with n rows); the oldest make room."""
        n = len(reward)
        if n > self.capacity:
            raise ValueError(f"a block of {n} transitions does not fit a replay of {self.capacity}")
        rows = (self.next + torch.arange(n)) % self.capacity
        for store, new in zip(self.data, (obs, action, reward, next_obs, terminated)):
            store[rows] = torch.as_tensor(new, dtype=torch.float32, device=store.device)
        self.next = (self.next + n) % self.capacity
        self.size = min(self.size + n, self.capacity)

    def sample(self, n):
        """n transitions, uniformly with replacement."""
        rows = torch.randint(self.size, (n,), device=self.data.reward.device)
        return Transitions(*(store[rows] for store in self.data))


def average_gradients(*parameters):
    """Over the processes that torchrun started, if it did: each learns from its own minibatch, all make the same step."""
    for p in parameters if dist.is_initialized() else ():
        dist.all_reduce(p.grad.div_(dist.get_world_size()))


class SAC(nn.Module):
    """The agent: `act` and `update`. `temperature` (alpha in the SAC papers; here alpha is Eq. 3's) is the initial entropy
    coefficient, learned from then on.

    It acts with the actor's running average, which follows at `actor_tau` per update and is steadier than any one actor;
    1.0, the usual SAC, acts with the actor itself.
    """

    def __init__(self, obs_dim, action_dim, *, gamma=0.99, tau=0.005, actor_tau=1.0, lr=3e-4, device="cpu", hidden=256,
                 temperature=1.0, layer_norm=False):
        super().__init__()
        self.gamma, self.tau, self.actor_tau, self.lr, self.target_entropy = gamma, tau, actor_tau, lr, -action_dim
        self.actor = Actor(obs_dim, action_dim, hidden)
        self.mean_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = Critic(obs_dim, action_dim, hidden, layer_norm)
        self.target_critic = Critic(obs_dim, action_dim, hidden, layer_norm).requires_grad_(False)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        # Networks see (obs - obs_mean) / obs_std and (reward - reward_mean) / reward_std; fit_scales sets them, once.
        for name, shape in (("obs", (obs_dim,)), ("reward", ())):
            self.register_buffer(f"{name}_mean", torch.zeros(shape))
            self.register_buffer(f"{name}_std", torch.ones(shape))
        self.to(device)
        adam = lambda *parameters: torch.optim.Adam(parameters, lr=lr, fused=True, capturable=True)  # on CUDA: into a graph
        self.actor_opt, self.critic_opt = adam(*self.actor.parameters(), self.log_temperature), adam(*self.critic.parameters())

    def fit_scales(self, batch, reward_std):
        """Take the fixed affine maps from `batch`: observations to mean 0 and deviation 1, rewards to 0 and `reward_std`."""
        self.obs_mean.copy_(batch.obs.mean(0))
        self.obs_std.copy_(batch.obs.std(0).clamp(min=0.05))
        self.reward_mean.copy_(batch.reward.mean())
        self.reward_std.copy_(batch.reward.std().clamp(min=1e-6) / reward_std)
        for scale in self.buffers() if dist.is_initialized() else ():
            dist.broadcast(scale, 0)  # the same for all processes

    def rescale(self, batch):
        """The batch as the networks see it."""
        obs, next_obs = ((x - self.obs_mean) / self.obs_std for x in (batch.obs, batch.next_obs))
        return batch._replace(obs=obs, reward=(batch.reward - self.reward_mean) / self.reward_std, next_obs=next_obs)

    def policy(self):
        """A frozen copy of the agent on the CPU, to act with: there it never queues behind a GPU's pictures."""
        return copy.deepcopy(self).to("cpu")

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        """obs (N, obs_dim), array or tensor -> action (N, action_dim) in [-1, 1], float32 array."""
        obs = (torch.as_tensor(obs, dtype=torch.float32, device=self.obs_mean.device) - self.obs_mean) / self.obs_std
        action = self.mean_actor(obs)[0].tanh() if deterministic else self.mean_actor.sample(obs)[0]
        return action.cpu().numpy()

    @torch.no_grad()
    def q_target(self, batch):
        """(B,): what both critics regress to. Termination masks the bootstrap, a time limit does not."""
        next_action, next_logp = self.actor.sample(batch.next_obs)
        next_q = self.target_critic(batch.next_obs, next_action).amin(0)                    # (B,)
        next_v = next_q - self.log_temperature.exp() * next_logp                            # (B,)
        return batch.reward + self.gamma * (1 - batch.terminated) * next_v

    def update_critic(self, batch):
        """Both critics one step towards q_target."""
        q = self.critic(batch.obs, batch.action)                                            # (2, B)
        loss = 0.5 * (q - self.q_target(batch)).square().mean(-1).sum()
        self.critic_opt.zero_grad()
        loss.backward()
        average_gradients(*self.critic.parameters())
        self.critic_opt.step()
        return {"q": q.detach().mean(), "loss_q": loss.detach()}

    def update_actor_and_temperature(self, batch):
        """The actor one step towards what the critics like, the temperature towards the target entropy."""
        action, logp = self.actor.sample(batch.obs)
        loss = (self.log_temperature.exp().detach() * logp - self.critic(batch.obs, action).amin(0)).mean()
        self.actor_opt.zero_grad()
        loss.backward(inputs=list(self.actor.parameters()))  # the critic's own gradients are not needed here
        entropy = -logp.detach().mean()
        (self.log_temperature * (entropy - self.target_entropy)).backward()
        average_gradients(*self.actor.parameters(), self.log_temperature)
        self.actor_opt.step()
        return {"loss_pi": loss.detach(), "entropy": entropy, "temperature": self.log_temperature.detach().exp()}

    def update(self, batch):
        """One gradient step of critic, actor and temperature. Returns detached scalars, without a device sync."""
        batch = self.rescale(batch)
        metrics = self.update_critic(batch) | self.update_actor_and_temperature(batch)
        with torch.no_grad():
            for slow, fast, tau in ((self.target_critic, self.critic, self.tau), (self.mean_actor, self.actor, self.actor_tau)):
                for p, q in zip(slow.parameters(), fast.parameters()):
                    p.lerp_(q, tau)
        return metrics


@contextmanager
def timed(seconds, part):
    """Add the time spent inside to seconds[part]."""
    start = time.perf_counter()
    yield
    seconds[part] += time.perf_counter() - start


def to_env(env, action):
    """SAC's actions in [-1, 1] in the units of the environment."""
    low, high = env.single_action_space.low, env.single_action_space.high
    return low + (action + 1) / 2 * (high - low)


def rollout(env, obs, policy, num_steps, label=None, seconds=None):
    """Step `env` (a VectorEnv without autoreset) `num_steps` times with `policy`: obs (N, O) -> action (N, A) in [-1, 1].

    Returns the transitions as arrays (num_steps, N, ...); for each step label(pictures of its s2), pictures uint8
    (N, H, W, 3) (without `label` nothing is drawn); and the observation to go on from. Pictures are labelled as soon as they
    are drawn, so that a GPU encodes them while the CPU simulates and draws the next. Finished episodes are reset here,
    after their last observation and their last picture were taken.
    """
    seconds = Counter() if seconds is None else seconds
    steps, labels = [], []
    for _ in range(num_steps):
        with timed(seconds, "act"):
            action = policy(obs)
        with timed(seconds, "physics"):
            next_obs, reward, terminated, truncated, _ = env.step(to_env(env, action))
        steps.append((obs, action, reward, next_obs, terminated))
        if label:
            with timed(seconds, "rendering"):
                frames = env.render()
            with timed(seconds, "CLIP"):
                labels.append(label(frames))
        done = terminated | truncated
        obs = env.reset(options={"reset_mask": done})[0] if done.any() else next_obs
    return Transitions(*map(np.stack, zip(*steps))), labels, obs


def update_many(agent, replay, batch_size, n):
    """n updates, each on a minibatch of its own; the last one's metrics as floats, which is the one wait for the device.

    On CUDA the first update warms up and the second is recorded: launching its hundreds of small kernels takes longer
    than running them, and a CUDA graph launches them at once.
    """
    step = lambda: agent.update(replay.sample(batch_size))
    if n < 3 or not replay.data.reward.is_cuda or dist.is_initialized():
        for _ in range(n):
            metrics = step()
        return {name: float(value) for name, value in metrics.items()}
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        metrics = step()  # recorded, not run
    for _ in range(n - 1):
        graph.replay()
    return {name: float(value) for name, value in metrics.items()}


def train(env, agent, replay, total_steps, *, rollout_steps, updates, batch_size, learning_starts, label=None,
          reward_std=None, lr_decay=False, seed=0, remember=None, resume=None):
    """Algorithm 1 of the paper, as a generator that yields a dict after every iteration: `step`; `block`, its transitions;
    `reward` (what the agent learns from) and `truth` (the environment's own), both (rollout_steps, N); `policy`, which
    collected them after `learning_starts`; the metrics of the last update; and `seconds`, the time spent in each part so far.

    `label` maps pictures, uint8 (N, H, W, 3), to their rewards (N,); without it the environment's own reward is used and
    this is plain SAC. Until `learning_starts` transitions are collected actions are uniform; if `reward_std` is given, that
    phase fixes the scales of observations and rewards (`SAC.fit_scales`). `lr_decay` lets the learning rate fall linearly
    to a tenth, which calms the policy towards the end.

    `remember` is called with a dict before every replay.add, which changes only the rows that it would write again. So with
    agent, env, replay and random states as they were then, and that dict as `resume`, training continues to the bit: it begins
    with that replay.add. Raises RunError as soon as an observation, a reward or a loss is not finite.
    """
    use_onednn()
    size, seconds = (env.num_envs, env.single_action_space.shape[0]), Counter()
    uniform = lambda obs: torch.empty(size).uniform_(-1, 1).numpy()
    now = resume or {"step": 0, "obs": env.reset(seed=seed)[0]}
    while resume or now["step"] < total_steps:
        policy = agent.policy()
        if not resume:
            act = policy.act if now["step"] >= learning_starts else uniform
            block, labels, obs = rollout(env, now["obs"], act, rollout_steps, label, seconds)
            with timed(seconds, "CLIP"):
                reward = torch.cat(labels) if label else torch.as_tensor(block.reward).flatten()  # (num_steps * N,)
                rewards = reward.view(block.reward.shape).cpu().numpy()  # here the CPU waits for the GPU, once per iteration
            check_finite(now["step"], observation=block.next_obs, reward=rewards)
            rows = Transitions(*(torch.as_tensor(x).flatten(0, 1) for x in block))._replace(reward=reward)  # (num_steps * N, ...)
            now = {"step": now["step"] + len(reward), "obs": obs, "block": rows, "reward": rewards, "truth": block.reward}
            if remember:
                remember(now)
        replay.add(*now["block"])
        step, resume = now["step"], None
        with timed(seconds, "SAC"):
            if step - now["reward"].size < learning_starts <= step and reward_std:
                agent.fit_scales(Transitions(*(store[:replay.size] for store in replay.data)), reward_std)
            for optimizer in (agent.actor_opt, agent.critic_opt) if lr_decay else ():
                optimizer.param_groups[0]["lr"] = agent.lr * (1 - 0.9 * step / total_steps)
            metrics = update_many(agent, replay, batch_size, updates) if step >= learning_starts else {}
        if not all(map(math.isfinite, metrics.values())):
            raise RunError(f"the updates after {step} transitions are no longer finite: {metrics}; lower the learning rate")
        yield {**now, "policy": policy, **metrics, "seconds": seconds}


def check_finite(step, **arrays):
    """Raise RunError where an array (num_steps, N, ...), collected after `step` transitions, holds a NaN or an infinity."""
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            t, i = np.argwhere(~np.isfinite(values))[0][:2]
            raise RunError(f"{name} of simulation {i} is not finite in step {t + 1} of the rollout after {step} transitions: "
                           "a diverging simulation, or a broken picture model")


def evaluate(env, agent, seed=0):
    """Return of the first deterministic episode of each of env's simulations, (N,)."""
    obs, _ = env.reset(seed=seed)
    returns, running = np.zeros(env.num_envs), np.ones(env.num_envs, bool)
    while running.any():
        obs, reward, terminated, truncated, _ = env.step(to_env(env, agent.act(obs, deterministic=True)))
        returns += running * reward
        running &= ~(terminated | truncated)
    return returns


class UsageError(ValueError):
    """Something that the person at the keyboard can mend; the message says how, in one line."""


def usage_error(message):
    """Instead of argparse's own error, which prints the whole usage."""
    raise UsageError(f"{message} (--help lists what there is)")


class RunError(RuntimeError):
    """A run cannot go on, through no fault of the command line; the message says what happened, in one line."""


def exit_at_once(code):
    """Without waiting for threads, one of which may hang in a renderer, and without their last words."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_with_one_line(main):
    """Run a program's main(): a UsageError becomes one line on stderr and exit code 2, a RunError or a failing disk exit
    code 1, Ctrl-C and SIGTERM 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except (UsageError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        exit_at_once(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        exit_at_once(130)


def make_envs(env_id, num_envs, autoreset_mode, **kwargs):
    """A VectorEnv of any registered Gymnasium task with Box actions; raises UsageError for anything else. kwargs: of gym.make_vec."""
    try:
        env = gym.make_vec(env_id, num_envs, "sync", vector_kwargs={"autoreset_mode": autoreset_mode}, **kwargs)
    except (gym.error.Error, ImportError) as error:
        raise UsageError(f"--env-id {env_id}: {' '.join(str(error).split())}") from None
    actions, observations = env.single_action_space, env.single_observation_space
    if not isinstance(actions, gym.spaces.Box) or not actions.is_bounded() or len(observations.shape or ()) != 1:
        raise UsageError(f"--env-id {env_id}: SAC needs bounded continuous (Box) actions and vector observations, here they are "
                         f"{actions} and {observations}. Try --env-id Pendulum-v1")
    return env


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Soft Actor-Critic on a Gymnasium task's own reward.")
    parser.add_argument("--env-id", default="Pendulum-v1", help="any task with Box actions (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20_000, help="environment steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.error = usage_error
    args = parser.parse_args(argv)
    if args.steps < 1 or args.seed < 0:
        raise UsageError(f"--steps must be at least 1 and --seed at least 0, not {args.steps} and {args.seed}")
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    env = make_envs(args.env_id, 1, gym.vector.AutoresetMode.DISABLED)
    obs_dim, action_dim = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    agent = SAC(obs_dim, action_dim, lr=1e-3, device=device)
    replay = Replay(min(args.steps + 50, 1_000_000), obs_dim, action_dim, device)
    # One update per step, in blocks of 50: the policy of a block is at most 50 updates old.
    with tqdm(total=args.steps, unit="step", mininterval=1) as bar:
        for it in train(env, agent, replay, args.steps, rollout_steps=50, updates=50, batch_size=256,
                        learning_starts=min(1000, args.steps // 10), seed=args.seed):
            bar.update(it["step"] - bar.n)
            bar.set_postfix(q=it.get("q"), temperature=it.get("temperature"))
    returns = evaluate(make_envs(args.env_id, 20, gym.vector.AutoresetMode.NEXT_STEP), agent, seed=args.seed + 10_000)
    print(f"mean return over 20 deterministic episodes: {returns.mean():.1f}")


if __name__ == "__main__":
    exit_with_one_line(main)
