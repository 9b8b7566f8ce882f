"""What this machine lacks for a profile or an assembled repository: a line and a fix for each thing looked at."""
