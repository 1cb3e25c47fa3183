"""Hugging Face folders and the megatron-core models made from them."""
