"""Generative models of action chunks: the denoising loss, and sampling over any diffusers scheduler."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch as th
from torch import nn
from torch.jit import optimized_execution  # type: ignore[attr-defined]

from modip_sb3.denoisers import Denoiser
from modip_sb3.schedulers import closed_form, make_schedulers

TRACE_AFTER = 32  # calls; making the trace takes as long as some twenty of them


class _Echo(Denoiser):
    """The denoiser that schedulers are tried with."""

    def embed(self, timesteps: th.Tensor, condition: th.Tensor) -> th.Tensor:
        return timesteps

    def denoise(self, noisy_actions: th.Tensor, embedding: th.Tensor) -> th.Tensor:
        return noisy_actions


class DiffusionModel(nn.Module):
    """
    A denoising diffusion model of action chunks in [-1, 1] (DDPM, arXiv:2006.11239; Diffusion Policy,
    arXiv:2303.04137).

    :param denoiser: predicts noise, velocity or sample from ``(noisy_actions, timesteps, condition)``
    :param chunk_shape: ``(T, A)``
    :param train_scheduler: class name of the diffusers scheduler that adds the noise
    :param sample_scheduler: class name of the diffusers scheduler that removes it
    :param scheduler_kwargs: arguments of both, over ``DEFAULT_SCHEDULER_KWARGS``
    :param num_inference_steps: denoising steps of one sample
    """

    timesteps: th.Tensor

    def __init__(
        self,
        denoiser: Denoiser,
        chunk_shape: tuple[int, int],
        train_scheduler: str = "DDPMScheduler",
        sample_scheduler: str = "DDIMScheduler",
        scheduler_kwargs: dict[str, Any] | None = None,
        num_inference_steps: int = 5,
    ):
        super().__init__()
        self.chunk_shape = chunk_shape
        self.train_scheduler, self.sample_scheduler = make_schedulers(
            (train_scheduler, sample_scheduler), scheduler_kwargs or {}
        )
        num_train_timesteps = self.train_scheduler.config.num_train_timesteps
        if not 1 <= num_inference_steps <= num_train_timesteps:
            raise ValueError(
                f"num_inference_steps={num_inference_steps} is not between 1 and the scheduler's "
                f"num_train_timesteps={num_train_timesteps}."
            )
        self.num_inference_steps = num_inference_steps
        self._num_samples = 0
        self._traces: dict[bool, Callable[[th.Tensor, th.Tensor], th.Tensor]] = {}
        self.denoiser: Denoiser = _Echo()
        self._try_schedulers()
        self.denoiser = denoiser

    def _try_schedulers(self) -> None:
        """Some of diffusers' schedulers are for other data, and settings can be wrong: noise and denoise one chunk."""
        chunk = th.zeros(1, *self.chunk_shape)
        error: Exception | None = None
        with th.random.fork_rng(devices=[]):
            try:
                self.steps = closed_form(self.sample_scheduler, self.num_inference_steps)
                self.register_buffer(
                    "timesteps", th.tensor([step.timestep for step in self.steps or ()]), persistent=False
                )
                loss, _ = self.compute_loss(chunk, chunk, th.ones(chunk.shape[:2]))
                works = bool(loss.isfinite()) and bool(self.sample(chunk).isfinite().all())
            except Exception as reason:  # each scheduler has errors of its own
                works, error = False, reason
        if not works:
            names = [type(scheduler).__name__ for scheduler in (self.train_scheduler, self.sample_scheduler)]
            raise ValueError(
                f"The schedulers {names} with their scheduler_kwargs and "
                f"num_inference_steps={self.num_inference_steps} cannot noise and denoise "
                "chunks of actions; choose others, such as 'DDPMScheduler' and 'DDIMScheduler' without them."
            ) from error

    def compute_loss(
        self, chunks: th.Tensor, condition: th.Tensor, weights: th.Tensor
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        The denoising loss (DDPM, eq. 14), each action of a chunk weighted.

        :param chunks: ``(B, T, A)`` in [-1, 1]
        :param condition: observation features ``(B, C)``
        :param weights: ``(B, T)``, zero for actions after an episode's end
        :return: the loss and its metrics
        """
        scheduler = self.train_scheduler
        noise = th.randn_like(chunks)
        timesteps = th.randint(scheduler.config.num_train_timesteps, (len(chunks),), device=chunks.device)
        noisy_chunks = scheduler.add_noise(chunks, noise, timesteps)
        prediction = self.denoiser(noisy_chunks, timesteps, condition)
        prediction_type = scheduler.config.prediction_type
        if prediction_type == "epsilon":
            target = noise
        elif prediction_type == "sample":
            target = chunks
        else:
            target = scheduler.get_velocity(chunks, noise, timesteps)
        errors = ((prediction - target) ** 2).mean(-1)  # (B, T)
        loss = (weights * errors).sum() / weights.sum().clamp(min=1e-6)
        return loss, {"actor_loss": loss.detach()}

    @th.no_grad()
    def sample(self, condition: th.Tensor, noise: th.Tensor | None = None, temperature: float = 1.0) -> th.Tensor:
        """
        :param condition: observation features ``(B, C)``
        :param noise: where the denoising starts ``(B, T, A)``; None draws it. Given, the result is a function of the
            arguments alone, with a stochastic scheduler too
        :param temperature: scale of the noise where it is drawn
        :return: action chunks in [-1, 1] ``(B, T, A)``
        """
        return self.generate(condition, noise, temperature)

    def generate(self, condition: th.Tensor, noise: th.Tensor | None = None, temperature: float = 1.0) -> th.Tensor:
        """As :meth:`sample`, with the gradient through every denoising step."""
        fixed = noise is not None
        if noise is None:
            noise = temperature * th.randn(len(condition), *self.chunk_shape, device=condition.device)
        with self.denoiser.sampling(len(noise)):
            if self.steps is None:
                chunks = self._sample_by_scheduler(condition, noise, fixed)
            elif self._num_samples < TRACE_AFTER or condition.device.type != "cpu" or th.is_grad_enabled():
                chunks = self._sample_in_closed_form(condition, noise)
            else:
                chunks = self._sample_by_trace(condition, noise)
        self._num_samples += 1
        return chunks.clamp(-1, 1)

    def _sample_in_closed_form(self, condition: th.Tensor, noise: th.Tensor) -> th.Tensor:
        return self.chain(condition, noise)[-1]

    def chain(
        self, condition: th.Tensor, chunks: th.Tensor, first: int = 0, last: int | None = None, std: float = 0.0
    ) -> list[th.Tensor]:
        """
        Some steps of the sampling, one after another, with the gradient; for a ``DDIMScheduler`` alone.

        :param condition: observation features ``(B, C)``
        :param chunks: what the first of them denoises ``(B, T, A)``
        :param first: number of the first step
        :param last: number of the step to stop before, None for the end
        :param std: of Gaussian noise that each step adds to its result
        :return: what the steps begin with, and what each leads to
        """
        assert self.steps is not None
        embeddings = self.denoiser.embed(self.timesteps[first:last, None], condition)  # (K, B, E)
        found = [chunks]
        for step, embedding in zip(self.steps[first:last], embeddings.unbind(), strict=True):
            chunks = step(chunks, self.denoiser.denoise(chunks, embedding))
            if std > 0:
                chunks = chunks + std * th.randn_like(chunks)
            found.append(chunks)
        return found

    def _sample_by_trace(self, condition: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """The same operations on the same parameters, recorded once: without Python between them."""
        single = len(noise) == 1  # for which the denoiser may do other operations
        if single not in self._traces:
            with ThreadPoolExecutor(1) as thread:  # a Ctrl-C in the middle would break every later trace of this thread
                self._traces[single] = thread.submit(self._trace, condition, noise).result()
        with optimized_execution(False):  # else the last bits of the numbers differ
            return self._traces[single](condition, noise)

    @th.no_grad()
    def _trace(self, condition: th.Tensor, noise: th.Tensor) -> Callable[[th.Tensor, th.Tensor], th.Tensor]:
        method = "_sample_in_closed_form"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; torch.compile needs a compiler and minutes
            traced = th.jit.trace_module(self, {method: (condition, noise)}, check_trace=False)
        return getattr(traced, method)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_traces": {}}  # they can be neither copied nor pickled

    def _sample_by_scheduler(self, condition: th.Tensor, noise: th.Tensor, fixed: bool) -> th.Tensor:
        scheduler, extra = self.sample_scheduler, {}
        if fixed and "generator" in inspect.signature(scheduler.step).parameters:
            extra["generator"] = [th.Generator(condition.device).manual_seed(0) for _ in range(len(condition))]
        scheduler.set_timesteps(self.num_inference_steps, device=condition.device)
        embeddings = self.denoiser.embed(scheduler.timesteps[:, None], condition)  # (K, B, E)
        chunks = noise * scheduler.init_noise_sigma
        for timestep, embedding in zip(scheduler.timesteps, embeddings, strict=True):
            prediction = self.denoiser.denoise(scheduler.scale_model_input(chunks, timestep), embedding)
            chunks = scheduler.step(prediction, timestep, chunks, **extra).prev_sample
        return chunks


class GaussianModel(nn.Module):
    """
    A diagonal Gaussian over chunks with the interface of :class:`DiffusionModel`: the ablation's prior.

    :param chunk_shape: ``(T, A)``
    :param condition_dim: number of observation features
    :param net_arch: hidden widths
    """

    def __init__(self, chunk_shape: tuple[int, int], condition_dim: int, net_arch: Sequence[int] = (256, 256, 256)):
        super().__init__()
        self.chunk_shape = chunk_shape
        layers: list[nn.Module] = []
        for width in net_arch:
            layers += [nn.Linear(condition_dim, width), nn.SiLU()]
            condition_dim = width
        self.network = nn.Sequential(*layers, nn.Linear(condition_dim, 2 * chunk_shape[0] * chunk_shape[1]))

    def _distribution(self, condition: th.Tensor) -> th.distributions.Normal:
        mean, log_std = self.network(condition).view(len(condition), 2, *self.chunk_shape).unbind(1)
        return th.distributions.Normal(mean, log_std.clamp(-5, 1).exp())

    def compute_loss(
        self, chunks: th.Tensor, condition: th.Tensor, weights: th.Tensor
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """The weighted negative log-likelihood; parameters as in :meth:`DiffusionModel.compute_loss`."""
        errors = -self._distribution(condition).log_prob(chunks).mean(-1)  # (B, T)
        loss = (weights * errors).sum() / weights.sum().clamp(min=1e-6)
        return loss, {"actor_loss": loss.detach()}

    @th.no_grad()
    def sample(self, condition: th.Tensor, noise: th.Tensor | None = None, temperature: float = 1.0) -> th.Tensor:
        """Chunks at ``mean + std * noise``; parameters as in :meth:`DiffusionModel.sample`."""
        return self.generate(condition, noise, temperature)

    def generate(self, condition: th.Tensor, noise: th.Tensor | None = None, temperature: float = 1.0) -> th.Tensor:
        """As :meth:`sample`, with the gradient."""
        distribution = self._distribution(condition)
        if noise is None:
            noise = temperature * th.randn_like(distribution.mean)
        return (distribution.mean + distribution.stddev * noise).clamp(-1, 1)
