"""Uses finished runs: loads, predicts with, extends, exports; starts from pretrained weights."""
