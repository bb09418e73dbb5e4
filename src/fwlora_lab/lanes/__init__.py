"""The fast engine: many runs train at once on one frozen backbone, each in a lane, which is one run's slot in the engine."""
