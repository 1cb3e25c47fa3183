"""Problems, prompts and micro-batches."""
