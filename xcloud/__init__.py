"""Train one language model across cloud regions that never exchange their data.

Each region trains on its own text with DeepSpeed; between rounds only model updates
travel, and every region ends a round with the same weights. `xcloud train JOB` runs a job
file; `docs/` describes its keys.
"""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("xcloud")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0+source"
