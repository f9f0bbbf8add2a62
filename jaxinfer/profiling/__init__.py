"""XLA traces and the timeline of steps: recording, reading, reports."""
