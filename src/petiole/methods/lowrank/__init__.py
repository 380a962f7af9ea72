"""LoRA and its kin: changes of weights."""
