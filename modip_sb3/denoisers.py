"""Networks that take the noise out of action chunks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch as th
from diffusers import UNet1DModel
from diffusers.models.embeddings import Timesteps
from torch import nn


class ShortConv1d(nn.Conv1d):
    """
    A convolution that keeps the length. Of a few positions it can be one dense product, whose matrix holds the kernel
    once for each position: several times as fast on a CPU, where the matrix serves more than one call.
    """

    MAX_LENGTH = 8
    dense = False
    matrix: th.Tensor | None = None  # (C_in * T, C_out * T), while it is dense

    @classmethod
    def of(cls, conv: nn.Conv1d) -> "ShortConv1d":
        """
        :param conv: a convolution without stride, dilation and groups that keeps the length
        :return: the same one, with its parameters
        """
        kernel, padding = conv.kernel_size[0], conv.padding[0]
        short = nn.utils.skip_init(cls, conv.in_channels, conv.out_channels, kernel, padding=padding)
        short.weight, short.bias = conv.weight, conv.bias
        return short

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: ``(B, C_in, T)``
        :return: ``(B, C_out, T)``
        """
        length = inputs.shape[-1]
        if not self.dense or length > self.MAX_LENGTH:
            return super().forward(inputs)
        if self.matrix is None or len(self.matrix) != self.in_channels * length:
            self.matrix = self._make_matrix(length)
        outputs = (inputs.flatten(1) @ self.matrix).unflatten(1, (-1, length))
        return outputs if self.bias is None else outputs.add_(self.bias[:, None])

    def _make_matrix(self, length: int) -> th.Tensor:
        source = _dense_layout(self.out_channels, self.in_channels, self.kernel_size[0], length)
        taps = nn.functional.pad(self.weight.flatten(), (0, 1))  # with a zero at the end
        return taps.index_select(0, source.to(taps.device)).view(self.in_channels * length, -1)


@lru_cache
def _dense_layout(out_channels: int, in_channels: int, kernel_size: int, length: int) -> th.Tensor:
    """Where each entry of :class:`ShortConv1d`'s matrix is among the flat weights, one beyond their end for zeros."""
    position = th.arange(length)
    tap = position[:, None] - position + (kernel_size - 1) // 2  # (position of the input, of the output)
    weights = th.arange(out_channels * in_channels).view(out_channels, in_channels) * kernel_size
    source = weights.T[:, None, :, None] + tap[:, None]  # (C_in, T, C_out, T)
    outside = ((tap < 0) | (tap >= kernel_size))[:, None].expand_as(source)
    return source.masked_fill(outside, out_channels * in_channels * kernel_size).flatten()


def _adapt(module: Any) -> None:
    """
    What diffusers' temporal blocks have built in is slow on a CPU: SiLU, Mish's near twin, takes its place, and
    convolutions become :class:`ShortConv1d`.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Mish):
            setattr(module, name, nn.SiLU())
        elif isinstance(child, nn.Conv1d) and child.stride == (1,) and 2 * child.padding[0] == child.kernel_size[0] - 1:
            setattr(module, name, ShortConv1d.of(child))
        else:
            _adapt(child)


class Denoiser(nn.Module, ABC):
    """
    Predicts the noise, the velocity or the clean actions. What does not depend on the noisy actions is a step of its
    own, :meth:`embed`, so that sampling does it once for all of its steps. Which operations are done may follow from
    shapes, not from values: sampling records them.
    """

    @abstractmethod
    def embed(self, timesteps: th.Tensor, condition: th.Tensor) -> th.Tensor:
        """
        :param timesteps: ``(B,)``, or ``(K, 1)`` for K steps at once
        :param condition: observation features ``(B, C)``
        :return: ``(B, E)``, or ``(K, B, E)``
        """

    @abstractmethod
    def denoise(self, noisy_actions: th.Tensor, embedding: th.Tensor) -> th.Tensor:
        """
        :param noisy_actions: ``(B, T, A)``
        :param embedding: ``(B, E)``
        :return: the scheduler's prediction ``(B, T, A)``
        """

    @contextmanager
    def sampling(self, batch_size: int) -> Iterator[None]:
        """
        Parameters stay as they are within: what follows from them alone may be kept from call to call.

        :param batch_size: of all calls; only between one and more than one may the operations differ
        """
        yield

    def forward(self, noisy_actions: th.Tensor, timesteps: th.Tensor, condition: th.Tensor) -> th.Tensor:
        """
        :param noisy_actions: ``(B, T, A)``
        :param timesteps: ``(B,)``
        :param condition: observation features ``(B, C)``
        :return: the scheduler's prediction ``(B, T, A)``
        """
        return self.denoise(noisy_actions, self.embed(timesteps, condition))


class UNetDenoiser(Denoiser):
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
        _adapt(self.unet)
        self.condition_embedding = nn.Linear(condition_dim, channels[0])
        self.condition_channels = nn.Linear(condition_dim, channels[0])

    @contextmanager
    def sampling(self, batch_size: int) -> Iterator[None]:
        convolutions = [module for module in self.unet.modules() if isinstance(module, ShortConv1d)]
        for convolution in convolutions:
            convolution.dense = batch_size > 1  # for a single chunk the matrix takes longer to make than it saves
        try:
            yield
        finally:
            for convolution in convolutions:
                convolution.dense, convolution.matrix = False, None

    def embed(self, timesteps: th.Tensor, condition: th.Tensor) -> th.Tensor:
        unet = self.unet
        time = unet.time_mlp(unet.time_proj(timesteps.flatten())).view(*timesteps.shape, -1)
        embedding = time + self.condition_embedding(condition)
        channels = self.condition_channels(condition).expand(*embedding.shape[:-1], -1)
        return th.cat([embedding, channels], dim=-1)

    def denoise(self, noisy_actions: th.Tensor, embedding: th.Tensor) -> th.Tensor:
        length = noisy_actions.shape[1]
        sample = nn.functional.pad(noisy_actions.transpose(1, 2), (0, -length % self.length_multiple))  # (B, A, T')
        unet = self.unet
        embedding, channels = embedding.chunk(2, dim=-1)
        sample = th.cat([sample, channels[..., None].expand(-1, -1, sample.shape[-1])], dim=1)
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
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, width)
        self.activation = nn.SiLU()

    def forward(self, inputs: th.Tensor, shift: th.Tensor) -> th.Tensor:
        """
        :param inputs: ``(B, width)``
        :param shift: what the embedding adds to the first layer ``(B, width)``
        :return: ``(B, width)``
        """
        hidden = th.addmm(shift, self.norm(inputs), self.first.weight.T)
        return inputs + self.second(self.activation(hidden))


class MLPDenoiser(Denoiser):
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
        self.input = nn.Linear(chunk_dim, width, bias=False)
        self.embedding = nn.Linear(embedding_dim, width * (1 + len(net_arch)))  # for the input and for each block
        self.blocks: Any = nn.ModuleList([ResidualBlock(width) for _ in net_arch])
        self.output = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, chunk_dim))

    def embed(self, timesteps: th.Tensor, condition: th.Tensor) -> th.Tensor:
        time = self.time_embedding(timesteps.flatten()).view(*timesteps.shape, -1)
        of_time, of_condition = self.embedding.weight.split([time.shape[-1], condition.shape[-1]], dim=1)
        linear = nn.functional.linear
        return linear(time, of_time) + linear(condition, of_condition, self.embedding.bias)

    def denoise(self, noisy_actions: th.Tensor, embedding: th.Tensor) -> th.Tensor:
        first, *shifts = embedding.chunk(1 + len(self.blocks), dim=-1)
        hidden = th.addmm(first, noisy_actions.flatten(1), self.input.weight.T)
        for block, shift in zip(self.blocks, shifts, strict=True):
            hidden = block(hidden, shift)
        return self.output(hidden).view_as(noisy_actions)
