"""What a run leaves to read: metrics and samples on disk, progress on the terminal, a report in HTML."""
