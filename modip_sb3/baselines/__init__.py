"""Algorithms to compare with: SB3 algorithms on the parts of this package, each with ``offline_dataset``."""

from modip_sb3.baselines.diffusion_bc import DiffusionBC
from modip_sb3.baselines.dppo import DPPO
from modip_sb3.baselines.dql import DQL
from modip_sb3.baselines.dsrl import DSRL
from modip_sb3.baselines.idql import IDQL
from modip_sb3.baselines.pa_rl import PARL
from modip_sb3.baselines.rlpd import RLPD
from modip_sb3.baselines.tdmpc2 import TDMPC2

__all__ = ["DPPO", "DQL", "DSRL", "IDQL", "PARL", "RLPD", "TDMPC2", "DiffusionBC"]
