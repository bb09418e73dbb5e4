"""From a written request or a design file to run configs, with its contradictions named."""
