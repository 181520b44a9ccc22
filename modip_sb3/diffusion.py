"""Generative models of action chunks: denoisers, the denoising loss, and sampling over any diffusers scheduler."""

import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
import torch as th
from diffusers import SchedulerMixin, UNet1DModel
from diffusers.models.embeddings import Timesteps
from torch import nn

from modip_sb3.checks import check_count, check_keywords

DEFAULT_SCHEDULER_KWARGS: dict[str, Any] = {
    "num_train_timesteps": 20,
    "beta_schedule": "squaredcos_cap_v2",
    "timestep_spacing": "trailing",  # sampling starts at the last timestep, where training has seen pure noise
}


def _replace_mish(module: Any) -> None:
    """diffusers' temporal blocks have Mish built in; SiLU, its near twin, is several times faster on a CPU."""
    for name, child in module.named_children():
        if isinstance(child, nn.Mish):
            setattr(module, name, nn.SiLU())
        else:
            _replace_mish(child)


class UNetDenoiser(nn.Module):
    """
    diffusers' ``UNet1DModel`` with residual temporal blocks, conditioned on the observation: a projection of it is
    added to the time embedding and another is given as extra input channels.

    :param action_dim: number of action dimensions, the channels
    :param condition_dim: number of observation features
    :param net_arch: channels of each resolution, rounded up to multiples of 8 (the group norm's groups)
    """

    def __init__(self, action_dim: int, condition_dim: int, net_arch: Sequence[int] = (32, 64)):
        super().__init__()
        channels = tuple(8 * ((width + 7) // 8) for width in net_arch) or (8,)
        self.length_multiple = 2 ** (len(channels) - 1)
        self.unet: Any = UNet1DModel(
            in_channels=action_dim,
            out_channels=action_dim,
            extra_in_channels=channels[0],
            time_embedding_type="positional",
            use_timestep_embedding=True,
            act_fn="silu",
            block_out_channels=channels,
            down_block_types=("DownResnetBlock1D",) * len(channels),
            mid_block_type="MidResTemporalBlock1D",
            up_block_types=("UpResnetBlock1D",) * len(channels),
            out_block_type="OutConv1DBlock",
        )
        _replace_mish(self.unet)
        self.condition_embedding = nn.Linear(condition_dim, channels[0])
        self.condition_channels = nn.Linear(condition_dim, channels[0])

    def forward(self, noisy_actions: th.Tensor, timesteps: th.Tensor, condition: th.Tensor) -> th.Tensor:
        """
        :param noisy_actions: ``(B, T, A)``
        :param timesteps: ``(B,)``
        :param condition: observation features ``(B, C)``
        :return: the scheduler's prediction ``(B, T, A)``
        """
        length = noisy_actions.shape[1]
        sample = nn.functional.pad(noisy_actions.transpose(1, 2), (0, -length % self.length_multiple))  # (B, A, T')
        unet = self.unet
        embedding = unet.time_mlp(unet.time_proj(timesteps)) + self.condition_embedding(condition)
        channels = self.condition_channels(condition)[..., None].expand(-1, -1, sample.shape[-1])
        sample = th.cat([sample, channels], dim=1)
        skips = []
        for down_block in unet.down_blocks:
            sample, skip = down_block(hidden_states=sample, temb=embedding)
            skips.append(skip)
        sample = unet.mid_block(sample, embedding)
        for up_block in unet.up_blocks:
            sample = up_block(sample, res_hidden_states_tuple=skips.pop(), temb=embedding)
        return unet.out_block(sample, embedding)[..., :length].transpose(1, 2)


class ResidualBlock(nn.Module):
    """
    Two linear layers around a skip connection, modulated by an embedding.

    :param width: number of features
    :param embedding_dim: size of the embedding
    """

    def __init__(self, width: int, embedding_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.embedding = nn.Linear(embedding_dim, width)
        self.second = nn.Linear(width, width)
        self.activation = nn.SiLU()

    def forward(self, inputs: th.Tensor, embedding: th.Tensor) -> th.Tensor:
        hidden = self.first(self.norm(inputs)) + self.embedding(embedding)
        return inputs + self.second(self.activation(hidden))


class MLPDenoiser(nn.Module):
    """
    A residual MLP on the flattened chunk: the cheap denoiser for low-dimensional observations (DPPO's choice).

    :param chunk_shape: ``(T, A)``
    :param condition_dim: number of observation features
    :param net_arch: widths of the residual blocks, all the same; may be empty
    :param time_embedding_dim: size of the sinusoidal time embedding
    """

    def __init__(
        self,
        chunk_shape: tuple[int, int],
        condition_dim: int,
        net_arch: Sequence[int] = (256, 256, 256),
        time_embedding_dim: int = 32,
    ):
        super().__init__()
        if len(set(net_arch)) > 1:
            raise ValueError(f"The residual MLP denoiser needs equal widths, but got net_arch={list(net_arch)}.")
        chunk_dim = chunk_shape[0] * chunk_shape[1]
        width = net_arch[0] if net_arch else chunk_dim
        embedding_dim = time_embedding_dim + condition_dim
        self.time_embedding = Timesteps(time_embedding_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.input = nn.Linear(chunk_dim + embedding_dim, width)
        self.blocks = nn.ModuleList([ResidualBlock(width, embedding_dim) for _ in net_arch])
        self.output = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, chunk_dim))

    def forward(self, noisy_actions: th.Tensor, timesteps: th.Tensor, condition: th.Tensor) -> th.Tensor:
        """
        :param noisy_actions: ``(B, T, A)``
        :param timesteps: ``(B,)``
        :param condition: observation features ``(B, C)``
        :return: the scheduler's prediction ``(B, T, A)``
        """
        embedding = th.cat([self.time_embedding(timesteps), condition], dim=-1)
        hidden = self.input(th.cat([noisy_actions.flatten(1), embedding], dim=-1))
        for block in self.blocks:
            hidden = block(hidden, embedding)
        return self.output(hidden).view_as(noisy_actions)


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


class _Zeros(nn.Module):
    """The denoiser that schedulers are tried with."""

    def forward(self, noisy_actions: th.Tensor, timesteps: th.Tensor, condition: th.Tensor) -> th.Tensor:
        return th.zeros_like(noisy_actions)


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

    def __init__(
        self,
        denoiser: nn.Module,
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
        self.denoiser: nn.Module = _Zeros()
        self._try_schedulers()
        self.denoiser = denoiser

    def _try_schedulers(self) -> None:
        """Some of diffusers' schedulers are for other data, and settings can be wrong: noise and denoise one chunk."""
        chunk = th.zeros(1, *self.chunk_shape)
        error: Exception | None = None
        with th.random.fork_rng(devices=[]):
            try:
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
    def sample(self, condition: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor:
        """
        :param condition: observation features ``(B, C)``
        :param noise: where the denoising starts ``(B, T, A)``; None draws it. Given, the result is a function of the
            arguments alone, with a stochastic scheduler too
        :return: action chunks in [-1, 1] ``(B, T, A)``
        """
        generators = None
        if noise is None:
            noise = th.randn(len(condition), *self.chunk_shape, device=condition.device)
        elif "generator" in inspect.signature(self.sample_scheduler.step).parameters:
            generators = [th.Generator(condition.device).manual_seed(0) for _ in range(len(condition))]
        scheduler = self.sample_scheduler
        scheduler.set_timesteps(self.num_inference_steps, device=condition.device)
        extra = {} if generators is None else {"generator": generators}
        chunks = noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            model_input = scheduler.scale_model_input(chunks, timestep)
            prediction = self.denoiser(model_input, timestep.expand(len(chunks)), condition)
            chunks = scheduler.step(prediction, timestep, chunks, **extra).prev_sample
        return chunks.clamp(-1, 1)


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
    def sample(self, condition: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor:
        """Chunks at ``mean + std * noise``; parameters as in :meth:`DiffusionModel.sample`."""
        distribution = self._distribution(condition)
        if noise is None:
            noise = th.randn_like(distribution.mean)
        return (distribution.mean + distribution.stddev * noise).clamp(-1, 1)
