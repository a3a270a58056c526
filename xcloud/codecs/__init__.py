"""Codecs: how one chunk of an update becomes bytes on the wire. One file for each algorithm."""

from xcloud.codecs.base import CODECS, Array, Bytes, Codec, CodecConfig, Frame, accumulate
from xcloud.codecs.block import Block, BlockConfig
from xcloud.codecs.e3m0 import E3M0, E3M0Config
from xcloud.codecs.fixed import Fixed, FixedConfig
from xcloud.codecs.grid import Grid, GridConfig
from xcloud.codecs.lowrank import LowRank, LowRankConfig
from xcloud.codecs.plain import BFloat16, BFloat16Config, Identity, IdentityConfig
from xcloud.codecs.ring import Ring, ring_add, ring_of
from xcloud.codecs.sign import Sign, SignConfig
from xcloud.codecs.sparse import RandomK, RandomKConfig, Sparse, SparseConfig, TopK, TopKConfig
from xcloud.codecs.ternary import Ternary, TernaryConfig

__all__ = [
    "CODECS",
    "E3M0",
    "Array",
    "BFloat16",
    "BFloat16Config",
    "Block",
    "BlockConfig",
    "Bytes",
    "Codec",
    "CodecConfig",
    "E3M0Config",
    "Fixed",
    "FixedConfig",
    "Frame",
    "Grid",
    "GridConfig",
    "Identity",
    "IdentityConfig",
    "LowRank",
    "LowRankConfig",
    "RandomK",
    "RandomKConfig",
    "Ring",
    "Sign",
    "SignConfig",
    "Sparse",
    "SparseConfig",
    "Ternary",
    "TernaryConfig",
    "TopK",
    "TopKConfig",
    "accumulate",
    "ring_add",
    "ring_of",
]
