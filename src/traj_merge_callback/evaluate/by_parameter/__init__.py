"""Merges that are no weighted mean of rows: what each parameter or layer is made of is learnt from data."""
