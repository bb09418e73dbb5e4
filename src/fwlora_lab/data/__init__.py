"""Data sets as token tables, batches and metrics."""
