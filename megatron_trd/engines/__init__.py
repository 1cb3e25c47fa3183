"""Student and teacher on Megatron, the sampler on vLLM, and the refit between them."""
