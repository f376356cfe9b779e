"""Every test: no network service of ours or theirs is asked, and what a test writes stays in its own folder."""

from __future__ import annotations

import os

# Read when the libraries are imported, so they are set before any test module is.
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
