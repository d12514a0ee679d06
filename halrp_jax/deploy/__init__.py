"""Finished runs in use: load, predict, extend and export a model; start from pretrained weights."""
