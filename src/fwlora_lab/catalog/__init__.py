"""Names and facts as data: tasks, encoders and methods."""
