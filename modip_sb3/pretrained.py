"""A diffusion policy that was cloned once, in any of the algorithms that fine-tune it."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Self

import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm, maybe_make_env
from stable_baselines3.common.torch_layers import get_actor_critic_arch
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import obs_as_tensor, polyak_update

from modip_sb3.base import Metrics, OfflineToOnlineAlgorithm, count_updates, shows_progress
from modip_sb3.buffers import Observations, SequenceBatch, map_obs
from modip_sb3.checks import check_at_least, check_count, check_fraction
from modip_sb3.datasets import OfflineDataset
from modip_sb3.diffusion_policy import DEFAULT_NET_ARCH, DiffusionPolicy
from modip_sb3.offline import measure_blur

# What the actor's networks are, and were trained for; how they are sampled may be chosen anew
_FIXED = ["denoiser", "proposal", "action_horizon", "train_scheduler", "scheduler_kwargs"]
_FIXED += ["features_extractor_class", "features_extractor_kwargs"]
_CHOSEN = ["sample_scheduler", "num_inference_steps", "condition_noise"]
_PARTS = ("features_extractor", "normalizer", "actor", "actor_ema")
_SCALARS = ("num_actor_updates", "blur")


class DiffusionAlgorithm(OfflineToOnlineAlgorithm):
    """
    An algorithm whose policy is a :class:`DiffusionPolicy`, which may come from another such algorithm.

    :param args: arguments of :class:`OfflineToOnlineAlgorithm`
    :param actor_tau: rate at which the policy's exponential moving average follows
    :param actor_decay_start: updates of the policy after which its learning rate falls with the inverse square root of
        their number
    :param max_grad_norm: gradients are clipped to this norm
    :param kwargs: keyword arguments of :class:`OfflineToOnlineAlgorithm`
    """

    policy: DiffusionPolicy
    actor_optimizer: th.optim.Optimizer

    def __init__(self, *args: Any, actor_tau: float, actor_decay_start: int, max_grad_norm: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_fraction(actor_tau=actor_tau)
        check_count(1, actor_decay_start=actor_decay_start)
        check_at_least(0, max_grad_norm=max_grad_norm)
        self.actor_tau = actor_tau
        self.actor_decay_start = actor_decay_start
        self.max_grad_norm = max_grad_norm

    def _fit_normalizers(self, datasets: Sequence[OfflineDataset]) -> None:
        super()._fit_normalizers(datasets)
        if self.policy.condition_noise == "auto":
            self.policy.blur.fill_(measure_blur(datasets, self._normalized_features))

    @th.no_grad()
    def _normalized_features(self, obs: Observations) -> th.Tensor:
        return self.policy.features(obs_as_tensor(self._normalize_obs(obs), self.device))

    def _make_actor_optimizer(self) -> th.optim.Optimizer:
        """Of the denoiser and of a features extractor that learns by cloning alone."""
        modules = (self.policy.features_extractor, self.policy.actor)
        return self._make_optimizer([p for module in modules for p in module.parameters()])

    def _clone_batch(self, batch: SequenceBatch) -> Metrics:
        """The denoising loss on chunks from the start of each sequence; actions after an episode's end do not count."""
        horizon = self.policy.action_horizon
        features = self.policy.features(map_obs(lambda obs: obs[:, 0], batch.observations))
        return self._clone(batch.actions[:, :horizon], features, batch.mask[:, :horizon])

    def _clone(self, actions: th.Tensor, condition: th.Tensor, weights: th.Tensor) -> Metrics:
        """One step of the denoising loss on chunks ``(B, T, A)``; see :meth:`DiffusionPolicy.compute_loss`."""
        loss, metrics = self.policy.compute_loss(actions, condition, weights)
        self._update_actor(loss)
        return metrics

    def _update_actor(self, loss: th.Tensor) -> None:
        """One step of the denoising loss, at the rate α / √max(t / t_ref, 1) after t steps (EDM2, arXiv:2312.02696)."""
        num_updates = self.policy.num_actor_updates
        decay = max(num_updates.item() / self.actor_decay_start, 1) ** -0.5
        self._scale_learning_rate(self.actor_optimizer, decay)
        self._optimize(self.actor_optimizer, loss)
        num_updates += 1
        polyak_update(self.policy.actor.parameters(), self.policy.actor_ema.parameters(), self.actor_tau)

    def _clone_anew(self, total_updates: int, update: Callable[[], Metrics]) -> None:
        """
        Clone the policy from other first weights: what a network has learned first keeps it from taking up what comes
        later (Ash & Adams, arXiv:1910.08475; Nikishin et al., arXiv:2205.07802). Cut short, it leaves the policy as it
        was.

        :param total_updates: number of updates
        :param update: makes one
        """
        policy, optimizer = deepcopy((self.policy.state_dict(), self.actor_optimizer.state_dict()))
        try:
            self.policy.reset_actor()
            self.actor_optimizer.state.clear()
            for _ in count_updates(total_updates, "cloning anew", shows_progress(self._callback)):
                update()
        except BaseException:
            self.policy.load_state_dict(policy)
            self.actor_optimizer.load_state_dict(optimizer)
            raise

    @classmethod
    def from_pretrained(cls, model: BaseAlgorithm, env: GymEnv | str | None = None, **kwargs: Any) -> Self:
        """
        A new algorithm that starts from another one's diffusion policy: its weights, their moving average and the
        normalisation of observations. The networks beside it are new, and so are all optimisers.

        :param model: an algorithm of this package with a diffusion policy, trained or loaded
        :param env: the environment, or its Gymnasium id; that of the other algorithm by default
        :param kwargs: arguments of the constructor; what the denoiser is cannot be changed by ``policy_kwargs``,
            while ``n_action_steps`` and ``sampling_temperature`` are those of the new algorithm, not of the other one
        :return: the algorithm
        :raises ValueError: if the other algorithm has no diffusion policy, or one for other spaces or of other networks
        """
        source = model.policy
        if not isinstance(source, DiffusionPolicy):
            raise ValueError(
                f"{type(model).__name__} has a {type(source).__name__}, expected an algorithm with a diffusion policy, "
                "such as DiffusionBC or MODIP."
            )
        env = model.get_env() if env is None else maybe_make_env(env, verbose=0)
        for name in ("observation_space", "action_space"):
            if env is not None and getattr(source, name) != getattr(env, name):
                raise ValueError(
                    f"The diffusion policy is for the {name} {getattr(source, name)}, but the environment's is "
                    f"{getattr(env, name)}: give one with the same."
                )
        policy_kwargs = _merge(source, kwargs.pop("policy_kwargs", None) or {})
        alias = "MultiInputPolicy" if isinstance(source.observation_space, spaces.Dict) else "MlpPolicy"
        new = cls(alias, env, policy_kwargs=policy_kwargs, **kwargs)
        for part in _PARTS:
            try:
                getattr(new.policy, part).load_state_dict(getattr(source, part).state_dict())
            except RuntimeError as error:
                raise ValueError(
                    f"The {part} of {type(model).__name__}'s policy does not fit {cls.__name__} with policy_kwargs="
                    f"{policy_kwargs}: leave out what changes the actor's input, such as terminal_value='q'."
                ) from error
        for name in _SCALARS:
            getattr(new.policy, name).copy_(getattr(source, name))
        new._actor_is_given = True
        return new


def _merge(source: DiffusionPolicy, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a policy with the source's actor, and what is given for the rest."""
    parameters = source._get_constructor_parameters()
    for name in _FIXED:
        if name in given and given[name] != parameters[name]:
            raise ValueError(
                f"policy_kwargs has {name}={given[name]!r}, but the diffusion policy was trained with "
                f"{parameters[name]!r}: leave it out."
            )
    net_arch = given.get("net_arch", {"qf": DEFAULT_NET_ARCH[source.denoiser_name]["qf"]})
    _, critic_arch = get_actor_critic_arch({"pi": [], **net_arch} if isinstance(net_arch, dict) else net_arch)
    actor_arch, _ = get_actor_critic_arch(source.net_arch)
    kept = {name: parameters[name] for name in _FIXED + _CHOSEN}
    return {**kept, **given, "net_arch": {"pi": actor_arch, "qf": critic_arch}}
