"""The fast engine: many runs at once on one frozen backbone."""
