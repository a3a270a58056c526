"""Keeps the libraries' own chatter off the screen. Call `apply_quiet` before importing them."""

from __future__ import annotations

import os

__all__ = ["apply_quiet", "quiet_environment"]


def quiet_environment() -> dict[str, str]:
    """Environment defaults that silence library noise; none changes what a run computes."""
    return {
        "DATASETS_VERBOSITY": "error",
        "GRPC_VERBOSITY": "ERROR",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_VERBOSITY": "error",
        "RAY_SCHEDULER_EVENTS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def apply_quiet() -> None:
    """Set the defaults in this process and its children; what the user has set stays."""
    for name, value in quiet_environment().items():
        os.environ.setdefault(name, value)
