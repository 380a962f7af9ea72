"""The baselines: which of the backbone's own parameters train in place."""
