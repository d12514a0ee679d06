"""Loads and extends runs, predicts with them, exports them; starts from pretrained weights."""
