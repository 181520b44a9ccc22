"""Going on with a training that was killed: the callback that writes checkpoints, and ``resume()`` from them."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn

from modip_sb3.checkpoint import Beside, load_state, save_state
from modip_sb3.checks import check_at_least
from modip_sb3.storage import Checkpoints

SelfResumable = TypeVar("SelfResumable", bound="ResumableAlgorithm")


@dataclass(frozen=True)
class Call:
    """A call of ``learn()`` or ``pretrain()``, as the user made it."""

    total: int
    """What it was asked for: environment steps or updates"""
    start: int
    """What had been done before it"""
    options: dict[str, Any]
    ended: bool = False
    """Whether it has returned"""


def find_checkpoint(folder: str | PathLike[str]) -> Path | None:
    """
    :param folder: of a :class:`CheckpointCallback`
    :return: the newest checkpoint that is whole, None if there is none; a damaged one is passed over with a warning
    """
    return Checkpoints(Path(folder)).newest()


class CheckpointCallback(BaseCallback):
    """
    Saves everything that :meth:`ResumableAlgorithm.resume` needs to go on exactly, and keeps the last two checkpoints.

    For ``learn()`` and ``pretrain()`` of every algorithm here; one callback serves both, also the offline phase that
    ``learn()`` begins with. A checkpoint is written between two rollouts or two updates, when everything collected is
    stored and learned from, and at the end; it is whole or not there. If it cannot be written, on a full disk for one,
    there is a warning, the training goes on, and the checkpoints before it stay. Not for ``model.save()``'s purposes:
    it is larger, and only for the version of the package that wrote it.

    The state of environments is in it if they are in a DummyVecEnv and their attributes are plain (numbers, arrays,
    containers, spaces, random generators, MuJoCo's data). Of others (SubprocVecEnv, robosuite) it is not: a new episode
    begins after ``resume()``, which says so in a warning.

    :param save_freq: environment steps in ``learn()``, or updates in ``pretrain()``, between two checkpoints
    :param folder: where they go; another training needs another folder
    :param verbose: as in SB3
    """

    model: "ResumableAlgorithm"

    def __init__(self, save_freq: int, folder: str | PathLike[str], verbose: int = 0):
        super().__init__(verbose)
        check_at_least(1, save_freq=save_freq)
        self.save_freq = save_freq
        self.folder = Path(folder)

    def _init_callback(self) -> None:
        if not isinstance(self.model, ResumableAlgorithm):
            raise ValueError(
                f"{type(self.model).__name__} cannot be resumed: use SB3's own CheckpointCallback with it."
            )

    def _progress(self) -> int:
        return self.model.num_timesteps + getattr(self.model, "_n_pretrain_updates", 0)

    def _on_training_start(self) -> None:
        self.last, self.in_rollout = self._progress(), False

    def _on_rollout_start(self) -> None:
        self._save_if_due()
        self.in_rollout = True

    def _on_rollout_end(self) -> None:
        self.in_rollout = False

    def _on_step(self) -> bool:
        if not self.in_rollout:  # in pretrain(): the update is complete
            self._save_if_due()
        return True

    def _on_training_end(self) -> None:
        if not self.in_rollout:  # else a callback stopped it in the middle of a step
            self.save()

    def _save_if_due(self) -> None:
        if self._progress() - self.last >= self.save_freq:
            self.save()

    def save(self) -> None:
        """Write a checkpoint now, when neither ``learn()`` nor ``pretrain()`` is running."""
        checkpoints = Checkpoints(self.folder)
        try:
            with checkpoints.new(checkpoints.next_number()) as folder:
                save_state(self.model, folder)
        except OSError as error:
            warnings.warn(f"No checkpoint was written to {self.folder}: {error}. The last one stays.", stacklevel=2)
        self.last = self._progress()


class ResumableAlgorithm(OffPolicyAlgorithm):
    """An off-policy algorithm that goes on exactly where a :class:`CheckpointCallback` saved it."""

    _beside: Beside | None = None  # what the next update or rollout begins with, after resume()
    _callback: BaseCallback | None = None

    def _setup_model(self) -> None:
        super()._setup_model()
        self._calls: dict[str, Call] = {}  # the last one of each kind
        self._interrupted: dict[str, Call] = {}  # those of the checkpoint that were not repeated yet

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_calls", "_interrupted", "_beside", "_callback"]

    @classmethod
    def resume(
        cls: type[SelfResumable],
        folder: str | PathLike[str],
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        offline_dataset: Any = None,
    ) -> SelfResumable:
        """
        The model as it was when its last checkpoint was written, with its settings, replay buffer and environments.

        Then repeat the call that was interrupted, with the number it had: ``model.learn(200_000)`` goes on to 200,000
        environment steps counted from where that call began, and ``model.pretrain(50_000)`` to 50,000 updates, or does
        nothing if they were made; ``learn()`` finishes an interrupted offline phase first if ``pretrain()`` was not
        repeated. Another number is an error. This holds for the first call of each after ``resume()``, in which
        ``reset_num_timesteps`` does not matter; later calls are as ever::

            if find_checkpoint("runs/hopper"):
                model = MODIP.resume("runs/hopper")
            else:
                model = MODIP("MlpPolicy", "Hopper-v5", offline_dataset="mujoco/hopper/medium-v0")
            checkpoints = CheckpointCallback(10_000, "runs/hopper")
            model.pretrain(50_000, callback=checkpoints)
            model.learn(200_000, callback=checkpoints)

        On a CPU the numbers are then those of a training that was not interrupted, to the last bit, with the same
        versions and threads; not after a warning that the environments begin a new episode. Counters of callbacks go on
        too. Clocks do not: ``time/fps`` and the episodes' ``t`` are those of the process.

        :param folder: of the :class:`CheckpointCallback`. Its files are unpickled, which can run any code: resume only
            what you or someone you trust has written
        :param env: environments made as they were for the training; None makes them anew by their Gymnasium ids
        :param device: "auto", "cpu", "cuda" ...
        :param offline_dataset: the same data again, if it was given as arrays; data named by an id or a path is loaded
            from there
        :return: the model
        :raises FileNotFoundError: if the folder has no checkpoint that is whole
        :raises ValueError: if the environments or the data are not those of the checkpoint
        """
        path = find_checkpoint(folder)
        if path is None:
            raise FileNotFoundError(
                f"{folder} has no complete checkpoint: give the folder of a CheckpointCallback that has saved one."
            )
        model, beside = load_state(cls, path, env, device)
        model.go_on_with(beside, offline_dataset)
        model._interrupted = dict(model._calls)
        return model

    def go_on_with(self, beside: Beside, offline_dataset: Any = None) -> None:
        """
        The rest of :meth:`resume` after :func:`load_state`, for those who count what is left themselves.

        :param beside: what was loaded beside the model
        :param offline_dataset: as for :meth:`resume`
        """
        self._interrupted, self._beside, self._callback = {}, beside, None
        self._restore_offline_data(offline_dataset)

    def _restore_offline_data(self, offline_dataset: Any) -> None:
        """Load the offline data again, for the algorithms that have some."""

    # ---------------------------------------------------------------- calls, repeated after resume()

    @contextmanager
    def _call(self, name: str, total: int, done: int, options: dict[str, Any]) -> Iterator[int]:
        """
        :param name: of a method
        :param total: what it is asked for
        :param done: what has been done before, in all calls
        :param options: to repeat it with
        :return: what is left of it
        """
        call = self._interrupted.get(name)
        if call is not None and call.total != total:
            raise ValueError(
                f"{name}({total}) after resume(): the checkpoint was made in or after {name}({call.total}), and "
                f"{done - call.start} of these are done. Repeat {name}({call.total}), which does what is left; then "
                "another call can add to it."
            )
        self._interrupted.pop(name, None)
        before_learn = name == "pretrain" and "learn" in self._interrupted and call is not None and call.ended
        if call is None:
            call = Call(total, done, options)
            if name == "pretrain" and not self._is_learning:
                self._calls.pop("learn", None)
        self._calls[name] = replace(call, ended=before_learn)
        try:
            with th.enable_grad():  # a Ctrl-C at the edge of a no_grad() leaves gradients off, here and after the call
                yield 0 if before_learn else max(call.start + total - done, 0)
        finally:
            self._calls[name] = replace(call, ended=True)

    @property
    def _is_learning(self) -> bool:
        """Whether ``learn()`` is running, or was when the checkpoint was made."""
        return "learn" in self._calls and not self._calls["learn"].ended

    def _unfinished_pretrain(self) -> Call | None:
        """The offline phase that the checkpoint was made in and that goes on after :meth:`resume`."""
        call = self._interrupted.get("pretrain")
        return None if call is None or call.ended else call

    def _restore_beside(self) -> None:
        if self._beside is not None:
            self._beside.restore(self)
            self._beside = None

    def learn(
        self: SelfResumable,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "run",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfResumable:
        """As :meth:`OffPolicyAlgorithm.learn`; after :meth:`resume` it goes on with the call that was interrupted."""
        goes_on = "learn" in self._interrupted
        reset_num_timesteps = reset_num_timesteps and not goes_on
        if not goes_on:
            self._restore_beside()
        with self._call("learn", total_timesteps, 0 if reset_num_timesteps else self.num_timesteps, {}) as left:
            if left == 0 and goes_on:
                return self
            return super().learn(left, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        noise = copy.deepcopy(self.action_noise)
        result = super()._setup_learn(*args, **kwargs)
        if self._beside is not None:
            self.action_noise = noise  # SB3 has reset it
        self._watch(result[1])
        return result

    def _watch(self, callback: BaseCallback) -> None:
        """Keep the callbacks' state in the checkpoints, and give them that of the checkpoint after :meth:`resume`."""
        self._callback = callback
        if self._beside is not None:
            self._beside.restore_callbacks(callback)

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """As in SB3, with the random generators of the checkpoint after :meth:`resume`."""
        self._restore_beside()
        return super().collect_rollouts(*args, **kwargs)
