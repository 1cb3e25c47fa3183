"""The training job: checks, launch, assembly, loop, checkpoints."""
