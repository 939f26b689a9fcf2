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
from torch import nn
from tqdm import tqdm


def mlp(n_in, hidden, n_out, norm=nn.Identity):
    """Two hidden layers: (B, n_in) -> (B, n_out)."""
    first = nn.Linear(n_in, hidden), norm(hidden), nn.ReLU()
    second = nn.Linear(hidden, hidden), norm(hidden), nn.ReLU()
    return nn.Sequential(*first, *second, nn.Linear(hidden, n_out))


class Actor(nn.Module):
    """Squashed Gaussian policy: action = tanh(u), u ~ Normal(mean(obs), std(obs))."""

    def __init__(self, obs_dim, action_dim, hidden=256):
        super().__init__()
        self.register_buffer("obs_mean", torch.zeros(obs_dim).double())
        self.register_buffer("obs_std", torch.ones(obs_dim).double())
        self.net = mlp(obs_dim, hidden, 2 * action_dim)

    def standardise(self, obs):
        """obs (..., obs_dim) in the task's units -> float32, in standard deviations from the mean
        (by SAC.fit_scales; before that as they are). float32 loses small changes of large ones."""
        obs = torch.as_tensor(obs).to(self.obs_mean)  # float64, on its device
        return ((obs - self.obs_mean) / self.obs_std).float()

    def forward(self, obs):
        """Standardised obs (B, obs_dim) -> mean and log_std before the tanh, (B, action_dim)."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(-20, 2)  # beyond, exp() or its gradient is of no use

    def sample(self, obs):
        """Standardised obs (B, obs_dim) -> actions in [-1, 1] (B, action_dim), log-density (B,)."""
        mean, log_std = self(obs)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise  # (B, action_dim)
        logp = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)  # of Normal at u
        # Change of variables, -log(1 - tanh(u)^2), exact also where tanh saturates.
        logp -= 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
        return torch.tanh(u), logp.sum(-1)

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        """obs (N, obs_dim) in the task's units -> actions in [-1, 1], array (N, action_dim)."""
        obs = self.standardise(obs)
        action = self(obs)[0].tanh() if deterministic else self.sample(obs)[0]
        return action.cpu().numpy()


class Critic(nn.Module):
    """Q1 and Q2; layer normalisation bounds them for actions never tried."""

    def __init__(self, obs_dim, action_dim, hidden=256, layer_norm=False):
        super().__init__()
        norm = nn.LayerNorm if layer_norm else nn.Identity
        self.q1 = mlp(obs_dim + action_dim, hidden, 1, norm)
        self.q2 = mlp(obs_dim + action_dim, hidden, 1, norm)

    def forward(self, obs, action):
        """Standardised obs (B, obs_dim), action (B, action_dim) -> Q1 and Q2, (2, B)."""
        x = torch.cat([obs, action], -1)  # (B, obs_dim + action_dim)
        return torch.cat([self.q1(x), self.q2(x)], -1).T  # a (B, 1) would broadcast with (B,)


# obs and next_obs are standardised (Actor.standardise), next_obs is never that of a reset; actions
# are in [-1, 1]; terminated is 0.0 also at a time limit.
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
        for name, store in self.data._asdict().items():
            new = torch.as_tensor(getattr(block, name)).to(store)  # float32, on its device
            if not new.isfinite().all():
                raise UsageError(f"{name} is not finite: the simulation, the reward, or --lr")
            store[rows] = new.reshape(n, *store.shape[1:])
        self.next, self.size = (self.next + n) % self.capacity, min(self.size + n, self.capacity)

    def rows(self, i):
        """Transitions i (n,), of which 0 is the oldest."""
        i = (self.next - self.size + i) % self.capacity
        return Transitions(*(store[i] for store in self.data))

    def sample(self, n):
        """n transitions, uniformly with replacement."""
        return self.rows(torch.randint(self.size, (n,), device=self.data.reward.device))


class SAC(nn.Module):
    """`act` and `update`. `temperature` (alpha in SAC's papers) is the first entropy coefficient,
    then learned. `policy` is an average of the actors so far that forgets in `window` updates (in
    half of all while these are less): far steadier than the actor; window=0: the actor itself."""

    def __init__(
        self,
        obs_dim,
        action_dim,
        *,
        gamma=0.99,
        tau=0.005,
        lr=3e-4,
        critic_lr=1e-3,
        window=0,
        device="cpu",
        hidden=256,
        temperature=1.0,
        layer_norm=False,
    ):
        super().__init__()
        self.gamma, self.tau, self.window, self.updates = gamma, tau, window, 0
        # SAC's rule of thumb: -1 nat per dimension, as if uniform over 18% of [-1, 1].
        self.target_entropy = -action_dim
        self.actor = Actor(obs_dim, action_dim, hidden)
        self.critic = Critic(obs_dim, action_dim, hidden, layer_norm)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.policy = copy.deepcopy(self.actor).requires_grad_(False)
        self.act = self.actor.act
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.register_buffer("reward_mean", torch.tensor(0.0))
        self.register_buffer("reward_scale", torch.tensor(1.0))
        self.to(device)
        groups = (
            {"params": [*self.actor.parameters(), self.log_temperature], "lr": lr},
            {"params": self.critic.parameters(), "lr": critic_lr},
        )
        self.opt = torch.optim.Adam(groups, fused=True)

    def get_extra_state(self):  # so that state_dict() is all of the agent
        return self.updates, self.opt.state_dict()["state"]

    def set_extra_state(self, saved):  # learning rates stay as they are
        self.updates, state = saved
        self.opt.load_state_dict(self.opt.state_dict() | {"state": state})

    def fit_scales(self, obs, reward, reward_std):
        """Scale obs (..., obs_dim) to mean 0 and deviation 1 (what never varies keeps its unit),
        rewards to 0 and `reward_std`. Not for tasks that end: a shift changes whether it pays."""
        obs = torch.as_tensor(obs).double().flatten(0, -2)  # (n, obs_dim)
        std = obs.std(0).where(obs.amax(0) - obs.amin(0) > 1e-8, 1)  # else it never varied
        for actor in (self.actor, self.policy):
            actor.obs_mean.copy_(obs.mean(0))
            actor.obs_std.copy_(std)
        self.reward_mean.fill_(reward.mean())
        self.reward_scale.fill_(reward_std / max(reward.std(), 1e-3))

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
        self.descend(loss_q, self.critic.parameters())
        return {"q": q.detach().mean(), "loss_q": loss_q.detach()}

    def update_actor_and_temperature(self, batch):
        """One step of the actor to higher Q, of the temperature to the target entropy."""
        action, logp = self.actor.sample(batch.obs)
        temperature, entropy = self.log_temperature.detach().exp(), -logp.detach().mean()
        loss_pi = (temperature * logp - self.critic(batch.obs, action).amin(0)).mean()
        loss_temperature = self.log_temperature * (entropy - self.target_entropy)
        parameters = [*self.actor.parameters(), self.log_temperature]
        self.descend(loss_pi + loss_temperature, parameters)
        return {"loss_pi": loss_pi.detach(), "entropy": entropy, "temperature": temperature}

    def descend(self, loss, parameters):
        """One step of these alone, though the actor's loss passes through the critic."""
        self.opt.zero_grad()
        loss.backward(inputs=list(parameters))
        self.opt.step()  # Adam leaves parameters without a gradient as they are

    def update(self, *batches):
        """A gradient step of the critic on each batch, so that the actor follows a better one, then
        one of all else on the last -> detached scalars, without waiting for the device."""
        for batch in batches:
            metrics = self.update_critic(batch)
            follow(self.target_critic, self.critic, self.tau)
        metrics |= self.update_actor_and_temperature(batch)
        self.updates += 1
        follow(self.policy, self.actor, 1 / max(1, min(self.window, self.updates / 2)))
        return metrics


@torch.no_grad()
def follow(average, network, tau):
    """Move the running average of a network's parameters a share of the way, tau."""
    for slow, p in zip(average.parameters(), network.parameters(), strict=True):
        slow.lerp_(p, tau)


def use_onednn():
    """Matrix products of oneDNN, not MKL: 1.4 times the updates/s on an AMD with AVX-512 (bench/).
    The setting is called "bf16", but without AMX products stay float32 (a test compares)."""
    if torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported():
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"


class UsageError(ValueError):
    """What the user can mend; it says how."""


def run(main):
    """main(); UsageError: one line, exit code 2; Ctrl-C, SIGTERM, `| head`: 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # of any terminal
    use_onednn()
    sys.path.append("")  # --env-id mine:Mine-v0 finds mine.py in the folder where one stands
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)  # at once
    except (UsageError, gym.error.Error) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)


def make_envs(env_id, num_envs, **kwargs):
    """A VectorEnv for actions in [-1, 1] that does not reset itself; else UsageError."""
    options = {"autoreset_mode": "Disabled"}
    try:
        envs = gym.make_vec(env_id, num_envs, "sync", vector_kwargs=options, **kwargs)
    except (TypeError, ImportError) as error:
        raise UsageError(f"--env-id {env_id}: {error}") from error
    action, obs = envs.single_action_space, envs.single_observation_space
    box = isinstance(action, gym.spaces.Box) and action.dtype.kind == "f" and action.is_bounded()
    if not box or (action.low >= action.high).any() or len(obs.shape or ()) != 1:
        raise UsageError(
            f"--env-id {env_id}: actions must be a bounded float Box, observations a vector, as in "
            f"Pendulum-v1 or MountainCarContinuous-v0, not {action} and {obs}"
        )
    return gym.wrappers.vector.RescaleAction(envs, np.float32(-1), np.float32(1))


def main(argv=None):
    """Train and test."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    parser.add_argument("--env-id", default="Pendulum-v1")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise UsageError(f"--steps {args.steps}: at least 1")
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    env = make_envs(args.env_id, 1)
    env.action_space.seed(args.seed)
    shape = env.action_space.shape  # (1, ...)
    sizes = env.single_observation_space.shape[0], math.prod(shape)
    agent = SAC(*sizes, lr=1e-3, device=device)
    replay = Replay(min(args.steps, 1_000_000), *sizes, device)

    obs, _ = env.reset(seed=args.seed)
    for step in tqdm(range(args.steps), unit="step"):
        exploring = step < min(1000, args.steps // 10)
        action = env.action_space.sample() if exploring else agent.act(obs).reshape(shape)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        replay.add(obs, action, reward, next_obs, terminated)
        obs = env.reset()[0] if (terminated | truncated).any() else next_obs
        if not exploring:
            agent.update(replay.sample(256))

    limit = env.unwrapped.envs[0].spec.max_episode_steps or 1000  # some tasks never end
    total = 0.0
    for episode in range(20):
        obs, _ = env.reset(seed=args.seed + 10_000 + episode)
        for _ in range(limit):
            action = agent.act(obs, deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(action.reshape(shape))
            total += reward.item()
            if (terminated | truncated).any():
                break
    print(f"mean return over 20 deterministic episodes: {total / 20:.1f}")


if __name__ == "__main__":
    run(main)
