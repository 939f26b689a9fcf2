"""The success rates of Table 1, with EPIC, AUROC and the share of hacked steps, for a run's policy.

    python paper/evaluate.py runs/a-humanoid-robot-kneeling

Writes eval.json and film-judged.gif into the run's folder: one episode with the CLIP reward as a
growing curve, from its lowest to its highest, and a green mark while the criterion holds.
"""
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import shared  # first: it finds vlmrm.py
import numpy as np
import sac
import torch
import vlmrm
from PIL import Image, ImageDraw
from states import goals, labelled_states, pictures

def roll_out(config, act, reward, episodes):
    """Deterministic episodes: CLIP's unit vectors s of all states reached, (episodes, T, D), and
    whether these are goal states, (episodes, T) bool."""
    world = vlmrm.World(config, min(25, episodes), reward.image_size)
    vectors, labels = [], []
    for seed in range(3_000_000, 3_000_000 + episodes, world.num_envs):
        _, _, s, next_obs, goal = vlmrm.rollout(world, act, config.seed + seed, reward.embed,
                                                vlmrm.Clock())  # arrays (T, num_envs, ...)
        if not config.task:
            goal = goals(world, next_obs.reshape(-1, 2)).reshape(goal.shape)  # the car's states
        vectors.append(s.swapaxes(0, 1))
        labels.append(goal.T)
    return np.concatenate(vectors)[:episodes], np.concatenate(labels)[:episodes]

def judge(config, reward, vectors, goal):
    """The results, as eval.json has them, from what `roll_out` returns."""
    task = config.task or "mountaincar"
    world, fixed = vlmrm.World(config, 1, reward.image_size), labelled_states(task)
    fixed_goals = reward.embed(pictures(world, fixed[goals(world, fixed)])).cpu()  # (n, D)
    flat, s, rows = goal.flatten(), torch.from_numpy(vectors).flatten(0, 1), []
    g, b = reward.goal.cpu(), reward.baseline.cpu()
    for alpha in shared.ALPHAS:
        r = vlmrm.goal_baseline_reward(s, g, b, alpha).numpy()  # (episodes * T,)
        typical = vlmrm.goal_baseline_reward(fixed_goals, g, b, alpha).median().item()
        rows.append({"alpha": alpha, "epic": shared.epic(r, flat), "auroc": shared.auroc(r, flat),
                     "hacked": shared.hacked(r, flat, typical)})
    returns = vlmrm.goal_baseline_reward(s, g, b, config.alpha).sum().item() / len(goal)
    return {"episodes": len(goal), "success": float((goal.mean(1) >= 0.5).mean()),
            "return": returns, "goal_states": float(goal.mean()), "alphas": rows}

def film(config, act, reward, path, size=192):
    """The episode of the run's film.gif again, with the reward and the criterion drawn in."""
    world, large = vlmrm.World(config, 1, reward.image_size), vlmrm.World(config, 1, size)
    images = []

    def look(frames):
        if config.task:  # MuJoCo: the same state, drawn for people
            image = Image.fromarray(large.render(world.states())[0])
        else:
            image = Image.fromarray(frames[0])
        images.append(image.resize((size * image.width // image.height, size)))
        return reward(frames)
    _, _, r, next_obs, goal = vlmrm.rollout(world, act, config.seed, look, vlmrm.Clock())
    if not config.task:
        goal = goals(world, next_obs[:, 0])[:, None]
    x = np.linspace(5, images[0].width - 5, len(images))
    y = np.interp(r[:, 0], [r.min(), r.max()], [size - 5, size * 0.75])
    for t, image in enumerate(images):
        draw = ImageDraw.Draw(image)
        draw.line([*zip(x[:t + 1], y)], fill="yellow", width=2)
        draw.ellipse((5, 5, 17, 17), fill="lime" if goal[t, 0] else "gray")
    images[0].save(path, save_all=True, append_images=images[1:], duration=30, loop=0)

def main(argv=None):
    """The command line."""
    parser = shared.flags(__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, like runs/...")
    parser.add_argument("--episodes", type=int, default=100, help="default: %(default)s")
    args = parser.parse_args(argv)
    if not 1 <= args.episodes <= 100_000:
        raise sac.UsageError(f"--episodes must be from 1 to 100,000, not {args.episodes}")
    config = replace(vlmrm.read_config(args.run), reward="clip")
    if not config.task and config.env_id != shared.CAR.env_id:
        raise sac.UsageError(f"{args.run}: the simulator has no criterion for {config.prompt!r}, "
                             f"only for the prompts of --task {', '.join(shared.TASKS)}")
    policy = shared.best_policy(args.run, config, vlmrm.World(config, 1))
    act = partial(policy.act, deterministic=True)
    reward = vlmrm.CLIPReward(config.prompt, config.baseline, config.alpha, config.clip,
                              shared.device())
    result = judge(config, reward, *roll_out(config, act, reward, args.episodes))
    (args.run / "eval.json").write_text(json.dumps(result, indent=2) + "\n")
    film(config, act, reward, args.run / "film-judged.gif")
    print(f"{args.episodes} deterministic episodes: success rate {result['success']:.0%}, CLIP "
          f"return {result['return']:.2f}, goal states {result['goal_states']:.0%} of the steps")
    print("alpha   EPIC  AUROC  hacked")
    for row in result["alphas"]:
        print(f"{row['alpha']:5.2f} {row['epic']:6.3f} {row['auroc']:6.3f} {row['hacked']:7.1%}")

if __name__ == "__main__":
    sac.run(main)
