"""Where a design contradicts itself or what is known."""
