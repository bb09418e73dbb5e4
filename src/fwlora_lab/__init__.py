"""The experiments around the method: run configs, data, backbones, training, records."""
