"""Training runs: jobs, the two engines, events, and the record that a run leaves."""
