"""A diffusion policy cloned from offline data (Diffusion Policy, arXiv:2303.04137): what MODIP starts from, alone."""

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from modip_sb3.base import Metrics, Phase
from modip_sb3.buffers import SequenceBatch
from modip_sb3.checks import check_count
from modip_sb3.datasets import DatasetSources
from modip_sb3.diffusion_policy import DiffusionPolicy
from modip_sb3.pretrained import DiffusionAlgorithm


class DiffusionBC(DiffusionAlgorithm):
    """
    Behaviour cloning of a diffusion policy: MODIP's actor, denoising loss and moving average, and no network beside.

    ``learn(total_timesteps)`` clones first, ``pretrain_steps`` updates that it does not repeat when called again. The
    environment steps that follow are rollouts for statistics and callbacks: nothing is learned from them, and nothing
    is kept. So its curve beside other algorithms' is flat, and ``learn(1)`` is as good as a million.
    ``pretrain(total_updates)`` clones without any environment step; its callbacks count updates.

    :param policy: "MlpPolicy", "MultiInputPolicy" or a subclass of :class:`DiffusionPolicy`
    :param env: the environment, or its Gymnasium id
    :param learning_rate: of the actor, or a schedule, whose start is used
    :param batch_size: chunks in a batch
    :param offline_dataset: Minari id or folder, D4RL or robomimic HDF5 file, SB3 replay buffer, arrays, or a list of
        them, with options; see :meth:`OfflineDataset.load` and :func:`~modip_sb3.datasets.load_sources`
    :param pretrain_steps: updates that ``learn()`` starts with if ``pretrain()`` was not called
    :param actor_tau: rate at which the policy's exponential moving average follows
    :param actor_decay_start: updates of the policy after which its learning rate falls with the inverse square root of
        their number
    :param max_grad_norm: gradients are clipped to this norm
    :param stats_window_size: episodes that the rollout statistics average over
    :param tensorboard_log: where TensorBoard logs go
    :param policy_kwargs: arguments of :class:`DiffusionPolicy`: denoiser, chunk length, scheduler
    :param verbose: 0 no output, 1 info, 2 debug
    :param seed: seed of the pseudo random generators
    :param device: "auto", "cpu", "cuda" ...
    :param _init_setup_model: whether to build the networks now
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": DiffusionPolicy,
        "MultiInputPolicy": DiffusionPolicy,
    }
    policy: DiffusionPolicy
    optimizer_names = ("actor_optimizer",)

    def __init__(
        self,
        policy: str | type[DiffusionPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 1e-3,
        batch_size: int = 256,
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
            buffer_size=1,  # rollouts are not kept
            learning_starts=0,
            batch_size=batch_size,
            gradient_steps=0,
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
            offline_fraction=1.0,
            rollout_with="policy",
            inference="policy",
            actor_tau=actor_tau,
            actor_decay_start=actor_decay_start,
            max_grad_norm=max_grad_norm,
        )
        check_count(1, pretrain_steps=pretrain_steps)
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        self.actor_optimizer = self._make_actor_optimizer()

    def _load_offline_data(self) -> None:
        if self.offline_dataset is not None:
            super()._load_offline_data()
        elif self._n_pretrain_updates == 0:
            raise ValueError("DiffusionBC learns from data: pass offline_dataset to the constructor or to load().")

    def _update(self, batch: SequenceBatch, phase: Phase) -> Metrics:
        return self._clone_batch(batch)
