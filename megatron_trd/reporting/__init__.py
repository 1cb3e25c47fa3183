"""Output of a run: metrics and samples on disk, progress on the terminal, a report in HTML."""
