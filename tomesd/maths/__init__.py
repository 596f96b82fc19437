"""Tensors in, tensors out: no model and no option is known here."""
