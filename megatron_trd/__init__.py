"""Trajectory-Refined Distillation of language models on Megatron."""

__version__ = "0.1.0"
