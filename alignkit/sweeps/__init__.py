"""Many runs of one notebook, or of the course: a grid of parameters, worker processes, one table."""
