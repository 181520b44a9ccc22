"""Hypothesis strategies for spaces and datasets, good and bad."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
from algorithms import Sampler
from gymnasium import spaces
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from walk import stack

from modip_sb3.datasets import OfflineDataset, save_d4rl, save_minari, save_robomimic

Arrays = dict[str, Any]
KEYS = st.sampled_from(["a", "b", "speed", "goal"])
LONGEST = 5  # steps of an episode that there is always, longer than any chunk here


class Episodes(Sampler):
    """Samples of two spaces, in episodes of a random length that terminate or are cut off; counts its steps."""

    total = 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        obs, info = super().reset(**kwargs)
        self.length = int(self.np_random.integers(1, 8))
        return obs, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        obs, reward, *_ = super().step(action)
        self.total += 1
        end = self.steps >= self.length
        terminated = end and bool(self.np_random.integers(2))
        return obs, reward, terminated, end and not terminated, {}


# ------------------------------------------------------------------ spaces


@st.composite
def boxes(draw: st.DrawFn, dims: int = 2) -> spaces.Box:
    """Of several types and shapes, with bounds that are finite and asymmetric, or infinite on some side."""
    dtype = draw(st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.int8]))
    shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=dims)))
    low, width = draw(st.integers(-100, 20)), draw(st.integers(1, 100))
    unbounded = draw(st.sampled_from(["", "low", "high", "both"])) if np.issubdtype(dtype, np.floating) else ""
    return spaces.Box(
        -np.inf if unbounded in ("low", "both") else low,
        np.inf if unbounded in ("high", "both") else low + width,
        shape,
        dtype,
    )


def discrete_spaces(start: SearchStrategy) -> SearchStrategy:
    sizes = st.lists(st.integers(2, 4), min_size=1, max_size=3)
    return st.builds(lambda n, s: spaces.Discrete(n, start=s), st.integers(1, 6), start) | st.builds(
        lambda n, s: spaces.MultiDiscrete(n, start=[s] * len(n)), sizes, start
    )


OBSERVATION_SPACES = st.one_of(
    boxes(),
    st.dictionaries(KEYS, boxes(), min_size=1, max_size=3).map(spaces.Dict),
    discrete_spaces(st.just(0)),
    st.integers(1, 4).map(spaces.MultiBinary),
)
ACTION_SPACES = st.builds(
    lambda low, width, shape, dtype: spaces.Box(low, low + width, tuple(shape), dtype),
    st.floats(-10, 10, width=16),
    st.floats(0.5, 20, width=16),
    st.lists(st.integers(1, 2), min_size=1, max_size=2),
    st.sampled_from([np.float32, np.float64]),
)
IMAGES = st.builds(
    lambda shape, dtype: spaces.Box(0, 255, shape, dtype),
    st.tuples(st.integers(1, 64), st.integers(1, 64), st.sampled_from([1, 3, 4])),
    st.sampled_from([np.uint8, np.float32]),
)
NOTHING = st.integers(0, 3).map(lambda n: spaces.Box(-1, 1, (n, 0) if n else (0,)))
STRUCTURED = st.one_of(
    st.lists(boxes(), min_size=1, max_size=2).map(spaces.Tuple),
    st.integers(1, 9).map(spaces.Text),
    boxes().map(spaces.Sequence),
)
NESTED = st.dictionaries(KEYS, boxes(), min_size=1, max_size=2).map(
    lambda inner: spaces.Dict({"in": spaces.Dict(inner)})
)
NOT_FROM_ZERO = discrete_spaces(st.integers(-5, 5).filter(bool))
BAD_PARTS = st.one_of(IMAGES, STRUCTURED, NOT_FROM_ZERO)
BAD_OBSERVATION_SPACES = st.one_of(
    BAD_PARTS,
    NOTHING,
    NESTED,
    st.builds(lambda good, bad: spaces.Dict({"good": good, "bad": bad}), boxes(), BAD_PARTS),
    st.just(spaces.Dict({})),
)
BAD_ACTION_SPACES = st.one_of(
    NOTHING,
    discrete_spaces(st.integers(-2, 2)),
    st.integers(1, 4).map(spaces.MultiBinary),
    st.dictionaries(KEYS, boxes(), min_size=1, max_size=2).map(spaces.Dict),
    boxes().filter(lambda box: not np.issubdtype(box.dtype, np.floating) or not box.is_bounded()),
    st.floats(-5, 5, width=16).map(lambda bound: spaces.Box(bound, bound, (2,))),
)
ENVIRONMENTS = st.builds(Episodes, OBSERVATION_SPACES, ACTION_SPACES)
BAD_ENVIRONMENTS = st.builds(Episodes, BAD_OBSERVATION_SPACES, ACTION_SPACES) | st.builds(
    Episodes, OBSERVATION_SPACES, BAD_ACTION_SPACES
)


# ------------------------------------------------------------------ good data


@st.composite
def arrays(draw: st.DrawFn, env: gym.Env, finals: str | None = None) -> Arrays:
    """Episodes of random lengths, with what their last steps led to, or all next observations, or neither."""
    lengths = draw(st.lists(st.integers(1, 8), max_size=4)) + [draw(st.integers(LONGEST + 1, 9))]
    terminated = draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    env.observation_space.seed(draw(st.integers(0, 100)))
    env.action_space.seed(0)
    ends = np.cumsum(lengths) - 1
    num = int(ends[-1]) + 1
    terminations, truncations = np.zeros(num, bool), np.zeros(num, bool)
    terminations[ends], truncations[ends] = terminated, ~np.array(terminated)
    found = {
        "observations": stack([env.observation_space.sample() for _ in range(num)]),
        "actions": stack([env.action_space.sample() for _ in range(num)]),
        "rewards": np.array(draw(st.lists(st.floats(-100, 100), min_size=num, max_size=num))),
        "terminations": terminations,
        "truncations": truncations,
    }
    last = stack([env.observation_space.sample() for _ in ends])
    finals = draw(st.sampled_from(["final", "next", "neither"])) if finals is None else finals
    if finals == "final":
        found["final_observations"] = last
    elif finals == "next":
        found["next_observations"] = following(found["observations"], last, ends)
    return found


def following(observations: Any, last: Any, ends: np.ndarray) -> Any:
    if isinstance(observations, dict):
        return {key: following(observations[key], last[key], ends) for key in observations}
    after = np.roll(observations, -1, axis=0)
    after[ends] = last
    return after


def replay_buffer(env: gym.Env, data: Arrays) -> ReplayBuffer:
    """An SB3 buffer that has seen the episodes, with actions in [-1, 1] as SB3's algorithms store them."""
    is_dict, box = isinstance(env.observation_space, spaces.Dict), env.action_space
    assert isinstance(box, spaces.Box)
    num = len(data["rewards"])
    cls = DictReplayBuffer if is_dict else ReplayBuffer
    buffer: Any = cls(num + 3, env.observation_space, box, device="cpu")

    def row(name: str, step: int) -> Any:
        values = data[name]
        return {k: v[[step]] for k, v in values.items()} if isinstance(values, dict) else values[[step]]

    for step in range(num):
        scaled = 2 * (row("actions", step) - box.low) / (box.high - box.low) - 1
        info = {"TimeLimit.truncated": bool(data["truncations"][step])}
        done = row("terminations", step) | row("truncations", step)
        pair = (row("observations", step), row("next_observations", step))
        buffer.add(*pair, scaled, row("rewards", step), done, [info])
    return buffer


@st.composite
def good_sources(draw: st.DrawFn, env: gym.Env, folder: Path) -> Any:
    """What ``offline_dataset`` takes: arrays, files, folders, replay buffers, and lists of them with options."""
    space = env.observation_space
    formats = ["arrays", "dataset", "d4rl", "replay buffer"]
    if isinstance(space, spaces.Box):
        formats.append("minari")
    if isinstance(space, spaces.Box) and len(space.shape) == 1:
        formats.append("robomimic")
    form = draw(st.sampled_from(formats))
    data = draw(arrays(env, "next" if form == "replay buffer" else None))
    if form == "replay buffer":
        return replay_buffer(env, data)
    if form == "arrays":
        return draw(st.sampled_from([data, [data, data], {"dataset": data, "top_fraction": 1.0}]))
    dataset = OfflineDataset.from_arrays(**data)
    if form == "d4rl":
        return str(save_d4rl(dataset, folder / "data.hdf5"))
    if form == "robomimic":
        return [{"dataset": save_robomimic(dataset, folder / "low_dim.hdf5"), "weight": draw(st.floats(0.1, 10))}]
    return save_minari(dataset, "fuzz-v0", env, folder) if form == "minari" else dataset


# ------------------------------------------------------------------ bad data

COLUMNS = ["observations", "actions", "rewards", "terminations", "truncations"]
Fault = Callable[[Any, np.ndarray], Any]
NOT_NUMBERS: list[Callable[[np.ndarray], Any]] = [
    lambda a: a.astype(object),
    lambda a: a.astype(str),
    lambda a: a.astype(complex),
    lambda a: a.astype("S8"),
    lambda a: np.zeros(len(a), "datetime64[s]"),
    lambda a: np.zeros(len(a), [("x", np.float32), ("y", np.int32)]),
]


def set_value(array: np.ndarray, index: int, value: float) -> np.ndarray:
    changed = array.astype(np.float64)
    changed.flat[index % changed.size] = value
    return changed


@st.composite
def bad_column(draw: st.DrawFn, name: str, array: np.ndarray) -> Any:
    """An array with a fault that it must not have anywhere."""
    index, num = draw(st.integers(0, 1000)), len(array)
    faults: list[Any] = [st.sampled_from(NOT_NUMBERS).map(lambda convert: convert(array))]
    faults.append(
        st.integers(0, 2 * num + 3).filter(lambda n: n != num).map(lambda n: np.resize(array, (n, *array.shape[1:])))
    )
    faults.append(st.sampled_from([array[..., None], array.reshape(-1, 1, 1), array.ravel()[0], array.sum()]))
    if name in ("terminations", "truncations"):
        values = st.floats().filter(lambda value: value not in (0, 1))
    elif name == "actions":
        values = st.sampled_from([np.nan, np.inf, -np.inf]) | st.floats(100, 1e30) | st.floats(-1e30, -100)
    else:
        values = st.sampled_from([np.nan, np.inf, -np.inf, 1e300])
    return draw(st.one_of(*faults, values.map(lambda value: set_value(array, index, value))))


@st.composite
def bad_arrays(draw: st.DrawFn, env: gym.Env) -> Arrays:
    """Good arrays with one fault: in a column, among the names, in the episodes, or of another environment."""
    data = draw(arrays(env))
    fault = draw(st.sampled_from(["column", "finals", "missing", "unknown", "empty", "short", "ragged", "other"]))
    if fault == "column":
        name = draw(st.sampled_from(COLUMNS))
        data = replace(data, name, draw(bad_column(name, first_part(data[name]))))
    elif fault == "finals":
        last = first_part(data["observations"])
        data = {k: v for k, v in data.items() if k != "next_observations"}
        data |= {"final_observations": draw(st.sampled_from([last[:0], last, last[..., None], "none", [[1], [2, 3]]]))}
    elif fault == "missing":
        data.pop(draw(st.sampled_from(COLUMNS)))
    elif fault == "unknown":
        data[draw(st.text(min_size=1, max_size=8) | st.integers())] = data["rewards"]
    elif fault == "empty":
        data = {name: part(values, slice(0)) for name, values in data.items()}
    elif fault == "short":
        data = {name: values for name, values in data.items() if name in COLUMNS}
        data["truncations"] = ~data["terminations"]
    elif fault == "ragged":
        name = draw(st.sampled_from(COLUMNS))
        data = replace(data, name, [[0.0] * (1 + index % 2) for index in range(len(data["rewards"]))])
    else:
        wider = draw(st.integers(1, 3))
        name = draw(st.sampled_from(["observations", "actions"]))
        num = len(data["rewards"])
        data = {key: values for key, values in data.items() if key in COLUMNS}
        data[name] = draw(st.sampled_from([np.zeros((num, 7 + wider)), {"elsewhere": np.zeros((num, wider))}]))
    return data


def first_part(values: Any) -> np.ndarray:
    return next(iter(values.values())) if isinstance(values, dict) else values


def part(values: Any, rows: slice) -> Any:
    return {key: array[rows] for key, array in values.items()} if isinstance(values, dict) else values[rows]


def replace(data: Arrays, name: str, column: Any) -> Arrays:
    """With another column; of Dict observations, another array under the first key."""
    if isinstance(data[name], dict):
        column = data[name] | {next(iter(data[name])): column}
    return data | {name: column}


SOURCE_OPTIONS = st.one_of(
    st.tuples(
        st.just("top_fraction"), st.floats().filter(lambda x: not 0 < x <= 1) | st.text(max_size=3) | st.booleans()
    ),
    st.tuples(st.just("min_return"), st.sampled_from([1e9, np.inf, np.nan, "all", True, [1]])),
    st.tuples(
        st.just("weight"), st.floats().filter(lambda x: not 0 < x < np.inf) | st.text(max_size=3) | st.booleans()
    ),
    st.tuples(st.just("filter_key"), st.text(max_size=3) | st.integers()),
    st.tuples(st.just("obs_keys"), st.text(max_size=3) | st.lists(st.text(max_size=3)) | st.integers()),
    st.tuples(st.text(max_size=5).map("x".__add__) | st.integers(), st.integers()),
).map(lambda pair: {pair[0]: pair[1]})
PATHS = st.text("abcxyz./ -_", min_size=1, max_size=12).map(lambda name: f"nowhere/{name}")
NO_SOURCES = st.one_of(st.integers(), st.floats(), st.binary(max_size=4), st.just([]), st.just({}), st.builds(object))


@st.composite
def bad_sources(draw: st.DrawFn, env: gym.Env) -> Any:
    """Good arrays with bad options, paths that are not there, and what is no source at all."""
    data = draw(arrays(env))
    options = SOURCE_OPTIONS.map(lambda option: {"dataset": data, **option})
    lists = st.one_of(PATHS, NO_SOURCES, options).map(lambda bad: [data, bad])
    return draw(st.one_of(options, PATHS, NO_SOURCES, lists, PATHS.map(Path)))


@st.composite
def damage(draw: st.DrawFn, path: Path, skip: tuple[str, ...] = ()) -> str:
    """Damage an HDF5 file: cut it off, or remove or replace one of its arrays."""
    if draw(st.booleans()):
        content = path.read_bytes()
        path.write_bytes(content[: draw(st.integers(0, len(content) - 1))])
        return "cut off"
    with h5py.File(path, "r+") as file:
        found: list[str] = []
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
        name = draw(st.sampled_from(sorted(name for name in found if not {*name.split("/")} & {*skip})))
        values = file[name][()]
        del file[name]
        kind = draw(st.sampled_from(["removed", "text", "group", "length", "scalar", "nan", "dangling"]))
        if kind == "text":
            file[name] = [b"text"] * len(values)
        elif kind == "group":
            file.create_group(name)
        elif kind == "length":
            file[name] = np.resize(values, (len(values) + draw(st.integers(1, 5)), *values.shape[1:]))
        elif kind == "scalar":
            file[name] = 1.0
        elif kind == "nan":
            file[name] = set_value(values, draw(st.integers(0, 1000)), np.nan)
        elif kind == "dangling":
            file[name] = h5py.SoftLink("/nowhere")
    return kind
