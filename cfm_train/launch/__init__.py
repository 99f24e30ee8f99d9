"""From the command line to a run: one job, a sweep, and what a person is told on the way."""
