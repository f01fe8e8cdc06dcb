"""Make a draft model from a target: `dispec distill`."""
