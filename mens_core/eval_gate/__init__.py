"""Is a run good enough? A policy's gates, judged by what the run's own files say and what its model answers."""
