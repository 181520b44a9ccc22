"""Sources with options: filters over episodes, weights, and what a batch draws of several sources."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from episodes import assert_same, fingerprints, in_one_sentence, make_arrays, next_observations, write_d4rl
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from walk import MakeModel, Walk, record_walk

from modip_sb3 import MODIP
from modip_sb3.datasets import OfflineDataset, holds_no_data, load_sources


def with_returns(*returns: float) -> dict[str, Any]:
    """Episodes of three steps with these returns."""
    arrays = make_arrays((3,) * len(returns), (True, False) * (len(returns) // 2) + (True,) * (len(returns) % 2))
    arrays["rewards"] = np.repeat(np.array(returns, np.float32) / 3, 3)
    return arrays


def returns_of(**options: Any) -> list[float]:
    return OfflineDataset.load({"dataset": with_returns(3, 9, -6, 9, 0), **options}).episode_returns.round(3).tolist()


# ------------------------------------------------------------------- filters


def test_filters_keep_whole_episodes_in_their_order() -> None:
    assert returns_of() == [3, 9, -6, 9, 0]
    assert returns_of(min_return=3) == [3, 9, 9]
    assert returns_of(min_return=None, top_fraction=0.6) == [3, 9, 9]
    assert returns_of(top_fraction=0.2) == [9]  # of equal ones the first
    assert returns_of(top_fraction=0.01) == [9]
    assert returns_of(top_fraction=1) == [3, 9, -6, 9, 0]
    assert returns_of(top_fraction=0.8, min_return=1) == [3, 9, 9]


def test_selected_columns() -> None:
    arrays = with_returns(3, 9, -6, 9) | {"env_id": "Pendulum-v1"}
    dataset = OfflineDataset.load(arrays)
    assert dataset.select() is dataset
    selected = dataset.select(min_return=9)
    rows, episodes = [3, 4, 5, 9, 10, 11], [1, 3]
    for name in ("observations", "actions", "rewards", "terminations", "truncations"):
        np.testing.assert_array_equal(getattr(selected, name), arrays[name][rows])
    np.testing.assert_array_equal(selected.final_observations, arrays["final_observations"][episodes])
    assert (selected.env_id, selected.source) == ("Pendulum-v1", "arrays")
    for name in ("observations", "final_observations"):
        arrays[name] = {"arm": arrays[name][:, :2], "goal": arrays[name][:, 2:]}
    keyed = OfflineDataset.load(arrays).select(min_return=9)
    np.testing.assert_array_equal(keyed.observations["arm"], np.asarray(selected.observations)[:, :2])
    np.testing.assert_array_equal(keyed.final_observations["goal"], np.asarray(selected.final_observations)[:, 2:])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"min_return": 9.5}, ["no episode has a return of min_return=9.5", "the best has 9; lower it"]),
        ({"min_return": "high"}, ["min_return='high' is not a number"]),
        ({"top_fraction": 0}, ["top_fraction=0 is not in (0, 1]"]),
        ({"top_fraction": 1.1}, ["top_fraction=1.1 is not in (0, 1]"]),
        ({"top_fraction": float("nan")}, ["top_fraction=nan is not in (0, 1]"]),
        ({"top": 0.1}, ["unknown options ['top']", "['filter_key', 'min_return', 'obs_keys', 'top_fraction']"]),
        ({"weight": 1}, ["unknown options ['weight']", "'weight' where several are given"]),
        ({"obs_keys": ["object"]}, ["takes no ['obs_keys']", "for those and Minari datasets; leave them out"]),
    ],
)
def test_wrong_options(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        returns_of(**options)
    in_one_sentence(error, "Offline dataset ", *parts)


def test_options_of_a_file(arrays: dict, tmp_path: Path) -> None:
    path = write_d4rl(tmp_path / "data.hdf5", arrays | {"next_observations": next_observations(arrays)})
    before = fingerprints(tmp_path)
    assert_same(OfflineDataset.load({"dataset": str(path)}), OfflineDataset.load(arrays))
    nested = {"dataset": {"dataset": path, "top_fraction": 0.67}, "min_return": -100}
    assert OfflineDataset.load(nested).num_episodes == 2
    with pytest.raises(ValueError) as error:
        OfflineDataset.load({"dataset": path, "filter_key": "train", "obs_keys": ["object"]})
    in_one_sentence(error, "takes no ['filter_key', 'obs_keys']", "'filter_key' is for robomimic files")
    assert fingerprints(tmp_path) == before


# ------------------------------------------------------------------- weights


def test_weights() -> None:
    one, two = with_returns(1, 2), with_returns(3)
    assert [(d.num_transitions, weight) for d, weight in load_sources(one)] == [(6, 6.0)]
    assert [weight for _, weight in load_sources([one, {"dataset": two}])] == [6.0, 3.0]
    weighted = load_sources(({"dataset": one, "weight": 1, "top_fraction": 0.5}, {"dataset": two, "weight": 3}))
    assert [(d.num_transitions, weight) for d, weight in weighted] == [(3, 1.0), (3, 3.0)]
    assert [weight for _, weight in load_sources({"dataset": one, "weight": 0.1})] == [0.1]


@pytest.mark.parametrize(
    ("sources", "parts"),
    [
        ([], ["list of offline datasets is empty"]),
        ([{"dataset": with_returns(1), "weight": 1}, with_returns(1)], ["weights [1, None]; give all of them"]),
        ([{"dataset": with_returns(1), "weight": 0}], ["weight=0 of an offline dataset is not a positive number"]),
        ([{"dataset": with_returns(1), "weight": "2"}], ["weight='2'"]),
        ([{"dataset": with_returns(1), "weight": float("inf")}], ["weight=inf"]),
        ([with_returns(1), [with_returns(1)]], ["of type list"]),
    ],
    ids=str,
)
def test_wrong_sources(sources: list[Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_sources(sources)
    in_one_sentence(error, *parts)


def test_what_names_data_holds_none(arrays: dict) -> None:
    for plain in ("a/b-v0", Path("x.hdf5"), ["a", {"dataset": Path("b"), "weight": 2, "obs_keys": ["object"]}]):
        assert holds_no_data(plain)
    for data in (None, arrays, OfflineDataset.load(arrays), ["a", arrays], {"dataset": arrays, "weight": 1}):
        assert not holds_no_data(data)


# -------------------------------------------------------------- the algorithm


def marked_walk(reward: float) -> dict[str, Any]:
    """The recorded walk with one reward everywhere, by which its rows are told from others."""
    arrays = record_walk()
    return arrays | {"rewards": np.full_like(arrays["rewards"], reward)}


@pytest.mark.parametrize(("weights", "share"), [(None, 0.5), ((1, 3), 0.75)])
def test_batches_draw_from_each_source_by_weight(
    make_model: MakeModel, weights: tuple[int, int] | None, share: float
) -> None:
    datasets = [OfflineDataset.load(marked_walk(reward)) for reward in (0.0, 1.0)]
    sources: list[Any] = datasets
    if weights:
        sources = [{"dataset": data, "weight": weight} for data, weight in zip(datasets, weights, strict=True)]
    model = make_model(Walk(), offline_dataset=sources).pretrain(1)
    for buffer, dataset in zip(model._offline_buffers, datasets, strict=True):
        assert np.shares_memory(buffer.observations, dataset.observations)  # no second copy
    batch = model._sample_offline(2000, 3)
    assert batch.actions.shape == (2000, 3, 1) and batch.observations.shape == (2000, 4, 2)
    assert set(batch.rewards[:, 0].tolist()) == {0.0, 1.0}
    assert abs(batch.rewards[:, 0].mean().item() - share) < 5 * (share * (1 - share) / 2000) ** 0.5
    model.learn(5)


def test_the_normaliser_sees_every_source(make_model: MakeModel) -> None:
    near, far = record_walk(), record_walk()
    for name in ("observations", "next_observations"):
        far[name] = far[name] + 100
    env = VecNormalize(DummyVecEnv([Walk]))
    make_model(env, offline_dataset=[near, far]).pretrain(1)
    rows = np.concatenate([near["observations"], far["observations"]])
    np.testing.assert_allclose(env.obs_rms.mean, rows.mean(0), atol=0.1)
    np.testing.assert_allclose(env.obs_rms.var, rows.var(0), rtol=0.02)


def test_every_source_must_fit_the_environment(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"actions have shape \(2,\), expected \(1,\)"):
        make_model(Walk(), offline_dataset=[record_walk(), record_walk(shape=(2,))]).pretrain(1)


def test_a_model_keeps_plain_sources(make_model: MakeModel, tmp_path: Path) -> None:
    arrays = record_walk()
    path = str(write_d4rl(tmp_path / "walk.hdf5", arrays))
    plain = [{"dataset": path, "weight": 2.0, "top_fraction": 0.5}, {"dataset": path, "weight": 1}]
    model = make_model(Walk(), offline_dataset=plain).pretrain(2)
    model.save(tmp_path / "plain")
    loaded = MODIP.load(tmp_path / "plain", env=Walk())
    assert loaded.offline_dataset == plain
    loaded.pretrain(1)
    make_model(Walk(), offline_dataset=[path, arrays]).pretrain(1).save(tmp_path / "arrays")
    assert MODIP.load(tmp_path / "arrays", env=Walk()).offline_dataset is None
