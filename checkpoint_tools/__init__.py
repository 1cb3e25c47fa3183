"""Hugging Face folders <-> Megatron distributed checkpoints: exact, one tensor in memory at a time, and verified."""
