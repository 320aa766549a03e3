"""Rankup: a community fine-tunes one language model together.

This package is the hallway: only what two of the rooms (`coordinator`, `worker`, `aggregator`) share.
"""

__version__ = "0.1.0"
