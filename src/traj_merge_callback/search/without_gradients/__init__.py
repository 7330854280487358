"""Searches that are told losses of candidates and no gradients."""
