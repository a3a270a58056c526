"""Differential privacy: what a job asks for, what was released, and what that costs.

`settings` is the job's section `dp`, `accounting` turns releases into epsilon, `ledger` keeps them, `noise` is where
random numbers come from that nobody may foresee. No torch, no Ray: the gradients are clipped and noised in
`xcloud.training.private`.
"""

from xcloud.privacy.ledger import PrivacyLedger, Release
from xcloud.privacy.settings import DPConfig

__all__ = ["DPConfig", "PrivacyLedger", "Release"]
