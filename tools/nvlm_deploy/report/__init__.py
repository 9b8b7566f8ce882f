"""Numbers and how they are shown: measurements, their statistics, bars; tables for people and JSON for programs."""
