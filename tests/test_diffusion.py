"""The generative models: against plain diffusers, by hand, and on a distribution with two modes."""

import functools
import pickle
import signal
from copy import deepcopy
from typing import Any, Literal

import diffusers
import numpy as np
import pytest
import torch as th
from torch import nn

from modip_sb3 import diffusion
from modip_sb3.denoisers import Denoiser, MLPDenoiser, ShortConv1d, UNetDenoiser
from modip_sb3.diffusion import DiffusionModel, GaussianModel
from modip_sb3.schedulers import closed_form

Kind = Literal["mlp", "unet"]
SCHEDULERS = ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"]
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
both_kinds = pytest.mark.parametrize("kind", ["mlp", "unet"])


def make_denoiser(kind: Kind, chunk_shape: tuple[int, int], condition_dim: int) -> Denoiser:
    if kind == "unet":
        return UNetDenoiser(chunk_shape[1], condition_dim, [16])
    return MLPDenoiser(chunk_shape, condition_dim, [64, 64])


def make_model(kind: Kind, chunk_shape: tuple[int, int] = (3, 2), **kwargs: Any) -> DiffusionModel:
    th.manual_seed(0)
    return DiffusionModel(make_denoiser(kind, chunk_shape, 4), chunk_shape, **kwargs)


class Half(Denoiser):
    """Predicts half of each noisy action, looking at no other."""

    def embed(self, timesteps: th.Tensor, condition: th.Tensor) -> th.Tensor:
        return timesteps

    def denoise(self, noisy_actions: th.Tensor, embedding: th.Tensor) -> th.Tensor:
        return 0.5 * noisy_actions


# ---------------------------------------------------------------- denoisers


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("net_arch", [[], [8], [8, 16], [8, 16, 20]], ids=lambda widths: f"{len(widths)}levels")
def test_unet_keeps_the_shape(length: int, net_arch: list[int]) -> None:
    chunks = th.randn(5, length, 3)
    outputs = UNetDenoiser(3, 4, net_arch)(chunks, th.arange(5), th.randn(5, 4))
    assert outputs.shape == chunks.shape and outputs.isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("net_arch", [[], [16], [16, 16]])
def test_mlp_keeps_the_shape(length: int, net_arch: list[int]) -> None:
    chunks = th.randn(5, length, 3)
    outputs = MLPDenoiser((length, 3), 4, net_arch)(chunks, th.arange(5), th.randn(5, 4))
    assert outputs.shape == chunks.shape and outputs.isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 9])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_a_short_convolution_is_a_convolution(length: int, kernel_size: int, bias: bool) -> None:
    conv = nn.Conv1d(6, 5, kernel_size, padding=(kernel_size - 1) // 2, bias=bias)
    short, inputs = ShortConv1d.of(conv), th.randn(3, 6, length)
    th.testing.assert_close(short(inputs), conv(inputs))
    short.dense = True
    with th.no_grad():
        for part in (inputs, inputs[..., :1], inputs):  # another length needs another matrix
            th.testing.assert_close(short(part), conv(part), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("net_arch", [[16], [16, 24]], ids=str)
def test_while_sampling_the_unet_is_the_same_network(net_arch: list[int]) -> None:
    denoiser = UNetDenoiser(2, 4, net_arch)
    arguments = th.randn(6, 5, 2), th.arange(6), th.randn(6, 4)
    with th.no_grad():
        expected = denoiser(*arguments)
        with denoiser.sampling(6):
            th.testing.assert_close(denoiser(*arguments), expected, rtol=1e-4, atol=1e-5)
        for parameter in denoiser.parameters():
            parameter.add_(0.01)  # which a matrix that is kept would not know
        changed = denoiser(*arguments)
        assert not th.allclose(changed, expected)
        with denoiser.sampling(6):
            th.testing.assert_close(denoiser(*arguments), changed, rtol=1e-4, atol=1e-5)


def test_mlp_needs_equal_widths() -> None:
    with pytest.raises(ValueError, match=r"equal widths, but got net_arch=\[16, 32\]"):
        MLPDenoiser((4, 1), 3, [16, 32])


@both_kinds
@th.no_grad()
def test_denoisers_look_at_time_condition_and_every_action(kind: Kind) -> None:
    th.manual_seed(0)
    denoiser = make_denoiser(kind, (3, 2), 4)
    chunks, timesteps, condition = th.randn(5, 3, 2), th.arange(5), th.randn(5, 4)
    outputs = denoiser(chunks, timesteps, condition)
    assert (denoiser(chunks, timesteps + 7, condition) != outputs).flatten(1).any(1).all()
    assert (denoiser(chunks, timesteps, condition + 1) != outputs).flatten(1).any(1).all()
    changed = chunks.clone()
    changed[:, 2, 1] += 1.0
    assert (denoiser(changed, timesteps, condition)[:, 0, 0] != outputs[:, 0, 0]).all()
    alone = th.cat([denoiser(chunks[i : i + 1], timesteps[i : i + 1], condition[i : i + 1]) for i in range(5)])
    th.testing.assert_close(alone, outputs, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- loss


@both_kinds
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_is_that_of_plain_diffusers(kind: Kind, prediction_type: str) -> None:
    model = make_model(kind, scheduler_kwargs={"prediction_type": prediction_type, "num_train_timesteps": 30})
    chunks, condition, weights = 2 * th.rand(6, 3, 2) - 1, th.randn(6, 4), th.rand(6, 3)
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=30, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type
    )
    th.manual_seed(1)
    noise, timesteps = th.randn(6, 3, 2), th.randint(30, (6,))
    prediction = model.denoiser(scheduler.add_noise(chunks, noise, timesteps), timesteps, condition)
    velocity = scheduler.get_velocity(chunks, noise, timesteps)
    target = {"epsilon": noise, "sample": chunks, "v_prediction": velocity}[prediction_type]
    errors = (prediction - target).square()
    expected = sum(weights[b, t] * errors[b, t].mean() for b in range(6) for t in range(3)) / weights.sum()

    th.manual_seed(1)
    loss, metrics = model.compute_loss(chunks, condition, weights)
    th.testing.assert_close(loss, expected)
    th.testing.assert_close(metrics["actor_loss"], expected.detach())


def test_actions_after_the_end_cost_nothing() -> None:
    model = DiffusionModel(Half(), (3, 2))
    chunks, condition, weights = 2 * th.rand(4, 3, 2) - 1, th.zeros(4, 1), th.ones(4, 3)
    weights[1, 1:] = weights[2, 2:] = 0.0
    losses = []
    for padding in (0.0, 100.0):
        chunks[1, 1:] = chunks[2, 2:] = padding
        th.manual_seed(0)
        losses.append(model.compute_loss(chunks, condition, weights)[0])
    assert losses[0] == losses[1] > 0
    assert model.compute_loss(chunks, condition, th.zeros(4, 3))[0] == 0


def test_gaussian_loss_by_hand() -> None:
    """At mean 0.3 and standard deviation 0.5 the actions 0.3 and 0.8 are 0 and 1 deviations away."""
    model = GaussianModel((2, 1), 4, [8])
    nn.init.zeros_(model.network[-1].weight)
    model.network[-1].bias.data = th.tensor([0.3, 0.3, np.log(0.5), np.log(0.5)], dtype=th.float32)
    at_mean = np.log(0.5) + 0.5 * np.log(2 * np.pi)
    chunks = th.tensor([[[0.3], [0.8]]])
    loss, _ = model.compute_loss(chunks, th.randn(1, 4), th.tensor([[1.0, 0.5]]))
    assert loss.item() == pytest.approx((at_mean + 0.5 * (at_mean + 0.5)) / 1.5, rel=1e-5)
    noise = th.tensor([[[0.4], [9.0]]])
    th.testing.assert_close(model.sample(th.randn(1, 4), noise), th.tensor([[[0.5], [1.0]]]))


# ---------------------------------------------------------------- sampling


@both_kinds
@pytest.mark.parametrize("name", [*SCHEDULERS, "EulerDiscreteScheduler"])
@pytest.mark.parametrize("num_inference_steps", [1, 5, 12])
def test_sampling_is_a_plain_diffusers_loop(kind: Kind, name: str, num_inference_steps: int) -> None:
    model = make_model(kind, sample_scheduler=name, num_inference_steps=num_inference_steps)
    condition = th.randn(6, 4)
    scheduler = getattr(diffusers, name).from_config(model.sample_scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    th.manual_seed(1)
    chunks = th.randn(6, 3, 2) * scheduler.init_noise_sigma
    with th.no_grad():
        for timestep in scheduler.timesteps:
            noise = model.denoiser(scheduler.scale_model_input(chunks, timestep), timestep.repeat(6), condition)
            chunks = scheduler.step(noise, timestep, chunks).prev_sample
    th.manual_seed(1)
    th.testing.assert_close(model.sample(condition), chunks.clamp(-1, 1))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_sample": False},
        {"clip_sample_range": 0.3},
        {"set_alpha_to_one": False},
        {"timestep_spacing": "leading"},
    ],
    ids=str,
)
def test_ddim_in_closed_form_is_its_scheduler(prediction_type: str, settings: dict[str, Any]) -> None:
    config = {"num_train_timesteps": 20, "beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type}
    scheduler: Any = diffusers.DDIMScheduler(**config, **settings)
    steps = closed_form(scheduler, 7)
    assert steps is not None
    theirs = ours = th.randn(5, 3, 2, generator=th.Generator().manual_seed(0))
    scheduler.set_timesteps(7)
    for step, timestep in zip(steps, scheduler.timesteps, strict=True):
        theirs = scheduler.step(th.sin(3 * theirs), timestep, theirs).prev_sample
        ours = step(ours, th.sin(3 * ours))
        th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@both_kinds
def test_the_trace_that_takes_over_gives_the_same_numbers(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(kind)
    batches = [(th.randn(size, 4), th.randn(size, 3, 2)) for size in (2, 1, 5, 1)]
    for _ in range(2):  # the second time with other parameters
        monkeypatch.setattr(diffusion, "TRACE_AFTER", 1_000)
        expected = [model.sample(*batch) for batch in batches]
        monkeypatch.setattr(diffusion, "TRACE_AFTER", 0)
        assert all(model.sample(*batch).equal(chunks) for batch, chunks in zip(batches, expected, strict=True))
        assert set(model._traces) == {True, False}
        for parameter in model.parameters():
            parameter.data += 0.01
    assert not model.sample(*batches[0]).equal(expected[0])
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copy.sample(*batches[0]).equal(model.sample(*batches[0]))


class CtrlC:
    """A size, the reading of which is interrupted."""

    def __index__(self) -> int:
        signal.raise_signal(signal.SIGINT)
        return 1


def test_the_trace_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("mlp")
    batch = th.randn(2, 4), th.randn(2, 3, 2)
    expected = model.sample(*batch)
    monkeypatch.setattr(diffusion, "TRACE_AFTER", 0)
    embed = model.denoiser.embed

    def interrupted(timesteps: th.Tensor, condition: th.Tensor) -> th.Tensor:
        timesteps.view(*timesteps.shape, CtrlC())  # type: ignore[call-overload]
        return embed(timesteps, condition)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(model.denoiser, "embed", interrupted)
            model.sample(*batch)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert model.sample(*batch).equal(expected)


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerDiscreteScheduler", "DDIMParallelScheduler"])
def test_other_schedulers_have_no_closed_form(name: str) -> None:
    assert closed_form(getattr(diffusers, name)(), 5) is None
    assert closed_form(diffusers.DDIMScheduler(thresholding=True), 5) is None


@both_kinds
@pytest.mark.parametrize("name", SCHEDULERS)
def test_given_noise_the_sample_is_a_function_of_the_arguments(kind: Kind, name: str) -> None:
    model = make_model(kind, sample_scheduler=name)
    condition, noise = th.randn(6, 4), th.randn(6, 3, 2)
    chunks = model.sample(condition, noise)
    th.manual_seed(99)
    assert th.equal(model.sample(condition, noise), chunks)
    alone = th.cat([model.sample(condition[i : i + 1], noise[i : i + 1]) for i in range(6)])
    th.testing.assert_close(alone, chunks, rtol=1e-3, atol=1e-4)
    assert (model.sample(condition) != model.sample(condition)).any()  # without it, chance decides


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("num_inference_steps", [1, 2, 3, 5, 10, 13, 19, 20])
def test_samples_are_actions_for_any_number_of_steps(name: str, num_inference_steps: int) -> None:
    model = DiffusionModel(Half(), (3, 2), sample_scheduler=name, num_inference_steps=num_inference_steps)
    chunks = model.sample(th.zeros(50, 1))
    assert chunks.isfinite().all() and chunks.abs().max() <= 1


@pytest.mark.parametrize("name", ["NoSuchScheduler", "UNet1DModel", "SchedulerMixin2", "", "__name__"])
@pytest.mark.parametrize("argument", ["train_scheduler", "sample_scheduler"])
def test_unknown_schedulers_are_named(name: str, argument: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is not a scheduler of diffusers; expected a class name"):
        DiffusionModel(Half(), (3, 2), **{argument: name})  # type: ignore[arg-type]


@pytest.mark.parametrize("num_inference_steps", [-1, 0, 21])
def test_num_inference_steps_out_of_range(num_inference_steps: int) -> None:
    message = f"num_inference_steps={num_inference_steps} is not between 1 and .* num_train_timesteps=20"
    with pytest.raises(ValueError, match=message):
        DiffusionModel(Half(), (3, 2), num_inference_steps=num_inference_steps)


# ---------------------------------------------------------------- a distribution with two modes


def train_on_two_modes(model: nn.Module, num_steps: int, batch_size: int, learning_rate: float) -> None:
    """Chunks of two actions, both 0.7 or both -0.7, at one observation."""
    optimizer = th.optim.Adam(model.parameters(), lr=learning_rate)
    annealing = th.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        modes = 1.4 * th.randint(2, (batch_size, 1, 1)) - 0.7
        loss, _ = model.compute_loss(modes.expand(-1, 2, 1), th.ones(batch_size, 4), th.ones(batch_size, 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        annealing.step()


@functools.cache
def learned_denoiser(kind: Kind, prediction_type: str) -> nn.Module:
    model = make_model(kind, (2, 1), scheduler_kwargs={"prediction_type": prediction_type})
    if kind == "unet":
        train_on_two_modes(model, num_steps=1200, batch_size=64, learning_rate=2e-3)
    else:
        train_on_two_modes(model, num_steps=1000, batch_size=256, learning_rate=3e-3)
    return model.denoiser


def share_near_modes(chunks: th.Tensor) -> tuple[float, float]:
    """How many of the chunks have both actions within 0.2 of the upper mode, and of the lower one."""
    upper, lower = (((chunks - mode).abs() < 0.2).flatten(1).all(1).float().mean().item() for mode in (0.7, -0.7))
    return upper, lower


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    "kind, prediction_type", [*(("mlp", kind) for kind in PREDICTION_TYPES), ("unet", "epsilon"), ("unet", "sample")]
)
def test_diffusion_learns_both_modes(kind: Kind, prediction_type: str, name: str) -> None:
    model = DiffusionModel(
        learned_denoiser(kind, prediction_type),
        (2, 1),
        sample_scheduler=name,
        scheduler_kwargs={"prediction_type": prediction_type},
        num_inference_steps=10,
    )
    th.manual_seed(0)
    upper, lower = share_near_modes(model.sample(th.ones(1000, 4)))
    assert upper + lower >= 0.9 and min(upper, lower) >= 0.25


def test_a_gaussian_cannot() -> None:
    """Its best fit has mean 0 and standard deviation 0.7: 28 % of the actions, 4 % of the chunks are near one mode."""
    th.manual_seed(0)
    model = GaussianModel((2, 1), 4, [32])
    train_on_two_modes(model, num_steps=300, batch_size=256, learning_rate=3e-3)
    chunks = model.sample(th.ones(4000, 4))
    actions_near = ((chunks.abs() - 0.7).abs() < 0.2).float().mean().item()
    assert 0.2 < actions_near < 0.36
    assert sum(share_near_modes(chunks)) < 0.1
