"""The building blocks against numbers worked out by other means."""

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F

from modip_sb3.networks import EnsembleMLP, Mish, RunningNormalizer, SimNorm, TwoHot, mlp


@pytest.mark.parametrize("shape", [(8,), (5, 16), (2, 3, 24)])
def test_simnorm_groups_are_simplices(shape: tuple[int, ...]) -> None:
    inputs = 5 * th.randn(shape)
    outputs = SimNorm(8)(inputs)
    assert outputs.shape == shape and (outputs >= 0).all()
    th.testing.assert_close(outputs.unflatten(-1, (-1, 8)).sum(-1), th.ones(*shape[:-1], shape[-1] // 8))
    th.testing.assert_close(outputs[..., :8], F.softmax(inputs[..., :8], dim=-1))


def two_hot_logits(two_hot: TwoHot, symlog: float) -> th.Tensor:
    """Logarithms of a two-hot distribution built bin by bin."""
    probs = th.zeros(two_hot.num_bins)
    width = (two_hot.high - two_hot.low) / (two_hot.num_bins - 1)
    for index in range(two_hot.num_bins):
        distance = abs(symlog - (two_hot.low + index * width)) / width
        probs[index] = max(0.0, 1.0 - distance)
    return probs.clamp(min=1e-30).log()


@pytest.mark.parametrize("value", [-20000.0, -37.5, -1.0, -0.3, 0.0, 1e-3, 0.3, 1.0, 250.0, 20000.0])
def test_two_hot_round_trip(value: float) -> None:
    two_hot = TwoHot()
    logits = two_hot_logits(two_hot, float(np.sign(value) * np.log1p(abs(value))))
    assert two_hot.decode(logits).item() == pytest.approx(value, rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("value, symlog", [(1e9, 10.0), (-1e9, -10.0), (float(np.expm1(10.0)), 10.0)])
def test_two_hot_clips_what_it_cannot_represent(value: float, symlog: float) -> None:
    two_hot = TwoHot()
    logits = th.randn(two_hot.num_bins)
    expected = -F.log_softmax(logits, dim=-1)[0 if symlog < 0 else -1]
    th.testing.assert_close(two_hot.cross_entropy(logits, th.tensor(value)), expected, rtol=1e-3, atol=1e-3)


def test_two_hot_cross_entropy_by_hand() -> None:
    two_hot = TwoHot(num_bins=3, low=-1.0, high=1.0)  # bins at symlog -1, 0 and 1
    logits = th.tensor([0.2, 0.5, 0.3]).log()
    value = th.tensor([np.expm1(0.25), -np.expm1(0.4), 0.0])
    expected = [
        -(0.75 * np.log(0.5) + 0.25 * np.log(0.3)),
        -(0.4 * np.log(0.2) + 0.6 * np.log(0.5)),
        -np.log(0.5),
    ]
    np.testing.assert_allclose(two_hot.cross_entropy(logits.expand(3, 3), value), expected, rtol=1e-5)


def test_two_hot_targets_broadcast_over_an_ensemble() -> None:
    two_hot = TwoHot()
    logits, targets = th.randn(3, 4, two_hot.num_bins), th.randn(4)
    each = th.stack([two_hot.cross_entropy(member, targets) for member in logits])
    th.testing.assert_close(two_hot.cross_entropy(logits, targets), each)


def test_two_hot_cross_entropy_is_minimal_at_the_target() -> None:
    two_hot = TwoHot()
    targets = th.tensor([-80.0, -0.5, 0.0, 2.0, 300.0])
    logits = th.zeros(len(targets), two_hot.num_bins, requires_grad=True)
    optimizer = th.optim.Adam([logits], lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        two_hot.cross_entropy(logits, targets).sum().backward()
        optimizer.step()
    th.testing.assert_close(two_hot.decode(logits.detach()), targets, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("net_arch", [[], [6], [6, 5]])
@pytest.mark.parametrize("leading", [(7,), (2, 3), (1,)])
def test_ensemble_members_are_separate_networks(net_arch: list[int], leading: tuple[int, ...]) -> None:
    ensemble = EnsembleMLP(3, 4, net_arch, 2)
    for parameter in ensemble.parameters():  # the layer norms too start from something else than one and zero
        th.nn.init.normal_(parameter)
    inputs = th.randn(*leading, 4)
    outputs = ensemble(inputs)
    assert outputs.shape == (3, *leading, 2)
    for index in range(3):
        member = mlp(4, net_arch, 2)
        for single, layer in zip(member, ensemble.layers, strict=True):
            if not isinstance(single, th.nn.SiLU):
                weight, bias = layer.weight[index], layer.bias[index, 0]
                single.weight.data = weight.T if isinstance(single, th.nn.Linear) else weight[0]
                single.bias.data = bias
        th.testing.assert_close(outputs[index], member(inputs), rtol=1e-4, atol=1e-5)


def test_ensemble_members_start_different() -> None:
    outputs = EnsembleMLP(2, 4, [8], 1)(th.randn(5, 4))
    assert (outputs[0] - outputs[1]).abs().min() > 1e-4


def test_running_normalizer_sees_all_batches_as_one() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.normal([3.0, -100.0, 0.0], [2.0, 0.1, 1.0], (size, 3)) for size in (5, 1, 300, 64)]
    normalizer = RunningNormalizer(3)
    th.testing.assert_close(normalizer(th.ones(3)), th.ones(3), rtol=1e-5, atol=1e-5)  # nothing seen, nothing done
    for count, batch in enumerate(batches, 1):
        normalizer.update(th.as_tensor(batch, dtype=th.float32))
        seen = np.concatenate(batches[:count])
        np.testing.assert_allclose(normalizer.mean, seen.mean(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(normalizer.var, seen.var(0), rtol=1e-2, atol=1e-4)
    features = th.tensor([[3.0, -100.0, 1e6]])
    expected = ((features.numpy() - seen.mean(0)) / seen.std(0)).clip(-10, 10)
    np.testing.assert_allclose(normalizer(features), expected, rtol=1e-2, atol=1e-2)


def test_mish_is_pytorchs_with_its_gradient() -> None:
    inputs = th.cat([th.linspace(-100, 100, 4001), th.linspace(-3, 3, 4001), th.tensor([-1e30, 0.0, 1e30])])
    ours, theirs = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    outputs, expected = Mish()(ours), F.mish(theirs)
    weights = th.randn(len(inputs), generator=th.Generator().manual_seed(0))
    (outputs * weights).sum().backward()
    (expected * weights).sum().backward()
    th.testing.assert_close(outputs, expected, rtol=1e-6, atol=1e-6)
    th.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
