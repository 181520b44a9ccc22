"""What is measured: each row a ratio with its goal."""

import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer

from modip_sb3.benchmark.settings import default_dataset
from modip_sb3.benchmark.speed.timing import Clock
from modip_sb3.benchmark.speed.work import make_steps
from modip_sb3.buffers import SequenceReplayBuffer
from modip_sb3.diffusion import TRACE_AFTER, DiffusionModel
from modip_sb3.modip import MODIP

ENV = "modip/hopper-sac-medium-v5"
REFINED = {"num_samples": 32, "num_elites": 8, "num_iterations": 6}  # the refinement that the README names


@dataclass(frozen=True)
class Row:
    """One measured ratio."""

    number: str
    measure: str
    value: float
    goal: float | None = None
    at_most: bool = False
    """Whether the goal is an upper bound."""
    details: dict[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """None where there is no goal."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


def make_modip(clock: Clock, denoiser: str = "unet", policy_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """MODIP with batches of 256 on the shipped data, after the first update and the first samples, which are slower."""
    model = MODIP(
        "MlpPolicy",
        ENV,
        batch_size=256,
        train_freq=1,
        offline_dataset=default_dataset(ENV),
        policy_kwargs={"denoiser": denoiser, **(policy_kwargs or {})},
        seed=0,
        device=clock.device,
        **kwargs,
    )
    policy: Any = model.pretrain(1).policy
    for batch_size in (1, 2):
        obs = th.zeros(batch_size, policy.observation_space.shape[0], device=clock.device)
        for _ in range(TRACE_AFTER):
            policy.sample_chunks(policy.actor_condition(policy.features(obs)))
    return model


def _planning(model: Any, n_envs: int = 1) -> Callable[[], Any]:
    obs = np.stack([model.observation_space.sample() for _ in range(n_envs)])
    tensor, _ = model.policy.obs_to_tensor(obs)
    model.policy.set_training_mode(False)
    return lambda: model.policy.plan(tensor)


def terminal_value(clock: Clock) -> Iterator[Row]:
    """P1: planning with a terminal Q(z, π(z)) against V(z)."""
    for name, planner_kwargs in (("default", {}), ("refined", REFINED)):
        with_q, with_v = (
            _planning(make_modip(clock, policy_kwargs={"terminal_value": value}, planner_kwargs=planner_kwargs))
            for value in ("q", "v")
        )
        value, details = clock.ratio(with_q, with_v)
        yield Row("P1", f"planning with Q(z, DP(z)) ÷ with V(z), {name} planner", value, 5, details=details)


def critic_targets(clock: Clock) -> Iterator[Row]:
    """P2: targets that ask the policy against those that do not."""
    functions = []
    for target in ("policy", "v"):
        model = make_modip(clock, critic_target=target)
        batch = model._sample_offline(model.batch_size, model.sequence_length)
        features = model.policy.features(batch.observations.flatten(0, 1)).unflatten(0, (model.batch_size, -1))
        functions.append(partial(model._update_model_and_critics, batch, features.detach()))
    value, details = clock.ratio(*functions)
    yield Row("P2", "update of critics and model, policy-coupled ÷ independent targets", value, 3, details=details)


@th.no_grad()
def plain_sample(model: DiffusionModel, condition: th.Tensor, noise: th.Tensor) -> th.Tensor:
    """The loop of diffusers' documentation."""
    scheduler = model.sample_scheduler
    scheduler.set_timesteps(model.num_inference_steps, device=condition.device)
    chunks = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(chunks, timestep)
        prediction = model.denoiser(model_input, timestep.expand(len(chunks)), condition)
        chunks = scheduler.step(prediction, timestep, chunks).prev_sample
    return chunks.clamp(-1, 1)


def sampling(clock: Clock) -> Iterator[Row]:
    """P3: chunks by the plain loop over the scheduler against ours."""
    for denoiser, goals in (("mlp", {1: 3.0, 256: 1.3}), ("unet", {1: 1.5, 256: 1.1})):
        actor = make_modip(clock, denoiser).policy.actor_ema
        for batch_size, goal in goals.items():
            condition = th.randn(batch_size, 11, device=clock.device)
            noise = th.randn(batch_size, *actor.chunk_shape, device=clock.device)
            ours, plain = actor.sample(condition, noise), plain_sample(actor, condition, noise)
            th.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)
            value, details = clock.ratio(
                partial(plain_sample, actor, condition, noise), partial(actor.sample, condition, noise)
            )
            measure = f"chunks by the scheduler's loop ÷ ours, {denoiser}, batch {batch_size}"
            yield Row("P3", measure, value, goal, details=details)


def arithmetic(clock: Clock) -> Iterator[Row]:
    """P4: arithmetic of planner and updates against that of their matrix products alone."""
    model = make_modip(clock, planner_kwargs=REFINED)
    value, details = clock.matmul_share(_planning(model))
    yield Row("P4", "FLOP/s of a refined plan ÷ of its matrix products", value, 0.5, details=details)
    model.policy.set_training_mode(True)
    batch = model._sample_offline(model.batch_size, model.sequence_length)
    value, details = clock.matmul_share(lambda: model._update(batch, "offline"))
    yield Row("P4", "FLOP/s of an update ÷ of its matrix products", value, 0.5, details=details)


def learning(clock: Clock, steps: int = 100) -> Iterator[Row]:
    """P5: ``learn()`` against the sum of what it is made of."""
    model = make_modip(clock)
    model.learn(2)
    env, batch_size = gym.make(ENV), model.batch_size
    env.reset(seed=0)
    obs, _ = model.policy.obs_to_tensor(model._last_obs)

    def step() -> None:
        if any(env.step(env.action_space.sample())[2:4]):
            env.reset()

    def act() -> None:
        model.policy.set_training_mode(False)
        model._act_in_each(obs, model._chunk_state)

    def update() -> None:
        model.policy.set_training_mode(True)
        model._update(model._sample_batch(batch_size), "online")

    def learn() -> None:
        model.learn(steps, reset_num_timesteps=False)

    whole, *parts = clock.medians(learn, step, act, update)
    assert model.n_plan_steps is not None
    per_step = np.array(parts) * [1, 1 / model.n_plan_steps, model.gradient_steps / model.train_freq.frequency]
    names = ("env_ms", "plan_ms", "update_ms")
    details = dict(zip(names, (1e3 * per_step).tolist(), strict=True)) | {"learn_ms": 1e3 * whole / steps}
    value = per_step.sum() * steps / whole
    yield Row("P5", "bare env step, plan and update ÷ a step of learn()", value, 0.85, details=details)


def growth(clock: Clock) -> Iterator[Row]:
    """P6: how the time of planning grows."""
    search = {"num_samples": 16, "num_elites": 8, "num_iterations": 2}
    base = _planning(make_modip(clock, planner_kwargs=search))
    wide = make_modip(clock, policy_kwargs={"num_proposals": 128}, planner_kwargs=search | {"num_samples": 128})
    chunk = {"action_horizon": 8, "n_action_steps": 4}
    long, short = (
        _planning(make_modip(clock, policy_kwargs=chunk | {"horizon": horizon}, planner_kwargs=search))
        for horizon in (8, 4)
    )
    many = _planning(make_modip(clock, planner_kwargs=search), n_envs=8)
    for name, larger, smaller, goal in (
        ("candidates ×8", _planning(wide), base, 8),
        ("horizon ×2", long, short, 2),
        ("environments ×8", many, base, 2.4),
    ):
        value, details = clock.ratio(larger, smaller)
        yield Row("P6", f"planning, {name}", value, goal, at_most=True, details=details)


def prediction(clock: Clock) -> Iterator[Row]:
    """P7: ``predict`` of one observation, in those of SAC."""
    sac = SAC("MlpPolicy", ENV, device=clock.device, buffer_size=10)
    obs = sac.observation_space.sample()

    def predict(model: Any, inference: str) -> Callable[[], None]:
        model.inference = inference

        def four_steps() -> None:  # of which one samples the chunk
            state = None
            for _ in range(4):
                _, state = model.predict(obs, state)

        return four_steps

    def four_of_sac() -> None:
        for _ in range(4):
            sac.predict(obs)

    for name, denoiser, inference, goal in (
        ("policy, mlp", "mlp", "policy", 10),
        ("policy, unet", "unet", "policy", 40),
        ("planner, unet", "unet", "planner", 60),
    ):
        value, details = clock.ratio(predict(make_modip(clock, denoiser), inference), four_of_sac)
        details = {key: time / 4 for key, time in details.items()}
        yield Row("P7", f"predict ÷ SAC's, {name}", value, goal, at_most=True, details=details)


def replay(clock: Clock, size: int = 1_000_000) -> Iterator[Row]:
    """P8: sequences from a full replay buffer against SB3's transitions, and the memory it takes."""
    space, actions = gym.spaces.Box(-1, 1, (11,), np.float32), gym.spaces.Box(-1, 1, (3,), np.float32)
    tracemalloc.start()
    ours = SequenceReplayBuffer(size, space, actions, clock.device)
    ours.full = True
    for row in range(999, size, 1000):
        ours.dones[row] = True
        ours.final_observations[row, 0] = ours._obs_at(row, 0)
    taken, bare = tracemalloc.get_traced_memory()[0], size * (4 * (11 + 3 + 1) + 2)
    tracemalloc.stop()
    theirs = ReplayBuffer(size, space, actions, clock.device)
    theirs.full = True
    value, details = clock.ratio(lambda: ours.sample_sequences(256, 5), lambda: theirs.sample(1280))
    yield Row("P8", "256 sequences of 5 ÷ 1,280 of SB3's transitions, of 1M steps", value, 1.5, True, details)
    details = {"mib": taken / 2**20, "bare_mib": bare / 2**20}
    yield Row("P8", "memory of the replay buffer ÷ of its bare arrays", taken / bare, 1.1, True, details)


def tdmpc2(clock: Clock) -> Iterator[Row]:
    """P10: TD-MPC2's plan and update against their matrix products."""
    for size in (1, 5):
        for name, function in zip(("a plan", "an update"), make_steps(ENV, size, str(clock.device)), strict=True):
            share, details = clock.matmul_share(function)
            yield Row("P10", f"TD-MPC2, size {size}: FLOP/s of {name} ÷ of its products", share, details=details)


ROWS: dict[str, Callable[[Clock], Iterator[Row]]] = {
    "P1": terminal_value,
    "P2": critic_targets,
    "P3": sampling,
    "P4": arithmetic,
    "P5": learning,
    "P6": growth,
    "P7": prediction,
    "P8": replay,
    "P10": tdmpc2,
}
