"""Everything a run leaves on disk."""
