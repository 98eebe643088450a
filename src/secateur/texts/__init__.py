"""What comes in: tasks, rows, streams, batches, calibration texts, and when enough of them were read."""
