"""What the algorithms of this package share: an offline phase, and offline data beside online experience."""

import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ProgressBarCallback
from stable_baselines3.common.type_aliases import MaybeCallback, RolloutReturn
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from tqdm import TqdmExperimentalWarning
from tqdm.rich import tqdm

from modip_sb3.buffers import SequenceBatch, SequenceReplayBuffer, map_obs
from modip_sb3.checks import BUFFER_ARGUMENTS, check_count, check_fraction, check_keywords, check_subclass
from modip_sb3.datasets import DatasetSources, OfflineDataset
from modip_sb3.offline import obs_blocks
from modip_sb3.resume import CheckpointCallback
from modip_sb3.rollouts import ActingAlgorithm

SelfOfflineToOnline = TypeVar("SelfOfflineToOnline", bound="OfflineToOnlineAlgorithm")
Metrics = dict[str, th.Tensor]
Phase = Literal["clone", "offline", "online"]


def shows_progress(callback: BaseCallback | None) -> bool:
    """
    :param callback: of ``learn()``
    :return: whether SB3's progress bar is in it
    """
    if isinstance(callback, CallbackList):
        return any(map(shows_progress, callback.callbacks))
    return isinstance(callback, ProgressBarCallback)


def _checkpoints_of(callback: MaybeCallback) -> list[BaseCallback]:
    """Of all callbacks of ``learn()`` those that the offline phase has too: the others count environment steps."""
    callbacks = callback.callbacks if isinstance(callback, CallbackList) else callback
    if isinstance(callbacks, list):
        return [found for each in callbacks for found in _checkpoints_of(each)]
    return [callback] if isinstance(callback, CheckpointCallback) else []


def count_updates(total: int, name: str, progress_bar: bool) -> Any:
    """
    :param total: number of updates
    :param name: of what they are for
    :param progress_bar: whether to show one
    :return: iterates over the updates
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmExperimentalWarning)  # tqdm's opinion of its own rich bar, as SB3 has it
        return tqdm(range(total), desc=name, disable=not progress_bar)


def _concatenate(batches: list[SequenceBatch]) -> SequenceBatch:
    """All sequences, of the same length, in one batch."""
    if len(batches) == 1:
        return batches[0]
    return SequenceBatch(*(map_obs(lambda *parts: th.cat(parts), *parts) for parts in zip(*batches, strict=True)))


class OfflineToOnlineAlgorithm(ActingAlgorithm):
    """
    An off-policy algorithm with an offline phase, and sequence batches from offline and online data.

    A subclass names its optimisers and implements :meth:`_update`.

    :param args: arguments of :class:`ActingAlgorithm`
    :param offline_dataset: what :meth:`OfflineDataset.load` takes: a Minari id or folder, a D4RL or robomimic file, an
        SB3 replay buffer, arrays; options beside it; or a list of them, with weights (see :func:`load_sources`)
    :param pretrain_steps: updates of the offline phase that ``learn()`` starts with if ``pretrain()`` was not called
    :param offline_fraction: share of offline sequences in every online batch
    :param kwargs: keyword arguments of :class:`ActingAlgorithm`
    """

    replay_buffer: SequenceReplayBuffer
    optimizer_names: tuple[str, ...] = ()

    def __init__(
        self,
        *args: Any,
        offline_dataset: DatasetSources | None,
        pretrain_steps: int,
        offline_fraction: float,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        check_count(0, pretrain_steps=pretrain_steps)
        check_fraction(offline_fraction=offline_fraction)
        self.offline_dataset = offline_dataset
        self.pretrain_steps = pretrain_steps
        self.offline_fraction = offline_fraction
        self._n_pretrain_updates = 0
        self._actor_is_given = False

    @property
    def _knows_something(self) -> bool:
        """Whether the policy has learned from data: it acts from the first step, and its normaliser stays."""
        return self._n_pretrain_updates > 0 or self._actor_is_given

    @property
    def _begins_offline(self) -> bool:
        """Whether ``learn()`` begins with the offline phase."""
        return self.offline_dataset is not None and self._n_pretrain_updates == 0 and self.pretrain_steps > 0

    @abstractmethod
    def _update(self, batch: SequenceBatch, phase: Phase) -> Metrics:
        """
        One update of the networks that learn in this phase.

        :param batch: sequences
        :param phase: "clone" for the policy alone, "offline" for everything in ``pretrain()``, "online" in ``learn()``
        :return: what to log
        """

    def _setup_model(self) -> None:
        buffer_class = self.replay_buffer_class or SequenceReplayBuffer
        check_subclass("replay_buffer_class", buffer_class, SequenceReplayBuffer)
        check_keywords("replay_buffer_kwargs", self.replay_buffer_kwargs, buffer_class, *BUFFER_ARGUMENTS)
        self.replay_buffer_class = buffer_class
        # SB3 would warn that a custom buffer ignores n_steps: this one does not, it is told here
        n_steps, self.n_steps = self.n_steps, 1
        self.replay_buffer_kwargs = {"n_steps": n_steps, "gamma": self.gamma, **self.replay_buffer_kwargs}
        super()._setup_model()
        self.n_steps = n_steps
        self.sequence_length = max(self.policy.action_horizon, self.n_steps)

    @property
    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [getattr(self, name) for name in self.optimizer_names]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *self.optimizer_names], []

    # ---------------------------------------------------------------- offline phase

    def _load_offline_data(self) -> None:
        """Load, check and scale the offline data, once, and fit the policy's normaliser to it."""
        datasets = self._fill_offline_buffers(self.policy.action_horizon)
        if datasets and not self._knows_something:
            self._fit_normalizers(datasets)

    def _fit_normalizers(self, datasets: Sequence[OfflineDataset]) -> None:
        self._fit_vec_normalize(datasets)
        for obs in obs_blocks(datasets):
            self._update_normalizer(self._normalize_obs(obs))

    def pretrain(
        self: SelfOfflineToOnline,
        total_updates: int,
        callback: MaybeCallback = None,
        clone_only: bool = False,
        log_interval: int = 500,
        tb_log_name: str | None = None,
        progress_bar: bool = False,
    ) -> SelfOfflineToOnline:
        """
        The offline phase: train every network on the offline data; the diffusion policy by behaviour cloning.

        What was learned is kept if it is interrupted, and another call goes on from there.

        :param total_updates: updates of every network
        :param callback: called after each update, as ``learn()`` calls it after each environment step
        :param clone_only: only clone the policy, and leave the world model and the critics as they are
        :param log_interval: updates between two log entries, under ``pretrain/`` and counted in updates
        :param tb_log_name: name of the TensorBoard run, the algorithm's by default
        :param progress_bar: show a progress bar
        :return: self
        """
        if self.offline_dataset is None:
            raise ValueError("pretrain() needs data: pass offline_dataset to the constructor or to load().")
        self._load_offline_data()
        options = {"clone_only": clone_only, "log_interval": log_interval}
        with self._call("pretrain", total_updates, self._n_pretrain_updates, options) as updates_left:
            if updates_left > 0:
                if not hasattr(self, "_logger"):
                    name = tb_log_name or type(self).__name__
                    self._logger = configure_logger(self.verbose, self.tensorboard_log, name)
                wrapped_callback = self._init_callback(callback)
                if not self._is_learning:
                    self._watch(wrapped_callback)
                wrapped_callback.on_training_start(locals(), globals())
                updates = count_updates(updates_left, "pretrain", progress_bar)
                self._update_offline(updates, wrapped_callback, clone_only, log_interval)
        if updates_left > 0:
            wrapped_callback.on_training_end()
        return self

    def _update_offline(
        self, updates: Iterable[int], callback: BaseCallback, clone_only: bool, log_interval: int
    ) -> None:
        self.policy.set_training_mode(True)
        for optimizer in self._optimizers:
            self._set_learning_rate(optimizer, self.lr_schedule(1))
        phase: Phase = "clone" if clone_only else "offline"
        length = self.policy.action_horizon if clone_only else self.sequence_length
        self._restore_beside()
        for _ in updates:
            metrics: Metrics = {}
            with self._skipping("pretrain"):
                metrics = self._update(self._sample_offline(self.batch_size, length), phase)
            self._n_pretrain_updates += 1
            for name, value in metrics.items():
                self.logger.record_mean(f"pretrain/{name}", value.item())
            if self._n_pretrain_updates % log_interval == 0:
                self.logger.dump(step=self._n_pretrain_updates)
            callback.update_locals(locals())
            if not callback.on_step():
                break
        if self._n_pretrain_updates % log_interval != 0:
            self.logger.dump(step=self._n_pretrain_updates)

    # ---------------------------------------------------------------- online phase

    def learn(
        self: SelfOfflineToOnline,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOfflineToOnline:
        """Act and learn; the offline phase comes first if there is data and none has been."""
        self._load_offline_data()
        run_name = tb_log_name or type(self).__name__
        interrupted = self._unfinished_pretrain()
        if interrupted is not None and "learn" not in self._interrupted:
            checkpoints = _checkpoints_of(callback)
            self.pretrain(interrupted.total, checkpoints, progress_bar=progress_bar, **interrupted.options)
        return super().learn(total_timesteps, callback, log_interval, run_name, reset_num_timesteps, progress_bar)

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, *args: Any, **kwargs: Any) -> RolloutReturn:
        """The offline phase, if it is still due: here the logger and the callbacks of ``learn()`` are ready."""
        interrupted = self._unfinished_pretrain()
        if interrupted is not None or self._begins_offline:
            total = self.pretrain_steps if interrupted is None else interrupted.total
            self.pretrain(total, _checkpoints_of(callback), progress_bar=shows_progress(callback))
            self.start_time = time.time_ns()  # it does not count in the environment steps per second
        return super().collect_rollouts(env, callback, *args, **kwargs)

    # ---------------------------------------------------------------- learning

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """
        Update every network on offline and online sequences.

        :param gradient_steps: number of updates
        :param batch_size: sequences in a batch
        """
        self.policy.set_training_mode(True)
        self._update_learning_rate(self._optimizers)
        metrics: Metrics = {}
        for _ in range(gradient_steps):
            with self._skipping("train"):
                metrics = self._update(self._sample_batch(batch_size), "online")
            self._n_updates += 1
        self._log_updates(metrics)

    def _log_updates(self, metrics: Metrics) -> None:
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, value in metrics.items():
            self.logger.record(f"train/{name}", value.item())

    def _make_optimizer(self, params: Any, **kwargs: Any) -> th.optim.Optimizer:
        """
        :param params: parameters, or groups of them; a group's ``lr_scale`` multiplies its learning rate
        :param kwargs: arguments of the optimiser, which ``optimizer_kwargs`` of the policy override
        :return: an optimiser of the policy's class
        """
        optimizer_class: Any = self.policy.optimizer_class
        # The fused implementation takes a fifth of an update's time off on a CPU
        fused = {"fused": True} if optimizer_class in (th.optim.Adam, th.optim.AdamW) else {}
        return optimizer_class(params, lr=self.lr_schedule(1), **{**fused, **kwargs, **self.policy.optimizer_kwargs})

    def _make_model_optimizer(self) -> th.optim.Optimizer:
        """Of a latent world model and its Q ensemble; the encoder learns at 0.3 of the rate, as in TD-MPC2."""
        policy: Any = self.policy
        encoder = [*policy.features_extractor.parameters(), *policy.world_model.encoder.parameters()]
        rest = [p for name, p in policy.world_model.named_parameters() if not name.startswith("encoder.")]
        return self._make_optimizer(
            [{"params": encoder, "lr_scale": 0.3}, {"params": [*rest, *policy.critic.parameters()], "lr_scale": 1.0}]
        )

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            self._set_learning_rate(optimizer, self.lr_schedule(self._current_progress_remaining))

    @staticmethod
    def _set_learning_rate(optimizer: th.optim.Optimizer, learning_rate: float) -> None:
        for group in optimizer.param_groups:
            group["base_lr"] = learning_rate
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)

    @staticmethod
    def _scale_learning_rate(optimizer: th.optim.Optimizer, scale: float) -> None:
        for group in optimizer.param_groups:
            group["lr_scale"] = scale
            group["lr"] = group["base_lr"] * scale

    def _sample_offline(self, batch_size: int, length: int) -> SequenceBatch:
        vec_normalize = self._vec_normalize_env
        sources = self._offline_counts(batch_size)
        return _concatenate([buffer.sample_sequences(n, length, vec_normalize) for buffer, n in sources])

    def _sample_batch(
        self,
        batch_size: int,
        length: int | None = None,
        offline_fraction: float | None = None,
        sample_online: Callable[[int, int, VecNormalize | None], SequenceBatch] | None = None,
    ) -> SequenceBatch:
        """
        Offline and online sequences in one batch; either alone while the other is missing.

        :param batch_size: number of sequences
        :param length: of the sequences, ``sequence_length`` by default
        :param offline_fraction: share of the offline ones, the algorithm's own by default
        :param sample_online: draws the online ones, uniformly by default
        :return: the batch
        """
        length = self.sequence_length if length is None else length
        offline_fraction = self.offline_fraction if offline_fraction is None else offline_fraction
        num_online = batch_size
        if self._offline_buffers:
            num_online = round(batch_size * (1 - offline_fraction)) if self.replay_buffer.size() > 0 else 0
        if num_online == 0:
            return self._sample_offline(batch_size, length)
        online = (sample_online or self.replay_buffer.sample_sequences)(num_online, length, self._vec_normalize_env)
        if num_online == batch_size:
            return online
        offline = self._sample_offline(batch_size - num_online, length)
        return _concatenate([offline, online])
