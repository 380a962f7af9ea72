"""Bottleneck adapters and their kin: changes of hidden states."""
