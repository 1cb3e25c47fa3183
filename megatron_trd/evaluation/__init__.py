"""Scoring a model: sampled responses, grading, avg@k and pass@k."""
