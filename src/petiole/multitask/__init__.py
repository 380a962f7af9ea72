"""Several tasks at once on one backbone."""
