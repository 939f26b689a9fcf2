"""The success rates of Table 1, with EPIC, AUROC and the share of hacked steps, of a run's two
policies: the kept one, with the best test, and the last one, which nothing chose.

    python paper/evaluate.py runs/a-humanoid-robot-kneeling
    python paper/evaluate.py runs/a-humanoid-robot-kneeling --reset-noise 0.05

Writes eval.json and film-judged.gif into the run's folder: the kept policy's first episode with the
CLIP reward as a growing curve, from its lowest to its highest, and a green mark while the criterion
holds.
"""

import json
from pathlib import Path

import criteria
import numpy as np
import shared
import torch
from PIL import Image, ImageDraw
from states import embed, labelled_states

import sac
import vlmrm


def new_world(cfg, num_envs, size, reset_noise):
    """Simulations that start within reset_noise of the usual state, m, rad and per second."""
    world = vlmrm.World(cfg, num_envs, size)
    for sim in world.sims if reset_noise is not None else ():
        if not hasattr(sim, "_reset_noise_scale"):
            raise sac.UsageError(f"--reset-noise: {cfg.env_id} has none")
        sim._reset_noise_scale = reset_noise
    return world


def judge(reward, alpha, s, goal, typical):
    """How the reward at one alpha agrees with the criterion: of unit vectors s (T, N, D), whether
    these are goal states, (T, N) bool, and unit vectors of typical goal states (n, D)."""
    r = shared.rewards(reward, s.reshape(goal.size, -1), alpha)  # (T * N,)
    paid = np.median(shared.rewards(reward, typical, alpha))
    return {
        "alpha": alpha,
        "return": float(r.sum() / goal.shape[1]),
        "epic": shared.epic(r, goal.flatten()),
        "auroc": shared.auroc(r, goal.flatten()),
        "hacked": shared.hacked(r, goal.flatten(), paid),
    }


def film(cfg, args, actions, r, goal, height=192):
    """The episode of these actions (T, 1, ...) again, larger, with rewards r (T,) and criterion
    (T,) drawn in."""
    images, actions = [], iter(actions)

    def look(frames):
        image = Image.fromarray(frames[0])
        images.append(image.resize((height * image.width // image.height, height)))
        return torch.zeros(1)

    world = new_world(cfg, 1, height, args.reset_noise)
    vlmrm.rollout(world, lambda obs: next(actions), cfg.seed + shared.TEST_SEED, look)
    x = np.linspace(5, images[0].width - 5, len(images))
    y = np.interp(r, [r.min(), r.max()], [height - 5, height * 0.75])
    for t, image in enumerate(images):
        draw = ImageDraw.Draw(image)
        draw.line([*zip(x[: t + 1], y[: t + 1], strict=True)], fill="yellow", width=2)
        draw.ellipse((5, 5, 17, 17), fill="lime" if goal[t] else "gray")
    path = args.run / "film-judged.gif"
    images[0].save(path, save_all=True, append_images=images[1:], duration=30, loop=0)


def parse(argv):
    """The flags."""
    parser = shared.flags(__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, like runs/...")
    parser.add_argument("--episodes", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--reset-noise", type=float, help="of the first states (Gymnasium: 0.01)")
    args = parser.parse_args(argv)
    if not 1 <= args.episodes <= 1000:
        raise sac.UsageError(f"--episodes must be from 1 to 1000, not {args.episodes}")
    if not 0 <= (args.reset_noise or 0) <= 1:
        raise sac.UsageError(f"--reset-noise must be from 0 to 1, not {args.reset_noise}")
    return args


def evaluate(args):
    """Test both policies, film the kept one -> the results, as eval.json has them."""
    cfg = vlmrm.read_config(args.run)
    task = shared.task_of(cfg, args.run)
    reward = shared.clip_reward(cfg)
    world = new_world(cfg, args.episodes, reward.image_size, args.reset_noise)
    policies, model = shared.policies(args.run, world), shared.model_of(world)
    fixed = labelled_states(task)
    goals = fixed[criteria.holds(task, model, fixed)]
    typical = embed(reward, cfg, goals)  # (n, D)
    results = {"episodes": args.episodes, "reset_noise": args.reset_noise}
    for name, policy in policies.items():
        action, s, next_obs = shared.try_out(cfg, world, policy, reward.embed)
        goal = criteria.met(task, model, next_obs)  # (T, N)
        if name == "kept":
            film(cfg, args, action[:, :1], shared.rewards(reward, s[:, 0], cfg.alpha), goal[:, 0])
        results[name] = judge(reward, cfg.alpha, s, goal, typical) | {
            "goal_states": float(goal.mean()),
            "success": shared.success(goal),
            "alphas": [judge(reward, alpha, s, goal, typical) for alpha in shared.ALPHAS],
        }
    (args.run / "eval.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def main(argv=None):
    """The command line."""
    args = parse(argv)
    results = evaluate(args)
    print("policy  alpha   EPIC  AUROC  hacked")
    for name in ("kept", "last"):
        for row in results[name]["alphas"]:
            print(
                f"{name:<6} {row['alpha']:6.2f} {row['epic']:6.3f} {row['auroc']:6.3f} "
                f"{row['hacked']:7.1%}"
            )
    for name in ("kept", "last"):
        x = results[name]
        print(
            f"{name} policy, {args.episodes} deterministic episodes: CLIP return {x['return']:.2f}"
            f", {x['goal_states']:.0%} of the steps in goal states, {x['hacked']:.0%} hacked, "
            f"success rate {x['success']:.0%}"
        )


if __name__ == "__main__":
    sac.run(main)
