"""The fast engine: many runs train at once on one frozen backbone; a lane is one run's slot in this engine."""
