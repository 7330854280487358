"""Merges that are no weighted mean of rows: each parameter of each row has a weight of its own, learnt from data."""
