"""Offline data: Minari, D4RL, robomimic, SB3 buffers and arrays become one frozen container; reference scores."""

from modip_sb3.datasets.columns import Observations
from modip_sb3.datasets.d4rl import save_d4rl
from modip_sb3.datasets.minari_io import save_minari
from modip_sb3.datasets.offline import DatasetSource, DatasetSources, OfflineDataset
from modip_sb3.datasets.robomimic import save_robomimic
from modip_sb3.datasets.rollout import collect, concatenate
from modip_sb3.datasets.scores import REFERENCE_SCORES, has_reference_score, normalized_score
from modip_sb3.datasets.sources import WeightedDataset, fingerprint, holds_no_data, load_sources
from modip_sb3.datasets.summary import DatasetSummary, summarize

__all__ = [
    "REFERENCE_SCORES",
    "DatasetSource",
    "DatasetSources",
    "DatasetSummary",
    "Observations",
    "OfflineDataset",
    "WeightedDataset",
    "collect",
    "concatenate",
    "fingerprint",
    "has_reference_score",
    "holds_no_data",
    "load_sources",
    "normalized_score",
    "save_d4rl",
    "save_minari",
    "save_robomimic",
    "summarize",
]
