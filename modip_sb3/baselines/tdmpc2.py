"""TD-MPC2 (Hansen et al., arXiv:2310.16828): planning in a latent world model with a Gaussian policy prior."""

from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import polyak_update
from stable_baselines3.common.vec_env import VecEnv

from modip_sb3.acting import ActingMode
from modip_sb3.base import Metrics, OfflineToOnlineAlgorithm, Phase
from modip_sb3.baselines.tdmpc2_policy import TDMPC2Policy
from modip_sb3.buffers import SequenceBatch, SequenceReplayBuffer, map_obs
from modip_sb3.checks import check_at_least, check_fraction, check_keywords
from modip_sb3.datasets import DatasetSources, OfflineDataset
from modip_sb3.planner import MPPI, PLANNER_ARGUMENTS
from modip_sb3.world_model import compute_world_model_errors

CONSISTENCY_COEF, REWARD_COEF, VALUE_COEF, TERMINATION_COEF = 20.0, 0.1, 0.1, 1.0


def discount_of(episode_length: int) -> float:
    """
    TD-MPC2's heuristic: the longer the episodes, the further the agent looks.

    :param episode_length: most environment steps of an episode T
    :return: (T/5 - 1) / (T/5), between 0.95 and 0.995
    """
    fraction = episode_length / 5
    return min(max((fraction - 1) / fraction, 0.95), 0.995)


def get_episode_length(env: VecEnv) -> int:
    """
    :param env: environments
    :return: most steps of an episode, from their specification
    :raises ValueError: if there is no limit
    """
    spec = env.get_attr("spec")[0]
    if spec is None or spec.max_episode_steps is None:
        raise ValueError(
            "TD-MPC2 takes its discount and its seed steps from max_episode_steps, which the environment's spec does "
            "not give: register it with a limit, or pass gamma and learning_starts."
        )
    return spec.max_episode_steps


class TDMPC2(OfflineToOnlineAlgorithm):
    """
    TD-MPC2 (arXiv:2310.16828) for state observations and a single task, with the defaults of the official code.

    A decoder-free world model, an ensemble of Q functions and a Gaussian prior are learned from replay; MPPI in the
    model, with the prior's sequences among its candidates and Q(z, π(z)) at their end, acts.

    :param policy: "MlpPolicy", "MultiInputPolicy" or a subclass of :class:`TDMPC2Policy`
    :param env: the environment, or its Gymnasium id
    :param learning_rate: of all networks (the encoder learns at 0.3 of it), or a schedule
    :param buffer_size: transitions of online experience that are kept
    :param learning_starts: seed steps: random ones, followed by as many updates; None for max(1000, 5 episodes), or
        for none with an offline dataset
    :param batch_size: sequences in a batch
    :param tau: rate at which the target critics and the scale of Q follow
    :param gamma: discount factor; None for :func:`discount_of` the environment's ``max_episode_steps``
    :param train_freq: environment steps (or episodes) between updates
    :param gradient_steps: updates each time; -1 for as many as environment steps
    :param action_noise: added to what is executed; the planner's own spread explores without it
    :param replay_buffer_class: a subclass of :class:`SequenceReplayBuffer`
    :param replay_buffer_kwargs: its keyword arguments
    :param optimize_memory_usage: accepted for SB3's sake, observations are never stored twice
    :param model_size: the published size in millions of parameters: 1, 5 or 19
    :param termination_head: whether the model predicts where episodes terminate (the official code's ``episodic``);
        needed where they do
    :param offline_dataset: Minari id or folder, D4RL or robomimic HDF5 file, SB3 replay buffer, arrays, or a list of
        them, with options; see :meth:`OfflineDataset.load` and :func:`~modip_sb3.datasets.load_sources`
    :param pretrain_steps: updates of the offline phase that ``learn()`` starts with if ``pretrain()`` was not called
    :param offline_fraction: share of offline sequences in every online batch
    :param rollout_with: what collects experience in ``learn()``, "planner" or "policy" (the prior alone)
    :param inference: what ``predict()`` uses, "planner" or "policy"
    :param planner_kwargs: settings of :class:`~modip_sb3.planner.MPPI` beside the published ones
    :param rho: weight of each further step of the model's rollout in the losses
    :param entropy_coef: weight of the prior's entropy
    :param max_grad_norm: gradients are clipped to this norm
    :param stats_window_size: episodes that the rollout statistics average over
    :param tensorboard_log: where TensorBoard logs go
    :param policy_kwargs: arguments of :class:`TDMPC2Policy`: planning horizon, networks
    :param verbose: 0 no output, 1 info, 2 debug
    :param seed: seed of the pseudo random generators
    :param device: "auto", "cpu", "cuda" ...
    :param _init_setup_model: whether to build the networks now
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": TDMPC2Policy,
        "MultiInputPolicy": TDMPC2Policy,
    }
    policy: TDMPC2Policy
    optimizer_names = ("model_optimizer", "actor_optimizer")

    def __init__(
        self,
        policy: str | type[TDMPC2Policy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int | None = None,
        batch_size: int = 256,
        tau: float = 0.01,
        gamma: float | None = None,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[SequenceReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        model_size: int = 5,
        termination_head: bool = False,
        offline_dataset: DatasetSources | None = None,
        pretrain_steps: int = 10_000,
        offline_fraction: float = 0.5,
        rollout_with: ActingMode = "planner",
        inference: ActingMode = "planner",
        planner_kwargs: dict[str, Any] | None = None,
        rho: float = 0.5,
        entropy_coef: float = 1e-4,
        max_grad_norm: float = 20.0,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        check_keywords("policy_kwargs", policy_kwargs)
        check_keywords("planner_kwargs", planner_kwargs, MPPI, *PLANNER_ARGUMENTS)
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            0 if learning_starts is None else learning_starts,
            batch_size,
            tau,
            0.99 if gamma is None else gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            policy_kwargs={"model_size": model_size, "termination_head": termination_head, **(policy_kwargs or {})},
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
            support_multi_env=True,
            offline_dataset=offline_dataset,
            pretrain_steps=pretrain_steps,
            offline_fraction=offline_fraction,
            rollout_with=rollout_with,
            inference=inference,
        )
        check_at_least(0, max_grad_norm=max_grad_norm, entropy_coef=entropy_coef)
        check_fraction(rho=rho)
        self.planner_kwargs = dict(planner_kwargs or {})
        self.rho = rho
        self.entropy_coef = entropy_coef
        self.max_grad_norm = max_grad_norm
        if _init_setup_model:  # load() restores both numbers instead
            if gamma is None and self.env is not None:
                self.gamma = discount_of(get_episode_length(self.env))
            if learning_starts is None and self.env is not None and offline_dataset is None:
                self.learning_starts = max(1000, 5 * get_episode_length(self.env))
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        policy = self.policy
        policy.inference = self.inference
        policy.planner_kwargs = {**policy.planner_kwargs, "gamma": self.gamma, **self.planner_kwargs}
        policy.check_planner()
        self.q_scale = th.ones((), device=self.device)
        self.model_optimizer = self._make_model_optimizer()
        adam = issubclass(policy.optimizer_class, th.optim.Adam)  # AdamW is one too
        self.actor_optimizer = self._make_optimizer(policy.actor.parameters(), **({"eps": 1e-5} if adam else {}))

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return super()._get_torch_save_params()[0], ["q_scale"]

    # ---------------------------------------------------------------- terminations need the head

    def _buffer_of(self, dataset: OfflineDataset) -> SequenceReplayBuffer:
        self._check_terminations(dataset.terminations.any())
        return super()._buffer_of(dataset)

    def _store_transition(
        self,
        replay_buffer: Any,
        buffer_action: np.ndarray,
        new_obs: Any,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        self._check_terminations((dones & ~truncated).any())
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _check_terminations(self, found: Any) -> None:
        if found and not self.policy.termination_head:
            raise ValueError(
                "An episode terminated (it did not reach a time limit), but the model has no termination head, so its "
                "plans would go on after the end: pass termination_head=True."
            )

    # ---------------------------------------------------------------- learning

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """
        Update every network on offline and online sequences.

        :param gradient_steps: number of updates; the first time, as many as there were seed steps
        :param batch_size: sequences in a batch
        """
        if self._n_updates == self._n_pretrain_updates == 0:
            gradient_steps = max(gradient_steps, self.learning_starts)
        super().train(gradient_steps, batch_size)

    def _update(self, batch: SequenceBatch, phase: Phase) -> Metrics:
        """World model, critics, prior and targets."""
        if phase == "clone":
            raise ValueError("TD-MPC2 has no policy to clone: call pretrain() without clone_only.")
        flat_obs = map_obs(lambda obs: obs.flatten(0, 1), batch.observations)
        features = self.policy.features(flat_obs).unflatten(0, (len(batch.mask), -1))  # (B, H + 1, F)
        latents, metrics = self._update_model(batch, features)
        metrics.update(self._update_actor(latents.detach(), batch.mask))
        polyak_update(self.policy.critic.parameters(), self.policy.critic_target.parameters(), self.tau)
        return metrics

    def _update_model(self, batch: SequenceBatch, features: th.Tensor) -> tuple[th.Tensor, Metrics]:
        """
        World model and Q along a rollout of the model (eq. 3): Σ ρ^t [20 (z' - h(s'))² + 0.1 CE(r) + 0.1 CE(Q)], and
        the cross-entropy of terminations, averaged over steps; returns the rollout's latents ``(B, H + 1, Z)``.
        """
        model, critic = self.policy.world_model, self.policy.critic
        with th.no_grad():
            next_latents = model.encode(features[:, 1:])
            targets = self._compute_targets(batch, next_latents)
        latents = model.rollout(model.encode(features[:, 0]), batch.actions)
        consistency, reward, termination = compute_world_model_errors(
            model, latents, next_latents, batch.actions, batch.rewards, batch.terminations
        )
        logits = critic.logits(latents[:, :-1], batch.actions)
        value = critic.two_hot.cross_entropy(logits, targets).mean(0)
        errors = CONSISTENCY_COEF * consistency + REWARD_COEF * reward + VALUE_COEF * value  # (B, H)
        weights = batch.mask * self._decay(batch.mask)
        num_steps = batch.mask.sum()
        loss = (weights * errors + batch.mask * TERMINATION_COEF * termination).sum() / num_steps
        self._optimize(self.model_optimizer, loss)
        parts = {"consistency_loss": consistency, "reward_loss": reward, "q_loss": value}
        if model.termination_head is not None:
            parts["termination_loss"] = termination
        metrics = {name: (batch.mask * part.detach()).sum() / num_steps for name, part in parts.items()}
        return latents, metrics | {
            "q_mean": (batch.mask * critic.two_hot.decode(logits.detach()).mean(0)).sum() / num_steps
        }

    def _compute_targets(self, batch: SequenceBatch, next_latents: th.Tensor) -> th.Tensor:
        """r + γ (1 - d) min Q̄(z', π(z')) of two random target critics (eq. 4) ``(B, H)``."""
        next_actions, _ = self.policy.actor(next_latents)
        next_values = self.policy.critic_target(next_latents, next_actions, self.policy.random_pair()).amin(0)
        return batch.rewards + self.gamma * (1 - batch.terminations) * next_values

    def _update_actor(self, latents: th.Tensor, mask: th.Tensor) -> Metrics:
        """The prior towards high Q, in units of its running range, and entropy, on the rollout's latents (eq. 5)."""
        policy = self.policy
        actions, entropies = policy.actor(latents)
        q_values = policy.critic(latents, actions, policy.random_pair()).mean(0)  # (B, H + 1)
        q_scale = self._next_q_scale(q_values[:, 0].detach())
        reached = th.cat([th.ones_like(mask[:, :1]), mask], dim=1)  # not after an episode's end
        objective = q_values / q_scale + self.entropy_coef * entropies
        loss = -(reached * self._decay(reached) * objective).sum() / reached.sum()
        self._optimize(self.actor_optimizer, loss)
        self.q_scale.copy_(q_scale)
        return {
            "actor_loss": loss.detach(),
            "entropy": (reached * entropies.detach()).sum() / reached.sum(),
            "q_scale": self.q_scale,
        }

    def _next_q_scale(self, q_values: th.Tensor) -> th.Tensor:
        """The running range between the 5th and the 95th percentile of Q, at least 1."""
        low, high = th.quantile(q_values, q_values.new_tensor([0.05, 0.95]))
        return self.q_scale.lerp((high - low).clamp(min=1.0), self.tau)

    def _decay(self, steps: th.Tensor) -> th.Tensor:
        """ρ^t for the columns of a tensor."""
        return self.rho ** th.arange(steps.shape[1], device=steps.device)
