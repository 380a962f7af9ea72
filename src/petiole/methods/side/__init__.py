"""Networks beside a frozen backbone: they read its hidden states, so nothing is propagated back through it."""
