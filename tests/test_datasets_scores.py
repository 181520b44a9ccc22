"""D4RL's normalised scores."""

import numpy as np
import pytest
from episodes import in_one_sentence

from modip_sb3.datasets import REFERENCE_SCORES, has_reference_score, normalized_score


def test_normalized_scores() -> None:
    for env_id in ("Hopper-v5", "hopper-medium-v2", "mujoco/hopper/medium-v0", "D4RL/hopper/expert-v2", "hopper"):
        assert has_reference_score(env_id)
        assert normalized_score(env_id, 3234.3) == pytest.approx(100.0)
        assert normalized_score(env_id, -20.272305) == pytest.approx(0.0)
    assert normalized_score("HalfCheetah-v4", -280.178953 + 0.5 * (12135.0 + 280.178953)) == pytest.approx(50.0)
    low, high = REFERENCE_SCORES["walker2d"]
    np.testing.assert_allclose(normalized_score("Walker2d-v5", np.array([low, high])), [0.0, 100.0])
    assert normalized_score("modip/kitchen-scripted-v1", 3.0) == 75.0


def test_unknown_scores() -> None:
    for env_id in ("Ant-v5", "dm_control/hopper-hop-v0", "HopperBulletEnv-v0", "modip/kitchen-complete-v1", ""):
        assert not has_reference_score(env_id)
        with pytest.raises(ValueError) as error:
            normalized_score(env_id, 1.0)
        in_one_sentence(error, repr(env_id), "['halfcheetah', 'hopper', 'kitchen-scripted', 'walker2d']")
    assert not has_reference_score(None)
