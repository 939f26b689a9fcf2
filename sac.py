"""Soft Actor-Critic (Haarnoja et al. 2018, arXiv 1812.05905) for Gymnasium tasks with Box actions.

    python sac.py --env-id Pendulum-v1 --steps 20000 --seed 0

It maximises reward plus `temperature` times entropy. From (s, a, r, s2, terminated):

    critic       Q1, Q2 -> r + gamma (1 - terminated) (min(Q1', Q2')(s2, a2) - temperature logp2),
                 a2 ~ pi(s2) and logp2 its log-density
    actor        minimises temperature logp - min(Q1, Q2)(s, a), a ~ pi(s)
    temperature  moves until the mean of -logp is the target entropy, -dim(A)
    targets      Q' <- Q' + tau (Q - Q')
"""
import argparse
import copy
import math
import os
import signal
import sys
from collections import namedtuple

import gymnasium as gym
import numpy as np
import torch
from torch import distributed as dist, nn
from tqdm import tqdm

class Actor(nn.Module):
    """Squashed Gaussian policy: action = tanh(u), u ~ Normal(mean(obs), std(obs))."""
    def __init__(self, obs_dim, action_dim, hidden=256):
        super().__init__()
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.net = nn.Sequential(nn.Linear(obs_dim, hidden), nn.ReLU(),
                                 nn.Linear(hidden, hidden), nn.ReLU(),
                                 nn.Linear(hidden, 2 * action_dim))

    def forward(self, obs):
        """obs (B, obs_dim) -> mean and log_std before the tanh, (B, action_dim) each."""
        mean, log_std = self.net((obs - self.obs_mean) / self.obs_std).chunk(2, dim=-1)
        return mean, log_std.clamp(-20, 2)  # beyond, exp() or its gradient is of no use

    def sample(self, obs):
        """obs (B, obs_dim) -> action (B, action_dim) in [-1, 1] and its log-density logp (B,)."""
        mean, log_std = self(obs)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise  # (B, action_dim)
        logp = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)  # of Normal at u
        # Change of variables, -log(1 - tanh(u)^2), exact also where tanh saturates.
        logp = logp - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
        return torch.tanh(u), logp.sum(-1)

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        """obs (N, obs_dim), array or tensor -> float32 array (N, action_dim)."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.obs_mean.device)
        action = self(obs)[0].tanh() if deterministic else self.sample(obs)[0]
        return action.cpu().numpy()

class TwinLinear(nn.Module):
    """Two linear layers as one batched product: (2, B, n_in) -> (2, B, n_out)."""
    def __init__(self, n_in, n_out):
        super().__init__()
        bound = n_in ** -0.5  # as in nn.Linear
        self.weight = nn.Parameter(torch.empty(2, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(2, 1, n_out).uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)

class Critic(nn.Module):
    """Q1 and Q2; layer normalisation bounds them for actions never tried."""
    def __init__(self, obs_dim, action_dim, hidden=256, layer_norm=False):
        super().__init__()
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        norm = nn.LayerNorm(hidden, elementwise_affine=False) if layer_norm else nn.Identity()
        self.net = nn.Sequential(TwinLinear(obs_dim + action_dim, hidden), norm, nn.ReLU(),
                                 TwinLinear(hidden, hidden), norm, nn.ReLU(), TwinLinear(hidden, 1))

    def forward(self, obs, action):
        """obs (B, obs_dim), action (B, action_dim) -> Q1 and Q2, (2, B)."""
        x = torch.cat([(obs - self.obs_mean) / self.obs_std, action], -1)  # (B, obs_dim + dim(A))
        return self.net(x.expand(2, *x.shape)).squeeze(-1)  # a (2, B, 1) would broadcast with (B,)

# Actions are in [-1, 1]; next_obs is never that of a reset; terminated is 0.0 also at a time limit.
Transitions = namedtuple("Transitions", "obs action reward next_obs terminated")

class Replay:
    """Ring buffer of the last `capacity` transitions, float32 on `device`."""
    def __init__(self, capacity, obs_dim, action_dim, device="cpu"):
        self.capacity, self.size, self.next = capacity, 0, 0
        shapes = Transitions((obs_dim,), (action_dim,), (), (obs_dim,), ())
        self.data = Transitions(*(torch.zeros(capacity, *s, device=device) for s in shapes))

    def add(self, obs, action, reward, next_obs, terminated):
        """As many transitions as reward has numbers, at most `capacity`."""
        block = Transitions(obs, action, reward, next_obs, terminated)
        n = math.prod(reward.shape)
        if n > self.capacity:
            raise ValueError(f"{n} transitions in a replay of {self.capacity}")
        rows = (self.next + torch.arange(n)) % self.capacity
        for name, store, new in zip(block._fields, self.data, block):
            new = torch.as_tensor(new, dtype=torch.float32, device=store.device)
            if not new.isfinite().all():
                raise UsageError(f"{name} is not finite: the simulation, the reward, or --lr")
            store[rows] = new.reshape(n, *store.shape[1:])
        self.next, self.size = (self.next + n) % self.capacity, min(self.size + n, self.capacity)

    def sample(self, n):
        """n rows, uniformly with replacement."""
        rows = torch.randint(self.size, (n,), device=self.data.reward.device)
        return Transitions(*(store[rows] for store in self.data))

class SAC(nn.Module):
    """`act` and `update`. `temperature` (alpha in SAC's papers) is the first entropy coefficient,
    then learned, with `lr`. `policy`, which acts, is the actor's running average, steadier; it
    follows by `actor_tau` per update (1.0: the usual SAC)."""
    def __init__(self, obs_dim, action_dim, *, gamma=0.99, tau=0.005, lr=3e-4, critic_lr=1e-3,
                 device="cpu", hidden=256, actor_tau=1.0, temperature=1.0, layer_norm=False):
        super().__init__()
        self.gamma, self.tau, self.actor_tau = gamma, tau, actor_tau
        # SAC's rule of thumb: -1 nat per dimension, as if uniform over 18% of [-1, 1].
        self.target_entropy = -action_dim
        self.actor = Actor(obs_dim, action_dim, hidden)
        self.critic = Critic(obs_dim, action_dim, hidden, layer_norm)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.policy = copy.deepcopy(self.actor).requires_grad_(False)
        self.act = self.policy.act
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.register_buffer("reward_mean", torch.tensor(0.0))
        self.register_buffer("reward_scale", torch.tensor(1.0))
        self.to(device)
        groups = [{"params": self.actor.parameters()}, {"params": [self.log_temperature]}]
        self.actor_opt = torch.optim.Adam(groups, lr=lr, fused=True)
        self.critic_opt = torch.optim.Adam(self.critic.parameters(), lr=critic_lr, fused=True)

    def get_extra_state(self):  # so that state_dict() is all of the agent
        return self.actor_opt.state_dict(), self.critic_opt.state_dict()

    def set_extra_state(self, saved):
        self.actor_opt.load_state_dict(saved[0])
        self.critic_opt.load_state_dict(saved[1])

    def set_lr(self, lr, critic_lr):  # the temperature keeps its own
        self.actor_opt.param_groups[0]["lr"] = lr
        self.critic_opt.param_groups[0]["lr"] = critic_lr

    def fit_scales(self, obs, reward, reward_std):
        """Shift and scale obs (..., obs_dim) to mean 0 and standard deviation 1, rewards to 0 and
        `reward_std`. Only if tasks never end: a shift of rewards changes whether ending pays."""
        obs, reward = (torch.as_tensor(x, dtype=torch.float32) for x in (obs, reward))
        obs = obs.flatten(0, -2)  # (n, obs_dim)
        for network in (self.actor, self.policy, self.critic, self.target_critic):
            network.obs_mean.copy_(obs.mean(0))
            network.obs_std.copy_(obs.std(0).clamp(min=0.05))
        self.reward_mean.copy_(reward.mean())
        self.reward_scale.copy_(reward_std / reward.std().clamp(min=1e-3))
        if dist.is_initialized():
            for statistic in self.buffers():
                dist.broadcast(statistic, 0)

    @torch.no_grad()
    def q_target(self, batch):
        """(B,). A true end masks the bootstrap, a time limit does not: the task would have gone on
        (Pardo et al. 2018)."""
        next_action, next_logp = self.actor.sample(batch.next_obs)
        next_q = self.target_critic(batch.next_obs, next_action).amin(0)  # (B,)
        next_v = next_q - self.log_temperature.exp() * next_logp  # (B,)
        reward = (batch.reward - self.reward_mean) * self.reward_scale
        return reward + self.gamma * (1 - batch.terminated) * next_v

    def update_critic(self, batch):
        """One step towards q_target."""
        q = self.critic(batch.obs, batch.action)  # (2, B)
        loss_q = 0.5 * (q - self.q_target(batch)).square().mean(-1).sum()
        descend(self.critic_opt, loss_q)
        return {"q": q.detach().mean(), "loss_q": loss_q.detach()}

    def update_actor_and_temperature(self, batch):
        """One step of the actor to higher Q, of the temperature to the target entropy."""
        action, logp = self.actor.sample(batch.obs)
        temperature, entropy = self.log_temperature.detach().exp(), -logp.detach().mean()
        loss_pi = (temperature * logp - self.critic(batch.obs, action).amin(0)).mean()
        loss_temperature = self.log_temperature * (entropy - self.target_entropy)
        descend(self.actor_opt, loss_pi + loss_temperature)
        return {"loss_pi": loss_pi.detach(), "entropy": entropy, "temperature": temperature}

    def update(self, batch):
        """One gradient step of all -> detached scalars, without waiting for the device."""
        metrics = self.update_critic(batch) | self.update_actor_and_temperature(batch)
        with torch.no_grad():
            for p, slow in zip(self.critic.parameters(), self.target_critic.parameters()):
                slow.lerp_(p, self.tau)
            for p, slow in zip(self.actor.parameters(), self.policy.parameters()):
                slow.lerp_(p, self.actor_tau)
        return metrics

def descend(optimizer, loss):
    """One step; torchrun's processes average the gradients of their minibatches."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)  # the actor's loss passes through the critic
    if dist.is_initialized():
        for p in parameters:
            dist.all_reduce(p.grad.div_(dist.get_world_size()))
    optimizer.step()

def use_onednn():
    """For speed only: oneDNN's products, not MKL's, 1.4 times the updates/s on AMD (bench/). The
    setting is called "bf16", but without AMX the products stay float32."""
    if torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported():
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"

class UsageError(ValueError):
    """What the user can mend; it says how."""

def run(main):
    """main(); UsageError: one line, exit code 2; Ctrl-C, SIGTERM, `| head`: 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)  # at once
    except (UsageError, OSError, ImportError, gym.error.Error) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)

def make_envs(env_id, num_envs, **kwargs):
    """A VectorEnv for actions in [-1, 1] that does not reset itself; else UsageError."""
    kwargs["vector_kwargs"] = {"autoreset_mode": "Disabled"}
    try:
        envs = gym.make_vec(env_id, num_envs, "sync", **kwargs)
    except (AssertionError, TypeError) as error:
        raise UsageError(f"--env-id {env_id}: {error}")
    action, obs = envs.single_action_space, envs.single_observation_space
    continuous = isinstance(action, gym.spaces.Box) and action.dtype.kind == "f"
    bounded = continuous and action.is_bounded() and (action.low < action.high).all()
    if not bounded or len(obs.shape or ()) != 1:
        raise UsageError(f"--env-id {env_id} has not bounded float Box actions and vector "
                         f"observations, but {action} and {obs}")
    return gym.wrappers.vector.RescaleAction(envs, np.float32(-1), np.float32(1))

def main(argv=None):
    """Train and test."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    parser.add_argument("--env-id", default="Pendulum-v1")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.steps < 1 or args.seed < 0:
        raise UsageError("--steps must be positive and --seed not negative")
    torch.manual_seed(args.seed)
    use_onednn()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    env = make_envs(args.env_id, 1)
    env.action_space.seed(args.seed)
    shape, learning_starts = env.action_space.shape, min(1000, args.steps // 10)  # (1, ...)
    obs_dim, action_dim = env.single_observation_space.shape[0], math.prod(shape)
    agent = SAC(obs_dim, action_dim, lr=1e-3, device=device)
    replay = Replay(min(args.steps, 1_000_000), obs_dim, action_dim, device)

    obs, _ = env.reset(seed=args.seed)
    for step in tqdm(range(args.steps), unit="step", mininterval=1):
        exploring = step < learning_starts
        action = env.action_space.sample() if exploring else agent.act(obs).reshape(shape)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        replay.add(obs, action, reward, next_obs, terminated)
        obs = env.reset()[0] if (terminated | truncated).any() else next_obs
        if not exploring:
            agent.update(replay.sample(256))

    limit = env.unwrapped.envs[0].spec.max_episode_steps or 1000  # some tasks never end
    returns = np.zeros(20)
    for episode in tqdm(range(20), f"testing, at most {limit:,} steps each"):
        obs, _ = env.reset(seed=args.seed + 10_000 + episode)
        for _ in range(limit):
            action = agent.act(obs, deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(action.reshape(shape))
            returns[episode] += reward.item()
            if terminated.any() or truncated.any():
                break
    print(f"mean return over 20 deterministic episodes: {returns.mean():.1f}", flush=True)

if __name__ == "__main__":
    run(main)
