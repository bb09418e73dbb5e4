"""The schema of a run config, and how configs are read, composed, checked and written."""
