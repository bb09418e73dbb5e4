"""What a run leaves on disk: written in one piece, checked when read."""
