"""Offline data: Minari, D4RL HDF5 and plain arrays become one frozen container of episodes; reference scores."""

from modip_sb3.datasets.minari_io import save_minari
from modip_sb3.datasets.offline import DatasetSource, Observations, OfflineDataset
from modip_sb3.datasets.scores import REFERENCE_SCORES, has_reference_score, normalized_score

__all__ = [
    "REFERENCE_SCORES",
    "DatasetSource",
    "Observations",
    "OfflineDataset",
    "has_reference_score",
    "normalized_score",
    "save_minari",
]
