"""Tests with a real SGLang, which are collected only where ``SPECFORGE_SGLANG_PYTHON`` names its interpreter."""

import os

collect_ignore_glob = [] if os.environ.get("SPECFORGE_SGLANG_PYTHON") else ["test_*.py"]
