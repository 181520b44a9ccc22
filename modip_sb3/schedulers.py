"""diffusers' schedulers of noise: made from names and settings, and DDIM's steps in closed form."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch as th
from diffusers import DDIMScheduler, SchedulerMixin

from modip_sb3.checks import check_count, check_keywords

DEFAULT_SCHEDULER_KWARGS: dict[str, Any] = {
    "num_train_timesteps": 20,
    "beta_schedule": "squaredcos_cap_v2",
    "timestep_spacing": "trailing",  # sampling starts at the last timestep, where training has seen pure noise
}


def scheduler_class(name: str) -> Any:
    """
    :param name: class name of a diffusers scheduler
    :return: the class
    """
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (inspect.isclass(found) and issubclass(found, SchedulerMixin)):
        raise ValueError(f"{name!r} is not a scheduler of diffusers; expected a class name such as 'DDIMScheduler'.")
    return found


def make_schedulers(names: Sequence[str], scheduler_kwargs: dict[str, Any]) -> list[Any]:
    """
    Schedulers that share one noise schedule.

    :param names: class names of diffusers schedulers
    :param scheduler_kwargs: arguments over ``DEFAULT_SCHEDULER_KWARGS``; each scheduler gets those that it knows
    :return: the schedulers
    """
    check_keywords("scheduler_kwargs", scheduler_kwargs)
    classes = [scheduler_class(name) for name in names]
    known = [inspect.signature(cls.__init__).parameters for cls in classes]
    if "num_train_timesteps" not in known[0]:
        raise ValueError(f"{names[0]} has no num_train_timesteps to train at; choose another, such as 'DDPMScheduler'.")
    unknown = [key for key in scheduler_kwargs if not any(key in parameters for parameters in known)]
    if unknown:
        raise ValueError(f"scheduler_kwargs {unknown} are arguments of none of {list(names)}; check their spelling.")
    schedulers = []
    for cls, parameters in zip(classes, known, strict=True):
        # Estimates of the clean actions must stay in [-1, 1]: DDPM and DDIM clip them, DPM-Solver thresholds them
        clipping = {} if "clip_sample" in parameters else {"thresholding": True}
        merged = {**DEFAULT_SCHEDULER_KWARGS, **clipping, **scheduler_kwargs}
        check_count(1, num_train_timesteps=merged["num_train_timesteps"])
        try:
            schedulers.append(cls(**{key: value for key, value in merged.items() if key in parameters}))
        except Exception as error:  # each scheduler has errors of its own
            raise ValueError(
                f"{cls.__name__} does not take scheduler_kwargs={scheduler_kwargs}; see its documentation in diffusers."
            ) from error
    return schedulers


@dataclass(frozen=True)
class DDIMStep:
    """
    One step of DDIM without noise (arXiv:2010.02502, eq. 12) as numbers: from noisy actions x and the network's
    prediction m to ``clean * clip(sample * x + prediction * m) + direct_sample * x + direct_prediction * m``.
    """

    timestep: int
    sample: float
    prediction: float
    clip: float
    clean: float
    direct_sample: float
    direct_prediction: float

    def __call__(self, noisy_actions: th.Tensor, prediction: th.Tensor) -> th.Tensor:
        """
        :param noisy_actions: ``(B, T, A)``
        :param prediction: of the same shape
        :return: less noisy actions
        """
        clean = (noisy_actions * self.sample).add_(prediction, alpha=self.prediction).clamp_(-self.clip, self.clip)
        result = clean.mul_(self.clean).add_(prediction, alpha=self.direct_prediction)
        return result.add_(noisy_actions, alpha=self.direct_sample) if self.direct_sample else result


def closed_form(scheduler: Any, num_inference_steps: int) -> list[DDIMStep] | None:
    """
    :param scheduler: a diffusers scheduler
    :param num_inference_steps: number of denoising steps
    :return: the steps of a ``DDIMScheduler`` that clips or does not; None for any other
    """
    config, ddim = scheduler.config, scheduler
    if type(scheduler) is not DDIMScheduler or config.thresholding:
        return None
    ddim.set_timesteps(num_inference_steps)
    steps = []
    for timestep in ddim.timesteps.tolist():
        previous = timestep - config.num_train_timesteps // num_inference_steps
        alpha = float(ddim.alphas_cumprod[timestep])
        alpha_previous = float(ddim.alphas_cumprod[previous] if previous >= 0 else ddim.final_alpha_cumprod)
        signal, noise = alpha**0.5, (1 - alpha) ** 0.5
        # x = signal * clean + noise * ε: both from what was predicted, as (times x, times the prediction)
        clean, epsilon = {
            "epsilon": lambda s=signal, n=noise: ((1 / s, -n / s), (0.0, 1.0)),
            "sample": lambda s=signal, n=noise: ((0.0, 1.0), (1 / n, -s / n)),
            "v_prediction": lambda s=signal, n=noise: ((s, -n), (n, s)),
        }[config.prediction_type]()
        direct = (1 - alpha_previous) ** 0.5
        clip = config.clip_sample_range if config.clip_sample else float("inf")
        steps.append(DDIMStep(timestep, *clean, clip, alpha_previous**0.5, direct * epsilon[0], direct * epsilon[1]))
    return steps
