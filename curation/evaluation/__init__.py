"""What a comparison says: intervals, time to a target, performance profiles."""
