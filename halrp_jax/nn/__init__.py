"""Layers, and the operations they are made of: fast on the CPU and equal on every platform."""
