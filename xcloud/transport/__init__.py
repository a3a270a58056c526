"""Adapters that carry messages and raw buffers."""
