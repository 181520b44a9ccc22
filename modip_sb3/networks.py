"""Building blocks shared by the world model and the critics (the TD-MPC2 family, arXiv:2310.16828)."""

from collections.abc import Sequence
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call


class SimNorm(nn.Module):
    """
    Simplicial normalisation: a softmax over each group of ``group_size`` features (TD-MPC2, eq. 5).

    :param group_size: features per simplex; the input's last dimension must be a multiple of it
    """

    def __init__(self, group_size: int = 8):
        super().__init__()
        self.group_size = group_size

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        # Groups as columns: over a short last dimension PyTorch's softmax takes five times as long on a CPU
        columns = inputs.reshape(-1, self.group_size).T.contiguous()
        return F.softmax(columns, dim=0).T.reshape(inputs.shape)


class _FastMish(th.autograd.Function):
    """Mish from one exponential, that of σ = sigmoid(x): tanh(softplus(x)) = t / (2 - t) with t = σ (2 - σ)."""

    @staticmethod
    def forward(ctx: Any, inputs: th.Tensor) -> th.Tensor:
        sigmoid = th.sigmoid(inputs)
        tanh = th.rsub(sigmoid, 2).mul_(sigmoid)
        tanh.div_(th.rsub(tanh, 2))
        ctx.save_for_backward(inputs, tanh)
        return inputs * tanh

    @staticmethod
    def backward(ctx: Any, *gradients: th.Tensor) -> th.Tensor:
        inputs, tanh = ctx.saved_tensors
        slope = th.sigmoid(inputs).mul_(inputs)  # of x tanh(softplus(x)): tanh + x σ (1 - tanh²)
        return slope.addcmul_(slope, tanh * tanh, value=-1).add_(tanh).mul_(gradients[0])


class Mish(nn.Module):
    """Mish, x tanh(softplus(x)) (Misra, arXiv:1908.08681); on a CPU in a third of the time of PyTorch's."""

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        return _FastMish.apply(inputs) if inputs.device.type == "cpu" else F.mish(inputs)


def mlp(
    input_dim: int,
    net_arch: Sequence[int],
    output_dim: int,
    output_layer: nn.Module | None = None,
    activation: type[nn.Module] = nn.SiLU,
) -> nn.Sequential:
    """
    Linear, LayerNorm and an activation per hidden layer, then a linear output.

    :param input_dim: number of input features
    :param net_arch: widths of the hidden layers; may be empty
    :param output_dim: number of output features
    :param output_layer: applied to the linear output, a normalisation for example
    :param activation: class of the activation
    :return: the network
    """
    layers: list[nn.Module] = []
    for width in net_arch:
        layers += [nn.Linear(input_dim, width), nn.LayerNorm(width), activation()]
        input_dim = width
    layers.append(nn.Linear(input_dim, output_dim))
    if output_layer is not None:
        layers.append(output_layer)
    return nn.Sequential(*layers)


def zero_init(layer: nn.Module) -> None:
    """
    :param layer: its parameters become zero, so that a two-hot head starts by predicting zero
    """
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class EnsembleLinear(nn.Module):
    """
    ``num_members`` linear layers as one batched product.

    :param num_members: number of independent layers
    :param input_dim: number of input features
    :param output_dim: number of output features
    """

    def __init__(self, num_members: int, input_dim: int, output_dim: int):
        super().__init__()
        members = [nn.Linear(input_dim, output_dim) for _ in range(num_members)]
        self.weight = nn.Parameter(th.stack([member.weight.detach().T for member in members]))  # (E, in, out)
        self.bias = nn.Parameter(th.stack([member.bias.detach() for member in members])[:, None])  # (E, 1, out)

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        return th.baddbmm(self.bias, inputs, self.weight)  # (E, N, out)


def init_truncated_normal(module: nn.Module) -> None:
    """
    TD-MPC2's initialisation, for :meth:`torch.nn.Module.apply`.

    :param module: if it is a linear layer, its weights become truncated normal with std 0.02, and its biases zero
    """
    if isinstance(module, nn.Linear | EnsembleLinear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class EnsembleLayerNorm(nn.Module):
    """
    LayerNorm with an affine transform of its own for each of ``num_members`` members.

    :param num_members: number of members
    :param width: number of features
    """

    def __init__(self, num_members: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(th.ones(num_members, 1, width))
        self.bias = nn.Parameter(th.zeros(num_members, 1, width))

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        # Member by member, which the fused kernel allows: twice as fast on a CPU as all of them and then the transform
        members = zip(inputs, self.weight.squeeze(1), self.bias.squeeze(1), strict=True)
        return th.stack([F.layer_norm(x, x.shape[-1:], weight, bias) for x, weight, bias in members])


class EnsembleMLP(nn.Module):
    """
    An ensemble of :func:`mlp` networks evaluated together.

    :param num_members: number of independent networks
    :param input_dim: number of input features
    :param net_arch: widths of the hidden layers; may be empty
    :param output_dim: number of output features
    :param activation: class of the activation
    :param dropout: probability of dropping a feature of the first layer, before its LayerNorm
    """

    def __init__(
        self,
        num_members: int,
        input_dim: int,
        net_arch: Sequence[int],
        output_dim: int,
        activation: type[nn.Module] = nn.SiLU,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.num_members = num_members
        layers: list[nn.Module] = []
        for width in net_arch:
            layers.append(EnsembleLinear(num_members, input_dim, width))
            if dropout > 0 and len(layers) == 1:
                layers.append(nn.Dropout(dropout))
            layers += [EnsembleLayerNorm(num_members, width), activation()]
            input_dim = width
        layers.append(EnsembleLinear(num_members, input_dim, output_dim))
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: th.Tensor, members: th.Tensor | None = None) -> th.Tensor:
        """
        :param inputs: features of any leading shape ``(..., in)``
        :param members: indices of the networks to evaluate ``(E,)``; None for all
        :return: outputs ``(E, ..., out)``
        """
        num_members = self.num_members if members is None else len(members)
        flat = inputs.flatten(0, -2).expand(num_members, -1, -1)  # (E, N, in)
        if members is None:
            outputs = self.layers(flat)
        else:
            chosen = {name: parameter[members] for name, parameter in self.layers.named_parameters()}
            outputs = functional_call(self.layers, chosen, flat)
        return outputs.unflatten(1, inputs.shape[:-1])


class TwoHot(nn.Module):
    """
    Scalars as a distribution over equally spaced bins on a symlog axis (DreamerV3, arXiv:2301.04104; TD-MPC2).

    :param num_bins: number of bins
    :param low: symlog of the smallest scalar that can be represented
    :param high: symlog of the largest scalar that can be represented
    """

    bins: th.Tensor

    def __init__(self, num_bins: int = 101, low: float = -10.0, high: float = 10.0):
        super().__init__()
        self.num_bins, self.low, self.high = num_bins, low, high
        self.register_buffer("bins", th.linspace(low, high, num_bins), persistent=False)

    def decode(self, logits: th.Tensor) -> th.Tensor:
        """
        :param logits: ``(..., num_bins)``
        :return: the expected scalar ``(...)``
        """
        # Not a matrix product: its rounding depends on a row's place in the batch, and would break ties of equal rows
        symlog = (F.softmax(logits, dim=-1) * self.bins).sum(-1)
        return symlog.sign() * th.expm1(symlog.abs())

    def cross_entropy(self, logits: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """
        :param logits: ``(..., num_bins)``
        :param targets: scalars, of a shape that broadcasts to the logits' leading one
        :return: cross-entropy between the two-hot target and the prediction ``(...)``
        """
        symlog = (targets.sign() * th.log1p(targets.abs())).clamp(self.low, self.high)
        position = (symlog - self.low) * (self.num_bins - 1) / (self.high - self.low)
        position = position.expand(logits.shape[:-1])[..., None]
        lower = position.floor().clamp(max=self.num_bins - 2)
        log_probs = F.log_softmax(logits, dim=-1)
        index = lower.nan_to_num(nan=0.0).long()  # a target that is NaN gives NaN, not an index out of range
        low_log_prob, high_log_prob = log_probs.gather(-1, index), log_probs.gather(-1, index + 1)
        upper_weight = position - lower
        return -((1 - upper_weight) * low_log_prob + upper_weight * high_log_prob).squeeze(-1)


class RunningNormalizer(nn.Module):
    """
    Standardises features by the mean and variance of all the data seen so far (parallel variance, Chan et al.).

    :param num_features: number of features
    :param clip: normalised values are clipped to ``[-clip, clip]``
    """

    mean: th.Tensor
    var: th.Tensor
    count: th.Tensor

    def __init__(self, num_features: int, clip: float = 10.0):
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", th.zeros(num_features))
        self.register_buffer("var", th.ones(num_features))
        self.register_buffer("count", th.zeros(1))

    @th.no_grad()
    def update(self, features: th.Tensor) -> None:
        """
        :param features: new data ``(N, num_features)``
        """
        batch_count = features.shape[0]
        batch_var, batch_mean = th.var_mean(features, dim=0, correction=0)
        total = self.count + batch_count
        delta = batch_mean - self.mean
        moment = self.var * self.count + batch_var * batch_count + delta**2 * self.count * batch_count / total
        self.mean += delta * batch_count / total
        self.var.copy_(moment / total)
        self.count.copy_(total)

    def forward(self, features: th.Tensor) -> th.Tensor:
        return ((features - self.mean) / th.sqrt(self.var + 1e-6)).clamp(-self.clip, self.clip)
