"""Algorithms to compare with: SB3 algorithms on the parts of this package, each with ``offline_dataset``."""

from modip_sb3.baselines.diffusion_bc import DiffusionBC
from modip_sb3.baselines.rlpd import RLPD
from modip_sb3.baselines.tdmpc2 import TDMPC2

__all__ = ["RLPD", "DiffusionBC", "TDMPC2"]
