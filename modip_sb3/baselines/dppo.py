"""DPPO: PPO over the steps of a diffusion policy's denoising (Ren et al., arXiv:2409.00588)."""

import math
from copy import deepcopy
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import get_actor_critic_arch
from stable_baselines3.common.type_aliases import (
    GymEnv,
    PyTorchObs,
    RolloutBufferSamples,
    RolloutReturn,
    Schedule,
    TrainFreq,
)
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecEnv

from modip_sb3.acting import ActingMode, ChunkState
from modip_sb3.base import Metrics, Phase
from modip_sb3.buffers import SequenceBatch
from modip_sb3.checks import check_at_least, check_count, check_fraction
from modip_sb3.critics import ValueEnsemble
from modip_sb3.datasets import DatasetSources
from modip_sb3.diffusion import DiffusionModel
from modip_sb3.diffusion_policy import DiffusionPolicy
from modip_sb3.planner import Plan
from modip_sb3.pretrained import DiffusionAlgorithm

CLIP_RATE = 3.0  # how fast the clip range grows over the denoising steps, the authors' setting


class DPPOPolicy(DiffusionPolicy):
    """
    A diffusion policy whose last denoising steps are fine-tuned, a copy for the steps before, and a state value.

    :param observation_space: observation space, a Box or a Dict of Box spaces
    :param action_space: action space, a bounded Box
    :param lr_schedule: unused here: the algorithm owns the optimisers
    :param net_arch: widths of the denoiser (``pi``) and of the value (``qf``), or one list for both
    :param num_finetuned_steps: K', the last denoising steps, which learn; None for all
    :param min_std: of the noise that each step adds while learning, for exploration and for the likelihoods
    :param kwargs: keyword arguments of :class:`DiffusionPolicy`
    """

    actor: DiffusionModel
    actor_ema: DiffusionModel

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        num_finetuned_steps: int | None = None,
        min_std: float = 0.1,
        **kwargs: Any,
    ):
        if num_finetuned_steps is not None:
            check_count(1, num_finetuned_steps=num_finetuned_steps)
        check_at_least(1e-3, min_std=min_std)
        self.num_finetuned_steps, self.min_std = num_finetuned_steps, min_std
        super().__init__(observation_space, action_space, lr_schedule, net_arch, **kwargs)

    def _build(self) -> None:
        super()._build()
        steps = getattr(self.actor, "steps", None)
        if steps is None:
            raise ValueError(
                "DPPO needs the likelihood of each denoising step: leave out proposal, and choose the "
                "sample_scheduler 'DDIMScheduler' without thresholding."
            )
        if (self.num_finetuned_steps or 1) > len(steps):
            raise ValueError(
                f"num_finetuned_steps={self.num_finetuned_steps} is more than num_inference_steps={len(steps)}: lower "
                "it, or raise the other."
            )
        num_steps = self.num_finetuned_steps or len(steps)
        self.first_step, self.chain_shape = len(steps) - num_steps, (num_steps + 1, *self.chunk_shape)
        self.actor_base = deepcopy(self.actor_ema)
        _, value_arch = get_actor_critic_arch(self.net_arch)
        self.value = ValueEnsemble(self.features_extractor.features_dim, 0, 1, value_arch)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        return data | {"num_finetuned_steps": self.num_finetuned_steps, "min_std": self.min_std}

    @th.no_grad()
    def sample_chain(self, condition: th.Tensor, noise: th.Tensor, std: float) -> th.Tensor:
        """
        :param condition: features ``(N, F)``
        :param noise: where the denoising starts ``(N, T, A)``
        :param std: of the noise that each step adds
        :return: what the fine-tuned steps begin with, and what each leads to ``(N, K' + 1, T, A)``
        """
        start = noise
        if self.first_step > 0:
            start = self.actor_base.chain(condition, noise, 0, self.first_step, std)[-1]
        return th.stack(self.actor_ema.chain(condition, start, self.first_step, std=std), dim=1)

    def sample_chunks(self, condition: th.Tensor, deterministic: bool = False) -> th.Tensor:
        """Without noise in the steps; see :meth:`DiffusionPolicy.sample_chunks`."""
        noise = condition.new_zeros(len(condition), *self.chunk_shape)
        if not deterministic:
            noise = self.sampling_temperature * th.randn_like(noise)
        return self.sample_chain(condition, noise, std=0.0)[:, -1].clamp(-1, 1)

    def log_prob(self, actor: DiffusionModel, chains: th.Tensor, condition: th.Tensor) -> th.Tensor:
        """
        :param actor: whose likelihoods
        :param chains: see :meth:`sample_chain` ``(N, K' + 1, T, A)``
        :param condition: features ``(N, F)``
        :return: log-likelihood of each fine-tuned step, averaged over the executed actions; the authors clip that of
            each to [-5, 2] ``(N, K')``
        """
        starts, results = chains[:, :-1].unbind(1), chains[:, 1:, : self.n_action_steps]
        steps = enumerate(starts, start=self.first_step)
        means = th.stack([actor.chain(condition, chunks, step, step + 1)[-1] for step, chunks in steps], dim=1)
        normal = th.distributions.Normal(means[:, :, : self.n_action_steps], self.min_std)
        return normal.log_prob(results).clamp(-5, 2).mean((-1, -2))


class DPPO(DiffusionAlgorithm):
    """
    Diffusion policy policy optimisation: PPO in the decision process that has every denoising step for an action. The
    advantages are those of environment steps (GAE), discounted towards the earlier denoising steps; so is the clipping.

    The policy is cloned in the offline phase, or comes from :meth:`from_pretrained`; online it learns on policy, from
    its rollouts alone. ``learn()`` acts with noise in each denoising step, ``predict()`` without.

    :param policy: "MlpPolicy", "MultiInputPolicy" or a subclass of :class:`DPPOPolicy`
    :param env: the environment, or its Gymnasium id
    :param learning_rate: of the policy in both phases, or a schedule; the state value learns at 10 times of it
    :param batch_size: environment steps in a minibatch, or chunks where the policy clones
    :param gamma: discount factor
    :param train_freq: environment steps of a rollout, in each environment
    :param n_epochs: passes over each rollout
    :param gae_lambda: λ of the generalised advantage estimator
    :param gamma_denoising: discount of the advantages from a denoising step to the one before
    :param clip_range: of the likelihood ratio in the last denoising step, or a schedule; the authors' 0.01 is for
        averages over the actions of a chunk, which these are
    :param clip_range_base: of that in the first fine-tuned one
    :param target_kl: a rollout's epochs end where the divergence from the policy that acted exceeds 1.5 times of this,
        None for never
    :param offline_dataset: Minari id or folder, D4RL or robomimic HDF5 file, SB3 replay buffer, arrays, or a list of
        them, with options; see :meth:`OfflineDataset.load` and :func:`~modip_sb3.datasets.load_sources`
    :param pretrain_steps: updates of the offline phase that ``learn()`` starts with if ``pretrain()`` was not called
    :param actor_tau: rate at which the policy's exponential moving average follows while it clones
    :param actor_decay_start: updates of the policy after which its learning rate falls with the inverse square root of
        their number, while it clones
    :param max_grad_norm: gradients are clipped to this norm
    :param stats_window_size: episodes that the rollout statistics average over
    :param tensorboard_log: where TensorBoard logs go
    :param policy_kwargs: arguments of :class:`DPPOPolicy`
    :param verbose: 0 no output, 1 info, 2 debug
    :param seed: seed of the pseudo random generators
    :param device: "auto", "cpu", "cuda" ...
    :param _init_setup_model: whether to build the networks now
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": DPPOPolicy, "MultiInputPolicy": DPPOPolicy}
    policy: DPPOPolicy
    _rollout: RolloutBuffer
    optimizer_names = ("actor_optimizer", "value_optimizer")

    def __init__(
        self,
        policy: str | type[DPPOPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 1e-4,
        batch_size: int = 500,
        gamma: float = 0.99,
        train_freq: int = 2000,
        n_epochs: int = 5,
        gae_lambda: float = 0.95,
        gamma_denoising: float = 0.99,
        clip_range: float | Schedule = 0.01,
        clip_range_base: float = 0.001,
        target_kl: float | None = 1.0,
        offline_dataset: DatasetSources | None = None,
        pretrain_steps: int = 10_000,
        actor_tau: float = 0.005,
        actor_decay_start: int = 1000,
        max_grad_norm: float = 20.0,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size=1,  # a rollout is learned from once
            learning_starts=0,
            batch_size=batch_size,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=n_epochs,
            policy_kwargs=policy_kwargs,
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
            offline_fraction=0.0,
            rollout_with="policy",
            inference="policy",
            actor_tau=actor_tau,
            actor_decay_start=actor_decay_start,
            max_grad_norm=max_grad_norm,
        )
        check_count(1, train_freq=train_freq, n_epochs=n_epochs)
        check_fraction(gae_lambda=gae_lambda, gamma_denoising=gamma_denoising)
        check_at_least(0, clip_range_base=clip_range_base)
        if not callable(clip_range):
            check_at_least(0, clip_range=clip_range)
        if target_kl is not None:
            check_at_least(0, target_kl=target_kl)
        self.n_epochs = n_epochs
        self.gae_lambda = gae_lambda
        self.gamma_denoising = gamma_denoising
        self.clip_range = FloatSchedule(clip_range)
        self.clip_range_base = clip_range_base
        self.target_kl = target_kl
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        self.actor_optimizer = self._make_actor_optimizer()
        parameters = self.policy.value.parameters()
        self.value_optimizer = self._make_optimizer([{"params": parameters, "lr_scale": 10.0}])

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_rollout", "_decision", "_last_dones"]

    @property
    def _begins_offline(self) -> bool:
        """Cloning is all that it is for."""
        return super()._begins_offline and not self._actor_is_given

    def _update(self, batch: SequenceBatch, phase: Phase) -> Metrics:
        return self._clone_batch(batch)

    # ---------------------------------------------------------------- rollouts

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, *args: Any, **kwargs: Any) -> RolloutReturn:
        """A rollout, with what the gradient of its likelihood needs beside it."""
        assert isinstance(self.train_freq, TrainFreq)
        self._rollout = RolloutBuffer(
            self.train_freq.frequency,
            spaces.Box(-np.inf, np.inf, (self.policy.features_extractor.features_dim,)),
            spaces.Box(-np.inf, np.inf, self.policy.chain_shape),
            self.device,
            self.gae_lambda,
            self.gamma,
            self.n_envs,
        )
        return super().collect_rollouts(env, callback, *args, **kwargs)

    def _act(self, obs: PyTorchObs, state: ChunkState, mode: ActingMode) -> tuple[np.ndarray, ChunkState, Plan | None]:
        """With noise in each denoising step, which is kept; a chunk that goes on is no decision, and all zero."""
        policy = self.policy
        if self._n_updates == self._rollout.pos == 0:  # cloned, and nothing else yet
            policy.actor.load_state_dict(policy.actor_ema.state_dict())
            policy.actor_base.load_state_dict(policy.actor_ema.state_dict())
        with th.no_grad():
            features = policy.features(obs)
            values = policy.value(features)[0]
        chains = np.zeros((self.n_envs, *policy.chain_shape), np.float32)
        sampled: list[th.Tensor] = []

        def sample(condition: th.Tensor) -> th.Tensor:
            noise = th.randn(len(condition), *policy.chunk_shape, device=self.device)
            sampled.append(policy.sample_chain(condition, noise, policy.min_std))
            return sampled[0][:, -1].clamp(-1, 1)

        actions, next_state = policy.continue_chunks(obs, state, sample)
        if sampled:
            chains[next_state[1] == 1] = sampled[0].cpu().numpy()
        self._decision = features.cpu().numpy(), chains, state[1] < 0, values
        return actions, next_state, None

    def _store_transition(
        self,
        replay_buffer: Any,
        buffer_action: np.ndarray,
        new_obs: Any,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        features, chains, episode_starts, values = self._decision
        rewards = np.array(reward, np.float32)
        for env in np.flatnonzero(dones):  # a time limit is not a termination: the value of what follows counts
            if infos[env].get("TimeLimit.truncated", False):
                obs, _ = self.policy.obs_to_tensor(infos[env]["terminal_observation"])
                rewards[env] += self.gamma * self._values_of(obs).item()
        self._rollout.add(features, chains, rewards, episode_starts, values, th.zeros_like(values))
        self._last_dones = dones
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    @th.no_grad()
    def _values_of(self, obs: PyTorchObs) -> th.Tensor:
        return self.policy.value(self.policy.features(obs))[0]

    # ---------------------------------------------------------------- learning

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """
        Learn from the last rollout.

        :param gradient_steps: passes over it
        :param batch_size: environment steps in a minibatch
        """
        policy, rollout = self.policy, self._rollout
        metrics: Metrics = {}
        last_obs, _ = policy.obs_to_tensor(self._last_obs)  # type: ignore[arg-type]
        rollout.compute_returns_and_advantage(self._values_of(last_obs), self._last_dones)
        policy.set_training_mode(True)
        self._update_learning_rate(self._optimizers)
        self._scale_learning_rate(self.actor_optimizer, 1.0)
        kl_limit = np.inf if self.target_kl is None else 1.5 * self.target_kl
        for _ in range(gradient_steps):
            for batch in rollout.get(batch_size):
                with self._skipping("train"):
                    metrics |= self._update_from_rollout(batch)
            if metrics.get("approx_kl", th.zeros(())) > kl_limit:
                break
        policy.actor_ema.load_state_dict(policy.actor.state_dict())  # what acts, and whose likelihoods are the old ones
        self._n_updates += gradient_steps
        self._log_updates(metrics)

    def _update_from_rollout(self, batch: RolloutBufferSamples) -> Metrics:
        features: Any = batch.observations
        value = self.policy.value
        value_loss = value.two_hot.cross_entropy(value.logits(features), batch.returns).mean()
        self._optimize(self.value_optimizer, value_loss)
        chains = batch.actions.view(-1, *self.policy.chain_shape)
        decided = chains.flatten(1).any(1)
        metrics = {"value_loss": value_loss.detach()}
        if not decided.any():
            return metrics
        return metrics | self._update_chains(chains[decided], features[decided], batch.advantages[decided])

    def _update_chains(self, chains: th.Tensor, features: th.Tensor, advantages: th.Tensor) -> Metrics:
        """PPO's clipped objective in every fine-tuned denoising step (section 4.3 of the paper)."""
        policy, num_steps = self.policy, chains.shape[1] - 1
        log_prob = policy.log_prob(policy.actor, chains, features)  # (N, K')
        with th.no_grad():
            old_log_prob = policy.log_prob(policy.actor_ema, chains, features)
        if len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        discounts = self.gamma_denoising ** th.arange(num_steps - 1, -1, -1, device=self.device)
        advantages = advantages[:, None] * discounts
        # The clip range grows exponentially from the first fine-tuned step to the last
        progress = th.linspace(1, 0, num_steps, device=self.device).flip(0)
        growth = th.expm1(CLIP_RATE * progress) / math.expm1(CLIP_RATE)
        last = self.clip_range(self._current_progress_remaining)
        clip_range = self.clip_range_base + (last - self.clip_range_base) * growth
        log_ratio = log_prob - old_log_prob
        ratio = log_ratio.exp()
        clipped = th.clamp(ratio, 1 - clip_range, 1 + clip_range)
        loss = -th.minimum(advantages * ratio, advantages * clipped).mean()
        self._optimize(self.actor_optimizer, loss)
        return {
            "actor_loss": loss.detach(),
            "approx_kl": (ratio.detach() - 1 - log_ratio.detach()).mean(),
            "clip_fraction": ((ratio.detach() - 1).abs() > clip_range).float().mean(),
        }
