"""Adapters: what they are, the files they come from, the pools they are served from."""
