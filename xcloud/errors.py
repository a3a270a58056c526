"""One tree of errors for everything a user can cause or meet.

Every error names the thing it is about (file, key, region or peer), says what was
expected and what to do next. `assert` is kept for invariants of our own code.
"""

from __future__ import annotations

__all__ = [
    "AggregationError",
    "CheckpointError",
    "CloudError",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "ExportError",
    "ForeignKeyError",
    "JournalError",
    "KeyFileError",
    "MessageError",
    "ModelError",
    "NonFiniteUpdateError",
    "PlacementError",
    "PolicyError",
    "PrivacyAccountingError",
    "PrivacyBudgetError",
    "QuorumError",
    "RegionError",
    "ReplayError",
    "SecurityError",
    "TamperError",
    "TruncatedError",
    "XCloudError",
]


class XCloudError(Exception):
    """Base of every error that xcloud raises on purpose."""


class ConfigError(XCloudError, ValueError):
    """The job file (or an override) is wrong. Nothing has been started."""


class DataError(XCloudError):
    """A data source cannot be read, is empty, or does not match what was packed before."""


class ModelError(XCloudError):
    """A model or tokenizer cannot be built, or does not fit the job."""


class PlacementError(XCloudError):
    """No set of nodes can hold a pool."""


class CloudError(XCloudError):
    """A cloud's API did not do what it was asked for.

    Attributes:
        what: the message without the cloud's name.
    """

    def __init__(self, cloud: str, message: str) -> None:
        super().__init__(f"cloud {cloud!r}: {message}")
        self.what = message


class RegionError(XCloudError):
    """A region failed: it died, or one of its ranks raised."""

    def __init__(self, region: str, message: str) -> None:
        super().__init__(f"region {region!r}: {message}")
        self.region = region


class NonFiniteUpdateError(RegionError):
    """A region's update holds NaN or Inf; it is refused before it can reach the sum."""


class AggregationError(XCloudError):
    """The aggregation actor could not fold the updates of a round."""


class DivergenceError(AggregationError):
    """Regions that must hold the same model do not."""


class QuorumError(XCloudError):
    """Too few regions answered, and the failure policy says to stop."""


class PrivacyAccountingError(XCloudError, ValueError):
    """No epsilon can be given for what is asked; none is reported then."""


class PrivacyBudgetError(XCloudError):
    """A round would cost more privacy than the job allows; it was not started."""


class MessageError(XCloudError, ValueError):
    """A message does not match its schema; its sender is named."""


class CheckpointError(XCloudError):
    """A checkpoint is missing, damaged or belongs to another job."""


class SecurityError(XCloudError):
    """A signature, a sealed message, a key file or a step of the protocol is not what it must be; nothing was revealed."""


class KeyFileError(SecurityError):
    """A key, a public key or a roster in a file is missing, damaged, open to others, or would be overwritten."""


class PolicyError(SecurityError):
    """A region's own policy forbids what a plan asks for, or its file is wrong."""


class JournalError(SecurityError):
    """What a region must remember cannot be read, kept, or is in use by another process."""


class ForeignKeyError(SecurityError):
    """Signed by, or sealed for, somebody else than the roster or the plan says."""


class TamperError(SecurityError):
    """What has arrived is not what its sender has signed."""


class TruncatedError(SecurityError):
    """Part of what its sender has signed is missing."""


class ReplayError(SecurityError):
    """Made for another job, round or attempt, or presented a second time."""


class ExportError(XCloudError):
    """The model cannot be exported."""
