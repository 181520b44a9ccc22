"""MODIP for Stable-Baselines3: clone a diffusion policy from offline data, then fine-tune it with a latent planner."""

import modip_sb3.envs  # noqa: F401  (registers our environments in Gymnasium)
from modip_sb3.datasets import OfflineDataset
from modip_sb3.modip import MODIP
from modip_sb3.policies import MODIPPolicy
from modip_sb3.policies import MODIPPolicy as MlpPolicy
from modip_sb3.policies import MODIPPolicy as MultiInputPolicy

__version__ = "0.1.0"

__all__ = ["MODIP", "MODIPPolicy", "MlpPolicy", "MultiInputPolicy", "OfflineDataset"]
