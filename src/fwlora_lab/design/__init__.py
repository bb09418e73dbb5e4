"""From a written request or a design file to run configs, and the contradictions found on the way."""
