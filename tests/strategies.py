"""Hypothesis strategies for settings: of each its good and its bad values, drawn and not listed."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import diffusers
import torch as th
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from stable_baselines3.common.torch_layers import FlattenExtractor

TEXT = st.text("abcdefghijklmnopqrstuvwxyz_-0123456789", max_size=8)
LISTS = st.lists(st.integers(-2, 2), max_size=3)
JUNK = st.one_of(TEXT, st.none(), st.booleans(), LISTS, st.complex_numbers(), st.binary(max_size=3), st.builds(object))


class Setting(NamedTuple):
    """What an argument may be, and what it may not."""

    good: SearchStrategy
    bad: SearchStrategy


def optional(setting: Setting) -> Setting:
    """None is fine, too."""
    return Setting(st.none() | setting.good, setting.bad.filter(lambda value: value is not None))


def count(low: int, high: int) -> Setting:
    return Setting(st.integers(low, high), st.integers(max_value=low - 1) | st.floats() | JUNK)


def number(low: float = -5, high: float = 5, lowest: float = -math.inf, highest: float = math.inf) -> Setting:
    """Good ones are drawn from ``low`` to ``high``; bad ones lie outside of the other two, or are not finite."""

    def is_bad(value: float) -> bool:
        return not (math.isfinite(value) and lowest <= value <= highest)

    return Setting(st.floats(low, high), st.floats().filter(is_bad) | JUNK)


def fraction() -> Setting:
    return number(0, 1, 0, 1)


def at_least_zero(high: float) -> Setting:
    return number(0, high, 0)


def or_auto(setting: Setting) -> Setting:
    return Setting(setting.good | st.just("auto"), setting.bad.filter(lambda value: value != "auto"))


def flag() -> Setting:
    not_flags = st.one_of(TEXT, st.none(), st.integers(), st.floats(), LISTS)
    return Setting(st.booleans(), not_flags)


def choice(*names: Any) -> Setting:
    return Setting(st.sampled_from(names), JUNK.filter(lambda value: value not in names))


def widths(longest: int = 2) -> Setting:
    wrong = st.tuples(st.lists(st.integers(1, 16), max_size=2), count(1, 16).bad).map(lambda pair: [*pair[0], pair[1]])
    not_lists = JUNK.filter(lambda value: not isinstance(value, list))
    return Setting(st.lists(st.integers(1, 16), max_size=longest), wrong | not_lists)


def net_arch() -> Setting:
    """The residual MLP takes equal widths alone."""
    equal = st.tuples(st.integers(1, 2), st.integers(1, 16)).map(lambda pair: [pair[1]] * pair[0])
    parts = st.fixed_dictionaries({"pi": equal, "qf": widths().good})
    wrong_parts = st.fixed_dictionaries(
        {"pi": widths().good, "qf": widths().bad.filter(lambda value: value is not None)}
    )
    other_keys = st.dictionaries(TEXT.filter(lambda key: key not in ("pi", "qf")), widths().good, max_size=2)
    return Setting(parts, widths().bad.filter(lambda value: value is not None) | wrong_parts | other_keys)


def keywords(good: SearchStrategy | None = None, bad: SearchStrategy | None = None) -> Setting:
    """Settings in a dictionary: other names, or no dictionary at all."""
    unknown = st.dictionaries(TEXT.map("x_".__add__), st.integers(), min_size=1, max_size=2)
    no_dictionary = JUNK.filter(lambda value: value)  # SB3 takes what is empty for None
    wrong = unknown | no_dictionary
    return Setting(st.just({}) if good is None else good, wrong if bad is None else wrong | bad)


def instead(good: SearchStrategy, bad: SearchStrategy = JUNK) -> Setting:
    return Setting(good, bad)


def entries(settings: dict[str, Setting]) -> SearchStrategy:
    """A dictionary of a single bad setting."""
    return st.sampled_from(sorted(settings)).flatmap(lambda name: settings[name].bad.map(lambda value: {name: value}))


SOME_CLASS = JUNK | st.sampled_from([int, dict, th.nn.Linear])
NOT_EPSILON = st.one_of(TEXT, st.none(), st.floats(max_value=-1e-9, allow_infinity=False), st.just(math.nan))
OPTIMIZER = {
    "optimizer_class": instead(st.sampled_from([th.optim.Adam, th.optim.AdamW, th.optim.SGD]), SOME_CLASS),
    "optimizer_kwargs": keywords(
        st.fixed_dictionaries({"weight_decay": st.floats(0, 1e-2)}),
        st.one_of(
            NOT_EPSILON.map(lambda value: {"eps": value}),
            NOT_EPSILON.map(lambda value: {"weight_decay": value}),
            st.tuples(NOT_EPSILON, st.floats(0, 0.9)).map(lambda value: {"betas": value}),
            st.just({"lr": 1.0}),
        ),
    ),
}
POLICY = OPTIMIZER | {
    "net_arch": net_arch(),
    "features_extractor_class": instead(st.just(FlattenExtractor), SOME_CLASS.filter(lambda value: value is not None)),
    "features_extractor_kwargs": keywords(bad=st.just({"observation_space": 1})),
}
PLANNER = {
    "num_samples": count(0, 8),
    "num_elites": count(1, 8),
    "num_iterations": count(0, 2),
    "temperature": at_least_zero(10),
    "min_std": number(0, 0.02, 0),
    "max_std": number(0.1, 2, 0),
    "pessimism": number(-1, 2),
    "trust_region": optional(at_least_zero(2)),
    "gamma": fraction(),
}
PLANNER_KWARGS = keywords(bad=entries(PLANNER))
SCHEDULERS = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]
SCHEDULER_KWARGS = {
    "num_train_timesteps": count(5, 30),
    "beta_schedule": instead(st.sampled_from(["linear", "squaredcos_cap_v2"]), TEXT | LISTS),
    "prediction_type": instead(st.sampled_from(["epsilon", "sample", "v_prediction"]), TEXT | LISTS),
}
DIFFUSION = POLICY | {
    "denoiser": choice("mlp", "unet"),
    "proposal": choice("diffusion", "gaussian"),
    "action_horizon": count(4, 6),
    "n_action_steps": count(1, 4),
    "train_scheduler": choice("DDPMScheduler"),
    "sample_scheduler": choice("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"),
    "scheduler_kwargs": keywords(st.fixed_dictionaries({}, optional={k: s.good for k, s in SCHEDULER_KWARGS.items()})),
    "num_inference_steps": count(1, 3),
    "sampling_temperature": at_least_zero(2),
    "condition_noise": or_auto(at_least_zero(1)),
}
WORLD_MODEL = {
    "latent_dim": Setting(st.sampled_from([8, 16]), count(1, 1).bad | st.integers(1, 100).filter(lambda n: n % 8 != 0)),
    "n_critics": count(1, 3),
    "num_proposals": count(1, 4),
    "inference": choice("policy", "planner"),
    "planner_kwargs": PLANNER_KWARGS,
}
CANDIDATES = DIFFUSION | {"n_critics": count(1, 3), "num_candidates": count(1, 4)}
POLICY_KWARGS: dict[str, dict[str, Setting]] = {
    "MODIP": DIFFUSION
    | WORLD_MODEL
    | {"horizon": count(1, 4), "terminal_value": choice("v", "q"), "proposal_temperature": at_least_zero(2)},
    "TDMPC2": POLICY
    | WORLD_MODEL
    | {
        "latent_dim": optional(WORLD_MODEL["latent_dim"]),
        "n_critics": optional(WORLD_MODEL["n_critics"]),
        "model_size": choice(1, 5),
        "encoder_arch": optional(widths()),
        "dropout": fraction(),
        "termination_head": Setting(st.just(True), flag().bad),
        "horizon": count(1, 4),
    },
    "RLPD": POLICY | {"n_critics": count(2, 4)},
    "DiffusionBC": DIFFUSION,
    "DQL": CANDIDATES | {"selection": choice("best", "softmax")},
    "IDQL": CANDIDATES | {"selection": choice("best", "softmax", "expectile")},
    "PARL": CANDIDATES
    | {
        "selection": choice("best", "softmax", "expectile"),
        "num_refined": count(1, 4),
        "num_gradient_steps": count(0, 2),
        "step_size": at_least_zero(1),
    },
    "DSRL": DIFFUSION | {"n_critics": count(1, 3), "noise_magnitude": at_least_zero(3), "noise_arch": widths()},
    "DPPO": DIFFUSION
    | {
        "proposal": Setting(st.just("diffusion"), choice("diffusion", "gaussian").bad),
        "sample_scheduler": Setting(st.just("DDIMScheduler"), choice("DDIMScheduler").bad),
        "num_finetuned_steps": optional(count(1, 1)),
        "min_std": number(0.01, 1, 0),
    },
}

# SB3's own
TRAIN_FREQ = Setting(
    st.integers(1, 10) | st.tuples(st.integers(1, 8), st.just("step")) | st.tuples(st.just(1), st.just("episode")),
    count(1, 1).bad | st.tuples(count(1, 1).bad, st.just("step")) | st.tuples(st.integers(1, 3), JUNK) | st.just((1,)),
)
LEARNER = {
    "learning_rate": number(0, 1e-2, 0),
    "batch_size": count(1, 8),
    "stats_window_size": count(1, 100),
    "seed": optional(Setting(st.integers(0, 2**32 - 1), count(0, 0).bad | st.integers(min_value=2**32))),
    "verbose": count(0, 0),
}
OFF_POLICY = LEARNER | {
    "buffer_size": count(1, 200),
    "learning_starts": count(0, 30),
    "tau": fraction(),
    "gamma": fraction(),
    "train_freq": TRAIN_FREQ,
    "gradient_steps": count(-1, 2),
    "action_noise": optional(instead(st.none())),
    "replay_buffer_class": optional(instead(st.none(), SOME_CLASS)),
    "replay_buffer_kwargs": keywords(),
    "optimize_memory_usage": Setting(st.just(False), flag().bad),
    "offline_fraction": fraction(),
}
OFFLINE = {"pretrain_steps": count(1, 3), "max_grad_norm": at_least_zero(100)}
MODES = {"rollout_with": choice("policy", "planner"), "inference": choice("policy", "planner")}
NOT_ENTROPIES = JUNK.filter(lambda value: value != "auto") | st.floats().filter(lambda x: not 0 <= x < math.inf)
ENT_COEF = Setting(st.sampled_from(["auto", "auto_0.1"]) | st.floats(0, 1), NOT_ENTROPIES | st.just("auto_0"))
CLONING = OFFLINE | {"actor_tau": fraction(), "actor_decay_start": count(1, 5)}
SETTINGS: dict[str, dict[str, Setting]] = {
    "MODIP": OFF_POLICY
    | CLONING
    | MODES
    | {
        "rollout_with": choice("auto", "policy", "planner"),
        "n_steps": count(1, 6),
        "planner_kwargs": PLANNER_KWARGS,
        "critic_target": choice("v", "policy"),
        "td_lambda": fraction(),
        "expectile": fraction(),
        "rho": fraction(),
        "n_plan_steps": optional(count(1, 1)),
        "distill_steps": count(0, 2),
        "distill_batch_size": count(1, 8),
        "distill_offline_fraction": or_auto(fraction()),
        "distill_episodes": choice("all", "better"),
        "distill_from": choice("executed", "relabel", "both"),
        "distill_weighting": choice("advantage", "uniform"),
        "distill_beta": at_least_zero(10),
        "relabel_freq": count(1, 50),
        "actor_reset_freq": count(0, 4),
        "actor_reset_steps": count(1, 3),
    },
    "TDMPC2": OFF_POLICY
    | OFFLINE
    | MODES
    | {
        "gamma": Setting(fraction().good, fraction().bad.filter(lambda value: value is not None)),
        "learning_starts": Setting(st.integers(0, 10), count(0, 0).bad.filter(lambda value: value is not None)),
        "model_size": choice(1, 5),
        "termination_head": Setting(st.just(True), flag().bad),
        "planner_kwargs": PLANNER_KWARGS,
        "rho": fraction(),
        "entropy_coef": at_least_zero(1),
    },
    "RLPD": OFF_POLICY
    | {
        "n_steps": count(1, 3),
        "policy_delay": count(1, 3),
        "n_target_critics": count(1, 2),
        "backup_entropy": flag(),
        "ent_coef": ENT_COEF,
        "target_entropy": Setting(st.just("auto") | st.floats(-3, 0), number().bad.filter(lambda v: v != "auto")),
    },
    "DiffusionBC": LEARNER | CLONING,
    "DQL": OFF_POLICY | CLONING | {"eta": at_least_zero(3)},
    "IDQL": OFF_POLICY | CLONING | {"expectile": fraction()},
    "PARL": OFF_POLICY | CLONING | {"expectile": fraction(), "policy_delay": count(1, 3)},
    "DSRL": OFF_POLICY
    | CLONING
    | {"noise_critic_steps": count(1, 2), "ent_coef": ENT_COEF, "target_entropy": number(-3, 0)},
    "DPPO": LEARNER
    | CLONING
    | {
        "gamma": fraction(),
        "train_freq": count(1, 8),
        "n_epochs": count(1, 2),
        "gae_lambda": fraction(),
        "gamma_denoising": fraction(),
        "clip_range": at_least_zero(0.2),
        "clip_range_base": at_least_zero(0.2),
        "target_kl": optional(at_least_zero(2)),
    },
}


@st.composite
def bad_settings(draw: st.DrawFn, algo: str) -> dict[str, Any]:
    """Arguments of an algorithm, of which one, or one entry of ``policy_kwargs``, is bad."""
    if draw(st.booleans()):
        return draw(entries(SETTINGS[algo]))
    return {"policy_kwargs": draw(keywords(bad=entries(POLICY_KWARGS[algo])).bad | entries(POLICY_KWARGS[algo]))}


@st.composite
def good_settings(draw: st.DrawFn, algo: str) -> dict[str, Any]:
    """Some arguments of an algorithm, all good and small enough to learn in a second."""

    def some(settings: dict[str, Setting], names: Sequence[str]) -> dict[str, Any]:
        return draw(st.fixed_dictionaries({}, optional={name: settings[name].good for name in names}))

    arguments = some(SETTINGS[algo], [name for name in SETTINGS[algo] if name != "planner_kwargs"])
    policy_kwargs = some(
        POLICY_KWARGS[algo], [n for n in POLICY_KWARGS[algo] if n not in ("planner_kwargs", "model_size")]
    )
    if "planner_kwargs" in SETTINGS[algo]:
        arguments["planner_kwargs"] = some(PLANNER, list(PLANNER))
    if arguments.get("distill_from", "executed") != "executed":  # plans are cloned as chunks: their lengths must fit
        policy_kwargs = {n: value for n, value in policy_kwargs.items() if n not in ("action_horizon", "horizon")}
    if "actor_reset_freq" in arguments:  # by default, it takes 15,000 updates
        arguments.setdefault("actor_reset_steps", 2)
    arguments.pop("model_size", None)  # the other settings say how large the networks are
    policy_kwargs = {name: value for name, value in policy_kwargs.items() if value is not None}
    return arguments | {"policy_kwargs": policy_kwargs}


@st.composite
def contradictions(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """An algorithm, and settings that are good one by one and do not go together."""
    small = draw(st.integers(1, 5))
    large = draw(st.integers(small + 1, 12))
    widths = draw(st.lists(st.integers(1, 16), min_size=2, max_size=4).filter(lambda found: len(set(found)) > 1))
    low, high = small / 10, large / 10
    policy = st.sampled_from(
        [
            {"action_horizon": small, "n_action_steps": large, "horizon": 1},
            {"action_horizon": small, "n_action_steps": 1, "horizon": large},
            {"num_inference_steps": large, "scheduler_kwargs": {"num_train_timesteps": small}},
            {"denoiser": "mlp", "net_arch": widths},
        ]
    ).map(lambda kwargs: {"policy_kwargs": kwargs})
    lengths = {"policy_kwargs": {"action_horizon": large, "horizon": small, "n_action_steps": 1}}
    modip = st.sampled_from([lengths | {"distill_from": "both"}, lengths | {"distill_from": "relabel"}])
    planner = {"planner_kwargs": {"min_std": high, "max_std": low}}
    critics = {"n_target_critics": large, "policy_kwargs": {"n_critics": small}}
    return draw(
        st.one_of(
            st.tuples(st.just("MODIP"), policy | modip),
            st.tuples(st.sampled_from(["MODIP", "TDMPC2"]), st.just(planner)),
            st.just(("RLPD", critics)),
        )
    )
